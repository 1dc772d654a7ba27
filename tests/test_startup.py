"""The package and its command at start-up: what they load, and which names they show."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import run_copies
from typer.testing import CliRunner

import hfblend
import hfblend.blend.caches
from hfblend import cli

ROOT = Path(hfblend.__path__[0]).parent
HEAVY = ("torch", "transformers", "numpy")


def fresh(code: str) -> object:
    """The JSON that code prints as its last line in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- the command ------------------------------------------------------------------------------------------------------


COMMANDS = [
    (["--help"], 0, "precompute"),
    (["--version"], 0, f"hfblend {hfblend.__version__}"),
    (["--verison"], 2, "No such option: --verison"),
    (["bnech"], 2, "Did you mean 'bench'?"),
    (["verify", "--help"], 0, "--max-kl"),
    (["precompute", "--corpsu", "a.jsonl"], 2, "No such option: --corpsu"),
    (["profile", "--tokens", "5"], 2, "--tokens must be above 32"),
    (["bench", "--lenghts", "5"], 2, "No such option: --lenghts"),
    (["eval", "--help"], 0, "--max-context"),
    (["store", "--help"], 0, "prune"),
    (["store", "ls", "--jsn", "folder"], 2, "No such option: --jsn"),
    *(([name, "--nope"], 2, "No such option: --nope") for name in ("demo", "run", "explain", "playground")),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_help_and_mistakes_load_no_torch():
    """In copies of a process that has imported the command."""
    copies = [f"try: app({command!r})\nfinally: assert not {{*{HEAVY}}} & {{*sys.modules}}" for command, *_ in COMMANDS]
    prepared = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom hfblend.cli import app"
    for (command, exit_code, says), done in zip(COMMANDS, run_copies(prepared, copies)):
        assert (command, done.returncode) == (command, exit_code)
        assert says in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_every_command_is_listed_and_has_its_own_help():
    listed = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.replace("│", " ").split())
    for name, (_, line) in cli._COMMANDS.items():
        assert f"{name} {line}" in listed
        shown = " ".join(CliRunner().invoke(cli.app, [name, "--help"]).output.split())
        assert f"{name} [OPTIONS]" in shown
        assert "--show-completion" not in shown


# --- the package ------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_of_it():
    loaded = fresh("import hfblend, json, sys; print(json.dumps([*sys.modules]))")
    assert not {*HEAVY} & {*loaded}
    assert [name for name in loaded if name.startswith("hfblend")] == ["hfblend"]


def test_tab_shows_the_public_names_only():
    assert "hfblend.blend.caches" in sys.modules
    assert {name for name in dir(hfblend) if not name.startswith("_")} == {*hfblend.__all__}


def test_types_and_names_agree():
    """Type checkers read the imports under TYPE_CHECKING, Python the table."""
    tree = ast.parse((ROOT / "hfblend" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == hfblend._MODULES
    assert sorted(typed) == sorted(hfblend.__all__)


FIRST = [
    "import hfblend.blend",
    "from hfblend.blend import selection",
    "from hfblend import blend, store",
    "import hfblend.store; import hfblend.blend.rotation",
]
LOOK = """
import hfblend
from hfblend import blend
import hfblend.blend.caches
assert hfblend.blend is blend and isinstance(blend, types.FunctionType)
assert isinstance(sys.modules["hfblend.blend"], types.ModuleType)
assert hfblend.store.DiskStore and hfblend.generate.fallbacks.Fallback
assert {name for name in dir(hfblend) if name[0] != "_"} == {*hfblend.__all__}
"""
LAZY = """
before = {*sys.modules}
import hfblend.trace.recorder, hfblend.trace.file, hfblend.patching
assert not {"matplotlib", "pandas", "IPython", "hfblend.display"} & ({*sys.modules} - before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.thorough
def test_blend_is_the_function_whatever_is_imported_first_and_displays_are_loaded_when_asked_for():
    """In copies of a process that has imported what hfblend needs."""
    needed = (
        "import types, torch, transformers, rich.console\nfrom transformers import GenerationMixin, LlamaForCausalLM"
    )
    prepared = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{needed}"
    end = "import os; os._exit(0)"  # at once: what torch leaves takes a second to be freed
    for done in run_copies(prepared, [*(first + LOOK + end for first in FIRST), LAZY + end]):
        assert done.returncode == 0, done.stderr


def test_public_names_are_pickled_and_unknown_ones_refused():
    config = hfblend.BlendConfig(namespace="a")
    assert pickle.loads(pickle.dumps([config, hfblend.blend])) == [config, hfblend.blend]
    with pytest.raises(AttributeError, match="module 'hfblend' has no attribute 'blendd'"):
        hfblend.blendd  # noqa: B018
    assert not hasattr(hfblend, "_wrong")


def test_a_public_name_can_be_replaced(monkeypatch):
    monkeypatch.setattr(hfblend, "blend", len)
    assert hfblend.blend("ab") == 2


def test_a_clone_next_to_a_script_is_no_package(tmp_path):
    """An editable install, as pip makes it, is found from a script in the folder of a clone called hfblend.

    `-S` leaves out the installation that runs this test."""
    clone, site = tmp_path / "hfblend", tmp_path / "site"
    shutil.copytree(ROOT / "hfblend", clone / "hfblend", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    site.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_editable({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    zipfile.ZipFile(next(site.glob("*.whl"))).extractall(site)
    (tmp_path / "script.py").write_text(
        f"import site; site.addsitedir({str(site)!r})\nimport hfblend; print(hfblend.__file__)", encoding="utf-8"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(clone / "hfblend" / "__init__.py")
