"""Time to first token: all methods take turns on one prompt, and each turn gives its own speed-ups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from ...blend.algorithm import Blend
from ...prompts.prompt import Prompt
from ...trace.trace import BlendTrace
from ..baselines import PrefixReuse
from .device import Peaks, if_memory_lasts, timed
from .flops import Shape, flops, full_prefill_flops, least_bytes
from .pair import Pair, Stores
from .settings import Case

WARM_UP_TURNS = 2  # the first stores the chunks, the second is the first that finds them
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Turn:
    """One call."""

    ttft_ms: float
    peak_gib: float | None  # of GPU memory; weights and stored chunks are in it, for every method
    phase_ms: Mapping[str, float]
    trace: BlendTrace | None


def take_turns(
    pair: Pair, prompt: Prompt, stores: Stores, cases: Sequence[Case], repeats: int, say: Callable[[str], None]
) -> dict[Case, list[Turn]]:
    """The turns of every case; none of one that memory did not last for."""
    turns: dict[Case, list[Turn]] = {case: [] for case in cases}
    failed: set[Case] = set()
    for i in range(-WARM_UP_TURNS, repeats):
        for case in cases:
            if case in failed:
                continue
            say(f"{len(prompt)} tokens, {case.method.name} {case.ratio:g}, turn {i + 1} of {repeats}")
            turn = if_memory_lasts(partial(_turn, pair, case, prompt, stores))
            if turn is None:
                failed.add(case)
                turns[case].clear()
            elif i >= 0:
                turns[case].append(turn)
    return turns


def _turn(pair: Pair, case: Case, prompt: Prompt, stores: Stores) -> Turn:
    ms, peak, trace = timed(partial(pair.run, case, prompt, stores), pair.device)
    return Turn(ms, peak, {} if trace is None else trace.phase_ms, trace)


# --- turns -> rows --------------------------------------------------------------------------------------------------


def rows_of(
    turns: Mapping[Case, Sequence[Turn]],
    prompt: Prompt,
    shape: Shape | None,
    element_bytes: int,
    peaks: Peaks,
    loads: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row per case; what was not measured, or cannot be counted, is `None`.

    Args:
        loads: what `loading` found.
    """
    whole = next((own for case, own in turns.items() if case.method.whole), [])
    places = list(dict.fromkeys(case.chunks_in for case in turns if case.chunks_in))
    load_ms = {found["place"]: found["load_ms"] for found in loads}
    rows = []
    for case, own in turns.items():
        elsewhere = case.chunks_in is not None and case.chunks_in != places[0]
        in_first = turns.get(Case(case.method, case.ratio, places[0]), ()) if elsewhere else ()
        row: dict[str, Any] = {
            "tokens": len(prompt),
            "method": case.method.name,
            "ratio": case.ratio,
            "chunks_in": case.chunks_in,
            "failed": None if own else OUT_OF_MEMORY,
            "turns": len(own),
            **_times(own, whole),
            **_trace_figures(own),
            "load_ms": load_ms.get(case.chunks_in) if own else None,
            "over_first_place": _median_ratio(own, in_first),
            **_counted(own, case, prompt, shape, element_bytes, peaks),
        }
        limit, speed_up = row["speed_up_limit"], row["speed_up"]
        row["share_of_limit"] = None if limit is None or speed_up is None else speed_up / limit
        rows.append(row)
    return rows


def _times(own: Sequence[Turn], whole: Sequence[Turn]) -> dict[str, Any]:
    times = [turn.ttft_ms for turn in own]
    speed_ups = [full.ttft_ms / turn.ttft_ms for full, turn in zip(whole, own)]
    peaks = [turn.peak_gib for turn in own if turn.peak_gib is not None]
    return {
        "ttft_ms": median(times) if times else None,
        "ttft_ms_range": _range(times),
        "speed_up": median(speed_ups) if speed_ups else None,
        "speed_up_range": _range(speed_ups),
        "peak_gib": median(peaks) if peaks else None,
    }


def _range(values: Sequence[float]) -> list[float] | None:
    return [min(values), max(values)] if values else None


def _median_ratio(own: Sequence[Turn], other: Sequence[Turn]) -> float | None:
    ratios = [turn.ttft_ms / another.ttft_ms for turn, another in zip(own, other)]
    return median(ratios) if ratios else None


def _trace_figures(own: Sequence[Turn]) -> dict[str, Any]:
    trace, phases = (own[0].trace, own[0].phase_ms) if own else (None, {})
    return {
        "pairs_share": 1.0 if own and trace is None else trace and trace.recomputed_pairs_share,
        "phase_ms": {phase: median(turn.phase_ms.get(phase, 0.0) for turn in own) for phase in phases},
        "bytes_reused": None if trace is None else trace.bytes_reused,
    }


def _counted(
    own: Sequence[Turn], case: Case, prompt: Prompt, shape: Shape | None, element_bytes: int, peaks: Peaks
) -> dict[str, Any]:
    """What the case must compute, and the limits that this sets."""
    needed = None if shape is None or not own else needed_flops(case, prompt, own[0].trace, shape)
    if shape is None or needed is None:
        return {"flops": None, "speed_up_limit": None, "roofline_ms": None}
    passes = 2 if _selection(case) == "suffix_attention" else 1
    moved = least_bytes(len(prompt), shape=shape, element_bytes=element_bytes, passes=passes)
    return {
        "flops": needed,
        "speed_up_limit": full_prefill_flops(len(prompt), shape=shape) / needed,
        "roofline_ms": peaks.least_ms(needed, moved),
    }


def needed_flops(case: Case, prompt: Prompt, trace: BlendTrace | None, shape: Shape) -> float | None:
    """What `flops` counts for a case; `None` for what it has no count for: several check layers or rules, and
    algorithms of `hfblend.lab.baselines` that depart from hfblend's."""
    tokens, prefix, suffix = len(prompt), len(prompt.prefix_ids), len(prompt.suffix_ids)
    if case.method.whole or trace is None:
        return full_prefill_flops(tokens, shape=shape)
    if case.method.algorithm is PrefixReuse:
        return flops(tokens, 0, None, tokens - prefix, shape=shape, exact=prefix)
    config, selection = case.method.config(case.ratio), _selection(case)
    if case.method.algorithm is not Blend or len(config.check_layers) > 1 or trace.candidate_idx is None:
        return None
    exact = tokens - trace.candidate_idx.numel() - suffix
    if not config.check_layers:
        return flops(tokens, 0, None, suffix, shape=shape, exact=exact)
    if selection == "kv_deviation":
        return flops(tokens, case.ratio, config.check_layers[0], suffix, shape=shape, exact=exact)
    if selection == "suffix_attention":
        return flops(tokens, case.ratio, None, suffix, shape=shape, exact=exact)
    if selection in ("chunk_start", "random", "last"):
        return flops(tokens, case.ratio, None, suffix, shape=shape, exact=exact, scored=False)
    return None


def _selection(case: Case) -> Any:
    """The rule that selects; `None` where nothing is selected."""
    config = case.method.config(case.ratio)
    return config.selection if config.check_layers and not config.recomputes_all else None
