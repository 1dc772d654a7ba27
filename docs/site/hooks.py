"""The site's additions to Markdown, with nothing from a network.

When a page is built, LaTeX becomes MathML, `>>>` lines in docstrings become code blocks, notebooks and the commands'
help become pages, and the tables of models become one that says which are supported.
"""

from __future__ import annotations

import html
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2]
NOTEBOOKS = {f"notebooks/{path.stem}.md": path for path in sorted((_ROOT / "examples" / "notebooks").glob("*.ipynb"))}


def _neighbour(name: str) -> SimpleNamespace:
    """A file of this folder; MkDocs loads this one only."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(name))))


notebooks, commands = _neighbour("notebooks.py"), _neighbour("commands.py")

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """MkDocs' hook: each notebook is a page, `notebooks/1_why_chunks_break.md`, and so are the commands, `cli.md`."""
    for uri, notebook in NOTEBOOKS.items():
        files.append(File.generated(config, uri, content=notebooks.page_of(notebook)))
    files.append(File.generated(config, "cli.md", content=commands.page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs' hook: `<!-- families -->` becomes the table of all models, which site/models.js searches."""
    if page.file.src_uri != "models.md":
        return markdown
    rows = [f"| {name} | {said} |" for name, said in sorted(_families(markdown), key=lambda row: row[0].strip("`"))]
    table = "\n".join(["| `model_type` | supported |", "| --- | --- |", *rows])
    return markdown.replace("<!-- families -->", f'<div class="families" markdown>\n\n{table}\n\n</div>')


def _families(markdown: str) -> Iterator[tuple[str, str]]:
    """Each family, and the outcome: the first and the last cell of the tables that `make models` writes."""
    outcomes = {"green": "**yes**", "refused": "no: {}", "not-built": "not tried for these tables: {}"}
    for mark, outcome in outcomes.items():
        for row in markdown.split(f"<!-- {mark} -->")[1].strip().splitlines()[2:]:
            name, *_, last = (cell.strip() for cell in row.strip("|").split(" | "))
            yield name, outcome.format(last)


def on_page_content(page_html: str, page: Any, **_: Any) -> str:
    """MkDocs' hook: formulas, as pymdownx.arithmatex marks them, become MathML; notebooks show their pictures."""
    with_formulas = _FORMULA.sub(_mathml, page_html)
    notebook = NOTEBOOKS.get(page.file.src_uri)
    return notebooks.with_outputs(with_formulas, notebook) if notebook else with_formulas


def _mathml(formula: re.Match[str]) -> str:
    tag, latex = formula.groups()
    display = "block" if tag == "div" else "inline"
    return f'<{tag} class="formula">{convert(html.unescape(latex).strip(), display=display)}</{tag}>'


class ExamplesAsCode(griffe.Extension):
    """Griffe's extension: an example that opens a docstring, `>>> …`, would be a Markdown quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match[str]) -> str:
    return "```pycon\n" + re.sub(r"\s*# doctest: \+SKIP", "", example[0]) + "\n```"
