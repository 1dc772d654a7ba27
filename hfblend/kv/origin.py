"""The origin of chunk KV, for people and for tools that look after a store.

An entry is found by its key, a hash that tells nothing. Its origin says which model computed it and after which tokens,
and so which entries no prompt will ask for again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """The model and the tokens that a chunk's KV was computed from.

    Attributes:
        model: its name, or its class if it has none.
        fingerprint: of its weights, adapters and configuration.
        rope: its RoPE, as its configuration has it, in JSON.
        ids, behind: digests (`digest_of`) of the chunk's token ids, and of the ids before it when it was computed.
    """

    model: str
    fingerprint: str
    rope: str
    ids: str
    behind: str


def digest_of(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(array("q", ids)).hexdigest()
