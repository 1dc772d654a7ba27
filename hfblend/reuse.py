"""What a prompt takes from the store, and its K/V at the new positions, a layer at a time.

    stored rows of a chunk     ▨▨▨▨▨  ──────────┐ copied, keys turned to their new positions
    the layer's buffer     ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·      T rows and room for the tokens to be decoded

On a GPU both happen in one kernel, also for chunks that lie in RAM: it reads them over the bus, on a stream of its own
and some layers ahead.

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from .attention import kernels
from .caches import KV, ROOM, empty_kv, packed, rows_behind, sent
from .chunks import ChunkKV, Reader
from .controller import Load
from .models import BlendableModel
from .prompt import Span
from .rope import Realigner
from .streams import bus_stream, in_use

LAYERS_AHEAD = 4  # read from RAM before they are needed
PROGRAMS_ON_THE_BUS = 8  # twice as many, of keys and of values: they fill it, and leave the GPU to the pass


@dataclass
class Piece:
    """One reused span of the prompt and the entry that its KV comes from."""

    span: Span
    entry: Reader
    exact: bool


@dataclass
class Reuse:
    """What a prompt reuses, and what is left to compute; together they cover every token once.

    Attributes:
        exact, moved: pieces whose KV holds as it is, and pieces that stand elsewhere than where they were computed.
        candidate_idx: (N,) tokens of `moved`, rising.
        fresh_idx: (F,) all tokens that are not reused, and always the prompt's last one.
        suffix_idx: those of them that belong to the prompt's suffix.
        unread_idx: those that a pass of the suffix alone leaves out.
    """

    exact: list[Piece]
    moved: list[Piece]
    candidate_idx: torch.Tensor
    fresh_idx: torch.Tensor
    suffix_idx: torch.Tensor
    unread_idx: torch.Tensor

    def loads(self, device: torch.device) -> dict[str, Load]:
        """Tier -> what has to be loaded from it; `"memory"` is the device's own."""
        found: dict[str, Load] = {}
        for piece in self.exact + self.moved:
            tier = piece.entry.tier_beside(device)
            found[tier] = found.get(tier, Load(0, 0)) + Load(1, piece.entry.num_bytes)
        return found


class ReusedKV:
    """A layer's reused K/V at its new positions, assembled when asked for.

    Args:
        host, reuse: the model and the prompt's pieces.
        length: T.
    """

    def __init__(self, host: BlendableModel, reuse: Reuse, length: int) -> None:
        self.reuse, self.length = reuse, length
        self._host, self._num_layers, self._device = host, host.num_kv_layers, host.device
        positions = [torch.arange(*piece.span) for piece in reuse.moved]
        moves = [(p.entry.cached_positions, now, p.entry.regime) for p, now in zip(reuse.moved, positions)]
        self._realigner = Realigner(host, host.rotations, moves, host.regime(length))
        self._loaded: dict[int, KV] = {}
        self._gpu = GPULoader(host, reuse, self._realigner, length) if loads_by_kernel(host, reuse) else None

    @property
    def by_kernel(self) -> bool:
        """Whether layers are gathered by a kernel, into rows."""
        return self._gpu is not None

    @property
    def is_near(self) -> bool:
        """Whether every piece lies in this GPU's memory: nothing has to be waited for."""
        return self._gpu is not None and self._gpu.is_near

    @property
    def unfilled(self) -> dict[int, KV]:
        """Layer -> the buffers that it will be loaded into, where kernels do that; reused rows are not there yet."""
        return {} if self._gpu is None else self._gpu.buffers | self._loaded

    def preload(self) -> None:
        """Reads and moves every layer now, instead of when its turn comes."""
        for i in range(self._num_layers):
            if self.reuse.moved or self.reuse.exact:
                self._loaded[i] = self._load(i, self._like(i))

    def layer(self, layer_idx: int, fresh: KV | None = None) -> KV:
        """The layer's buffers (1, Hkv, T + room, D) with every reused row in place; other rows are not yet written.

        Args:
            fresh: K/V of any tokens there, to learn shapes and device from where nothing is reused.
        """
        if layer_idx in self._loaded:
            return self._loaded.pop(layer_idx)
        return self._load(layer_idx, self._like(layer_idx) if fresh is None else fresh)

    def moved_kv(self, layer_idx: int, like: KV) -> KV:
        """K/V (1, Hkv, N, D) of the pieces that moved, realigned, on the device of `like`."""
        keys, values = (b.index_select(2, self._moved_rows.to(b.device)) for b in self.layer(layer_idx, like))
        return keys, values

    @cached_property
    def _moved_rows(self) -> torch.Tensor:
        """(N,) the rows of the pieces that moved; a piece that ends with the prompt has one that is no candidate."""
        return sent(joined([torch.arange(*piece.span) for piece in self.reuse.moved]), self._device)

    def layers(self, layers: Sequence[int]) -> dict[int, KV]:
        """Layer -> buffers of several layers at once."""
        if self._gpu is not None and all(map(self._gpu.has, layers)):
            return self._gpu.load(layers)
        return {i: self.layer(i) for i in layers}

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading what lies on disk, and what lies in RAM beside a GPU: this layer and the next few."""
        if self._gpu is not None:
            self._gpu.read_ahead(layer_idx)
            return
        for piece in self.reuse.exact + self.reuse.moved:
            piece.entry.prefetch(layer_idx)

    def _like(self, layer_idx: int) -> KV:
        """K/V of one entry, where the layer's own will be: a store's may be elsewhere."""
        keys, values = (self.reuse.moved + self.reuse.exact)[0].entry.layer(layer_idx)
        device = self._host.device_of_layer(layer_idx)
        return keys[:, :, :0].to(device), values[:, :, :0].to(device)

    def _load(self, layer_idx: int, like: KV) -> KV:
        if self._gpu is not None and self._gpu.has(layer_idx):
            return self._gpu.load([layer_idx])[layer_idx]
        buffers = empty_kv(like, self.length + ROOM)
        self.prefetch(layer_idx)
        for piece in self.reuse.exact:
            for place, states in zip(_places(buffers, piece.span), piece.entry.layer(layer_idx)):
                place.copy_(states)
        turned = 0
        for piece in self.reuse.moved:
            tokens = slice(turned, turned := turned + len(piece.entry.cached_positions))
            self._realigner.move(layer_idx, piece.entry.layer(layer_idx), tokens, _places(buffers, piece.span))
        return buffers


def _places(buffers: KV, span: Span) -> KV:
    """The rows of a span, (1, Hkv, n, D)."""
    keys, values = (buffer[:, :, slice(*span)] for buffer in buffers)
    return keys, values


def loads_by_kernel(host: BlendableModel, reuse: Reuse) -> bool:
    """Whether kernels may gather this prompt's pieces."""
    return host.takes_kernels and bool(reuse.moved or reuse.exact)


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


def joined(ranges: list[torch.Tensor]) -> torch.Tensor:
    """Ranges of token indices, one behind the other; empty if there is none."""
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
