"""The progress bar of long commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(stderr: Console, *texts: str) -> Progress:
    """A bar in a terminal only, with more texts before its times."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *map(TextColumn, texts),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=stderr, transient=True, disable=not stderr.is_terminal,
    )  # fmt: skip
