"""Many chunks prefilled, each alone behind the same ids: several in one forward where that gives what each alone gives.

A forward of one chunk leaves a GPU waiting for Python; eight of them keep it busy, in a third of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..kv.chunk import ChunkKV, Reader
from ..kv.rows import KV, full_length_cache, packed
from .hf_model import CACHE, HFModel
from .layerwise import allowed, distance, noisy

logger = logging.getLogger(__name__)

Ids = list[int]

_TOKENS = 16384  # of a batch, with padding and what chunks stand behind


def in_batches(chunks: Iterable[tuple[Any, Ids]], batch_size: int, num_behind: int) -> Iterator[list[tuple[Any, Ids]]]:
    """Chunks (name, ids) of similar length together, shortest first.

    Args:
        batch_size: of them, at most.
        num_behind: tokens that each stands behind.
    """
    batch: list[tuple[Any, Ids]] = []
    for name, ids in sorted(chunks, key=lambda one: len(one[1])):
        tokens = (len(batch) + 1) * (num_behind + len(ids))
        if batch and (len(batch) == batch_size or tokens > _TOKENS):
            yield batch
            batch = []
        batch.append((name, ids))
    if batch:
        yield batch


def prefill_together(
    hf_model: HFModel, chunks: Sequence[Ids], behind_ids: Sequence[int], behind: Reader | None
) -> list[ChunkKV]:
    """`chunks.prefill` of each, shortest first, in one forward if this model gives the same that way.

    The first batch with padding is checked against its shortest chunk alone, once for the model. RoPE frequencies that
    depend on length would be those of the longest chunk: such models take chunks one by one.
    """
    if len(chunks) > 1 and hf_model.prefills_in_batches is not False and not hf_model.length_dependent:
        batched = prefill_batch(hf_model, chunks, behind_ids, behind)
        if hf_model.prefills_in_batches or len(chunks[0]) == len(chunks[-1]):  # nothing is padded
            return batched
        alone = prefill(hf_model, chunks[0], behind_ids, behind)
        rounded = noisy(hf_model, lambda: prefill(hf_model, chunks[0], behind_ids, behind))
        hf_model.prefills_in_batches = _are_close(batched[0], alone, rounded)
        if hf_model.prefills_in_batches:
            return batched
        logger.warning("In a batch, this model's chunks come out otherwise than alone; they are taken one by one.")
    return [prefill(hf_model, ids, behind_ids, behind) for ids in chunks]


def _are_close(one: ChunkKV, other: ChunkKV, rounded: ChunkKV) -> bool:
    """Whether the keys and values of each layer differ no more than by rounding, as `rounded` does from `other`."""
    return all(
        distance(a, b) <= allowed(distance(c, b))
        for i in range(one.num_layers)
        for a, b, c in zip(one.layer(i), other.layer(i), rounded.layer(i))
    )


def prefill(hf_model: HFModel, ids: Sequence[int], behind_ids: Sequence[int], behind: Reader | None) -> ChunkKV:
    """`prefill_chunk` for a model that is already at hand."""
    return prefill_batch(hf_model, [ids], behind_ids, behind)[0]


@torch.no_grad()
def prefill_batch(
    hf_model: HFModel, chunks: Sequence[Sequence[int]], behind_ids: Sequence[int], behind: Reader | None
) -> list[ChunkKV]:
    """`prefill` of B chunks in one forward, each alone behind the same ids.

    Shorter ones are padded behind their end, where causal rows do not look. Frequencies that depend on the prompt's
    length would be those of the longest: such a model takes chunks one by one (`hf_model.length_dependent`).
    """
    if not all(chunks):
        raise ValueError("A chunk needs at least one token id, got none.")
    hf_model.require_own_dtype()
    start, longest = len(behind_ids), max(map(len, chunks))
    stop, known = start + longest, 0
    if behind is not None and _can_continue(hf_model, behind, stop):
        known = len(behind)
        shape = (len(chunks), -1, -1, -1)
        kv_behind = (_on_layers_device(hf_model, i, behind.layer(i)) for i in range(behind.num_layers))
        cache = full_length_cache((k.expand(shape), v.expand(shape)) for k, v in kv_behind)
    else:
        cache = DynamicCache()  # full-length layers, unlike DynamicCache(config=...) of a sliding model
    # A chunk's own last id pads it: what a row does not see must still be finite.
    rows = [[*behind_ids[known:], *ids, *[ids[-1]] * (longest - len(ids))] for ids in chunks]
    new_ids = torch.tensor(rows, device=hf_model.device)  # (B, stop − known)
    positions = torch.arange(known, stop, device=hf_model.device).expand(len(chunks), -1)

    def run() -> list[ChunkKV]:
        hf_model.decoder_forward(input_ids=new_ids, position_ids=positions, use_cache=True, **{CACHE: cache})
        return [_chunk_kv_of(hf_model, cache, i, ids, tuple(behind_ids)) for i, ids in enumerate(chunks)]

    return hf_model.prefilling(run)


def _on_layers_device(hf_model: HFModel, layer_idx: int, kv: KV) -> KV:
    device = hf_model.device_of_layer(layer_idx)
    return kv[0].to(device), kv[1].to(device)


def _chunk_kv_of(
    hf_model: HFModel, cache: DynamicCache, row: int, ids: Sequence[int], behind_ids: tuple[int, ...]
) -> ChunkKV:
    """The chunk in one row of a batch's cache (B, Hkv, T, D), without what stands before and behind it."""
    start, stop = len(behind_ids), len(behind_ids) + len(ids)
    place = (slice(row, row + 1), slice(None), slice(start, stop))
    layers: list[Any] = cache.layers
    kv = full_length_cache(packed((layer.keys[place], layer.values[place])) for layer in layers)
    origin = hf_model.origin_of(ids, behind_ids)
    return ChunkKV(kv, torch.arange(start, stop), behind_ids, "isolated", hf_model.regime(stop), origin=origin)


def _can_continue(hf_model: HFModel, behind: Reader, stop: int) -> bool:
    """Whether KV stands at positions 0 …, in the RoPE regime of a prompt of `stop` tokens, and holds as it is.

    What is computed behind quantised KV would carry its error, and nothing would say so.
    """
    in_place = behind.cached_positions.tolist() == list(range(len(behind)))
    return in_place and behind.quantised is None and hf_model.same_regime(behind.regime, stop)
