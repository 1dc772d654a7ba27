"""Small kernels that each replace several of eager code: norms, rotary embedding, gates, samples of the weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 16  # a program turns that many rows of one head
_BLOCK = 1024  # elements that a program gates, or samples at a time


@triton.jit
def _rms_norm_kernel(
    X: tl.tensor, WEIGHT: tl.tensor, OUT: tl.tensor, stride: tl.tensor, size: tl.tensor, epsilon: tl.tensor,
    offset: tl.tensor, BLOCK: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + i, mask=i < size, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + i, mask=i < size, other=0.0).to(tl.float32) + offset
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + epsilon)
    if LATE:
        x = x.to(OUT.dtype.element_ty).to(tl.float32)
    tl.store(OUT + row * size + i, (x * weight).to(OUT.dtype.element_ty), mask=i < size)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, late: bool) -> torch.Tensor:
    """x / √(mean(x²) + ε) · (weight + offset) over the last dimension, in fp32, in one kernel.

    Args:
        x: (…, C), rows of equal stride.
        late: the quotient is rounded to the dtype of `x` before the weight comes to it, as Llama does.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    size = rows.shape[1]
    _rms_norm_kernel[(len(rows),)](
        rows, weight, out, rows.stride(0), size, epsilon, offset, BLOCK=triton.next_power_of_2(size), LATE=late,
        num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return out.view(x.shape)


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


@triton.jit
def _gated_kernel(GATE: tl.tensor, UP: tl.tensor, OUT: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr):
    """One program: some elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + i, mask=i < size).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * tl.load(UP + i, mask=i < size).to(tl.float32)
    tl.store(OUT + i, product.to(OUT.dtype.element_ty), mask=i < size)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, element by element, in fp32, rounded once. Both are contiguous, of one shape."""
    out = torch.empty_like(gate)
    _gated_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
    return out


@triton.jit
def _sample_kernel(TABLE: tl.tensor, OUT: tl.tensor, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the sample of one tensor."""
    row = TABLE + tl.program_id(0) * 4
    source = tl.load(row).to(tl.pointer_type(dtype))
    step, start, count = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        live = i < count
        tl.store(OUT + start + i, tl.load(source + i * step, mask=live), mask=live)


def sample(table: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Every `step`-th element of each of n tensors.

    Args:
        table: (n, 4) int64 on the GPU: a tensor's address, `step`, the place of its sample in the result, its length.
        count: elements of all samples.
        dtype: an integer as large as the tensors' elements.

    Returns:
        (count,)
    """
    out = torch.empty(count, dtype=dtype, device=table.device)
    with torch.cuda.device_of(table):
        _sample_kernel[(len(table),)](table, out, dtype=getattr(tl, str(dtype).removeprefix("torch.")), BLOCK=_BLOCK)
    return out
