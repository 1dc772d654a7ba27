"""Rows as a Markdown table, and as a picture of quality against cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...display import palette
from ...util import figure_class

Rows = Sequence[dict[str, Any]]

EXACT_KL = 1e-6  # nats; below it a method differs from full prefill by rounding only

_COLOURS = (palette.BLUE, palette.VERMILION, palette.GREEN, palette.PURPLE, palette.SKY, palette.BLACK, palette.ORANGE)
_MARKERS = "osD^vPX*<>hp"
_LABEL_STEP = 0.045  # of the axes' height, between the labels of two lines


# --- the table ------------------------------------------------------------------------------------------------------


def markdown_table(rows: Rows) -> str:
    """A GitHub table; columns that no row has a figure for are left out."""
    cells = [_cells(row) for row in rows]
    headings = [heading for heading in cells[0] if any(row[heading] for row in cells)]
    lines = [headings, ["---"] * 2 + ["---:"] * (len(headings) - 2)]
    lines += [[row[heading] or "–" for heading in headings] for row in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Heading -> text; empty where there is no figure."""
    return {
        "method": row["method"],
        "ratio": _text(row["ratio"], "{:g}"),
        "n": str(row["n"]),
        "KL, nats [95 %]": _with_interval(row["kl"], row["kl_ci95"], 4),
        "KL ÷ baseline's [95 %]": _with_interval(row["kl_vs_baseline"], row["kl_vs_baseline_ci95"], 2),
        "top-1": _text(row["top1_agreement"], "{:.1%}"),
        "F1": _text(row["f1"], "{:.3f}"),
        "F1 of ids": _text(row["f1_ids"], "{:.3f}"),
        "ROUGE-L": _text(row["rouge_l"], "{:.3f}"),
        "TTFT, ms": _text(row["ttft_ms"], "{:.0f}"),
        "speed-up": _text(row["ttft_speedup"], "{:.1f}×"),
        "computed": _text(row["recomputed_pairs_share"], "{:.1%}"),
    }


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None or interval is None:
        return ""
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# --- the picture ----------------------------------------------------------------------------------------------------


def require_matplotlib() -> Any:
    """What pictures are drawn with; raises `ImportError` where it is missing."""
    return figure_class("eval")


def plot(rows: Rows, file: Path, title: str) -> None:
    """Draws `figure` into a file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file's ending is none that matplotlib knows.
    """
    figure(rows, title).savefig(file)


def figure(rows: Rows, title: str) -> Any:
    """KL (log) against the share of a full prefill that is computed: a line per method, a point per ratio.

    Methods that are exact have no place on a logarithmic axis and are named below it.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawing = require_matplotlib()(figsize=(9, 5.6), dpi=150, layout="constrained")
    axes = drawing.add_subplot()
    drawn = [row for row in rows if row["kl"] >= EXACT_KL]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in drawn:
        by_method.setdefault(row["method"], []).append(row)
    for i, line in enumerate(by_method.values()):
        _draw_line(axes, sorted(line, key=lambda row: row["recomputed_pairs_share"]), i)
    _dress(axes, title, _exact_note([row for row in rows if row["kl"] < EXACT_KL]))
    _label_lines(axes, by_method)
    return drawing


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _draw_line(axes: Any, rows: Rows, i: int) -> None:
    cost = [100 * row["recomputed_pairs_share"] for row in rows]
    kl = [row["kl"] for row in rows]
    errors = [[max(0.0, row["kl"] - row["kl_ci95"][0]) for row in rows]]
    errors += [[max(0.0, row["kl_ci95"][1] - row["kl"]) for row in rows]]
    axes.errorbar(cost, kl, errors, fmt="none", ecolor=_colour(i), elinewidth=0.8, alpha=0.3)
    style = "-" if i < len(_COLOURS) else "--"
    axes.plot(cost, kl, style, marker=_MARKERS[i % len(_MARKERS)], color=_colour(i), markersize=6, linewidth=1.5)


def _dress(axes: Any, title: str, note: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
    axes.set_xlim(left=0)
    axes.set_ylabel("KL(full prefill ‖ method), nats; bars: 95 % of the mean")
    axes.set_xlabel("computed share of a full prefill's (token, layer) pairs; left and low is better" + note)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(which="major", color="0.9", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _exact_note(rows: Rows) -> str:
    if not rows:
        return ""
    named = ", ".join(f"{row['method']} ({row['recomputed_pairs_share']:.0%} computed)" for row in rows)
    return f"\nexact, not drawn: {named}"


def _label_lines(axes: Any, by_method: dict[str, list[dict[str, Any]]]) -> None:
    """A line's name right of the axes, as near to the height of its last point as its neighbours leave room; a single
    point's name beside it."""
    axes.figure.draw_without_rendering()  # settles the limits
    inverse = axes.transAxes.inverted()
    ends = []
    for i, (method, rows) in enumerate(by_method.items()):
        last = max(rows, key=lambda row: row["recomputed_pairs_share"])
        point = (100 * last["recomputed_pairs_share"], last["kl"])
        look = {"color": _colour(i), "fontsize": 9, "va": "center"}
        if len(rows) == 1:
            axes.annotate(method, point, xytext=(7, 7), textcoords="offset points", **look)
        else:
            ends.append((inverse.transform(axes.transData.transform(point))[1], point, method, look))
    ends.sort(key=lambda end: end[0])
    for height, (_, point, method, look) in zip(spread([end[0] for end in ends], _LABEL_STEP), ends):
        leader = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.6, "alpha": 0.5, "shrinkA": 1, "shrinkB": 4}
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(method, point, **place, **look, arrowprops=leader)


def spread(heights: Sequence[float], step: float) -> list[float]:
    """Rising heights, moved so that neighbours are `step` apart: those too close spread about their middle.

    >>> spread([0.5, 0.5], 0.1)
    [0.45, 0.55]
    """
    groups: list[list[float]] = []  # [middle of the wanted heights, how many]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < step * (groups[-1][1] + groups[-2][1]) / 2:
            (second, more), (first, some) = groups.pop(), groups.pop()
            groups.append([(first * some + second * more) / (some + more), some + more])
    return [middle + step * (i - (count - 1) / 2) for middle, count in groups for i in range(int(count))]
