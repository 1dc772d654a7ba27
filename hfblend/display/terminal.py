"""A trace for a terminal, drawn by rich: no line is longer than the terminal is wide, no text of a prompt acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..trace.trace import BlendTrace
from ..util import visible
from . import palette, view
from .view import Grid, Part, clipped

CHUNK_ROWS = 24
TOP_TOKENS = 8
_SHADES = " ▁▂▃▄▅▆█"  # by level
_STYLES = {name: f"bold {colour}" for name, colour in palette.ORIGINS.items()} | {"computed": "dim"}
_FILLS = {"exact": "=", "hit": "█", "miss": "▒", "fresh": "░", "unused": "▓", "computed": "·"}


def renderables(trace: BlendTrace, tokenizer: Any, width: int) -> Iterator[RenderableType]:
    """The parts of the view, from top to bottom."""
    across = max(20, min(width - 14, 120))
    yield Rule("hfblend", style="dim")
    if not trace.blended:
        yield Text(f"Not blended. {visible(view.fallback_of(trace))}", style=palette.VERMILION)
    yield _figures(trace, width)
    if trace.num_tokens:
        columns, parts = trace.token_columns(tokenizer), view.parts_of(trace)
        yield _strips(trace, parts, columns, across)
        yield from _chunks(trace, parts)
        yield from _top_tokens(columns)
        yield from _maps(trace, across)
        yield from _mask(trace, across)
    yield from _time(trace, across)
    for note in trace.notes[:20]:
        yield Text(f"note: {visible(clipped(note, 500))}", style="dim")


def _figures(trace: BlendTrace, width: int) -> Text:
    """Names and figures; a line never ends between a name and its figure."""
    lines = [Text()]
    for name, figure in view.figures_of(trace):
        shown = Text.assemble((f"{name} ", "dim"), (visible(figure), "bold"))
        if lines[-1] and lines[-1].cell_len + shown.cell_len > width:
            lines.append(Text())
        lines[-1].append_text(shown).append("   ")
    return Text("\n").join(lines)


def _strips(trace: BlendTrace, parts: Sequence[Part], columns: dict[str, list[Any]], across: int) -> Table:
    """The prompt, its scores and its recomputed tokens, one above the other."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=12)
    grid.add_column(no_wrap=True)
    of_token = [part.origin for part in parts for _ in range(part.tokens)]
    origins = view.binned(of_token, across, lambda some: some[len(some) // 2])
    grid.add_row("prompt", Text.assemble(*((_FILLS[origin], _STYLES[origin]) for origin in origins)))
    key = Text.assemble(*((f"{_FILLS[name]} {name}  ", _STYLES[name]) for name in dict.fromkeys(of_token)), style="dim")
    if trace.scores is not None:
        levels, shares = view.score_strip(columns, across)
        grid.add_row("score", _shades([levels]))
        marks = "".join("▲" if share > 0.5 else "△" if share else " " for share in shares)
        grid.add_row("recomputed", Text(marks, style=palette.SKY))
        key.append("△ some, ▲ most of them recomputed")
    grid.add_row("", key)
    return grid


def _shades(grid: Grid) -> Text:
    return Text("\n".join("".join(_SHADES[level] for level in row) for row in grid), style=palette.ORANGE)


def _chunks(trace: BlendTrace, parts: Sequence[Part]) -> Iterator[RenderableType]:
    rows = view.looked_up(trace, parts)
    if not rows:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    added = ("added to K · V",) if view.added_to(trace) else ()
    for name in ("part", "origin", "tokens", "keys from → to", "recomputed", *added, "store key"):
        is_text = name in ("part", "origin", "store key")
        is_last = name == "store key"  # gives way where the terminal is narrow
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_last, overflow="crop")
    for part, piece, recomputed, size in rows[:CHUNK_ROWS]:
        table.add_row(
            part.name,
            Text(visible(part.found), _STYLES[part.origin]),
            f"{part.tokens:,}",
            view.moved_text(piece),
            f"{recomputed:,}" if recomputed else "–",
            *((size,) if added else ()),
            Text(visible(piece.key[:8]), "dim"),
        )
    yield Padding(table, (1, 0, 0, 0))
    if len(rows) > CHUNK_ROWS:
        yield Text(f"… and {len(rows) - CHUNK_ROWS:,} more", style="dim")


def _top_tokens(columns: dict[str, list[Any]]) -> Iterator[RenderableType]:
    """The highest scores, each with the text around it."""
    highest = view.highest_first(columns["score"])[:TOP_TOKENS]
    if not highest or columns["text"][0] is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name, width in (("score", 8), ("token", 7), ("where", 10)):
        table.add_column(name, justify="right", no_wrap=True, width=width)
    table.add_column("text, highest scores first", overflow="ellipsis", no_wrap=True, ratio=1)
    for i in highest:
        text = Text()
        for j in range(max(0, i - 6), min(len(columns["text"]), i + 7)):
            text.append(clipped(visible(columns["text"][j])), style="bold underline" if i == j else "")
        chunk = columns["chunk"][i]
        where = columns["part"][i] if chunk is None else f"chunk {chunk}"
        table.add_row(f"{columns['score'][i]:.3g}", f"{i:,}", where, text)
    yield Padding(table, (1, 0, 0, 0))


def _maps(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    for one in view.maps_of(trace):
        down = view.binned(one.grid, 12, lambda rows: [max(column) for column in zip(*rows)])
        name, layers = one.name.replace("_", " "), f"layers 0 … {trace.num_layers - 1} downwards"
        yield Text(f"\n{name}, {layers}; █ {one.bounds[-1]:.2g} or more", style="dim")
        yield Padding(_shades([view.binned(row, across, max) for row in down]), (0, 0, 0, 13))


def _mask(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    grid = view.mask_of(trace, 10, min(across, 64)) if trace.level == "full" and trace.blended else []
    if grid:
        yield Text("\nwho sees whom: computed rows × keys; □ reused, ▨ some computed, ■ computed", style="dim")
        yield Padding(Text("\n".join("".join("⬚□▨■"[kind] for kind in row) for row in grid)), (0, 0, 0, 13))


def _time(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    lanes = view.lanes_of(trace)
    if not (end := view.end_of(lanes)):
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=14)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", style="dim")
    across -= 14
    for name in dict.fromkeys(one.name for one in lanes[0][1]):
        cells, total = [" "] * across, 0.0
        for one in lanes[0][1]:
            if one.name == name:
                first, last = (int(min(max(across * ms / end, 0), across)) for ms in (one.start_ms, one.stop_ms))
                start = min(across - 1, first)
                cells[start : max(start + 1, last)] = "━" * (max(start + 1, last) - start)
                total += one.ms
        grid.add_row(Text(visible(name.replace("_", " "))), Text("".join(cells[:across])), f"{total:,.1f} ms")
    yield Group(Text(), grid)
