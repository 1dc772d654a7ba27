"""Whole answers: stock and hfblend's default settings in turns, with stock over a static cache among them if asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from ...prompts.prompt import Prompt
from ..baselines import Case
from ..clock import Say, free_memory, take_turns, timed
from ..report import Row, with_range
from .pair import STOCK, Arrivals, Pair, Stores, about, default_case

_LONGEST = 200  # characters of a reason


def decoding(
    pair: Pair, prompt: Prompt, stores: Stores, num_tokens: int, repeats: int, say: Say, *, static: bool = False
) -> Row:
    """The time of a whole answer of so many tokens, from the call of `generate` to its end, and tokens per second.

    A turn's rate comes from the median over its tokens of the time from one to the next.

    Args:
        static: stock answers with a static cache, too, for which Transformers compiles the model on a GPU, in the first
            call. The row has the time of that call, or says why it failed.
    """

    def token_ms(case: Case, **options: str) -> float:
        arrivals = Arrivals()
        pair.run(case, prompt, stores, num_tokens, arrivals, **options)
        return median(arrivals.token_ms)

    ours = default_case(stores)
    calls: dict[str, Callable[[], float]] = {"stock": partial(token_ms, STOCK), "blended": partial(token_ms, ours)}
    row = {"tokens": len(prompt), "decoded_tokens": num_tokens, **about(ours)}
    if static:
        calls["static"] = partial(token_ms, STOCK, cache_implementation="static")
        say("static cache, first call")
        row |= _first_call(calls["static"], pair)
        if "static_failed" in row:
            del calls["static"]
    turns = take_turns(calls, repeats, pair.device, say)
    for name, own in turns.items():
        row[f"{name}_tokens_per_s"] = 1000 / median(turn.result for turn in own)
        row[f"{name}_answer_ms"] = median(turn.ms for turn in own)
    for name in calls.keys() - {"blended"}:
        both = list(zip(turns[name], turns["blended"]))
        row |= with_range(f"blended_over_{name}", [other.result / one.result for other, one in both])
        row |= with_range(f"answer_speed_up_over_{name}", [other.ms / one.ms for other, one in both])
    if static:
        _forget_compiled(pair)
    return row


def _first_call(call: Callable[[], float], pair: Pair) -> Row:
    try:
        ms = timed(call, pair.device).ms
        compiled = "compiled" if hasattr(pair.stock, "_compiled_call") else "not compiled"
        return {"static_first_answer_ms": ms, "static_cache": compiled}
    except Exception as error:  # a compiler has many ways to fail, and memory may not last
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:_LONGEST]
    _forget_compiled(pair)
    return {"static_failed": reason}


def _forget_compiled(pair: Pair) -> None:
    """Gives up the compiled stock model and its memory, which other measurements would count."""
    vars(pair.stock).pop("_compiled_call", None)
    torch.compiler.reset()
    free_memory()
