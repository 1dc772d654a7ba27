"""Level `"full"` of the trace: layer x token maps, noted while a prompt is blended, without any effect on the result.

A layer's reused rows are copied as they are assembled, and compared at the end with the rows that the passes left in
their place. So passes run unchanged, CUDA graphs too.

Shapes: Hkv KV heads, T all tokens, N candidates, D head_dim, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import BlendConfig
from ..kv.rows import KV, rows_at
from .facts import LayerMaps
from .timeline import Lane
from .trace import Tracer


class Recorder(Tracer):
    """A tracer that makes the maps, and notes when each layer is asked for, loaded and computed."""

    _attention: dict[int, torch.Tensor]  # layer -> (T,)
    _reused: dict[int, KV]  # layer -> copies (1, Hkv, N, D)
    _passes: list[tuple[torch.Tensor, int | None]]  # of some rows: the rows (S,), and the last layer

    def realigned(self, config: BlendConfig) -> None:
        super().realigned(config)
        self._reused, self._attention, self._passes = {}, {}, []

    def layer(self, lane: Lane, name: str, layer_idx: int) -> Any:
        return self.clock.layer(lane, name, layer_idx)

    def layer_loaded(self, layer_idx: int, buffers: KV) -> None:
        if layer_idx not in self._reused and self.trace.candidate_idx is not None:
            self._reused[layer_idx] = rows_at(buffers, self.trace.candidate_idx)

    def of_pass(self, name: str, cache: Any) -> Any:
        if hasattr(cache, "rows"):
            self._passes.append((cache.rows, cache.stop_at))
        return self.clock.layers_of_pass(name, cache)

    def attention(self, received: Mapping[int, torch.Tensor]) -> None:
        self._attention |= {layer: weights.mean(0) for layer, weights in received.items()}

    def finish(self, buffers: Mapping[int, KV], fresh_up_to: int) -> None:
        super().finish(buffers, fresh_up_to)
        trace = self.trace
        assert trace.candidate_idx is not None
        idx, shape = trace.candidate_idx, (trace.num_layers, trace.num_tokens)
        key, value, attention = (torch.full(shape, torch.nan, device=idx.device) for _ in range(3))
        for layer, reused in self._reused.items():
            computed = rows_at(buffers[layer], idx)
            found = [relative_deviation(now, then)[0].to(idx.device) for now, then in zip(computed, reused)]
            computed_at = self._computed_at(layer, fresh_up_to)
            for one, deviation in zip((key, value), found):
                one[layer, idx] = deviation.masked_fill(~computed_at, torch.nan)
        for layer, received in self._attention.items():
            attention[layer] = received.to(idx.device)
        trace.maps = LayerMaps(key, value, attention if self._attention else None)
        self._reused.clear()

    def _computed_at(self, layer: int, fresh_up_to: int) -> torch.Tensor:
        """(N,) whether a pass left a candidate's K/V at a layer; others are reused, and perhaps corrected."""
        idx = self.trace.candidate_idx
        assert idx is not None
        computed = torch.full_like(idx, layer <= fresh_up_to, dtype=torch.bool)
        for rows, stop_at in self._passes:
            if stop_at is None or layer <= stop_at:
                computed |= torch.isin(idx, rows.to(idx.device))
        return computed


def relative_deviation(computed: torch.Tensor, reused: torch.Tensor) -> torch.Tensor:
    """Returns ‖computed − reused‖ / ‖computed‖ of each token's keys or values (B, Hkv, N, D), over heads and
    dimensions, in fp32: (B, N)."""
    size = computed.float().square().sum(dim=(1, 3)).sqrt()
    distance = (computed.float() - reused.float()).square().sum(dim=(1, 3)).sqrt()
    return distance / size.clamp_min(torch.finfo(torch.float32).tiny)
