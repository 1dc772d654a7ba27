"""Chunk KV in RAM or GPU memory."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from typing import Any

import torch

from ..arguments import described
from ..kv.chunk import ChunkKV
from ..locks import Mutex
from .base import require_chunk_kv
from .counts import StoreCounts
from .index import Index, stands_for
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)


class MemoryStore:
    """Keeps chunk KV in memory up to a byte budget; the least recently used entry goes first.

    >>> store = MemoryStore(max_bytes="2GB", device="cpu")

    Args:
        max_bytes: of all that entries hold (`ChunkKV.held_bytes`); a number or `"8GB"`, `"512MiB"`.
        device: where entries are kept; `None` keeps each where it was computed.
    """

    def __init__(self, max_bytes: int | str = 4 * 2**30, device: torch.device | str | None = None) -> None:
        self.max_bytes = num_bytes_of(max_bytes)
        self.device = None if device is None else _device(device)
        self.num_bytes = 0
        self.counts = StoreCounts()
        self._entries: OrderedDict[str, ChunkKV] = OrderedDict()
        self._pinned: set[str] = set()
        self._indexes: dict[str, Index] = {}  # scope -> its texts, once they were asked for
        self._lock = Mutex()

    def __repr__(self) -> str:
        size = f"{self.num_bytes / 1e6:,.1f} MB of {self.max_bytes / 1e9:,.1f} GB"
        return f"<MemoryStore: {len(self):,} entries, {size}; {self.counts}>"

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; one that does not fit, alone or with the pinned ones, is logged and not kept."""
        chunk_kv = require_chunk_kv(chunk_kv)
        if self.device is not None and chunk_kv.num_bytes <= self.max_bytes:
            chunk_kv = chunk_kv.to(self.device)
        if chunk_kv.held_bytes > self.max_bytes:
            logger.warning(
                "A chunk's KV of %d bytes does not fit into a memory store of %d bytes; it is not kept.",
                chunk_kv.held_bytes,
                self.max_bytes,
            )
            return
        with self._lock:
            self._remove(key)
            self._index(key, chunk_kv)  # first: a text without an entry is a miss, once
            self._entries[key] = chunk_kv
            self.num_bytes += chunk_kv.held_bytes
            self.counts.add(stored=1)
            self._make_room(key)

    def open(self, key: str) -> ChunkKV | None:
        """Returns the entry, now the most recently used; `None` if there is none."""
        found = self._entries.get(key)
        with contextlib.suppress(KeyError):  # there is none, or another thread has removed it
            self._entries.move_to_end(key)
        if found is None:  # counted in one step, in which threads do not switch
            self.counts.misses += 1
        else:
            self.counts.hits += 1
        return found

    def index(self, scope: str) -> Index:
        """Returns the texts of the entries of one scope; from then on it is kept up to date."""
        with self._lock:
            if scope not in self._indexes:
                index = Index()
                for key, entry in self._entries.items():
                    if entry.scope == scope:
                        _add_to(index, key, entry)
                self._indexes[scope] = index
            return self._indexes[scope]

    def pin(self, key: str) -> None:
        """Keeps an entry when others must go, until `unpin`; raises `KeyError` if there is none of that key."""
        with self._lock:
            if key not in self._entries:
                raise KeyError(f"There is no entry {key[:12]}… to pin; store it first.")
            self._pinned.add(key)

    def unpin(self, key: str) -> None:
        """Lets an entry go again."""
        with self._lock:
            self._pinned.discard(key)

    def clear(self) -> None:
        """Drops every entry, pinned ones too."""
        with self._lock:
            self._entries.clear()
            self._indexes.clear()
            self._pinned.clear()
            self.num_bytes = 0

    def keys(self) -> list[str]:
        """Returns the key of every entry."""
        with self._lock:
            return list(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def _make_room(self, newest: str) -> None:
        """Drops the least recently used entries, and the newest only if pinned ones leave it no room."""
        if self.num_bytes <= self.max_bytes:
            return
        for key in [key for key in self._entries if key not in self._pinned]:
            if self.num_bytes <= self.max_bytes:
                return
            if key == newest:
                logger.warning("Pinned entries leave no room for a chunk's KV in %d bytes; not kept.", self.max_bytes)
            self.counts.add(evicted=1)
            self._remove(key)

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.held_bytes
            if entry.scope in self._indexes:
                self._indexes[entry.scope].discard(key)

    def _index(self, key: str, entry: ChunkKV) -> None:
        if entry.scope in self._indexes:
            _add_to(self._indexes[entry.scope], key, entry)


def _add_to(index: Index, key: str, entry: ChunkKV) -> None:
    if entry.provenance == "isolated":
        index.add(key, entry.ids, entry.num_behind, stands_for(entry.behind_ids))


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device must be one of torch\'s, "cpu" or "cuda:0", got {described(device)}.') from error
    # Tensors say on which GPU they are.
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found
