"""`hfblend profile`: measures this machine, and shows what the controller would decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from ..config import BlendConfig
from .common import console, load, numbers, print_json, store_at, wake
from .completion import RULES, values
from .options import Device, DType, Model, PrintJson

if TYPE_CHECKING:
    from ..controller import Controller, Profile

CHUNK, SUFFIX = 512, 32  # tokens of the forecast prompts' chunks and suffix


def profile(
    store: Annotated[str | None, Option(help="Folder or URL whose loading is measured too.")] = None,
    model: Model = None,
    tokens: Annotated[str, Option(help="Lengths to forecast, separated by commas.")] = "1024,4096,16384",
    selection: Annotated[str, Option(help="The rule to forecast.", autocompletion=values(RULES))] = "kv_deviation",
    least_ratio: Annotated[float, Option(help="The paper's r*.", min=0, max=1)] = 0.15,
    refresh: Annotated[bool, Option("--refresh", help="Measure again.")] = False,
    device: Device = None,
    dtype: DType = None,
    as_json: PrintJson = False,
) -> None:
    """Measure prefilling, blending and loading once, and show what recompute_ratios="auto" would decide.

    Example: hfblend profile --store chunks --tokens 2048,8192
    """
    lengths = numbers(tokens, int, "--tokens")
    if not lengths or min(lengths) <= SUFFIX:
        raise ValueError(f"--tokens must be above {SUFFIX}, got {tokens!r}.")
    config = BlendConfig(selection=selection, recompute_ratios="auto", least_ratio=least_ratio)  # type: ignore[arg-type]

    wake()
    from ..controller import Controller
    from ..measure.profile import profile_of
    from ..store import MemoryStore
    from ..support.registry import model_of

    where = MemoryStore() if store is None else store_at(store)
    loaded, _, _ = load(model, device, dtype)
    found = profile_of(loaded, where, config, refresh=refresh)
    rows = _forecasts(Controller(found, least_ratio), lengths, model_of(loaded).kv_bytes_per_token)
    if as_json:
        print_json({"profile": asdict(found), "forecasts": rows})
    else:
        _show(found, rows)


def _forecasts(controller: Controller, tokens: Sequence[int], bytes_per_token: int) -> list[dict[str, Any]]:
    """A row per length and tier: the decision, in ms, if all chunk KV lies there and no chunk is exact."""
    from ..controller import TIERS, BlendShape, Load

    tiers = [tier for tier in reversed(TIERS) if tier == "memory" or tier in controller.profile.tiers]
    rows = []
    for length in tokens:
        shape, reused = BlendShape(length, 0, SUFFIX), length - SUFFIX
        load = Load(-(-reused // CHUNK), reused * bytes_per_token)
        cheapest = controller.cheapest_tier(shape, load)
        for tier in tiers:
            decision = asdict(controller.decide(shape, {tier: load}))
            rows.append({"tokens": length, "tier": tier, "cheapest_that_hides": tier == cheapest, **decision})
    return rows


def _show(profile: Profile, rows: list[dict[str, Any]]) -> None:
    console.print(profile.made_of, highlight=False, soft_wrap=True)
    for tier, cost in profile.tiers.items():
        rate = f"{1e3 * cost.per_entry:.2f} ms a chunk and {cost.bytes_per_s / 1e9:.2f} GB/s"
        console.print(f"Loading from {tier}: {rate}", highlight=False)
    table = Table(caption="* the cheapest tier whose loading is hidden")
    headings = ("tokens", "chunk KV in", "full prefill, ms", "computing, ms", "loading, ms", "decision", "TTFT, ms")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("chunk KV in", "decision") else "right")
    for row in rows:
        decided = "full prefill" if row["ratio"] is None else f"recompute {row['ratio']:.0%}"
        table.add_row(
            f"{row['tokens']:,}", row["tier"] + (" *" if row["cheapest_that_hides"] else ""),
            *(f"{row[name]:.0f}" for name in ("full_ms", "compute_ms", "load_ms")), decided, f"{row['ttft_ms']:.0f}",
        )  # fmt: skip
    console.print(table)
