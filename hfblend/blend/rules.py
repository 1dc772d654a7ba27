"""The rules by name, and those that need no pass: where a token stands, chance, and several rules mixed.

Shapes: N candidate tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..arguments import described
from .model import AttentionNotRecorded
from .selection import Evidence, Rule, by_kv_deviation, by_suffix_attention

logger = logging.getLogger(__name__)


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


def scores_of(evidence: Evidence, note: Callable[[str], None]) -> torch.Tensor:
    """(N,) scores from the rule of the config; a model whose attention cannot be recorded is ranked by deviation.

    Args:
        note: is told that it was.

    Raises:
        ValueError: the rule returned anything but one score per candidate.
    """
    selection = evidence.config.selection
    try:
        scores = (selection if callable(selection) else RULES[selection])(evidence)
    except AttentionNotRecorded as error:
        note(str(error))
        logger.warning("%s", error)
        scores = by_kv_deviation(evidence)
    if not torch.is_tensor(scores) or scores.shape != evidence.candidate_idx.shape:
        got = tuple(scores.shape) if torch.is_tensor(scores) else described(scores)
        raise ValueError(
            f"A selection rule must return one score per candidate, {tuple(evidence.candidate_idx.shape)}, got {got}."
        )
    scores = scores if scores.is_floating_point() else scores.float()  # whole numbers and flags are scores, too
    return scores.to(evidence.candidate_idx.device)


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


def chunk_starts(candidate_idx: torch.Tensor, spans: Sequence[tuple[int, int]], count: int) -> torch.Tensor:
    """Places in `candidate_idx` of the first `count` tokens of every chunk, all first tokens before all second ones.

    Args:
        candidate_idx: (N,) token indices, rising.
        spans: chunks as [start, stop) token indices.
    """
    if count == 0:  # the rest would wait for the GPU
        return candidate_idx[:0]
    count = min(count, max((stop - start for start, stop in spans), default=0))
    wanted = [start + offset for offset in range(count) for start, stop in spans if start + offset < stop]
    tokens = torch.tensor(wanted, dtype=torch.long, device=candidate_idx.device)
    places = torch.searchsorted(candidate_idx, tokens).clamp_max(max(candidate_idx.numel() - 1, 0))
    return places[candidate_idx[places] == tokens] if candidate_idx.numel() else tokens[:0]
