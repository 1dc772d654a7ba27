"""Several stores as one: fast ones in front of lasting ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ..arguments import described
from ..kv.chunk import ChunkKV, Reader
from .background import Background, keeps_unchanged
from .base import ReadsAhead, Store, require_chunk_kv, require_store
from .disk import DiskStore
from .files import FileStore
from .loader import LayerwiseChunk
from .memory import MemoryStore
from .remote import RemoteStore
from .sizes import num_bytes_of


class TieredStore:
    """Looks an entry up in each store in turn; all of them keep it, the first at once and the others soon after.

    >>> store = TieredStore([MemoryStore("8GB"), DiskStore("~/.cache/hfblend/chunks")])  # doctest: +SKIP
    >>> gpu, ram = MemoryStore("8GB", device="cuda:0"), MemoryStore("32GB", device="cpu")  # doctest: +SKIP
    >>> store = TieredStore([gpu, ram, DiskStore("~/.cache/hfblend/chunks")])  # doctest: +SKIP

    `put` returns when the first store has the entry. A thread puts it into the others, one entry after the other; it
    copies from the GPU during the GPU's work, and lives as long as something waits. Waiting entries can be opened, also
    if the first store has evicted them. An entry of a slower store is kept in faster ones once it was read: at once if
    that moves no bytes, else by the thread. A slower store that fails is logged, and costs reuse only.

    A process that ends, by an exception too, writes what waits; one that is killed loses it. `hfblend.patch`'s
    `remove()` and `precompute` flush.

    Args:
        stores: the fastest first.
        max_waiting_bytes: of entries that may wait, on a GPU too if they were computed there; a number or `"4GB"`, a
            prompt of 30,000 tokens of an 8B Llama. One entry always may. Beyond that, `put` writes the entry to every
            store before it returns, and entries that were read are not copied into faster stores.

    Raises:
        TypeError, ValueError: no store; bytes that are no size.
    """

    def __init__(self, stores: Sequence[Store], max_waiting_bytes: int | str = "4GB") -> None:
        if isinstance(stores, str | Mapping) or not isinstance(stores, Iterable):
            raise TypeError(f"stores must be a list of stores, the fastest first, got {described(stores)}.")
        self.stores = [require_store(store) for store in stores]
        if not self.stores:
            raise ValueError("A TieredStore needs one or more stores, got none.")
        self._background = Background(max_waiting_bytes)

    def __repr__(self) -> str:
        return f"<TieredStore: {', '.join(map(repr, self.stores))}>"

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry in the first store now, and in the others soon. Its tensors must not change any more."""
        chunk_kv = require_chunk_kv(chunk_kv)
        first, *slower = self.stores
        first.put(key, chunk_kv)
        if slower:
            self._background.put(key, chunk_kv, slower)

    def open(self, key: str) -> Reader | None:
        """Returns the entry of the first store that has it; waiting entries come after the first store."""
        for i, store in enumerate(self.stores):
            entry = store.open(key)
            if entry is None and i == 0:
                entry = self._background.get(key)
            elif isinstance(entry, LayerwiseChunk):
                entry.keep(partial(self._promote, key, i))
            elif isinstance(entry, ChunkKV):
                self._promote(key, i, entry)
            if entry is not None:
                return entry
        return None

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Lets every store that can begin to read the entries that those before it lack."""
        keys = [key for key in keys if key not in self._background]
        for store in self.stores if any(isinstance(store, ReadsAhead) for store in self.stores) else ():
            if isinstance(store, ReadsAhead):
                store.read_ahead(keys)
            elif isinstance(store, Container):
                keys = [key for key in keys if key not in store]

    def flush(self) -> None:
        """Returns once all that was put so far is in every store, or has failed there."""
        self._background.flush()
        for store in self.stores:
            flush(store)

    def close(self) -> None:
        """Flushes, and returns once the thread has ended. The store may be used again."""
        self.flush()
        self._background.close()

    def __contains__(self, key: str) -> bool:
        """Whether a store has the entry, or it is waiting to be written."""
        return key in self._background or any(
            key in store if isinstance(store, Container) else store.open(key) is not None for store in self.stores
        )

    # --- for tiers that have these methods ------------------------------------------------------------------------

    def pin(self, key: str) -> None:
        """Keeps an entry, in each store that has it now, when others must go, until `unpin`. Flushes first.

        Raises:
            KeyError: no store that pins has one of that key.
            OSError: a folder cannot be written.
        """
        self.flush()
        pinned = 0
        for store in self._that_can("pin"):
            with contextlib.suppress(KeyError):
                store.pin(key)
                pinned += 1
        if not pinned:
            raise KeyError(f"There is no entry {key[:12]}… to pin; store it first.")

    def unpin(self, key: str) -> None:
        """Lets an entry go again. Raises `OSError` if a folder cannot be written."""
        for store in self._that_can("unpin"):
            store.unpin(key)

    def clear(self) -> None:
        """Removes every entry of every store, waiting ones too.

        Raises:
            TypeError: a store has no `clear`; nothing is removed.
            OSError: an entry cannot be removed.
        """
        able = self._that_can("clear")
        for store in self.stores:
            if store not in able:
                raise TypeError(
                    f"A {type(store).__name__} has no clear(); clear the others by tiers.stores[i].clear()."
                )
        self.flush()
        for store in able:
            store.clear()

    def keys(self) -> list[str]:
        """Returns the key of every entry in some store, or waiting; stores that list none are left out."""
        known = dict.fromkeys(key for store in self._that_can("keys") for key in store.keys())  # noqa: SIM118
        return list(known | dict.fromkeys(self._background.keys()))

    @property
    def num_bytes(self) -> int:
        """Bytes in all stores together, an entry counted in each that has it."""
        return sum(getattr(store, "num_bytes", 0) for store in self.stores)

    def __len__(self) -> int:
        return len(self.keys())

    def _that_can(self, name: str) -> list[Any]:
        return [store for store in self.stores if callable(getattr(store, name, None))]

    def _promote(self, key: str, found_in: int, chunk_kv: ChunkKV) -> None:
        """Keeps an entry in the stores before the one that had it."""
        faster = self.stores[:found_in]
        unchanged = [store for store in faster if keeps_unchanged(store, chunk_kv)]
        if not isinstance(self.stores[found_in], MemoryStore):
            for store in unchanged[-1:]:  # in more of them it would take room and be no faster
                store.put(key, chunk_kv)
        to_copy = [store for store in faster if store not in unchanged]
        if to_copy:
            self._background.offer(key, chunk_kv, to_copy)


def store_at(where: Store | str | os.PathLike[str] | None) -> Store:
    """Returns a store as users name one: a store, a folder, a URL, or `None` (memory).

    A folder becomes a `DiskStore`, a URL a `RemoteStore`, each after a `MemoryStore`.

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        TypeError, ValueError: no store, no folder, a URL that fsspec cannot open.
    """
    if where is None:
        return MemoryStore()
    if isinstance(where, str) and "://" in where:
        return TieredStore([MemoryStore(), RemoteStore(where)])
    if isinstance(where, (str, os.PathLike)):
        return TieredStore([MemoryStore(), DiskStore(where)])
    return require_store(where, "a store, a folder, a URL or None (memory)")


def holds(store: Store, key: str) -> bool:
    """Whether a store has an entry to last: of tiers, the last one. Files are opened: some serve no such entry."""
    if isinstance(store, TieredStore):
        return holds(store.stores[-1], key)
    if isinstance(store, Container) and not isinstance(store, FileStore):
        return key in store
    return store.open(key) is not None


def flush(store: Store) -> None:
    """Returns once all that was put into a store is kept: tiers write in the background."""
    if isinstance(store, TieredStore):
        store.flush()


def tiers_of(store: Any) -> list[Any]:
    """Returns the stores that a store is made of, itself if of no others, in the order in which they are asked."""
    return [one for tier in store.stores for one in tiers_of(tier)] if hasattr(store, "stores") else [store]


def left_by(store: Store, device: torch.device, max_bytes: int | str) -> int:
    """Returns how many bytes of a device's memory a store leaves to others; raises `ValueError` if it leaves none."""
    stores = [one for one in tiers_of(store) if isinstance(one, MemoryStore) and one.device in (None, device)]
    left = num_bytes_of(max_bytes) - sum(one.max_bytes for one in stores)
    if left <= 0:
        raise ValueError(f"Of max_bytes={max_bytes!r} the store leaves none to others: raise it, or lower the store's.")
    return left


def file_stores_of(store: Store) -> list[FileStore]:
    """Returns those stores among `tiers_of` that keep files."""
    return [one for one in tiers_of(store) if isinstance(one, FileStore)]
