"""The correction of reused rows by the errors of recomputed ones by kernels, layer by layer: `blend.correction.offset`.

    sum_errors     (blocks, heads)   errors of a block's recomputed rows, rotation off: their sum, the sum of squares
    sum_pieces     (pieces, heads)   the same of a piece, its share of the regression, and both means, shrunk
    weigh          (heads)           the mean of all errors, three weights; `trust` lessens those of keys
    add_offsets    (blocks, heads)   one offset, turned by each row's position, added to all rows of the block

No error is read twice, as the regression needs sums only. With e an error, n the errors of its group and A their sum,
what a group foretells of one that it leaves out is f = (A − e) / n, and over all errors of a block (n, sum B, sum of
squares Q) Σ f·f' = (n A·A' − (A + A')·B + Q) / (n n'), Σ f·e = (A·B − Q) / n.

All numbers of a prompt are read from GPU memory, so that one CUDA graph serves every prompt; programs take as many
blocks each as there are. Sums are in fp32 and in a fixed order.

Shapes: H heads of keys and then of values, S rows of a pass, T tokens, D head_dim, R rotated pairs, W width of a row,
L layers, P pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..kv.rows import KV, RowLayout
from .plan import FIRST_TABLE, NUM_PRODUCTS, find_buffer, find_segments, find_sums, most_heads, read
from .reference import AttentionArgs
from .state import State
from .trust import Asking

_INTERPRETED = bool(triton.knobs.runtime.interpret)
# How many programs share blocks x heads of errors, pieces, and blocks x heads that are corrected.
_ERROR_PROGRAMS, _PIECES, _PROGRAMS = (8, 2, 8) if _INTERPRETED else (8448, 256, 2112)
_ERROR_WARPS, _SUM_WARPS, _ADD_WARPS = 1, 4, 4
_ROWS = 8  # errors that a program reads at once
_ELEMENTS = 2048  # of sums that a program reads at once
_HEADS = 4  # of a block that a program corrects: they share the rotary tables


@dataclass(frozen=True)
class Turn:
    """How a layer's rows turn with position.

    Args:
        slot: 0 if keys turn, 1 if values do.
        pairs: R.
        half: dimension i turns with i + R, else 2i with 2i + 1.
        table: which of the prompt's rotary tables.
    """

    slot: int
    pairs: int
    half: bool
    table: int


# --- rows -------------------------------------------------------------------------------------------------------------


@triton.jit
def _find_head(
    head: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr
):  # fmt: skip
    """The place of a head in a row, and its dimensions."""
    is_key = head < HEADS
    return tl.where(is_key, head * D, HEADS * D + (head - HEADS) * DV), tl.where(is_key, D, DV)


# --- 1 the errors of a block ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer"])
def _sum_errors_kernel(
    BUFFER: tl.tensor, PLAN: tl.tensor, KEYS: tl.tensor, VALUES: tl.tensor, TOKENS_OF: tl.tensor, layer: tl.tensor,
    k_head: tl.tensor, k_row: tl.tensor, v_head: tl.tensor, v_row: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr, ROTATES: tl.constexpr, HALF: tl.constexpr,
    TABLE: tl.constexpr, IN_STATE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks, one head."""
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    buffer = find_buffer(BUFFER, layer, KEYS.dtype.element_ty, IN_STATE)
    blocks, pieces, _, _, _, _, BEGINS, ENDS = find_segments(PLAN)
    SUMS, _, _, SQUARES, _, _ = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        begin, end = tl.load(BEGINS + block), tl.load(ENDS + block)
        if begin < end:
            sums = SUMS + block * width
            if head < HEADS:
                square = _sum_errors(
                    KEYS + head * k_head, buffer + head * D, sums + head * D, PLAN, TOKENS_OF, begin, end, k_row,
                    width, D, PAIRS, ROTATES == 0, HALF, TABLE, ROWS, ALIGNED,
                )  # fmt: skip
                tl.store(SQUARES + block * (HEADS + VALUE_HEADS) + head, square)
            else:
                value_head = head - HEADS
                at = HEADS * D + value_head * DV
                square = _sum_errors(
                    VALUES + value_head * v_head, buffer + at, sums + at, PLAN, TOKENS_OF, begin, end, v_row,
                    width, DV, PAIRS, ROTATES == 1, HALF, TABLE, ROWS, ALIGNED,
                )  # fmt: skip
                tl.store(SQUARES + block * (HEADS + VALUE_HEADS) + head, square)


@triton.jit
def _sum_errors(
    FRESH: tl.tensor, REUSED: tl.tensor, SUMS: tl.tensor, PLAN: tl.tensor, TOKENS_OF: tl.tensor, begin: tl.tensor,
    end: tl.tensor, stride: tl.tensor, width: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, TURNS: tl.constexpr,
    HALF: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores the sum of a head's errors in the rows [begin, end) of a pass. Returns the sum of their squares."""
    turned: tl.constexpr = 2 * PAIRS if TURNS else 0
    square = tl.zeros([ROWS], tl.float32)
    if TURNS:
        COS = tl.load(PLAN + FIRST_TABLE + 2 * TABLE).to(tl.pointer_type(tl.float32))
        SIN = tl.load(PLAN + FIRST_TABLE + 2 * TABLE + 1).to(tl.pointer_type(tl.float32))
        pair = tl.arange(0, triton.next_power_of_2(PAIRS))[None, :]
        one, other = (pair, pair + PAIRS) if HALF else (2 * pair, 2 * pair + 1)
        x_sum = tl.zeros([triton.next_power_of_2(PAIRS)], tl.float32)
        y_sum = tl.zeros([triton.next_power_of_2(PAIRS)], tl.float32)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            token = tl.load(TOKENS_OF + row, mask=row < end, other=0).to(tl.int64)
            mask = (row < end) & (pair < PAIRS)
            fresh = FRESH + row.to(tl.int64) * stride
            x = tl.load(fresh + one, mask=mask, other=0.0) - read(REUSED, token * width + one, mask, ALIGNED and HALF)
            y = tl.load(fresh + other, mask=mask, other=0.0)
            y = y - read(REUSED, token * width + other, mask, ALIGNED and HALF)
            cos, sin = (
                read(COS, token * PAIRS + pair, mask, ALIGNED), read(SIN, token * PAIRS + pair, mask, ALIGNED)
            )  # fmt: skip
            back_x, back_y = x * cos + y * sin, y * cos - x * sin
            x_sum += tl.sum(back_x, 0)
            y_sum += tl.sum(back_y, 0)
            square += tl.sum(back_x * back_x + back_y * back_y, 1)
        tl.store(SUMS + one, x_sum[None, :], mask=pair < PAIRS)
        tl.store(SUMS + other, y_sum[None, :], mask=pair < PAIRS)
    if turned < D:
        d = turned + tl.arange(0, triton.next_power_of_2(D - turned))[None, :]
        total = tl.zeros([triton.next_power_of_2(D - turned)], tl.float32)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            token = tl.load(TOKENS_OF + row, mask=row < end, other=0).to(tl.int64)
            mask = (row < end) & (d < D)
            error = tl.load(FRESH + row.to(tl.int64) * stride + d, mask=mask, other=0.0)
            error = error - read(REUSED, token * width + d, mask, ALIGNED)
            total += tl.sum(error, 0)
            square += tl.sum(error * error, 1)
        tl.store(SUMS + d, total[None, :], mask=d < D)
    return tl.sum(square, 0)


# --- 2 the errors of a piece ------------------------------------------------------------------------------------------


@triton.jit
def _sum_pieces_kernel(
    PLAN: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
    D_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: every so many pieces, one head. A group of one error foretells nothing of it: 0, not almost."""
    head = tl.program_id(1)
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    heads: tl.constexpr = HEADS + VALUE_HEADS
    blocks, pieces, _, _, _, FIRST_BLOCK, BEGINS, ENDS = find_segments(PLAN)
    SUMS, PIECE_SUMS, _, SQUARES, PRODUCTS, _ = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    at, dim = _find_head(head, HEADS, D, VALUE_HEADS, DV)
    d = tl.arange(0, D_BLOCK)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        first, last = tl.load(FIRST_BLOCK + piece).to(tl.int32), tl.load(FIRST_BLOCK + piece + 1).to(tl.int32)
        totals, all_others = tl.zeros([AT_ONCE, D_BLOCK], tl.float32), tl.zeros([AT_ONCE, D_BLOCK], tl.float32)
        square, right, gram = (
            tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
        )  # fmt: skip
        for start in range(first, last, AT_ONCE):
            block = start + tl.arange(0, AT_ONCE)
            inside = block < last
            n = tl.load(ENDS + block, mask=inside, other=0) - tl.load(BEGINS + block, mask=inside, other=0)
            mask, sums_at = (n > 0)[:, None] & (d < dim)[None, :], block[:, None] * width + d[None, :]
            sums = read(SUMS + at, sums_at, mask, ALIGNED)
            tl.store(SUMS + at + sums_at, sums / (n + 1)[:, None], mask=inside[:, None] & (d < dim)[None, :])
            own = tl.load(SQUARES + block * heads + head, mask=n > 0, other=0.0)
            several, count = n > 1, tl.maximum(n, 1).to(tl.float32)
            product = tl.sum(sums * sums, 1)
            totals += sums
            all_others += sums * (1 - 1 / count)[:, None]
            square += own
            right += tl.where(several, (product - own) / count, 0.0)
            gram += tl.where(several, ((count - 2) * product + own) / (count * count), 0.0)
        n = (tl.load(ENDS + last - 1) - tl.load(BEGINS + first)).to(tl.float32)
        total, others = tl.sum(totals, 0), tl.sum(all_others, 0)
        count, product, squares = tl.maximum(n, 1.0), tl.sum(total * total, 0), tl.sum(square, 0)
        own_right = tl.sum(right, 0)
        several = n > 1
        to = PRODUCTS + (piece * heads + head) * NUM_PRODUCTS
        tl.store(to, squares)
        tl.store(to + 1, tl.where(several, (product - squares) / count, 0.0))
        tl.store(to + 2, own_right)
        tl.store(to + 3, tl.where(several, ((count - 2) * product + squares) / (count * count), 0.0))
        tl.store(to + 4, tl.where(several, (tl.sum(total * others, 0) - own_right) / count, 0.0))
        tl.store(to + 5, tl.sum(gram, 0))
        to = PIECE_SUMS + piece * (3 * width) + at + d
        tl.store(to, total, mask=d < dim)
        tl.store(to + width, others, mask=d < dim)
        tl.store(to + 2 * width, total / (n + 1), mask=d < dim)


# --- 3 the weights of a head ------------------------------------------------------------------------------------------


@triton.jit
def _weigh_kernel(
    PLAN: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
    D_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: one head. Stores its three weights."""
    head = tl.program_id(0)
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    heads: tl.constexpr = HEADS + VALUE_HEADS
    blocks, pieces, _, _, _, FIRST_BLOCK, BEGINS, ENDS = find_segments(PLAN)
    _, PIECE_SUMS, MEAN, _, PRODUCTS, WEIGHTS = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    at, dim = _find_head(head, HEADS, D, VALUE_HEADS, DV)
    d = tl.arange(0, D_BLOCK)
    totals, by_pieces, by_blocks = (
        tl.zeros([AT_ONCE, D_BLOCK], tl.float32), tl.zeros([AT_ONCE, D_BLOCK], tl.float32),
        tl.zeros([AT_ONCE, D_BLOCK], tl.float32),
    )  # fmt: skip
    counts = tl.zeros([AT_ONCE], tl.float32)
    square, r2, r3 = (
        tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
    )  # fmt: skip
    g22, g23, g33 = (
        tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
    )  # fmt: skip
    for start in range(0, pieces, AT_ONCE):
        piece = start + tl.arange(0, AT_ONCE)
        inside = piece < pieces
        first = tl.load(FIRST_BLOCK + piece, mask=inside, other=0)
        last = tl.load(FIRST_BLOCK + piece + 1, mask=inside, other=1) - 1
        n = tl.load(ENDS + last, mask=inside, other=0) - tl.load(BEGINS + first, mask=inside, other=0)
        n = n.to(tl.float32)
        mask = inside[:, None] & (d < dim)[None, :]
        sums_at = piece[:, None] * (3 * width) + d[None, :]
        sums = read(PIECE_SUMS + at, sums_at, mask, ALIGNED)
        totals += sums
        by_pieces += sums * (1 - 1 / tl.maximum(n, 1.0))[:, None]
        by_blocks += read(PIECE_SUMS + at + width, sums_at, mask, ALIGNED)
        counts += n
        products = PRODUCTS + (piece * heads + head) * NUM_PRODUCTS
        square += tl.load(products, mask=inside, other=0.0)
        r2 += tl.load(products + 1, mask=inside, other=0.0)
        r3 += tl.load(products + 2, mask=inside, other=0.0)
        g22 += tl.load(products + 3, mask=inside, other=0.0)
        g23 += tl.load(products + 4, mask=inside, other=0.0)
        g33 += tl.load(products + 5, mask=inside, other=0.0)
    count, total, by_piece, by_block = (
        tl.sum(counts, 0), tl.sum(totals, 0), tl.sum(by_pieces, 0), tl.sum(by_blocks, 0)
    )  # fmt: skip
    others, product, squares = tl.maximum(count - 1, 1.0), tl.sum(total * total, 0), tl.sum(square, 0)
    right2, right3 = tl.sum(r2, 0), tl.sum(r3, 0)
    one, two, three = _ridge(
        ((count - 2) * product + squares) / (others * others), (tl.sum(total * by_piece, 0) - right2) / others,
        (tl.sum(total * by_block, 0) - right3) / others, tl.sum(g22, 0), tl.sum(g23, 0), tl.sum(g33, 0),
        (product - squares) / others, right2, right3, 0.01 + 10 / tl.maximum(count, 1.0),
    )  # fmt: skip
    tl.store(WEIGHTS + head * 3, tl.where(count > 1, one, 0.0))  # one error alone tells nothing
    tl.store(WEIGHTS + head * 3 + 1, tl.where(count > 1, two, 0.0))
    tl.store(WEIGHTS + head * 3 + 2, tl.where(count > 1, three, 0.0))
    tl.store(WEIGHTS + heads * 3, count)  # the same in all programs
    tl.store(MEAN + at + d, total / tl.maximum(count, 1.0), mask=d < dim)


@triton.jit
def _ridge(a, b, c, d, e, f, x, y, z, strength):
    """Solves [a b c; b d e; c e f] w = [x y z] with a share of the diagonal's mean added to it."""
    held = strength * ((a + d + f) / 3) + 1.1754943508222875e-38
    a, d, f = a + held, d + held, f + held
    under_a, below_a = b / a, c / a
    d, e, f = d - under_a * b, e - under_a * c, f - below_a * c
    y, z = y - under_a * x, z - below_a * x
    three = (z - e / d * y) / (f - e / d * e)
    two = (y - e * three) / d
    return (x - b * two - c * three) / a, two, three


# --- 4 what is added --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["layer"])
def _add_offsets_kernel(
    BUFFER: tl.tensor, PLAN: tl.tensor, layer: tl.tensor, most_heads: tl.tensor, dtype: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    ROTATES: tl.constexpr, HALF: tl.constexpr, TABLE: tl.constexpr, IN_STATE: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks, a few heads of keys or of values."""
    part = tl.program_id(1)
    key_parts: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    buffer = find_buffer(BUFFER, layer, dtype, IN_STATE)
    blocks, pieces, STARTS, STOPS, PIECE, _, _, _ = find_segments(PLAN)
    SUMS, PIECE_SUMS, MEAN, _, _, WEIGHTS = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    SIZES = tl.load(PLAN + 6).to(tl.pointer_type(tl.float32))
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        token = tl.load(STARTS + block) + tl.arange(0, TOKENS)[:, None]
        live, piece = token < tl.load(STOPS + block), tl.load(PIECE + block).to(tl.int32)
        block_means, piece_means = SUMS + block * width, PIECE_SUMS + piece * (3 * width) + 2 * width
        if part < key_parts:
            to = SIZES + ((layer * 2).to(tl.int64) * blocks + block) * most_heads
            _add_to_heads(
                buffer + token * width, token, live, block_means, piece_means, MEAN, WEIGHTS, to, PLAN, part * GROUP,
                HEADS, D, PAIRS, ROTATES == 0, HALF, TABLE, TOKENS, GROUP, ALIGNED,
            )  # fmt: skip
        else:
            to = SIZES + ((layer * 2 + 1).to(tl.int64) * blocks + block) * most_heads
            at: tl.constexpr = HEADS * D
            _add_to_heads(
                buffer + token * width + at, token, live, block_means + at, piece_means + at, MEAN + at,
                WEIGHTS + HEADS * 3, to, PLAN, (part - key_parts) * GROUP, VALUE_HEADS, DV, PAIRS, ROTATES == 1, HALF,
                TABLE, TOKENS, GROUP, ALIGNED,
            )  # fmt: skip


@triton.jit
def _add_to_heads(
    rows: tl.tensor, token: tl.tensor, live: tl.tensor, BLOCK_MEANS: tl.tensor, PIECE_MEANS: tl.tensor,
    MEAN: tl.tensor, WEIGHTS: tl.tensor, SIZES: tl.tensor, PLAN: tl.tensor, first: tl.tensor, HEADS: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, TURNS: tl.constexpr, HALF: tl.constexpr, TABLE: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Some heads of a block's rows; the rotary tables are read once for all of them.

    Stores the mean square of each head's offset as a part of that of all heads.
    """
    turned: tl.constexpr = 2 * PAIRS if TURNS else 0
    if TURNS:
        COS = tl.load(PLAN + FIRST_TABLE + 2 * TABLE).to(tl.pointer_type(tl.float32))
        SIN = tl.load(PLAN + FIRST_TABLE + 2 * TABLE + 1).to(tl.pointer_type(tl.float32))
        pair = tl.arange(0, triton.next_power_of_2(PAIRS))[None, :]
        one, other = (pair, pair + PAIRS) if HALF else (2 * pair, 2 * pair + 1)
        turns = live & (pair < PAIRS)
        cos = read(COS, token * PAIRS + pair, turns, ALIGNED)
        sin = read(SIN, token * PAIRS + pair, turns, ALIGNED)
    for head in range(first, tl.minimum(first + GROUP, HEADS)):
        size = 0.0
        if TURNS:
            x = _offset(BLOCK_MEANS, PIECE_MEANS, MEAN, WEIGHTS, head, D, one, pair < PAIRS, ALIGNED and HALF)
            y = _offset(BLOCK_MEANS, PIECE_MEANS, MEAN, WEIGHTS, head, D, other, pair < PAIRS, ALIGNED and HALF)
            if HALF:
                _add(rows, head * D + one, x * cos - y * sin, turns, ALIGNED)
                _add(rows, head * D + other, x * sin + y * cos, turns, ALIGNED)
            else:  # pairs lie next to each other
                both = tl.reshape(tl.join(x * cos - y * sin, x * sin + y * cos), [TOKENS, 2 * cos.shape[1]])
                d = tl.arange(0, 2 * cos.shape[1])[None, :]
                _add(rows, head * D + d, both, live & (d < turned), ALIGNED)
            size += tl.sum(x * x + y * y)
        if turned < D:
            d = turned + tl.arange(0, triton.next_power_of_2(D - turned))[None, :]
            z = _offset(BLOCK_MEANS, PIECE_MEANS, MEAN, WEIGHTS, head, D, d, d < D, ALIGNED)
            _add(rows, head * D + d, z, live & (d < D), ALIGNED)
            size += tl.sum(z * z)
        tl.store(SIZES + head, size / (HEADS * D))


@triton.jit
def _offset(
    BLOCK_MEANS: tl.tensor, PIECE_MEANS: tl.tensor, MEAN: tl.tensor, WEIGHTS: tl.tensor, head: tl.tensor,
    D: tl.constexpr, d: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Three means, weighted."""
    at = head * D + d
    one, two, three = (
        tl.load(WEIGHTS + head * 3), tl.load(WEIGHTS + head * 3 + 1), tl.load(WEIGHTS + head * 3 + 2)
    )  # fmt: skip
    by_piece, by_block = read(PIECE_MEANS, at, mask, ALIGNED), read(BLOCK_MEANS, at, mask, ALIGNED)
    return one * read(MEAN, at, mask, ALIGNED) + two * by_piece + three * by_block


@triton.jit
def _add(rows: tl.tensor, at: tl.tensor, offset: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr):
    to = rows + at
    if ALIGNED:
        to = tl.multiple_of(to, [1, 16])
    states = tl.load(to, mask=mask).to(tl.float32)
    tl.store(to, (states + offset).to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _sizes_kernel(
    PLAN: tl.tensor, OUT: tl.tensor, first: tl.tensor, most_heads: tl.tensor, H_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: keys or values of one piece in one layer."""
    blocks, pieces, STARTS, STOPS, _, FIRST_BLOCK, _, _ = find_segments(PLAN)
    slot, piece = tl.program_id(0) % 2, tl.program_id(1)
    layer, head = first + tl.program_id(0) // 2, tl.arange(0, H_BLOCK)
    SIZES = tl.load(PLAN + 6).to(tl.pointer_type(tl.float32)) + (layer * 2 + slot).to(tl.int64) * blocks * most_heads
    begin, end = tl.load(FIRST_BLOCK + piece).to(tl.int32), tl.load(FIRST_BLOCK + piece + 1).to(tl.int32)
    total, length = tl.zeros([AT_ONCE], tl.float32), tl.zeros([AT_ONCE], tl.float32)
    for start in range(begin, end, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        inside = block < end
        tokens = tl.load(STOPS + block, mask=inside, other=0) - tl.load(STARTS + block, mask=inside, other=0)
        mask = inside[:, None] & (head < most_heads)[None, :]
        sizes = tl.sum(tl.load(SIZES + block[:, None] * most_heads + head[None, :], mask=mask, other=0.0), 1)
        total += tokens.to(tl.float32) * sizes
        length += tokens.to(tl.float32)
    tl.store(OUT + tl.program_id(0) * pieces + piece, tl.sqrt(tl.sum(total, 0) / tl.sum(length, 0)))


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OffsetKernels:
    """The correction of any layer of a model.

    Args:
        layouts: layer -> how its rows are laid out.
        turns: layer -> how they turn; `None` where nothing does.
        block: tokens of a block.
        asking: how far keys are corrected, where the layer's queries are known.
    """

    layouts: dict[int, RowLayout]
    turns: dict[int, Turn | None]
    block: int
    asking: Asking

    def correct(
        self,
        layer: int,
        fresh: KV,
        rows: torch.Tensor,
        buffer: torch.Tensor | State,
        numbers: torch.Tensor,
        args: AttentionArgs | None = None,
    ) -> None:
        """Corrects every row of the moved pieces; those of the pass must be written after that.

        Args:
            fresh: keys (1, Hkv, S, D) and values (1, Hkv, S, Dv) of the pass's rows (S,).
            buffer: the layer's reused rows (T + room, W), or a state that has their address.
            numbers: from `Plan.numbers_for`, on the GPU.
            args: with which the layer will attend, if that is known.
        """
        layout, turn = self.layouts[layer], self.turns[layer]
        keys, values = (states if states.stride(-1) == 1 else states.contiguous() for states in fresh)
        in_state = isinstance(buffer, State)
        place = buffer.numbers if isinstance(buffer, State) else buffer
        heads = {"HEADS": layout.key_heads, "D": layout.key_dim}
        heads |= {"VALUE_HEADS": layout.value_heads, "DV": layout.value_dim}
        turning = {"PAIRS": 8, "ROTATES": -1, "HALF": True, "TABLE": 0}
        if turn is not None:
            turning = {"PAIRS": turn.pairs, "ROTATES": turn.slot, "HALF": turn.half, "TABLE": turn.table}
        d_block, count = triton.next_power_of_2(max(layout.key_dim, layout.value_dim)), layout.key_heads
        count += layout.value_heads
        aligned = layout.key_dim % 8 == layout.value_dim % 8 == turning["PAIRS"] % 8 == 0
        sums = {"D_BLOCK": d_block, "AT_ONCE": max(8, min(64, _ELEMENTS // d_block)), "num_warps": _SUM_WARPS}
        sums["ALIGNED"] = aligned
        _sum_errors_kernel[(max(1, _ERROR_PROGRAMS // count), count)](
            place, numbers, keys, values, rows, layer, *keys.stride()[1:3], *values.stride()[1:3], **heads, **turning,
            IN_STATE=in_state, ROWS=_ROWS, ALIGNED=aligned, num_warps=_ERROR_WARPS,
        )  # fmt: skip
        _sum_pieces_kernel[(_PIECES, count)](numbers, **heads, **sums)
        _weigh_kernel[(count,)](numbers, **heads, **sums)
        slot = 0 if turn is None else turn.slot
        if args is not None and slot == 0 and args.query.shape[2:] == (len(rows), layout.key_dim):
            self.asking.weigh(
                args, place, numbers, keys, rows, layer, **heads, **turning, IN_STATE=in_state, ALIGNED=aligned
            )  # fmt: skip
        group = min(_HEADS, max(layout.key_heads, layout.value_heads))
        parts = triton.cdiv(layout.key_heads, group) + triton.cdiv(layout.value_heads, group)
        _add_offsets_kernel[(max(1, _PROGRAMS // parts), parts)](
            place, numbers, layer, most_heads(self.layouts), getattr(tl, str(keys.dtype).removeprefix("torch.")),
            **heads, **turning, IN_STATE=in_state, TOKENS=triton.next_power_of_2(self.block), GROUP=group,
            ALIGNED=aligned, num_warps=_ADD_WARPS if d_block <= 128 else 8,
        )  # fmt: skip

    def sizes(self, layers: range, numbers: torch.Tensor, pieces: int) -> torch.Tensor:
        """The root mean square of what was added to the keys and values of each piece, (layers, 2, P)."""
        heads, out = most_heads(self.layouts), torch.empty(len(layers), 2, pieces, device=numbers.device)
        _sizes_kernel[(2 * len(layers), pieces)](
            numbers, out, layers.start, heads, H_BLOCK=triton.next_power_of_2(heads), AT_ONCE=32
        )
        return out
