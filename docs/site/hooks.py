"""The site's additions to Markdown, with no script and nothing from a network.

LaTeX becomes MathML when a page is built, `>>>` lines in docstrings become code blocks, and notebooks become pages.
"""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[2]
NOTEBOOKS = {f"notebooks/{path.stem}.md": path for path in sorted((_ROOT / "examples" / "notebooks").glob("*.ipynb"))}
notebooks = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("notebooks.py")))
)  # MkDocs loads this file only

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """MkDocs' hook: each notebook is a page, `notebooks/1_why_chunks_break.md`."""
    for uri, notebook in NOTEBOOKS.items():
        files.append(File.generated(config, uri, content=notebooks.page_of(notebook)))
    return files


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
