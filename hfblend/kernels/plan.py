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
from .state import FIRST_LAYER

FIRST_TABLE = tl.constexpr(8)  # of a plan, whose first numbers are counts of blocks, pieces, exact rows; five addresses
NUM_PRODUCTS = tl.constexpr(6)  # that a piece and head have a sum of


class Plan:
    """The blocks of a prompt's moved pieces on a GPU, and the memory that its correction works in.

    Args:
        spans: of the P pieces, rising.
        block: tokens of a block; a piece's last one may be shorter.
        layouts: layer -> how its rows are laid out.
        tables: cos and sin (at least T, R) in fp32, without scaling, in the order of `Turn.table`.
        exact: how many of the first tokens lie in exact pieces.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        block: int,
        layouts: Mapping[int, RowLayout],
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device,
        exact: int = 0,
    ) -> None:
        begin, end = np.array(spans).T
        counts = (end - begin + block - 1) // block
        piece, first_block = np.arange(len(spans)).repeat(counts), np.append(0, counts.cumsum())
        starts = begin[piece] + (np.arange(len(piece)) - first_block[piece]) * block
        segments = np.concatenate([starts, np.minimum(starts + block, end[piece]), piece, first_block])
        self.blocks, self.pieces, self.exact, self.tables = len(piece), len(spans), exact, list(tables)
        self._segments = sent(torch.from_numpy(segments), device)
        heads, width = most_heads(layouts), max(layout.width for layout in layouts.values())
        most = self.blocks * (width + 2 * heads) + self.pieces * (3 * width + 2 * NUM_PRODUCTS.value * heads)
        self._sums = torch.empty(most + width + 6 * heads + 1, device=device)
        self._sizes = torch.zeros((max(layouts) + 1) * 2 * self.blocks * heads, device=device)
        self._found: tuple[torch.Tensor, ...] = ()

    def numbers_for(self, rows: torch.Tensor) -> list[int]:
        """The (8 + 2 · tables) numbers by which kernels find all this, for a pass over rows (S,), rising.

        They hold until the next call.
        """
        edges, starts = self._segments[: 2 * self.blocks], self._segments[: self.blocks]
        of_blocks = torch.searchsorted(rows, edges, out_int32=True)
        of_rows = torch.searchsorted(starts, rows, right=True, out_int32=True)  # blocks that start up to each
        self._found, tables = (of_blocks, of_rows), (table for pair in self.tables for table in pair)
        tensors = (self._segments, of_blocks, self._sums, self._sizes, of_rows, *tables)
        return [self.blocks, self.pieces, self.exact, *(tensor.data_ptr() for tensor in tensors)]


def most_heads(layouts: Mapping[int, RowLayout]) -> int:
    """The largest number of heads of keys, or of values, of any layer."""
    return max(max(layout.key_heads, layout.value_heads) for layout in layouts.values())


# --- read by kernels ------------------------------------------------------------------------------------------------


@triton.jit
def find_segments(PLAN: tl.tensor):
    """The counts of blocks and pieces; where each block starts and stops, its piece, and each piece's first block; the
    first row of the pass in each block, and the first after it."""
    blocks, pieces = tl.load(PLAN).to(tl.int32), tl.load(PLAN + 1).to(tl.int32)
    starts = tl.load(PLAN + 3).to(tl.pointer_type(tl.int64))
    begins = tl.load(PLAN + 4).to(tl.pointer_type(tl.int32))
    return blocks, pieces, starts, starts + blocks, starts + 2 * blocks, starts + 3 * blocks, begins, begins + blocks


@triton.jit
def find_sums(
    PLAN: tl.tensor, blocks: tl.tensor, pieces: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Where sums (blocks, W), (P, 3, W), the mean (W,), squares (blocks, H), products (P, H, 6), weights (H, 3), after
    which the number of errors stands, lie."""
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    sums = tl.load(PLAN + 5).to(tl.pointer_type(tl.float32))
    piece_sums = sums + blocks.to(tl.int64) * width
    mean = piece_sums + pieces * (3 * width)
    squares = mean + width
    products = squares + blocks * (HEADS + VALUE_HEADS)
    weights = products + pieces * ((HEADS + VALUE_HEADS) * NUM_PRODUCTS)
    return sums, piece_sums, mean, squares, products, weights


@triton.jit
def find_buffer(BUFFER: tl.tensor, layer: tl.tensor, dtype: tl.constexpr, IN_STATE: tl.constexpr):
    """A layer's rows: as passed, or through a state."""
    if IN_STATE:
        BUFFER = tl.load(BUFFER + FIRST_LAYER + layer).to(tl.pointer_type(dtype))
    return BUFFER


@triton.jit
def read(BASE: tl.tensor, offset: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr):
    """Loads from heads that start at multiples of 16 bytes: an address from memory does not tell the compiler so."""
    at = BASE + offset
    if ALIGNED:
        at = tl.multiple_of(at, [1, 16])
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)
