"""The costs of a process's first calls: self-test, compiling and tuning of kernels, recording of graphs.

The time of later calls is taken off, so that the work that every prompt needs does not count:

    patch() + (first prompt − later one, chunks new to both) + Σ (early call − later one, chunks found by both)
"""

from __future__ import annotations

from statistics import median

from ...prompts.prompt import Prompt
from ..baselines import Case
from ..clock import Say, timed
from ..report import Row
from ..synthetic import PromptMaker
from .pair import STOCK, Pair, Stores, about, default_case

NEW_TOKENS = 4  # decoding is recorded at the second token that its graph could serve
_EARLY, _LATER = 2, 3  # calls that find their chunks


def start_up(pair: Pair, maker: PromptMaker, length: int, stores: Stores, say: Say) -> Row:
    """Milliseconds of a pair's first calls, over empty stores; stock's own first call comes before them.

    Args:
        length: tokens of all chunks together.
    """
    ours, prompt, other = default_case(stores), maker.prompt(length), maker.prompt(length)

    def ms(case: Case, one: Prompt, what: str) -> float:
        say(what)
        return timed(lambda: pair.run(case, one, stores, NEW_TOKENS), pair.device).ms

    stock = ms(STOCK, prompt, "stock's first call")
    first = ms(ours, prompt, "first call")
    found = [ms(ours, prompt, f"call {2 + i}") for i in range(_EARLY + _LATER)]
    warm, new_chunks = median(found[_EARLY:]), ms(ours, other, "a prompt of new chunks")
    return {
        "tokens": len(prompt),
        "new_tokens": NEW_TOKENS,
        **about(ours),
        "stock_first_call_ms": stock,
        "patch_ms": pair.patch_ms,
        "first_call_ms": first,
        "second_call_ms": found[0],
        "third_call_ms": found[1],
        "warm_call_ms": warm,
        "new_chunks_call_ms": new_chunks,
        "start_up_ms": pair.patch_ms + first - new_chunks + sum(found[:_EARLY]) - _EARLY * warm,
    }
