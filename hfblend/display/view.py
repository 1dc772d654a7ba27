"""The content of every view of a trace, as plain lists: parts, table rows, shades, bins, tokens to write out, the mask.

A long prompt is binned, and only some of its tokens are written out, so that no picture grows with it.

Shapes: T all tokens, L layers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch

from ..config import Selection
from ..generate.fallbacks import Fallback
from ..trace.facts import ChunkTrace
from ..trace.timeline import Interval
from ..trace.trace import BlendTrace

COLUMNS, ROWS = 160, 40  # of a map
TOKENS = 2500  # written out
LONGEST = 60  # characters of a token
SHORTEST = 4  # tokens that are worth leaving out
HEAD, AROUND = 12, 5  # tokens written out of a long part: its first ones, and those around a high score
SHARES = (0.01, 0.03, 0.08, 0.15, 0.30, 0.50)  # of the scored tokens, from the highest down: levels 7 … 1
DEVIATIONS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # relative; levels 1 … 7
ATTENTION = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times the mean over all tokens; levels 1 … 7

# The tokens that each rule of `BlendConfig(selection=...)` recomputes.
RULE_WORDS: dict[Selection, str] = {
    "suffix_attention": "the tokens that the question attends to",
    "kv_deviation": "CacheBlend's: the tokens whose KV differs most from what is stored",
    "chunk_start": "the first tokens of every chunk",
    "mixed": "half by suffix_attention, half by kv_deviation",
    "random": "any tokens: a control",
    "last": "the last tokens of the context: a control",
}

Grid = list[list[int]]  # rows of levels, 0 … 7; 0: unknown


@dataclass(frozen=True)
class Part:
    """A stretch of the prompt, `[start, stop)`; `piece` is its record if it was looked up in the store."""

    name: str
    start: int
    stop: int
    piece: ChunkTrace | None = None

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return self.stop - self.start

    @property
    def origin(self) -> str:
        """exact, hit, miss, fresh or unused; `computed` if it was not looked up."""
        if self.piece is None:
            return "computed"
        return "exact" if self.piece.exact else self.piece.status

    @property
    def found(self) -> str:
        """`"hit"` if the store had it, `"miss"` if not, as the record says; then whether it is exact, and its bits."""
        assert self.piece is not None
        return ", ".join(filter(None, (self.piece.status, "exact" * self.piece.exact, self.piece.quantised)))


def parts_of(trace: BlendTrace) -> list[Part]:
    """Prefix, chunks, gaps and suffix, in their order."""
    parts, at = [], 0
    pieces = [("prefix", trace.prefix)] if trace.prefix else []
    for name, piece in [*pieces, *((f"chunk {i}", chunk) for i, chunk in enumerate(trace.chunks))]:
        start, stop = piece.span
        if at < start:
            parts.append(Part("gap", at, start))
        parts.append(Part(name, start, stop, piece))
        at = stop
    if at < trace.num_tokens:
        parts.append(Part("suffix" if trace.chunks else "prompt", at, trace.num_tokens))
    return parts


def few(parts: Sequence[Part], most: int) -> Sequence[Part]:
    """The first `most` parts, and the rest as one."""
    return parts if len(parts) <= most else [*parts[:most], Part("…", parts[most].start, parts[-1].stop)]


def figures_of(trace: BlendTrace) -> list[tuple[str, str]]:
    """Names and figures, the most important first."""
    figures = [("tokens", f"{trace.num_tokens:,}")]
    first_token = [] if trace.ttft_ms is None else [("first token", f"{trace.ttft_ms:,.0f} ms")]
    if not trace.blended:
        return figures + first_token
    candidates = 0 if trace.candidate_idx is None else len(trace.candidate_idx)
    exact = sum(chunk.exact for chunk in trace.chunks)
    return [
        *figures,
        ("chunks", f"{len(trace.chunks)}: {trace.hits} hits, {trace.misses} misses, {exact} exact"),
        ("recomputed", f"{trace.selected_tokens:,} of {candidates:,} moved tokens"),
        ("computed", f"{trace.recomputed_pairs_share:.1%} of a full prefill"),
        ("read", f"{trace.bytes_reused / 1e6:,.1f} MB"),
        *first_token,
        *([("rule", rule_of(trace))] if trace.settings else []),
        *([("correction", correction)] if (correction := trace.settings.get("correction")) else []),
    ]


def rule_of(trace: BlendTrace) -> str:
    """suffix_attention 0.15"""
    ratios = ", ".join(f"{ratio:g}" for ratio in trace.settings.get("recompute_ratios") or (0,))
    return f"{trace.settings.get('selection', '')} {ratios}"


def rule_in_words(trace: BlendTrace) -> str:
    """suffix_attention 0.15: the tokens that the question attends to"""
    said = RULE_WORDS.get(trace.settings.get("selection"))  # type: ignore[arg-type]  # a user's rule is not in it
    return f"{rule_of(trace)}: {said}" if said else rule_of(trace)


def fallback_of(trace: BlendTrace) -> str:
    """The reason why a call was not blended, as a sentence."""
    if trace.fallback is None:
        return "Nothing was blended yet."
    name = trace.fallback.upper()
    said = trace.fallback_reason or (Fallback[name].reason if name in Fallback.__members__ else "")
    return f"{trace.fallback}: {said}" if said else trace.fallback


def moved_text(piece: ChunkTrace) -> str:
    """39 → 512 (+473)"""
    now = piece.span[0]
    if piece.cached_start is None:
        return f"– → {now:,}"
    shift = now - piece.cached_start
    return f"{piece.cached_start:,} → {now:,}" + (f" ({shift:+,})" if shift else "")


def looked_up(trace: BlendTrace, parts: Sequence[Part]) -> list[tuple[Part, ChunkTrace, int, str]]:
    """The parts that were looked up, each with its record, the number of its recomputed tokens, and what a correction
    added."""
    selected = [] if trace.selected_idx is None else sorted(trace.selected_idx.tolist())
    counted = [(part, bisect_left(selected, part.stop) - bisect_left(selected, part.start)) for part in parts]
    known = [(part, part.piece, recomputed) for part, recomputed in counted if part.piece is not None]
    return [(*one, added) for one, added in zip(known, added_texts(trace))]


def added_texts(trace: BlendTrace) -> list[str]:
    """0.12 · 0.031: what was added to the keys and to the values of each of `trace.pieces`, over all layers."""
    if trace.offsets is None:
        return ["–"] * len(trace.pieces)
    sizes = trace.offsets.float().cpu().square().nanmean(0).sqrt().T.tolist()  # (P, 2)
    return [" · ".join(f"{size:.2g}" for size in both) if max(both) > 0 else "–" for both in sizes]


# --- shades -----------------------------------------------------------------------------------------------------------


def score_levels(scores: Sequence[float | None]) -> list[int]:
    """Scores as levels 1 … 7 by their rank; 0 without a score. A NaN ranks highest, as it does in selection."""
    rising = sorted(_rank(score) for score in scores if score is not None)

    def level(score: float) -> int:
        above = len(rising) - bisect_right(rising, _rank(score))
        return 7 - bisect_right(SHARES, above / len(rising))

    return [0 if score is None else level(score) for score in scores]


def _rank(score: float) -> float:
    return math.inf if math.isnan(score) else score


def highest_first(scores: Sequence[float | None]) -> list[int]:
    """The scored tokens, the highest score first."""
    ranks = {i: _rank(score) for i, score in enumerate(scores) if score is not None}
    return sorted(ranks, key=ranks.__getitem__, reverse=True)


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, shortened to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def binned(values: Any, most: int, combine: Callable[[Any], Any]) -> list[Any]:
    """At most that many values, each combined from an equal number (± 1) of neighbours."""
    return [combine(values[start:stop]) for start, stop in pairwise(edges_of(len(values), most))]


def edges_of(count: int, most: int) -> list[int]:
    """The first index of each bin, and the end of the last one."""
    bins = min(count, most)
    return [i * count // bins for i in range(bins + 1)] if bins else [0]


def score_strip(columns: dict[str, list[Any]], most: int) -> tuple[list[int], list[float]]:
    """All tokens in bins: the level of a bin's highest score, and the share of it that was recomputed."""
    levels = binned(score_levels(columns["score"]), most, max)
    return levels, binned(columns["selected"], most, lambda some: sum(some) / len(some))


@dataclass(frozen=True)
class ShadedMap:
    """Layers x tokens as levels, binned: the highest of a bin. `bounds` are the least values of levels 2 … 7."""

    name: str
    grid: Grid
    bounds: Sequence[float]


def maps_of(trace: BlendTrace) -> list[ShadedMap]:
    """Level `"full"`: the maps of a trace, and what a correction added to keys and to values, if it did."""
    if trace.maps is None:
        return []
    maps = [map_of(values, name) for name, values in trace.maps.items().items()]
    return maps + [_offset_map(trace, slot, name) for slot, name in enumerate(added_to(trace))]


def map_of(values: torch.Tensor, name: str) -> ShadedMap:
    """A map (L, T); attention times the mean over all tokens."""
    values = values.float().cpu()
    if name == "attention":
        values = values * values.shape[1]
    values = values.nan_to_num(nan=-torch.inf)
    for most in (ROWS, COLUMNS):  # layers, then tokens
        values = torch.stack(binned(values, most, lambda some: some.amax(0))).T
    bounds = ATTENTION if name == "attention" else DEVIATIONS
    return ShadedMap(name, _levels(values, bounds), bounds)


def added_to(trace: BlendTrace) -> tuple[str, ...]:
    """The names of the maps of a correction; none where it added nothing."""
    added = trace.offsets is not None and bool((trace.offsets > 0).any())
    return ("key_offset", "value_offset") if added else ()


def _offset_map(trace: BlendTrace, slot: int, name: str) -> ShadedMap:
    """A column is shaded by its pieces; bounds are shares of the largest value."""
    assert trace.offsets is not None
    values = trace.offsets[:, slot].float().cpu().nan_to_num(nan=-torch.inf)
    rows = torch.stack([*binned(values, ROWS, lambda some: some.amax(0))])
    rows = torch.cat([rows, rows.new_full((len(rows), 1), -torch.inf)], 1)  # of what is no piece
    number = torch.full((trace.num_tokens,), len(trace.pieces))
    for i, piece in enumerate(trace.pieces):
        number[slice(*piece.span)] = i
    columns = binned(number, COLUMNS, lambda some: rows[:, some.unique()].amax(1))
    bounds = [share * max(float(values.max()), 0.0) for share in DEVIATIONS]
    return ShadedMap(name, _levels(torch.stack(columns, 1), bounds), bounds)


def _levels(values: torch.Tensor, bounds: Sequence[float]) -> Grid:
    """Values as levels 1 … 7; 0 for -inf, which is unknown."""
    levels = 1 + torch.bucketize(values.contiguous(), torch.tensor(bounds))
    return levels.masked_fill(values.isinf(), 0).tolist()


# --- the mask ---------------------------------------------------------------------------------------------------------


def computed_rows(trace: BlendTrace) -> list[int]:
    """Tokens whose rows went through all layers, rising."""
    if trace.computes_all or not trace.blended:
        return list(range(trace.num_tokens))
    kinds = (trace.selected_idx, trace.fresh_idx)
    return sorted({token for idx in kinds if idx is not None for token in idx.tolist()})


def mask_of(trace: BlendTrace, most_rows: int = ROWS, most_columns: int = COLUMNS) -> Grid:
    """The attention mask: a row per computed token (or several), a column per key (or several).

    0: not seen; 1: seen, all reused; 2: seen, some computed; 3: seen, computed for the most part. A row of several
    tokens is shown as its last one. Sliding windows are not drawn.
    """
    rows = computed_rows(trace)
    edges = edges_of(trace.num_tokens, most_columns)
    kinds = []
    for start, stop in pairwise(edges):
        count = bisect_left(rows, stop) - bisect_left(rows, start)
        kinds.append(3 if 2 * count > stop - start else 2 if count else 1)
    shown = binned(rows, most_rows, lambda some: some[-1])
    return [[kind if start <= row else 0 for kind, start in zip(kinds, edges)] for row in shown]


# --- tokens -----------------------------------------------------------------------------------------------------------


def runs_of(part: Part, wanted: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Runs of neighbouring tokens of a part: whether they are written out, and their indices."""
    for shown, tokens in groupby(range(part.start, part.stop), wanted.__getitem__):
        yield shown, list(tokens)


def wanted_tokens(parts: Sequence[Part], scores: Sequence[float | None], most: int = TOKENS) -> list[bool]:
    """Marks the tokens to write out: all, if there is room; else each part's first ones, and those around the highest
    scores until the room is used up."""
    count = parts[-1].stop if parts else 0
    if count <= most:
        return [True] * count
    head = min(HEAD, max(1, most // (2 * len(parts))))
    first = [i for part in parts for i in range(part.start, min(part.start + head, part.stop))]
    chosen = set(first[:most])
    for peak in highest_first(scores):
        chosen.update(range(max(0, peak - AROUND), min(count, peak + AROUND + 1)))
        if len(chosen) >= most:
            break
    wanted = [i in chosen for i in range(count)]
    for part in parts:
        for shown, tokens in list(runs_of(part, wanted)):
            if not shown and len(tokens) < SHORTEST:
                wanted[tokens[0] : tokens[-1] + 1] = [True] * len(tokens)
    return wanted


# --- time -------------------------------------------------------------------------------------------------------------


def lanes_of(trace: BlendTrace) -> list[tuple[str, list[Interval]]]:
    """Heading -> intervals, phases first; empty lanes are left out."""
    headings = (("phase", "phases"), ("compute", "layers computed"), ("load", "layers loaded"), ("ask", "asked for"))
    timeline = trace.timeline
    lanes = [(heading, [one for one in timeline if one.lane == lane]) for lane, heading in headings]
    return [(heading, intervals) for heading, intervals in lanes if intervals]


def end_of(lanes: Sequence[tuple[str, Sequence[Interval]]]) -> float:
    """Milliseconds until the last interval ends; 0 without any."""
    return max((one.stop_ms for _, intervals in lanes for one in intervals), default=0.0)
