"""Which reused tokens to recompute: rules that score them, as functions on tensors, no model.

A rule is a function from `Evidence` to one score per candidate; `BlendConfig(selection=...)` takes one, or a name below
(`docs/selection.md`). What a rule asks of the evidence decides which passes run, and so what it costs:

    rule                looks at                                             passes before selection (of T·L pairs)
    kv_deviation        ‖fresh − reused‖² of K or V at a check layer c       all tokens up to layer c        c / L
    suffix_attention    how much the suffix attends to a token               the suffix, over reused KV      a few rows
    chunk_start, last,  where a token stands                                 none                            0
    random              nothing                                              none                            0
    mixed               several of these, each with a share of the budget    what those need

Shapes: B batch, H heads, Hkv KV heads, N candidate tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config import BlendConfig, Deviation
from ..kv.rows import KV
from ..prompts.separator import Span


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at. Passes run when they are first asked for, and are counted in the trace.

    Attributes:
        candidate_idx: (N,) token indices that may be recomputed, rising.
        spans: [start, stop) of each reused chunk among them.
        check_layer: 0-based layer at which this round ranks; with gradual filtering each round has its own.
        num_layers: L.
        config: the call's settings.
        kv: layer -> fresh and reused K/V there, each (1, Hkv, N, D).
        suffix_attention: layers -> (len(layers), H, N) in fp32, received from the suffix over reused KV, row mean.
    """

    candidate_idx: torch.Tensor
    spans: Sequence[Span]
    check_layer: int
    num_layers: int
    config: BlendConfig
    kv: Callable[[int], tuple[KV, KV]]
    suffix_attention: Callable[[Sequence[int]], torch.Tensor]


Rule = Callable[[Evidence], torch.Tensor]  # -> (N,) scores; the highest are recomputed


def by_kv_deviation(evidence: Evidence) -> torch.Tensor:
    """CacheBlend's rule: the tokens whose fresh K/V at the check layer lie farthest from the reused ones.

        layer c    fresh   ■ ■ ■ ■ ■ ■ ■ ■   all tokens were run up to here
                   reused  ■ ■ ▨ ■ ■ ▨ ■ ■   ▨ differs most: recompute

    Source: CacheBlend (arXiv 2405.16444) section 4.3.
    """
    return kv_deviation(*evidence.kv(evidence.check_layer), evidence.config.deviation)[0]


def by_suffix_attention(evidence: Evidence) -> torch.Tensor:
    """The tokens that the suffix (the question) attends to, mean over heads and over layers from L/3 up.

                   chunk 1     chunk 2     suffix
        q u e s    · · █ ·     · ▄ · ·     ■            the question, run once over the reused KV
        t i o n    · · █ ▂     · █ · ·     ■ ■          █ looked at: recompute

    An error in these tokens is an error in the answer. Attention over the *reused* KV selects better than over the true
    KV (`docs/selection.md`). The first layers attend mostly to neighbours; `BlendConfig(score_layers=...)` sets others.

    Source: measured; the user's query also guides ProphetKV (arXiv 2602.02579), in two stages.
    """
    layers = evidence.config.score_layers or range(evidence.num_layers // 3, evidence.num_layers)
    return evidence.suffix_attention(tuple(layers)).mean((0, 1))


def kv_deviation(fresh: KV, reused: KV, deviation: Deviation = "value") -> torch.Tensor:
    """Returns (B, N) in fp32, how far each token's fresh K/V lies from the reused: squared L2, summed over heads.

        deviation(t) = Σ_{h,d} (fresh[h, t, d] − reused[h, t, d])²

    Args:
        fresh, reused: keys and values, each (B, Hkv, N, D); reused keys already realigned.
        deviation: `"value"`, `"key"`, or `"key_value"`, the sum of both, each divided by its mean over N.

    Source: CacheBlend section 4.3 (Δ_kv); the research repository ranks by V, LMCache v1 by K.
    """
    distances = [
        (f.float() - r.float()).square().sum(dim=(1, 3))  # (B, N)
        for name, f, r in zip(("key", "value"), fresh, reused)
        if name in deviation
    ]
    if len(distances) == 1:
        return distances[0]
    tiny = torch.finfo(torch.float32).tiny
    return sum(d / d.mean(-1, keepdim=True).clamp_min(tiny) for d in distances)  # type: ignore[return-value]


def budget(ratio: float, reused_tokens: int) -> int:
    """How many reused tokens a ratio recomputes: `ceil(ratio * reused_tokens)`, safe against 0.1 * 10 rounding up."""
    return min(reused_tokens, math.ceil(round(ratio * reused_tokens, 9)))


def highest(scores: torch.Tensor, count: int, forced: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the indices of the `count` highest scores (N,), rising: (count,) int64, or (N,) if `count` is larger.

    A NaN ranks highest, so that a broken value is recomputed rather than kept. `forced` indices come before all others,
    most important first, and count towards `count`.
    """
    count = min(count, scores.numel())
    scores = scores.nan_to_num(nan=math.inf)
    if forced is None or forced.numel() == 0:
        return scores.topk(count).indices.sort().values
    forced = forced[:count]
    others = scores.index_fill(0, forced, -math.inf).topk(count - forced.numel()).indices
    return torch.cat([forced, others]).sort().values
