"""`hfblend store`: lists a folder or a bucket of chunk KV, checks it, and makes it smaller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Column, Table
from typer import Argument, Option

from ..trace.progress import told
from ..util import visible
from .common import console, print_json, store_at
from .options import EXIT_CODES, PrintJson

if TYPE_CHECKING:
    from ..store.files import FileStore
    from ..store.upkeep import StoredEntry

app = typer.Typer(
    no_args_is_help=True,
    help="Look after chunk KV in a folder or at a URL.\n\n"
    "S3 takes its endpoint and credentials from the environment (AWS_ENDPOINT_URL, AWS_PROFILE, …).",
    epilog=EXIT_CODES,
)

Where = Annotated[str, Argument(metavar="STORE", help='The folder, or the URL: "s3://bucket/chunks".')]
Keys = Annotated[list[str], Argument(help="Keys, or the beginnings of keys.")]
OfModel = Annotated[str, Option(help="Only entries of this model: its name, or how its fingerprint begins.")]


@app.command("ls", epilog=EXIT_CODES)
def list_entries(where: Where, model: OfModel = "", as_json: PrintJson = False) -> None:
    """List the entries, the most recently used first.

    Example: hfblend store ls ~/.cache/hfblend/chunks --json
    """
    entries = sorted(_entries(_store_at(where), model), key=lambda entry: -entry.last_used)
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    table = Table(Column("key", no_wrap=True), "model", box=box.SIMPLE_HEAD)
    for name in ("tokens", "dtype", "bytes", "last used", ""):
        table.add_column(name, justify="right" if name in ("tokens", "bytes") else "left", no_wrap=True)
    for one in entries:
        model = f"[red]{escape(visible(one.damaged))}[/red]" if one.damaged else escape(visible(one.model))
        dtype, pinned = escape(visible(one.dtype)), "pinned" if one.pinned else ""
        used = datetime.fromtimestamp(one.last_used).strftime("%Y-%m-%d %H:%M")
        table.add_row(one.key[:12], model, f"{one.tokens:,}", dtype, f"{one.num_bytes:,}", used, pinned)
    console.print(table if entries else "No entries.")


@app.command(epilog=EXIT_CODES)
def stat(where: Where, model: OfModel = "", as_json: PrintJson = False) -> None:
    """Show how much there is, and of which models.

    Example: hfblend store stat s3://bucket/chunks
    """
    entries = _entries(_store_at(where), model)
    by_model: dict[tuple[str, str], list[StoredEntry]] = {}
    for entry in entries:
        if not entry.damaged:
            by_model.setdefault((entry.model, entry.fingerprint), []).append(entry)
    models = [{"model": name, "fingerprint": digest, **_sums(its)} for (name, digest), its in by_model.items()]
    unreadable = sum(bool(entry.damaged) for entry in entries)
    found = {"store": where, **_sums(entries), "unreadable_headers": unreadable, "models": models}
    if as_json:
        print_json(found)
        return
    table = Table(Column("model", "all"), "fingerprint", box=box.SIMPLE_HEAD, show_footer=True)
    for name, total in _sums(entries).items():
        table.add_column(name.replace("num_", ""), f"{total:,}", justify="right", no_wrap=True)
    for row in models:
        named = escape(visible(row["model"])) or "not said", escape(visible(row["fingerprint"][:12]))
        table.add_row(*named, *(f"{row[name]:,}" for name in ("entries", "tokens", "num_bytes")))
    console.print(table)
    if unreadable:
        console.print(f"[red]{unreadable} headers cannot be read[/red]; `hfblend store verify` says why.")


def _sums(entries: list[StoredEntry]) -> dict[str, Any]:
    sums = {name: sum(getattr(entry, name) for entry in entries) for name in ("tokens", "num_bytes")}
    return {"entries": len(entries), **sums}


@app.command(epilog=EXIT_CODES)
def verify(where: Where, as_json: PrintJson = False) -> None:
    """Read every entry and check every byte; exit code 1 if one is damaged. Nothing is removed.

    Example: hfblend store verify chunks
    """
    store = _store_at(where)
    keys = store.keys()
    damaged = {}
    with told("Checking entries", total=len(keys)) as line:
        for key in keys:
            if reason := store.fault_of(key):
                damaged[key] = reason
            line.advance()
    if as_json:
        print_json({"entries": len(keys), "damaged": damaged})
    else:
        for key, reason in damaged.items():
            console.print(f"[red]damaged[/red] {key}: {escape(visible(reason))}", highlight=False)
        console.print(f"{len(keys) - len(damaged)} of {len(keys)} entries are whole.", highlight=False)
    if damaged:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def prune(where: Where, max_bytes: Annotated[str, Option(help='Keep at most so much, say "20GB".')]) -> None:
    """Remove the least recently used entries until the rest fits; pinned ones stay.

    Example: hfblend store prune chunks --max-bytes 20GB
    """
    store = _store_at(where)
    before = len(store)
    store.prune(max_bytes)
    console.print(f"Removed {before - len(store)} of {before} entries; {store.num_bytes:,} bytes are left.")


@app.command(epilog=EXIT_CODES)
def rm(
    where: Where,
    keys: Annotated[list[str] | None, Argument(help="Keys, or the beginnings of keys.")] = None,
    model: OfModel = "",
) -> None:
    """Remove entries: those of these keys, or all of a model's.

    Example: hfblend store rm chunks --model 77c0
    """
    if bool(keys) == bool(model):
        raise typer.BadParameter("give keys, or --model, and not both.", param_hint="KEYS")
    _do_to_each("Removed", where, keys or [], lambda store, key: store.remove(key), model)


@app.command(epilog=EXIT_CODES)
def pin(where: Where, keys: Keys) -> None:
    """Keep entries when others must go.

    Example: hfblend store pin chunks 3f9a
    """
    _do_to_each("Pinned", where, keys, lambda store, key: store.pin(key))


@app.command(epilog=EXIT_CODES)
def unpin(where: Where, keys: Keys) -> None:
    """Let pinned entries go again.

    Example: hfblend store unpin chunks 3f9a
    """
    _do_to_each("Unpinned", where, keys, lambda store, key: store.unpin(key))


def _do_to_each(
    done: str, where: str, beginnings: list[str], act: Callable[[FileStore, str], None], model: str = ""
) -> None:
    store = _store_at(where)
    keys = [entry.key for entry in _entries(store, model)] if model else _keys_of(store, beginnings)
    if not keys:
        raise typer.BadParameter(f"no entry is of {model!r}; `hfblend store stat` lists the models.")
    for key in keys:
        act(store, key)
        console.print(f"{done} {key}", highlight=False)


def _store_at(where: str) -> FileStore:
    """Returns the store there; a folder is not made."""
    if "://" not in where and not Path(where).expanduser().is_dir():
        raise typer.BadParameter(f"there is no folder {where}.", param_hint="STORE")
    return store_at(where)


def _entries(store: FileStore, model: str) -> list[StoredEntry]:
    """Returns the entries of a model; all, if none is named."""
    return [one for one in store.entries() if not model or model == one.model or one.fingerprint.startswith(model)]


def _keys_of(store: FileStore, beginnings: list[str]) -> list[str]:
    """Returns the one key that begins like each of these."""
    known, keys = store.keys(), []
    for wanted in beginnings:
        found = [key for key in known if key.startswith(wanted)]
        if len(found) != 1:
            count = "no entry" if not found else f"{len(found)} entries, name one"
            raise typer.BadParameter(f"{wanted!r} is the beginning of {count}.", param_hint="KEYS")
        keys += found
    return keys
