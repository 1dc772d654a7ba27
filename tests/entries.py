"""Chunk KV of random numbers, for stores; needs no model, and so a process starts sooner than with `helpers`."""

from __future__ import annotations

import torch

from hfblend.kv.chunk import ChunkKV
from hfblend.kv.rows import full_length_cache


def entry(tokens=4, layers=2, seed=0, dtype=torch.float32, **kwargs) -> ChunkKV:
    """Chunk KV of random numbers, for stores."""
    generator = torch.Generator().manual_seed(seed)
    kv = [[torch.randn(1, 2, tokens, 8, generator=generator).to(dtype) for _ in range(2)] for _ in range(layers)]
    return ChunkKV(full_length_cache(kv), torch.arange(3, 3 + tokens), **kwargs)


def same(one, other) -> bool:
    """Whether two chunks' KV are equal bit by bit, with all that is said of them."""
    layers = one.num_layers == other.num_layers
    kv = all(torch.equal(a, b) for i in range(one.num_layers) for a, b in zip(one.layer(i), other.layer(i)))
    rest = [(e.cached_positions.tolist(), e.behind_ids, e.provenance, e.regime) for e in (one, other)]
    return layers and kv and rest[0] == rest[1]
