"""How kernels inside a CUDA graph find the prompt at hand.

A graph replays fixed addresses, but every prompt has buffers of its own. So its kernels find them through a few numbers
in GPU memory, which are written before each replay.

Shapes: T keys, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from ..kv.rows import RowLayout

FIRST_LAYER = tl.constexpr(4)  # of a state, whose first numbers are T, live rows, two addresses


@dataclass
class State:
    """Where the kernels of a graph find the prompt at hand.

    Attributes:
        numbers: (4 + L,) int64 on the GPU: T, rows that count, addresses of `received` and of the mask of hidden keys,
            and of each layer's rows.
        layouts: layer -> how its rows are laid out.
    """

    numbers: torch.Tensor
    layouts: dict[int, RowLayout]
