"""The options that commands share, their errors and output, and the reading of values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from ..store import DiskStore, RemoteStore

EXIT_CODES = "Exit codes: 0 success; 1 failure or missing dependency; 2 invalid option, file or model."

console = Console()

Number = TypeVar("Number", int, float)

Model = Annotated[
    str | None, typer.Option(help="Hub id or folder of a causal LM.", show_default="SmolLM2-135M-Instruct")
]
Device = Annotated[str | None, typer.Option(help="As torch names it.", show_default="GPU if any, else CPU")]
KVDType = Annotated[str | None, typer.Option(help="Keep chunk KV in 8 bits: int8 or fp8.", show_default="as computed")]
DType = Annotated[str | None, typer.Option(help="As torch names it.", show_default="float32 on a CPU, else bfloat16")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the table to this file.")]
Ratio = Annotated[float, typer.Option(help="Share of the reused tokens to recompute.", min=0, max=1)]
Rule = Annotated[str | None, typer.Option(help="The rule that selects them.", show_default="BlendConfig's")]
KeptIn = Annotated[
    str | None, typer.Option("--store", help="Folder or URL that keeps the chunk KV.", show_default="in memory")
]
NewTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
PrintJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def existing(help: str) -> Any:
    """An option that takes a file which is there."""
    return typer.Option(help=help, exists=True, dir_okay=False)


@contextmanager
def in_words() -> Iterator[None]:
    """Prints an error that the user can mend to stderr, without a stack trace, and ends the command."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # UnsupportedModel is a ValueError
        Console(stderr=True).print(f"[red]{type(error).__name__}[/red]:", Text(str(error)))
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


def store_at(where: str, max_bytes: str | None = None, kv_dtype: str | None = None) -> DiskStore | RemoteStore:
    """Opens the store in a folder or at a URL, without a memory in front; raises what `in_words` prints."""
    from ..store import DiskStore, RemoteStore

    if "://" in where:
        return RemoteStore(where, max_bytes, kv_dtype=kv_dtype)
    return DiskStore(where, *([] if max_bytes is None else [max_bytes]), kv_dtype=kv_dtype)


def print_json(values: Any) -> None:
    """Prints JSON in ASCII: names in files may hold half of a surrogate pair, which no terminal takes."""
    console.print_json(json.dumps(values), ensure_ascii=True)


def write_json(file: Path | None, values: Any) -> None:
    """Writes JSON to a file and says so; does nothing without one."""
    if file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {file}", markup=False, highlight=False, soft_wrap=True)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: all but `None`."""
    return {name: value for name, value in options.items() if value is not None}


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
