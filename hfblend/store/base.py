"""The methods of every store; blending uses no others."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..arguments import described, require
from ..kv.chunk import ChunkKV, Reader, in_memory
from .index import Index


class Store(Protocol):
    """Keeps chunk KV under keys from `chunk_key`. Implementations are safe to use from several threads."""

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry, replacing one of the same key."""
        ...

    def open(self, key: str) -> Reader | None:
        """Returns the entry, which stays readable even if it is evicted meanwhile; `None` if there is none."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A store that can begin to read before it is asked, because an entry takes long to come."""

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Begins to read these entries, which will be opened soon, in that order."""
        ...


@runtime_checkable
class Findable(Protocol):
    """A store that knows the texts of its entries, so that they are found in prompts without marks."""

    def index(self, scope: str) -> Index:
        """Returns the texts of the entries of a scope (`hfblend.store.keys.scope_of`), up to date."""
        ...


def require_store(store: Any, expected: str = "a store (an object with put and open)") -> Store:
    """Returns the store; raises `TypeError` if it is none."""
    if isinstance(store, type) or not all(callable(getattr(store, name, None)) for name in ("put", "open")):
        raise TypeError(f"store must be {expected}, got {described(store)}.")
    return store


def require_chunk_kv(chunk_kv: Any) -> ChunkKV:
    """Returns the chunk KV, an entry opened from another store read whole; raises `TypeError` if it is none."""
    is_reader = hasattr(chunk_kv, "layer") and hasattr(chunk_kv, "tier_beside") and not isinstance(chunk_kv, type)
    return require("chunk_kv", in_memory(chunk_kv) if is_reader else chunk_kv, ChunkKV, "a hfblend.ChunkKV")


def require_folder(where: Any) -> Path:
    """Returns the path of a folder that may be made; raises `TypeError` if it is no path, `ValueError` if it is a file
    or looks like a URL, of which a folder of that name would be made."""
    if not isinstance(where, str | os.PathLike):
        raise TypeError(f"A store's folder must be a path, got {described(where)}.")
    name = os.fsdecode(where)
    if not name.strip():
        raise ValueError(f"A store's folder must have a name, got {name!r}; '.' is the current one.")
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", name):  # one letter is a drive of Windows
        raise ValueError(
            f"A store is a folder or a URL such as 's3://bucket/prefix', got {name!r}: write {found[1]}://… for a URL "
            f"(RemoteStore, or patch(store=…)), or ./{name} for a folder of that name."
        )
    path = Path(name).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):  # False where it may not be looked at
        raise ValueError(f"{name} is a file; a store is a folder.")
    return path
