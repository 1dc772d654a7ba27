"""What is shown of a trace, as plain lists: parts, levels of shade, bins, which tokens are written out, the mask.

A long prompt is binned, and few of its tokens are written out, so that no picture grows with it.

Shapes: T all tokens, L layers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..config import Selection
from ..generate.fallbacks import Fallback
from ..trace.timeline import Interval
from ..trace.trace import BlendTrace, ChunkTrace

COLUMNS = 160  # of a map
ROWS = 40
TOKENS = 2500  # written out
SHORTEST = 4  # tokens that are worth leaving out
HEAD, AROUND = 12, 5  # tokens of a long part that are written out: the first ones, and those around a high score
SHARES = (0.01, 0.03, 0.08, 0.15, 0.30, 0.50)  # of the scored tokens, from the highest down: levels 7 … 1
DEVIATIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # relative; levels 1 … 7
ATTENTION = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times the mean over all tokens; levels 1 … 7

# What each rule of `BlendConfig(selection=...)` recomputes.
RULE_WORDS: dict[Selection, str] = {
    "suffix_attention": "the tokens that the question attends to",
    "kv_deviation": "CacheBlend's: the tokens whose KV differs most from what is stored",
    "chunk_start": "the first tokens of every chunk",
    "mixed": "half by suffix_attention, half by kv_deviation",
    "random": "any tokens: a control",
    "last": "the last tokens of the context: a control",
}

Grid = list[list[int]]  # rows of levels, 0 … 7; 0: nothing is known


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt: its name, `[start, stop)`, and what is known of it if it was looked up."""

    name: str
    start: int
    stop: int
    piece: ChunkTrace | None = None

    @property
    def tokens(self) -> int:
        """How many."""
        return self.stop - self.start

    @property
    def origin(self) -> str:
        """exact, hit, miss, fresh or unused; `computed` where nothing was looked up."""
        if self.piece is None:
            return "computed"
        return "exact" if self.piece.exact else self.piece.status


def parts_of(trace: BlendTrace) -> list[Part]:
    """prefix, chunks, gaps, suffix, in their order."""
    parts, at = [], 0
    pieces: list[tuple[str, ChunkTrace]] = [("prefix", trace.prefix)] if trace.prefix else []
    pieces += [(f"chunk {i}", chunk) for i, chunk in enumerate(trace.chunks)]
    for name, piece in pieces:
        start, stop = piece.span
        if at < start:
            parts.append(Part("gap", at, start))
        parts.append(Part(name, start, stop, piece))
        at = stop
    if at < trace.num_tokens:
        parts.append(Part("suffix" if trace.chunks else "prompt", at, trace.num_tokens))
    return parts


def figures_of(trace: BlendTrace) -> list[tuple[str, str]]:
    """Name and figure, what matters first."""
    figures = [("tokens", f"{trace.num_tokens:,}")]
    if not trace.blended:
        return figures + ([("first token", f"{trace.ttft_ms:,.0f} ms")] if trace.ttft_ms is not None else [])
    candidates = 0 if trace.candidate_idx is None else len(trace.candidate_idx)
    exact = sum(chunk.exact for chunk in trace.chunks)
    figures += [
        ("chunks", f"{len(trace.chunks)}: {trace.hits} found, {exact} exact"),
        ("recomputed", f"{trace.selected_tokens:,} of {candidates:,} moved tokens"),
        ("computed", f"{trace.recomputed_pairs_share:.1%} of a full prefill"),
        ("read", f"{trace.bytes_reused / 1e6:,.1f} MB"),
    ]
    if trace.ttft_ms is not None:
        figures.append(("first token", f"{trace.ttft_ms:,.0f} ms"))
    if trace.settings:
        figures.append(("rule", rule_of(trace)))
    return figures


def rule_of(trace: BlendTrace) -> str:
    """suffix_attention 0.15"""
    ratios = ", ".join(f"{ratio:g}" for ratio in trace.settings.get("recompute_ratios") or (0,))
    return f"{trace.settings.get('selection', '')} {ratios}"


def rule_in_words(trace: BlendTrace) -> str:
    """suffix_attention 0.15: the tokens that the question attends to"""
    rule = rule_of(trace)
    said = RULE_WORDS.get(trace.settings.get("selection"))  # type: ignore[arg-type]  # a rule of one's own is not in it
    return f"{rule}: {said}" if said else rule


def fallback_of(trace: BlendTrace) -> str:
    """Why a call was not blended, as a sentence."""
    if trace.fallback is None:
        return "Nothing was blended yet."
    name = trace.fallback.upper()
    known = Fallback[name].reason if name in Fallback.__members__ else ""
    said = trace.fallback_reason or known
    return f"{trace.fallback}: {said}" if said else trace.fallback


def moved_text(piece: ChunkTrace) -> str:
    """39 → 512 (+473)"""
    now = piece.span[0]
    if piece.cached_start is None:
        return f"– → {now:,}"
    shift = now - piece.cached_start
    return f"{piece.cached_start:,} → {now:,}" + (f" ({shift:+,})" if shift else "")


# --- shades -----------------------------------------------------------------------------------------------------------


def score_levels(scores: Sequence[float | None]) -> list[int]:
    """Scores as levels 1 … 7 by their rank; 0 without a score. A NaN ranks highest, as it does in selection."""
    values = [math.inf if math.isnan(score) else score for score in scores if score is not None]
    rising = sorted(values)

    def level(score: float | None) -> int:
        if score is None:
            return 0
        above = len(rising) - bisect_right(rising, math.inf if math.isnan(score) else score)
        return 7 - bisect_right(SHARES, above / len(rising))

    return [level(score) for score in scores]


def _value_levels(values: torch.Tensor, bounds: Sequence[float]) -> Grid:
    levels = 1 + torch.bucketize(values.nan_to_num(nan=-1.0).contiguous(), torch.tensor(bounds, dtype=values.dtype))
    return levels.masked_fill(values.isnan(), 0).tolist()


def binned(values: Sequence[Any], most: int, combine: Callable[[Sequence[Any]], Any]) -> list[Any]:
    """At most that many values, each of as many neighbours as the others, give or take one."""
    edges = edges_of(len(values), most)
    return [combine(values[start:stop]) for start, stop in pairwise(edges)]


def edges_of(count: int, most: int) -> list[int]:
    """Where bins begin, and where the last one ends."""
    bins = min(count, most)
    return [i * count // bins for i in range(bins + 1)] if bins else [0]


def map_levels(values: torch.Tensor, name: str) -> Grid:
    """A map (L, T) as levels, binned: the highest of a bin."""
    values = values.float().cpu()
    if name == "attention":
        values = values * values.shape[1]
    low = torch.nan_to_num(values, nan=-torch.inf)
    for dim, most in ((0, ROWS), (1, COLUMNS)):
        edges = edges_of(low.shape[dim], most)
        low = torch.stack([low.narrow(dim, a, b - a).amax(dim) for a, b in pairwise(edges)], dim)
    return _value_levels(low.masked_fill(low.isinf(), torch.nan), ATTENTION if name == "attention" else DEVIATIONS)


# --- the mask ---------------------------------------------------------------------------------------------------------


def computed_rows(trace: BlendTrace) -> list[int]:
    """Tokens whose rows went through all layers, rising."""
    if trace.computes_all or not trace.blended:
        return list(range(trace.num_tokens))
    kinds = (trace.selected_idx, trace.fresh_idx)
    return sorted({token for idx in kinds if idx is not None for token in idx.tolist()})


def mask_of(trace: BlendTrace, most_rows: int = ROWS, most_columns: int = COLUMNS) -> Grid:
    """Who sees whom: a row per computed token (or several), a column per key (or several).

    0: not seen; 1: seen, all reused; 2: seen, some computed; 3: seen, computed for the most part. A row of several
    tokens is shown as its last one. Sliding windows are not drawn.
    """
    rows = computed_rows(trace)
    if not rows:
        return []
    edges = edges_of(trace.num_tokens, most_columns)
    kinds = []
    for start, stop in pairwise(edges):
        count = bisect_left(rows, stop) - bisect_left(rows, start)
        kinds.append(3 if 2 * count > stop - start else 2 if count else 1)
    shown = binned(rows, most_rows, lambda some: some[-1])
    return [[kind if start <= row else 0 for kind, start in zip(kinds, edges)] for row in shown]


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a part that are written out, or left out."""

    start: int
    stop: int
    shown: bool


def runs_of(part: Part, wanted: Sequence[bool]) -> Iterator[Run]:
    """A part's tokens in runs."""
    start = part.start
    for i in range(part.start + 1, part.stop + 1):
        if i == part.stop or wanted[i] != wanted[start]:
            yield Run(start, i, wanted[start])
            start = i


def wanted_tokens(parts: Sequence[Part], scores: Sequence[float | None], most: int = TOKENS) -> list[bool]:
    """Which tokens are written out: all, if there is room; else each part's first ones, and those around the highest
    scores until the room is used up."""
    count = parts[-1].stop if parts else 0
    if count <= most:
        return [True] * count
    wanted = [False] * count
    head = min(HEAD, max(1, most // (2 * len(parts))))
    room = most
    for part in parts:
        for i in range(part.start, min(part.start + head, part.stop)):
            if room > 0:
                wanted[i] = True
                room -= 1
    falling = sorted((i for i in range(count) if scores[i] is not None), key=lambda i: -_rank_value(scores[i]))
    for peak in falling:
        for i in range(max(0, peak - AROUND), min(count, peak + AROUND + 1)):
            if not wanted[i]:
                wanted[i] = True
                room -= 1
        if room <= 0:
            break
    for part in parts:
        for run in list(runs_of(part, wanted)):
            if not run.shown and run.stop - run.start < SHORTEST:
                wanted[run.start : run.stop] = [True] * (run.stop - run.start)
    return wanted


def _rank_value(score: float | None) -> float:
    return -math.inf if score is None else math.inf if math.isnan(score) else score


# --- time -------------------------------------------------------------------------------------------------------------


def lanes_of(trace: BlendTrace) -> list[tuple[str, list[Interval]]]:
    """Heading -> intervals, phases first; lanes of which nothing was noted are left out."""
    headings = (("phase", "phases"), ("compute", "layers computed"), ("load", "layers loaded"), ("ask", "asked for"))
    timeline = trace.timeline
    lanes = [(heading, [one for one in timeline if one.lane == lane]) for lane, heading in headings]
    return [(heading, intervals) for heading, intervals in lanes if intervals]
