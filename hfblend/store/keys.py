"""Keys: everything that a chunk's KV depends on, under one cryptographic hash."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence

import torch


def chunk_key(
    fingerprint: str, dtype: torch.dtype, ids: Sequence[int], behind_ids: Sequence[int] | None, namespace: str = ""
) -> str:
    """SHA-256 over model, dtype, namespace, the chunk's ids and its provenance.

    Args:
        fingerprint: of the model's weights and configuration.
        behind_ids: the exact ids an isolated chunk was computed behind; `None` for KV captured in some context.
    """
    provenance = "in_context" if behind_ids is None else "isolated"
    behind_ids = behind_ids or ()
    lengths = (len(ids), len(behind_ids))  # without them, ids could pass from one list to the other
    header = json.dumps(["hfblend-1", fingerprint, str(dtype), namespace, provenance, lengths])
    digest = hashlib.sha256(header.encode())
    digest.update(array("q", ids))
    digest.update(array("q", behind_ids))
    return digest.hexdigest()
