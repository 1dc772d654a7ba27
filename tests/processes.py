"""Scripts in processes that begin as copies of one that has imported PyTorch and Transformers.

Starting Python anew and importing them takes five seconds of a core. A script whose exit is the thing under test (what
it writes at its end, threads that outlive it) needs a Python that ends by itself: `run_copies`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_FORKING = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
_IMPORTED = ("torch", "transformers.generation", "transformers.models.llama.modeling_llama", "hfblend.patching")


def run_script(
    script: str | Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a file, or code, as `python` would; returns its exit code, output and errors."""
    return _outcome(lambda job: _ended(_process(_run, *job)), script, arguments, environment, folder)


class Prepared:
    """A process that has run a preparation, and runs each script in a copy of itself. Needs `os.fork`.

    The preparation should start no thread.
    """

    def __init__(self, preparation: str) -> None:
        self._jobs, jobs = _FORKING.Pipe()
        self._process = _process(_copies_of, preparation, jobs)
        jobs.close()

    def run_script(
        self, script: Path, *arguments: str, environment: Mapping[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        """Runs a file as `run_script` does."""
        return _outcome(self._code_of, script, arguments, environment, folder)

    def _code_of(self, job: _Job) -> int:
        self._jobs.send(job)
        return self._jobs.recv()

    def close(self) -> None:
        """Ends the process."""
        self._jobs.close()
        self._process.join()


_Job = tuple[str | Path, tuple[str, ...], dict[str, str], str, list[str]]  # the parameters of `_run`


def _outcome(
    code_of: Callable[[_Job], int],
    script: str | Path,
    arguments: tuple[str, ...],
    environment: Mapping[str, str] | None,
    folder: str | Path | None,
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as said:
        files = [str(Path(said) / name) for name in ("stdout", "stderr")]
        environment, folder = {**(os.environ if environment is None else environment)}, str(folder or Path.cwd())
        code = code_of((script, arguments, environment, folder, files))
        texts = [Path(file).read_text(encoding="utf-8") if Path(file).exists() else "" for file in files]
    return subprocess.CompletedProcess([str(script), *arguments], code, *texts)


def _process(target: Callable[..., None], *arguments: Any) -> Any:
    if hasattr(_FORKING, "set_forkserver_preload"):
        _FORKING.set_forkserver_preload([*_IMPORTED])  # read when the first copy is made
    process = _FORKING.Process(target=target, args=arguments)
    process.start()
    return process


def _ended(process: Any) -> int:
    process.join()
    return process.exitcode or 0


def _copies_of(preparation: str, jobs: Connection) -> None:
    exec(compile(preparation, "<preparation>", "exec"), {})
    with contextlib.suppress(EOFError):  # the process that asks has ended
        while job := jobs.recv():
            copy = multiprocessing.get_context("fork").Process(target=_run, args=job)
            copy.start()
            jobs.send(_ended(copy))


def _run(
    script: str | Path, arguments: tuple[str, ...], environment: dict[str, str], folder: str, files: list[str]
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [str(script) if isinstance(script, Path) else "-c", *arguments]
    if isinstance(script, Path):
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    else:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


_COPIES = """
import json, os
exec(PREPARATION)
codes = []
for number, script in enumerate(SCRIPTS):
    if not (child := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(f"{FOLDER}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        exec(compile(script, "<script>", "exec"))
        break  # the copy is at its end, and ends as Python does
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    print(json.dumps(codes))
"""


def run_copies(preparation: str, scripts: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Runs scripts one after the other, each in a copy of one new Python that has run the preparation.

    Needs `os.fork`. The preparation should start no thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = {"PREPARATION": preparation, "SCRIPTS": scripts, "FOLDER": folder}
        code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + _COPIES
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        codes = json.loads(done.stdout.splitlines()[-1])
        said = [[Path(folder, f"{i}.{stream}").read_text("utf-8") for stream in (1, 2)] for i in range(len(codes))]
    return [subprocess.CompletedProcess(script, code, *texts) for script, code, texts in zip(scripts, codes, said)]
