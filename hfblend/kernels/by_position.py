"""Attention of rows at rising positions over all keys up to each row's own, and how much of it each key receives.

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .reference import AttentionArgs
from .state import FIRST_LAYER, Placed, State

hopper: Any  # None where Triton has no Gluon
try:
    from . import hopper
except ImportError:
    hopper = None

_LOG2_E = tl.constexpr(1.4426950408889634)
# A hidden logit lies so far below the lowest running maximum that its weight is 0 even where a row sees no key of a
# block. Were it the maximum itself, x · unit - maximum would be the rounding of one product, 1e21, as it is fused.
_HIDDEN, _LOWEST = tl.constexpr(-1e29), tl.constexpr(-1e20)
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_PROGRAMS = 8 if _INTERPRETED else 264  # enough to keep a large GPU busy
_MANY_ROWS = [  # tuned on the first call, and kept on disk by Triton
    triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in ((128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2))
]


@triton.jit
def _find_rows(
    K: tl.tensor, V: tl.tensor, length: tl.tensor, layer: tl.tensor, value_offset: tl.tensor, dtype: tl.constexpr,
    IN_STATE: tl.constexpr,
):  # fmt: skip
    """Keys, values and T: as passed, or through a state."""
    if IN_STATE:
        length = tl.load(K).to(tl.int32)
        K = tl.load(K + FIRST_LAYER + layer).to(tl.pointer_type(dtype))
        V = K + value_offset
    return K, V, length


@triton.jit
def _logits(q: tl.tensor, k: tl.tensor, scaling: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr):
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
def _seen(
    key: tl.tensor, at: tl.tensor, position: tl.tensor, HIDDEN: tl.tensor, window: tl.tensor, WINDOW: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The keys that the rows at `position` see; `at` is `key`, but never past the last one."""
    seen = key[None, :] <= position[:, None]
    if WINDOW:
        seen = seen & (key[None, :] > position[:, None] - window)
    if HAS_HIDDEN:
        seen = seen & (tl.load(HIDDEN + at) == 0)[None, :]
    return seen


@triton.jit
def _visit(
    top: tl.tensor, total: tl.tensor, out: tl.tensor, q: tl.tensor, K: tl.tensor, V: tl.tensor, HIDDEN: tl.tensor,
    position: tl.tensor, begin: tl.tensor, end: tl.tensor, length: tl.tensor, k_token: tl.tensor, v_token: tl.tensor,
    scaling: tl.tensor, softcap: tl.tensor, window: tl.tensor, D: tl.constexpr, DV: tl.constexpr, D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_HIDDEN: tl.constexpr, MASKED: tl.constexpr,
    KEYS: tl.constexpr,
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
            x = tl.where(_seen(key, at, position, HIDDEN, window, WINDOW, HAS_HIDDEN), x, _HIDDEN)
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
    Q: tl.tensor, K: tl.tensor, V: tl.tensor, OUT: tl.tensor, LSE: tl.tensor, POSITIONS: tl.tensor, SINKS: tl.tensor,
    HIDDEN: tl.tensor, length: tl.tensor, num_rows: tl.tensor, layer: tl.tensor, value_offset: tl.tensor,
    scaling: tl.tensor, softcap: tl.tensor, window: tl.tensor, kv_heads: tl.tensor, q_batch: tl.tensor,
    q_head: tl.tensor, q_row: tl.tensor, k_batch: tl.tensor, k_head: tl.tensor, k_token: tl.tensor, v_batch: tl.tensor,
    v_head: tl.tensor, v_token: tl.tensor, D: tl.constexpr, DV: tl.constexpr, D_BLOCK: tl.constexpr,
    DV_BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    IN_STATE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr, WRITE_LSE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows = some positions x the query heads of one KV head, over one split of the keys.

    Rows are rising, so a tile's keys end at its last position, and only keys after its first one need a mask. The
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

    top = tl.full([ROWS], _LOWEST, tl.float32)  # of the logits so far
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

    total = tl.maximum(total, 1e-30)  # a split may hold no key that the row sees
    out = out / total[:, None]
    index = ((split * tl.num_programs(1) + batch) * num_rows + row) * (kv_heads * GROUP) + head
    tl.store(OUT + index[:, None].to(tl.int64) * DV + dv[None, :], out.to(OUT.dtype.element_ty),
             mask=live[:, None] & (dv[None, :] < DV))  # fmt: skip
    if WRITE_LSE:
        tl.store(LSE + index, top + tl.log2(total), mask=live)


_tuned_attend_kernel = triton.autotune(_MANY_ROWS, key=["D", "DV", "GROUP"], cache_results=True)(_attend_kernel)


@triton.jit
def _combine_kernel(
    PARTS: tl.tensor, LSE: tl.tensor, OUT: tl.tensor, count: tl.tensor, DV: tl.constexpr, DV_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
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
    args: AttentionArgs,
    positions: torch.Tensor,
    hidden: torch.Tensor | None = None,
    *,
    state: State | None = None,
    layer: int = 0,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of rows at rising positions over all keys up to each row's own.

    Args:
        args: with last dimensions contiguous.
        positions: (B, S) int32, rising: the last key that each row sees.
        hidden: (T,) uint8, 1 at keys that no row sees.
        state: read K/V of `layer`, T and hidden keys from there; keys, values and `hidden` then give shapes only.

    Returns:
        (B, H, S, Dv), and the log2 of each row's softmax denominator (S, H) in fp32 if asked for.
    """
    query, sinks = args.query, args.sinks
    batch, heads, rows, head_dim = query.shape
    kv_heads, value_dim = args.key.shape[1], args.value.shape[3]
    group = heads // kv_heads
    group_block = triton.next_power_of_2(group)
    out = query.new_empty(batch, rows, heads, value_dim)
    splits = _splits(batch * kv_heads * triton.cdiv(rows * group_block, 64))
    parts = out if splits == 1 else query.new_empty(splits, *out.shape, dtype=torch.float32)
    needs_lse = return_lse or splits > 1
    lse = query.new_empty((splits, batch, rows, heads) if needs_lse else (1,), dtype=torch.float32)

    def grid(config: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(rows, config["ROWS"] // group_block) * kv_heads, batch, splits

    at = Placed.of(args, state, layer)
    is_plain = args.is_plain and hidden is None and not needs_lse and head_dim == value_dim
    if is_plain and hopper is not None and hopper.attend(args, at, positions, out):
        return out.transpose(1, 2), None
    few = splits > 1 or _INTERPRETED
    kernel = _attend_kernel if few else _tuned_attend_kernel
    few_rows = 16 if rows * group_block <= 16 else 64  # a token that is decoded, its heads: the least that `dot` takes
    stages = 3 if max(head_dim, value_dim) <= 128 else 2
    kernel[grid](
        query, at.key, at.value, parts, lse, positions, out if sinks is None else sinks,
        out if hidden is None else hidden, args.length, rows, layer, at.value_offset, args.scaling, args.softcap or 1.0,
        args.sliding_window or 0, kv_heads, *query.stride()[:3], *at.key_strides, *at.value_strides,
        D=head_dim, DV=value_dim, D_BLOCK=triton.next_power_of_2(head_dim), DV_BLOCK=triton.next_power_of_2(value_dim),
        GROUP=group, GROUP_BLOCK=group_block, SPLITS=splits, IN_STATE=at.in_state,
        WINDOW=args.sliding_window is not None, SOFTCAP=args.softcap is not None, HAS_SINKS=sinks is not None,
        HAS_HIDDEN=hidden is not None, WRITE_LSE=needs_lse,
        **({"ROWS": few_rows, "KEYS": 64, "num_warps": 4, "num_stages": stages} if few else {}),
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
    Q: tl.tensor, K: tl.tensor, LSE: tl.tensor, POSITIONS: tl.tensor, OUT: tl.tensor, HIDDEN: tl.tensor,
    length: tl.tensor, num_rows: tl.tensor, layer: tl.tensor, slot: tl.tensor, scaling: tl.tensor, softcap: tl.tensor,
    window: tl.tensor, heads: tl.tensor, q_head: tl.tensor, q_row: tl.tensor, k_head: tl.tensor, k_token: tl.tensor,
    D: tl.constexpr, D_BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, IN_STATE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_HIDDEN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one KV head, every so many blocks of keys; the mean of the rows' weights.

    Rows are some positions x those heads, as in `_attend_kernel`, so that a key is read once for all of them.
    """
    PER_TILE: tl.constexpr = ROWS // GROUP_BLOCK
    kv_head = tl.program_id(1)
    counted = num_rows
    if IN_STATE:
        counted = tl.load(K + 1).to(tl.int32)
        OUT = tl.load(K + 2).to(tl.pointer_type(tl.float32))
        HIDDEN = tl.load(K + 3).to(tl.pointer_type(tl.uint8))
    K, _, length = _find_rows(K, K, length, layer, 0, Q.dtype.element_ty, IN_STATE)
    K += kv_head * k_head
    d, in_tile, members = tl.arange(0, D_BLOCK), tl.arange(0, ROWS), tl.arange(0, GROUP_BLOCK)
    OUT += (slot * heads + kv_head * GROUP + members[:, None]).to(tl.int64) * length
    for start in range(0, counted, PER_TILE):
        tl.debug_barrier()  # the sums of the tile before it are written
        row, member = start + in_tile // GROUP_BLOCK, in_tile % GROUP_BLOCK
        live = (row < counted) & (member < GROUP)
        head = kv_head * GROUP + member
        q = tl.load(Q + head[:, None] * q_head + row[:, None] * q_row + d[None, :],
                    mask=live[:, None] & (d[None, :] < D), other=0.0)  # fmt: skip
        position = tl.load(POSITIONS + row, mask=live, other=-1)
        lse = tl.load(LSE + row * heads + head, mask=live, other=0.0)
        for block in range(tl.program_id(0), tl.cdiv(length, KEYS), tl.num_programs(0)):
            key = block * KEYS + tl.arange(0, KEYS)
            at = tl.minimum(key, length - 1)
            k_at = tl.multiple_of(K + at[None, :] * k_token + d[:, None], [16, 1])
            k = tl.load(k_at) if D == D_BLOCK else tl.load(k_at, mask=d[:, None] < D, other=0.0)
            seen = _seen(key, at, position, HIDDEN, window, WINDOW, HAS_HIDDEN)
            x, unit = _logits(q, k, scaling, softcap, SOFTCAP)
            weight = tl.where(seen, tl.exp2(x * unit - lse[:, None]), 0.0)
            received = tl.sum(tl.reshape(weight, [PER_TILE, GROUP_BLOCK, KEYS]), 0) / counted
            to, mask = OUT + key[None, :], (members[:, None] < GROUP) & (key[None, :] < length)
            if start > 0:
                received += tl.load(to, mask=mask, other=0.0)
            tl.store(to, received, mask=mask)


def received(
    args: AttentionArgs,
    lse: torch.Tensor,
    positions: torch.Tensor,
    hidden: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    state: State | None = None,
    layer: int = 0,
    slot: int = 0,
) -> None:
    """The mean, over the rows, of the attention weights that each key receives, written to `out` (H, T) in fp32.

    Args:
        args: of one prompt; values are not read.
        lse: (S, H) from `attend`; sinks are in it.
        positions: (1, S) int32.
        state: read K of `layer`, T and the number of rows that count from there, and write to the `slot`-th (H, T) at
            the state's address.
    """
    _, heads, rows, head_dim = args.query.shape
    kv_heads = args.key.shape[1]
    group_block = triton.next_power_of_2(heads // kv_heads)
    at = Placed.of(args, state, layer)
    _received_kernel[(max(1, _PROGRAMS // kv_heads), kv_heads)](
        args.query, at.key, lse, positions, lse if out is None else out, lse if hidden is None else hidden,
        args.length, rows, layer, slot, args.scaling, args.softcap or 1.0, args.sliding_window or 0,
        heads, *args.query.stride()[1:3], *at.key_strides[1:],
        D=head_dim, D_BLOCK=triton.next_power_of_2(head_dim), GROUP=heads // kv_heads, GROUP_BLOCK=group_block,
        IN_STATE=at.in_state, WINDOW=args.sliding_window is not None, SOFTCAP=args.softcap is not None,
        HAS_HIDDEN=hidden is not None, KEYS=64, num_warps=4,
        ROWS=max(16, group_block, min(128, triton.next_power_of_2(rows) * group_block)),
    )  # fmt: skip
