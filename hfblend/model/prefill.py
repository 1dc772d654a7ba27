"""Prefills chunks, each alone after the same ids: several in one forward if the model gives the same that way.

A forward of one chunk leaves a GPU waiting for Python; eight of them keep it busy, in a third of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..kv.chunk import ChunkKV, Reader
from ..kv.rows import full_length_cache, packed
from .hf_model import CACHE, HFModel
from .layerwise import allowed, distance, noisy

logger = logging.getLogger(__name__)

Ids = Sequence[int]

_TOKENS = 16384  # of a batch, with padding and the ids before the chunks


def in_batches(chunks: Iterable[tuple[Any, Ids]], batch_size: int, num_after: int) -> Iterator[list[tuple[Any, Ids]]]:
    """Chunks (name, ids) of similar length together, shortest first.

    Args:
        batch_size: of them, at most.
        num_after: tokens before each.
    """
    batch: list[tuple[Any, Ids]] = []
    for name, ids in sorted(chunks, key=lambda one: len(one[1])):
        tokens = (len(batch) + 1) * (num_after + len(ids))
        if batch and (len(batch) == batch_size or tokens > _TOKENS):
            yield batch
            batch = []
        batch.append((name, ids))
    if batch:
        yield batch


def prefill_together(
    hf_model: HFModel, chunks: Sequence[Ids], after_ids: Sequence[int], after: Reader | None
) -> list[ChunkKV]:
    """`chunks.prefill` of each, shortest first, in one forward if this model gives the same that way.

    The first batch with padding is checked against its shortest chunk alone, once for the model. RoPE frequencies that
    depend on length would be those of the longest chunk: such models take chunks one by one.
    """
    if len(chunks) > 1 and hf_model.prefills_in_batches is not False and not hf_model.length_dependent:
        batched = prefill_batch(hf_model, chunks, after_ids, after)
        if hf_model.prefills_in_batches or len(chunks[0]) == len(chunks[-1]):  # nothing is padded
            return batched
        alone = prefill(hf_model, chunks[0], after_ids, after)
        rounded = noisy(hf_model, lambda: prefill(hf_model, chunks[0], after_ids, after))
        hf_model.prefills_in_batches = _are_close(batched[0], alone, rounded)
        if hf_model.prefills_in_batches:
            return batched
        logger.warning("This model computes chunks differently in a batch than alone; they are prefilled one by one.")
    return [prefill(hf_model, ids, after_ids, after) for ids in chunks]


def _are_close(one: ChunkKV, other: ChunkKV, rounded: ChunkKV) -> bool:
    """Whether the keys and values of each layer differ no more than by rounding, as `rounded` does from `other`."""
    return all(
        distance(a, b) <= allowed(distance(c, b))
        for i in range(one.num_layers)
        for a, b, c in zip(one.layer(i), other.layer(i), rounded.layer(i))
    )


def prefill(hf_model: HFModel, ids: Sequence[int], after_ids: Sequence[int], after: Reader | None) -> ChunkKV:
    """`prefill_chunk` of a tested model."""
    return prefill_batch(hf_model, [ids], after_ids, after)[0]


@torch.no_grad()
def prefill_batch(
    hf_model: HFModel, chunks: Sequence[Sequence[int]], after_ids: Sequence[int], after: Reader | None
) -> list[ChunkKV]:
    """`prefill` of B chunks in one forward, each alone after the same ids.

    Shorter ones are padded after their end, where causal rows do not look. Frequencies that depend on the prompt's
    length would be those of the longest: such a model takes chunks one by one (`hf_model.length_dependent`).
    """
    if not all(chunks):
        raise ValueError("A chunk needs at least one token id, got none.")
    hf_model.require_own_dtype()
    start, longest = len(after_ids), max(map(len, chunks))
    stop, known = start + longest, 0
    if after is not None and _can_continue(hf_model, after, stop):
        known = len(after)
        shape = (len(chunks), -1, -1, -1)
        kv_before = ((hf_model.device_of_layer(i), *after.layer(i)) for i in range(after.num_layers))
        cache = full_length_cache((k.to(there).expand(shape), v.to(there).expand(shape)) for there, k, v in kv_before)
    else:
        cache = DynamicCache()  # full-length layers, unlike DynamicCache(config=...) of a sliding model
    # A chunk's own last id pads it: what a row does not see must still be finite.
    rows = [[*after_ids[known:], *ids, *[ids[-1]] * (longest - len(ids))] for ids in chunks]
    new_ids = torch.tensor(rows, device=hf_model.device)  # (B, stop − known)
    positions = torch.arange(known, stop, device=hf_model.device).expand(len(chunks), -1)

    def run() -> list[ChunkKV]:
        hf_model.decoder_forward(input_ids=new_ids, position_ids=positions, use_cache=True, **{CACHE: cache})
        return [_chunk_kv_of(hf_model, cache, i, ids, tuple(after_ids)) for i, ids in enumerate(chunks)]

    return hf_model.prefilling(run)


def _chunk_kv_of(
    hf_model: HFModel, cache: DynamicCache, row: int, ids: Sequence[int], after_ids: tuple[int, ...]
) -> ChunkKV:
    """The chunk in one row of a batch's cache (B, Hkv, T, D), without the tokens before and after it."""
    start, stop = len(after_ids), len(after_ids) + len(ids)
    place = (slice(row, row + 1), slice(None), slice(start, stop))
    layers: list[Any] = cache.layers
    kv = full_length_cache(packed((layer.keys[place], layer.values[place])) for layer in layers)
    origin = hf_model.origin_of(ids, after_ids)
    return ChunkKV(kv, torch.arange(start, stop), after_ids, "isolated", hf_model.regime(stop), origin=origin)


def _can_continue(hf_model: HFModel, after: Reader, stop: int) -> bool:
    """Whether KV stands at positions 0 …, in the RoPE regime of a prompt of `stop` tokens, and is exact.

    KV computed after quantised KV would silently carry its error.
    """
    in_place = after.cached_positions.tolist() == list(range(len(after)))
    return in_place and after.quantised is None and hf_model.same_regime(after.regime, stop)
