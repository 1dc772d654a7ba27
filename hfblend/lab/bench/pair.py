"""One set of weights under two instances, one stock and one patched, and the calls that a benchmark times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...patching import patch
from ...prompts.prompt import Prompt
from ...store import DiskStore, MemoryStore, Store
from ...trace.trace import BlendTrace
from ..settings import STORE_BYTES, Case
from ..synthetic import PromptMaker, twin_of

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


class Pair(AbstractContextManager["Pair"]):
    """A stock model and, over the same weights, a patched one; `with` ends the patch.

    Args:
        model: a causal LM in eval mode, not patched; it is the one that gets patched.
        tokenizer: for methods that need a filler.

    Raises:
        UnsupportedModel: the model cannot be blended.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.stock, self.model, self.device = twin_of(model), model, model.device
        self._tokenizer = tokenizer
        self._blender = patch(model, tokenizer=tokenizer)
        self._elsewhere = PromptMaker(model.config.vocab_size, seed=1).ids(_ELSEWHERE_TOKENS)

    def __exit__(self, *error: object) -> None:
        self._blender.remove()

    def run(
        self, case: Case, prompt: Prompt, stores: Stores, num_tokens: int = 1, streamer: Arrivals | None = None
    ) -> BlendTrace | None:
        """Generates exactly `num_tokens` tokens greedily, or the first one where `generate` cannot.

        Returns:
            The trace; `None` of a stock call.

        Raises:
            RuntimeError: the call was not blended.
        """
        if case.through_generate:
            return self._generate(case, prompt.inputs(self.device), stores, num_tokens, streamer)
        about = {"tokenizer": self._tokenizer, "elsewhere": self._elsewhere}
        result = case.method.blend(self.model, prompt, case.ratio, _store_of(case, stores), **about)
        result.logits.argmax(-1).item()
        return result.trace

    def run_batch(self, case: Case, prompts: Sequence[Prompt], stores: Stores) -> None:
        """Generates one token for each of several prompts, in one call."""
        self._generate(case, Prompt.batch(prompts, pad_token_id=0, device=self.device), stores, 1, None)

    def _generate(
        self, case: Case, inputs: dict[str, Any], stores: Stores, num_tokens: int, streamer: Arrivals | None
    ) -> BlendTrace | None:
        options = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "streamer": streamer}
        if case.method.whole:
            del inputs["chunk_spans"]
            self.stock.generate(**inputs, **options)
            return None
        config = replace(case.method.config(case.ratio), layerwise=case.chunks_in != "disk_whole")
        self._blender.store = _store_of(case, stores)
        self.model.generate(**inputs, **options, blend_config=config)
        trace = self._blender.trace
        if not trace.blended:
            raise RuntimeError(f"{case.method.name} was {trace}.")
        return trace


def _store_of(case: Case, stores: Stores) -> Store:
    return next(iter(stores.values())) if case.chunks_in is None else stores[case.chunks_in]
