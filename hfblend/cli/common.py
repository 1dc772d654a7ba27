"""The errors and the output of commands, and the reading of values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from ..trace.progress import told
from ..util import figure_class, require_folders_of

if TYPE_CHECKING:
    import torch

    from ..lab.report import Results
    from ..store import DiskStore, RemoteStore

console, stderr = Console(), Console(stderr=True)

Number = TypeVar("Number", int, float)


@contextmanager
def in_words() -> Iterator[None]:
    """Prints an error that the user can mend to stderr, without a stack trace, and ends the command."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # Typer's own
        raise
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # UnsupportedModel is a ValueError
        stderr.print(f"[red]{type(error).__name__}[/red]:", Text(str(error)))
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def load(model: str | None, device: str | None, dtype: str | None = None) -> tuple[Any, Any, str]:
    """Loads a model; returns it with its tokenizer and its name."""
    wake()
    from ..demo import model as demo_model

    return *demo_model.load(model, device, dtype_of(dtype)), model or demo_model.HUB_NAME


def wake() -> None:
    """Imports what a command works with, which takes some seconds, and says so."""
    with told("Starting PyTorch and Transformers"):
        import_module("hfblend.patching")


def store_at(where: str, max_bytes: str | None = None, kv_dtype: str | None = None) -> DiskStore | RemoteStore:
    """Opens the store in a folder or at a URL, without a memory in front; raises what `in_words` prints."""
    from ..store import DiskStore, RemoteStore

    if "://" in where:
        return RemoteStore(where, max_bytes, kv_dtype=kv_dtype)
    return DiskStore(where, *([] if max_bytes is None else [max_bytes]), kv_dtype=kv_dtype)


def print_json(values: Any) -> None:
    """Prints JSON in ASCII: names in files may hold half of a surrogate pair, which no terminal takes."""
    console.print_json(json.dumps(values), ensure_ascii=True)


def shown_on(json_file: Path | None) -> Console:
    """Where a command shows what people read: standard output, unless `--json -` prints JSON there."""
    return stderr if str(json_file) == "-" else console


def write_json(file: Path | None, values: Any) -> None:
    """Writes JSON to a file and says so, or prints it for `-`; does nothing without a file."""
    if str(file) == "-":
        print_json(values)
    elif file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {file}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Outputs:
    """The files that measuring commands write; those that are `None` are not written."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    records: Path | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` for a folder that does not exist, `ImportError` for a missing package."""
        require_folders_of(self.json, self.markdown, self.plot, self.records)
        if self.plot is not None:
            figure_class("plots")

    def write(self, results: Results) -> None:
        """Writes all but the records anew.

        Raises:
            ValueError: the plot's ending is none that matplotlib knows.
        """
        from ..lab.plots import plot_quality, plot_ttft
        from ..lab.report import markdown, title

        if self.json is not None:
            self.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if self.markdown is not None:
            self.markdown.write_text(markdown(results), encoding="utf-8")
        if self.plot is not None:
            is_bench = "peaks" in results
            figure = plot_ttft(results) if is_bench else plot_quality(results["rows"], title(results))
            figure.savefig(self.plot)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: all but `None`."""
    return {name: value for name, value in options.items() if value is not None}


def corrected(correction: str | None) -> dict[str, str | None]:
    """The setting of `--correction`; nothing if it was not given."""
    return {} if correction is None else {"correction": None if correction == "none" else correction}


def names(text: str) -> list[str]:
    """Splits text at commas."""
    return [name for part in text.split(",") if (name := part.strip())]


def numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    """Reads numbers separated by commas; a `ValueError` names the option."""
    try:
        return [kind(name) for name in names(text)]
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns torch's floating-point type of this name; raises `ValueError` if there is none."""
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype must be a floating-point type of torch such as float32 or bfloat16, got {name!r}.")
    return dtype
