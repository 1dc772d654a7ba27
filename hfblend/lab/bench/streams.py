"""The measurements besides the first token of one prompt: loading alone, decoding, prompts that share chunks, batches.

In the last three, stock full prefill and hfblend's default settings take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, cast

import torch

from ...blend.algorithm import Blend
from ...config import BlendConfig
from ...generate.blending import Blending
from ...prompts.prompt import Prompt
from ...store import DiskStore, Store
from ...store.keys import file_name_of
from ...support.registry import model_of
from ..baselines import METHODS
from ..clock import Say, take_turns
from ..report import Row, with_range
from ..settings import Case
from .pair import Arrivals, Pair, Stores

_STOCK = Case(METHODS["full_prefill"], 1.0)
_BUFFER_BYTES = 4 * 2**20  # of a plain read


# --- loading ----------------------------------------------------------------------------------------------------------


def loading(pair: Pair, prompt: Prompt, stores: Stores, repeats: int, say: Say) -> Iterator[Row]:
    """A row per place but the GPU: bytes, and the medians of `Loading.measures` in ms.

    Files were read just before, so that the system has them in RAM.
    """
    for place, store in stores.items():
        if place != "gpu":
            say(place)
            loads = Loading(pair, prompt, place, store)
            turns = take_turns(loads.measures, repeats, pair.device)
            ms = {name: median(turn.ms for turn in own) for name, own in turns.items()}
            yield {"tokens": len(prompt), "place": place, "bytes": loads.num_bytes, **ms}


class Loading:
    """The loads of one prompt from one place, whose chunks are all stored there."""

    def __init__(self, pair: Pair, prompt: Prompt, place: str, store: Store) -> None:
        self._model, self._ids, self._spans = model_of(pair.model), prompt.input_ids.to(pair.device), prompt.chunk_spans
        self._store, self._config = store, BlendConfig(layerwise=place != "disk_whole")
        look_up = self._at("looked_up").look_up
        self._keys = [chunk.key for chunk in look_up.all_traces]
        self.num_bytes = look_up.num_bytes
        self.measures: dict[str, Callable[[], None]] = {"load_ms": self.load}
        if place.startswith("disk"):
            folder = cast(DiskStore, store).path
            self._files = [folder / file_name_of(key) for key in self._keys]
            self.measures |= {"read_ms": self.read, "plain_read_ms": self.read_plainly}

    @torch.no_grad()
    def load(self) -> None:
        """The look-up, and every layer at its new positions on the model's device."""
        reused = self._at("realigned").reused
        for i in range(self._model.num_layers):
            reused.layers([i])

    def read(self) -> None:
        """Every layer through the store: in RAM, checked."""
        entries = [entry for entry in map(self._store.open, self._keys) if entry is not None]
        for i in range(self._model.num_layers):
            for entry in entries:
                entry.prefetch(i)
            for entry in entries:
                entry.layer(i)

    def read_plainly(self) -> None:
        """The same files from start to end, one after the other in one thread, as `dd` does, unchecked."""
        buffer = bytearray(_BUFFER_BYTES)
        for file in self._files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def _at(self, stop: str) -> Blend:
        state = Blending(self._model, self._ids, self._spans, self._store, self._config)
        return state.stopped_at(stop, self._model.last_logits)


# --- stock and blended ------------------------------------------------------------------------------------------------


def decoding(pair: Pair, prompt: Prompt, stores: Stores, num_tokens: int, repeats: int, say: Say) -> Row:
    """Tokens per second after a stock full prefill and after a blend.

    A turn's figure is the median over its tokens of the time from one to the next.
    """

    def token_ms(case: Case) -> float:
        arrivals = Arrivals()
        pair.run(case, prompt, stores, 1 + num_tokens, arrivals)
        return median(arrivals.token_ms)

    ours = _default_case(stores)
    turns = take_turns({case: partial(token_ms, case) for case in (_STOCK, ours)}, repeats, pair.device, say)
    stock, blended = ([turn.result for turn in own] for own in turns.values())
    return {
        "tokens": len(prompt),
        "decoded_tokens": num_tokens,
        **_about(ours),
        "stock_tokens_per_s": 1000 / median(stock),
        "blended_tokens_per_s": 1000 / median(blended),
        **with_range("blended_over_stock", [one / other for one, other in zip(stock, blended)]),
    }


def throughput(
    pair: Pair, pool: Sequence[Prompt], prompts: Sequence[Prompt], stores: Stores, repeats: int, say: Say
) -> Row:
    """Prompts per second, one token each, prompt by prompt in turns, over a warm store.

    Args:
        pool, prompts: of `PromptMaker.stream`.
    """
    ours, count = _default_case(stores), len(prompts)
    _store_all(pair, pool, stores, (ours, _STOCK))

    def answer_next(case: Case, left: Iterator[Prompt]) -> None:
        pair.run(case, next(left), stores)

    calls = {case: partial(answer_next, case, iter(prompts)) for case in (_STOCK, ours)}
    turns = take_turns(calls, count, pair.device, say, warm_up=0)
    stock_ms, blended_ms = (sum(turn.ms for turn in own) for own in turns.values())
    return {
        "tokens": len(pool[0]),
        "prompts": count,
        "chunks_per_prompt": len(pool[0].chunk_spans),
        "chunks_in_pool": sum(len(prompt.chunk_spans) for prompt in pool),
        **_about(ours),
        "stock_prompts_per_s": 1000 * count / stock_ms,
        "blended_prompts_per_s": 1000 * count / blended_ms,
        "blended_over_stock": stock_ms / blended_ms,
    }


def batching(
    pair: Pair, pool: Sequence[Prompt], prompts: Sequence[Prompt], stores: Stores, repeats: int, say: Say
) -> Row:
    """Milliseconds to the first tokens of several prompts, one by one and in one batch; arguments as `throughput`."""

    def one_by_one(case: Case) -> None:
        for prompt in prompts:
            pair.run(case, prompt, stores)

    def in_a_batch(case: Case) -> None:
        pair.run_batch(case, prompts, stores)

    ours = _default_case(stores)
    _store_all(pair, [*pool, prompts[0]], stores, (ours,))
    calls = {
        f"{name}_{way}_ms": partial(run, case)
        for name, case in (("stock", _STOCK), ("blended", ours))
        for way, run in (("single", one_by_one), ("batch", in_a_batch))
    }
    ms = {name: [turn.ms for turn in own] for name, own in take_turns(calls, repeats, pair.device, say).items()}
    return {
        "tokens": len(pool[0]),
        "prompts": len(prompts),
        **_about(ours),
        **{name: median(own) for name, own in ms.items()},
        **with_range("single_over_batch", [a / b for a, b in zip(ms["blended_single_ms"], ms["blended_batch_ms"])]),
    }


def _default_case(stores: Stores) -> Case:
    """hfblend's default settings, with chunks in the first place."""
    config = BlendConfig()
    return Case(METHODS[str(config.selection)], config.fixed_ratios[0], next(iter(stores)))


def _about(case: Case) -> dict[str, Any]:
    return {"method": case.method.name, "ratio": case.ratio}


def _store_all(pair: Pair, prompts: Sequence[Prompt], stores: Stores, cases: Sequence[Case]) -> None:
    """Stores the chunks of the prompts, and runs the last one again, which finds them."""
    for prompt in (*prompts, prompts[-1]):
        for case in cases:
            pair.run(case, prompt, stores)
