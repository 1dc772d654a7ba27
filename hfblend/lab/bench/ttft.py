"""Time to first token: turns of all methods on one prompt -> a row per case, each turn with its own speed-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from ...blend.algorithm import Blend
from ...prompts.prompt import Prompt
from ...trace.trace import BlendTrace
from ..baselines import Case, PrefixReuse
from ..clock import Peaks, Turn
from ..report import Row, middle, with_range
from .flops import Shape, flops, full_prefill_flops, least_bytes

OUT_OF_MEMORY = "out of memory"

Turns = Mapping[Case, Sequence[Turn]]


def rows_of(
    turns: Turns, prompt: Prompt, shape: Shape | None, element_bytes: int, peaks: Peaks, loads: Sequence[Row]
) -> list[Row]:
    """A row per case; figures that were not measured, or cannot be counted, are `None`.

    Args:
        loads: the rows of `loading`.
    """
    whole = next((own for case, own in turns.items() if case.method.whole), [])
    first_place = next((case.chunks_in for case in turns if case.chunks_in), None)
    load_ms = {found["place"]: found["load_ms"] for found in loads}
    rows = []
    for case, own in turns.items():
        in_first = [] if case.chunks_in == first_place else turns.get(Case(case.method, case.ratio, first_place), [])
        rows.append(
            {
                "tokens": len(prompt),
                "method": case.name,
                "ratio": case.ratio,
                "chunks_in": case.chunks_in,
                "failed": None if own else OUT_OF_MEMORY,
                "turns": len(own),
                **with_range("ttft_ms", [turn.ms for turn in own]),
                **with_range("speed_up", _ratios(whole, own)),
                "peak_gib": middle([turn.peak_gib for turn in own if turn.peak_gib is not None]),
                **_trace_figures(own),
                "load_ms": load_ms.get(case.chunks_in) if own else None,
                "over_first_place": middle(_ratios(own, in_first)) if case.chunks_in else None,
                **_counted(own, case, prompt, shape, element_bytes, peaks),
            }
        )
    for row in rows:
        limit, speed_up = row["speed_up_limit"], row["speed_up"]
        row["share_of_limit"] = None if limit is None or speed_up is None else speed_up / limit
    return rows


def _ratios(slow: Sequence[Turn], fast: Sequence[Turn]) -> list[float]:
    return [one.ms / other.ms for one, other in zip(slow, fast)]


def _trace_figures(own: Sequence[Turn]) -> Row:
    traces: list[BlendTrace] = [turn.result for turn in own if turn.result is not None]
    if not traces:  # a stock call computes every pair
        return {"pairs_share": 1.0 if own else None, "phase_ms": {}, "bytes_reused": None}
    return {
        "pairs_share": traces[0].recomputed_pairs_share,
        "phase_ms": {name: median(t.phase_ms.get(name, 0.0) for t in traces) for name in traces[0].phase_ms},
        "bytes_reused": traces[0].bytes_reused,
    }


# --- counts -----------------------------------------------------------------------------------------------------------


def _counted(
    own: Sequence[Turn], case: Case, prompt: Prompt, shape: Shape | None, element_bytes: int, peaks: Peaks
) -> Row:
    """The operations that the case needs, and the limits that they set."""
    needed = None if shape is None or not own else needed_flops(case, prompt, own[0].result, shape)
    if shape is None or needed is None:
        return {"flops": None, "speed_up_limit": None, "roofline_ms": None}
    passes = 2 if _rule(case) == "suffix_attention" else 1
    moved = least_bytes(len(prompt), shape=shape, element_bytes=element_bytes, passes=passes)
    return {
        "flops": needed,
        "speed_up_limit": full_prefill_flops(len(prompt), shape=shape) / needed,
        "roofline_ms": peaks.least_ms(needed, moved),
    }


def needed_flops(case: Case, prompt: Prompt, trace: BlendTrace | None, shape: Shape) -> float | None:
    """The count of `flops` for a case; `None` for several check layers, rules without a count, and algorithms of
    `hfblend.lab.baselines` that depart from hfblend's."""
    tokens, prefix, suffix = len(prompt), len(prompt.prefix_ids), len(prompt.suffix_ids)
    if case.method.whole or trace is None:
        return full_prefill_flops(tokens, shape=shape)
    if case.method.algorithm is PrefixReuse:
        return flops(tokens, 0, None, tokens - prefix, shape=shape, exact=prefix)
    config = case.method.config(case.ratio)
    if case.method.algorithm is not Blend or len(config.check_layers) > 1 or trace.candidate_idx is None:
        return None
    count = partial(flops, tokens, suffix=suffix, shape=shape, exact=tokens - trace.candidate_idx.numel() - suffix)
    if not config.check_layers:
        return count(ratio=0, check_layer=None)
    rule = _rule(case)
    if rule not in ("kv_deviation", "suffix_attention", "chunk_start", "random", "last"):
        return None
    check_layer = config.check_layers[0] if rule == "kv_deviation" else None
    return count(ratio=case.ratio, check_layer=check_layer, scored=rule in ("kv_deviation", "suffix_attention"))


def _rule(case: Case) -> Any:
    """The rule that selects; `None` where nothing is selected."""
    config = case.method.config(case.ratio)
    return config.selection if config.check_layers and not config.recomputes_all else None
