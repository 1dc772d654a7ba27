"""Beyond one first token: the speed of decoding, prompts a second where prompts share chunks, and batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from ...config import BlendConfig
from ...prompts.prompt import Prompt
from ..baselines import METHODS
from .device import timed
from .pair import Arrivals, Pair, Stores
from .prompts import PromptMaker
from .settings import Case

Say = Callable[[str], None]

_STOCK = Case(METHODS["full_prefill"], 1.0, None)


def default_case(place: str) -> Case:
    """hfblend's default settings, which both measurements blend with."""
    config = BlendConfig()
    return Case(METHODS[str(config.selection)], config.fixed_ratios[0], place)


def decoding(pair: Pair, prompt: Prompt, stores: Stores, num_tokens: int, repeats: int, say: Say) -> dict[str, Any]:
    """Tokens per second after a stock full prefill and after a blend, in turns.

    A turn's figure is the median over its tokens of the time from one to the next.
    """
    ours = default_case(next(iter(stores)))
    token_ms: dict[Case, list[float]] = {_STOCK: [], ours: []}
    for i in range(-1, repeats):  # turn −1 stores the chunks and warms up
        for case, found in token_ms.items():
            say(f"{len(prompt)} tokens, decoding {num_tokens} after {case.method.name}, turn {i + 1} of {repeats}")
            arrivals = Arrivals()
            pair.run(case, prompt, stores, 1 + num_tokens, arrivals)
            if i >= 0:
                found.append(median(arrivals.token_ms))
    ratios = [stock / blended for stock, blended in zip(*token_ms.values())]
    return {
        "tokens": len(prompt),
        "decoded_tokens": num_tokens,
        "method": ours.method.name,
        "ratio": ours.ratio,
        "stock_tokens_per_s": 1000 / median(token_ms[_STOCK]),
        "blended_tokens_per_s": 1000 / median(token_ms[ours]),
        "blended_over_stock": median(ratios),
        "blended_over_stock_range": [min(ratios), max(ratios)],
    }


def throughput(
    pair: Pair, maker: PromptMaker, stores: Stores, chunk_tokens: int, count: int, say: Say
) -> dict[str, Any]:
    """Prompts per second, one token each, by full prefill and by blending over a warm store, prompt by prompt in turns.

    Every prompt has the same prefix, chunks of one pool in an order of its own, and a new suffix.
    """
    ours = default_case(next(iter(stores)))
    pool, prompts = maker.stream(chunk_tokens, count)
    for prompt in (*pool, pool[-1]):  # stores the pool; the last time it is found
        pair.run(ours, prompt, stores)
        pair.run(_STOCK, prompt, stores)
    spent_ms = {_STOCK: 0.0, ours: 0.0}
    for i, prompt in enumerate(prompts):
        say(f"{len(prompt)} tokens, throughput, prompt {i + 1} of {count}")
        for case in spent_ms:
            ms, _, _ = timed(partial(pair.run, case, prompt, stores), pair.device)
            spent_ms[case] += ms
    return {
        "tokens": len(pool[0]),
        "prompts": count,
        "chunks_per_prompt": len(pool[0].chunk_spans),
        "chunks_in_pool": sum(len(prompt.chunk_spans) for prompt in pool),
        "method": ours.method.name,
        "ratio": ours.ratio,
        "stock_prompts_per_s": 1000 * count / spent_ms[_STOCK],
        "blended_prompts_per_s": 1000 * count / spent_ms[ours],
        "blended_over_stock": spent_ms[_STOCK] / spent_ms[ours],
    }


def batching(
    pair: Pair, maker: PromptMaker, stores: Stores, chunk_tokens: int, count: int, repeats: int, say: Say
) -> dict[str, Any]:
    """Milliseconds to the first token of `count` prompts, one by one and in one batch, both ways, in turns.

    Every prompt has the same prefix, chunks of one pool that is stored beforehand, and a suffix of its own.
    """
    ours = default_case(next(iter(stores)))
    pool, others = maker.stream(chunk_tokens, count)
    prompts = list(others)
    for prompt in (*pool, *prompts[:1] * 2):
        pair.run(ours, prompt, stores)

    def one_by_one(case: Case) -> None:
        for prompt in prompts:
            pair.run(case, prompt, stores)

    calls = {
        f"{name}_{how}_ms": partial(run, case)
        for name, case in (("stock", _STOCK), ("blended", ours))
        for how, run in (("single", one_by_one), ("batch", lambda case: pair.run_batch(case, prompts, stores)))
    }
    spent_ms: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(-1, repeats):  # turn −1 warms up
        for name, call in calls.items():
            say(f"{len(pool[0])} tokens, {count} prompts, {name.removesuffix('_ms')}, turn {i + 1} of {repeats}")
            ms, _, _ = timed(call, pair.device)
            if i >= 0:
                spent_ms[name].append(ms)
    ratios = [single / batch for single, batch in zip(spent_ms["blended_single_ms"], spent_ms["blended_batch_ms"])]
    return {
        "tokens": len(pool[0]),
        "prompts": count,
        "method": ours.method.name,
        "ratio": ours.ratio,
        **{name: median(found) for name, found in spent_ms.items()},
        "single_over_batch": median(ratios),
        "single_over_batch_range": [min(ratios), max(ratios)],
    }
