"""Reused rows gathered on a GPU: from its own memory, from RAM, and as they come from a disk.

    rows in this GPU's memory   ▨▨▨▨ ──────────────────────┐
    rows elsewhere              ▨▨▨▨ ── over the bus ──┐   │ kernel: copies rows, turns keys
    the layer's buffer      ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·

What crosses the bus is copied straight to its place by the GPU's copy engines, ahead of the pass, and turned there. A
kernel that reads RAM by itself would take processors from the pass.

Shapes: Hkv KV heads, T all tokens, D head_dim, W width of a row, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import torch

from ..attention.by_position import HALF
from ..blend.reuse import Reuse, realigner_of
from ..blend.rotation import KeyRotation, Realigner, Tables
from ..kernels.device import HAS_TRITON, has_kernels
from ..kv.chunk import ChunkKV, Reader, first_position
from ..kv.rows import KV, ROOM, RowLayout, packed, rows_behind, sent
from ..kv.streams import bus_stream, on_stream
from ..model.hf_model import HFModel
from ..model.rotary_tables import TableKind, kind_of
from ..prompts.separator import Span

if HAS_TRITON:
    from ..kernels.rows import load_rows, pieces_of


def loaders_of(hf_model: HFModel, reuse: Reuse, length: int) -> dict[int, GPULoader]:
    """Layer -> what gathers its rows, one loader for each GPU that has layers; layers that no kernel may load are left
    out. Arguments as in `GPULoader`."""
    if not torch.cuda.is_available() or not reuse.pieces:
        return {}
    if hf_model.ranks.are_several or hf_model.dtype not in (torch.float32, *HALF):
        return {}
    layers_on: dict[torch.device, list[int]] = {}
    if hf_model.takes_kernels:
        layers_on[hf_model.device] = list(hf_model.layouts)
    else:
        for layer in hf_model.layouts:
            layers_on.setdefault(hf_model.device_of_layer(layer), []).append(layer)
    found: dict[int, GPULoader] = {}
    for device, layers in layers_on.items():
        if has_kernels(device):
            found |= dict.fromkeys(layers, GPULoader(hf_model, reuse, length, device, layers))
    return found


class GPULoader:
    """Gathers reused rows of the layers on one GPU: a kernel for a layer, or for many, that reads them where they lie.

    Args:
        hf_model, reuse, length: as in `ReusedKV`.
        device: the GPU.
        layers: that are there, rising.

    Attributes:
        buffers: layer -> (1, Hkv, T + room, D), until it is loaded.
        is_near: whether all rows lie in this GPU's memory.
    """

    def __init__(
        self, hf_model: HFModel, reuse: Reuse, length: int, device: torch.device, layers: Sequence[int]
    ) -> None:
        self.hf_model, self.device, self._reuse, self._length = hf_model, device, reuse, length
        self._place_of = {layer: i for i, layer in enumerate(layers)}
        pieces = [*reuse.exact, *reuse.moved]
        near = [p.entry.addresses_in(device, layers) if isinstance(p.entry, ChunkKV) else None for p in pieces]
        far = [(p.span, p.entry) for p, addresses in zip(pieces, near) if addresses is None]
        self.buffers, rows = self._allocate(length + ROOM, bus_stream(self.device) if far else None)
        self.is_near, self._bus = not far, OverTheBus(far, rows, self.device)

        targets = np.array([own.data_ptr() for own in rows.values()])
        row_bytes = np.array([hf_model.layouts[layer].width for layer in layers]) * hf_model.dtype.itemsize
        starts, sizes = [p.span[0] for p in pieces], [p.span[1] - p.span[0] for p in pieces]
        sources = [  # (pieces, L); what is copied there lies in its place
            targets + start * row_bytes if there is None else there for start, there in zip(starts, near)
        ]
        cached = [self._first_position(p.entry) for p in reuse.moved]
        turns = [at for at in cached if at is not None]
        self._cached_up_to = max((at + len(p.entry) for at, p in zip(turns, reuse.moved)), default=0)
        self._turns_by_position = (
            len(turns) == len(cached) and device == hf_model.device and not hf_model.length_dependent
        )
        if not self._turns_by_position:  # by the realigner's tables of the moved tokens
            turns = [0, *accumulate(sizes[len(reuse.exact) :])][:-1]
        turns = [-1] * len(reuse.exact) + turns
        table, self._num_tiles = pieces_of(list(zip(sizes, starts, turns)))
        numbers = [targets, np.stack(sources, 1).ravel(), np.array(table)]
        on_device = sent(torch.from_numpy(np.concatenate(numbers)), device).split(list(map(len, numbers)))
        self._targets, self._sources = on_device[0], on_device[1].view(-1, len(pieces))
        self._pieces = on_device[2].view(-1, 4)
        self._tables_of_kind: dict[TableKind, Tables] = {}

    def has(self, layer_idx: int) -> bool:
        """Whether the layer's buffers are still here; they are given away once."""
        return layer_idx in self.buffers

    def load(self, layers: Sequence[int]) -> dict[int, KV]:
        """Layer -> buffers, every reused row in place. Layers of one kind, next to each other, take one kernel."""
        for i in layers:
            self._bus.arrive(i)
        runs = _runs(layers, lambda i: (self.hf_model.layouts[i], self.hf_model.rotations[i]))
        if torch.cuda.current_device() == self.device.index:
            self._gather_all(runs)
        else:  # Triton asks for the current device
            on_stream(torch.cuda.current_stream(self.device), self._gather_all, runs)
        loaded = {i: self.buffers.pop(i) for i in layers}
        if layers:
            self._bus.go_on(layers[-1] + 1)
        return loaded

    def read_ahead(self, layer_idx: int) -> None:
        """Starts reading what does not lie on the GPU: this layer, and the next few."""
        self._bus.begin(layer_idx)

    def _gather_all(self, runs: Sequence[Sequence[int]]) -> None:
        for run in runs:
            self._gather(run)

    def _gather(self, layers: Sequence[int]) -> None:
        """One kernel for layers of one kind, next to each other."""
        first, rotation = layers[0], self.hf_model.rotations[layers[0]]
        run = slice(self._place_of[first], self._place_of[layers[-1]] + 1)
        tables = self._tables(first, rotation)
        load_rows(
            self._targets[run],
            self._sources[run],
            self._pieces,
            self._num_tiles,
            self.hf_model.layouts[first],
            self.hf_model.dtype,
            tables,
            rotates=-1 if rotation is None or tables is None else rotation.slot,
            half=rotation is None or rotation.pairing == "half",
            between=self._turns_by_position,
        )

    def _tables(self, layer_idx: int, rotation: KeyRotation | None) -> Tables | None:
        """The rotary tables of a layer: those of positions, or else of the tokens that moved; `None` if none turn."""
        if not self._turns_by_position:
            return self._realigner.tables(layer_idx, self.device)
        if rotation is None or not self._reuse.moved:
            return None
        kind = kind_of(rotation)
        if kind not in self._tables_of_kind:
            length = max(self._length, self._cached_up_to)
            self._tables_of_kind[kind] = self.hf_model.unit_tables(kind, length)
        return self._tables_of_kind[kind]

    @cached_property
    def _realigner(self) -> Realigner:
        return realigner_of(self.hf_model, self._reuse, self._length)

    @staticmethod
    def _first_position(entry: Reader) -> int | None:
        return entry.first_position if isinstance(entry, ChunkKV) else first_position(entry.cached_positions)

    def _allocate(self, length: int, stream: torch.cuda.Stream | None) -> tuple[dict[int, KV], dict[int, torch.Tensor]]:
        """Layer -> K/V (1, Hkv, length, D), and layer -> their rows (length, W); layers that are alike share one piece.

        Args:
            stream: whose memory it is; what is first to write there need not wait for what others have queued.
        """
        alike: dict[RowLayout, list[int]] = {}
        for layer in self._place_of:
            alike.setdefault(self.hf_model.layouts[layer], []).append(layer)
        kv: dict[int, KV] = {}
        rows: dict[int, torch.Tensor] = {}
        for layout, layers in alike.items():
            shape = len(layers), length, layout.width
            made = on_stream(stream, torch.empty, shape, dtype=self.hf_model.dtype, device=self.device)
            if stream is not None:
                made.record_stream(torch.cuda.current_stream(self.device))
            keys, values = (states[:, None].unbind() for states in layout.views(made))  # all layers at once
            kv |= zip(layers, zip(keys, values))
            rows |= zip(layers, made)
        return {i: kv[i] for i in self._place_of}, {i: rows[i] for i in self._place_of}


class OverTheBus:
    """Pieces that do not lie in the GPU's memory, copied to their places in the buffers, layer after layer.

    Args:
        pieces: span and entry of each.
        rows: layer -> the buffer's rows (T + room, W), of the bus stream's memory.
    """

    def __init__(
        self, pieces: Sequence[tuple[Span, Reader]], rows: dict[int, torch.Tensor], device: torch.device
    ) -> None:
        pieces = sorted(pieces, key=lambda piece: piece[0])
        self._entries, self._rows, self._device = [entry for _, entry in pieces], rows, device
        edges = [0, *(edge for span, _ in pieces for edge in span)]
        self._sizes = [after - before for before, after in pairwise(edges)]  # of gap, piece, gap, piece, …
        in_memory = [entry for entry in self._entries if isinstance(entry, ChunkKV)]
        self._is_all_in_memory = len(in_memory) == len(self._entries) > 0
        self._copied: dict[int, torch.cuda.Event] = {}  # layer -> when it has come
        self._reached: torch.cuda.Event | None = None  # by the pass
        first = next(iter(rows))
        if any(entry.layer(first)[0].is_cuda for entry in in_memory):  # what writes them may still be queued
            bus_stream(device).wait_stream(torch.cuda.current_stream(device))

    def begin(self, layer_idx: int) -> None:
        """Begins to read this layer, and those after it."""
        for entry in self._entries:
            entry.prefetch(layer_idx)
        if self._is_all_in_memory:
            self._copy(layer_idx)

    def arrive(self, layer_idx: int) -> None:
        """Makes work that is queued after this call wait for the layer's pieces.

        Raises:
            ChunkLost: one cannot be read.
        """
        if not self._entries:
            return
        if not self._copied:
            self.begin(layer_idx)
        self._copy(layer_idx)
        torch.cuda.current_stream(self._device).wait_event(self._copied[layer_idx])

    def go_on(self, layer_idx: int) -> None:
        """Copies a layer once the pass reaches what had been loaded when this was last called.

        Python is far ahead of the GPU. Were all layers queued at once, small copies that the pass needs would have to
        wait for all of them. What comes from files goes ahead by itself.
        """
        if not self._is_all_in_memory:
            return
        if self._reached is not None:
            bus_stream(self._device).wait_event(self._reached)
        self._copy(layer_idx)
        self._reached = torch.cuda.current_stream(self._device).record_event()

    def _copy(self, layer_idx: int) -> None:
        if layer_idx in self._copied or layer_idx not in self._rows:
            return
        stream = bus_stream(self._device)
        on_stream(stream, self._copy_on, stream, layer_idx)
        self._copied[layer_idx] = stream.record_event()

    def _copy_on(self, stream: torch.cuda.Stream, layer_idx: int) -> None:
        states = [self._rows_of(entry, layer_idx) for entry in self._entries]
        for own in states:
            if own.is_cuda:
                own.record_stream(stream)
        places = self._rows[layer_idx][: sum(self._sizes)].split(self._sizes)[1::2]
        torch._foreach_copy_(places, states, non_blocking=True)  # in one call: each hands Python to other threads

    def _rows_of(self, entry: Reader, layer_idx: int) -> torch.Tensor:
        """The rows (n, W) of a layer, wherever they lie."""
        rows = entry.rows(layer_idx)
        if rows is None:
            rows = rows_behind(packed(entry.layer(layer_idx), self._device))
        assert rows is not None
        return rows


def _runs(layers: Sequence[int], kind: Callable[[int], Any]) -> list[list[int]]:
    """Layers that follow each other and are of one kind, together."""
    runs = groupby(enumerate(layers), lambda numbered: (numbered[1] - numbered[0], kind(numbered[1])))
    return [[layer for _, layer in run] for _, run in runs]
