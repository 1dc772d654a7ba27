"""`hfblend eval`: closeness to full prefill, measured on questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..trace.progress import told
from .common import Outputs, console, load, names, numbers, wake
from .completion import METHODS, QUESTIONS, values
from .options import Correction, Device, DType, JsonFile, KVDType, Markdown, Methods, Model


def evaluate(
    data: Annotated[
        str,
        Option(
            help="File of questions, or a name: musique, hotpotqa, variable_tracking, …",
            autocompletion=values(QUESTIONS),
        ),
    ],
    n: Annotated[int, Option(help="How many questions.", min=1)] = 40,
    skip: Annotated[int, Option(help="Leave out the first questions.", min=0)] = 0,
    methods: Methods = "full_prefill,full_reuse,kv_deviation,hfblend",
    ratios: Annotated[str, Option(help="Recompute ratios, separated by commas.")] = "0.05,0.15,0.3",
    correction: Correction = None,
    max_context: Annotated[int, Option(help="Tokens of the longest prompt; of every generated one.", min=1)] = 6500,
    answer_tokens: Annotated[int, Option(help="Of greedy answers, for their scores; 0 measures none.", min=0)] = 32,
    baseline: Annotated[
        str | None,
        Option(
            help="Method that KL is compared with.",
            show_default="kv_deviation if measured",
            autocompletion=values(METHODS),
        ),
    ] = None,
    seed: Annotated[int, Option(help="Of the bootstrap, of methods that draw and of generated questions.")] = 0,
    kv_dtype: KVDType = None,
    model: Model = None,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, Option(help="Draw KL against cost into this file (.png).")] = None,
    records: Annotated[
        Path | None, Option(help="Keep every measurement here; those already there are not repeated.")
    ] = None,
) -> None:
    """Measure methods on questions: closeness to full prefill, answers, time to first token.

    Example: hfblend eval --data musique --n 20 --plot quality.png

    Example: hfblend eval --data variable_tracking --max-context 4096 --answer-tokens 64

    Example: hfblend eval --data questions.json --methods full_reuse,kv_deviation,hfblend --ratios 0.1,0.2
    """
    wake()
    from ..lab.eval.data import SUMMARIES, is_generated
    from ..lab.eval.data import load as load_questions
    from ..lab.eval.metrics import require_rouge
    from ..lab.eval.runner import run
    from ..lab.eval.tasks import generate
    from ..lab.report import table
    from ..lab.settings import EvalSettings

    outputs = Outputs(json_file, markdown, plot, records)
    settings = EvalSettings(
        methods=tuple(names(methods)),
        ratios=tuple(numbers(ratios, float, "--ratios")),
        seed=seed,
        correction=correction,
        max_context=max_context,
        answer_tokens=answer_tokens,
        kv_dtype=kv_dtype,
        baseline=baseline,
    )
    examples = [] if is_generated(data) else load_questions(data)
    questions = range(skip, skip + n) if is_generated(data) else range(len(examples))[skip : skip + n]
    if not questions:
        raise ValueError(f"No question is left: {data} has {len(examples)}, {skip} are skipped, {n} wanted.")
    if answer_tokens and any(example.task in SUMMARIES for example in examples[skip : skip + n]):
        require_rouge()
    loaded, tokenizer, name = load(model, device, dtype)
    if is_generated(data):  # and one more, of which a passage is the text unrelated to the last question
        examples = generate(data, questions.stop + 1, tokenizer, max_context, seed)
    with told("Measuring", total=len(questions) * len(settings.cases())) as line:
        results = run(
            loaded, name, settings, data, examples, questions,
            tokenizer=tokenizer, records=records, advance=line.advance,
        )  # fmt: skip
    console.print(table(results), markup=False, highlight=False, soft_wrap=True)
    outputs.write(results)
