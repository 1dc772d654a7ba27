"""The stored KV that a prompt reuses, and its K/V at the new positions, a layer at a time.

    stored rows of a chunk     ▨▨▨▨▨  ──────────┐ copied, keys turned to their new positions
    the layer's buffer     ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·      T rows and room for the tokens to be decoded

On a GPU both happen in one kernel; what lies in RAM is copied to its place before, ahead of the pass (`gpu/loader.py`).

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch

from ..kv.chunk import ChunkKV, Reader, layer_of_each
from ..kv.rows import KV, ROOM, empty_kv, rows_at, sent
from ..prompts.separator import Span
from ..trace.observer import Observer
from .rotation import KeyRotation, Realigner, Tables


@dataclass
class Piece:
    """One reused span of the prompt and the entry that its KV comes from."""

    span: Span
    entry: Reader
    exact: bool


@dataclass
class Reuse:
    """The tokens that a prompt reuses, and those left to compute; together they cover every token once.

    Attributes:
        exact, moved: pieces whose KV holds unchanged, and pieces that stand elsewhere than where they were computed.
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

    @property
    def pieces(self) -> list[Piece]:
        """All of them."""
        return self.exact + self.moved

    @property
    def exact_from_start(self) -> int:
        """How many of the first tokens lie in exact pieces."""
        stop = 0
        for start, end in sorted(piece.span for piece in self.exact):
            stop = end if start == stop else stop
        return stop


class ReusingModel(Protocol):
    """The part of a model that reused K/V are assembled for.

    Attributes:
        rotations: per layer, how cached state turns with position.
    """

    rotations: list[KeyRotation | None]

    @property
    def device(self) -> torch.device: ...
    @property
    def num_kv_layers(self) -> int: ...
    def device_of_layer(self, layer_idx: int) -> torch.device: ...

    def rotary_tables_of_pieces(self, source: int, pieces: list[tuple[torch.Tensor, int]]) -> Tables:
        """Returns cos and sin (N, 2R or R) in fp32 of a rotary source, for several (positions, regime) in a row."""
        ...

    def regime(self, length: int) -> int:
        """The prompt length that sets length-dependent RoPE frequencies in a prompt of `length` tokens."""
        ...


class Loader(Protocol):
    """Gathers the reused rows of some layers, faster than `ReusedKV` does it."""

    buffers: dict[int, KV]  # layer -> (1, Hkv, T + room, D), until it is loaded
    is_near: bool  # whether all rows lie in the device's memory

    def has(self, layer_idx: int) -> bool: ...
    def load(self, layers: Sequence[int]) -> dict[int, KV]: ...
    def read_ahead(self, layer_idx: int) -> None: ...


class ReusedKV:
    """A layer's reused K/V at its new positions, assembled when asked for.

    Args:
        model, reuse: the model and the prompt's pieces.
        length: T.
        observer: is told when layers are asked for and loaded.
        corrector: corrects the rows that stay reused, by those that are recomputed: a `Corrector`, or what does the
            same faster.

    Attributes:
        loaders: layer -> what gathers its rows in place of this class.
        takes_graphs: whether passes over this KV may be recorded: loaders gather all of it, into rows on one GPU.
    """

    def __init__(
        self,
        model: ReusingModel,
        reuse: Reuse,
        length: int,
        observer: Observer | None = None,
        corrector: Callable[..., None] | None = None,
    ) -> None:
        self.model, self.reuse, self.length, self.observer = model, reuse, length, observer or Observer()
        self.corrector = corrector
        self.loaders: Mapping[int, Loader] = {}
        self.takes_graphs = False
        self._to_read = [piece.entry for piece in reuse.pieces if not isinstance(piece.entry, ChunkKV)]
        self._loaded: dict[int, KV] = {}

    @cached_property
    def realigner(self) -> Realigner:
        """What moves cached state, in layers that no loader moves."""
        return realigner_of(self.model, self.reuse, self.length)

    @property
    def is_near(self) -> bool:
        """Whether every piece lies in the GPU's memory: nothing has to be waited for."""
        return self.takes_graphs and all(loader.is_near for loader in self.loaders.values())

    @property
    def unfilled(self) -> dict[int, KV]:
        """Layer -> the buffers that loaders will load it into; reused rows are not there yet."""
        return {i: loader.buffers[i] for i, loader in self.loaders.items() if loader.has(i)} | self._loaded

    def preload(self) -> None:
        """Reads and moves every layer now, instead of when its turn comes."""
        for i in range(self.model.num_kv_layers):
            if self.reuse.moved or self.reuse.exact:
                self._loaded[i] = self.layer(i)

    def layer(self, layer_idx: int, fresh: KV | None = None) -> KV:
        """The layer's buffers (1, Hkv, T + room, D) with every reused row in place; other rows are not yet written.

        Args:
            fresh: K/V of any tokens there, to learn shapes and device from where nothing is reused.
        """
        if layer_idx in self._loaded:
            return self._loaded.pop(layer_idx)
        with self.observer.layer("load", "reused KV", layer_idx):
            loader = self.loaders.get(layer_idx)
            is_there = loader is not None and loader.has(layer_idx)
            buffers = loader.load([layer_idx])[layer_idx] if loader and is_there else self._assembled(layer_idx, fresh)
        self.observer.layer_loaded(layer_idx, buffers)
        return buffers

    def moved_kv(self, layer_idx: int, like: KV) -> KV:
        """K/V (1, Hkv, N, D) of the pieces that moved, realigned, on the device of `like`."""
        return rows_at(self.layer(layer_idx, like), self._moved_rows)

    @cached_property
    def _moved_rows(self) -> torch.Tensor:
        """(N,) the rows of the pieces that moved; a piece that ends with the prompt has one that is no candidate."""
        return sent(torch.from_numpy(tokens_of(piece.span for piece in self.reuse.moved)), self.model.device)

    def layers(self, layers: Sequence[int], like: KV | None = None) -> dict[int, KV]:
        """Layer -> buffers of several layers; a loader gathers them together."""
        loader = self.loaders.get(layers[0]) if layers else None
        if loader is None or len(layers) == 1 or not all(map(loader.has, layers)):
            return {i: self.layer(i, like) for i in layers}
        found = loader.load(layers)
        for layer_idx, buffers in found.items():
            self.observer.layer_loaded(layer_idx, buffers)
        return found

    def correcting(self, above: int) -> Callable[..., None] | None:
        """Returns what corrects the layers above one in a pass, `None` where nothing is corrected; see `Corrector`."""
        return None if self.corrector is None else partial(self.corrector, above)

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading this layer, and the next few, of entries that are not in the device's memory."""
        with self.observer.layer("ask", "asked for", layer_idx):
            if layer_idx in self.loaders:
                self.loaders[layer_idx].read_ahead(layer_idx)
                return
            for entry in self._to_read:
                entry.prefetch(layer_idx)

    def _assembled(self, layer_idx: int, fresh: KV | None) -> KV:
        self.prefetch(layer_idx)  # first: reading waits for one entry, and the others are read meanwhile
        pieces, num_exact = self.reuse.pieces, len(self.reuse.exact)
        stored = layer_of_each([piece.entry for piece in pieces], layer_idx)
        buffers = empty_kv(fresh or self._placed(stored[0], layer_idx), self.length + ROOM)
        copies = [(kv, _places(buffers, piece.span)) for kv, piece in zip(stored, pieces)]
        for kv, places in copies[:num_exact]:
            for states, place in zip(kv, places):
                place.copy_(states)
        self.realigner.move(layer_idx, copies[num_exact:])
        return buffers

    def _placed(self, kv: KV, layer_idx: int) -> KV:
        """K/V without rows, of the kind of an entry's, where the layer's own will be: the entry may be elsewhere."""
        device = self.model.device_of_layer(layer_idx)
        return kv[0][:, :, :0].to(device), kv[1][:, :, :0].to(device)


def realigner_of(model: ReusingModel, reuse: Reuse, length: int) -> Realigner:
    """What moves the cached state of a prompt's pieces; T is its length."""
    moved = reuse.moved
    positions = torch.from_numpy(tokens_of(piece.span for piece in moved)).split([len(p.entry) for p in moved])
    moves = [(p.entry.cached_positions, now, p.entry.regime) for p, now in zip(moved, positions)]
    return Realigner(model.rotary_tables_of_pieces, model.rotations, moves, model.regime(length))


def _places(buffers: KV, span: Span) -> KV:
    """The rows of a span, (1, Hkv, n, D)."""
    keys, values = (buffer[:, :, slice(*span)] for buffer in buffers)
    return keys, values


def merged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Token indices of both, rising."""
    return torch.cat([one, other]).sort().values


def tokens_of(spans: Iterable[Span]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The token indices of spans, one after the other.

    By NumPy: some of PyTorch's operations begin threads for a few numbers on the CPU, and wait for them.
    """
    return np.concatenate([np.arange(*span) for span in ((0, 0), *spans)])
