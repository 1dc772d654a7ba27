"""`hfblend eval`: closeness to full prefill, measured on questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo import model as demo_model
from ..lab.baselines import METHODS
from ..lab.eval import command
from ..lab.eval.runner import Settings
from .common import Device, DType, JsonFile, KVDType, Markdown, Model, console, dtype_of, in_words, names, numbers

_EVALUATED = "full_prefill,full_reuse,kv_deviation,hfblend"


def evaluate(
    data: Annotated[str, typer.Option(help="File of questions, or a name: musique, 2wikimqa, hotpotqa, samsum, …")],
    n: Annotated[int, typer.Option(help="How many questions.", min=1)] = 40,
    skip: Annotated[int, typer.Option(help="Leave out the first questions.", min=0)] = 0,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = _EVALUATED,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.15,0.3",
    max_context: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=1)] = 6500,
    answer_tokens: Annotated[int, typer.Option(help="Of greedy answers, for F1; 0 measures none.", min=0)] = 32,
    baseline: Annotated[
        str | None, typer.Option(help="Method that KL is compared with.", show_default="kv_deviation if measured")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of methods that draw.")] = 0,
    kv_dtype: KVDType = None,
    model: Model = None,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against cost into this file (.png).")] = None,
    records: Annotated[
        Path | None, typer.Option(help="Keep every measurement here; what is there is not measured again.")
    ] = None,
) -> None:
    """Measure methods on questions: closeness to full prefill, answers, time to first token.

    Example: hfblend eval --data musique --n 20 --plot quality.png

    Example: hfblend eval --data questions.json --methods full_reuse,kv_deviation,hfblend --ratios 0.1,0.2
    """
    with in_words():
        outputs = command.Outputs(json_file, markdown, plot, records)
        outputs.check()
        settings = Settings(max_context, answer_tokens, seed, kv_dtype=kv_dtype)
        ratio_values = numbers(ratios, float, "--ratios")
        asked = command.prepare(data, n, skip, names(methods), ratio_values, baseline, settings, METHODS)
        loaded, tokenizer = demo_model.load(model, device, dtype_of(dtype))
        command.evaluate(asked, loaded, tokenizer, model or demo_model.HUB_NAME, outputs, console)
