"""The command `hfblend`: a module for each of its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, demo, evaluate, explain, precompute, profile, store, verify
from .common import EXIT_CODES, console

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="CacheBlend inside Hugging Face Transformers.", epilog=EXIT_CODES
)
app.command(epilog=EXIT_CODES)(demo.demo)
app.command(epilog=EXIT_CODES)(explain.run)
app.command(epilog=EXIT_CODES)(explain.explain)
app.command(epilog=EXIT_CODES)(demo.playground)
app.command(epilog=f"{EXIT_CODES} With --max-kl, 1 says that a prompt is above it.")(verify.verify)
app.command("eval", epilog=EXIT_CODES)(evaluate.evaluate)
app.command(epilog=EXIT_CODES)(bench.bench)
app.command(epilog=EXIT_CODES)(profile.profile)
app.command(epilog=f"{EXIT_CODES} 1 also says that a chunk was not kept; 130, stopped by Ctrl-C.")(
    precompute.precompute
)
app.add_typer(store.app, name="store")


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
