"""Digests of every byte of tensors."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import xxhash

_Source = TypeVar("_Source")

_PIECE = 1 << 24  # bytes that come from a GPU at once
_THREADS = 8  # at most; copying and hashing both leave the interpreter to others

_staging = threading.local()  # each thread's pinned buffer


def digests(sources: Iterable[_Source], read: Callable[[_Source], torch.Tensor | None]) -> list[bytes | None]:
    """The digest of each tensor that `read` gives, several at a time; `None` for `None`."""

    @torch.no_grad()
    def one(source: _Source) -> bytes | None:
        tensor = read(source)
        return None if tensor is None else digest(tensor)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, sources))


def digest(tensor: torch.Tensor) -> bytes:
    """XXH3-128 of a tensor's bytes in the order of its elements, the same on every device."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    state = xxhash.xxh3_128()
    for piece in (data,) if data.device.type == "cpu" else data.split(_PIECE):
        state.update(_on_host(piece).numpy().data)
    return state.digest()


def _on_host(piece: torch.Tensor) -> torch.Tensor:
    """The bytes in RAM; from an NVIDIA GPU through pinned memory, while other threads hash theirs."""
    if piece.device.type != "cuda":
        return piece.cpu()
    if not hasattr(_staging, "buffer"):
        _staging.buffer = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
    return _staging.buffer[: len(piece)].copy_(piece)
