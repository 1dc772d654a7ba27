"""What `hfblend bench` does: make or load a model, measure, show, write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...demo import model as demo_model
from ...util import require_folders_of
from .report import cells, footnotes, markdown, plot, require_matplotlib, title
from .runner import Results, run
from .settings import Settings
from .shapes import random_model

# columns of the Markdown table that a terminal has no room for
_NOT_SHOWN = frozenset({"tokens", "TFLOP", "roofline, ms", "reused, MB", "load, ms", "phases, ms"})


@dataclass(frozen=True)
class Outputs:
    """Files to write; `None`: not this one."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def check(self) -> None:
        """Raises `ValueError` for a folder that does not exist, `ImportError` for a missing package."""
        require_folders_of(self.json, self.markdown, self.plot)
        if self.plot is not None:
            require_matplotlib()

    def write(self, results: Results) -> None:
        """Writes each file anew."""
        if self.json is not None:
            self.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if self.markdown is not None:
            self.markdown.write_text(markdown(results), encoding="utf-8")
        if self.plot is not None:
            plot(results, self.plot)


def load(model: str | None, shape: str | None, device: str | None, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """The model to measure, its tokenizer (`None`: random weights have none), and its name.

    Raises:
        ValueError: both a model and a shape, or an unknown shape.
    """
    if model is not None and shape is not None:
        raise ValueError(f"Give --model or --shape, not both; got {model!r} and {shape!r}.")
    if shape is not None:
        return random_model(shape, device, dtype), None, f"{shape} shape, random weights"
    return *demo_model.load(model, device, dtype), model or demo_model.HUB_NAME


def bench(
    model: Any, name: str, settings: Settings, outputs: Outputs, console: Console, tokenizer: Any = None
) -> Results:
    """Measures, writes the files after every length, and shows a table for each.

    Returns:
        What the JSON file holds.
    """
    with Console(stderr=True).status("Measuring …") as status:
        results = run(
            model,
            name,
            settings,
            tokenizer=tokenizer,
            save=outputs.write,
            say=lambda what: status.update(f"Measuring {what}"),
        )
    console.print(title(results), markup=False, highlight=False)
    for tokens in dict.fromkeys(row["tokens"] for row in results["rows"]):
        console.print(_table_of(results, tokens))
    for note in footnotes(results):
        console.print(note, markup=False, highlight=False)
    return results


def _table_of(results: Results, tokens: int) -> Table:
    """The rows of one length, with the columns that some row has a figure for; ranges of times are in the files."""
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
