"""Level `"full"` of the trace: what is noted while a prompt is blended, and never changes what is computed.

A layer's reused rows are copied as they are assembled, and held against what the passes left in their place when all is
done: K/V that no row wrote are equal to their copy. So passes run as they always do, CUDA graphs too.

Shapes: Hkv KV heads, T all tokens, N candidates, D head_dim, L layers, H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..blend.caches import KV
from ..blend.reuse import Reuse, ReusedKV
from ..support.registry import BlendableModel
from .timeline import LayersOfPass
from .trace import BlendTrace, LayerMaps, PhaseClock


class Recorder:
    """Notes one prompt.

    Args:
        trace: gets the maps.
        clock: gets the layers.
    """

    def __init__(self, trace: BlendTrace, clock: PhaseClock) -> None:
        self.trace, self.clock = trace, clock
        self._candidate_idx: torch.Tensor | None = None
        self._reused: dict[int, KV] = {}  # layer -> copies (1, Hkv, N, D)
        self._attention: dict[int, torch.Tensor] = {}  # layer -> (T,)

    def reused(self, host: BlendableModel, reuse: Reuse, length: int) -> ReusedKV:
        """A `ReusedKV` whose layers are noted; what an earlier one left is forgotten."""
        self._candidate_idx = reuse.candidate_idx
        self._reused.clear()
        self._attention.clear()
        return _NotedKV(host, reuse, length, self)

    def keep(self, layer: int, buffers: KV) -> None:
        """Copies a layer's reused candidates, the first time."""
        if layer not in self._reused and self._candidate_idx is not None:
            self._reused[layer] = _rows(buffers, self._candidate_idx)

    def keep_attention(self, received: Mapping[int, torch.Tensor]) -> None:
        """Notes attention received, layer -> (H, T)."""
        self._attention |= {layer: weights.mean(0) for layer, weights in received.items()}

    @contextlib.contextmanager
    def layers_of(self, name: str, cache: Any) -> Iterator[None]:
        """Notes when a pass inside it computes each layer."""
        layers = LayersOfPass(self.clock, name, cache)
        try:
            yield
        finally:
            layers.end()

    def finish(self, buffers: Mapping[int, KV], selected_idx: torch.Tensor, fresh_up_to: int) -> None:
        """Makes the maps.

        Args:
            buffers: what the passes left.
            fresh_up_to: the last layer whose K/V are fresh for every token.
        """
        idx = self._candidate_idx
        if idx is None:
            return
        shape = (self.trace.num_layers, self.trace.num_tokens)
        key, value = (torch.full(shape, torch.nan, device=idx.device) for _ in range(2))
        selected = torch.isin(idx, selected_idx.to(idx.device))  # (N,)
        for layer, reused in self._reused.items():
            computed = _rows(buffers[layer], idx)
            found = [relative_deviation(now, then)[0].to(idx.device) for now, then in zip(computed, reused)]
            was_computed = selected | (layer <= fresh_up_to) | (found[0] + found[1] > 0)
            for one, deviation in zip((key, value), found):
                one[layer, idx] = deviation.masked_fill(~was_computed, torch.nan)
        attention = None
        if self._attention:
            attention = torch.full(shape, torch.nan, device=idx.device)
            for layer, received in self._attention.items():
                attention[layer] = received.to(idx.device)
        self.trace.maps = LayerMaps(key, value, attention)
        self._reused.clear()


class _NotedKV(ReusedKV):
    """Tells a recorder when layers are asked for and assembled."""

    def __init__(self, host: BlendableModel, reuse: Reuse, length: int, recorder: Recorder) -> None:
        super().__init__(host, reuse, length)
        self._recorder = recorder

    def layers(self, layers: Sequence[int]) -> dict[int, KV]:
        found = super().layers(layers)
        for layer, buffers in found.items():
            self._recorder.keep(layer, buffers)
        return found

    def prefetch(self, layer_idx: int) -> None:
        with self._recorder.clock.layer("ask", "asked for", layer_idx):
            pass
        super().prefetch(layer_idx)

    def _load(self, layer_idx: int, like: KV) -> KV:
        with self._recorder.clock.layer("load", "reused KV", layer_idx):
            buffers = super()._load(layer_idx, like)
        self._recorder.keep(layer_idx, buffers)
        return buffers


def relative_deviation(computed: torch.Tensor, reused: torch.Tensor) -> torch.Tensor:
    """‖computed − reused‖ / ‖computed‖ of each token, over heads and dimensions, in fp32.

    Args:
        computed, reused: keys or values, each (B, Hkv, N, D).

    Returns:
        (B, N)
    """
    size = computed.float().square().sum(dim=(1, 3)).sqrt()
    distance = (computed.float() - reused.float()).square().sum(dim=(1, 3)).sqrt()
    return distance / size.clamp_min(torch.finfo(torch.float32).tiny)


def _rows(kv: KV, idx: torch.Tensor) -> KV:
    keys, values = (states.index_select(2, idx.to(states.device)) for states in kv)
    return keys, values
