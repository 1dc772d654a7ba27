"""`benchmarks/house.py` counts by hand on a made-up package, and follows a call through the real one."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import hfblend

ROOT = Path(__file__).parent.parent
house = runpy.run_path(str(ROOT / "benchmarks" / "house.py"))

FILES = {
    "__init__.py": "from .blend.algorithm import run",
    "config.py": "",
    "blend/__init__.py": "",
    "blend/algorithm.py": "from . import caches\nfrom ..config import Config\ndef run(): from ..gpu import graphs",
    "blend/caches.py": "import torch",
    "gpu/__init__.py": "",
    "gpu/graphs.py": "if TYPE_CHECKING:\n    from ..blend.algorithm import run\nfrom made_up import config",
}


@pytest.fixture
def package(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / "made_up" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return tmp_path / "made_up"


def test_imports_circles_and_floors_by_hand(package):
    graph = house["import_graph"](package)
    assert graph["blend.algorithm"] == {"blend.caches", "config", "gpu.graphs"}
    assert graph["gpu.graphs"] == {"blend.algorithm", "config"}
    circles = {circle for circle in house["circles_of"](graph).values() if len(circle) > 1}
    assert circles == {frozenset({"blend.algorithm", "gpu.graphs"})}
    assert house["upward_imports"](graph) == ["blend.algorithm -> gpu.graphs"]
    assert house["longest_chain"](graph) == ["__init__", "blend.algorithm = gpu.graphs", "config"]


def test_the_cores_imports_of_transformers_are_named(package):
    (package / "blend" / "caches.py").write_text("import torch\nfrom transformers.cache_utils import Cache\n")
    files = sorted((package / "blend").glob("*.py"))
    assert house["transformers_imports"](files) == ["transformers.cache_utils"]


def test_prose_is_docstrings_comments_and_messages(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""Stands behind `beside` it."""\nnobody = 1  # beside the point\nraise ValueError("of its own")\n'
    )
    assert house["dialect_words"]([file]) == 3


def test_a_warm_generate_is_followed_through_the_package():
    way = house["way_of_generate"](Path(hfblend.__file__).parent)
    assert str(Path(hfblend.__file__).parent / "blend" / "algorithm.py") in way.files
    assert 1 < way.depth < way.hops
