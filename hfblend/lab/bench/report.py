"""Results as Markdown tables, and as a picture of time and speed-up against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...display import palette
from ...util import figure_class

Row = dict[str, Any]
Results = dict[str, Any]

# A method's ratios share a colour, and get a lighter tint the larger they are.
_BASELINES = {"full_prefill": palette.BLACK, "prefix_reuse": palette.GREY, "full_reuse": palette.PURPLE}
_COLOURS = (palette.BLUE, palette.VERMILION, palette.GREEN, palette.ORANGE, palette.SKY)
_MARKERS = "osD^vP"
_STROKES = ("-", ":", "--", "-.")

# what an axis shows, and how to read it
_TIMES = ("time to first token, ms", "low is better")
_SPEED_UPS = ("speed-up over full prefill", "high is better; {limit}: the limit that the FLOPs set")


# --- text -----------------------------------------------------------------------------------------------------------


def title(results: Results) -> str:
    """What was measured, on what: a line each."""
    layout = results["settings"]["layout"]
    return (
        f"{results['model']}, {results['dtype']}, {results['attention']}; prefix {layout['prefix']}, chunks of "
        f"{layout['chunk']}, suffix {layout['suffix']} tokens\n"
        f"{results['machine']}, transformers {results['transformers']}"
    )


def markdown(results: Results) -> str:
    """The title, the table, and what was measured beside it."""
    parts = [title(results), markdown_table([cells(row) for row in results["rows"]]), *footnotes(results)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A GitHub table of rows heading -> text; columns that no row has a figure for are left out."""
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)] if rows else []
    lines = [headings, ["---"] * len(headings)]
    lines += [[row[heading] or "–" for heading in headings] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Row) -> dict[str, str]:
    """Heading -> text; empty where there is no figure."""
    return {
        "tokens": f"{row['tokens']:,}",
        "method": row["method"],
        "ratio": f"{row['ratio']:g}",
        "chunks in": row["chunks_in"] or "",
        "TTFT, ms": row["failed"] or _with_range(row["ttft_ms"], row["ttft_ms_range"], 1),
        "speed-up": _with_range(row["speed_up"], row["speed_up_range"], 2),
        "computed": _text(row["pairs_share"], "{:.1%}"),
        "TFLOP": _text(row["flops"], "{:.3g}", 1e-12),
        "limit": _text(row["speed_up_limit"], "{:.1f}"),
        "reached": _text(row["share_of_limit"], "{:.0%}"),
        "roofline, ms": _text(row["roofline_ms"], "{:.1f}"),
        "peak, GiB": _text(row["peak_gib"], "{:.2f}"),
        "reused, MB": _text(row["bytes_reused"], "{:,.1f}", 1e-6),
        "load, ms": _text(row["load_ms"], "{:.1f}"),
        "÷ first place": _text(row["over_first_place"], "{:.2f}"),
        "phases, ms": ", ".join(f"{phase} {ms:.1f}" for phase, ms in row["phase_ms"].items()),
    }


def footnotes(results: Results) -> list[str]:
    """Loading, decoding, throughput, batches and the machine's peaks, a line each."""
    peaks = results["peaks"]
    load = peaks["load_bytes_per_s"]
    return [
        *(_loading_note(found) for found in results["loading"]),
        *(_decoding_note(found) for found in results["decoding"]),
        *(_throughput_note(found) for found in results["throughput"]),
        *(_batching_note(found) for found in results["batching"]),
        f"Measured peaks: {peaks['flops_per_s'] / 1e12:.3g} TFLOP/s, {peaks['bytes_per_s'] / 1e9:.4g} GB/s"
        + ("." if load is None else f", {load / 1e9:.3g} GB/s from pinned RAM."),
    ]


def _loading_note(found: dict[str, Any]) -> str:
    ways = {"load_ms": "to the device, realigned", "read_ms": "through the store", "plain_read_ms": "a plain read"}
    rates = [
        f"{name} {found[ms]:.1f} ms ({found['bytes'] / found[ms] / 1e6:.3g} GB/s)"
        for ms, name in ways.items()
        if ms in found
    ]
    loaded = f"{found['bytes'] / 1e6:,.1f} MB of {found['tokens']:,} tokens from {found['place']}"
    return f"Loading {loaded}: {', '.join(rates)}."


def _decoding_note(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"Decoding behind {found['tokens']:,} tokens: {found['failed']}."
    low, high = found["blended_over_stock_range"]
    return (
        f"Decoding {found['decoded_tokens']} tokens behind {found['tokens']:,}: stock "
        f"{found['stock_tokens_per_s']:.1f} tokens/s, after {found['method']} {found['ratio']:g} "
        f"{found['blended_tokens_per_s']:.1f} tokens/s; "
        f"ratio {found['blended_over_stock']:.2f} ({low:.2f} … {high:.2f})."
    )


def _throughput_note(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"Throughput at {found['tokens']:,} tokens: {found['failed']}."
    return (
        f"Throughput, {found['prompts']} prompts of {found['tokens']:,} tokens, {found['chunks_per_prompt']} chunks "
        f"each of a pool of {found['chunks_in_pool']}: full prefill {found['stock_prompts_per_s']:.3g} prompts/s, "
        f"{found['method']} {found['ratio']:g} {found['blended_prompts_per_s']:.3g} prompts/s; ratio "
        f"{found['blended_over_stock']:.2f}."
    )


def _batching_note(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"A batch of prompts of {found['tokens']:,} tokens: {found['failed']}."
    low, high = found["single_over_batch_range"]
    return (
        f"First tokens of {found['prompts']} prompts of {found['tokens']:,} tokens: full prefill "
        f"{found['stock_single_ms']:.1f} ms one by one, {found['stock_batch_ms']:.1f} ms in one batch; "
        f"{found['method']} {found['ratio']:g} {found['blended_single_ms']:.1f} ms one by one, "
        f"{found['blended_batch_ms']:.1f} ms in one batch; "
        f"ratio {found['single_over_batch']:.2f} ({low:.2f} … {high:.2f})."
    )


def _text(value: float | None, form: str, unit: float = 1) -> str:
    return "" if value is None else form.format(value * unit)


def _with_range(value: float | None, bounds: Sequence[float] | None, digits: int) -> str:
    if value is None or bounds is None:
        return ""
    low, high = bounds
    return f"{value:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


# --- the picture ----------------------------------------------------------------------------------------------------


def require_matplotlib() -> Any:
    """What pictures are drawn with; raises `ImportError` where it is missing."""
    return figure_class("plots")


def plot(results: Results, file: Path) -> None:
    """Draws `figure` into a file.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file's ending is none that matplotlib knows.
    """
    figure(results).savefig(file)


def figure(results: Results) -> Any:
    """Time to first token against tokens, and speed-up with its limit dashed; a line per method, ratio and place.

    Raises:
        ImportError: matplotlib is missing.
    """
    drawing = require_matplotlib()(figsize=(12, 5.4), dpi=150, layout="constrained")
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["rows"]:
        if row["failed"] is None:
            lines.setdefault((row["method"], row["ratio"], row["chunks_in"]), []).append(row)
    looks = _looks(list(lines))
    lengths = sorted({row["tokens"] for row in results["rows"]})
    if len(lengths) == 1:
        _draw_bars(drawing, [(looks[line], row) for line, (row,) in lines.items()], lengths[0])
    else:
        _draw_lines(drawing, [(looks[line], rows) for line, rows in lines.items()], lengths)
    drawing.suptitle(title(results), x=0.01, ha="left", fontsize=10)
    return drawing


def _draw_bars(figure: Any, bars: Sequence[tuple[dict[str, Any], Row]], length: int) -> None:
    """One length: a bar per line of the table, its limit a stroke."""
    times, speed_ups = figure.subplots(1, 2, sharey=True)
    names, colours = [look["label"] for look, _ in bars], [look["color"] for look, _ in bars]
    times.barh(names, [row["ttft_ms"] for _, row in bars], color=colours)
    for name, (look, row) in zip(names, bars):
        speed_ups.barh(name, (row["speed_up"] or 1) - 1, left=1, color=look["color"])
        if row["speed_up_limit"] is not None:
            speed_ups.plot(row["speed_up_limit"], name, "|", color=look["color"], markersize=18, markeredgewidth=2)
    times.invert_yaxis()
    for axes, name, note in ((times, *_TIMES), (speed_ups, *_SPEED_UPS)):
        axes.set_title(note.format(limit="strokes"), loc="left", fontsize=9, color="0.35")
        axes.set_xlabel(f"{name}, {length:,} tokens")
        axes.spines[["top", "right"]].set_visible(False)
    speed_ups.set_xscale("log")
    _plain_numbers(speed_ups.xaxis)


def _draw_lines(figure: Any, lines: Sequence[tuple[dict[str, Any], Sequence[Row]]], lengths: Sequence[int]) -> None:
    times, speed_ups = figure.subplots(1, 2)
    for look, rows in lines:
        _draw(times, rows, "ttft_ms", look)
        if rows[0]["method"] != "full_prefill":
            limit = {"color": look["color"], "linewidth": 1, "alpha": 0.7, "linestyle": "--"}
            _draw(speed_ups, rows, "speed_up", look)
            _draw(speed_ups, rows, "speed_up_limit", limit)
    speed_ups.axhline(1, color="black", linewidth=1)
    _dress(times, lengths, *_TIMES)
    _dress(speed_ups, lengths, *_SPEED_UPS)
    figure.legend(*times.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)


def _looks(lines: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """How each line is drawn: colour by method, tint and marker by ratio, stroke by where chunks are."""
    methods = [name for name in dict.fromkeys(method for method, _, _ in lines) if name not in _BASELINES]
    ratios = {name: sorted({ratio for method, ratio, _ in lines if method == name}) for name in methods}
    places = list(dict.fromkeys(place for *_, place in lines if place))
    looks = {}
    for method, ratio, place in lines:
        name, i = method, 0
        colour: Any = _BASELINES.get(method)
        if colour is None:
            i = ratios[method].index(ratio)
            colour = _tint(_COLOURS[methods.index(method) % len(_COLOURS)], i / (len(ratios[method]) + 1))
            name = f"{method} {ratio:g}"
        at = places.index(place) if place else 0
        looks[method, ratio, place] = {
            "color": colour,
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 6,
            "markerfacecolor": "white" if at else colour,
            "linestyle": _STROKES[at % len(_STROKES)],
            "linewidth": 1.5,
            "label": name + (f", {place}" if place and len(places) > 1 else ""),
        }
    return looks


def _tint(colour: str, share_of_white: float) -> tuple[float, ...]:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(channel + (1 - channel) * share_of_white for channel in channels)


def _draw(axes: Any, rows: Sequence[Row], figure: str, look: dict[str, Any]) -> None:
    points = [(row["tokens"], row[figure]) for row in sorted(rows, key=lambda row: row["tokens"]) if row[figure]]
    if points:
        axes.plot(*zip(*points), **look)


def _dress(axes: Any, lengths: Sequence[int], name: str, note: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,g}")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(name)
    axes.set_title(note.format(limit="dashed"), loc="left", fontsize=9, color="0.35")
    axes.grid(which="major", color="0.9", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, … on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())
