"""Results of `hfblend eval` and `hfblend bench` as matplotlib figures.

They do not use pyplot and its global state: `figure.savefig(...)`, or the last line of a notebook's cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import described
from ..display import palette
from ..display.plots import new_figure
from .report import Row
from .report import title as title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT_KL = 1e-6  # nats; below it a method differs from full prefill by rounding only

_ANSWER_SCORES = {"string_match": "string match", "f1": "F1", "rouge_l": "ROUGE-L"}
_BASELINES = {"full_prefill": palette.BLACK, "prefix_reuse": palette.GREY, "full_reuse": palette.PURPLE}
_COLOURS = [colour for colour in palette.LINES if colour not in _BASELINES.values()]
_MARKERS = "osD^vPX*<>hp"
_STROKES = ("-", ":", "--", "-.")

Look = dict[str, Any]  # keywords of a line
Line = tuple[Look, list[Row]]


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


# --- quality ----------------------------------------------------------------------------------------------------------


def plot_quality(rows: Sequence[Row], title: str = "") -> Figure:
    """KL (log) against the share of a full prefill that is computed: a line per method, a point per ratio.

    With answers and `no_context` measured, a second picture: the share of the answers' gap that is recovered. Exact
    methods have no place on a logarithmic axis and are named below it. Raises `ImportError` without matplotlib.

    Args:
        rows: of `hfblend eval --json`, or of `hfblend.lab.eval.summary.summarize`.
    """
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"rows must be the list that hfblend eval --json wrote, got {described(rows)}.")
    score = next((name for name in _ANSWER_SCORES if any(row.get(f"{name}_recovered") is not None for row in rows)), "")
    figure, axes = new_figure(14 if score else 9, 5.6, 2 if score else 1, dpi=150)
    exact = [f"{row['method']} ({row['recomputed_pairs_share']:.0%} computed)" for row in rows if row["kl"] < EXACT_KL]
    note = f"\nexact, not drawn: {', '.join(exact)}" if exact else ""
    for one, name, better in zip(axes, ("kl", f"{score}_recovered"), ("low", "high")):
        _draw_methods(one, [row for row in rows if row["kl"] >= EXACT_KL], name)
        one.xaxis.set_major_formatter("{x:g} %")
        one.set_xlim(left=0)
        one.set_xlabel(f"computed share of a full prefill's (token, layer) pairs; left and {better} is better{note}")
        one.grid(which="major", color="0.9", linewidth=0.7)
    axes[0].set_yscale("log")
    _plain_numbers(axes[0].yaxis)
    axes[0].set_ylabel("KL(full prefill ‖ method), nats; bars: 95 % of the mean")
    if score:
        axes[1].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes[1].set_ylabel(f"{_ANSWER_SCORES[score]}: recovered share of full prefill's lead over no context")
    axes[0].set_title(title, loc="left", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _draw_methods(axes: Any, rows: Sequence[Row], name: str) -> None:
    """A line per method of the figure `name` of its rows."""
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        known = [row for row in rows if row["method"] == method and row[name] is not None]
        _draw_quality(axes, method, sorted(known, key=lambda row: row["recomputed_pairs_share"]), name, i)


def _draw_quality(axes: Any, method: str, rows: Sequence[Row], name: str, i: int) -> None:
    cost, values = [100 * row["recomputed_pairs_share"] for row in rows], [row[name] for row in rows]
    below = [max(0.0, row[name] - row[f"{name}_ci95"][0]) for row in rows]
    above = [max(0.0, row[f"{name}_ci95"][1] - row[name]) for row in rows]
    colour, style = palette.LINES[i % len(palette.LINES)], "-" if i < len(palette.LINES) else "--"
    axes.errorbar(cost, values, [below, above], fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.3)
    look = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 6, "linewidth": 1.5, "label": method}
    axes.plot(cost, values, style, color=colour, **look)


# --- time -------------------------------------------------------------------------------------------------------------


def plot_ttft(results: Mapping[str, Any]) -> Figure:
    """Time to first token, and speed-up with its limit: against tokens, or bars where there is one length.

    With decoding measured, a third picture: the time of whole answers.

    Args:
        results: of `hfblend bench --json`, or of `hfblend.lab.bench.run`.
    """
    if not isinstance(results, Mapping) or "rows" not in results:
        raise TypeError(f"results must be what hfblend bench --json wrote, with its rows, got {described(results)}.")
    by_case: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["rows"]:
        if row["failed"] is None:
            by_case.setdefault((row["method"], row["ratio"], row["chunks_in"]), []).append(row)
    looks = _looks(list(by_case))
    lines = [(looks[case], sorted(rows, key=lambda row: row["tokens"])) for case, rows in by_case.items()]
    lengths = sorted({row["tokens"] for row in results["rows"]})
    answers = [row for row in results.get("decoding", ()) if "stock_answer_ms" in row]
    figure, axes = new_figure(17 if answers else 12, 5.4, 3 if answers else 2, dpi=150)
    draw = _draw_bars if len(lengths) == 1 else _draw_lines
    draw(axes[0], axes[1], lines, lengths)
    if answers:
        _draw_answers(axes[2], answers)
    limit = "strokes" if len(lengths) == 1 else "dashed"
    better = "low is better", f"high is better; {limit}: the limit that the FLOPs set", "low is better"
    for one, note in zip(axes, better):
        one.set_title(note, loc="left", fontsize=9, color="0.35")
    figure.suptitle(title_of(dict(results)), x=0.01, ha="left", fontsize=10)
    return figure


def _draw_bars(times: Any, speed_ups: Any, lines: Sequence[Line], lengths: Sequence[int]) -> None:
    """A bar per line of the table, its limit a stroke."""
    for look, (row,) in lines:
        name, colour = look["label"], look["color"]
        times.barh(name, row["ttft_ms"], color=colour)
        speed_ups.barh(name, (row["speed_up"] or 1) - 1, left=1, color=colour)
        if row["speed_up_limit"] is not None:
            speed_ups.plot(row["speed_up_limit"], name, "|", color=colour, markersize=18, markeredgewidth=2)
    speed_ups.sharey(times)
    speed_ups.tick_params(labelleft=False)
    times.invert_yaxis()
    times.set_xlabel(f"time to first token, ms, {lengths[0]:,} tokens")
    speed_ups.set_xlabel(f"speed-up over full prefill, {lengths[0]:,} tokens")
    speed_ups.set_xscale("log")
    _plain_numbers(speed_ups.xaxis)


def _draw_answers(axes: Any, rows: Sequence[Row]) -> None:
    """A bar per length and way to answer, the tokens per second at its end."""
    looks = {"stock": ("full prefill", palette.BLACK), "static": ("static cache", palette.GREY)}
    for row in rows:
        blended = {"blended": (f"{row['method']} {row['ratio']:g}", _COLOURS[0])}
        for name, (label, colour) in (looks | blended).items():
            if f"{name}_answer_ms" in row:
                bar = axes.barh(f"{row['tokens']:,}, {label}", row[f"{name}_answer_ms"], color=colour)
                axes.bar_label(bar, [f" {row[f'{name}_tokens_per_s']:.0f}/s"], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"an answer of {rows[0]['decoded_tokens']} tokens, ms; next to it: tokens per second")


def _draw_lines(times: Any, speed_ups: Any, lines: Sequence[Line], lengths: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    for look, rows in lines:
        _draw_figure(times, rows, "ttft_ms", look)
        if rows[0]["method"] != "full_prefill":
            _draw_figure(speed_ups, rows, "speed_up", look)
            limit = {"color": look["color"], "linewidth": 1, "alpha": 0.7, "linestyle": "--"}
            _draw_figure(speed_ups, rows, "speed_up_limit", limit)
    speed_ups.axhline(1, color="black", linewidth=1)
    for axes, name in ((times, "time to first token, ms"), (speed_ups, "speed-up over full prefill")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,g}")
        _plain_numbers(axes.yaxis)
        axes.set(xlabel="tokens of the prompt", ylabel=name)
        axes.grid(which="major", color="0.9", linewidth=0.7)
    handles = times.get_legend_handles_labels()
    times.figure.legend(*handles, loc="outside right center", frameon=False, fontsize=9)


def _draw_figure(axes: Any, rows: Sequence[Row], name: str, look: Look) -> None:
    if points := [(row["tokens"], row[name]) for row in rows if row[name]]:
        axes.plot(*zip(*points), **look)


def _looks(cases: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], Look]:
    """(method, ratio, place) -> how the line is drawn: colour by method, tint and marker by ratio, stroke by place."""
    methods = [name for name in dict.fromkeys(method for method, _, _ in cases) if name not in _BASELINES]
    places = list(dict.fromkeys(place for *_, place in cases if place))
    looks = {}
    for method, ratio, place in cases:
        label, i = method, 0
        is_stock = method.startswith("full_prefill ")  # with another attention
        colour: Any = (palette.BLACK, 0.5) if is_stock else _BASELINES.get(method)
        if colour is None:
            ratios = sorted({other for name, other, _ in cases if name == method})
            label, i = f"{method} {ratio:g}", ratios.index(ratio)
            colour = _COLOURS[methods.index(method) % len(_COLOURS)], 1 - i / (len(ratios) + 1)  # and its opacity
        at = places.index(place) if place else 0
        looks[method, ratio, place] = {
            "color": colour,
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 6,
            "markerfacecolor": "white" if at else colour,
            "linestyle": _STROKES[at % len(_STROKES)],
            "linewidth": 1.5,
            "label": label + (f", {place}" if place and len(places) > 1 else ""),
        }
    return looks
