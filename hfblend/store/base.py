"""What every store offers; blending knows nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..chunks import ChunkKV, Reader


class Store(Protocol):
    """Keeps chunk KV under keys from `chunk_key`. Implementations are safe to use from several threads."""

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry, replacing one of the same key."""
        ...

    def open(self, key: str) -> Reader | None:
        """The entry, which stays readable even if it is evicted meanwhile; `None` if there is none."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A store that can begin to read before it is asked, because an entry takes long to come."""

    def read_ahead(self, keys: Sequence[str]) -> None:
        """These entries will be opened soon, in that order."""
        ...
