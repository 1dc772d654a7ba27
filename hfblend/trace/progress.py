"""Says what goes on and how far it is, in a terminal or a notebook; anywhere else, nothing.

    with told("Reading files", total=3) as line:
        for file in files:
            read(file)
            line.advance()

Rows of a terminal stand on stderr and are erased at the end. Transformers' switch for its bars is the switch for these.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..util import visible

NOTEBOOK_S = 1.0  # what ends earlier leaves nothing in a notebook


class _Hearing:
    """A function that hears of lines, and those that are open."""

    def __init__(self, listener: Callable[[Line], None]) -> None:
        self.listener, self.open = listener, list[Line]()


_hearing: ContextVar[_Hearing | None] = ContextVar("hearing", default=None)


class Line:
    """What goes on, and how far it is; this one is shown nowhere."""

    def __init__(self, text: str, total: int | None) -> None:
        self.text, self.total, self.done, self.hearing = text, total, 0, _hearing.get()

    def __str__(self) -> str:
        return f"{self.text} …" if self.total is None else f"{self.text}: {self.done:,} of {self.total:,} …"

    def start(self) -> None:
        """Shows the line."""
        if self.hearing is not None:
            self.hearing.open.append(self)
        self._hear()

    def say(self, text: str) -> None:
        """Replaces the text."""
        self.text = text
        self.show()
        self._hear()

    def advance(self, by: int = 1) -> None:
        """Counts what was done."""
        self.done += by
        self.show()
        self._hear()

    def stop(self) -> None:
        """Removes the line; a second call has no effect."""

    def show(self) -> None:
        """Shows the line as it is now."""

    def _hear(self) -> None:
        if self.hearing is not None:
            self.hearing.listener(self)


@contextmanager
def told(text: str, total: int | None = None) -> Iterator[Line]:
    """Shows a line while the block runs; one within another stands below it.

    Args:
        total: of the steps that `advance` counts, if their number is known.
    """
    line = _kind()(text, total)
    try:
        line.start()
        yield line
    finally:
        line.stop()
        if line.hearing is not None and line in line.hearing.open:
            line.hearing.open.remove(line)
    if line.hearing is not None and line.hearing.open:
        line.hearing.listener(line.hearing.open[-1])  # goes on


@contextmanager
def heard(listener: Callable[[Line], None]) -> Iterator[None]:
    """Calls a function with each new state of a line in this thread; what it raises ends the work."""
    token = _hearing.set(_Hearing(listener))
    try:
        yield
    finally:
        _hearing.reset(token)


def _kind() -> type[Line]:
    hub = sys.modules.get("huggingface_hub.utils")
    if hub is not None and hub.are_progress_bars_disabled():
        return Line
    if hasattr(_shell(), "kernel"):
        return NotebookLine
    return TerminalLine if sys.stderr is not None and sys.stderr.isatty() else Line


def _shell() -> Any:
    """IPython's shell, if this process runs in one; that of a notebook has a kernel."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


# --- terminals --------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_rows: Any = None  # rich's Progress, while lines are open


class TerminalLine(Line):
    """A row on stderr."""

    def start(self) -> None:
        global _rows
        with _lock:
            if _rows is None:
                _rows = _new_rows()
                _rows.start()
            self._row = _rows.add_task(visible(self.text), total=self.total)
            _rows.refresh()
        super().start()

    def show(self) -> None:
        with _lock:
            if _rows is not None and self._row in _rows.task_ids:
                _rows.update(self._row, description=visible(self.text), completed=self.done)

    def stop(self) -> None:
        global _rows
        with _lock:
            if _rows is None or self._row not in _rows.task_ids:
                return
            _rows.remove_task(self._row)
            if not _rows.task_ids:
                _rows.stop()
                _rows = None


def _new_rows() -> Any:
    from rich import progress
    from rich.console import Console

    class Count(progress.MofNCompleteColumn):
        def render(self, task: Any) -> Any:
            return "" if task.total is None else super().render(task)

    columns = (progress.BarColumn(20), Count(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    words = progress.TextColumn("{task.description} …", markup=False)
    console = Console(stderr=True)
    return progress.Progress(words, *columns, console=console, transient=True, redirect_stdout=False)


# --- notebooks --------------------------------------------------------------------------------------------------------


class NotebookLine(Line):
    """An output of the cell, empty at the end."""

    _output: Any = None
    _timer: threading.Timer | None = None

    def start(self) -> None:
        self._timer = threading.Timer(NOTEBOOK_S, self._begin)
        self._timer.daemon = True
        self._timer.start()
        super().start()

    def _begin(self) -> None:
        from IPython.display import display

        with _lock:
            if self._timer is not None:
                self._output = display(self._bundle(str(self)), raw=True, display_id=True)

    def show(self) -> None:
        with _lock:
            if self._output is not None:
                self._output.update(self._bundle(str(self)), raw=True)

    def stop(self) -> None:
        with _lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._output is not None:
                self._output.update(self._bundle(""), raw=True)
            self._timer = self._output = None

    @staticmethod
    def _bundle(text: str) -> dict[str, str]:
        return {"text/plain": visible(text)}
