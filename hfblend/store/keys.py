"""Keys: everything that a chunk's KV depends on, under one cryptographic hash."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..arguments import described
from ..kv.ids import plain_ids

_NONE = array("q")
_KEY = re.compile(r"[0-9a-f]{64}")
SUFFIX = ".safetensors"


def chunk_key(
    fingerprint: str, dtype: torch.dtype, ids: Sequence[int], behind_ids: Sequence[int] | None, namespace: str = ""
) -> str:
    """Returns the SHA-256 over model, dtype, namespace, the chunk's ids and its provenance.

    Args:
        fingerprint: of the model's weights and configuration.
        behind_ids: the exact ids before an isolated chunk; `None` for KV captured in some context.
    """
    provenance = "in_context" if behind_ids is None else "isolated"
    behind_ids = _NONE if behind_ids is None else behind_ids
    lengths = (len(ids), len(behind_ids))  # without them, ids could pass from one list to the other
    digest = _hash_of_header(fingerprint, dtype, namespace, provenance, lengths).copy()
    digest.update(plain_ids(ids))
    digest.update(plain_ids(behind_ids))
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def scope_of(fingerprint: str, dtype: torch.dtype, namespace: str = "") -> str:
    """Returns the SHA-256 over model, dtype and namespace: entries of one scope may be found in its prompts."""
    return hashlib.sha256(json.dumps(["hfblend-scope-1", fingerprint, str(dtype), namespace]).encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def _hash_of_header(
    fingerprint: str, dtype: torch.dtype, namespace: str, provenance: str, lengths: tuple[int, int]
) -> Any:
    """The hash of all but the ids, which chunks of one length share."""
    header = json.dumps(["hfblend-1", fingerprint, str(dtype), namespace, provenance, lengths])
    return hashlib.sha256(header.encode())


def chunk_keys(
    fingerprint: str, dtype: torch.dtype, texts: Iterable[tuple[Sequence[int], Sequence[int] | None]], namespace: str
) -> list[str]:
    """Returns the keys of several texts, each given as its ids and the ids before it; the rest as in `chunk_key`."""
    return [chunk_key(fingerprint, dtype, ids, behind_ids, namespace) for ids, behind_ids in texts]


def file_name_of(key: str) -> str:
    """Returns the name of an entry's file; raises `ValueError` for all but keys, which might be paths."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ValueError(f"A key is 64 hexadecimal digits, as of hfblend.store.chunk_key; got {described(key)}.")
    return key + SUFFIX


def is_key(text: str) -> bool:
    """Whether this can be a key."""
    return _KEY.fullmatch(text) is not None
