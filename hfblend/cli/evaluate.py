"""`hfblend eval`: closeness to full prefill, measured on questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .common import Device, DType, JsonFile, KVDType, Markdown, Model, console, dtype_of, in_words, names, numbers
from .progress import progress_bar


def evaluate(
    data: Annotated[str, typer.Option(help="File of questions, or a name: musique, 2wikimqa, hotpotqa, samsum, …")],
    n: Annotated[int, typer.Option(help="How many questions.", min=1)] = 40,
    skip: Annotated[int, typer.Option(help="Leave out the first questions.", min=0)] = 0,
    methods: Annotated[
        str, typer.Option(help="Names, separated by commas.")
    ] = "full_prefill,full_reuse,kv_deviation,hfblend",
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
        Path | None, typer.Option(help="Keep every measurement here; those already there are not repeated.")
    ] = None,
) -> None:
    """Measure methods on questions: closeness to full prefill, answers, time to first token.

    Example: hfblend eval --data musique --n 20 --plot quality.png

    Example: hfblend eval --data questions.json --methods full_reuse,kv_deviation,hfblend --ratios 0.1,0.2
    """
    from ..demo import model as demo_model
    from ..lab.eval.data import QA, load
    from ..lab.eval.metrics import require_rouge
    from ..lab.eval.runner import run
    from ..lab.report import table
    from ..lab.settings import EvalSettings
    from .results import Outputs

    with in_words():
        outputs = Outputs(json_file, markdown, plot, records)
        outputs.check()
        settings = EvalSettings(
            methods=tuple(names(methods)),
            ratios=tuple(numbers(ratios, float, "--ratios")),
            seed=seed,
            max_context=max_context,
            answer_tokens=answer_tokens,
            kv_dtype=kv_dtype,
            baseline=baseline,
        )
        examples = load(data)
        questions = range(len(examples))[skip : skip + n]
        if not questions:
            raise ValueError(f"No question is left: {data} has {len(examples)}, {skip} are skipped, {n} wanted.")
        if answer_tokens and any(examples[i].task != QA for i in questions):
            require_rouge()
        loaded, tokenizer = demo_model.load(model, device, dtype_of(dtype))
        with progress_bar(Console(stderr=True)) as bar:
            task = bar.add_task("Measuring", total=len(questions) * len(settings.cases()))
            results = run(
                loaded, model or demo_model.HUB_NAME, settings, data, examples, questions,
                tokenizer=tokenizer, records=records, advance=lambda: bar.advance(task),
            )  # fmt: skip
        console.print(table(results), markup=False, highlight=False, soft_wrap=True)
        outputs.write(results)
