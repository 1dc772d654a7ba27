"""A trace, and what changed an answer, shown: in a terminal, in a notebook, as an HTML page, as matplotlib figures.

view.py        the content, as plain lists: parts, bins, shades, tokens to write out
blame.py       the same of a `Blame`
reprs.py       the short HTML of prompts, stores and measurements
html.py        for notebooks and pages: HTML, CSS and inline SVG, no JavaScript; `templates/` holds the markup
terminal.py    for rich
plots.py       for matplotlib; figure.py, a figure that notebooks draw
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from ..arguments import require, require_tokenizer
from ..measure.results import Blame
from ..trace.trace import BlendTrace
from .plots import plot_scores, plot_timeline
from .reprs import register

__all__ = ["Display", "plot_scores", "plot_timeline", "show"]

register()


def show(trace: BlendTrace | Blame, tokenizer: Any = None, *, console: Console | None = None) -> Display:
    """Shows a trace: printed in a terminal; in a notebook, as the last line of a cell.

    >>> hfblend.show(blender.trace)  # doctest: +SKIP
    >>> hfblend.show(trace).save("call.html")  # doctest: +SKIP
    >>> hfblend.show(blender.blame(prompt))  # doctest: +SKIP

    Args:
        trace: of any level of detail; with `"tokens"` the prompt's text is shown, with `"full"` layers too. Or what
            `Blender.blame` found, which is shown before the trace of its prompt.
        tokenizer: for the text, if `patch` was given none.
        console: a rich console to print on, also in a notebook.

    Returns:
        The display: `save(path)` writes it as a page, `to_html()` is that page; notebooks draw it.
    """
    blame = trace if isinstance(trace, Blame) else None
    display = Display(trace.trace if isinstance(trace, Blame) else trace, tokenizer, blame=blame)
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
        blame: what changed the answer, shown first.
    """

    def __init__(
        self,
        trace: BlendTrace,
        tokenizer: Any = None,
        title: str = "hfblend",
        answers: dict[str, str] | None = None,
        blame: Blame | None = None,
    ) -> None:
        require("trace", trace, BlendTrace, "a hfblend.BlendTrace, say blender.trace")
        if tokenizer is not None:
            require_tokenizer(tokenizer)
        self.trace, self.tokenizer, self.title, self.answers = trace, tokenizer, title, answers or {}
        self.blame = blame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from . import blame
        from .terminal import renderables

        if self.blame is not None:
            yield from blame.renderables(self.blame, options.max_width)
        yield from renderables(self.trace, self.tokenizer, options.max_width)

    def _repr_html_(self) -> str:
        from .html import blame_html, trace_html

        blame = "" if self.blame is None else blame_html(self.blame)
        return blame + trace_html(self.trace, self.tokenizer, self.title, self.answers)

    def to_html(self) -> str:
        """The view as a separate page."""
        from .html import page_of

        return page_of(self.title, self._repr_html_())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"<hfblend.display of: {self.trace}>"


def _in_notebook() -> bool:
    """Whether a notebook draws the last value of a cell."""
    try:
        from IPython import get_ipython  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")
