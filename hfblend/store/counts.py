"""Counters of a store."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ..locks import Mutex


@dataclass
class StoreCounts:
    """Counters, which only grow. `hfblend.store.prometheus` shows them to Prometheus.

    Attributes:
        hits, misses: entries that were asked for, and found or not.
        stored: entries that were kept.
        evicted: entries that made room for others.
        damaged: entries that were not what was written.
        failed: requests that the disk or the network refused.
        bytes_read, bytes_written: of files; memory moves none.
        read_seconds: spent in reading and checking, all threads together.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0
    failed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    _lock: Mutex = field(default_factory=Mutex, repr=False, compare=False)

    def add(self, **more: float) -> None:
        """Adds to counters, by name."""
        with self._lock:
            for name, count in more.items():
                setattr(self, name, getattr(self, name) + count)

    def to_dict(self) -> dict[str, float]:
        """Returns name -> count."""
        with self._lock:
            return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "_lock"}
