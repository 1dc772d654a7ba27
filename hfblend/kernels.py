"""The Triton kernels behind attention.py, reuse.py and norms.py: what plain functions there compute, faster.

    attend          attention by position                                   attention.reference_attention
    received        how much attention each key gets from all rows          attention.attention_weights, summed
    load_rows       stored rows into a prompt's buffer, keys realigned      rope.rotate and an index_copy_
    write_rows      fresh K/V of a pass into a prompt's buffer              index_copy_
    rms_norm        a model's normalisation, six eager kernels in one       the model's own module

A layer's cached state lies as *rows*, one a token: all heads' keys, then all heads' values (`caches.RowLayout`). A
chunk's rows of a layer are one block, wherever they stand.

A CUDA graph replays fixed addresses, but every prompt has buffers of its own. So kernels inside a graph find them
through a `State`: a few numbers in GPU memory that are written before each replay.

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim, R rotated pairs, W width of a row, L
layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .caches import RowLayout

_LOG2_E = tl.constexpr(1.4426950408889634)
_FIRST_LAYER = tl.constexpr(4)  # of a state, whose first numbers are T, live rows, two addresses
_TOKENS = 32  # a program of load_rows and write_rows moves that many rows of one head

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_PROGRAMS = 8 if _INTERPRETED else 264  # enough to keep a large GPU busy
_MANY_ROWS = [  # tuned on the first call, and kept on disk by Triton
    triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2))
]


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


# --- attention by position ----------------------------------------------------------------------------------------


@triton.jit
def _find_rows(K, V, length, layer, value_offset, dtype: tl.constexpr, IN_STATE: tl.constexpr):
    """Keys, values and T: as passed, or through a state."""
    if IN_STATE:
        length = tl.load(K).to(tl.int32)
        K = tl.load(K + _FIRST_LAYER + layer).to(tl.pointer_type(dtype))
        V = K + value_offset
    return K, V, length


@triton.jit
def _logits(q, k, scaling, softcap, SOFTCAP: tl.constexpr):
    """Attention logits, and the unit that turns them into powers of 2: kept apart, it costs nothing in a later sum."""
    x = tl.dot(q, k, input_precision="ieee")
    if SOFTCAP:
        e = tl.exp2(x * (scaling * 2 * _LOG2_E / softcap))
        x = softcap * (1 - 2 / (e + 1))  # softcap · tanh(x · scaling / softcap)
        unit = 1.0 * _LOG2_E
    else:
        unit = scaling * _LOG2_E
    return x, unit


@triton.jit
def _visit(
    top, total, out, q, K, V, HIDDEN, position, begin, end, length, k_token, v_token, scaling, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, D_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_HIDDEN: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys [begin, end), a block at a time."""
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, DV_BLOCK)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = tl.minimum(key, length - 1) if MASKED else key  # never past the end, where anything may stand
        k_at = tl.multiple_of(K + at[None, :] * k_token + d[:, None], [16, 1])
        k = tl.load(k_at) if D == D_BLOCK else tl.load(k_at, mask=d[:, None] < D, other=0.0)
        x, unit = _logits(q, k, scaling, softcap, SOFTCAP)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            if HAS_HIDDEN:
                seen = seen & (tl.load(HIDDEN + at) == 0)[None, :]
            x = tl.where(seen, x, -1e29)
        higher = tl.maximum(top, tl.max(x, 1) * unit)
        weight = tl.exp2(x * unit - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        v_at = tl.multiple_of(V + at[:, None] * v_token + dv[None, :], [1, 16])
        v = tl.load(v_at) if DV == DV_BLOCK else tl.load(v_at, mask=dv[None, :] < DV, other=0.0)
        out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, out


@triton.jit(do_not_specialize=["length", "num_rows", "layer", "window"])
def _attend_kernel(
    Q, K, V, OUT, LSE, POSITIONS, SINKS, HIDDEN, length, num_rows, layer, value_offset, scaling, softcap, window,
    kv_heads,
    q_batch, q_head, q_row, k_batch, k_head, k_token, v_batch, v_head, v_token,
    D: tl.constexpr, DV: tl.constexpr, D_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, SPLITS: tl.constexpr, IN_STATE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_HIDDEN: tl.constexpr, WRITE_LSE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows = some positions x the query heads of one KV head, over one split of the keys.

    Rows are rising, so a tile's keys end at its last position, and only keys behind its first one need a mask. The
    longest tiles, those of the last rows, come first, so that the short ones fill the gaps at the end.
    """
    PER_TILE: tl.constexpr = ROWS // GROUP_BLOCK
    program, batch, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile = tl.cdiv(num_rows, PER_TILE) - 1 - program // kv_heads
    kv_head = program % kv_heads
    in_tile = tl.arange(0, ROWS)
    row, member = tile * PER_TILE + in_tile // GROUP_BLOCK, in_tile % GROUP_BLOCK
    live = (row < num_rows) & (member < GROUP)
    row, head = tl.minimum(row, num_rows - 1), kv_head * GROUP + tl.minimum(member, GROUP - 1)
    position = tl.load(POSITIONS + batch * num_rows + row)
    first, last = tl.min(position, 0), tl.max(position, 0)

    if IN_STATE:
        HIDDEN = tl.load(K + 3).to(tl.pointer_type(tl.uint8))
    K, V, length = _find_rows(K, V, length, layer, value_offset, Q.dtype.element_ty, IN_STATE)
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, DV_BLOCK)
    q = tl.load(
        Q + batch * q_batch + head[:, None] * q_head + row[:, None] * q_row + d[None, :], mask=d[None, :] < D, other=0.0
    )

    top = tl.full([ROWS], -1e30, tl.float32)  # of the logits so far
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DV_BLOCK], tl.float32)
    if HAS_SINKS:  # one more logit, which takes weight and gives nothing
        if split == 0:
            top = tl.load(SINKS + head).to(tl.float32) * _LOG2_E
            total += 1.0

    begin, end = 0, last + 1
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, SPLITS), KEYS) * KEYS
        begin += split * share
        end = tl.minimum(end, begin + share)
    # Keys that all rows see lie between those that only some see: [begin, open) and [closed, end) need a mask.
    open_, closed = begin, tl.minimum((first + 1) // KEYS * KEYS, end)
    if WINDOW:
        open_ = tl.minimum(tl.maximum(tl.cdiv(last - window + 1, KEYS) * KEYS, begin), end)
    if HAS_HIDDEN:
        open_ = end
    closed = tl.maximum(closed, open_)
    if WINDOW or HAS_HIDDEN:
        top, total, out = _visit(
            top, total, out, q, K, V, HIDDEN, position, begin, open_, length, k_token, v_token, scaling, softcap,
            window, D, DV, D_BLOCK, DV_BLOCK, WINDOW, SOFTCAP, HAS_HIDDEN, True, KEYS,
        )  # fmt: skip
    top, total, out = _visit(
        top, total, out, q, K, V, HIDDEN, position, open_, closed, length, k_token, v_token, scaling, softcap, window,
        D, DV, D_BLOCK, DV_BLOCK, WINDOW, SOFTCAP, HAS_HIDDEN, False, KEYS,
    )  # fmt: skip
    top, total, out = _visit(
        top, total, out, q, K, V, HIDDEN, position, closed, end, length, k_token, v_token, scaling, softcap, window,
        D, DV, D_BLOCK, DV_BLOCK, WINDOW, SOFTCAP, HAS_HIDDEN, True, KEYS,
    )  # fmt: skip

    out = out / tl.maximum(total, 1e-30)[:, None]  # a split may hold no key that the row sees
    index = ((split * tl.num_programs(1) + batch) * num_rows + row) * (kv_heads * GROUP) + head
    tl.store(OUT + index[:, None].to(tl.int64) * DV + dv[None, :], out.to(OUT.dtype.element_ty),
             mask=live[:, None] & (dv[None, :] < DV))  # fmt: skip
    if WRITE_LSE:
        tl.store(LSE + index, top + tl.log2(total), mask=live)


_tuned_attend_kernel = triton.autotune(_MANY_ROWS, key=["D", "DV", "GROUP"], cache_results=True)(_attend_kernel)


@triton.jit
def _combine_kernel(PARTS, LSE, OUT, count, DV: tl.constexpr, DV_BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """One program: one row of one head; the splits' outputs, each weighted by its share of the softmax."""
    index = tl.program_id(0).to(tl.int64)
    split, dv = tl.arange(0, SPLITS), tl.arange(0, DV_BLOCK)
    lse = tl.load(LSE + split * count + index)
    top = tl.max(lse, 0)
    share = tl.exp2(lse - top)
    total = tl.sum(share, 0)
    parts = tl.load(PARTS + (split[:, None] * count + index) * DV + dv[None, :], mask=dv[None, :] < DV, other=0.0)
    out = tl.sum(parts * (share / total)[:, None], 0)
    tl.store(OUT + index * DV + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
    tl.store(LSE + index, top + tl.log2(total))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    *,
    state: State | None = None,
    layer: int = 0,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of rows at rising positions over all keys up to each row's own.

    Args:
        query: (B, H, S, D), last dimension contiguous; key: (B, Hkv, T, D); value: (B, Hkv, T, Dv).
        positions: (B, S) int32, rising: the last key that each row sees.
        hidden: (T,) uint8, 1 at keys that no row sees.
        state: read K/V of `layer`, T and hidden keys from there; `key`, `value` and `hidden` only tell what there is.

    Returns:
        (B, H, S, Dv), and the log2 of each row's softmax denominator (S, H) in fp32 if asked for.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    group = heads // kv_heads
    group_block = triton.next_power_of_2(group)
    out = query.new_empty(batch, rows, heads, value_dim)
    splits = _splits(batch * kv_heads * triton.cdiv(rows * group_block, 64))
    parts = out if splits == 1 else query.new_empty(splits, *out.shape, dtype=torch.float32)
    needs_lse = return_lse or splits > 1
    lse = query.new_empty((splits, batch, rows, heads) if needs_lse else (1,), dtype=torch.float32)

    def grid(config: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(rows, config["ROWS"] // group_block) * kv_heads, batch, splits

    where = (key, value, key.stride(), value.stride(), 0)
    if state is not None:
        layout = state.layouts[layer]
        where = (state.numbers, state.numbers, layout.strides("key"), layout.strides("value"), layout.value_offset)
    k, v, k_strides, v_strides, value_offset = where
    few = splits > 1 or _INTERPRETED
    kernel = _attend_kernel if few else _tuned_attend_kernel
    stages = 3 if max(head_dim, value_dim) <= 128 else 2
    kernel[grid](
        query, k, v, parts, lse, positions, out if sinks is None else sinks, out if hidden is None else hidden,
        length, rows, layer, value_offset, scaling, softcap or 1.0, sliding_window or 0, kv_heads,
        *query.stride()[:3], *k_strides[:3], *v_strides[:3],
        D=head_dim, DV=value_dim, D_BLOCK=triton.next_power_of_2(head_dim), DV_BLOCK=triton.next_power_of_2(value_dim),
        GROUP=group, GROUP_BLOCK=group_block, SPLITS=splits, IN_STATE=state is not None,
        WINDOW=sliding_window is not None, SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None,
        HAS_HIDDEN=hidden is not None, WRITE_LSE=needs_lse,
        **({"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": stages} if few else {}),
    )  # fmt: skip
    if splits > 1:
        count = out.numel() // value_dim
        _combine_kernel[(count,)](
            parts, lse, out, count, DV=value_dim, DV_BLOCK=triton.next_power_of_2(value_dim), SPLITS=splits
        )
    return out.transpose(1, 2), lse[0, 0] if return_lse else None


def _splits(tiles: int) -> int:
    """Into how many parts the keys are split, so that few rows, too, use the whole GPU: a power of 2."""
    return 1 if tiles * 4 > _PROGRAMS else min(64, triton.next_power_of_2(_PROGRAMS // tiles))


@triton.jit(do_not_specialize=["length", "num_rows", "layer", "slot"])
def _received_kernel(
    Q, K, LSE, POSITIONS, OUT, HIDDEN, length, num_rows, layer, slot, scaling, softcap, window,
    heads, group, q_head, q_row, k_head, k_token,
    D: tl.constexpr, D_BLOCK: tl.constexpr, IN_STATE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: one head, every so many blocks of keys; the mean of the rows' softmax weights."""
    head = tl.program_id(1)
    counted = num_rows
    if IN_STATE:
        counted = tl.load(K + 1).to(tl.int32)
        OUT = tl.load(K + 2).to(tl.pointer_type(tl.float32))
        HIDDEN = tl.load(K + 3).to(tl.pointer_type(tl.uint8))
    K, _, length = _find_rows(K, K, length, layer, 0, Q.dtype.element_ty, IN_STATE)
    K += head // group * k_head
    d = tl.arange(0, D_BLOCK)
    for block in range(tl.program_id(0), tl.cdiv(length, KEYS), tl.num_programs(0)):
        key = block * KEYS + tl.arange(0, KEYS)
        at = tl.minimum(key, length - 1)
        k_at = tl.multiple_of(K + at[None, :] * k_token + d[:, None], [16, 1])
        k = tl.load(k_at, mask=d[:, None] < D, other=0.0)
        received = tl.zeros([KEYS], tl.float32)
        for start in range(0, counted, ROWS):
            row = start + tl.arange(0, ROWS)
            live = row < counted
            q = tl.load(Q + head * q_head + row[:, None] * q_row + d[None, :],
                        mask=live[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
            position = tl.load(POSITIONS + row, mask=live, other=-1)
            lse = tl.load(LSE + row * heads + head, mask=live, other=0.0)
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            if HAS_HIDDEN:
                seen = seen & (tl.load(HIDDEN + at) == 0)[None, :]
            x, unit = _logits(q, k, scaling, softcap, SOFTCAP)
            received += tl.sum(tl.where(seen, tl.exp2(x * unit - lse[:, None]), 0.0), 0)
        out = OUT + (slot * heads + head).to(tl.int64) * length + key
        tl.store(out, received / counted, mask=key < length)


def received(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    hidden: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    state: State | None = None,
    layer: int = 0,
    slot: int = 0,
) -> None:
    """The mean, over the rows, of the attention weights that each key receives, written to `out` (H, T) in fp32.

    Args:
        query: (1, H, S, D); key: (1, Hkv, T, D); positions: (1, S) int32.
        lse: (S, H) from `attend`; sinks are in it.
        state: read K of `layer`, T and the number of rows that count from there, and write to the `slot`-th (H, T) at
            the state's address.
    """
    _, heads, rows, head_dim = query.shape
    k, k_strides = (key, key.stride()) if state is None else (state.numbers, state.layouts[layer].strides("key"))
    _received_kernel[(_PROGRAMS // 4, heads)](
        query, k, lse, positions, lse if out is None else out, lse if hidden is None else hidden,
        key.shape[2], rows, layer, slot, scaling, softcap or 1.0, sliding_window or 0,
        heads, heads // key.shape[1], *query.stride()[1:3], *k_strides[1:3],
        D=head_dim, D_BLOCK=triton.next_power_of_2(head_dim), IN_STATE=state is not None,
        WINDOW=sliding_window is not None, SOFTCAP=softcap is not None, HAS_HIDDEN=hidden is not None,
        ROWS=32, KEYS=64, num_warps=4,
    )  # fmt: skip


# --- rows of the cache --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "layer"])
def _write_rows_kernel(
    KEYS, VALUES, ROWS, STATE, num_rows, layer, key_heads, k_head, k_row, v_head, v_row, width,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: some rows of one head, of keys or of values."""
    i, head = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    base = tl.load(STATE + _FIRST_LAYER + layer).to(tl.pointer_type(KEYS.dtype.element_ty))
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


@triton.jit
def _load_rows_kernel(
    TARGETS, SOURCES, TILES, COS, SIN, pieces, width, pairs, dtype: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
    TOKENS: tl.constexpr, ROTATES: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: up to TOKENS tokens of one piece, the keys or the values of one layer."""
    tile, slot, layer = TILES + tl.program_id(0) * 5, tl.program_id(1), tl.program_id(2)
    piece, from_row, to_row = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    count, turn = tl.load(tile + 3), tl.load(tile + 4)
    token = tl.arange(0, TOKENS)
    live = (token < count)[:, None]
    source = tl.load(SOURCES + layer * pieces + piece).to(tl.pointer_type(dtype))
    target = tl.load(TARGETS + layer).to(tl.pointer_type(dtype))
    source += (from_row + token).to(tl.int64)[:, None] * width
    target += (to_row + token).to(tl.int64)[:, None] * width
    if slot == 0:
        turns = ROTATES == 0 and turn >= 0
        _move_heads(
            source, target, COS, SIN, turn + token, live, turns, pairs, HEADS, D, PAIRS, HALF, ROTATES == 0, ALIGNED
        )
    else:
        turns = ROTATES == 1 and turn >= 0
        source += HEADS * D
        target += HEADS * D
        _move_heads(
            source,
            target,
            COS,
            SIN,
            turn + token,
            live,
            turns,
            pairs,
            VALUE_HEADS,
            DV,
            PAIRS,
            HALF,
            ROTATES == 1,
            ALIGNED,
        )


@triton.jit
def _move_heads(
    source, target, COS, SIN, row, live, turns, pairs, HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    HALF: tl.constexpr, MAY_TURN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """All heads of some tokens; the rotary tables are read once for all of them.

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


def tiles_of(pieces: list[tuple[int, int, int]]) -> torch.Tensor:
    """How `load_rows` divides its work, (tiles, 5) int32: piece, its row, the buffer's row, tokens, row of the tables.

    Args:
        pieces: of each, in the order of the sources: tokens, first row in the buffer, and first row in the rotary
            tables or −1 for a piece that is copied as it is.
    """
    return torch.tensor(
        [
            (piece, start, to_row + start, min(tokens - start, _TOKENS), -1 if turn < 0 else turn + start)
            for piece, (tokens, to_row, turn) in enumerate(pieces)
            for start in range(0, tokens, _TOKENS)
        ],
        dtype=torch.int32,
    )


def load_rows(
    targets: torch.Tensor,
    sources: torch.Tensor,
    tiles: torch.Tensor,
    layout: RowLayout,
    dtype: torch.dtype,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    rotates: int = -1,
    half: bool = True,
) -> None:
    """Copies stored rows into the buffers of some layers and turns the rotated slot on the way, in fp32, rounded once.

    Args:
        targets: (n,) int64, address of each layer's buffer (T + room, W).
        sources: (n, pieces) int64, address of each piece's first row; it may lie in the buffer itself.
        tiles: from `tiles_of`, on the GPU.
        dtype: of the rows.
        tables: cos and sin (N, R) in fp32, as for `rope.rotate`.
        rotates: 0 if keys turn, 1 if values do, −1 if nothing.
        half: dimension i turns with i + R, else 2i with 2i + 1.
    """
    cos, sin = (tiles, tiles) if tables is None else tables
    pairs = 8 if tables is None else cos.shape[1]
    _load_rows_kernel[(len(tiles), 2, len(targets))](
        targets, sources, tiles, cos, sin, sources.shape[1], layout.width, pairs, _TRITON_TYPES[dtype],
        HEADS=layout.key_heads, D=layout.key_dim, VALUE_HEADS=layout.value_heads, DV=layout.value_dim,
        PAIRS=triton.next_power_of_2(pairs), TOKENS=_TOKENS, ROTATES=rotates, HALF=half,
        ALIGNED=layout.key_dim % 8 == layout.value_dim % 8 == pairs % 8 == 0,
    )  # fmt: skip


# --- normalisation ------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_kernel(X, WEIGHT, OUT, stride, size, epsilon, offset, BLOCK: tl.constexpr, LATE: tl.constexpr):
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
