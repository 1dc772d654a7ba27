"""`hfblend profile`: what this machine takes, and what the controller would decide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from .controller import TIERS, BlendShape, Controller, Load, Profile

CHUNK, SUFFIX = 512, 32  # tokens, of the prompts that are looked at


def forecasts(controller: Controller, tokens: Sequence[int], bytes_per_token: int) -> list[dict[str, Any]]:
    """A row per length and tier: what is decided where all chunk KV lies there, in ms.

    Args:
        tokens: T of each prompt, in chunks of 512 and a suffix of 32, none of them exact.
    """
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


def as_json(profile: Profile, rows: list[dict[str, Any]]) -> str:
    return json.dumps({"profile": asdict(profile), "forecasts": rows})


def show(profile: Profile, rows: list[dict[str, Any]], console: Console) -> None:
    """The tiers, and a table of forecasts."""
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
