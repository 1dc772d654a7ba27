"""`hfblend bench`: speed, compared with a full prefill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from ..trace.progress import told
from .common import Outputs, console, dtype_of, load, names, numbers, wake
from .completion import PLACES, SHAPES, values
from .options import Correction, Device, DType, JsonFile, Markdown, Methods, Model

if TYPE_CHECKING:
    from ..lab.report import Results

Lengths = Annotated[str, Option(help="Of --tokens, those at which that is measured.", show_default="all")]

# columns of the Markdown table that a terminal has no room for
_NOT_SHOWN = frozenset({"tokens", "TFLOP", "roofline, ms", "reused, MB", "load, ms", "phases, ms"})


def bench(
    model: Model = None,
    shape: Annotated[
        str | None,
        Option(help="Random weights of this shape instead: llama-8b, tiny.", autocompletion=values(SHAPES)),
    ] = None,
    tokens: Annotated[
        str | None,
        Option(help="Tokens of a prompt's chunks, separated by commas.", show_default="4096 … 65536; 2000 on a CPU"),
    ] = None,
    ratios: Annotated[str, Option(help="Recompute ratios, separated by commas; 0 is full reuse.")] = (
        "0,0.05,0.15,0.3"
    ),
    methods: Methods = "prefix_reuse,suffix_attention,kv_deviation",
    correction: Correction = None,
    repeats: Annotated[int, Option(help="Turns that count.", min=1)] = 7,
    chunk: Annotated[int, Option(help="Tokens of a chunk.", min=1)] = 512,
    prefix: Annotated[int, Option(help="Tokens of the prefix.", min=0)] = 32,
    suffix: Annotated[int, Option(help="Tokens of the suffix.", min=1)] = 32,
    chunks_in: Annotated[
        str,
        Option(
            help="Where chunk KV is kept, with commas: gpu, ram, disk, disk_whole.",
            show_default="gpu if any",
            autocompletion=values(PLACES),
        ),
    ] = "",
    attention: Annotated[
        str | None, Option(help="One more full prefill, with this attention of Transformers, say flash_attention_4.")
    ] = None,
    decode: Annotated[int, Option(help="Tokens of whole answers; 0 measures none.", min=0)] = 64,
    decode_at: Lengths = "",
    static: Annotated[bool, Option("--static", help="Measure answers by stock with a static cache, too.")] = False,
    throughput: Annotated[int, Option(help="Prompts of a stream whose documents come and go; 0: none.", min=0)] = 0,
    batch: Annotated[int, Option(help="Prompts in one batch; 0 measures none.", min=0)] = 0,
    batch_at: Lengths = "",
    seed: Annotated[int, Option(help="Of the prompts.")] = 0,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, Option(help="Draw time and speed-up by tokens into this file (.png).")] = None,
) -> None:
    """Measure speed: time to first token by length, method and ratio, and how near each is to its limit.

    Example: hfblend bench --tokens 2000,6000 --ratios 0.05,0.15 --markdown table.md

    Example: hfblend bench --shape llama-8b --chunks-in gpu,ram,disk
    """
    wake()
    from ..lab.bench.runner import run
    from ..lab.settings import BenchSettings
    from ..lab.synthetic import Layout

    outputs = Outputs(json_file, markdown, plot)
    settings = BenchSettings(
        lengths=tuple(numbers(tokens or "", int, "--tokens")),
        ratios=tuple(numbers(ratios, float, "--ratios")),
        methods=tuple(names(methods)),
        correction=correction,
        repeats=repeats,
        layout=Layout(prefix, chunk, suffix),
        chunks_in=tuple(names(chunks_in)),
        attention=attention,
        decoded_tokens=decode,
        decode_at=tuple(numbers(decode_at, int, "--decode-at")),
        static_cache=static,
        throughput_prompts=throughput,
        batch_prompts=batch,
        batch_at=tuple(numbers(batch_at, int, "--batch-at")),
        seed=seed,
    )
    loaded, tokenizer, name = _load(model, shape, device, dtype)
    with told("Measuring") as line:
        say = lambda part: line.say(f"Measuring {part}")  # noqa: E731
        results = run(loaded, name, settings, tokenizer=tokenizer, save=outputs.write, say=say)
    _show(results)


def _load(model: str | None, shape: str | None, device: str | None, dtype: str | None) -> tuple[Any, Any, str]:
    """The model to measure, its tokenizer (`None`: random weights have none), its name. Refuses both ways at once."""
    from ..lab.synthetic import random_model

    if model is not None and shape is not None:
        raise ValueError(f"Give --model or --shape, not both; got {model!r} and {shape!r}.")
    if shape is not None:
        return random_model(shape, device, dtype_of(dtype)), None, f"{shape} shape, random weights"
    return load(model, device, dtype)


def _show(results: Results) -> None:
    from ..lab.report import notes, title

    console.print(title(results), markup=False, highlight=False)
    for tokens in dict.fromkeys(row["tokens"] for row in results["rows"]):
        console.print(_table_of(results, tokens))
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _table_of(results: Results, tokens: int) -> Table:
    """The rows of one length, with the columns that some row has a figure for; ranges of times are in the files."""
    from ..lab.report import cells

    rows = [cells(row) for row in results["rows"] if row["tokens"] == tokens]
    hidden = _NOT_SHOWN if len(results["settings"]["chunks_in"]) > 1 else _NOT_SHOWN | {"chunks in"}
    shown = [heading for heading in rows[0] if heading not in hidden and any(row[heading] for row in rows)]
    table = Table(title=f"Time to first token, {tokens:,} tokens, {results['settings']['repeats']} turns")
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        row["TTFT, ms"] = row["TTFT, ms"].partition(" (")[0]
        table.add_row(*(row[heading] for heading in shown))
    return table
