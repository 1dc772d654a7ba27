"""What the algorithm tells while it runs, and the observer that writes it into a trace.

Shapes: H heads, T all tokens, N reused tokens that could be recomputed, S selected tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..config import BlendConfig
from ..kv.rows import KV
from .timeline import PhaseClock
from .trace import BlendTrace, ChunkTrace, settings_of


class Observer:
    """Told what a blend does; nothing of what it does changes the result. Every method may be left out."""

    def phase_done(self, phase: str) -> None:
        """A phase ended: look_up, prefill_chunks, select, recompute."""

    def prefilled(self, pairs: int) -> None:
        """Chunks were prefilled alone: (token, layer) pairs."""

    def looked_up(self, prefix: ChunkTrace | None, chunks: list[ChunkTrace], num_bytes: int) -> None:
        """Phase 1 found, or made, these; `num_bytes` of them are reused."""

    def partitioned(self, candidate_idx: torch.Tensor, fresh_idx: torch.Tensor) -> None:
        """(N,) tokens that could be recomputed, and those that are computed in any case."""

    def realigned(self, config: BlendConfig) -> None:
        """Reused KV is ready to be asked for; the settings are those of this prompt."""

    def layer(self, lane: Any, name: str, layer_idx: int) -> Any:
        """A context in which a layer is asked for, or loaded."""
        return contextlib.nullcontext()

    def layer_loaded(self, layer_idx: int, buffers: KV) -> None:
        """A layer's reused rows are in their places."""

    def of_pass(self, name: str, cache: Any) -> Any:
        """A context in which a pass runs with this cache."""
        return contextlib.nullcontext()

    def computed(self, pairs: int) -> None:
        """A pass went through so many (token, layer) pairs."""

    def attention(self, received: Mapping[int, torch.Tensor]) -> None:
        """Layer -> (H, T) attention that tokens received from the suffix."""

    def scored(self, scores: torch.Tensor) -> None:
        """(N,) of one round."""

    def selected(self, selected_idx: torch.Tensor) -> None:
        """(S,) tokens to recompute."""

    def finish(self, buffers: Mapping[int, KV], fresh_up_to: int) -> None:
        """All passes ran; K/V of layers up to `fresh_up_to` are fresh for every token."""

    def note(self, text: str) -> None:
        """A remark for the user."""


class Tracer(Observer):
    """Writes a `BlendTrace` of level `"summary"` or `"tokens"`.

    Args:
        trace: of one prompt.
        device: the model's, for the clock.
    """

    def __init__(self, trace: BlendTrace, device: torch.device) -> None:
        self.trace = trace
        self.trace.blended, self.trace.clock = True, PhaseClock(device)
        self.clock = self.trace.clock

    def phase_done(self, phase: str) -> None:
        self.clock.end_of(phase)

    def prefilled(self, pairs: int) -> None:
        self.trace.isolated_pairs += pairs

    def looked_up(self, prefix: ChunkTrace | None, chunks: list[ChunkTrace], num_bytes: int) -> None:
        self.trace.prefix, self.trace.chunks, self.trace.bytes_reused = prefix, chunks, num_bytes
        self.trace.scores = None

    def partitioned(self, candidate_idx: torch.Tensor, fresh_idx: torch.Tensor) -> None:
        self.trace.candidate_idx, self.trace.fresh_idx = candidate_idx, fresh_idx

    def realigned(self, config: BlendConfig) -> None:
        self.trace.settings = settings_of(config)

    def computed(self, pairs: int) -> None:
        self.trace.computed_pairs += pairs

    def scored(self, scores: torch.Tensor) -> None:
        self.trace.scores = scores if self.trace.scores is None else self.trace.scores

    def selected(self, selected_idx: torch.Tensor) -> None:
        self.trace.selected_idx = selected_idx

    def note(self, text: str) -> None:
        self.trace.notes.append(text)
