"""A whole benchmark: start-up costs, then for every length the table, loading, decoding, a stream and batches.

In the last three, stock full prefill and hfblend's default settings take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from ... import __version__
from ...patching import patch
from ...prompts.prompt import Prompt
from ..baselines import Case
from ..clock import Peaks, Say, Turn, free_memory, if_memory_lasts, take_turns, timed
from ..report import Results, Row, header_of
from ..settings import BenchSettings
from ..synthetic import PromptMaker, twin_of
from .answers import decoding
from .batching import batching
from .flops import Shape
from .loading import loading
from .pair import Pair, Stores, empty_stores
from .start_up import start_up
from .stream import throughput
from .ttft import OUT_OF_MEMORY, rows_of

PARTS = ("start_up", "rows", "loading", "decoding", "throughput", "batching")
WARM_UP_TURNS = 2  # the first stores the chunks, the second is the first that finds them


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
        ValueError: a method that needs a tokenizer, without one; chunks on a GPU, without one; an attention that is not
            installed.
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
    with paired(model, tokenizer, settings.attention) as pair:
        results["start_up"].append(_measure_start_up(pair, settings, say))
        for length in settings.lengths:
            found = _measure_length(pair, length, settings, peaks, shape, say)
            for part, more in found.items():
                results[part] += more
            free_memory()
            save(results)
    return results


@contextmanager
def paired(model: Any, tokenizer: Any = None, attention: str | None = None) -> Iterator[Pair]:
    """A model, patched meanwhile, and its stock twins. Errors as those of `run`.

    Args:
        attention: of a second twin, by Transformers' name.
    """
    stocks: dict[str | None, Any] = {None: twin_of(model)}
    if attention is not None:
        stocks[attention] = _with_attention(twin_of(model), attention)
    _generate_a_little(stocks[None])  # loads the libraries that any model needs
    patch_ms, _, blender = timed(lambda: patch(model, tokenizer=tokenizer), model.device)
    with blender:
        yield Pair(blender, stocks, patch_ms)


def _with_attention(model: Any, name: str) -> Any:
    """The model with another attention of Transformers, which has run once."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
        _generate_a_little(model)
    except Exception as error:  # each has its own, for what is not installed and for what this device cannot do
        raise ValueError(f"Attention {name!r} cannot be measured here: {error}") from error
    if model.config._attn_implementation == before:
        raise ValueError(f"{type(model).__name__} runs with {before!r}, and {name!r} is no other attention for it.")
    return model


def _generate_a_little(model: Any) -> None:
    model.generate(torch.tensor([[1, 2, 3]], device=model.device), max_new_tokens=2, do_sample=False)


def _measure_start_up(pair: Pair, settings: BenchSettings, say: Say) -> Row:
    """The costs of the first calls, at the first length; nothing else may have run before."""
    length, maker = settings.lengths[0], _maker(pair, settings)
    with empty_stores(settings.chunks_in[:1]) as stores:
        row = if_memory_lasts(lambda: start_up(pair, maker, length, stores, lambda what: say(f"start-up: {what}")))
    return row or {"tokens": length, "failed": OUT_OF_MEMORY}


def _maker(pair: Pair, settings: BenchSettings) -> PromptMaker:
    return PromptMaker(pair.model.config.vocab_size, settings.layout, settings.seed)


def _measure_length(
    pair: Pair, length: int, settings: BenchSettings, peaks: Peaks, shape: Shape | None, say: Say
) -> dict[str, list[Row]]:
    """All parts of one length, with its own stores."""
    maker, repeats = _maker(pair, settings), settings.repeats
    prompt = maker.prompt(length)
    answers = partial(decoding, pair, prompt, static=settings.static_cache)

    def saying(part: str) -> Say:
        return lambda what: say(f"{len(prompt)} tokens, {part}: {what}")

    def of_stream(count: int, say: Say) -> list[Row]:
        return throughput(pair, maker, length, count, settings.stream, settings.chunks_in[0], say)

    def of_batch(count: int, say: Say) -> list[Row]:
        return [batching(pair, *maker.batch(length, count), stores, repeats, say)]

    with empty_stores(settings.chunks_in) as stores:
        turns = ttft_turns(pair, prompt, stores, settings.cases(), repeats, saying("first token"))
        loads = if_memory_lasts(lambda: list(loading(pair, prompt, stores, repeats, saying("loading")))) or []
        found = {"rows": rows_of(turns, prompt, shape, pair.model.dtype.itemsize, peaks, loads), "loading": loads}
        extras: dict[str, tuple[int, tuple[int, ...], Callable[[int, Say], list[Row]]]] = {
            "decoding": (
                settings.decoded_tokens, settings.decode_at, lambda n, say: [answers(stores, n, repeats, say)]
            ),
            "throughput": (settings.throughput_prompts, (), of_stream),
            "batching": (settings.batch_prompts, settings.batch_at, of_batch),
        }  # fmt: skip
        for part, (count, lengths, measure) in extras.items():
            failed = {"tokens": len(prompt), "failed": OUT_OF_MEMORY}
            once = partial(measure, count, saying(part))
            found[part] = (if_memory_lasts(once) or [failed]) if count and length in (lengths or (length,)) else []
    return found


def ttft_turns(
    pair: Pair, prompt: Prompt, stores: Stores, cases: Sequence[Case], repeats: int, say: Say
) -> dict[Case, list[Turn]]:
    """The turns of every case, whose results are traces; none of a case that memory did not last for."""
    calls = {case: partial(pair.run, case, prompt, stores) for case in cases}
    return take_turns(calls, repeats, pair.device, say, warm_up=WARM_UP_TURNS, drop_failed=True)
