"""Rotary position embedding of queries and keys in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 16  # a program turns that many rows of one head


@triton.jit(do_not_specialize=["num_rows"])
def _rotary_kernel(
    Q: tl.tensor, K: tl.tensor, COS: tl.tensor, SIN: tl.tensor, OUT_Q: tl.tensor, OUT_K: tl.tensor, num_rows: tl.tensor,
    q_heads: tl.tensor, k_heads: tl.tensor, q_batch: tl.tensor, q_head: tl.tensor, q_row: tl.tensor, k_batch: tl.tensor,
    k_head: tl.tensor, k_row: tl.tensor, table_batch: tl.tensor, table_row: tl.tensor, HALF: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one head, of queries or of keys."""
    row, head, batch = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.program_id(2)
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (row[:, None] < num_rows) & (pair < HALF)
    table = batch * table_batch + row[:, None] * table_row + pair
    cos_x = tl.load(COS + table, mask=mask).to(tl.float32)
    sin_x = tl.load(SIN + table, mask=mask).to(tl.float32)
    cos_y = tl.load(COS + table + HALF, mask=mask).to(tl.float32)
    sin_y = tl.load(SIN + table + HALF, mask=mask).to(tl.float32)
    if head < q_heads:
        states = Q + batch * q_batch + head * q_head + row[:, None] * q_row + pair
        out = OUT_Q + ((batch * num_rows + row[:, None]).to(tl.int64) * q_heads + head) * (2 * HALF) + pair
    else:
        head -= q_heads
        states = K + batch * k_batch + head * k_head + row[:, None] * k_row + pair
        out = OUT_K + ((batch * num_rows + row[:, None]).to(tl.int64) * k_heads + head) * (2 * HALF) + pair
    x = tl.load(states, mask=mask).to(tl.float32)
    y = tl.load(states + HALF, mask=mask).to(tl.float32)
    tl.store(out, (x * cos_x - y * sin_x).to(OUT_Q.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (y * cos_y + x * sin_y).to(OUT_Q.dtype.element_ty), mask=mask)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x · cos + rotate_half(x) · sin of queries and keys, in fp32, rounded once.

    Args:
        query: (B, H, S, D); key: (B, Hkv, S, D); last dimensions contiguous.
        cos, sin: (B or 1, S, D), alike in memory.
    """
    batch, heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    turned = [states.new_empty(batch, rows, states.shape[1], dim) for states in (query, key)]
    _rotary_kernel[(triton.cdiv(rows, _TOKENS), heads + kv_heads, batch)](
        query, key, cos, sin, *turned, rows, heads, kv_heads, *query.stride()[:3], *key.stride()[:3],
        0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), TOKENS=_TOKENS,
    )  # fmt: skip
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
