"""Many chunks prefilled, each alone behind the same ids: several in one forward where that gives what each alone gives.

A forward of one chunk leaves a GPU waiting for Python; eight of them keep it busy, in a third of the time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..kv.chunk import ChunkKV, Reader, prefill, prefill_batch
from ..support.layerwise import allowed, distance, noisy
from ..support.registry import BlendableModel

logger = logging.getLogger(__name__)

Ids = list[int]

_ON_GPU = 8
_TOKENS = 16384  # of a batch, with padding and what chunks stand behind


def chunks_at_once(host: BlendableModel) -> int:
    """How many chunks a forward should hold: 1 on a CPU, which is busy with one."""
    return 1 if host.device.type == "cpu" else _ON_GPU


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
    host: BlendableModel, chunks: Sequence[Ids], behind_ids: Sequence[int], behind: Reader | None
) -> list[ChunkKV]:
    """`chunks.prefill` of each, shortest first, in one forward if this model gives the same that way.

    The first batch with padding is checked against its shortest chunk alone, once for the model. RoPE frequencies that
    depend on length would be those of the longest chunk: such models take chunks one by one.
    """
    if len(chunks) > 1 and host.prefills_in_batches is not False and not host.length_dependent:
        batched = prefill_batch(host, chunks, behind_ids, behind)
        if host.prefills_in_batches or len(chunks[0]) == len(chunks[-1]):  # nothing is padded
            return batched
        alone = prefill(host, chunks[0], behind_ids, behind)
        rounded = noisy(host, lambda: prefill(host, chunks[0], behind_ids, behind))
        host.prefills_in_batches = _are_close(batched[0], alone, rounded)
        if host.prefills_in_batches:
            return batched
        logger.warning("In a batch, this model's chunks come out otherwise than alone; they are taken one by one.")
    return [prefill(host, ids, behind_ids, behind) for ids in chunks]


def _are_close(one: ChunkKV, other: ChunkKV, rounded: ChunkKV) -> bool:
    """Whether the keys and values of each layer differ no more than by rounding, as `rounded` does from `other`."""
    return all(
        distance(a, b) <= allowed(distance(c, b))
        for i in range(one.num_layers)
        for a, b, c in zip(one.layer(i), other.layer(i), rounded.layer(i))
    )
