"""Reused rows gathered on a GPU, from its own memory and from pinned RAM.

Shapes: Hkv KV heads, T all tokens, n tokens of a piece, D head_dim, W width of a row, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from .attention import kernels
from .caches import KV, ROOM, packed, rows_behind, sent
from .chunks import ChunkKV, Reader
from .models import BlendableModel
from .rope import Realigner
from .streams import bus_stream, in_use

if TYPE_CHECKING:
    from .reuse import Reuse

LAYERS_AHEAD = 4  # read from RAM before they are needed
PROGRAMS_ON_THE_BUS = 8  # twice as many, of keys and of values: they fill it, and leave the GPU to the pass


class GPULoader:
    """Gathers reused rows on a GPU: one kernel for a layer, or for many, that reads them where they lie.

    Rows in RAM are read over the bus, on a stream of their own and some layers ahead of the pass. One copy a chunk and
    layer instead would cost Python as much as launching the pass does.

    Args:
        host, reuse, length: as in `ReusedKV`.
        realigner: holds the rotations of the pieces that moved.

    Attributes:
        buffers: layer -> (1, Hkv, T + room, D), until it is loaded.
        is_near: whether all rows lie in this GPU's memory, at addresses that are known.
    """

    def __init__(self, host: BlendableModel, reuse: Reuse, realigner: Realigner, length: int) -> None:
        self.host, self.realigner, self.device = host, realigner, host.device
        self._entries = [piece.entry for piece in (*reuse.exact, *reuse.moved)]
        self.buffers = self._allocate(length + ROOM)
        self._read: dict[int, torch.cuda.Event] = {}  # layer -> when its rows have come from RAM

        known = [entry.addresses_for(self.device) if isinstance(entry, ChunkKV) else None for entry in self._entries]
        self._unknown = [i for i, addresses in enumerate(known) if addresses is None]
        is_here = all(entry.tier_beside(self.device) == "memory" for entry in self._entries)
        self.is_near = is_here and not self._unknown

        targets = torch.tensor([keys.data_ptr() for keys, _ in self.buffers.values()])
        nowhere = torch.zeros_like(targets)
        self._addresses = torch.stack([nowhere if one is None else one for one in known], 1)  # (L, pieces)
        spans = [piece.span for piece in (*reuse.exact, *reuse.moved)]
        turns = [-1] * len(reuse.exact) + _starts([stop - start for start, stop in spans[len(reuse.exact) :]])
        tiles = kernels.tiles_of([(stop - start, start, turn) for (start, stop), turn in zip(spans, turns)])
        numbers = [targets, self._addresses.flatten(), tiles.flatten()]
        self._targets, sources, tiles_there = sent(torch.cat(numbers), self.device).split([len(n) for n in numbers])
        self._sources, self._tiles = sources.view(-1, len(known)), tiles_there.view(-1, 5)
        if not self.is_near:
            self._stream = bus_stream(self.device)
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def has(self, layer_idx: int) -> bool:
        """Whether the layer's buffers are still here; they are given away once."""
        return layer_idx in self.buffers

    def load(self, layers: Sequence[int]) -> dict[int, KV]:
        """Layer -> buffers, every reused row in place. Layers of one kind, next to each other, take one kernel."""
        if self.is_near:
            for _, run in _runs(layers, lambda i: (self.host.layouts[i], self.realigner.rotations[i])):
                self._gather(run, self._sources[run[0] : run[-1] + 1])
            return {i: self.buffers.pop(i) for i in layers}
        for i in layers:
            self._read_from_ram(i)
            torch.cuda.current_stream(self.device).wait_event(self._read[i])
        loaded = {i: self.buffers.pop(i) for i in layers}
        if layers and not self._unknown:  # others read ahead by themselves
            self.read_ahead(layers[-1] + 1)
        return loaded

    def read_ahead(self, layer_idx: int) -> None:
        """Starts reading what does not lie on the GPU: this layer, and the next few."""
        for i in self._unknown:
            self._entries[i].prefetch(layer_idx)
        if not self._unknown and not self.is_near:
            for i in range(layer_idx, layer_idx + LAYERS_AHEAD):
                if i in self.buffers:
                    self._read_from_ram(i)

    def _read_from_ram(self, layer_idx: int) -> None:
        if layer_idx in self._read:
            return
        if not self._read:  # from there on each entry goes ahead by itself
            for i in self._unknown:
                self._entries[i].prefetch(layer_idx)
        for states in self.buffers[layer_idx]:
            states.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            blocks = [self._readable(self._entries[i], layer_idx) for i in self._unknown]
            sources = self._sources[layer_idx : layer_idx + 1]
            if blocks:
                addresses = self._addresses[layer_idx].clone()
                addresses[self._unknown] = torch.tensor([block.data_ptr() for block in blocks])
                sources = sent(addresses, self.device)[None]
            self._gather([layer_idx], sources, PROGRAMS_ON_THE_BUS)
            self._read[layer_idx] = torch.cuda.Event()
            self._read[layer_idx].record()
        in_use.keep(self._read[layer_idx], self._entries, blocks, sources, self._targets, self._tiles, self.realigner)

    def _readable(self, entry: Reader, layer_idx: int) -> torch.Tensor:
        """The rows (n, W) of a layer, where a kernel can read them: as they are in pinned RAM, else brought here."""
        rows = entry.rows(layer_idx) if entry.is_pinned else None
        if rows is None:
            rows = rows_behind(packed(entry.layer(layer_idx), self.device))
        assert rows is not None
        return rows

    def _gather(self, layers: Sequence[int], sources: torch.Tensor, programs: int | None = None) -> None:
        """One kernel for layers of one kind, next to each other; `sources` (n, pieces) are their rows' addresses."""
        first, rotation = layers[0], self.realigner.rotations[layers[0]]
        tables = self.realigner.tables(first, self.device)
        kernels.load_rows(
            self._targets[first : layers[-1] + 1],
            sources,
            self._tiles,
            self.host.layouts[first],
            self.host.dtype,
            tables,
            rotates=-1 if rotation is None or tables is None else rotation.slot,
            half=rotation is None or rotation.pairing == "half",
            programs=programs,
        )

    def _allocate(self, length: int) -> dict[int, KV]:
        """Layer -> buffers (1, Hkv, length, D), in one piece where all layers are alike."""

        def rows(count: int, width: int) -> torch.Tensor:
            return torch.empty((count, length, width), dtype=self.host.dtype, device=self.device)

        layouts = self.host.layouts
        if len(set(layouts.values())) > 1:
            return {i: layout.views(rows(1, layout.width)) for i, layout in layouts.items()}
        layout = next(iter(layouts.values()))
        keys, values = layout.views(rows(len(layouts), layout.width))
        return dict(zip(layouts, zip(keys.split(1), values.split(1))))


def _runs(layers: Sequence[int], kind: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Layers that follow each other and are of one kind, together."""
    runs: list[tuple[Any, list[int]]] = []
    for i in layers:
        if runs and runs[-1][1][-1] == i - 1 and runs[-1][0] == kind(i):
            runs[-1][1].append(i)
        else:
            runs.append((kind(i), [i]))
    return runs


def _starts(sizes: list[int]) -> list[int]:
    """Where each of several pieces starts, one behind the other."""
    return [0, *accumulate(sizes)][: len(sizes)]
