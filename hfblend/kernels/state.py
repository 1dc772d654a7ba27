"""The places of keys and values for kernels: tensors or, inside a CUDA graph, numbers in GPU memory.

A graph replays fixed addresses, but every prompt has other buffers. Its kernels read their addresses from a few numbers
that are written before each replay.

Shapes: T keys, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from ..kv.rows import RowLayout
from .reference import AttentionArgs

FIRST_LAYER = tl.constexpr(4)  # of a state, whose first numbers are T, live rows, two addresses


@dataclass
class State:
    """The numbers through which the kernels of a graph find the prompt.

    Attributes:
        numbers: (4 + L,) int64 on the GPU: T, rows that count, addresses of `received` and of the mask of hidden keys,
            and of each layer's rows. Where the pass corrects rows, the numbers of a `plan.Plan` follow.
        layouts: layer -> how its rows are laid out.
    """

    numbers: torch.Tensor
    layouts: dict[int, RowLayout]


@dataclass(frozen=True)
class Placed:
    """Keys and values as a kernel is told of them.

    Attributes:
        key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), or twice the numbers of a state.
        key_strides, value_strides: batch, head, token.
        value_offset: elements from a state's address of a layer to its values.
        layer: in a state.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    value_offset: int
    layer: int
    in_state: bool

    @classmethod
    def of(cls, args: AttentionArgs, state: State | None, layer: int) -> Placed:
        if state is None:
            return cls(args.key, args.value, args.key.stride()[:3], args.value.stride()[:3], 0, layer, False)
        layout = state.layouts[layer]
        strides = layout.strides("key")[:3], layout.strides("value")[:3]
        return cls(state.numbers, state.numbers, *strides, layout.value_offset, layer, True)
