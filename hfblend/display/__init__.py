"""A trace, shown: in a terminal, in a notebook, as an HTML page, as matplotlib figures.

view.py        the content, as plain lists: parts, bins, shades, tokens to write out
html.py        for notebooks and pages: HTML, CSS and inline SVG, no JavaScript; `templates/` holds the markup
terminal.py    for rich
plots.py       for matplotlib
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from ..arguments import require, require_tokenizer
from ..trace.trace import BlendTrace
from .plots import plot_scores, plot_timeline

__all__ = ["Display", "plot_scores", "plot_timeline", "show"]


def show(trace: BlendTrace, tokenizer: Any = None, *, console: Console | None = None) -> Display:
    """Shows a trace: printed in a terminal; in a notebook, as the last line of a cell.

    >>> hfblend.show(blender.trace)  # doctest: +SKIP
    >>> hfblend.show(trace).save("call.html")  # doctest: +SKIP

    Args:
        trace: of any level of detail; with `"tokens"` the prompt's text is shown, with `"full"` layers too.
        tokenizer: for the text, if `patch` was given none.
        console: a rich console to print on, also in a notebook.

    Returns:
        The display: `save(path)` writes it as a page, `to_html()` is that page; notebooks draw it.
    """
    display = Display(trace, tokenizer)
    require("console", console, (Console, type(None)), "a rich.console.Console")
    if console is not None or not _in_notebook():
        (console or Console()).print(display)
    return display


class Display:
    """The view of a trace that rich, a notebook and a browser draw.

    Args:
        trace, tokenizer: as in `show`.
        title: heading.
        answers: label -> text, shown under the header of a page.
    """

    def __init__(
        self, trace: BlendTrace, tokenizer: Any = None, title: str = "hfblend", answers: dict[str, str] | None = None
    ) -> None:
        require("trace", trace, BlendTrace, "a hfblend.BlendTrace, say blender.trace")
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        self.trace, self.tokenizer, self.title, self.answers = trace, tokenizer, title, answers or {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .terminal import renderables

        yield from renderables(self.trace, self.tokenizer, options.max_width)

    def _repr_html_(self) -> str:
        return self._html("trace")

    def to_html(self) -> str:
        """The view as a separate page."""
        return self._html("page")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _html(self, template: str) -> str:
        from .html import html_of

        return html_of(self.trace, self.tokenizer, self.title, self.answers, template)

    def __repr__(self) -> str:
        return f"<hfblend.display of: {self.trace}>"


def _in_notebook() -> bool:
    """Whether a notebook draws the last value of a cell."""
    try:
        from IPython import get_ipython  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
