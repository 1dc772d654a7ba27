"""`hfblend precompute`: a corpus into a store, before the first question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .precomputing import Precomputed
    from .store import Store


def count_texts(corpus: Path, field: str) -> int:
    """How many texts a corpus has; the whole file is checked, before any model is loaded.

    Raises:
        ValueError: a line that holds no text, with its number; no text at all; a pipe, which can be read once only.
    """
    if not corpus.is_file():
        raise ValueError(f"{corpus} is no file, and the corpus is read twice; write it to one.")
    count = sum(1 for _ in texts_of(corpus, field))
    if not count:
        raise ValueError(f"{corpus} holds no texts.")
    return count


def texts_of(corpus: Path, field: str) -> Iterator[str]:
    """The texts of a JSONL file: lines are strings, or objects with that field. Blank lines are left out.

    Raises:
        ValueError: as `count_texts`.
    """
    with corpus.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(line, field, f"{corpus}, line {number}")


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}).") from error
    if isinstance(row, dict) and field not in row:
        raise ValueError(f"{where}: no field {field!r}, only {', '.join(row) or 'none'}; name another with --field.")
    text = row[field] if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected a text, or an object such as {{"{field}": "…"}}.')
    if not text.strip():
        raise ValueError(f"{where}: the text is empty; leave the line out.")
    return _without_halves(text, where)


def _without_halves(text: str, where: str) -> str:
    """The same text; JSON and command lines may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: no Unicode text ({error.reason} at character {error.start}).") from error
    return text


def prefix_of(prefix: str | None, prefix_file: Path | None) -> str:
    """The prefix, from either option; a file is taken as it is, with its last newline.

    Raises:
        ValueError: both are given, or one that is not UTF-8.
    """
    if prefix is not None and prefix_file is not None:
        raise ValueError("--prefix and --prefix-file are two ways to give the prefix; use one.")
    if prefix_file is not None:
        return prefix_file.read_bytes().decode("utf-8")
    return _without_halves(prefix or "", "--prefix")


def store_of(where: str, max_bytes: str | None, kv_dtype: str | None = None) -> Store:
    """Where chunk KV is to last: no memory stands before it.

    Raises:
        ImportError: a package that the URL needs is missing.
        OSError: the folder cannot be made.
        ValueError: no size, no `kv_dtype`, no URL that can be opened.
    """
    from .store import DiskStore, RemoteStore

    if "://" in where:
        return RemoteStore(where, max_bytes, kv_dtype=kv_dtype)
    if Path(where).is_file():
        raise ValueError(f"{where} is a file; a store is a folder.")
    return DiskStore(where, *([] if max_bytes is None else [max_bytes]), kv_dtype=kv_dtype)


def precompute_corpus(
    model: Any, corpus: Path, field: str, total: int, console: Console, **options: Any
) -> Precomputed:
    """Stores the corpus' `total` texts, with a progress bar where `console` is a terminal.

    Args:
        options: of `hfblend.precomputing.precompute`.
    """
    from .precomputing import precompute

    with _bar(console) as bar:
        progress = _advance(bar, total)
        return precompute(model, texts_of(corpus, field), progress=progress, **options)


def as_json(report: Precomputed) -> str:
    return json.dumps(asdict(report) | {"tokens_per_s": report.tokens_per_s})


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def _advance(bar: Progress, total: int) -> Callable[[Precomputed], None]:
    task = bar.add_task("Precomputing", total=total, rate="")

    def show(report: Precomputed) -> None:
        done = report.computed + report.skipped + report.failed
        failed = f", {report.failed:,} not kept" if report.failed else ""
        bar.update(task, completed=done, rate=f"{report.tokens_per_s:,.0f} tokens/s{failed}")

    return show
