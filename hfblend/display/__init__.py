"""A trace, shown: in a terminal, in a notebook, as an HTML page, as matplotlib figures.

view.py        what is shown, as plain lists: bins, shades, which tokens are written out
text.py        text of prompts made harmless
html.py        for notebooks and pages: HTML, CSS and inline SVG, no JavaScript
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
        tokenizer: for the text, where `patch` was given none.
        console: of rich, to print on in any case.

    Returns:
        The display: `save(path)` writes it as a page, `to_html()` is that page; notebooks draw it.
    """
    display = Display(trace, tokenizer)
    require("console", console, (Console, type(None)), "a rich.console.Console")
    if console is not None or not _in_notebook():
        (console or Console()).print(display)
    return display


class Display:
    """A trace as others draw it: rich, a notebook, a browser.

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
        from .html import fragment

        return fragment(self.trace, self.tokenizer, self.title, self.answers)

    def to_html(self) -> str:
        """A page of its own."""
        from .html import page

        return page(self._repr_html_(), self.title)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"<hfblend.display of: {self.trace}>"


def _in_notebook() -> bool:
    """Whether a notebook will draw what a cell ends with."""
    try:
        from IPython import get_ipython  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
