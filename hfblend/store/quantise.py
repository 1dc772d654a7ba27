"""Rows of K/V in 8 bits: keys by channel, values by token, as their outliers lie (KIVI, arXiv 2402.02750, section 3).

    rows of a token    k₀ k₁ … v₀ v₁ …      key scales (Hkv, D), over the chunk's tokens; value scales (n, Hkv), over D

Symmetric: stored is x / scale, and the largest |x| of a scale becomes the largest number of the 8 bits.

Shapes: n tokens of the chunk, Hkv KV heads, D head_dim (of keys or of values), W width of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..arguments import one_of
from ..kv.rows import RowLayout, pins_memory

KV_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max / 2  # so that no product with a rounded scale overflows


class QuantisedRows(NamedTuple):
    """Stands for rows (n, W), in the order of the file."""

    key_scales: torch.Tensor  # (Hkv, D) float32
    value_scales: torch.Tensor  # (n, Hkv) float32
    rows: torch.Tensor  # (n, W) int8 or float8_e4m3fn


def require_kv_dtype(kv_dtype: str | None) -> str | None:
    """Returns the `kv_dtype`. Raises `ValueError` if a store cannot keep KV in it."""
    if kv_dtype is not None:
        one_of("kv_dtype", kv_dtype, KV_DTYPES, ", or None (as computed)")
    return kv_dtype


def takes(kv_dtype: str | None, quantised: str | None) -> bool:
    """Whether a store that keeps `kv_dtype` keeps and serves KV that was `quantised`: its own kind, and none worse."""
    return quantised is None or quantised == kv_dtype


def can_be_quantised(rows: torch.Tensor) -> bool:
    """Whether every number of rows (n, W) is finite, and in float32 too."""
    return bool((rows.abs() < _HUGE).all())  # false for NaN


def quantise(rows: torch.Tensor, layout: RowLayout, kv_dtype: str) -> QuantisedRows:
    """Returns rows (n, W), all finite, in 8 bits.

    int8 is off by at most half a scale; fp8 by 1/16 of the number, or 2⁻¹⁰ of a scale if that is more.
    """
    dtype = KV_DTYPES[kv_dtype]
    keys, values = _by_head(rows.float(), layout)
    key_scales, value_scales = _scales(keys.abs().amax(0), dtype), _scales(values.abs().amax(-1), dtype)
    scaled = torch.cat(((keys / key_scales).flatten(1), (values / value_scales[..., None]).flatten(1)), -1)
    return QuantisedRows(key_scales, value_scales, (scaled.round_() if dtype == torch.int8 else scaled).to(dtype))


def dequantise(quantised: QuantisedRows, layout: RowLayout, dtype: torch.dtype) -> torch.Tensor:
    """Returns the rows (n, W) again, in RAM (pinned if there is a GPU)."""
    numbers = quantised.rows.float()
    keys, values = _by_head(numbers, layout)
    keys.mul_(quantised.key_scales)
    values.mul_(quantised.value_scales[..., None])
    return torch.empty(numbers.shape, dtype=dtype, pin_memory=pins_memory()).copy_(numbers)


def _by_head(rows: torch.Tensor, layout: RowLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns keys and values (n, Hkv, D), views of rows (n, W)."""
    keys, values = rows.split((layout.value_offset, layout.width - layout.value_offset), -1)
    return keys.unflatten(-1, (layout.key_heads, -1)), values.unflatten(-1, (layout.value_heads, -1))


def _scales(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns scales by the largest |x| of each; 1 if that is 0, or too small to divide by: all become 0."""
    scales = largest / _LARGEST[dtype]
    return torch.where(scales < _TINY, 1.0, scales).contiguous()
