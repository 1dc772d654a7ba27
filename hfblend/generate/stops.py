"""The stops of `hfblend.steps`, in the order of the phases, and the tensors to be seen at each.

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, S selected tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from ..blend.reuse import Piece
from ..blend.selection import Evidence
from ..kv.rows import KV
from ..trace.trace import BlendTrace
from .blending import BlendResult


@dataclass(eq=False, repr=False)
class Step:
    """One stop: its `name`, its `explanation`, the trace so far, and the phase's tensors."""

    name: ClassVar[str]
    explanation: ClassVar[str]
    trace: BlendTrace

    def __str__(self) -> str:
        return f"{self.name}: {self.explanation}"

    def __repr__(self) -> str:
        shown = (f"  {field.name}: {form_of(getattr(self, field.name))}" for field in fields(self))
        return "\n".join([str(self), *shown])


@dataclass(eq=False, repr=False)
class LookedUp(Step):
    """The stop after phase 1. `trace.chunks` shows which chunks were found.

    Attributes:
        pieces: the prefix and each chunk: its span in the prompt, its KV (`entry`, a copy, at the positions where it
            was computed), and whether it is exact. A piece left out is computed with the prompt.
    """

    name = "looked_up"
    explanation = "The KV of the prefix and of every chunk was found in the store, or prefilled alone and stored."
    pieces: list[Piece]


@dataclass(eq=False, repr=False)
class Realigned(Step):
    """The stop after phase 2.

    Attributes:
        kv: layer -> keys and values (1, Hkv, T, D), keys at their new positions; rows of tokens that are not reused
            are 0 until they are computed.
        moved_idx: tokens of the chunks that moved.
        cached_positions: their positions when their keys were computed.
    """

    name = "realigned"
    explanation = "Every reused key was turned from the position where it was computed to its new one."
    kv: dict[int, KV]
    moved_idx: torch.Tensor
    cached_positions: torch.Tensor


@dataclass(eq=False, repr=False)
class Scored(Step):
    """A stop within phase 3, once for each check layer.

    Attributes:
        candidate_idx: (N,) tokens that may be recomputed, rising.
        scores: (N,) of the rule, the highest are selected; `None` where no rule runs (`check_layers=()`, ratio 1,
            no moved token).
        evidence: the material of rules, to make other scores from; its requests are computed, and counted.
    """

    name = "scored"
    explanation = "The rule gave every reused token a score: how much it seems to need recomputing."
    candidate_idx: torch.Tensor
    scores: torch.Tensor | None
    evidence: Evidence | None


@dataclass(eq=False, repr=False)
class Selected(Step):
    """The stop after phase 3.

    Attributes:
        candidate_idx: (N,) tokens that may be selected, rising.
        selected_idx: (S,) the ones to recompute.
        fresh_idx: tokens that are computed in any case: gaps, suffix, chunks that are not reused.
    """

    name = "selected"
    explanation = "The tokens with the highest scores, as many as the ratio allows, are those to recompute."
    candidate_idx: torch.Tensor
    selected_idx: torch.Tensor
    fresh_idx: torch.Tensor


@dataclass(eq=False, repr=False)
class Recomputed(Step):
    """The stop after phase 4.

    Attributes:
        kv: layer -> blended keys and values (1, Hkv, T, D).
        logits: (1, vocabulary) of the first new token.
    """

    name = "recomputed"
    explanation = "Selected tokens, gaps and suffix went through all layers, over the reused KV of the other tokens."
    kv: dict[int, KV]
    logits: torch.Tensor


@dataclass(eq=False, repr=False)
class Generated(Step):
    """The end, after phase 5.

    Attributes:
        result: as `hfblend.blend` returns it.
        answer_ids: greedy; the first by `logits`, the others by stock `generate` over the blended KV.
        text: of the answer; `None` without a tokenizer.
    """

    name = "generated"
    explanation = "The blended KV went into an ordinary cache, and stock decoding answered from it."
    result: BlendResult
    answer_ids: list[int]
    text: str | None


def form_of(value: Any) -> str:
    """Returns a short form of a value: a tensor by its shape, a long list by its length."""
    if torch.is_tensor(value):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return f"{len(value)} layers, each {', '.join(form_of(v) for v in next(iter(value.values()), ()))}"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} of {type(value[0]).__name__}"
    text = str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
