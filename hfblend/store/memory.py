"""Chunk KV in RAM or GPU memory."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

import torch

from ..chunks import ChunkKV
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)


class MemoryStore:
    """Keeps chunk KV in memory up to a byte budget; the least recently used entry goes first.

    >>> store = MemoryStore(max_bytes="2GB", device="cpu")

    Args:
        max_bytes: budget for keys and values; a number or `"8GB"`, `"512MiB"`.
        device: where entries are kept; `None` keeps each where it was computed.
    """

    def __init__(self, max_bytes: int | str = 4 * 2**30, device: torch.device | str | None = None) -> None:
        self.max_bytes = num_bytes_of(max_bytes)
        self.device = None if device is None else torch.device(device)
        self.num_bytes = 0
        self._entries: OrderedDict[str, ChunkKV] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; one larger than the whole budget is not kept, and logged."""
        if chunk_kv.num_bytes > self.max_bytes:
            logger.warning(
                "A chunk's KV of %d bytes does not fit into a memory store of %d bytes; it is not kept.",
                chunk_kv.num_bytes,
                self.max_bytes,
            )
            return
        if self.device is not None:
            chunk_kv = chunk_kv.to(self.device)
        with self._lock:
            self._remove(key)
            self._entries[key] = chunk_kv
            self.num_bytes += chunk_kv.num_bytes
            while self.num_bytes > self.max_bytes:
                self._remove(next(iter(self._entries)))

    def open(self, key: str) -> ChunkKV | None:
        """The entry, now the most recently used; `None` if there is none."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def clear(self) -> None:
        """Drops every entry."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def _remove(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
