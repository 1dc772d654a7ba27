"""The command `hfblend`.

Neither `--help` nor a mistyped option loads PyTorch or Transformers: a command's module is imported when the command is
called, and its functions import the modules that do the work.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from .. import __version__
from .common import console, in_words
from .options import EXIT_CODES

_COMMANDS = {  # name -> its place, and its line in the list of commands
    "demo": ("demo.demo", "Answer a question about twelve passages in three ways, and compare the answers."),
    "ask": ("ask.ask", "Answer a question about your own files; their passages are computed once."),
    "run": ("explain.run", "Answer the prompts of files; chunks that they share are computed once."),
    "explain": ("explain.explain", "Blend one prompt, and show which chunks and tokens were reused."),
    "playground": ("demo.playground", "Serve a page on this machine: reorder chunks, move the ratio, see the effects."),
    "serve": ("serve.serve", "Serve a model with OpenAI's API; documents in chats are computed once."),
    "verify": ("explain.verify", "Compare the blended prompts of a file with their full prefills."),
    "eval": ("evaluate.evaluate", "Measure methods on questions: closeness to full prefill, answers, times."),
    "bench": ("bench.bench", "Measure speed: time to first token by length, method and ratio."),
    "profile": ("profile.profile", 'Measure this machine, and show what recompute_ratios="auto" would decide.'),
    "precompute": ("precompute.precompute", "Compute and store the KV of a corpus' chunks."),
    "store": ("store.app", "Look after chunk KV in a folder or at a URL."),
}
_EPILOGS = {
    "verify": f"{EXIT_CODES} With --max-kl, 1 says that a prompt is above it.",
    "precompute": f"{EXIT_CODES} 1 also says that a chunk was not kept; 130, stopped by Ctrl-C.",
}


def _load(name: str) -> Any:
    module, attribute = _COMMANDS[name][0].split(".")
    command, group = getattr(import_module(f".{module}", __name__), attribute), typer.Typer(add_completion=False)
    group.callback()(_nothing)
    if isinstance(command, typer.Typer):
        group.add_typer(command, name=name)
    else:
        group.command(name, epilog=_EPILOGS.get(name, EXIT_CODES))(command)
    return typer.main.get_command(group).commands[name]  # type: ignore[attr-defined]


def _nothing() -> None: ...


class _Commands(TyperGroup):
    """Lists the commands by their lines; imports the one that is called, and says its errors as messages."""

    def invoke(self, ctx: Any) -> Any:
        with in_words():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(args[0]), rest


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    help="CacheBlend inside Hugging Face Transformers.",
    epilog=EXIT_CODES,
)
for _name, (_, _line) in _COMMANDS.items():
    app.command(_name, help=_line)(_nothing)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"hfblend {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """CacheBlend inside Hugging Face Transformers."""
