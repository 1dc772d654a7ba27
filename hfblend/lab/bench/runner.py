"""A whole benchmark: every length, and for each of them the table, decoding, throughput and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import transformers

from ... import __version__
from ...measure.divergence import describe_machine
from .device import Peaks, free_memory, if_memory_lasts
from .flops import Shape
from .loading import loading
from .pair import Pair, empty_stores
from .prompts import PromptMaker
from .settings import Settings
from .streams import batching, decoding, throughput
from .ttft import OUT_OF_MEMORY, rows_of, take_turns

Results = dict[str, Any]


def run(
    model: Any,
    name: str,
    settings: Settings | None = None,
    *,
    tokenizer: Any = None,
    save: Callable[[Results], None] = lambda results: None,
    say: Callable[[str], None] = lambda what: None,
) -> Results:
    """Measures a model. It is patched meanwhile, and left as it was.

    >>> results = run(random_model("tiny"), "tiny", Settings(lengths=(2000,)))  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, on one device.
        name: of the model, for the report.
        tokenizer: for methods that need a filler.
        save: called with the results so far after each length, so that a run which is cut off leaves what it has.
        say: called with what is being measured.

    Returns:
        What the JSON file holds: `rows`, `decoding`, `throughput`, `batching`, and what they are of.

    Raises:
        hfblend.UnsupportedModel: the model cannot be blended.
        ValueError: a method that needs a tokenizer, without one; chunks on a GPU, without one.
    """
    settings = (Settings() if settings is None else settings).on(model.device)
    say("what the machine does at best")
    peaks = Peaks.measure(model.device, model.dtype)
    results = _header(model, name, settings, peaks)
    with Pair(model, tokenizer) as pair:
        for length in settings.lengths:
            found = _measure_length(pair, length, settings, peaks, Shape.of(model), say)
            for part, more in found.items():
                results[part] += more
            free_memory()
            save(results)
    return results


def _header(model: Any, name: str, settings: Settings, peaks: Peaks) -> Results:
    shape = Shape.of(model)
    asked = asdict(settings)
    return {
        "machine": describe_machine(model.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hfblend": __version__,
        "model": name,
        "shape": None if shape is None else asdict(shape),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "settings": {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()},
        "peaks": asdict(peaks),
        "rows": [],
        "loading": [],
        "decoding": [],
        "throughput": [],
        "batching": [],
    }


def _measure_length(
    pair: Pair, length: int, settings: Settings, peaks: Peaks, shape: Shape | None, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The rows of one length, with a store of its own."""
    maker = PromptMaker(pair.model.config.vocab_size, settings.layout, settings.seed)
    prompt = maker.prompt(length)
    with empty_stores(settings.chunks_in) as stores:
        turns = take_turns(pair, prompt, stores, settings.cases(), settings.repeats, say)
        loads = if_memory_lasts(partial(loading, pair, prompt, stores, settings.repeats, say)) or []
        found: dict[str, list[dict[str, Any]]] = {
            "rows": rows_of(turns, prompt, shape, pair.model.dtype.itemsize, peaks, loads),
            "loading": loads,
            "decoding": [],
            "throughput": [],
            "batching": [],
        }
        failed = {"tokens": len(prompt), "failed": OUT_OF_MEMORY}
        if settings.decoded_tokens:
            decode = partial(decoding, pair, prompt, stores, settings.decoded_tokens, settings.repeats, say)
            found["decoding"].append(if_memory_lasts(decode) or failed)
        if settings.throughput_prompts:
            stream = partial(throughput, pair, maker, stores, length, settings.throughput_prompts, say)
            found["throughput"].append(if_memory_lasts(stream) or failed)
        if settings.batch_prompts:
            batch = partial(batching, pair, maker, stores, length, settings.batch_prompts, settings.repeats, say)
            found["batching"].append(if_memory_lasts(batch) or failed)
    return found
