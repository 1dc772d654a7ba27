"""A whole benchmark: every length, and for each of them the table, loading, decoding, throughput and batches.

In the last three, stock full prefill and hfblend's default settings take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any, cast

import torch

from ... import __version__
from ...blend.algorithm import Blend
from ...config import BlendConfig
from ...generate.blending import Blending
from ...prompts.prompt import Prompt
from ...store import DiskStore, Store
from ...store.keys import file_name_of
from ...support.registry import model_of
from ..baselines import METHODS
from ..clock import Peaks, Say, Turn, free_memory, if_memory_lasts, take_turns
from ..report import Results, Row, header_of, with_range
from ..settings import BenchSettings, Case
from ..synthetic import PromptMaker
from .flops import Shape
from .pair import Arrivals, Pair, Stores, empty_stores
from .ttft import OUT_OF_MEMORY, rows_of

PARTS = ("rows", "loading", "decoding", "throughput", "batching")
WARM_UP_TURNS = 2  # the first stores the chunks, the second is the first that finds them
_STOCK = Case(METHODS["full_prefill"], 1.0)
_BUFFER_BYTES = 4 * 2**20  # of a plain read


def run(
    model: Any,
    name: str,
    settings: BenchSettings | None = None,
    *,
    tokenizer: Any = None,
    save: Callable[[Results], None] = lambda results: None,
    say: Say = lambda what: None,
) -> Results:
    """Measures a model, patched meanwhile: the content of the JSON file, the lists of `PARTS` and a header.

    >>> results = run(random_model("tiny"), "tiny", BenchSettings(lengths=(2000,)))  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, on one device.
        name: of the model, for the report.
        tokenizer: for methods that need a filler.
        save: called with the results so far after each length, so that an interrupted run leaves them.
        say: called with the name of the measurement that begins.

    Raises:
        hfblend.UnsupportedModel: the model cannot be blended.
        ValueError: a method that needs a tokenizer, without one; chunks on a GPU, without one.
    """
    settings = (settings or BenchSettings()).on(model.device)
    say("the machine's peak rates")
    peaks, shape = Peaks.measure(model.device, model.dtype), Shape.of(model)
    results = header_of(model, name, asdict(settings)) | {
        "hfblend": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "shape": None if shape is None else asdict(shape),
        "attention": model.config._attn_implementation,
        "peaks": asdict(peaks),
        **{part: [] for part in PARTS},
    }
    with Pair(model, tokenizer) as pair:
        for length in settings.lengths:
            found = _measure_length(pair, length, settings, peaks, shape, say)
            for part, more in found.items():
                results[part] += more
            free_memory()
            save(results)
    return results


def _measure_length(
    pair: Pair, length: int, settings: BenchSettings, peaks: Peaks, shape: Shape | None, say: Say
) -> dict[str, list[Row]]:
    """All parts of one length, with its own stores."""
    maker, repeats = PromptMaker(pair.model.config.vocab_size, settings.layout, settings.seed), settings.repeats
    prompt = maker.prompt(length)

    def saying(part: str) -> Say:
        return lambda what: say(f"{len(prompt)} tokens, {part}: {what}")

    def of_stream(measure: Callable[..., Row], count: int, say: Say) -> Row:
        pool, prompts = maker.stream(length, count)
        return measure(pair, pool, prompts, stores, repeats, say)

    with empty_stores(settings.chunks_in) as stores:
        turns = ttft_turns(pair, prompt, stores, settings.cases(), repeats, saying("first token"))
        loads = if_memory_lasts(lambda: list(loading(pair, prompt, stores, repeats, saying("loading")))) or []
        found = {"rows": rows_of(turns, prompt, shape, pair.model.dtype.itemsize, peaks, loads), "loading": loads}
        extras: dict[str, tuple[int, Callable[[int, Say], Row]]] = {
            "decoding": (settings.decoded_tokens, lambda n, say: decoding(pair, prompt, stores, n, repeats, say)),
            "throughput": (settings.throughput_prompts, partial(of_stream, throughput)),
            "batching": (settings.batch_prompts, partial(of_stream, batching)),
        }
        for part, (count, measure) in extras.items():
            failed = {"tokens": len(prompt), "failed": OUT_OF_MEMORY}
            once = partial(measure, count, saying(part))
            found[part] = [if_memory_lasts(once) or failed] if count else []
    return found


# --- the first token of one prompt ------------------------------------------------------------------------------------


def ttft_turns(
    pair: Pair, prompt: Prompt, stores: Stores, cases: Sequence[Case], repeats: int, say: Say
) -> dict[Case, list[Turn]]:
    """The turns of every case, whose results are traces; none of a case that memory did not last for."""
    calls = {case: partial(pair.run, case, prompt, stores) for case in cases}
    return take_turns(calls, repeats, pair.device, say, warm_up=WARM_UP_TURNS, drop_failed=True)


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
    return Case(METHODS["hfblend"], BlendConfig().fixed_ratios[0], next(iter(stores)))


def _about(case: Case) -> dict[str, Any]:
    return {"method": case.method.name, "ratio": case.ratio}


def _store_all(pair: Pair, prompts: Sequence[Prompt], stores: Stores, cases: Sequence[Case]) -> None:
    """Stores the chunks of the prompts, and runs the last one again, which finds them."""
    for prompt in (*prompts, prompts[-1]):
        for case in cases:
            pair.run(case, prompt, stores)
