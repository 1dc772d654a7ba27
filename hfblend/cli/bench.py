"""`hfblend bench`: speed, measured against a full prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..lab.bench import command
from ..lab.bench.prompts import Layout
from ..lab.bench.settings import Settings
from .common import Device, DType, JsonFile, Markdown, Model, console, dtype_of, in_words, names, numbers


def bench(
    model: Model = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead: llama-8b, tiny.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt's chunks, separated by commas.", show_default="4096 … 65536; 2000 on a CPU"
        ),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas; 0 is full reuse.")] = (
        "0,0.05,0.15,0.3"
    ),
    methods: Annotated[
        str, typer.Option(help="Names, separated by commas, to compare with full prefill.")
    ] = "prefix_reuse,suffix_attention,kv_deviation",
    repeats: Annotated[int, typer.Option(help="Turns that count.", min=1)] = 7,
    chunk: Annotated[int, typer.Option(help="Tokens of a chunk.", min=1)] = 512,
    prefix: Annotated[int, typer.Option(help="Tokens of the prefix.", min=0)] = 32,
    suffix: Annotated[int, typer.Option(help="Tokens of the suffix.", min=1)] = 32,
    chunks_in: Annotated[
        str,
        typer.Option(
            help="Where chunk KV is kept, separated by commas: gpu, ram, disk, disk_whole.", show_default="gpu if any"
        ),
    ] = "",
    decode: Annotated[int, typer.Option(help="Tokens to decode, for their speed; 0 measures none.", min=0)] = 64,
    throughput: Annotated[
        int, typer.Option(help="Prompts of a stream that shares chunks; 0 measures none.", min=0)
    ] = 0,
    batch: Annotated[
        int, typer.Option(help="Prompts in one batch, against the same one by one; 0 measures none.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and speed-up by tokens into this file (.png).")] = None,
) -> None:
    """Measure speed: time to first token by length, method and ratio, and how near each is to its limit.

    Example: hfblend bench --tokens 2000,6000 --ratios 0.05,0.15 --markdown table.md

    Example: hfblend bench --shape llama-8b --chunks-in gpu,ram,disk
    """
    with in_words():
        outputs = command.Outputs(json_file, markdown, plot)
        outputs.check()
        settings = Settings(
            lengths=tuple(numbers(tokens or "", int, "--tokens")),
            ratios=tuple(numbers(ratios, float, "--ratios")),
            methods=tuple(names(methods)),
            repeats=repeats,
            layout=Layout(prefix, chunk, suffix),
            chunks_in=tuple(names(chunks_in)),
            decoded_tokens=decode,
            throughput_prompts=throughput,
            batch_prompts=batch,
            seed=seed,
        )
        loaded, tokenizer, name = command.load(model, shape, device, dtype_of(dtype))
        command.bench(loaded, name, settings, outputs, console, tokenizer)
