"""What every store offers; blending knows nothing else of it."""

from __future__ import annotations

from typing import Protocol

import torch

from ..caches import KV
from ..chunks import ChunkKV, Provenance


class Reader(Protocol):
    """One chunk's KV, read a layer at a time. `ChunkKV` is one."""

    @property
    def cached_positions(self) -> torch.Tensor: ...  # (n,)

    @property
    def behind_ids(self) -> tuple[int, ...]: ...

    @property
    def provenance(self) -> Provenance: ...

    @property
    def regime(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    def layer(self, layer_idx: int) -> KV:
        """Keys and values (B, Hkv, n, D) of one layer, as cached, on any device."""
        ...


class Store(Protocol):
    """Keeps chunk KV under keys from `chunk_key`. Implementations are safe to use from several threads."""

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry, replacing one of the same key."""
        ...

    def open(self, key: str) -> Reader | None:
        """The entry, which stays readable even if it is evicted meanwhile; `None` if there is none."""
        ...
