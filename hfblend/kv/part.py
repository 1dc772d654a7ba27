"""A part of a chunk's KV, without a copy: the rows of some of its tokens, as they were computed, after the others.

Shapes: n tokens of the part, Hkv KV heads, D head_dim, W width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .chunk import ChunkKV, ChunkLost, Reader
from .rows import KV


def part_of(entry: Reader, key: str, start: int, stop: int) -> Reader:
    """Returns tokens [start, stop) of an entry, under another key; the entry itself if these are all.

    It is exact only where its first row is the entry's first, since `behind_ids` are those before the entry.
    """
    if (start, stop) == (0, len(entry)):
        return entry
    return _PartInMemory(entry, start, stop) if isinstance(entry, ChunkKV) else _PartOfFile(entry, key, start, stop)


class _PartInMemory(ChunkKV):
    """A part of chunk KV in memory; a GPU's kernels read its rows where they lie."""

    def __init__(self, whole: ChunkKV, start: int, stop: int) -> None:
        vars(self).update(
            cache=whole.cache, cached_positions=whole.cached_positions[start:stop], behind_ids=whole.behind_ids,
            provenance=whole.provenance, regime=whole.regime, quantised=whole.quantised, origin=whole.origin,
            ids=whole.ids[start:stop], scope=whole.scope, _whole=whole, _place=slice(start, stop),
            num_bytes=whole.num_bytes // len(whole) * (stop - start), layouts=whole.layouts, dtype=whole.dtype,
        )  # fmt: skip

    _whole: ChunkKV
    _place: slice

    def layer(self, layer_idx: int) -> KV:
        keys, values = self._whole.layer(layer_idx)
        return keys[:, :, self._place], values[:, :, self._place]

    def rows(self, layer_idx: int) -> torch.Tensor | None:
        rows = self._whole.rows(layer_idx)
        return None if rows is None else rows[self._place]

    @cached_property
    def _addresses(self) -> np.ndarray[Any, Any]:
        widths = np.array([layout.width for layout in self.layouts])
        return self._whole._addresses + self._place.start * widths * self.dtype.itemsize

    @cached_property
    def _layers_packed_in(self) -> dict[torch.device, frozenset[int]]:
        return self._whole._layers_packed_in


class _PartOfFile:
    """A part of an entry in a file, whose layers are read whole. A `Reader`."""

    def __init__(self, whole: Reader, key: str, start: int, stop: int) -> None:
        self._whole, self._key, self._place = whole, key, slice(start, stop)
        self.num_behind, self.layouts, self.dtype = whole.num_behind, whole.layouts, whole.dtype
        self.num_layers, self.provenance, self.regime = whole.num_layers, whole.provenance, whole.regime
        self.quantised, self.origin, self.scope = whole.quantised, whole.origin, whole.scope
        self.num_bytes = whole.num_bytes // len(whole) * (stop - start)
        self.tier_beside = whole.tier_beside
        self.prefetch = whole.prefetch

    def __len__(self) -> int:
        return self._place.stop - self._place.start

    @property
    def ids(self) -> Sequence[int]:
        return self._whole.ids[self._place]

    @property
    def cached_positions(self) -> torch.Tensor:
        return self._read("cached_positions")[self._place]

    @property
    def behind_ids(self) -> Sequence[int]:
        return self._read("behind_ids")

    def layer(self, layer_idx: int) -> KV:
        keys, values = self._read("layer", layer_idx)
        return keys[:, :, self._place], values[:, :, self._place]

    def rows(self, layer_idx: int) -> torch.Tensor | None:
        rows = self._read("rows", layer_idx)
        return None if rows is None else rows[self._place]

    def _read(self, name: str, *layer: int) -> Any:
        """Reads something of the whole entry; raises `ChunkLost` with the part's key, by which it was asked for."""
        try:
            found = getattr(self._whole, name)
            return found(*layer) if layer else found
        except ChunkLost as error:
            raise ChunkLost(self._key, error.reason) from error
