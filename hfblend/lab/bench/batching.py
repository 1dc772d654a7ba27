"""Several prompts that share chunks, one token each, one by one and in a batch: stock and hfblend's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

from ...prompts.prompt import Prompt
from ..baselines import Case
from ..clock import Say, take_turns
from ..report import Row, with_range
from .pair import STOCK, Pair, Stores, about, default_case


def batching(
    pair: Pair, pool: Sequence[Prompt], prompts: Sequence[Prompt], stores: Stores, repeats: int, say: Say
) -> Row:
    """Milliseconds to the first tokens of several prompts, one by one and in one batch, over a warm store.

    The speed-up is that of hfblend's batch over stock's.

    Args:
        pool, prompts: of `PromptMaker.batch`.
    """

    def one_by_one(case: Case) -> None:
        for prompt in prompts:
            pair.run(case, prompt, stores)

    def in_a_batch(case: Case) -> None:
        pair.run_batch(case, prompts, stores)

    ours = default_case(stores)
    for prompt in (*pool, prompts[0], prompts[0]):  # stores the chunks, then finds them
        pair.run(ours, prompt, stores)
    calls = {
        f"{name}_{way}_ms": partial(run, case)
        for name, case in (("stock", STOCK), ("blended", ours))
        for way, run in (("single", one_by_one), ("batch", in_a_batch))
    }
    ms = {name: [turn.ms for turn in own] for name, own in take_turns(calls, repeats, pair.device, say).items()}
    return {
        "tokens": len(pool[0]),
        "prompts": len(prompts),
        **about(ours),
        **{name: median(own) for name, own in ms.items()},
        **with_range("speed_up", [a / b for a, b in zip(ms["stock_batch_ms"], ms["blended_batch_ms"])]),
        **with_range("single_over_batch", [a / b for a, b in zip(ms["blended_single_ms"], ms["blended_batch_ms"])]),
    }
