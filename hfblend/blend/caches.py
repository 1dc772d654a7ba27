"""The caches of a pass: a stock forward does one phase of blending because its cache records, stops, or mixes rows in.

Shapes: B batch, Hkv KV heads, T all tokens, S rows of a pass, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..kernels.reference import AttentionArgs
from ..kv.rows import KV, empty_kv
from ..util import StopForward


class PassCache(Cache):
    """Empty full-length layers: every model then builds its ordinary masks, sliding models too."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])


class RecordingCache(PassCache):
    """Keeps the fresh K/V of all tokens, with `room` spare rows; ends the forward before layer `stop_at` attends."""

    def __init__(self, num_layers: int, stop_at: int | None = None, room: int = 0) -> None:
        super().__init__(num_layers)
        self.stop_at, self.room = stop_at, room
        self.recorded: dict[int, KV] = {}  # buffers (B, Hkv, T + room, D)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KV:
        length = key_states.shape[2]
        self.recorded[layer_idx] = kv = empty_kv((key_states, value_states), length + self.room)
        for buffer, states in zip(kv, (key_states, value_states)):
            buffer[:, :, :length] = states
        if layer_idx == self.stop_at:
            raise StopForward
        return key_states, value_states


class RowsCache(PassCache):
    """The cache of a pass over some rows (S,), rising, that ends after the K/V of layer `stop_at`. Where `is_told`,
    each layer that begins to attend calls `attending`."""

    def __init__(self, num_layers: int, rows: torch.Tensor, stop_at: int | None = None) -> None:
        super().__init__(num_layers)
        self.rows, self.stop_at, self.is_told = rows, stop_at, False
        self._waiting: dict[int, Callable[[AttentionArgs | None], None]] = {}

    def arrived(self, layer_idx: int, mix: Callable[[AttentionArgs | None], None], waits: bool) -> None:
        """Calls what mixes a layer's fresh K/V in: at once or, where it waits, with the queries of the layer."""
        self._waiting[layer_idx] = mix
        if not waits or not self.is_told or layer_idx == self.stop_at:
            self.attending(layer_idx, None)
        if layer_idx == self.stop_at:
            raise StopForward

    def attending(self, layer_idx: int, args: AttentionArgs | None) -> None:
        self._waiting.pop(layer_idx, lambda args: None)(args)

    def take_last(self, count: int) -> None:
        """From here on the pass has its last `count` rows, and runs to its end."""
        self.rows, self.stop_at = self.rows[-count:], None

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """0, or, asked by a layer, how far each row (S,) is from its place: `arange(S) +` this is then its position."""
        return 0 if layer_idx is None else self.rows - torch.arange(len(self.rows), device=self.rows.device)


class BlendingCache(RowsCache):
    """Mixes the fresh K/V of a pass over some rows into full-length buffers, and hands the whole layer to attention.

    Args:
        buffers: layer -> buffers (B, Hkv, T + room, D); loaded as layers are reached, and read by the caller later.
        reused: a `ReusedKV`; may be left out where every layer has its buffers.
        hidden: (K,) tokens that the rows do not see, and that are not computed yet.
        correct: is given a layer's rows (S,), their fresh K/V, the buffers, and what it attends with, if that is told.
    """

    def __init__(
        self, num_layers: int, buffers: dict[int, KV], rows: torch.Tensor, length: int, stop_at: int | None = None,
        reused: Any = None, hidden: torch.Tensor | None = None, correct: Callable[..., None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(num_layers, rows, stop_at)
        self.buffers, self.length, self.reused, self.hidden, self.correct = buffers, length, reused, hidden, correct

    def load(self, layers: Sequence[int], like: KV | None = None) -> None:
        """Fills buffers of some layers, whose fresh K/V of any tokens are `like`. Hidden rows are 0: 0 · NaN is NaN."""
        assert self.reused is not None
        for layer_idx, kv in self.reused.layers([i for i in layers if i not in self.buffers], like).items():
            for states in kv:
                if self.hidden is not None:
                    states.index_fill_(2, self.hidden.to(states.device), 0)
            self.buffers[layer_idx] = kv

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KV:
        if layer_idx not in self.buffers:
            self.load([layer_idx], (key_states, value_states))
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers[layer_idx])
        rows = self.rows.to(keys.device)

        def mix(queries: AttentionArgs | None) -> None:
            if self.correct is not None:
                self.correct(layer_idx, rows, (key_states, value_states), (keys, values), queries)
            keys.index_copy_(2, rows, key_states)
            values.index_copy_(2, rows, value_states)

        self.arrived(layer_idx, mix, waits=self.correct is not None)
        return keys, values
