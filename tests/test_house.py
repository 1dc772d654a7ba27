"""The rules of the house: who may import whom."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

import hfblend

ROOT = Path(hfblend.__file__).parent
_SCRIPT = runpy.run_path(str(ROOT.parent / "benchmarks" / "house.py"))
_EARLIER = ("optional", "outputs")  # modules of earlier versions, which the script can measure too
FLOOR = {room: floor for room, floor in _SCRIPT["FLOOR_OF"].items() if room not in _EARLIER}
FILES = sorted(ROOT.rglob("*.py"))
# Models are loaded and built in the last two.
KNOWS_TRANSFORMERS = (
    "model/",
    "attention/switch.py",
    "serving/engine.py",
    "serving/attention.py",
    "serving/app.py",
    "demo/model.py",
    "lab/synthetic.py",
)
ALLOWED: set[str] = set()  # only ever shrinks


def imports_of(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file, modules of hfblend from its root: `blend.caches`."""
    package, found = file.relative_to(ROOT).parts[:-1], []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(name.name, "") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, node.module] if node.module else base)
            found += [("hfblend." * bool(node.level) + module, name.name) for name in node.names]
    return found


def room_of(module: str, name: str) -> str:
    parts = [part for part in module.split(".")[1:] if part] or [name]
    return parts[0] if parts[0] in FLOOR else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_from_its_own_room_or_a_lower_one(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    others = [f"{module} ({name})" for module, name in imports_of(file) if module.split(".")[0] == "hfblend"
              and (room := room_of(module, name)) != own and FLOOR[room] >= FLOOR[own]]  # fmt: skip
    assert not others or str(file.relative_to(ROOT)) in ALLOWED, f"{file} imports from above: {others}"


def test_rooms_are_the_ones_that_are_named():
    rooms = {
        path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and list(path.glob("*.py")))
    }
    assert rooms <= set(FLOOR)
    assert sum(path.suffix == ".py" and path.stem != "__init__" for path in ROOT.iterdir()) <= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_model_room_knows_transformers(file):
    place = file.relative_to(ROOT).as_posix()
    if place.startswith(KNOWS_TRANSFORMERS):
        return
    known = {module for module, _ in imports_of(file) if module.split(".")[0] == "transformers"}
    assert known <= {"transformers.cache_utils"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_store_room_asks_for_a_store_s_class(file):
    if file.relative_to(ROOT).parts[0] == "store":
        return
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    asked = [ast.unparse(call.args[1]) for call in calls if ast.unparse(call.func) == "isinstance"]
    assert not [kinds for kinds in asked if "Store" in kinds]


def test_no_chain_of_imports_is_long():
    chain = _SCRIPT["longest_chain"](_SCRIPT["import_graph"](ROOT))
    assert len(chain) <= 15, " -> ".join(chain)


def test_the_core_is_read_in_one_sitting():
    core = ("algorithm", "selection", "rotation", "caches")
    assert sum(len((ROOT / "blend" / f"{name}.py").read_text().splitlines()) for name in core) <= 600
