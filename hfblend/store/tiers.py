"""Several stores as one: fast ones in front of lasting ones."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from functools import partial

from ..chunks import ChunkKV, Reader
from .base import ReadsAhead, Store
from .disk import DiskStore
from .loader import LayerwiseChunk
from .memory import MemoryStore
from .remote import RemoteStore


class TieredStore:
    """Looks an entry up in each store in turn, and keeps what a later one had in those before it, once it was read.

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
                if isinstance(entry, LayerwiseChunk):
                    entry.keep(partial(self._promote, key, i))
                elif isinstance(entry, ChunkKV):
                    self._promote(key, i, entry)
                return entry
        return None

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Lets every store that can begin to read what those before it have not."""
        for store in self.stores if any(isinstance(store, ReadsAhead) for store in self.stores) else ():
            if isinstance(store, ReadsAhead):
                store.read_ahead(keys)
            if isinstance(store, Container):
                keys = [key for key in keys if key not in store]

    def _promote(self, key: str, found_in: int, chunk_kv: ChunkKV) -> None:
        """Keeps an entry in the stores before the one that had it."""
        for faster in self.stores[:found_in]:
            faster.put(key, chunk_kv)


def store_at(where: Store | str | os.PathLike[str] | None) -> Store:
    """A store as users name one: a store, a folder, a URL, or `None` (memory).

    A folder becomes a `DiskStore`, a URL a `RemoteStore`, each with a `MemoryStore` before it.

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        ValueError: a URL that fsspec cannot open.
    """
    if where is None:
        return MemoryStore()
    if isinstance(where, str) and "://" in where:
        return TieredStore([MemoryStore(), RemoteStore(where)])
    if isinstance(where, (str, os.PathLike)):
        return TieredStore([MemoryStore(), DiskStore(where)])
    return where
