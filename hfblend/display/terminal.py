"""A trace for a terminal, as rich draws it: no line is longer than the terminal is wide, no text of a prompt acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..trace.trace import BlendTrace
from . import palette, view
from .text import clipped, visible
from .view import Grid, Part

CHUNK_ROWS = 24
TOP_TOKENS = 8
_SHADES = " ▁▂▃▄▅▆█"  # by level
_STYLES = {
    "exact": f"bold {palette.BLUE}", "hit": f"bold {palette.GREEN}", "miss": f"bold {palette.VERMILION}",
    "fresh": f"bold {palette.GREY}", "unused": f"bold {palette.PURPLE}", "computed": "dim",
}  # fmt: skip
_FILLS = {"exact": "=", "hit": "█", "miss": "▒", "fresh": "░", "unused": "▓", "computed": "·"}


def renderables(trace: BlendTrace, tokenizer: Any, width: int) -> Iterator[RenderableType]:
    """What is printed, from top to bottom."""
    yield Rule("hfblend", style="dim")
    if not trace.blended:
        yield Text(f"Not blended. {visible(view.fallback_of(trace))}", style=palette.VERMILION)
    yield _figures(trace, width)
    if trace.num_tokens:
        columns, parts = trace.token_columns(tokenizer), view.parts_of(trace)
        across = max(20, min(width - 14, 120))
        yield _strips(trace, parts, columns, across)
        yield from _chunks(trace, parts)
        yield from _top_tokens(columns)
        yield from _maps(trace, across)
        yield from _mask(trace, across)
    yield from _time(trace, max(20, min(width - 14, 120)))
    for note in trace.notes[:20]:
        yield Text(f"note: {visible(clipped(note, 500))}", style="dim")


def _figures(trace: BlendTrace, width: int) -> Text:
    """Names and figures, none of them torn apart at the end of a line."""
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
    of_token = [part for part in parts for _ in range(part.tokens)]
    prompt = Text()
    for part in view.binned(of_token, across, lambda some: some[len(some) // 2]):
        prompt.append(_FILLS[part.origin], style=_STYLES[part.origin])
    grid.add_row("prompt", prompt)
    if trace.scores is not None:
        levels = view.binned(view.score_levels(columns["score"]), across, max)
        grid.add_row("score", Text("".join(_SHADES[level] for level in levels), style=palette.ORANGE))
        shares = view.binned(columns["selected"], across, lambda some: sum(some) / len(some))
        marks = "".join("▲" if share > 0.5 else "△" if share else " " for share in shares)
        grid.add_row("recomputed", Text(marks, style=palette.SKY))
    key = Text(style="dim")
    for name in dict.fromkeys(part.origin for part in parts):
        key.append(f"{_FILLS[name]} {name}  ", style=_STYLES[name])
    if trace.scores is not None:
        key.append("△ some, ▲ most of them recomputed")
    grid.add_row("", key)
    return grid


def _chunks(trace: BlendTrace, parts: Sequence[Part]) -> Iterator[RenderableType]:
    pieces = [part for part in parts if part.piece is not None]
    if not pieces:
        return
    selected = set([] if trace.selected_idx is None else trace.selected_idx.tolist())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (("part", "left"), ("origin", "left"), ("tokens", "right"), ("keys from → to", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("recomputed", justify="right", no_wrap=True)
    table.add_column("store key", no_wrap=True)
    for part in pieces[:CHUNK_ROWS]:
        assert part.piece is not None
        recomputed = sum(i in selected for i in range(part.start, part.stop))
        origin = f"{part.origin}, {part.piece.quantised}" if part.piece.quantised else part.origin
        table.add_row(
            part.name,
            Text(visible(origin), style=_STYLES[part.origin]),
            f"{part.tokens:,}",
            view.moved_text(part.piece),
            f"{recomputed:,}" if recomputed else "–",
            Text(visible(part.piece.key[:8]), style="dim"),
        )
    yield Padding(table, (1, 0, 0, 0))
    if len(pieces) > CHUNK_ROWS:
        yield Text(f"… and {len(pieces) - CHUNK_ROWS:,} more", style="dim")


def _top_tokens(columns: dict[str, list[Any]]) -> Iterator[RenderableType]:
    """The highest scores, each with the text around it."""
    scored = [i for i, score in enumerate(columns["score"]) if score is not None]
    if not scored or columns["text"][0] is None:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name, width in (("score", 8), ("token", 7), ("where", 10)):
        table.add_column(name, justify="right", no_wrap=True, width=width)
    table.add_column("text, highest scores first", overflow="ellipsis", no_wrap=True, ratio=1)
    for i in sorted(scored, key=lambda i: -view._rank_value(columns["score"][i]))[:TOP_TOKENS]:
        text = Text()
        for j in range(max(0, i - 6), min(len(columns["text"]), i + 7)):
            text.append(clipped(visible(columns["text"][j])), style="bold underline" if i == j else "")
        chunk = columns["chunk"][i]
        where = columns["part"][i] if chunk is None else f"chunk {chunk}"
        table.add_row(f"{columns['score'][i]:.3g}", f"{i:,}", where, text)
    yield Padding(table, (1, 0, 0, 0))


def _maps(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    if trace.maps is None:
        return
    for name, values in trace.maps.items().items():
        grid = view.map_levels(values, name)
        down = view.binned(grid, 12, lambda rows: [max(column) for column in zip(*rows)])
        shown = [view.binned(row, across, max) for row in down]
        lines = Text("\n".join("".join(_SHADES[level] for level in row) for row in shown), style=palette.ORANGE)
        yield Text(f"\n{name.replace('_', ' ')}, layers 0 … {trace.num_layers - 1} downwards", style="dim")
        yield Padding(lines, (0, 0, 0, 13))


def _mask(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    if trace.level != "full" or not trace.blended:
        return
    grid: Grid = view.mask_of(trace, 10, min(across, 64))
    if grid:
        lines = "\n".join("".join("⬚□▨■"[kind] for kind in row) for row in grid)
        yield Text("\nwho sees whom: computed rows × keys; □ reused, ▨ some computed, ■ computed", style="dim")
        yield Padding(Text(lines), (0, 0, 0, 13))


def _time(trace: BlendTrace, across: int) -> Iterator[RenderableType]:
    lanes = view.lanes_of(trace)
    end = max((one.stop_ms for _, intervals in lanes for one in intervals), default=0.0)
    if not end:
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim", width=14)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", style="dim")
    across -= 14
    for name in dict.fromkeys(one.name for one in lanes[0][1]):
        mine = [one for one in lanes[0][1] if one.name == name]
        cells = [" "] * across
        for one in mine:
            first, last = (min(max(across * ms / end, 0), across) for ms in (one.start_ms, one.stop_ms))
            start = min(across - 1, int(first))
            stop = max(start + 1, int(last))
            cells[start:stop] = "━" * (stop - start)
        grid.add_row(
            Text(visible(name.replace("_", " "))), Text("".join(cells[:across])), f"{sum(o.ms for o in mine):,.1f} ms"
        )
    yield Group(Text(), grid)
