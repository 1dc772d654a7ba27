"""Attention on a CPU, some rows of a pass at a time: to no key that none of them sees, and mostly without a mask.

        keys  …  5  6 │ 7  8  9        rows at 7, 8 and 9: seven keys without a mask, then three with one
        row 7 …  ■  ■ │ ■  ⬚  ⬚
        row 8 …  ■  ■ │ ■  ■  ⬚
        row 9 …  ■  ■ │ ■  ■  ■

Shapes: B batch, H query heads, Hkv KV heads, S query rows, n rows of a tile, T keys, D head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..kernels.reference import AttentionArgs, visible

LARGEST = 320  # rows: more see more keys in vain, fewer occupy the cores less well

# -> output, logarithm of the weights' sum; PyTorch gives the latter by no public name
_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


class Tile(NamedTuple):
    """Some rows, the keys that one of them sees, and the mask (B, 1, n, M), additive, for the last M of these keys."""

    rows: slice
    keys: slice
    mask: torch.Tensor


def tiles_of(
    positions: torch.Tensor, length: int, window: int | None, hidden: torch.Tensor | None, dtype: torch.dtype
) -> list[Tile]:
    """Rows (B, S) in tiles of one size; arguments as of `visible`."""
    count = positions.shape[1]
    size = -(-count // -(-count // LARGEST))

    def tile(start: int) -> Tile:
        rows = slice(start, start + size)
        at = positions[:, rows]
        first, last = (int(end) for end in at.aminmax())
        least = 0 if window is None else max(0, first - window + 1)
        masked_from = first if window is None and hidden is None else least
        seen = visible(at, length, window, hidden)[:, None, :, masked_from : last + 1]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        return Tile(rows, slice(least, last + 1), mask)

    return [tile(start) for start in range(0, count, size)]


def run_in_tiles(args: AttentionArgs) -> bool:
    """Whether PyTorch's flash attention for CPUs takes these states."""
    states = args.query, args.key, args.value
    alike = all(one.stride(-1) == 1 and one.dtype == args.query.dtype for one in states)
    on_cpu = args.query.device.type == "cpu" and args.query.shape[-1] == args.value.shape[-1]
    return _flash is not None and on_cpu and alike


def attend_in_tiles(args: AttentionArgs, tiles: list[Tile]) -> torch.Tensor:
    """Attention of all tiles, (B, H, S, D), without softcap and sinks."""
    out = torch.empty_like(args.query)
    for rows, keys, mask in tiles:
        states = args.query[:, :, rows], args.key[:, :, keys], args.value[:, :, keys]
        out[:, :, rows] = _attend(*states, mask, args.scaling)
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of a tile: to the keys without a mask, and to those with one, put together by the weight of each part.

    Query heads of a KV head are rows of one product.
    """
    (batch, heads, rows, head_dim), kv_heads = query.shape, key.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, head_dim)
    mask, num_clear = mask.repeat(1, 1, heads // kv_heads, 1), key.shape[2] - mask.shape[-1]
    out, weight = _flash(grouped, key[:, :, num_clear:], value[:, :, num_clear:], attn_mask=mask, scale=scaling)
    if num_clear:
        clear, more = _flash(grouped, key[:, :, :num_clear], value[:, :, :num_clear], scale=scaling)
        out = torch.lerp(out, clear, torch.sigmoid(more - weight)[..., None].to(out.dtype))
    return out.reshape(batch, heads, rows, head_dim)
