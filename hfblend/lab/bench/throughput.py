"""Many prompts that share chunks, one token each: stock and hfblend's default settings, in a stream and in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

from ...prompts.prompt import Prompt
from ..baselines import Case
from ..clock import Say, take_turns
from ..report import Row, with_range
from .pair import STOCK, Pair, Stores, about, default_case


def throughput(
    pair: Pair, pool: Sequence[Prompt], prompts: Sequence[Prompt], stores: Stores, repeats: int, say: Say
) -> Row:
    """Prompts per second, one token each, prompt by prompt in turns, over a warm store.

    Args:
        pool, prompts: of `PromptMaker.stream`.
    """
    ours, count = default_case(stores), len(prompts)
    _store_all(pair, pool, stores, (ours, STOCK))

    def answer_next(case: Case, left: Iterator[Prompt]) -> None:
        pair.run(case, next(left), stores)

    calls = {case: partial(answer_next, case, iter(prompts)) for case in (STOCK, ours)}
    turns = take_turns(calls, count, pair.device, say, warm_up=0)
    stock_ms, blended_ms = (sum(turn.ms for turn in own) for own in turns.values())
    return {
        "tokens": len(pool[0]),
        "prompts": count,
        "chunks_per_prompt": len(pool[0].chunk_spans),
        "chunks_in_pool": sum(len(prompt.chunk_spans) for prompt in pool),
        **about(ours),
        "stock_prompts_per_s": 1000 * count / stock_ms,
        "blended_prompts_per_s": 1000 * count / blended_ms,
        "blended_over_stock": stock_ms / blended_ms,
    }


def batching(
    pair: Pair, pool: Sequence[Prompt], prompts: Sequence[Prompt], stores: Stores, repeats: int, say: Say
) -> Row:
    """Milliseconds to the first tokens of several prompts, one by one and in one batch; arguments as `throughput`.

    The speed-up is that of hfblend's batch over stock's.
    """

    def one_by_one(case: Case) -> None:
        for prompt in prompts:
            pair.run(case, prompt, stores)

    def in_a_batch(case: Case) -> None:
        pair.run_batch(case, prompts, stores)

    ours = default_case(stores)
    _store_all(pair, [*pool, prompts[0]], stores, (ours,))
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


def _store_all(pair: Pair, prompts: Sequence[Prompt], stores: Stores, cases: Sequence[Case]) -> None:
    """Stores the chunks of the prompts, and runs the last one again, which finds them."""
    for prompt in (*prompts, prompts[-1]):
        for case in cases:
            pair.run(case, prompt, stores)
