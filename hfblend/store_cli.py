"""`hfblend store`: what a folder of chunk KV holds, whether it is whole, and how to make it smaller."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from .store import DiskStore

app = typer.Typer(no_args_is_help=True, help="Look after a folder of chunk KV.")
console = Console()

Folder = Annotated[Path, typer.Argument(help="The store's folder.", exists=True, file_okay=False)]
Keys = Annotated[list[str], typer.Argument(help="Keys, or the beginnings of keys.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("ls")
def list_entries(path: Folder, as_json: AsJson = False) -> None:
    """The entries, the most recently used first."""
    from .store import DiskStore

    entries = sorted(DiskStore(path).entries(), key=lambda entry: -entry.last_used)
    if as_json:
        console.print_json(json.dumps([asdict(entry) for entry in entries]))
        return
    table = Table("key", "tokens", "layers", "dtype", "computed", "bytes", "last used", "")
    for one in entries:
        used = datetime.fromtimestamp(one.last_used).strftime("%Y-%m-%d %H:%M")
        if one.damaged:
            table.add_row(one.key[:12], "", "", "", f"[red]{escape(one.damaged)}[/red]", f"{one.num_bytes:,}", used, "")
        else:
            numbers = (str(one.tokens), str(one.layers), one.dtype, one.provenance, f"{one.num_bytes:,}")
            table.add_row(one.key[:12], *numbers, used, "pinned" if one.pinned else "")
    console.print(table)


@app.command()
def stat(path: Folder, as_json: AsJson = False) -> None:
    """How much the folder holds."""
    from .store import DiskStore

    entries = list(DiskStore(path).entries())
    found: dict[str, Any] = {
        "path": str(path),
        "entries": len(entries),
        "tokens": sum(entry.tokens for entry in entries),
        "num_bytes": sum(entry.num_bytes for entry in entries),
        "unreadable_headers": sum(bool(entry.damaged) for entry in entries),
    }
    if as_json:
        console.print_json(json.dumps(found))
        return
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else escape(value))
    console.print(table)


@app.command()
def verify(path: Folder, as_json: AsJson = False) -> None:
    """Read every entry and check every byte; exit code 1 if one is damaged. Nothing is removed."""
    from rich.progress import track

    from .store import DiskStore

    store = DiskStore(path)
    entries = list(store.entries())
    shown = entries if as_json else track(entries, "Checking", console=console, transient=True)
    damaged = {entry.key: reason for entry in shown if (reason := store.fault_of(entry.key))}
    if as_json:
        console.print_json(json.dumps({"entries": len(entries), "damaged": damaged}))
    else:
        for key, reason in damaged.items():
            console.print(f"[red]damaged[/red] {key}: {escape(reason)}", highlight=False)
        console.print(f"{len(entries) - len(damaged)} of {len(entries)} entries are whole.", highlight=False)
    if damaged:
        raise typer.Exit(1)


@app.command()
def prune(path: Folder, max_bytes: Annotated[str, typer.Option(help='Keep at most so much, say "20GB".')]) -> None:
    """Remove the least recently used entries until the rest fits."""
    from .store import DiskStore

    try:
        store = DiskStore(path, max_bytes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-bytes") from error
    before = len(store)
    store.prune()
    console.print(f"Removed {before - len(store)} of {before} entries; {store.num_bytes:,} bytes are left.")


@app.command()
def rm(path: Folder, keys: Keys) -> None:
    """Remove entries."""
    _do_to_each("Removed", path, keys, lambda store, key: store.remove(key))


@app.command()
def pin(path: Folder, keys: Keys) -> None:
    """Keep entries when others must go."""
    _do_to_each("Pinned", path, keys, lambda store, key: store.pin(key))


@app.command()
def unpin(path: Folder, keys: Keys) -> None:
    """Let pinned entries go again."""
    _do_to_each("Unpinned", path, keys, lambda store, key: store.unpin(key))


def _do_to_each(done: str, path: Path, beginnings: list[str], act: Callable[[DiskStore, str], None]) -> None:
    from .store import DiskStore

    store = DiskStore(path)
    for key in _keys_of(store, beginnings):
        act(store, key)
        console.print(f"{done} {key}", highlight=False)


def _keys_of(store: DiskStore, beginnings: list[str]) -> list[str]:
    """The one key that begins like each of these."""
    known, keys = [entry.key for entry in store.entries()], []
    for wanted in beginnings:
        found = [key for key in known if key.startswith(wanted)]
        if len(found) != 1:
            what = "no entry" if not found else f"{len(found)} entries, name one"
            raise typer.BadParameter(f"{wanted!r} is the beginning of {what}.", param_hint="KEYS")
        keys += found
    return keys
