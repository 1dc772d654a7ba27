"""TTFT with chunks at a URL, against the same chunks in memory and in a folder.

    python benchmarks/shared_store.py redis://127.0.0.1:6379/0

SmolLM2, random ids. Places take turns; no store stands before the folder or the URL, so that each turn reads all.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

import hfblend
from hfblend.demo.model import load
from hfblend.store import DiskStore, MemoryStore, ReadsAhead, RemoteStore


def prompt_of(chunks: int, seed: int = 0) -> hfblend.Prompt:
    """A prompt of 32 tokens, chunks of 512, and 32 tokens."""
    ids = torch.randint(100, 40_000, (64 + 512 * chunks,), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [ids[32 + 512 * i : 32 + 512 * (i + 1)] for i in range(chunks)]
    return hfblend.Prompt.from_ids(ids[:32], parts, ids[-32:])


def ttft_ms(model: Any, inputs: Any) -> float:
    began = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return 1000 * (time.perf_counter() - began)


class Switch:
    """One of several stores at a time: a model is patched once, which takes longer than a prompt."""

    def __init__(self, stores: dict[str, Any]) -> None:
        self.stores, self.now = stores, next(iter(stores))

    def put(self, key: str, chunk_kv: Any) -> None:
        self.stores[self.now].put(key, chunk_kv)

    def open(self, key: str) -> Any:
        return self.stores[self.now].open(key)

    def read_ahead(self, keys: Sequence[str]) -> None:
        if isinstance(self.stores[self.now], ReadsAhead):
            self.stores[self.now].read_ahead(keys)


def measured(model: Any, prompt: hfblend.Prompt, stores: dict[str, Any], ratio: float, turns: int) -> dict[str, float]:
    """The median TTFT in ms at each place; raises `RuntimeError` if a chunk was not found."""
    seen: dict[str, list[float]] = {name: [] for name in stores}
    config, switch = hfblend.BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0), Switch(stores)
    with hfblend.patch(model, config=config, store=switch) as blender:
        for turn in range(-2, turns):  # the first stores, and the second warms up
            for switch.now in stores:
                ms = ttft_ms(model, prompt.inputs())
                if turn >= 0:
                    seen[switch.now].append(ms)
                if turn >= -1 and blender.trace.misses:
                    raise RuntimeError(f"{blender.trace.misses} chunks were not found in {stores[switch.now]}")
    return {name: statistics.median(times) for name, times in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--chunks", default="4,11", help="of 512 tokens, in a prompt")
    parser.add_argument("--ratios", default="0,0.15")
    parser.add_argument("--turns", type=int, default=7)
    asked = parser.parse_args()
    model, _ = load(None, device="cpu", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        stores = {"memory": MemoryStore("4GB"), "disk": DiskStore(folder), "URL": RemoteStore(asked.url)}
        for chunks in map(int, asked.chunks.split(",")):
            for ratio in map(float, asked.ratios.split(",")):
                found = measured(model, prompt_of(chunks, seed=chunks), stores, ratio, asked.turns)
                times = ", ".join(f"{name} {ms:,.0f} ms" for name, ms in found.items())
                print(f"{64 + 512 * chunks:,} tokens, ratio {ratio:g}: {times}; ", end="")
                print(f"URL / disk {found['URL'] / found['disk']:.2f}", flush=True)
        print(stores["URL"])


if __name__ == "__main__":
    main()
