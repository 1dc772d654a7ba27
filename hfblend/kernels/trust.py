"""How far a head's keys are corrected, in two kernels a layer: `blend.trust.trust`.

    ask       (tiles of queries, splits)   attention of some queries to every so many exact keys, and, weighted by it,
                                           how the errors of recomputed rows moved logits, and were foretold to
    trust     (KV heads)                   all splits together; multiplies the head's three weights

Reused rows are in the buffer still: a recomputed row less its reused one is its error, rotation on. What other errors
foretell of it is a weighted sum of three means, turned by its position, less its own part in them. A common factor of
all logits is no part of the trust, so their scaling is left out there. Sums are in fp32 and in a fixed order.

Shapes: S rows of a pass, Q queries of a head, D head_dim, R rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .plan import FIRST_TABLE, find_buffer, find_segments, find_sums, read
from .reference import AttentionArgs

_LOG2_E = tl.constexpr(1.4426950408889634)
_HIDDEN, _LOWEST = tl.constexpr(-1e29), tl.constexpr(-1e20)  # as in by_position
_INTERPRETED = bool(triton.knobs.runtime.interpret)
_PROGRAMS = 8 if _INTERPRETED else 264
_BYTES = 32768  # of queries that a program holds


@triton.jit
def _seen(token: tl.tensor, live: tl.tensor, position: tl.tensor, window: tl.tensor):
    """The keys of tokens that the queries at `position` see."""
    token, position = token[None, :], position[:, None]
    return live[None, :] & (token <= position) & (token > position - window)


@triton.jit
def _mean(
    MEAN: tl.tensor, BY_PIECE: tl.tensor, BY_BLOCK: tl.tensor, one: tl.tensor, two: tl.tensor, three: tl.tensor,
    d: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Three means of each row, weighted."""
    found = two * read(BY_PIECE, d, mask, ALIGNED) + three * read(BY_BLOCK, d, mask, ALIGNED)
    return found + one * read(MEAN, d, mask, ALIGNED)


@triton.jit
def _foretold(
    PLAN: tl.tensor, OF_ROWS: tl.tensor, row: tl.tensor, token: tl.tensor, live: tl.tensor, error: tl.tensor,
    kv_head: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr, VALUE_HEADS: tl.constexpr, DV: tl.constexpr,
    PAIRS: tl.constexpr, TURNS: tl.constexpr, HALF: tl.constexpr, TABLE: tl.constexpr, D_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The errors of rows (ROWS, D_BLOCK), rotation on, from those of the others; 0 outside moved pieces."""
    blocks, pieces, _, _, PIECE, FIRST_BLOCK, BEGINS, ENDS = find_segments(PLAN)
    SUMS, PIECE_SUMS, MEAN, _, _, WEIGHTS = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    block = tl.load(OF_ROWS + row, mask=live, other=1) - 1
    piece = tl.load(PIECE + block, mask=live, other=0).to(tl.int32)
    first = tl.load(FIRST_BLOCK + piece, mask=live, other=0)
    last = tl.load(FIRST_BLOCK + piece + 1, mask=live, other=1) - 1
    of_piece = tl.load(ENDS + last, mask=live, other=1) - tl.load(BEGINS + first, mask=live, other=0)
    of_block = tl.load(ENDS + block, mask=live, other=1) - tl.load(BEGINS + block, mask=live, other=0)
    count, weights = tl.load(WEIGHTS + (HEADS + VALUE_HEADS) * 3), WEIGHTS + kv_head * 3
    others = tl.maximum(count - 1, 1.0)
    one, two, three = tl.load(weights), tl.load(weights + 1) / of_piece, tl.load(weights + 2) / of_block
    own = one / others + two + three
    by_piece, by_block = PIECE_SUMS + (piece * (3 * width))[:, None] + kv_head * D, SUMS + (block * width)[:, None]
    by_block += kv_head * D
    one, two, three = one * count / others, two[:, None], (three * (of_block + 1))[:, None]  # shrunk sums of blocks
    mean = MEAN + kv_head * D
    d = tl.arange(0, D_BLOCK)[None, :]
    mask = live[:, None] & (d < D)
    told = _mean(mean, by_piece, by_block, one, two, three, d, mask, ALIGNED)
    if TURNS:
        COS = tl.load(PLAN + FIRST_TABLE + 2 * TABLE).to(tl.pointer_type(tl.float32))
        SIN = tl.load(PLAN + FIRST_TABLE + 2 * TABLE + 1).to(tl.pointer_type(tl.float32))
        turns = live[:, None] & (d < 2 * PAIRS)
        if HALF:
            pair, partner, is_first = d % PAIRS, (d + PAIRS) % (2 * PAIRS), d < PAIRS
        else:
            pair, partner, is_first = d // 2, d ^ 1, d % 2 == 0
        at = token[:, None] * PAIRS + pair
        cos, sin = read(COS, at, turns, ALIGNED and HALF), read(SIN, at, turns, ALIGNED and HALF)
        other = _mean(mean, by_piece, by_block, one, two, three, partner, turns, ALIGNED and HALF)
        told = tl.where(turns, told * cos + tl.where(is_first, -other, other) * sin, told)
    return told - own[:, None] * error


@triton.jit(do_not_specialize=["num_rows", "layer", "window"])
def _ask_kernel(
    BUFFER: tl.tensor, PLAN: tl.tensor, QUERY: tl.tensor, KEYS: tl.tensor, TOKENS_OF: tl.tensor, PARTS: tl.tensor,
    num_rows: tl.tensor, layer: tl.tensor, scaling: tl.tensor, window: tl.tensor, q_head: tl.tensor, q_row: tl.tensor,
    k_head: tl.tensor, k_row: tl.tensor, dtype: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr, ROTATES: tl.constexpr, HALF: tl.constexpr,
    TABLE: tl.constexpr, IN_STATE: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: some queries of the heads that share a KV head, every so many keys."""
    tiles: tl.constexpr = (GROUP * QUERIES + AT_ONCE - 1) // AT_ONCE
    width: tl.constexpr = HEADS * D + VALUE_HEADS * DV
    kv_head, split = tl.program_id(0) // tiles, tl.program_id(1)
    if IN_STATE:
        num_rows = tl.load(BUFFER + 1).to(tl.int32)
    buffer = find_buffer(BUFFER, layer, KEYS.dtype.element_ty, IN_STATE) + kv_head * D
    exact = tl.load(PLAN + 2).to(tl.int32)
    OF_ROWS = tl.load(PLAN + 7).to(tl.pointer_type(tl.int32))
    _, _, _, STOPS, _, _, _, _ = find_segments(PLAN)
    query = tl.program_id(0) % tiles * AT_ONCE + tl.arange(0, AT_ONCE)
    member, query = query // QUERIES, query % QUERIES
    nth = (query * (num_rows - 1) + QUERIES // 2) // (QUERIES - 1)
    position = tl.load(TOKENS_OF + nth)
    head = kv_head * GROUP + tl.minimum(member, GROUP - 1)
    d = tl.arange(0, D_BLOCK)[None, :]
    QUERY += head.to(tl.int64)[:, None] * q_head + nth.to(tl.int64)[:, None] * q_row
    q, unit = tl.load(QUERY + d, mask=d < D, other=0.0).to(dtype), scaling * _LOG2_E
    top = tl.full([AT_ONCE], _LOWEST, tl.float32)
    total, right, square = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for start in range(split * ROWS, exact, SPLITS * ROWS):
        token = start + tl.arange(0, ROWS)
        mask = (token < exact)[:, None] & (d < D)
        k = read(buffer, token.to(tl.int64)[:, None] * width + d, mask, ALIGNED).to(dtype)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * unit
        x = tl.where(_seen(token, token < exact, position, window), x, _HIDDEN)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        top = higher
    for start in range(split * ROWS, num_rows, SPLITS * ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < num_rows
        token = tl.load(TOKENS_OF + row, mask=live, other=0)
        begun = tl.load(OF_ROWS + row, mask=live, other=0)  # blocks up to there
        known = (begun > 0) & (token < tl.load(STOPS + begun - 1, mask=begun > 0, other=0))
        fresh = KEYS + kv_head * k_head + row.to(tl.int64)[:, None] * k_row
        k = tl.load(fresh + d, mask=live[:, None] & (d < D), other=0.0)
        reused = read(buffer, token[:, None] * width + d, known[:, None] & (d < D), ALIGNED)
        error = tl.where(known[:, None], k.to(tl.float32) - reused, 0.0)
        told = _foretold(
            PLAN, OF_ROWS, row, token, known, error, kv_head, HEADS, D, VALUE_HEADS, DV, PAIRS, ROTATES == 0, HALF,
            TABLE, D_BLOCK, ALIGNED,
        )  # fmt: skip
        x = tl.dot(q, tl.trans(k.to(dtype)), input_precision="ieee") * unit
        x = tl.where(_seen(token, live, position, window), x, _HIDDEN)
        higher = tl.maximum(top, tl.max(x, 1))
        weight, shrink = tl.exp2(x - higher[:, None]), tl.exp2(top - higher)
        shift = tl.dot(q, tl.trans(told.to(dtype)), input_precision="ieee")
        weighted = weight * shift
        total = total * shrink + tl.sum(weight, 1)
        square = square * shrink + tl.sum(weighted * shift, 1)
        shift = tl.dot(q, tl.trans(error.to(dtype)), input_precision="ieee")
        right = right * shrink + tl.sum(weighted * shift, 1)
        top = higher
    size: tl.constexpr = HEADS * GROUP * SPLITS * QUERIES
    to = PARTS + (head * SPLITS + split) * QUERIES + query
    tl.store(to, top, mask=member < GROUP)
    tl.store(to + size, total, mask=member < GROUP)
    tl.store(to + 2 * size, right, mask=member < GROUP)
    tl.store(to + 3 * size, square, mask=member < GROUP)


@triton.jit
def _trust_kernel(
    PLAN: tl.tensor, PARTS: tl.tensor, doubted: tl.tensor, trusted: tl.tensor, HEADS: tl.constexpr, D: tl.constexpr,
    VALUE_HEADS: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one KV head."""
    kv_head, size = tl.program_id(0), tl.num_programs(0) * (GROUP * SPLITS * QUERIES)
    blocks, pieces, _, _, _, _, _, _ = find_segments(PLAN)
    _, _, _, _, _, WEIGHTS = find_sums(PLAN, blocks, pieces, HEADS, D, VALUE_HEADS, DV)
    rights, squares = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        split, query = tl.arange(0, SPLITS)[:, None], tl.arange(0, QUERIES)[None, :]
        at = PARTS + (head * SPLITS + split) * QUERIES + query
        top = tl.load(at)
        share = tl.exp2(top - tl.max(top, 0)[None, :])
        total = tl.sum(share * tl.load(at + size), 0)
        rights += tl.sum(share * tl.load(at + 2 * size), 0) / total
        squares += tl.sum(share * tl.load(at + 3 * size), 0) / total
    count = tl.maximum(tl.load(WEIGHTS + (HEADS + VALUE_HEADS) * 3), 1.0)
    square = tl.maximum(tl.sum(squares, 0), 1.1754943508222875e-38)
    share = tl.sum(rights, 0) / (square * (1 + 10 / count))
    trust = tl.minimum(tl.maximum((share - doubted) / (trusted - doubted), 0.0), 1.0)
    nth = tl.arange(0, 4)
    tl.store(WEIGHTS + kv_head * 3 + nth, tl.load(WEIGHTS + kv_head * 3 + nth, mask=nth < 3) * trust, mask=nth < 3)


@dataclass(frozen=True)
class Asking:
    """How heads are asked.

    Args:
        queries: Q.
        doubted, trusted: the share of what is foretold that is true, from which on keys are corrected, and wholly.
    """

    queries: int
    doubted: float
    trusted: float

    def weigh(
        self,
        args: AttentionArgs,
        place: torch.Tensor,
        numbers: torch.Tensor,
        keys: torch.Tensor,
        rows: torch.Tensor,
        layer: int,
        **settings: Any,
    ) -> None:
        """Multiplies the weights of each head of keys by its trust.

        Args:
            args: of the layer's attention.
            place: the layer's reused rows, or a state's numbers.
            keys: (1, Hkv, S, D) of the pass's rows (S,).
            settings: of the layer, as other kernels have them.
        """
        query = args.query if args.query.stride(-1) == 1 else args.query.contiguous()
        heads = {name: settings[name] for name in ("HEADS", "D", "VALUE_HEADS", "DV")}
        group, d_block = query.shape[1] // heads["HEADS"], max(16, triton.next_power_of_2(heads["D"]))
        size = d_block * keys.element_size()
        at_once = min(128, triton.next_power_of_2(group * self.queries), _BYTES // size)
        programs = heads["HEADS"] * triton.cdiv(group * self.queries, at_once)
        splits = 1 << (max(1, _PROGRAMS // programs).bit_length() - 1)
        parts = torch.empty(4, query.shape[1], splits, self.queries, device=query.device)
        asked = {"GROUP": group, "QUERIES": self.queries, "SPLITS": splits}
        is_cut = _INTERPRETED and keys.dtype == torch.bfloat16  # which the interpreter multiplies as integers
        dtype = tl.float32 if is_cut else getattr(tl, str(keys.dtype).removeprefix("torch."))
        _ask_kernel[(programs, splits)](
            place, numbers, query, keys, rows, parts, len(rows), layer, args.scaling, args.sliding_window or 1 << 30,
            *query.stride()[1:3], *keys.stride()[1:3], dtype, **settings, **asked, AT_ONCE=at_once, D_BLOCK=d_block,
            ROWS=max(16, min(32, _BYTES // (4 * size))), num_warps=8, num_stages=1,
            maxnreg=128 if keys.element_size() == 2 else None,  # so that two share a multiprocessor
        )  # fmt: skip
        _trust_kernel[(heads["HEADS"],)](numbers, parts, self.doubted, self.trusted, **heads, **asked)
