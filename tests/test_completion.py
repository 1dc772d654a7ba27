"""Completion of the command in shells: commands, options and the names that options take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfblend.cli import app, completion
from hfblend.lab.baselines import METHODS
from hfblend.lab.eval.data import GENERATED_NAMES, LONGBENCH_NAMES
from hfblend.lab.settings import PLACES
from hfblend.lab.synthetic import SHAPES

ROOT = Path(__file__).parents[1]
TYPED = {  # what stands on the line -> what TAB offers
    "hfblend pre": "precompute",
    "hfblend store pr": "prune",
    "hfblend ask --comp": "--compare",
    "hfblend ask --selection kv": "kv_deviation",
    "hfblend eval --methods full_reuse,qc": "full_reuse,qcfuse",
    "hfblend eval --data var": "variable_tracking",
    "hfblend ask README": "",  # bash offers files itself
}


def test_the_names_are_those_of_the_lab():
    assert (*METHODS,) == completion.METHODS
    assert (*LONGBENCH_NAMES, *GENERATED_NAMES) == completion.QUESTIONS
    assert ((*SHAPES,), (*PLACES,)) == (completion.SHAPES, completion.PLACES)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_after_install_completion(tmp_path):
    """As bash calls it for TAB, in a home whose `.bashrc` the command has written."""
    (tmp_path / "hfblend").write_text(f"#!{sys.executable}\nfrom hfblend.cli import app\napp(prog_name='hfblend')\n")
    (tmp_path / "hfblend").chmod(0o755)
    tab = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hfblend_completion hfblend; echo "${COMPREPLY[*]}"'
    script = ["hfblend --install-completion >installed && source ~/.bashrc"]
    script += [f"COMP_WORDS=({line}); {tab}" for line in TYPED]
    places = {"HOME": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": {**os.environ, **places}, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-c", "\n".join(script)], timeout=120, check=True, **options)
    assert done.stdout.splitlines() == list(TYPED.values()), done.stderr


@pytest.mark.parametrize(
    ("shell", "says"),
    [("zsh", '"kv_deviation"'), ("fish", "kv_deviation"), ("powershell", "kv_deviation")],
)
def test_other_shells_are_told_the_same(shell, says):
    asked = {"_TYPER_COMPLETE_ARGS": "hfblend ask --selection kv", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked["_TYPER_COMPLETE_WORD_TO_COMPLETE"] = "kv"
    result = CliRunner().invoke(app, prog_name="hfblend", env={**asked, "_HFBLEND_COMPLETE": f"complete_{shell}"})
    assert says in result.output
    assert "mixed" not in result.output
