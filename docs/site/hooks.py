"""The site's additions to Markdown, with no script and nothing from a network.

LaTeX becomes MathML when a page is built, and `>>>` lines in docstrings become code blocks.
"""

from __future__ import annotations

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def on_page_content(page_html: str, **_: Any) -> str:
    """MkDocs' hook: formulas, as pymdownx.arithmatex marks them, become MathML."""
    return _FORMULA.sub(_mathml, page_html)


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
