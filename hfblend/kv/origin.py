"""Where chunk KV comes from, for people and for tools that look after a store.

An entry is found by its key, a hash that tells nothing. This tells of which model it is and behind what it was
computed, and so which entries nobody will ask for again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Who computed a chunk's KV, of what.

    Attributes:
        model: its name, or its class if it has none.
        fingerprint: of its weights, adapters and configuration.
        rope: its RoPE, as its configuration has it, in JSON.
        ids, behind: digests of the chunk's token ids, and of those it was computed behind (`digest_of`).
    """

    model: str
    fingerprint: str
    rope: str
    ids: str
    behind: str


def digest_of(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, in hexadecimal."""
    return hashlib.sha256(array("q", ids)).hexdigest()
