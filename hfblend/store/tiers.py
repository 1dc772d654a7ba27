"""Several stores as one: fast ones in front of lasting ones."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..chunks import ChunkKV, Reader
from .base import Store
from .disk import DiskStore
from .memory import MemoryStore


class TieredStore:
    """Looks an entry up in each store in turn, and keeps what a later one had in those before it.

    >>> store = TieredStore([MemoryStore("8GB"), DiskStore("~/.cache/hfblend/chunks")])  # doctest: +SKIP

    Args:
        stores: the fastest first. `put` keeps an entry in all of them.

    Raises:
        ValueError: no store.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        if not stores:
            raise ValueError("A TieredStore needs one or more stores, got none.")
        self.stores = list(stores)

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry in every store."""
        for store in self.stores:
            store.put(key, chunk_kv)

    def open(self, key: str) -> Reader | None:
        """The entry of the first store that has it."""
        for i, store in enumerate(self.stores):
            entry = store.open(key)
            if entry is not None:
                for faster in self.stores[:i]:
                    if isinstance(entry, ChunkKV):
                        faster.put(key, entry)
                return entry
        return None


def store_at(where: Store | str | os.PathLike[str] | None) -> Store:
    """A store as users name one: a store, a folder (a `DiskStore` with a `MemoryStore` before it), or `None` (memory).

    Raises:
        ValueError: a URL; only folders are supported.
    """
    if where is None:
        return MemoryStore()
    if isinstance(where, str) and "://" in where:
        raise ValueError(f"A store is a folder or a store object, got the URL {where!r}, which is not supported.")
    if isinstance(where, (str, os.PathLike)):
        return TieredStore([MemoryStore(), DiskStore(where)])
    return where
