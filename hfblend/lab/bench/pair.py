"""One set of weights under a stock instance and a patched one, and the calls that a benchmark times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...config import BlendConfig
from ...prompts.prompt import Prompt
from ...store import DiskStore, MemoryStore, Store
from ...trace.trace import BlendTrace
from ..baselines import METHODS, STORE_BYTES, Case
from ..synthetic import PromptMaker

STOCK = Case(METHODS["full_prefill"], 1.0)
_ELSEWHERE_TOKENS = 128  # of another request's passage, for methods that take chunk KV from one

Stores = Mapping[str, Store]  # place -> store


@contextmanager
def empty_stores(places: Sequence[str]) -> Iterator[Stores]:
    """A store per place, deleted afterwards; files lie in the system's folder for temporary ones."""
    with TemporaryDirectory(prefix="hfblend-bench-") as folder:
        on_disk = DiskStore(folder, STORE_BYTES)
        stores = {"gpu": MemoryStore(STORE_BYTES), "ram": MemoryStore(STORE_BYTES, "cpu")}
        yield {place: stores.get(place, on_disk) for place in places}


class Arrivals:
    """A streamer that notes when each new token comes: `generate` gives it the prompt first, then token by token."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with ids that are on the host by then."""
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` after the last token."""

    @property
    def token_ms(self) -> list[float]:
        """Milliseconds from each new token to the next, so that the prefill does not count."""
        return [1000 * (after - before) for before, after in pairwise(self._times[1:])]


class Pair:
    """A patched model and, over the same weights, stock ones.

    Args:
        blender: of the patched model; its tokenizer is for methods that need a filler.
        stocks: attention by Transformers' name -> the model; `None`: the patched model's own.
        patch_ms: that `patch` took.
    """

    def __init__(self, blender: Any, stocks: Mapping[str | None, Any], patch_ms: float) -> None:
        self._blender, self._stocks, self.patch_ms = blender, stocks, patch_ms
        self.model, self.stock = blender.model, stocks[None]
        self.device = self.model.device
        self._elsewhere = PromptMaker(self.model.config.vocab_size, seed=1).ids(_ELSEWHERE_TOKENS)

    def run(
        self,
        case: Case,
        prompt: Prompt,
        stores: Stores,
        num_tokens: int = 1,
        streamer: Arrivals | None = None,
        **options: Any,
    ) -> BlendTrace | None:
        """Generates exactly `num_tokens` tokens greedily, or the first one where `generate` cannot.

        Args:
            options: of `generate`, if it can.

        Returns:
            The trace; `None` of a stock call.

        Raises:
            RuntimeError: the call was not blended.
        """
        if case.through_generate:
            return self._generate(case, prompt.inputs(self.device), stores, num_tokens, streamer=streamer, **options)
        about = {"tokenizer": self._blender.tokenizer, "elsewhere": self._elsewhere}
        result = case.method.blend(self.model, prompt, case.ratio, _store_of(case, stores), **about)
        result.logits.argmax(-1).item()
        return result.trace

    def run_batch(self, case: Case, prompts: Sequence[Prompt], stores: Stores) -> None:
        """Generates one token for each of several prompts, in one call."""
        self._generate(case, Prompt.batch(prompts, pad_token_id=0, device=self.device), stores, 1)

    def _generate(
        self, case: Case, inputs: dict[str, Any], stores: Stores, num_tokens: int, **options: Any
    ) -> BlendTrace | None:
        options |= {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        if case.method.whole:
            del inputs["chunk_spans"]
            self._stocks[case.attention].generate(**inputs, **options)
            return None
        config = replace(case.method.config(case.ratio), layerwise=case.chunks_in != "disk_whole")
        self._blender.store = _store_of(case, stores)
        self.model.generate(**inputs, **options, blend_config=config)
        trace = self._blender.trace
        if not trace.blended:
            raise RuntimeError(f"{case.method.name} was {trace}.")
        return trace


def default_case(stores: Stores) -> Case:
    """hfblend's default settings, with chunks in the first place."""
    return Case(METHODS["hfblend"], BlendConfig().fixed_ratios[0], next(iter(stores)))


def about(case: Case) -> dict[str, Any]:
    """What a row says of its case."""
    return {"method": case.name, "ratio": case.ratio}


def _store_of(case: Case, stores: Stores) -> Store:
    return next(iter(stores.values())) if case.chunks_in is None else stores[case.chunks_in]
