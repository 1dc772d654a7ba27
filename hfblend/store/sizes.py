"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

from ..arguments import described

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def num_bytes_of(size: Any) -> int:
    """Returns the bytes that a whole number of them, or a text such as `"8GB"` (10⁹) or `"512MiB"` (2²⁰), stands for.

    >>> num_bytes_of("1.5GB"), num_bytes_of("2KiB")
    (1500000000, 2048)

    Raises:
        ValueError: anything else.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) and len(size) <= 100 else None  # more may overflow a float
    if found and found[2].lower() in _UNITS:
        return int(float(found[1]) * _UNITS[found[2].lower()])
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(
            f'max_bytes must be a whole number of bytes, 0 or more, or text such as "8GB", got {described(size)}.'
        )
    return size
