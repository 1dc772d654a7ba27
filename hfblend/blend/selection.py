"""Which reused tokens to recompute: rules that score them, as functions on tensors, no model.

A rule is a function from `Evidence` to one score per candidate; the highest scores are recomputed. What a rule asks of
the evidence decides which passes run, and so what it costs:

    rule                looks at                                             passes before selection (of T·L pairs)
    kv_deviation        ‖fresh − reused‖² of K or V at a check layer c       all tokens up to layer c        c / L
    suffix_attention    how much the suffix attends to a token               the suffix, over reused KV      a few rows
    chunk_start, last,  where a token stands                                 none                            0
    random              nothing                                              none                            0
    mixed               several of these, each with a share of the budget    what those need

`BlendConfig(selection=...)` takes one of these names, or any function of that form: `docs/selection.md`.

Shapes: B batch, H heads, Hkv KV heads, N candidate tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..config import BlendConfig, Deviation
from ..prompts.separator import Span
from .caches import KV


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
        suffix_attention: layers -> attention that each candidate receives from the suffix over the reused KV, mean over
            the suffix's rows, (len(layers), H, N) in fp32.
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
    fresh, reused = evidence.kv(evidence.check_layer)
    return kv_deviation(fresh, reused, evidence.config.deviation)[0]


def by_suffix_attention(evidence: Evidence) -> torch.Tensor:
    """The tokens that the suffix (the question) attends to, mean over heads and over layers from L/3 up.

                   chunk 1     chunk 2     suffix
        q u e s    · · █ ·     · ▄ · ·     ■            the question, run once over the reused KV
        t i o n    · · █ ▂     · █ · ·     ■ ■          █ looked at: recompute

    An answer is read off these tokens, so an error there is an error in the answer. Attention over the *reused* KV
    selects better than attention over the true KV: what must be mended is what the stale model looks at. The first
    layers attend mostly to neighbours and are left out; `BlendConfig(score_layers=...)` chooses others.

    Source: measured in `docs/selection.md`; the user's query also guides ProphetKV (arXiv 2602.02579), in two stages.
    """
    layers = evidence.config.score_layers or range(evidence.num_layers // 3, evidence.num_layers)
    return evidence.suffix_attention(tuple(layers)).mean((0, 1))


def by_chunk_start(evidence: Evidence) -> torch.Tensor:
    """All first tokens of the chunks, then all second ones, and so on until the budget is spent.

        chunk 1       chunk 2
        ▨ ▨ ■ ■ ■     ▨ ▨ ■ ■ ■      a chunk's first tokens were computed with nothing before them to attend to

    Source: EPIC's LegoLink (arXiv 2410.15332) section 4.
    """
    starts = torch.tensor([start for start, _ in evidence.spans], device=evidence.candidate_idx.device)
    of_chunk = torch.searchsorted(starts, evidence.candidate_idx, right=True) - 1
    return -(evidence.candidate_idx - starts[of_chunk]).float()


def by_position(evidence: Evidence) -> torch.Tensor:
    """The last tokens of the context: a control, which knows neither question nor content."""
    return evidence.candidate_idx.float()


def at_random(evidence: Evidence) -> torch.Tensor:
    """Any tokens, the same for the same number of candidates: a control."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(evidence.candidate_idx), generator=generator).to(evidence.candidate_idx.device)


def mixed(shares: Mapping[Rule, float]) -> Rule:
    """A rule that gives each of several rules its share of the budget; a token that two of them want counts once.

    >>> rule = mixed({by_suffix_attention: 2, by_chunk_start: 1})  # two thirds and one third

    Raises:
        ValueError: no rules, or a share that is not positive.
    """
    if not shares or min(shares.values()) <= 0:
        raise ValueError(f"mixed needs one or more rules, each with a share above 0, got {list(shares.values())}.")

    def rule(evidence: Evidence) -> torch.Tensor:
        device = evidence.candidate_idx.device  # scores of layers on several devices meet here
        return interleaved([one(evidence).to(device) for one in shares], list(shares.values()))

    return rule


RULES: dict[str, Rule] = {
    "suffix_attention": by_suffix_attention,
    "kv_deviation": by_kv_deviation,
    "chunk_start": by_chunk_start,
    "mixed": mixed({by_suffix_attention: 1, by_kv_deviation: 1}),
    "random": at_random,
    "last": by_position,
}


# --- the mathematics ----------------------------------------------------------------------------------------------


def interleaved(scores: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """One score from several, so that the k highest hold each one's best tokens in proportion to its share.

    A token's place with rule i is rank / share; its best place over the rules counts.

    Args:
        scores: each (N,).

    Returns:
        (N,), 0 for the best and falling.
    """
    places = []
    for score, share in zip(scores, shares):
        order = score.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        places.append((rank + 1) / share)
    return -torch.stack(places).amin(0)


def kv_deviation(
    fresh: tuple[torch.Tensor, torch.Tensor], reused: tuple[torch.Tensor, torch.Tensor], deviation: Deviation = "value"
) -> torch.Tensor:
    r"""How far each token's fresh K/V lies from what the store holds for it: squared L2, summed over heads, in fp32.

        deviation(t) = Σ_{h,d} (fresh[h, t, d] − reused[h, t, d])²

    Args:
        fresh, reused: keys and values, each (B, Hkv, N, D); reused keys already realigned.
        deviation: `"value"`, `"key"`, or `"key_value"` (the sum of both, each divided by its mean over N, so that
            neither outweighs the other).

    Returns:
        (B, N) in fp32.

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
    """Indices of the `count` highest scores, rising.

    Args:
        scores: (N,); a NaN ranks highest, so that a broken value is recomputed rather than kept.
        forced: indices that come before all others, most important first; they count towards `count`.

    Returns:
        (count,) int64, or (N,) if `count` is larger.
    """
    count = min(count, scores.numel())
    scores = scores.nan_to_num(nan=math.inf)
    if forced is None or forced.numel() == 0:
        return scores.topk(count).indices.sort().values
    forced = forced[:count]
    others = scores.index_fill(0, forced, -math.inf).topk(count - forced.numel()).indices
    return torch.cat([forced, others]).sort().values


def chunk_starts(candidate_idx: torch.Tensor, spans: list[tuple[int, int]], count: int) -> torch.Tensor:
    """Where in `candidate_idx` the first `count` tokens of every chunk stand, all first tokens before all second ones.

    Args:
        candidate_idx: (N,) token indices, rising.
        spans: chunks as [start, stop) token indices.
    """
    if count == 0:  # the rest would wait for the GPU
        return candidate_idx[:0]
    wanted = [start + offset for offset in range(count) for start, stop in spans if start + offset < stop]
    tokens = torch.tensor(wanted, dtype=torch.long, device=candidate_idx.device)
    places = torch.searchsorted(candidate_idx, tokens).clamp_max(max(candidate_idx.numel() - 1, 0))
    return places[candidate_idx[places] == tokens] if candidate_idx.numel() else tokens[:0]
