"""Attention over keys and values in pages, of one new token a prompt: decoding in continuous batching.

A page holds N tokens of one layer, and a prompt's pages lie anywhere; its row of a table tells where. The keys of each
prompt are split among several programs, so that few prompts, too, read with the whole GPU.

Shapes: B prompts, H query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .by_position import _HIDDEN, _INTERPRETED, _LOG2_E, _LOWEST, _combine_kernel

_KEYS = 64  # a program reads that many at a time
_PROGRAMS = 8 if _INTERPRETED else 512  # these keep the memory of a large GPU busy


@triton.jit
def _visit_pages(
    top: tl.tensor, total: tl.tensor, out: tl.tensor, q: tl.tensor, K: tl.tensor, V: tl.tensor, TABLE: tl.tensor,
    begin: tl.tensor, end: tl.tensor, unit: tl.tensor, page: tl.tensor, token: tl.tensor, D: tl.constexpr,
    D_BLOCK: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys [begin, end); blocks of KEYS lie within one page."""
    d = tl.arange(0, D_BLOCK)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = tl.minimum(key, end - 1) if MASKED else key  # anything may stand after the last one
        base = tl.load(TABLE + start // TOKENS).to(tl.int64) * page
        offset = base + (at % TOKENS)[:, None] * token + d[None, :]
        offset = tl.multiple_of(offset, [1, 16])
        k = tl.load(K + offset) if D == D_BLOCK else tl.load(K + offset, mask=d[None, :] < D, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * unit
        if MASKED:
            x = tl.where(key[None, :] < end, x, _HIDDEN)
        higher = tl.maximum(top, tl.max(x, 1))
        weight = tl.exp2(x - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(V + offset) if D == D_BLOCK else tl.load(V + offset, mask=d[None, :] < D, other=0.0)
        out = tl.dot(weight.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, out


@triton.jit(do_not_specialize=["table_row"])
def _decode_kernel(
    Q: tl.tensor, NEW_K: tl.tensor, NEW_V: tl.tensor, K: tl.tensor, V: tl.tensor, TABLE: tl.tensor, ENDS: tl.tensor,
    PARTS: tl.tensor, LSE: tl.tensor, table_row: tl.tensor, unit: tl.tensor, q_head: tl.tensor, q_row: tl.tensor,
    k_head: tl.tensor, k_row: tl.tensor, v_head: tl.tensor, v_row: tl.tensor, page: tl.tensor, token: tl.tensor,
    D: tl.constexpr, D_BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one KV head of one prompt, over one split of its keys.

    That of the last split writes the new token's K/V into its page first.
    """
    prompt, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    length = tl.load(ENDS + prompt + 1) - tl.load(ENDS + prompt)  # 0 for a row that only fills a graph's batch
    TABLE += prompt * table_row
    K += kv_head * D
    V += kv_head * D
    member, d = tl.arange(0, ROWS), tl.arange(0, D_BLOCK)
    head = kv_head * GROUP + tl.minimum(member, GROUP - 1)
    q = tl.load(Q + prompt * q_row + head[:, None] * q_head + d[None, :], mask=d[None, :] < D, other=0.0)

    share = tl.cdiv(tl.cdiv(length, SPLITS), KEYS) * KEYS
    begin = split * share
    end = tl.minimum(length, begin + share)
    if (begin < end) & (end == length):
        last = length - 1
        at = tl.load(TABLE + last // TOKENS).to(tl.int64) * page + (last % TOKENS) * token + d
        tl.store(K + at, tl.load(NEW_K + prompt * k_row + kv_head * k_head + d, mask=d < D), mask=d < D)
        tl.store(V + at, tl.load(NEW_V + prompt * v_row + kv_head * v_head + d, mask=d < D), mask=d < D)
        tl.debug_barrier()  # it is read below, by all threads

    top = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D_BLOCK], tl.float32)
    whole = begin + tl.maximum(end - begin, 0) // KEYS * KEYS
    top, total, out = _visit_pages(
        top, total, out, q, K, V, TABLE, begin, whole, unit, page, token, D, D_BLOCK, TOKENS, KEYS, False
    )
    top, total, out = _visit_pages(
        top, total, out, q, K, V, TABLE, whole, end, unit, page, token, D, D_BLOCK, TOKENS, KEYS, True
    )

    total = tl.maximum(total, 1e-30)  # a split may hold no key
    index = (split * tl.num_programs(0) + prompt) * heads + head
    live = member < GROUP
    to = PARTS + index[:, None].to(tl.int64) * D + d[None, :]
    tl.store(to, (out / total[:, None]).to(PARTS.dtype.element_ty), mask=live[:, None] & (d[None, :] < D))
    if SPLITS > 1:
        tl.store(LSE + index, top + tl.log2(total), mask=live)


def decode(
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    pages: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Writes each prompt's new token into its pages, and attends from it to all of the prompt's tokens.

    Args:
        query: (1, H, B, D), last dimension contiguous.
        new: keys and values of the new tokens, (1, Hkv, B, D), last dimension contiguous.
        pages: keys and values (pages, N, Hkv, D), alike in memory; N is a multiple of 64, or a power of 2 below.
        table: (B, any) int32, the pages of each prompt in order.
        ends: (B + 1,) int32, sums of the prompts' lengths, new tokens included. A prompt of length 0 is left out.
        scaling: of the logits.

    Returns:
        (1, H, B, D)
    """
    _, heads, prompts, dim = query.shape
    tokens, kv_heads = pages[0].shape[1:3]
    group = heads // kv_heads
    splits = min(32, triton.next_power_of_2(max(1, _PROGRAMS // (prompts * kv_heads))))
    out = query.new_empty(1, prompts, heads, dim)
    parts = out if splits == 1 else query.new_empty(splits, *out.shape, dtype=torch.float32)
    lse = query.new_empty(splits, prompts, heads, dtype=torch.float32)
    _decode_kernel[(prompts, kv_heads, splits)](
        query, *new, *pages, table, ends, parts, lse, table.stride(0), scaling * _LOG2_E.value,
        *query.stride()[1:3], *new[0].stride()[1:3], *new[1].stride()[1:3], *pages[0].stride()[:2],
        D=dim, D_BLOCK=triton.next_power_of_2(dim), GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        SPLITS=splits, TOKENS=tokens, KEYS=min(_KEYS, tokens), num_warps=4, num_stages=3 if dim <= 128 else 2,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(prompts * heads,)](
            parts, lse, out, prompts * heads, DV=dim, DV_BLOCK=triton.next_power_of_2(dim), SPLITS=splits
        )
    return out.transpose(1, 2)
