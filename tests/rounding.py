"""Products as other hardware computes them: TF32, emulated on a CPU."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    F.linear, F.scaled_dot_product_attention, torch.bmm, torch.matmul, torch.mm, torch.baddbmm, torch.addmm,
    torch.Tensor.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__,
}  # fmt: skip
_DROPPED = 13  # of 23 bits of the mantissa


class TF32(TorchFunctionMode):
    """Inside, operands of fp32 products are rounded to 10 bits of mantissa."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args = tuple(_rounded(one) for one in args)
            kwargs = {name: _rounded(one) if name != "attn_mask" else one for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _rounded(operand):
    if not torch.is_tensor(operand) or operand.dtype != torch.float32:
        return operand
    bits = operand.contiguous().view(torch.int32)
    half = (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)
    return ((bits + half) & -(1 << _DROPPED)).view(torch.float32)


# name -> (dtype of the model, what is on while it runs)
PRECISIONS = {
    "fp32": (torch.float32, contextlib.nullcontext),
    "tf32": (torch.float32, TF32),
    "bf16": (torch.bfloat16, contextlib.nullcontext),
    "fp16": (torch.float16, contextlib.nullcontext),
}
