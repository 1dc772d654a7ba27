"""Which reused tokens to recompute: pure functions on tensors, no model.

Shapes: B batch, Hkv KV heads, N candidate tokens, D head_dim.
"""

from __future__ import annotations

import math

import torch

from .config import Deviation


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
    wanted = [start + offset for offset in range(count) for start, stop in spans if start + offset < stop]
    tokens = torch.tensor(wanted, dtype=torch.long, device=candidate_idx.device)
    places = torch.searchsorted(candidate_idx, tokens).clamp_max(max(candidate_idx.numel() - 1, 0))
    return places[candidate_idx[places] == tokens] if candidate_idx.numel() else tokens[:0]
