"""The site's page of the commands, from the commands themselves."""

from __future__ import annotations

import re

import typer
from typer.cli import get_docs_for_click

from hfblend.cli import app

_HEAD = """# Command line

What `hfblend COMMAND --help` shows.
"""
_EXAMPLES = re.compile(r"Example: (.+(?:\n.+)*)")
_HELP = re.compile(r"^\* `--help`.*\n", re.MULTILINE)


def page() -> str:
    """Every command and its options, as Markdown."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="hfblend")
    sections = []
    for name in group.list_commands(context):
        _, command, _ = group.resolve_command(context, [name])  # imports it
        text = get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="hfblend")
        sections.append(_HELP.sub("", _EXAMPLES.sub(_fenced, text)))
    return "\n".join([_HEAD, *sections])


def _fenced(example: re.Match[str]) -> str:
    return "```bash\n" + example[1].replace("\n", " ") + "\n```"
