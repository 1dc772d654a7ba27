"""A trace as HTML: text, CSS and inline SVG. No script, nothing loaded, every text escaped.

The page's content policy, which allows styles and nothing else, has the browser enforce this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..measure.results import Blame
from ..trace.timeline import Interval
from ..trace.trace import BlendTrace
from ..util import visible
from . import palette, view
from .blame import BlameView
from .view import Grid, Part, ShadedMap, clipped

CHUNK_ROWS = 60  # of the table
_PHASES = ("exact", "hit", "miss", "unused", "fresh")  # their colours, for phases
_STATUS_CLASS = {"recomputed": "r", "computed": "c", "exact": "e", "reused": ""}


def rendered(template: str, **values: Any) -> str:
    """Renders a template of the package, named by its path in it, with these values."""
    return _environment().get_template(template).render(palette=palette, **values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("hfblend", ""),
        autoescape=True,
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _harmless(value: Any) -> Any:
    """Makes the text of a value visible, unless the value is markup; autoescape follows."""
    return value if hasattr(value, "__html__") else visible(str(value))


def page_of(title: str, body: str) -> str:
    """A page without scripts, of markup made here."""
    return rendered("display/templates/page.html.jinja", title=title, body=Markup(body))


def blame_html(blame: Blame) -> str:
    """What changed an answer."""
    view_of = BlameView(blame)
    return rendered("display/templates/blame.html.jinja", view=view_of, heat=_drawn([view_of.strip()], "s"))


def trace_html(trace: BlendTrace, tokenizer: Any, title: str, answers: dict[str, str]) -> str:
    """The view of a trace."""
    values = {"trace": trace, "title": title, "answers": answers, "lanes": _lanes(trace)}
    if trace.num_tokens:
        values |= _prompt(trace, trace.token_columns(tokenizer), view.parts_of(trace))
    return rendered("display/templates/trace.html.jinja", view=view, clipped=clipped, **values)


def _prompt(trace: BlendTrace, columns: dict[str, list[Any]], parts: Sequence[Part]) -> dict[str, Any]:
    rows = view.looked_up(trace, parts)
    return {
        "bar": [(part, _title(part), _label(part, trace.num_tokens)) for part in view.few(parts, 300)],
        "origins": {part.origin for part in parts},
        "rows": rows,
        "added": view.added_to(trace),
        "rows_left_out": range(CHUNK_ROWS - 5, len(rows) - 5),
        "scores": None if trace.scores is None else _scores(trace, columns),
        "tokens": None if columns["text"][0] is None else _tokens(parts, columns),
        "maps": [_map(trace, one) for one in view.maps_of(trace)],
        "mask": _drawn(view.mask_of(trace, 30) if trace.blended else [], "k"),
    }


def _title(part: Part) -> str:
    moved = "" if part.piece is None else f", {view.moved_text(part.piece)}"
    return f"{part.name}: {part.origin}, {part.tokens:,} tokens{moved}"


def _label(part: Part, total: int) -> str:
    """A part's name, as much of it as the bar has room for."""
    share, short = part.tokens / total, part.name.removeprefix("chunk ")
    if share > 0.07:
        name = part.name if share > 0.09 else short
        return f"{name}: {part.origin}" if part.piece else name
    return short if share > 0.025 and len(short) < 4 else ""


# --- tokens -----------------------------------------------------------------------------------------------------------


def _scores(trace: BlendTrace, columns: dict[str, list[Any]]) -> dict[str, Any]:
    """All tokens in two rows, binned: shade of the highest score, share that was recomputed."""
    levels, shares = view.score_strip(columns, 4 * view.COLUMNS)
    each = trace.num_tokens / len(levels)
    count = f"about {each:.0f}" if each >= 2 else "1 or 2"
    binned = f"; a column is {count} tokens, the highest score counts" if each > 1 else ""
    marks = "".join(f"M{i} {3 - 2 * share:.2f}h1v{2 * share:.2f}h-1z" for i, share in enumerate(shares) if share)
    names = [f"top {share:.0%}" for share in view.SHARES] + ["lower half"]
    return {
        "note": view.rule_in_words(trace) + binned,
        "width": len(levels),
        "paths": [*_paths([levels], "s"), ("m", marks)],
        "key": [*((f"s{7 - i}", name) for i, name in enumerate(names)), ("m", "below: share recomputed")],
    }


def _tokens(parts: Sequence[Part], columns: dict[str, list[Any]]) -> dict[str, Any]:
    wanted, levels = view.wanted_tokens(parts, columns["score"]), view.score_levels(columns["score"])
    count = f"{sum(wanted):,} of {len(wanted):,} written out: around the highest scores"
    return {
        "note": "" if all(wanted) else count,
        "parts": [(part, _title(part), view.runs_of(part, wanted)) for part in view.few(parts, 200)],
        "recomputed": lambda run: sum(columns["selected"][i] for i in run),
        "token": lambda i: _token(i, levels[i], columns),
    }


def _token(i: int, level: int, columns: dict[str, list[Any]]) -> dict[str, Any]:
    status, score, old, text = (columns[name][i] for name in ("status", "score", "old_position", "text"))
    figures = f"#{i} {status}" + ("" if score is None else f", score {score:.3g}")
    return {
        "title": figures + (f", {old}→{i}" if old is not None and old != i else ""),
        "classes": " ".join(name for name in (f"s{level}" if level else "", _STATUS_CLASS[status]) if name),
        "text": clipped(visible(text)),
        "ends_line": "\n" in text,
    }


# --- maps and time ----------------------------------------------------------------------------------------------------


def _map(trace: BlendTrace, one: ShadedMap) -> dict[str, Any]:
    each = trace.num_tokens / len(one.grid[0])
    binned = f"; a column is {each:.0f} tokens, the highest counts" if each > 1 else ""
    blank = "nothing to correct" if one.name in view.added_to(trace) else "not known"
    names = [f"< {one.bounds[0]:.2g}", *(f"≥ {bound:.2g}" for bound in one.bounds)]
    key = [(f"s{level}", name) for level, name in enumerate(names, 1)]
    return {"name": one.name, "note": f"{binned}; blank: {blank}", "key": key, "image": _drawn(one.grid, "s")}


def _drawn(grid: Grid, prefix: str) -> dict[str, Any] | None:
    return {"columns": len(grid[0]), "rows": len(grid), "paths": _paths(grid, prefix)} if grid else None


def _paths(grid: Grid, prefix: str) -> list[tuple[str, str]]:
    """The class and the path of each level; neighbours of one level are one rectangle."""
    drawn: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        x = 0
        for level, run in groupby(row):
            width = len(list(run))
            if level:
                drawn.setdefault(level, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return [(f"{prefix}{level}", "".join(d)) for level, d in sorted(drawn.items())]


def _lanes(trace: BlendTrace) -> dict[str, Any] | None:
    lanes = view.lanes_of(trace)
    if not (end := view.end_of(lanes)):
        return None
    traced = ", with all that level full notes" if trace.level == "full" else ""
    phases = " · ".join(f"{name.replace('_', ' ')} {ms:,.1f} ms" for name, ms in trace.phase_ms.items())
    return {
        "note": f"{end:,.1f} ms{traced}: {phases}",
        "bars": [(heading, _bars(intervals[:400], end)) for heading, intervals in lanes],
    }


def _bars(intervals: Sequence[Interval], end: float) -> Iterable[tuple[str, str, str, str]]:
    colours: dict[str, str] = {}
    for one in intervals:
        colour = colours.setdefault(one.name, _PHASES[len(colours) % len(_PHASES)])
        share = 100 * one.ms / end
        name = one.name.replace("_", " ") if one.layer is None else str(one.layer)
        title = f"{one.name}{'' if one.layer is None else f', layer {one.layer}'}: {one.ms:.2f} ms"
        place = f"left:{100 * one.start_ms / end:.2f}%;width:{share:.2f}%"
        yield colour, place, title, name if share > 1.2 * len(name) + 0.8 else ""
