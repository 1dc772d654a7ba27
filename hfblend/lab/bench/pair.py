"""One set of weights under two instances, one stock and one patched, and the calls that a benchmark times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch

import hfblend

from ...prompts.prompt import Prompt
from ...store import DiskStore, MemoryStore, Store
from ...trace.trace import BlendTrace
from .prompts import PromptMaker
from .settings import Case
from .shapes import twin_of

STORE_BYTES = 2**50  # no chunk ever leaves its store
_ELSEWHERE_TOKENS = 128  # of the passage behind which methods that reuse another request's KV find theirs

Stores = Mapping[str, Store]  # place -> store


@contextmanager
def empty_stores(places: tuple[str, ...]) -> Iterator[Stores]:
    """A store per place, gone with what it holds afterwards; files stand in the system's folder for temporary ones."""
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
        """Milliseconds from each new token to the next; the prompt and what came before the first do not count."""
        arrived = self._times[1:]
        return [1000 * (after - before) for before, after in pairwise(arrived)]


class Pair:
    """A stock model and, over the same weights, a patched one; `with` ends the patch.

    Args:
        model: a causal LM in eval mode, not patched; it is the one that gets patched.
        tokenizer: for methods that need a filler.

    Raises:
        hfblend.UnsupportedModel: the model cannot be blended.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.stock, self.model, self.device = twin_of(model), model, model.device
        self._tokenizer = tokenizer
        self._blender = hfblend.patch(model, tokenizer=tokenizer)
        self._elsewhere = PromptMaker(model.config.vocab_size, seed=1).ids(_ELSEWHERE_TOKENS)

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blender.remove()

    def run(
        self, case: Case, prompt: Prompt, stores: Stores, num_tokens: int = 1, streamer: Arrivals | None = None
    ) -> BlendTrace | None:
        """Generates exactly `num_tokens` tokens greedily; the trace of what was blended, `None` for a stock call.

        Raises:
            RuntimeError: the call was not blended.
        """
        if not case.through_generate:
            return self._run_blend(case, prompt, stores)
        return self._generate(case, prompt.inputs(self.device), stores, num_tokens, streamer)

    def run_batch(self, case: Case, prompts: Sequence[Prompt], stores: Stores) -> None:
        """One new token for each of several prompts, in one call of `generate`."""
        self._generate(case, Prompt.batch(prompts, pad_token_id=0, device=self.device), stores, 1, None)

    def _generate(
        self, case: Case, inputs: dict[str, Any], stores: Stores, num_tokens: int, streamer: Arrivals | None
    ) -> BlendTrace | None:
        settings = {"do_sample": False, "min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        if case.method.whole:
            del inputs["chunk_spans"]
            self.stock.generate(**inputs, **settings, streamer=streamer)
            return None
        config = case.method.config(case.ratio)
        if case.method.uses_filler:
            config = replace(config, chunk_prefix="filler")
        config = replace(config, layerwise=case.chunks_in != "disk_whole")
        self._blender.store = self._store(case, stores)
        self.model.generate(**inputs, **settings, blend_config=config, streamer=streamer)
        trace = self._blender.trace
        if not trace.blended:
            raise RuntimeError(f"{case.method.name} was {trace}.")
        return trace

    def _run_blend(self, case: Case, prompt: Prompt, stores: Stores) -> BlendTrace:
        """The same up to the first token, for what `generate` has no setting for."""
        result = case.method.blend(
            self.model,
            prompt,
            case.ratio,
            self._store(case, stores),
            tokenizer=self._tokenizer,
            elsewhere=self._elsewhere,
        )
        result.logits.argmax(-1).item()
        return result.trace

    @staticmethod
    def _store(case: Case, stores: Stores) -> Store:
        return next(iter(stores.values())) if case.chunks_in is None else stores[case.chunks_in]
