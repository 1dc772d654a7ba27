"""What a prompt takes from the store, and its K/V at the new positions, a layer at a time.

    stored rows of a chunk     ▨▨▨▨▨  ──────────┐ copied, keys turned to their new positions
    the layer's buffer     ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·      T rows and room for the tokens to be decoded

On a GPU both happen in one kernel. Chunks that lie in RAM are copied into their places beforehand, on a stream of their
own and some layers ahead, and turned there.

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
from .caches import KV, ROOM, empty_kv, rows_behind, sent
from .chunks import ChunkKV, Reader
from .controller import Load
from .models import BlendableModel
from .prompt import Span
from .rope import Realigner
from .streams import copy_stream

LAYERS_AHEAD = 4  # copied from RAM before they are needed


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
    def on_gpu(self) -> bool:
        """Whether every piece lies in this GPU's memory, or has been copied there: no layer has to be waited for."""
        return self._gpu is not None and not self._gpu.waiting

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
        """Starts reading what lies on disk, and copying what lies in RAM beside a GPU: this layer and the next few."""
        if self._gpu is not None:
            self._gpu.copy_ahead(layer_idx)
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
    """Gathers reused rows on a GPU: one kernel for a layer, or for many.

    Args:
        host, reuse, length: as in `ReusedKV`.
        realigner: holds the rotations of the pieces that moved.

    Attributes:
        staged: pieces that are copied into their places first, because they lie in RAM or not in rows.
    """

    def __init__(self, host: BlendableModel, reuse: Reuse, realigner: Realigner, length: int) -> None:
        self.host, self.realigner, self.device = host, realigner, host.device
        self.pieces = [*reuse.exact, *reuse.moved]
        self._buffers = self._allocate(length + ROOM)
        known = [_addresses(piece.entry, self.device) for piece in self.pieces]
        self.staged = [piece for piece, addresses in zip(self.pieces, known) if addresses is None]
        self._copied: dict[int, torch.cuda.Event] = {}

        targets = torch.tensor([keys.data_ptr() for keys, _ in self._buffers.values()])
        row_bytes = torch.tensor([layout.width * host.dtype.itemsize for layout in host.layouts.values()])
        columns = [
            targets + piece.span[0] * row_bytes if addresses is None else addresses
            for piece, addresses in zip(self.pieces, known)
        ]
        spans = [piece.span for piece in self.pieces]
        turns = [-1] * len(reuse.exact) + _starts([stop - start for start, stop in spans[len(reuse.exact) :]])
        tiles = kernels.tiles_of([(stop - start, start, turn) for (start, stop), turn in zip(spans, turns)])
        numbers = [targets, torch.stack(columns, 1).flatten(), tiles.flatten()]
        self._targets, sources, tiles_there = sent(torch.cat(numbers), self.device).split([len(n) for n in numbers])
        self._sources, self._tiles = sources.view(-1, len(columns)), tiles_there.view(-1, 5)
        if self.staged:
            self._stream = copy_stream(self.device)
            # Behind all that was sent so far: a small copy would wait for every large one that is under way.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    @property
    def waiting(self) -> bool:
        """Whether there are layers left that come from RAM."""
        return bool(self.staged) and any(i not in self._copied for i in self._buffers)

    def has(self, layer_idx: int) -> bool:
        """Whether the layer's buffers are still here; they are given away once."""
        return layer_idx in self._buffers

    def load(self, layers: Sequence[int]) -> dict[int, KV]:
        """Layer -> buffers, every reused row in place. Layers of one kind, next to each other, take one kernel."""
        for i in layers if self.staged else ():
            self.copy_ahead(i)
            torch.cuda.current_stream(self.device).wait_event(self._copied[i])
        for (layout, rotation), run in _runs(layers, lambda i: (self.host.layouts[i], self.realigner.rotations[i])):
            tables = self.realigner.tables(run[0], self.device)
            slot = -1 if rotation is None or tables is None else rotation.slot
            half = rotation is None or rotation.pairing == "half"
            of_run = slice(run[0], run[-1] + 1)
            kernels.load_rows(
                self._targets[of_run], self._sources[of_run], self._tiles, layout, self.host.dtype, tables, slot, half
            )
        return {i: self._buffers.pop(i) for i in layers}

    def copy_ahead(self, layer_idx: int) -> None:
        """Starts copying the staged pieces of this layer and the next few."""
        if not self.staged:
            return
        for i in range(layer_idx, layer_idx + LAYERS_AHEAD):
            if i not in self._copied and i in self._buffers:
                self._copy(i)

    def _copy(self, layer_idx: int) -> None:
        buffers, rows = self._buffers[layer_idx], self._rows(layer_idx)
        rows.record_stream(self._stream)
        for piece in self.staged:
            piece.entry.prefetch(layer_idx)
        with torch.cuda.stream(self._stream):
            for piece in self.staged:
                start, stop = piece.span
                block = piece.entry.rows(layer_idx)
                if block is not None:
                    rows[start:stop].copy_(block, non_blocking=True)
                else:
                    for buffer, states in zip(buffers, piece.entry.layer(layer_idx)):
                        buffer[:, :, start:stop].copy_(states, non_blocking=True)
            self._copied[layer_idx] = torch.cuda.Event()
            self._copied[layer_idx].record()

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

    def _rows(self, layer_idx: int) -> torch.Tensor:
        rows = rows_behind(self._buffers[layer_idx])
        assert rows is not None
        return rows


def _runs(layers: Sequence[int], kind: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
    """Layers that follow each other and are of one kind, together."""
    runs: list[tuple[Any, list[int]]] = []
    for i in layers:
        if runs and runs[-1][1][-1] == i - 1 and runs[-1][0] == kind(i):
            runs[-1][1].append(i)
        else:
            runs.append((kind(i), [i]))
    return runs


def _addresses(entry: Reader, device: torch.device) -> torch.Tensor | None:
    """(L,) int64, where an entry's rows lie on that GPU; `None` if they must be copied there."""
    return entry.addresses_on(device) if isinstance(entry, ChunkKV) else None


def _starts(sizes: list[int]) -> list[int]:
    """Where each of several pieces starts, one behind the other."""
    return [0, *accumulate(sizes)][: len(sizes)]


def joined(ranges: list[torch.Tensor]) -> torch.Tensor:
    """Ranges of token indices, one behind the other; empty if there is none."""
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
