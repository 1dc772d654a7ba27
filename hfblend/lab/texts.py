"""The texts that chunk KV is computed after, where no setting of `BlendConfig` says it.

another request    ▨▨▨▨ prefix and passage of it     CHUNK
neighbours         ▨▨▨▨▨▨ prefix, similar chunks     CHUNK      all but the chunk is dropped
dummies            ▨ four BOS                        CHUNK
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..prompts.prompt import Prompt

NEIGHBOURS, DUMMIES = 10, 4

Ids = Sequence[int]


@dataclass(frozen=True)
class Around:
    """A chunk, and what its KV could be computed after.

    Attributes:
        ids: of the chunk.
        prompt: that holds it.
        elsewhere: ids of a passage of another request.
        corpus: ids of the chunks of a knowledge base; those of the prompt belong to it, named here or not.
        config: the model's.
    """

    ids: Ids
    prompt: Prompt
    elsewhere: Ids
    corpus: Sequence[Ids]
    config: Any


ChunkAfter = Callable[[Around], Ids]


def after_another_request(chunk: Around) -> Ids:
    """The prefix, and the passage of another request that held the chunk."""
    return (*chunk.prompt.prefix_ids, *chunk.elsewhere)


def after_neighbours(chunk: Around) -> Ids:
    """The prefix and the ten most similar chunks of the corpus, the most similar first: FusionRAG's preprocessing.

    Left out: likeness is the cosine of token ids weighted by rarity; the paper's is BGE-M3's. The neighbours are read
    as one text; the paper joins their own KV. They are cut to half of the context that the model was trained for.
    Without a corpus, neighbours come from the chunk's own prompt. Texts that share nine tenths of their ids with the
    chunk are the chunk.
    """
    own = frozenset(chunk.ids)
    pool = {tuple(ids): frozenset(ids) for ids in (*chunk.prompt.chunk_ids, *chunk.corpus)}
    counts = Counter(chain(*pool.values()))
    others = {ids: seen for ids, seen in pool.items() if len(own & seen) < 0.9 * len(own | seen)}
    rarity = {token: math.log((len(pool) + 1) / count) ** 2 for token, count in counts.items()}

    def likeness(ids: Ids) -> float:
        seen = others[tuple(ids)]
        return sum(rarity[token] for token in own & seen) / math.sqrt(sum(rarity[token] for token in seen))

    nearest = sorted(others, key=likeness, reverse=True)[:NEIGHBOURS]
    limit = getattr(chunk.config, "max_position_embeddings", None)
    return (*chunk.prompt.prefix_ids, *tuple(chain(*nearest))[: limit and limit // 2])


def after_dummies(chunk: Around) -> Ids:
    """Four BOS: Link0. The attention sink that a beginning becomes falls on tokens that are then dropped; nothing is
    recomputed. PSR, "prefix, scale, recompute", adds CacheBlend's rule by K, and scales attention as APE does.

    Not reproduced: on no set of docs/quality.md is either closer to a full prefill than CacheBlend's rule.
    Left out of PSR: the scaling; its numbers could not be read, and it changes decoding, too.

    Source: LegoLink-0 of EPIC (arXiv 2410.15332), as summaries and reimplementations have it; PSR of arXiv 2603.20218,
    its abstract and summaries.

    Raises:
        ValueError: a model without a BOS.
    """
    bos = getattr(chunk.config, "bos_token_id", None)
    if bos is None:
        raise ValueError("Link0 computes chunks after BOS tokens, and this model's config has no bos_token_id.")
    return (bos if isinstance(bos, int) else bos[0],) * DUMMIES
