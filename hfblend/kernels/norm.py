"""RMS normalisation in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


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
