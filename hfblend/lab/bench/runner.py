"""A whole benchmark: every length, and for each of them the table, loading, decoding, throughput and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from ... import __version__
from ..clock import Peaks, Say, free_memory, if_memory_lasts
from ..report import Results, Row, header_of
from ..settings import BenchSettings
from ..synthetic import PromptMaker
from .flops import Shape
from .pair import Pair, empty_stores
from .streams import batching, decoding, loading, throughput
from .ttft import OUT_OF_MEMORY, rows_of, ttft_turns

PARTS = ("rows", "loading", "decoding", "throughput", "batching")


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
