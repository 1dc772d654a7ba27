"""What a prompt takes from the store, and its K/V at the new positions, a layer at a time.

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .caches import KV, ROOM, empty_kv
from .chunks import Reader
from .models import BlendableModel
from .prompt import Span
from .rope import Realigner


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
    """

    exact: list[Piece]
    moved: list[Piece]
    candidate_idx: torch.Tensor
    fresh_idx: torch.Tensor


class ReusedKV:
    """A layer's reused K/V at its new positions, assembled when asked for.

    Args:
        host, reuse: the model and the prompt's pieces.
        length: T.
    """

    def __init__(self, host: BlendableModel, reuse: Reuse, length: int) -> None:
        self.reuse, self.length = reuse, length
        self._preloaded: dict[int, KV] = {}
        self._num_layers = host.num_layers
        positions = [torch.arange(*piece.span) for piece in reuse.moved]
        self._moved_rows = joined(positions).to(host.device)
        moves = [(p.entry.cached_positions, now, p.entry.regime) for p, now in zip(reuse.moved, positions)]
        self._realigner = Realigner(host, host.rotations, moves, host.regime(length))

    def preload(self) -> None:
        """Reads and moves every layer now, instead of when its turn comes."""
        for i in range(self._num_layers):
            if self.reuse.moved:
                self._preloaded[i] = self._read(i, None)

    def moved_kv(self, layer_idx: int, like: KV) -> KV:
        """K/V (1, Hkv, N, D) of the pieces that moved, realigned, on the device of `like`."""
        if layer_idx in self._preloaded:
            return self._preloaded[layer_idx]
        return self._read(layer_idx, like[0].device)

    def _read(self, layer_idx: int, device: torch.device | None) -> KV:
        parts = [piece.entry.layer(layer_idx) for piece in self.reuse.moved]
        device = device or parts[0][0].device
        keys, values = (torch.cat([part[slot].to(device) for part in parts], 2) for slot in (0, 1))
        return self._realigner(layer_idx, (keys, values))

    def layer(self, layer_idx: int, fresh: KV) -> KV:
        """The layer's buffers (1, Hkv, T + room, D) with every reused row in place; other rows are not yet written."""
        buffers = empty_kv(fresh, self.length + ROOM)
        for piece in self.reuse.exact:
            for buffer, states in zip(buffers, piece.entry.layer(layer_idx)):
                buffer[:, :, slice(*piece.span)] = states
        if self.reuse.moved:
            rows = self._moved_rows.to(fresh[0].device)
            for buffer, states in zip(buffers, self.moved_kv(layer_idx, fresh)):
                buffer.index_copy_(2, rows, states)
        return buffers


def joined(ranges: list[torch.Tensor]) -> torch.Tensor:
    """Ranges of token indices, one behind the other; empty if there is none."""
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)
