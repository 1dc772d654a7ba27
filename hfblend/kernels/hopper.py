"""Attention of many rows on a Hopper GPU, as `by_position.attend` computes it, a third faster.

Written in Gluon, Triton's language in which warps can do different work. A program has 128 rows. One warp copies blocks
of keys and values into four places in shared memory; two groups of four warps take 64 rows each, and keep the matrix
units busy with the last block's values while they compute the softmax of the next one:

    copied      k₀  v₀  k₁  v₁  k₂ …         into a place that both groups have done with
    multiplied  q·k₀    q·k₁  w₀·v₀  q·k₂  w₁·v₁ …
    softmax         w₀      w₁            w₂ …

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

import contextvars
import functools
import logging

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .reference import AttentionArgs
from .state import FIRST_LAYER, Placed

logger = logging.getLogger(__name__)

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as it was called up to Triton 3.7
_LOG2_E = 1.4426950408889634
_HIDDEN, _LOWEST = gl.constexpr(-1e29), gl.constexpr(-1e20)  # as in by_position.py
_ROWS = gl.constexpr(64)  # of a group of warps
_PLACES = gl.constexpr(4)  # keys stand in the even ones, values in the odd ones
_HEAD_DIMS = (128, 256)  # with 64, softmax takes as long as the products, and the other kernel is faster
_FEWEST_PROGRAMS = 100  # fewer leave too many of the GPU's processors idle
_compiles = True


@gluon.constexpr_function
def _result(columns: int) -> gl.NVMMADistributedLayout:
    """The layout in which a group of warps holds the result of a product, 64 rows of so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def _left(columns: int) -> gl.DotOperandLayout:
    """The layout of the left side of a product with that result."""
    return gl.DotOperandLayout(0, _result(columns), 2)


@gluon.jit
def _copy(
    source: tma.tensor_descriptor, block: gl.tensor, number: gl.tensor, places: gl.shared_memory_descriptor,
    filled: gl.shared_memory_descriptor, free: gl.shared_memory_descriptor, KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The `number`-th copy: a block of keys or values into the next place, once it is free."""
    at = number % _PLACES
    mbarrier.wait(free.index(at), (number // _PLACES & 1) ^ 1)
    mbarrier.expect(filled.index(at), KEYS * D * 2)
    _load(source, [block * KEYS, 0], filled.index(at), places.index(at))


@gluon.jit
def _copy_all(
    keys: tma.tensor_descriptor, values: tma.tensor_descriptor, blocks: gl.tensor, places: gl.shared_memory_descriptor,
    filled: gl.shared_memory_descriptor, free: gl.shared_memory_descriptor, KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The work of the copying warp."""
    for block in range(0, blocks):
        _copy(keys, block, 2 * block, places, filled, free, KEYS, D)
        _copy(values, block, 2 * block + 1, places, filled, free, KEYS, D)


@gluon.jit
def _multiply(
    x: gl.tensor, out: gl.tensor, number: gl.tensor, places: gl.shared_memory_descriptor,
    filled: gl.shared_memory_descriptor, TRANSPOSED: gl.constexpr, FRESH: gl.constexpr,
):  # fmt: skip
    """Starts x · (the `number`-th copy), added to `out` unless that is fresh."""
    at = number % _PLACES
    mbarrier.wait(filled.index(at), number // _PLACES & 1)
    y = places.index(at)
    if TRANSPOSED:
        y = y.permute((1, 0))
    return warpgroup_mma(x, y, out, use_acc=not FRESH, is_async=True)


@gluon.jit
def _softmax(
    x: gl.tensor, top: gl.tensor, total: gl.tensor, position: gl.tensor, block: gl.tensor, unit: gl.tensor,
    dtype: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """A step of the online softmax: the block's weights, and by how much those before them shrink."""
    if MASKED:
        key = block * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, _result(KEYS)))
        x = gl.where(key[None, :] <= position[:, None], x, _HIDDEN)
    higher = gl.maximum(top, gl.max(x, 1) * unit)
    weight = gl.exp2(x * unit - higher[:, None])
    shrink = gl.exp2(top - higher)
    total = total * shrink + gl.sum(weight, 1)
    return higher, total, shrink, gl.convert_layout(weight.to(dtype), _left(D))


@gluon.jit
def _visit(
    top: gl.tensor, total: gl.tensor, out: gl.tensor, weight: gl.tensor, q: gl.tensor, position: gl.tensor,
    begin: gl.tensor, end: gl.tensor, unit: gl.tensor, places: gl.shared_memory_descriptor,
    filled: gl.shared_memory_descriptor, free: gl.shared_memory_descriptor, KEYS: gl.constexpr, D: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """The blocks [begin, end); `weight` are those of the block before, whose values are still to be added."""
    for block in range(begin, end):
        x = gl.zeros([_ROWS, KEYS], gl.float32, _result(KEYS))
        x = _multiply(q, x, 2 * block, places, filled, True, True)
        out = _multiply(weight, out, 2 * block - 1, places, filled, False, False)
        x = warpgroup_mma_wait(1, (x,))
        mbarrier.arrive(free.index(2 * block % _PLACES))
        top, total, shrink, after = _softmax(x, top, total, position, block, unit, weight.dtype, KEYS, D, MASKED)
        out, weight = warpgroup_mma_wait(0, (out, weight))
        mbarrier.arrive(free.index((2 * block - 1) % _PLACES))
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, _result(D)))[:, None]
        weight = after
    return top, total, out, weight


@gluon.jit
def _attend_rows(
    first_row: gl.tensor, q: gl.shared_memory_descriptor, Q: gl.tensor, OUT: gl.tensor, POSITIONS: gl.tensor,
    num_rows: gl.tensor, kv_head: gl.tensor, kv_heads: gl.tensor, unit: gl.tensor, q_head: gl.tensor, q_row: gl.tensor,
    open_blocks: gl.tensor, blocks: gl.tensor, places: gl.shared_memory_descriptor, filled: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor, GROUP: gl.constexpr, GROUP_BLOCK: gl.constexpr, KEYS: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """The work of a group of warps: 64 rows = some positions x the query heads of one KV head.

    Args:
        q: its place for the queries in shared memory.
        open_blocks: that all rows see: they need no mask.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    by_key: gl.constexpr = gl.SliceLayout(1, _result(KEYS))
    by_dim: gl.constexpr = gl.SliceLayout(1, _result(D))
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    i = gl.arange(0, _ROWS, gl.SliceLayout(1, load_layout))
    d = gl.arange(0, D, gl.SliceLayout(0, load_layout))
    row, member = gl.minimum(first_row + i // GROUP_BLOCK, num_rows - 1), gl.minimum(i % GROUP_BLOCK, GROUP - 1)
    q.store(gl.load(Q + (kv_head * GROUP + member)[:, None] * q_head + row[:, None] * q_row + d[None, :]))
    fence_async_shared()
    i = gl.arange(0, _ROWS, by_key)
    position = gl.load(POSITIONS + gl.minimum(first_row + i // GROUP_BLOCK, num_rows - 1))

    x = gl.zeros([_ROWS, KEYS], gl.float32, _result(KEYS))
    x = warpgroup_mma_wait(0, (_multiply(q, x, 0, places, filled, True, True),))
    mbarrier.arrive(free.index(0))
    top = gl.full([_ROWS], _LOWEST, gl.float32, by_key)
    total = gl.zeros([_ROWS], gl.float32, by_key)
    top, total, _, weight = _softmax(x, top, total, position, 0, unit, dtype, KEYS, D, True)
    out = gl.zeros([_ROWS, D], gl.float32, _result(D))
    open_blocks = gl.maximum(open_blocks, 1)
    top, total, out, weight = _visit(
        top, total, out, weight, q, position, 1, open_blocks, unit, places, filled, free, KEYS, D, False
    )
    top, total, out, weight = _visit(
        top, total, out, weight, q, position, open_blocks, blocks, unit, places, filled, free, KEYS, D, True
    )
    out = _multiply(weight, out, 2 * blocks - 1, places, filled, False, False)
    out, weight = warpgroup_mma_wait(0, (out, weight))

    out = out / gl.convert_layout(total, by_dim)[:, None]
    i = gl.arange(0, _ROWS, by_dim)
    d = gl.arange(0, D, gl.SliceLayout(0, _result(D)))
    row, member = first_row + i // GROUP_BLOCK, i % GROUP_BLOCK
    index = row * (kv_heads * GROUP) + kv_head * GROUP + member
    live = (row < num_rows) & (member < GROUP)
    gl.store(OUT + index[:, None].to(gl.int64) * D + d[None, :], out.to(dtype), mask=live[:, None])


@gluon.jit(do_not_specialize=["length", "num_rows", "layer"])
def _attend_kernel(
    Q: gl.tensor, K: gl.tensor, V: gl.tensor, OUT: gl.tensor, POSITIONS: gl.tensor, length: gl.tensor,
    num_rows: gl.tensor, layer: gl.tensor, value_offset: gl.tensor, unit: gl.tensor, kv_heads: gl.tensor,
    q_batch: gl.tensor, q_head: gl.tensor, q_row: gl.tensor, k_batch: gl.tensor, k_head: gl.tensor, k_token: gl.tensor,
    v_batch: gl.tensor, v_head: gl.tensor, v_token: gl.tensor, D: gl.constexpr, KEYS: gl.constexpr, GROUP: gl.constexpr,
    GROUP_BLOCK: gl.constexpr, IN_STATE: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows, the longest tiles first, as in by_position.py."""
    dtype: gl.constexpr = Q.dtype.element_ty
    PER_GROUP: gl.constexpr = _ROWS // GROUP_BLOCK
    program, batch = gl.program_id(0), gl.program_id(1)
    row = (gl.num_programs(0) // kv_heads - 1 - program // kv_heads) * (2 * PER_GROUP)
    kv_head = program % kv_heads
    if IN_STATE:
        length = gl.load(K).to(gl.int32)
        K = gl.load(K + FIRST_LAYER + layer).to(gl.pointer_type(dtype))
        V = K + value_offset
    Q += batch * q_batch
    OUT += (batch * num_rows).to(gl.int64) * (kv_heads * GROUP * D)
    POSITIONS += batch * num_rows
    first, last = gl.load(POSITIONS + row), gl.load(POSITIONS + gl.minimum(row + 2 * PER_GROUP, num_rows) - 1)

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # Rows after the last key are read as zeros.
    keys = tma.make_tensor_descriptor(
        K + batch * k_batch + kv_head * k_head, [length, D], [k_token, 1], [KEYS, D], layout
    )
    values = tma.make_tensor_descriptor(
        V + batch * v_batch + kv_head * v_head, [length, D], [v_token, 1], [KEYS, D], layout
    )
    q = gl.allocate_shared_memory(dtype, [2, _ROWS, D], layout)
    places = gl.allocate_shared_memory(dtype, [_PLACES, KEYS, D], layout)
    filled = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_PLACES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(_PLACES):
        mbarrier.init(filled.index(i), 1)
        mbarrier.init(free.index(i), 2)
    fence_async_shared()
    open_blocks, blocks = (first + 1) // KEYS, gl.cdiv(last + 1, KEYS)
    gl.warp_specialize(
        [
            (_attend_rows, (row, q.index(0), Q, OUT, POSITIONS, num_rows, kv_head, kv_heads, unit, q_head, q_row,
                            open_blocks, blocks, places, filled, free, GROUP, GROUP_BLOCK, KEYS, D)),
            (_attend_rows, (row + PER_GROUP, q.index(1), Q, OUT, POSITIONS, num_rows, kv_head, kv_heads, unit, q_head,
                            q_row, open_blocks, blocks, places, filled, free, GROUP, GROUP_BLOCK, KEYS, D)),
            (_copy_all, (keys, values, blocks, places, filled, free, KEYS, D)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _takes(args: AttentionArgs, at: Placed) -> bool:
    """Whether these rows are enough to fill the GPU, and K/V lie as it copies them: at multiples of 16 bytes."""
    batch, heads, rows, head_dim = args.query.shape
    kv_heads = args.key.shape[1]
    group = triton.next_power_of_2(heads // kv_heads)
    return (
        _compiles
        and _is_hopper(args.query.device)
        and args.query.dtype.itemsize == 2
        and head_dim in _HEAD_DIMS
        and group <= 64
        and batch * kv_heads * triton.cdiv(rows * group, 128) >= _FEWEST_PROGRAMS
        and all(stride % 8 == 0 for stride in (*at.key_strides, *at.value_strides))
        and (at.in_state or at.key.data_ptr() % 16 == at.value.data_ptr() % 16 == 0)
    )


def attend(args: AttentionArgs, at: Placed, positions: torch.Tensor, out: torch.Tensor) -> bool:
    """Attention of rows at rising positions over all keys up to each row's own, if the kernel takes them.

    Args:
        args: without window, softcap or sinks; keys and values are read as they are placed.
        positions: (B, S) int32.
        out: (B, S, H, D).

    Returns:
        Whether `out` is filled.
    """
    global _compiles
    if not _takes(args, at):
        return False
    query, kv_heads = args.query, args.key.shape[1]
    batch, heads, rows, head_dim = query.shape
    group_block = triton.next_power_of_2(heads // kv_heads)

    def launch() -> None:
        triton.set_allocator(_scratch)
        _attend_kernel[(triton.cdiv(rows * group_block, 128) * kv_heads, batch)](
            query, at.key, at.value, out, positions, args.length, rows, at.layer, at.value_offset,
            args.scaling * _LOG2_E, kv_heads, *query.stride()[:3], *at.key_strides, *at.value_strides,
            D=head_dim, KEYS=128 if head_dim <= 128 else 64, GROUP=heads // kv_heads, GROUP_BLOCK=group_block,
            IN_STATE=at.in_state, num_warps=4,
        )  # fmt: skip

    try:
        contextvars.copy_context().run(launch)  # the allocator is set in there, and nowhere else
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Gluon is experimental: another version of Triton may not take this code
        _compiles = False
        logger.warning("The attention kernel for this GPU does not compile; a slower one runs instead: %s", error)
    return _compiles


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for a launch, in which its programs describe their keys and values to the engine that copies them."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
