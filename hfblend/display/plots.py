"""A trace as matplotlib figures.

They are independent of pyplot and its global state: `figure.savefig(...)`, or the last line of a notebook's cell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..arguments import require
from ..trace.trace import BlendTrace
from ..util import figure_class
from . import palette
from .view import lanes_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(
    width: float, height: float, columns: int = 1, *, dpi: int | None = None, **more: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, without a frame at the top and on the right; `ImportError` without matplotlib."""
    figure_class("plots")  # or says what is missing
    from .figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **more)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_scores(trace: BlendTrace) -> Figure:
    """Left: each scored token's score by its position, the recomputed ones marked. Right: all scores, falling.

    >>> hfblend.plot_scores(blender.trace).savefig("scores.png")  # doctest: +SKIP

    Raises:
        ValueError: a trace in which nothing was ranked.
        ImportError: matplotlib is missing.
    """
    require("trace", trace, BlendTrace, "a hfblend.BlendTrace, say blender.trace")
    if trace.scores is None or trace.candidate_idx is None or not len(trace.scores):
        raise ValueError("No token of this trace was ranked; it needs chunks that are reused, and a ratio below 1.")
    idx, scores = trace.candidate_idx.cpu(), trace.scores.detach().float().cpu()
    is_chosen = torch.isin(idx, idx.new_empty(0) if trace.selected_idx is None else trace.selected_idx.cpu())
    rule = str(trace.settings.get("selection", "")).replace("_", " ")
    figure, (left, right) = new_figure(9.6, 3.8, 2, width_ratios=(2, 1))
    for mask, marker, colour, label in (
        (~is_chosen, ".", palette.GREY, "reused"),
        (is_chosen, "^", palette.VERMILION, "recomputed"),
    ):
        left.plot(idx[mask].tolist(), scores[mask].tolist(), marker, color=colour, markersize=4, label=label)
    for chunk in trace.chunks:
        left.axvline(chunk.span[0], color="0.85", linewidth=0.8, zorder=0)
    left.set(xlabel="position in the prompt; lines: chunks begin", ylabel=f"score, {rule}")
    left.legend(frameon=False)
    falling = scores.sort(descending=True).values
    percent = [100 * (i + 1) / len(falling) for i in range(len(falling))]
    right.plot(percent, falling.tolist(), color=palette.BLUE)
    right.axvline(
        100 * trace.selected_tokens / len(falling), color=palette.VERMILION, linestyle="--", label="recomputed"
    )
    right.set(xlabel="scored tokens, highest first (%)")
    right.legend(frameon=False)
    if float(scores.min()) > 0:
        for axes in (left, right):
            axes.set_yscale("log")
    return figure


def plot_timeline(trace: BlendTrace) -> Figure:
    """Phases, and at level `"full"` the layers loaded and computed below them.

    Raises:
        ValueError: a trace without phases.
        ImportError: matplotlib is missing.
    """
    lanes = lanes_of(require("trace", trace, BlendTrace, "a hfblend.BlendTrace, say blender.trace"))
    if not lanes:
        raise ValueError("This trace has no phases: the call was not blended.")
    figure, (axes,) = new_figure(9.6, 1 + 0.7 * len(lanes))
    colours: dict[str, str] = {}
    for y, (_, intervals) in enumerate(lanes):
        for one in intervals:
            colour = colours.setdefault(one.name, palette.LINES[len(colours) % len(palette.LINES)])
            axes.barh(y, max(one.ms, 1e-3), left=one.start_ms, color=colour, edgecolor="white", linewidth=0.5)
    for name, colour in colours.items():
        axes.barh([0], [0], color=colour, label=name.replace("_", " "))
    axes.set_yticks(range(len(lanes)), [heading for heading, _ in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure
