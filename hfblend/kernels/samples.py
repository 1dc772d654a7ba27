"""A few elements of every weight, wherever they are on a GPU, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


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
