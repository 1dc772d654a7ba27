"""Rows of the cache: written by a pass, and gathered from stored chunks with their keys realigned on the way.

Shapes: Hkv KV heads, S rows of a pass, T tokens, N moved tokens, D head_dim, R rotated pairs, W width of a row, L
layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..kv.rows import RowLayout
from .state import FIRST_LAYER, State

_TOKENS = 32  # a program moves that many rows


@triton.jit(do_not_specialize=["num_rows", "layer"])
def _write_rows_kernel(
    KEYS: tl.tensor, VALUES: tl.tensor, ROWS: tl.tensor, STATE: tl.tensor, num_rows: tl.tensor, layer: tl.tensor,
    key_heads: tl.tensor, k_head: tl.tensor, k_row: tl.tensor, v_head: tl.tensor, v_row: tl.tensor, width: tl.tensor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one head, of keys or of values."""
    i, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    base = tl.load(STATE + FIRST_LAYER + layer).to(tl.pointer_type(KEYS.dtype.element_ty))
    row = tl.load(ROWS + i, mask=i < num_rows, other=0).to(tl.int64)
    if head < key_heads:
        mask = (i[:, None] < num_rows) & (d[None, :] < D)
        states = tl.load(KEYS + head * k_head + i[:, None] * k_row + d[None, :], mask=mask)
        to = base + row[:, None] * width + head * D + d[None, :]
        if ALIGNED:
            to = tl.multiple_of(to, [1, 16])
        tl.store(to, states, mask=mask)
    else:
        head -= key_heads
        mask = (i[:, None] < num_rows) & (d[None, :] < DV)
        states = tl.load(VALUES + head * v_head + i[:, None] * v_row + d[None, :], mask=mask)
        to = base + row[:, None] * width + key_heads * D + head * DV + d[None, :]
        if ALIGNED:
            to = tl.multiple_of(to, [1, 16])
        tl.store(to, states, mask=mask)


def write_rows(keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, state: State, layer: int) -> None:
    """Writes fresh keys (1, Hkv, S, D) and values (1, Hkv, S, Dv) to rows (S,) of a layer's buffer."""
    layout = state.layouts[layer]
    count = keys.shape[2]
    _write_rows_kernel[(triton.cdiv(count, _TOKENS), layout.key_heads + layout.value_heads)](
        keys, values, rows, state.numbers, count, layer, layout.key_heads, *keys.stride()[1:3], *values.stride()[1:3],
        layout.width, D=layout.key_dim, DV=layout.value_dim,
        BLOCK=triton.next_power_of_2(max(layout.key_dim, layout.value_dim)), TOKENS=_TOKENS,
        ALIGNED=layout.key_dim % 8 == layout.value_dim % 8 == 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pieces"])
def _load_rows_kernel(
    TARGETS: tl.tensor, SOURCES: tl.tensor, PIECES: tl.tensor, COS: tl.tensor, SIN: tl.tensor, pieces: tl.tensor,
    width: tl.tensor, pairs: tl.tensor, dtype: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, ROTATES: tl.constexpr,
    HALF: tl.constexpr, BETWEEN: tl.constexpr, ALIGNED: tl.constexpr, P_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: up to TOKENS tokens of one piece, the keys or the values of one layer."""
    tile, slot, layer, nth = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, P_BLOCK)
    piece = tl.sum((tl.load(PIECES + nth * 4, mask=nth < pieces, other=1 << 40) <= tile).to(tl.int32), 0) - 1
    first_tile, size = tl.load(PIECES + piece * 4).to(tl.int32), tl.load(PIECES + piece * 4 + 1).to(tl.int32)
    to_row, turn = tl.load(PIECES + piece * 4 + 2).to(tl.int32), tl.load(PIECES + piece * 4 + 3).to(tl.int32)
    token = (tile - first_tile) * TOKENS + tl.arange(0, TOKENS)
    live = (token < size)[:, None]
    source = tl.load(SOURCES + layer * pieces + piece).to(tl.pointer_type(dtype)) + token.to(tl.int64)[:, None] * width
    target = tl.load(TARGETS + layer).to(tl.pointer_type(dtype)) + (to_row + token).to(tl.int64)[:, None] * width
    if slot == 0:
        turns = ROTATES == 0 and turn >= 0
        _move_heads(
            source, target, COS, SIN, turn + token, to_row + token, live, turns, pairs, HEADS, D, PAIRS, HALF, BETWEEN,
            ROTATES == 0, ALIGNED,
        )  # fmt: skip
    else:
        turns = ROTATES == 1 and turn >= 0
        source += HEADS * D
        target += HEADS * D
        _move_heads(
            source, target, COS, SIN, turn + token, to_row + token, live, turns, pairs, VALUE_HEADS, DV, PAIRS, HALF,
            BETWEEN, ROTATES == 1, ALIGNED,
        )  # fmt: skip


@triton.jit
def _move_heads(
    source: tl.tensor, target: tl.tensor, COS: tl.tensor, SIN: tl.tensor, row: tl.tensor, to_row: tl.tensor,
    live: tl.tensor, turns: tl.tensor, pairs: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    HALF: tl.constexpr, BETWEEN: tl.constexpr, MAY_TURN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens; the rotary tables are read once for all of them.

    BETWEEN: the tables' rows are positions, and tokens turn from `row` to `to_row`; else they turn by `row`.
    ALIGNED: heads start at multiples of 16 bytes, which an address read from memory does not tell the compiler.
    """
    d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    copied_from = 0
    if MAY_TURN:
        if turns:
            copied_from = 2 * pairs
            pair = tl.arange(0, PAIRS)[None, :]
            mask = live & (pair < pairs)
            one, other = (pair, pair + pairs) if HALF else (2 * pair, 2 * pair + 1)
            cos = tl.load(COS + row[:, None] * pairs + pair, mask=mask)
            sin = tl.load(SIN + row[:, None] * pairs + pair, mask=mask)
            if BETWEEN:
                to_cos = tl.load(COS + to_row[:, None] * pairs + pair, mask=mask)
                to_sin = tl.load(SIN + to_row[:, None] * pairs + pair, mask=mask)
                cos, sin = to_cos * cos + to_sin * sin, to_sin * cos - to_cos * sin
            for head in range(HEADS):
                from_one, from_other = source + head * D + one, source + head * D + other
                to_one, to_other = target + head * D + one, target + head * D + other
                if ALIGNED and HALF:
                    from_one, from_other = tl.multiple_of(from_one, [1, 16]), tl.multiple_of(from_other, [1, 16])
                    to_one, to_other = tl.multiple_of(to_one, [1, 16]), tl.multiple_of(to_other, [1, 16])
                x = tl.load(from_one, mask=mask).to(tl.float32)
                y = tl.load(from_other, mask=mask).to(tl.float32)
                tl.store(to_one, (x * cos - y * sin).to(target.dtype.element_ty), mask=mask)
                tl.store(to_other, (x * sin + y * cos).to(target.dtype.element_ty), mask=mask)
    if copied_from < D:
        mask = live & (d >= copied_from) & (d < D)
        for head in range(HEADS):
            from_all, to_all = source + head * D + d, target + head * D + d
            if ALIGNED:
                from_all, to_all = tl.multiple_of(from_all, [1, 16]), tl.multiple_of(to_all, [1, 16])
            tl.store(to_all, tl.load(from_all, mask=mask), mask=mask)


def pieces_of(pieces: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """The pieces of `load_rows` as numbers, four each (its first tile, tokens, row in the buffer, turn), and the number
    of all their tiles.

    Args:
        pieces: of each, in the order of the sources: tokens, first row in the buffer, and what it turns by.
    """
    numbers, tiles = list[int](), 0
    for tokens, to_row, turn in pieces:
        numbers += (tiles, tokens, to_row, turn)
        tiles += -(-tokens // _TOKENS)
    return numbers, tiles


def load_rows(
    targets: torch.Tensor,
    sources: torch.Tensor,
    pieces: torch.Tensor,
    tiles: int,
    layout: RowLayout,
    dtype: torch.dtype,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    rotates: int = -1,
    half: bool = True,
    between: bool = False,
) -> None:
    """Copies stored rows into the buffers of some layers and turns the rotated slot on the way, in fp32, rounded once.

    Args:
        targets: (n,) int64, address of each layer's buffer (T + room, W).
        sources: (n, P) int64, address of each piece's first row: elsewhere, or its own place in the buffer.
        pieces: (P, 4) int64 on the GPU, and `tiles`: from `pieces_of`.
        dtype: of the rows.
        tables: cos and sin in fp32. (N, R), as for `rotation.rotate`: a piece turns by the row of its turn, the next
            ones; −1 does not turn.
        rotates: 0 if keys turn, 1 if values do, −1 if nothing.
        half: dimension i turns with i + R, else 2i with 2i + 1.
        between: the tables (positions, R) are those of positions, without scaling: a turn is the position of the
            piece's first token when it was cached, and its row in the buffer the new one.
    """
    cos, sin = (pieces, pieces) if tables is None else tables
    triton_type = getattr(tl, str(dtype).removeprefix("torch."))
    pairs, count = 8 if tables is None else cos.shape[1], sources.shape[1]
    p_block = max(64, triton.next_power_of_2(count))  # few kernels for prompts of many forms
    _load_rows_kernel[(tiles, 2, len(targets))](
        targets, sources, pieces, cos, sin, count, layout.width, pairs, triton_type,
        HEADS=layout.key_heads, D=layout.key_dim, VALUE_HEADS=layout.value_heads, DV=layout.value_dim,
        PAIRS=triton.next_power_of_2(pairs), TOKENS=_TOKENS, ROTATES=rotates, HALF=half, BETWEEN=between,
        ALIGNED=layout.key_dim % 8 == layout.value_dim % 8 == pairs % 8 == 0, P_BLOCK=p_block,
    )  # fmt: skip
