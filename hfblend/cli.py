"""The command `hfblend`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, help="CacheBlend inside Hugging Face Transformers.")
console = Console()


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"hfblend {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """CacheBlend inside Hugging Face Transformers."""


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a causal LM.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    device: Annotated[str | None, typer.Option(help="As torch names it.", show_default="GPU if any, else CPU")] = None,
) -> None:
    """Answer a question about twelve passages by full prefill, full reuse and blending, and compare them."""
    from . import demo_model
    from .demo import run_demo

    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder of {json_file} does not exist; create it first.", param_hint="--json")
    try:
        loaded, tokenizer = demo_model.load(model, device)
    except (OSError, ImportError) as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}")
        raise typer.Exit(1) from error
    results = run_demo(loaded, tokenizer, model or demo_model.HUB_NAME, console)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {json_file}")
