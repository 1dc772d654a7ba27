"""The blocks of a prompt's moved pieces as a correction's kernels find them, and the memory that sums are kept in.

Shapes: T tokens, S rows of a pass, H heads of keys and then of values, R rotated pairs, W width of a row, P pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from ..kv.rows import RowLayout, sent

FIRST_TABLE = tl.constexpr(6)  # of a plan, whose first numbers are counts of blocks and pieces, four addresses
NUM_PRODUCTS = tl.constexpr(6)  # that a piece and head have a sum of


class Plan:
    """The blocks of a prompt's moved pieces on a GPU, and the memory that its correction works in.

    Args:
        spans: of the P pieces, rising.
        block: tokens of a block; a piece's last one may be shorter.
        layouts: layer -> how its rows are laid out.
        tables: cos and sin (at least T, R) in fp32, without scaling, in the order of `Turn.table`.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        block: int,
        layouts: Mapping[int, RowLayout],
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
    ) -> None:
        begin, end = np.array(spans).T
        counts = (end - begin + block - 1) // block
        piece, first_block = np.arange(len(spans)).repeat(counts), np.append(0, counts.cumsum())
        starts = begin[piece] + (np.arange(len(piece)) - first_block[piece]) * block
        segments = np.concatenate([starts, np.minimum(starts + block, end[piece]), piece, first_block])
        self.blocks, self.pieces, self.tables = len(piece), len(spans), list(tables)
        self._segments = sent(torch.from_numpy(segments), device)
        heads, width = most_heads(layouts), max(layout.width for layout in layouts.values())
        most = self.blocks * (width + 2 * heads) + self.pieces * (3 * width + 2 * NUM_PRODUCTS.value * heads)
        self._sums = torch.empty(most + width + 6 * heads, device=device)
        self._sizes = torch.zeros((max(layouts) + 1) * 2 * self.blocks * heads, device=device)
        self._found: torch.Tensor | None = None

    def numbers_for(self, rows: torch.Tensor) -> list[int]:
        """The (6 + 2 · tables) numbers by which kernels find all this, for a pass over rows (S,), rising.

        They hold until the next call.
        """
        self._found = torch.searchsorted(rows, self._segments[: 2 * self.blocks], out_int32=True)
        tensors = (self._segments, self._found, self._sums, self._sizes, *(t for pair in self.tables for t in pair))
        return [self.blocks, self.pieces, *(tensor.data_ptr() for tensor in tensors)]


def most_heads(layouts: Mapping[int, RowLayout]) -> int:
    """The largest number of heads of keys, or of values, of any layer."""
    return max(max(layout.key_heads, layout.value_heads) for layout in layouts.values())


# --- read by kernels ------------------------------------------------------------------------------------------------


@triton.jit
def find_segments(PLAN: tl.tensor):
    """The counts of blocks and pieces; where each block starts and stops, its piece, and each piece's first block; the
    first row of the pass in each block, and the first after it."""
    blocks, pieces = tl.load(PLAN).to(tl.int32), tl.load(PLAN + 1).to(tl.int32)
    starts = tl.load(PLAN + 2).to(tl.pointer_type(tl.int64))
    begins = tl.load(PLAN + 3).to(tl.pointer_type(tl.int32))
    return blocks, pieces, starts, starts + blocks, starts + 2 * blocks, starts + 3 * blocks, begins, begins + blocks


@triton.jit
def find_sums(
    PLAN: tl.tensor, blocks: tl.tensor, pieces: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Where sums (blocks, W), (P, 3, W), the mean (W,), squares (blocks, H), products (P, H, 6), weights (H, 3) lie."""
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    sums = tl.load(PLAN + 4).to(tl.pointer_type(tl.float32))
    piece_sums = sums + blocks.to(tl.int64) * width
    mean = piece_sums + pieces * (3 * width)
    squares = mean + width
    products = squares + blocks * (HEADS + VALUE_HEADS)
    weights = products + pieces * ((HEADS + VALUE_HEADS) * NUM_PRODUCTS)
    return sums, piece_sums, mean, squares, products, weights
