"""Counters of a store."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from ..locks import Mutex


@dataclass
class StoreCounts:
    """Counters, which only grow. `hfblend.store.prometheus` shows them to Prometheus, with these texts."""

    hits: Annotated[int, "Chunks found"] = 0
    misses: Annotated[int, "Chunks asked for and not found"] = 0
    stored: Annotated[int, "Chunks kept"] = 0
    evicted: Annotated[int, "Chunks that had to go for others"] = 0
    damaged: Annotated[int, "Chunks that were not what was written"] = 0
    failed: Annotated[int, "Reads and writes that the disk or the network refused"] = 0
    bytes_read: Annotated[int, "Bytes of chunk KV read from files"] = 0
    bytes_written: Annotated[int, "Bytes of chunk KV written to files"] = 0
    read_seconds: Annotated[float, "Seconds spent in reading and checking chunk KV, all threads together"] = 0.0
    _lock: Mutex = field(default_factory=Mutex, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.hits:,} found, {self.misses:,} not, {self.stored:,} stored since it was opened"

    def add(self, **more: float) -> None:
        """Adds to counters, by name."""
        with self._lock:
            for name, count in more.items():
                setattr(self, name, getattr(self, name) + count)

    def to_dict(self) -> dict[str, float]:
        """Returns name -> count."""
        with self._lock:
            return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "_lock"}
