"""A stream that lasts: documents by Zipf's law that come and go, and stores that are smaller than all of them.

hfblend's default settings, prefix caching and, for some prompts, full prefill take turns, one token for each prompt.
"""

from __future__ import annotations

import hashlib
from functools import partial
from itertools import islice, pairwise, starmap, takewhile
from statistics import mean, median
from typing import Any

import numpy as np
import psutil
import torch
from transformers.cache_utils import DynamicCache

from ...kv.chunk import ChunkKV
from ...kv.rows import full_length_cache, packed
from ...model.hf_model import CACHE
from ...prompts.prompt import Prompt
from ...store import MemoryStore
from ..baselines import STORE_BYTES
from ..clock import Say, timed
from ..report import Row
from ..synthetic import PromptMaker, Stream
from .pair import STOCK, Pair, Stores, about, default_case

_QUARTERS = 4


class PrefixCache:
    """Stock `generate` with prefix caching: a prompt takes the K/V of its first parts, prefix and chunks, as far as an
    earlier one began with the same ids. The least recently used parts go, of one prompt the last first.

    Args:
        store: holds each part under a hash of all ids up to its end.
    """

    def __init__(self, stock: Any, store: MemoryStore) -> None:
        self._stock, self._store = stock, store

    def generate(self, prompt: Prompt) -> tuple[int, DynamicCache]:
        """Generates a token; returns how many chunks were found, and the cache of the whole prompt."""
        parts = _parts(prompt)
        found = [kv for kv in takewhile(bool, (self._store.open(key) for key, _ in parts)) if kv]
        chunks = max(0, len(found) - len(parts) + len(prompt.chunk_spans))
        if not chunks:
            found.clear()  # a prefix alone saves less than the mask after it costs
        layers = zip(*(map(kv.layer, range(kv.num_layers)) for kv in found))
        cache = full_length_cache((torch.cat(keys, 2), torch.cat(values, 2)) for keys, values in starmap(zip, layers))
        inputs = prompt.inputs(self._stock.device)
        del inputs["chunk_spans"]
        self._stock.generate(**inputs, **{CACHE: cache}, do_sample=False, min_new_tokens=1, max_new_tokens=1)
        return chunks, cache

    def keep(self, prompt: Prompt, cache: DynamicCache) -> None:
        """Stores the parts that were not found; the first parts are now the most recently used."""
        layers: list[Any] = cache.layers
        for key, (start, stop) in reversed(_parts(prompt)):
            if self._store.open(key) is None:
                rows = (packed((kv.keys[:, :, start:stop], kv.values[:, :, start:stop])) for kv in layers)
                self._store.put(key, ChunkKV(full_length_cache(rows), torch.arange(start, stop)))


def _parts(prompt: Prompt) -> list[tuple[str, tuple[int, int]]]:
    """Prefix and chunks: a hash of all ids up to the end of each, and its span."""
    ids, digest, start = prompt.input_ids[0].numpy(), hashlib.sha256(), prompt.chunk_spans[0][0]
    parts = []
    for span in ([(0, start)] if start else []) + list(prompt.chunk_spans):
        digest.update(ids[slice(*span)].tobytes())
        parts.append((digest.hexdigest(), span))
    return parts


def throughput(
    pair: Pair, maker: PromptMaker, length: int, count: int, stream: Stream, place: str, say: Say
) -> list[Row]:
    """A row per quarter of a stream that meets two empty stores of one budget; `prefix_…`: of prefix caching.

    Args:
        place: of hfblend's chunk KV: `"gpu"`, else RAM. Prefix caching's stays with the model, and is stored off the
            clock; hfblend's is stored on it.
    """
    each, prompts = maker.chunks_in(length), maker.stream(length, stream)
    budget = _budget(pair, maker, length, stream)
    store, prefix_store = MemoryStore(budget, None if place == "gpu" else "cpu"), MemoryStore(budget)
    turn = partial(_turn, pair, {place: store}, PrefixCache(pair.stock, prefix_store))
    rows = []
    for start, stop in pairwise(dict.fromkeys(count * i // _QUARTERS for i in range(_QUARTERS + 1))):
        turns = []
        for i, prompt in enumerate(islice(prompts, stop - start)):
            say(f"prompt {start + i + 1} of {count}")
            turns.append(turn(prompt, i % stream.full_prefill_every == 0))
        drawn = {"tokens": len(prompt), "chunks_per_prompt": each, "chunks_in_pool": each * stream.pool}
        held = {"store": store.num_bytes, "prefix_store": prefix_store.num_bytes, "store_max": budget}
        held["rss"] = psutil.Process().memory_info().rss
        rows.append(
            {"first_prompt": start + 1, "last_prompt": stop, **drawn, **about(default_case({place: store}))}
            | _figures(turns)
            | {f"{name}_mb": num_bytes / 1e6 for name, num_bytes in held.items()}
        )
    return rows


def _budget(pair: Pair, maker: PromptMaker, length: int, stream: Stream) -> int:
    """Bytes of a store, by those of a prompt, which warms the model up."""
    store, prompt = MemoryStore(STORE_BYTES), maker.prompt(length)
    pair.run(default_case({"": store}), prompt, {"": store})
    bytes_per_token = store.num_bytes / prompt.chunk_spans[-1][1]
    return int(bytes_per_token * length * stream.pool * stream.store)


def _turn(pair: Pair, stores: Stores, prefixes: PrefixCache, prompt: Prompt, in_full: bool) -> Row:
    """Milliseconds of each method, and the shares of the chunks that were found."""
    blended = timed(partial(pair.run, default_case(stores), prompt, stores), pair.device)
    prefix = timed(partial(prefixes.generate, prompt), pair.device)
    found, cache = prefix.result
    prefixes.keep(prompt, cache)
    return {
        "blended": blended.ms,
        "prefix": prefix.ms,
        "stock": timed(partial(pair.run, STOCK, prompt, stores), pair.device).ms if in_full else None,
        "hit_rate": blended.result.hits / len(prompt.chunk_spans),
        "prefix_hit_rate": found / len(prompt.chunk_spans),
    }


def _figures(turns: list[Row]) -> Row:
    row: Row = {"prompts": len(turns)}
    for rate in ("hit_rate", "prefix_hit_rate"):
        row[rate] = mean(turn[rate] for turn in turns)
    for name in ("stock", "prefix", "blended"):
        ms = [turn[name] for turn in turns if turn[name]]
        p50, p95 = np.percentile(ms, (50, 95)).tolist()
        row |= {f"{name}_ttft_ms_p50": p50, f"{name}_ttft_ms_p95": p95, f"{name}_prompts_per_s": 1000 / mean(ms)}
    for name in ("blended_over_stock", "prefix_over_stock", "blended_over_prefix"):
        fast, slow = name.split("_over_")
        row[name] = median(turn[slow] / turn[fast] for turn in turns if turn[slow])
    return row
