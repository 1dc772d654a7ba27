"""What a prompt takes from the store, and its K/V at the new positions, a layer at a time.

    stored rows of a chunk     ▨▨▨▨▨  ──────────┐ copied, keys turned to their new positions
    the layer's buffer     ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·      T rows and room for the tokens to be decoded

On a GPU both happen in one kernel; what lies in RAM is copied to its place before, ahead of the pass (`gpu_loader.py`).

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..controller import Load
from ..gpu.loader import loaders_of
from ..kv.chunk import Reader
from ..prompts.prompt import Span
from ..support.registry import BlendableModel
from .caches import KV, ROOM, empty_kv, sent
from .rotation import Realigner


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
        self._loaders = loaders_of(host, reuse, self._realigner, length)

    @property
    def by_kernel(self) -> bool:
        """Whether layers are gathered by a kernel, into rows, all on one GPU."""
        return bool(self._loaders) and self._host.takes_kernels

    @property
    def is_near(self) -> bool:
        """Whether every piece lies in this GPU's memory: nothing has to be waited for."""
        return self.by_kernel and all(loader.is_near for loader in self._loaders.values())

    @property
    def unfilled(self) -> dict[int, KV]:
        """Layer -> the buffers that it will be loaded into, where kernels do that; reused rows are not there yet."""
        found = {i: loader.buffers[i] for i, loader in self._loaders.items() if loader.has(i)}
        return found | self._loaded

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
        loader = self._loaders.get(layers[0]) if layers else None
        if loader is not None and all(map(loader.has, layers)):
            return loader.load(layers)
        return {i: self.layer(i) for i in layers}

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading what lies on disk, and what lies in RAM beside a GPU: this layer and the next few."""
        if layer_idx in self._loaders:
            self._loaders[layer_idx].read_ahead(layer_idx)
            return
        for piece in self.reuse.exact + self.reuse.moved:
            piece.entry.prefetch(layer_idx)

    def _like(self, layer_idx: int) -> KV:
        """K/V of one entry, where the layer's own will be: a store's may be elsewhere."""
        keys, values = (self.reuse.moved + self.reuse.exact)[0].entry.layer(layer_idx)
        device = self._host.device_of_layer(layer_idx)
        return keys[:, :, :0].to(device), values[:, :, :0].to(device)

    def _load(self, layer_idx: int, like: KV) -> KV:
        loader = self._loaders.get(layer_idx)
        if loader is not None and loader.has(layer_idx):
            return loader.load([layer_idx])[layer_idx]
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


def joined(ranges: list[torch.Tensor]) -> torch.Tensor:
    """Ranges of token indices, one behind the other; empty if there is none."""
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
