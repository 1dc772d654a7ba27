"""What `hfblend eval` does: load, measure, sum up, write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ... import __version__
from ...measure.divergence import describe_machine
from ...util import require_folders_of
from .data import QA, Example, digest, load
from .metrics import require_rouge
from .records import Record, RecordFile
from .report import markdown_table, plot, require_matplotlib
from .runner import Row, Runner, Settings, methods_named, rows_of
from .summary import summarize

if TYPE_CHECKING:
    from ..baselines import Method

DEFAULT_BASELINE = "kv_deviation"


@dataclass(frozen=True)
class Evaluation:
    """What is asked for; checked before any model is loaded.

    Attributes:
        source: the data, a file or a name.
        questions: indices into `examples`.
        baseline: the method that KL is divided by; `None`: none.
    """

    source: str
    examples: Sequence[Example]
    questions: range
    rows: Sequence[Row]
    baseline: str | None
    settings: Settings


@dataclass(frozen=True)
class Outputs:
    """Files to write; `None`: not this one."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    records: Path | None = None

    def check(self) -> None:
        """Raises `ValueError` for a folder that does not exist, `ImportError` for a missing package."""
        require_folders_of(self.json, self.markdown, self.plot, self.records)
        if self.plot is not None:
            require_matplotlib()


def prepare(
    source: str,
    count: int,
    skip: int,
    names: Sequence[str],
    ratios: Sequence[float],
    baseline: str | None,
    settings: Settings,
    methods: Mapping[str, Method],
) -> Evaluation:
    """Reads the data and checks every option.

    Raises:
        ValueError: unknown methods or data, ratios outside [0, 1], a baseline not measured, no question left.
        ImportError: a package that the data needs is missing.
    """
    chosen = methods_named(names, methods)
    outside = [ratio for ratio in ratios if not 0 <= ratio <= 1]
    if outside or not ratios:
        raise ValueError(f"Ratios are shares in [0, 1], got {outside or 'none'}.")
    measured = [method.name for method in chosen]
    if baseline is not None and baseline not in measured:
        raise ValueError(f"The baseline {baseline!r} is not among the methods to evaluate: {', '.join(measured)}.")
    if baseline is None and DEFAULT_BASELINE in measured:
        baseline = DEFAULT_BASELINE
    examples = load(source)
    questions = range(len(examples))[skip : skip + count]
    if not questions:
        raise ValueError(f"No question is left: {source} has {len(examples)}, {skip} are skipped, {count} wanted.")
    if settings.answer_tokens and any(examples[i].task != QA for i in questions):
        require_rouge()
    return Evaluation(source, examples, questions, rows_of(chosen, ratios), baseline, settings)


def evaluate(
    evaluation: Evaluation, model: Any, tokenizer: Any, model_name: str, outputs: Outputs, console: Console
) -> dict[str, Any]:
    """Measures what is missing, shows the table, writes the files.

    Returns:
        What the JSON file holds: `rows`, and what they are of.

    Raises:
        ValueError: a records file of another run, or a prompt too long.
    """
    meta = _meta(evaluation, model, model_name)
    records = _measure(evaluation, model, tokenizer, RecordFile(outputs.records, meta))
    rows = summarize(records, evaluation.baseline, evaluation.settings.seed)
    table = markdown_table(rows)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    lengths = [record.tokens for record in records]
    results = meta | {
        "questions": [evaluation.questions.start, evaluation.questions.stop],
        "tokens": [min(lengths), max(lengths)],
        "baseline": evaluation.baseline,
        "rows": rows,
    }
    _write(results, table, outputs)
    return results


def _meta(evaluation: Evaluation, model: Any, model_name: str) -> dict[str, Any]:
    """What every figure of a run depends on: a records file is of one such."""
    return {
        "machine": describe_machine(model.device),
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": {"source": Path(evaluation.source).name, "digest": digest(evaluation.examples)},
        "settings": asdict(evaluation.settings),
        "hfblend": __version__,
    }


def _measure(evaluation: Evaluation, model: Any, tokenizer: Any, records: RecordFile) -> list[Record]:
    stderr = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=stderr, transient=True, disable=not stderr.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("Measuring", total=len(evaluation.questions) * len(evaluation.rows))
        advance = partial(bar.advance, task)
        runner = Runner(model, tokenizer, evaluation.examples, evaluation.settings, records, advance)
        return runner.run(evaluation.questions, evaluation.rows)


def _write(results: dict[str, Any], table: str, outputs: Outputs) -> None:
    data = results["data"]["source"]
    count = results["questions"][1] - results["questions"][0]
    kv_dtype = results["settings"]["kv_dtype"]
    kv = "" if kv_dtype is None else f", chunk KV in {kv_dtype}"
    title = f"{results['model']}, {results['dtype']}{kv}, {count} questions of {data}\n{results['machine']}"
    if outputs.json is not None:
        outputs.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if outputs.markdown is not None:
        outputs.markdown.write_text(f"{title}\n\n{table}", encoding="utf-8")
    if outputs.plot is not None:
        plot(results["rows"], outputs.plot, title)
