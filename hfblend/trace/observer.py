"""The observer of a blend: the algorithm tells it what happens, and knows no trace.

Shapes: H heads, T all tokens, N reused tokens that could be recomputed, S selected tokens,
P moved pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..config import BlendConfig
from ..kv.rows import KV
from .facts import ChunkTrace


class Observer:
    """Base class: hears what a blend does, ignores it, and changes nothing of the result."""

    def phase_done(self, phase: str) -> None:
        """Ends a phase: look_up, prefill_chunks, select, recompute, hand_over."""

    def prefilled(self, pairs: int) -> None:
        """Counts (token, layer) pairs of chunks that were prefilled alone."""

    def looked_up(self, prefix: ChunkTrace | None, chunks: list[ChunkTrace], num_bytes: int) -> None:
        """Takes the pieces that phase 1 found or made; `num_bytes` of them are reused."""

    def partitioned(self, candidate_idx: torch.Tensor, fresh_idx: torch.Tensor) -> None:
        """Takes the (N,) tokens that could be recomputed, and those that are computed in any case."""

    def realigned(self, config: BlendConfig) -> None:
        """Takes this prompt's settings, once its reused KV can be loaded."""

    def layer(self, lane: Any, name: str, layer_idx: int) -> Any:
        """Returns a context for asking for a layer, or loading it."""
        return contextlib.nullcontext()

    def layer_loaded(self, layer_idx: int, buffers: KV) -> None:
        """Takes a layer whose reused rows are in their places."""

    def of_pass(self, name: str, cache: Any) -> Any:
        """Returns a context for a pass with this cache."""
        return contextlib.nullcontext()

    def computed(self, pairs: int) -> None:
        """Counts the (token, layer) pairs of a pass."""

    def attention(self, received: Mapping[int, torch.Tensor]) -> None:
        """Takes, by layer, the (H, T) attention that tokens received from the suffix."""

    def scored(self, scores: torch.Tensor) -> None:
        """Takes the (N,) scores of one round."""

    def corrected(self, layer_idx: int, sizes: Callable[[], torch.Tensor]) -> None:
        """Takes what gives the (2, P) root mean squares of what moved pieces' keys, rotation off, and values got."""

    def selected(self, selected_idx: torch.Tensor) -> None:
        """Takes the (S,) tokens to recompute."""

    def finish(self, buffers: Mapping[int, KV], fresh_up_to: int) -> None:
        """Called after all passes; K/V of layers up to `fresh_up_to` are fresh for every token."""

    def note(self, text: str) -> None:
        """Takes a remark for the user."""
