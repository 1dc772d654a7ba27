"""The controller's forecasts against the clock: TTFT by length, ratio, rule, and place of the chunk KV.

    python benchmarks/controller.py --plot controller.png            SmolLM2, on a CPU or a GPU
    python benchmarks/controller.py --shape llama-8b --tokens 4096 8192 16384 --dtype bfloat16

The profile is measured first, as `recompute_ratios="auto"` does, with shorter prompts and another chunk length than
those forecast here. Files are read cold: the system's copies in RAM are dropped before each call, where it lets go.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hfblend
from hfblend.config import BlendConfig
from hfblend.controller import BlendShape, Controller, Load
from hfblend.demo import model as demo_model
from hfblend.lab.clock import timed
from hfblend.lab.synthetic import SHAPES, Layout, PromptMaker, random_model
from hfblend.measure.divergence import describe_machine
from hfblend.measure.profile import measure
from hfblend.store import DiskStore, MemoryStore, Store
from hfblend.support.registry import model_of
from hfblend.util import figure_class

RULES = ("kv_deviation", "suffix_attention")
COLOURS = {"memory": "#0072B2", "ram": "#009E73", "page_cache": "#E69F00", "disk": "#D55E00", "full prefill": "#000000"}


@dataclass(frozen=True)
class Point:
    """One forecast and its measurement, in ms."""

    tokens: int
    rule: str
    place: str
    ratio: float
    forecast_ms: float
    measured_ms: float


def points(model: Any, lengths: list[int], ratios: list[float], turns: int, folder: Path) -> Iterator[Point]:
    """Measures, rule by rule and length by length."""
    hf_model, on_disk = model_of(model), DiskStore(folder)
    for rule in RULES:
        config = BlendConfig(selection=rule, min_reused_tokens=0)
        controller = Controller(measure(model, on_disk, config))
        print(f"{rule}: {controller.profile}", flush=True)
        for tokens in lengths:
            prompt = PromptMaker(model.config.vocab_size, Layout(chunk=256), seed=tokens).prompt(tokens)
            stores: dict[str, Store] = {"memory": MemoryStore(2**50), "page_cache": on_disk, "disk": on_disk}
            if hf_model.device.type == "cuda":
                stores["ram"] = MemoryStore(2**50, "cpu")
            first = hfblend.blend(model, prompt, store=stores["memory"], config=config)
            chunks = [chunk for chunk in (first.trace.prefix, *first.trace.chunks) if chunk is not None]
            for store in {id(one): one for one in stores.values()}.values():
                for chunk in chunks:
                    store.put(chunk.key, stores["memory"].open(chunk.key))
            os.sync()
            exact = len(prompt) - first.trace.candidate_idx.numel() - first.trace.fresh_idx.numel()
            shape = BlendShape(len(prompt), exact, first.trace.fresh_idx.numel())
            ids = prompt.input_ids.to(hf_model.device)
            with torch.no_grad():
                run = functools.partial(hf_model.last_logits, input_ids=ids)
                ms = median(timed(run, hf_model.device)[0] for _ in range(1 + turns))
            full = 1e3 * controller.full_s(replace(shape, exact=0))
            yield Point(len(prompt), rule, "full prefill", 1.0, full, ms)
            for place, store in stores.items():
                for ratio in ratios:
                    at_ratio = replace(config, recompute_ratios=(ratio,))
                    times = []
                    for turn in range(-2, turns):
                        if place == "disk":
                            for chunk in chunks:
                                on_disk.drop_from_ram(chunk.key)
                        ms, _, result = timed(
                            lambda: hfblend.blend(model, prompt, store=store, config=at_ratio), hf_model.device  # noqa: B023
                        )  # fmt: skip
                        if turn >= 0:
                            times.append(ms)
                    load = controller.load_s({place: Load(len(chunks), result.trace.bytes_reused)})
                    forecast = 1e3 * controller.ttft_s(controller.compute_s(shape, ratio), load)
                    yield Point(len(prompt), rule, place, ratio, forecast, median(times))


def draw(found: list[Point], title: str, file: Path) -> None:
    """Measured against forecast, both logarithmic; a quarter off in grey."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = figure_class("plots")(figsize=(10, 5), dpi=150, layout="constrained")
    low = min(min(p.forecast_ms, p.measured_ms) for p in found) / 1.3
    high = max(max(p.forecast_ms, p.measured_ms) for p in found) * 1.3
    for axes, rule in zip(figure.subplots(1, 2, sharex=True, sharey=True), RULES):
        axes.fill_between([low, high], [low / 1.25, high / 1.25], [low * 1.25, high * 1.25], color="0.92", linewidth=0)
        axes.plot([low, high], [low, high], color="0.6", linewidth=1)
        for place in dict.fromkeys(point.place for point in found):
            own = [point for point in found if (point.place, point.rule) == (place, rule)]
            xs, ys = [point.forecast_ms for point in own], [point.measured_ms for point in own]
            axes.scatter(xs, ys, s=28, color=COLOURS[place], label=place.replace("_", " "), alpha=0.85, linewidth=0)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="forecast, ms")
        axes.set_title(rule, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):  # 200, 500, 1,000, …
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
    figure.axes[0].set_ylabel("measured TTFT, ms")
    figure.axes[0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of SmolLM2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 3072])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default, one for temporary files")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model = random_model(args.shape) if args.shape else demo_model.load(None, None, None)[0]
    name = f"{args.shape} shape" if args.shape else demo_model.HUB_NAME
    title = f"{name}, {str(model.dtype).removeprefix('torch.')}\n{describe_machine(model.device)}"
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="hfblend-") as folder:
        found = []
        print(
            f"{title}\n\n| tokens | rule | chunk KV in | ratio | forecast, ms | measured, ms | off by |\n"
            + "| --- " * 7
            + "|"
        )
        for one in points(model, args.tokens, args.ratios, args.turns, Path(folder)):
            found.append(one)
            off = one.forecast_ms / one.measured_ms - 1
            print(
                f"| {one.tokens:,} | {one.rule} | {one.place} | {one.ratio:g} | {one.forecast_ms:.0f} | "
                f"{one.measured_ms:.0f} | {off:+.0%} |",
                flush=True,
            )
    for place in dict.fromkeys(one.place for one in found):
        off = [abs(one.forecast_ms / one.measured_ms - 1) for one in found if one.place == place]
        print(f"{place}: off by {median(off):.0%} (median), {max(off):.0%} at most, of {len(off)}")
    if args.json:
        args.json.write_text(json.dumps({"title": title, "points": [vars(one) for one in found]}, indent=1) + "\n")
    if args.plot:
        draw(found, title, args.plot)


if __name__ == "__main__":
    main()
