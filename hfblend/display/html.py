"""A trace as HTML: text, CSS and inline SVG. No script, nothing loaded, every text escaped.

The page says so to the browser, too: its content policy allows styles and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..trace.timeline import Interval
from ..trace.trace import BlendTrace
from . import view
from .style import CSS
from .text import clipped, escaped, visible
from .view import Grid, Part

CHUNK_ROWS = 60  # of the table
_PHASES = ("exact", "hit", "miss", "unused", "fresh")  # their colours, for phases

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(fragment: str, title: str) -> str:
    """A page of its own around a view."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escaped(title)}</title><style>body{{margin:24px auto;max-width:1080px}}'
        "@media (prefers-color-scheme:dark){body{background:#0d1014}}</style></head>"
        f"<body>{fragment}</body></html>\n"
    )


def fragment(trace: BlendTrace, tokenizer: Any, title: str, answers: dict[str, str]) -> str:
    """The view, for a page or a notebook's cell."""
    columns, parts = trace.token_columns(tokenizer), view.parts_of(trace)
    sections = [_header(trace, title), _answers(answers)]
    if trace.num_tokens:
        sections += [_prompt(trace, parts), _scores(trace, columns), _tokens(trace, parts, columns)]
        sections += [_maps(trace), _mask(trace)]
    sections += [_time(trace), _notes(trace)]
    return f'<div class="hfb"><style>{CSS}</style>{"".join(sections)}</div>'


# --- header -----------------------------------------------------------------------------------------------------------


def _header(trace: BlendTrace, title: str) -> str:
    figures = "".join(
        f"<div><span>{escaped(name)}</span><b>{escaped(figure)}</b></div>" for name, figure in view.figures_of(trace)
    )
    banner = ""
    if not trace.blended:
        banner = f'<div class="banner"><b>Not blended.</b> {escaped(view.fallback_of(trace))}</div>'
    elif trace.decision is not None:
        banner = f'<p class="note">Ratio settled: {escaped(trace.decision.reason)}</p>'
    return f'<h2>{escaped(title)}</h2>{banner}<div class="figs">{figures}</div>'


def _answers(answers: dict[str, str]) -> str:
    if not answers:
        return ""
    shown = "".join(
        f'<div class="answer"><span class="dim">{escaped(label)}</span>\n{_lines(answer)}</div>'
        for label, answer in answers.items()
    )
    return f"<h3>Answers</h3>{shown}"


def _notes(trace: BlendTrace) -> str:
    notes = "".join(f"<li>{escaped(clipped(note, 500))}</li>" for note in trace.notes[:20])
    return f'<h3>Notes</h3><ul class="note">{notes}</ul>' if notes else ""


def _lines(text: str) -> str:
    """Text whose own line breaks stay."""
    return "<br>".join(escaped(line) for line in text.split("\n"))


# --- the prompt -------------------------------------------------------------------------------------------------------

_MEANINGS = {
    "exact": "exact: reused as it was",
    "hit": "hit: reused, keys moved",
    "miss": "miss: prefilled alone, then as a hit",
    "fresh": "fresh: computed in this prompt",
    "unused": "unused: found, and computed in this prompt",
    "computed": "always computed: gaps, suffix",
}


def _prompt(trace: BlendTrace, parts: Sequence[Part]) -> str:
    shown = "".join(
        f'<span class="o-{part.origin}" style="flex-grow:{part.tokens}" title="{_title(part)}">'
        f"{_label(part, trace.num_tokens)}</span>"
        for part in _few(parts, 300)
    )
    origins = dict.fromkeys(part.origin for part in parts)
    key = "".join(f'<span><b class="o-{name}"></b>{text}</span>' for name, text in _MEANINGS.items() if name in origins)
    return (
        f'<h3>Prompt <span class="dim">{trace.num_tokens:,} tokens, to scale</span></h3><div class="bar">{shown}</div>'
        f'<div class="key">{key}</div>{_table(trace, parts)}'
    )


def _few(parts: Sequence[Part], most: int) -> Sequence[Part]:
    """As many as a bar has room for; the rest is one."""
    return parts if len(parts) <= most else [*parts[:most], Part("…", parts[most].start, parts[-1].stop)]


def _title(part: Part) -> str:
    moved = "" if part.piece is None else f", {view.moved_text(part.piece)}"
    return escaped(f"{part.name}: {part.origin}, {part.tokens:,} tokens{moved}")


def _label(part: Part, total: int) -> str:
    share = part.tokens / total
    name = part.name.removeprefix("chunk ")
    if share > 0.07:
        name = part.name if share > 0.09 else name
        return escaped(f"{name}: {part.origin}" if part.piece else name)
    return escaped(name) if share > 0.025 and len(name) < 4 else ""


def _table(trace: BlendTrace, parts: Sequence[Part]) -> str:
    pieces = [part for part in parts if part.piece is not None]
    if not pieces:
        return ""
    selected = set([] if trace.selected_idx is None else trace.selected_idx.tolist())
    rows = [_row(part, sum(i in selected for i in range(part.start, part.stop))) for part in pieces]
    if len(rows) > CHUNK_ROWS:
        left_out = len(rows) - CHUNK_ROWS
        rows[CHUNK_ROWS - 5 : -5] = [f'<tr><td colspan="6"><em>… {left_out:,} chunks left out …</em></td></tr>']
    heads = ("part", "origin", "tokens", "keys moved from → to", "recomputed", "store key")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(part: Part, recomputed: int) -> str:
    piece = part.piece
    assert piece is not None
    first_time = piece.exact and piece.status == "miss"
    also = (", a miss" if first_time else "") + (f", {piece.quantised}" if piece.quantised else "")
    cells = (
        escaped(part.name),
        f'<b class="o-{part.origin}"></b>{escaped(part.origin + also)}',
        f"{part.tokens:,}",
        escaped(view.moved_text(piece)),
        f"{recomputed:,} ({recomputed / part.tokens:.0%})" if recomputed else "–",
        escaped(piece.key[:8]),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


# --- scores and tokens ------------------------------------------------------------------------------------------------


def _scores(trace: BlendTrace, columns: dict[str, list[Any]]) -> str:
    """All tokens in two rows, binned: shade of the highest score, share that was recomputed."""
    if trace.scores is None:
        return '<p class="note">No token was ranked.</p>' if trace.blended else ""
    levels = view.binned(view.score_levels(columns["score"]), 4 * view.COLUMNS, max)
    shares = view.binned(columns["selected"], 4 * view.COLUMNS, lambda some: sum(some) / len(some))
    width = len(levels)
    marks = "".join(f"M{i} {3 - 2 * share:.2f}h1v{2 * share:.2f}h-1z" for i, share in enumerate(shares) if share)
    drawn = (
        f'<svg viewBox="0 0 {width} 3" preserveAspectRatio="none" style="height:48px" role="img" '
        f'aria-label="scores of all tokens">{_paths([levels], "s")}<path class="m" d="{marks}"/></svg>'
    )
    each = trace.num_tokens / width
    count = f"about {each:.0f}" if each >= 2 else "1 or 2"
    binned = f"; a column is {count} tokens, the highest score counts" if each > 1 else ""
    return (
        f'<h3>Scores and recomputed tokens <span class="dim">{escaped(view.rule_in_words(trace))}{binned}</span></h3>'
        f"{drawn}"
        f'<div class="key">{_score_key()}<span><b class="plain" style="background:var(--mark)"></b>'
        "below: share recomputed</span></div>"
    )


def _score_key() -> str:
    names = [f"top {share:.0%}" for share in view.SHARES] + ["lower half"]
    return "".join(f'<span><b class="s{7 - i}"></b>{name}</span>' for i, name in enumerate(names))


def _tokens(trace: BlendTrace, parts: Sequence[Part], columns: dict[str, list[Any]]) -> str:
    heading = "Tokens"
    if columns["text"][0] is None:
        why = "the prompt's ids are kept with trace=&quot;tokens&quot;" if trace.input_ids is None else "no tokenizer"
        return f'<p class="note">{heading} are not written out: {why}.</p>'
    wanted = view.wanted_tokens(parts, columns["score"])
    levels = view.score_levels(columns["score"])
    shown = "".join(_part(part, wanted, levels, columns) for part in _few(parts, 200))
    key = (
        '<div class="key"><span><i class="s6 r">token</i> recomputed</span><span><i class="s2">token</i> reused, '
        'shaded by score</span><span><i class="e">token</i> exact</span>'
        '<span><i class="c">token</i> always computed</span>'
        "<span>rest the pointer on a token for its figures</span></div>"
    )
    count = sum(wanted)
    note = ""
    if count < len(wanted):
        note = f" <span class='dim'>{count:,} of {len(wanted):,} written out: around the highest scores</span>"
    return f"<details open><summary>{heading}{note}</summary>{key}{shown}</details>"


def _part(part: Part, wanted: Sequence[bool], levels: Sequence[int], columns: dict[str, list[Any]]) -> str:
    tokens = []
    for run in view.runs_of(part, wanted):
        if run.shown:
            tokens += [_token(i, levels[i], columns) for i in range(run.start, run.stop)]
        else:
            selected = sum(columns["selected"][run.start : run.stop])
            also = f", {selected:,} recomputed" if selected else ""
            tokens.append(f"<em> … {run.stop - run.start:,} tokens{also} … </em>")
    return (
        f'<div class="part o-{part.origin}" style="background-image:none"><span class="dim">{_title(part)}</span>'
        f'<div class="toks">{"".join(tokens)}</div></div>'
    )


_STATUS_CLASS = {"recomputed": "r", "computed": "c", "exact": "e", "reused": ""}


def _token(i: int, level: int, columns: dict[str, list[Any]]) -> str:
    status, score, old = columns["status"][i], columns["score"][i], columns["old_position"][i]
    said = f"#{i} {status}" + ("" if score is None else f", score {score:.3g}")
    said += f", {old}→{i}" if old is not None and old != i else ""
    names = " ".join(name for name in (f"s{level}" if level else "", _STATUS_CLASS[status]) if name)
    text = columns["text"][i]
    shown = escaped(clipped(visible(text)))
    ends_line = "\n" if "\n" in text else ""
    kind = f' class="{names}"' if names else ""
    return f'<i{kind} title="{said}">{shown}</i>{ends_line}'


# --- maps -------------------------------------------------------------------------------------------------------------

_MAPS = {
    "key_deviation": "Keys: reused against computed, ‖difference‖ ÷ ‖computed‖",
    "value_deviation": "Values: reused against computed, ‖difference‖ ÷ ‖computed‖",
    "attention": "Attention from the suffix, times the mean over all tokens",
}


def _maps(trace: BlendTrace) -> str:
    if trace.maps is None:
        return ""
    drawn = [_map(trace, name, view.map_levels(values, name)) for name, values in trace.maps.items().items()]
    return f"<details open><summary>Layer × token</summary>{''.join(drawn)}</details>"


def _map(trace: BlendTrace, name: str, grid: Grid) -> str:
    bounds = view.ATTENTION if name == "attention" else view.DEVIATIONS
    names = [f"&lt; {bounds[0]:g}", *(f"≥ {bound:g}" for bound in bounds)]
    key = "".join(f'<span><b class="s{level}"></b>{text}</span>' for level, text in enumerate(names, 1))
    note = _binned_note(trace.num_tokens, len(grid[0]), "tokens", "highest") if grid else ""
    height = max(60, min(200, 7 * len(grid)))
    return (
        f'<p class="note">{_MAPS[name]}{note}; blank: not known</p><div class="map"><div><span>layer 0</span>'
        f"<span>{trace.num_layers - 1}</span></div><div>{_svg(grid, 's', height)}</div></div>"
        f'<div class="key">{key}</div>'
    )


def _binned_note(count: int, shown: int, what: str, which: str) -> str:
    return f"; a column is {count / shown:.0f} {what}, the {which} counts" if count > shown else ""


def _mask(trace: BlendTrace) -> str:
    grid = view.mask_of(trace, 30)
    if not grid or not trace.blended:
        return ""
    rows = len(view.computed_rows(trace))
    key = "".join(
        f'<span><b class="plain" style="background:var(--{colour})"></b>{text}</span>'
        for colour, text in (
            ("bg", "not seen: a later position"),
            ("key1", "reused key"),
            ("key2", "some recomputed"),
            ("key3", "computed key"),
        )
    )
    return (
        f"<details open><summary>Who sees whom <span class='dim'>{rows:,} computed rows × {trace.num_tokens:,} keys"
        "</span></summary>"
        f'<div class="map"><div><span>first row</span><span>last</span></div><div>{_svg(grid, "k", 150)}</div></div>'
        f'<div class="key">{key}</div></details>'
    )


def _svg(grid: Grid, prefix: str, height: int) -> str:
    columns = len(grid[0])
    return (
        f'<svg viewBox="0 0 {columns} {len(grid)}" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'style="height:{height}px" role="img">{_paths(grid, prefix)}</svg>'
    )


def _paths(grid: Grid, prefix: str) -> str:
    """A path per level; neighbours of one level are one rectangle."""
    drawn: dict[int, list[str]] = {}
    for y, row in enumerate(grid):
        x = 0
        while x < len(row):
            width = next((w for w in range(1, len(row) - x) if row[x + w] != row[x]), len(row) - x)
            if row[x]:
                drawn.setdefault(row[x], []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return "".join(f'<path class="{prefix}{level}" d="{"".join(d)}"/>' for level, d in sorted(drawn.items()))


# --- time -------------------------------------------------------------------------------------------------------------


def _time(trace: BlendTrace) -> str:
    lanes = view.lanes_of(trace)
    end = max((interval.stop_ms for _, intervals in lanes for interval in intervals), default=0.0)
    if not end:
        return ""
    drawn = "".join(
        f'<div class="lane"><span>{heading}</span><div>{_bars(intervals, end)}</div></div>'
        for heading, intervals in lanes
    )
    traced = ", with all that level full notes" if trace.level == "full" else ""
    phases = " · ".join(f"{escaped(name.replace('_', ' '))} {ms:,.1f} ms" for name, ms in trace.phase_ms.items())
    return f'<h3>Time <span class="dim">{end:,.1f} ms{traced}: {phases}</span></h3>{drawn}'


def _bars(intervals: Iterable[Interval], end: float) -> str:
    colours: dict[str, str] = {}
    bars = []
    for one in list(intervals)[:400]:
        colour = colours.setdefault(one.name, _PHASES[len(colours) % len(_PHASES)])
        share = 100 * one.ms / end
        name = one.name.replace("_", " ") if one.layer is None else str(one.layer)
        said = f"{one.name}{'' if one.layer is None else f', layer {one.layer}'}: {one.ms:.2f} ms"
        text = escaped(name) if share > 1.2 * len(name) + 0.8 else ""
        bars.append(
            f'<u class="o-{colour}" style="left:{100 * one.start_ms / end:.2f}%;width:{share:.2f}%" '
            f'title="{escaped(said)}">{text}</u>'
        )
    return "".join(bars)
