"""Attention kernels alone: all rows of a prompt (causal), and the scattered rows that blending recomputes.

    python benchmarks/attention.py                                   a GPU: 8K, 16K and 32K keys, 32/8 heads, bf16
    python benchmarks/attention.py --tokens 256 --device cpu         a look at whether it runs

TFLOP/s counts useful work only, 4 · H · D · Σ(position + 1): a kernel that computes what its mask hides gets no credit.
The error is the largest difference from fp32 attention on some rows, over the largest value there. What a machine has
not is left out: flash-attn where it is not installed, flex_attention without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from hfblend.attention.by_position import QueryRows, attend, sdpa_attention
from hfblend.kernels.reference import AttentionArgs, reference_attention
from hfblend.measure.divergence import describe_machine

CHECKED_ROWS = 64
REPEATS = 10
SPARSE_BLOCK = 128  # keys and rows of a block of flex_attention's mask

Kernel = Callable[[], torch.Tensor]  # -> (1, H, S, D)


def kernels(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """Name and maker of each kernel for rows at `positions` (S,) over T keys; making is not timed.

    Args:
        query: (1, H, S, D); key, value: (1, Hkv, T, D).
    """
    scaling, is_whole = query.shape[-1] ** -0.5, len(positions) == key.shape[2]
    if is_whole:
        yield (
            "sdpa, causal",
            lambda: functools.partial(
                F.scaled_dot_product_attention, query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            ),
        )
        yield "flash-attn 2, causal", lambda: _flash(query, key, value, scaling)
        yield "flash-attn 4, causal", lambda: _flash_4(query, key, value, scaling, {"causal": True})
    else:
        yield "flash-attn 4, mask_mod", lambda: _flash_4(query, key, value, scaling, _flash_4_mask(positions, key))
    args = AttentionArgs(query, key, value, scaling)
    yield "hfblend.attend", lambda: functools.partial(attend, args, QueryRows(positions[None], key.shape[2]))
    yield "sdpa, mask", lambda: functools.partial(sdpa_attention, args, _additive_mask(positions, key))
    yield "flex_attention", lambda: _flex(query, key, value, positions, scaling)


def _additive_mask(positions: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    hidden = torch.arange(key.shape[2], device=key.device) > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=key.dtype, device=key.device)
    return mask.masked_fill_(hidden, torch.finfo(key.dtype).min)[None, None]


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Kernel:
    """Of a whole prompt only: before its fourth version, flash-attn has no mask for rows at given positions."""
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))  # (1, S, H, D)
    return lambda: flash_attn_func(q, k, v, softmax_scale=scaling, causal=True).transpose(1, 2)


def _flash_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, mask: dict[str, Any]
) -> Kernel:
    from flash_attn.cute import flash_attn_func

    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))  # (1, S, H, D)
    return lambda: flash_attn_func(q, k, v, softmax_scale=scaling, **mask)[0].transpose(1, 2)


def _flash_4_mask(positions: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    """Its mask for rising positions: a predicate, for the blocks of keys that some rows see in part."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit  # type: ignore[misc]
    def sees(batch, head, row, key, seqlen_info, tensors):  # type: ignore[no-untyped-def]
        return key <= scalar_to_ssa(tensors[0][row[0]], cutlass.Int32)

    blocks = BlockSparseTensorsTorch(*_row_blocks(positions, key.shape[2]), block_size=(SPARSE_BLOCK, SPARSE_BLOCK))
    rows = [_whole_blocks(positions).int()]
    return {"mask_mod": sees, "aux_tensors": rows, "block_sparse_tensors": blocks, "pack_gqa": False}


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, scaling: float
) -> Kernel:
    if query.device.type != "cuda":
        raise NotImplementedError("flex_attention is compiled for GPUs here")
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # each shape is compiled for itself, and only a few are kept
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = _block_mask(positions, key.shape[2])
    return lambda: compiled(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)


def _block_mask(positions: torch.Tensor, length: int) -> object:
    """flex_attention's mask for rising positions; no (S, T) mask is made."""
    from torch.nn.attention.flex_attention import BlockMask

    partial, partial_blocks, full, full_blocks = _row_blocks(positions, length)
    padded = _whole_blocks(positions)

    def sees(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return key <= padded[row]

    return BlockMask.from_kv_blocks(
        partial,
        partial_blocks,
        full,
        full_blocks,
        BLOCK_SIZE=SPARSE_BLOCK,
        mask_mod=sees,
        seq_lengths=(len(positions), length),
    )


def _whole_blocks(positions: torch.Tensor) -> torch.Tensor:
    """Positions with the last one again for rows of the last block that are not there."""
    return torch.cat([positions, positions[-1:].expand(-len(positions) % SPARSE_BLOCK)])


def _row_blocks(positions: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Blocks of keys for each block of rows at rising positions, from its first and last row.

    blocks of keys      0   1   2   3
    rows  5 … 130       ◪   ◪   ⬚   ⬚      ◪ some rows see some keys: computed with the mask
    rows 260 … 400      ■   ■   ◪   ◪      ■ every row sees every key: computed without

    Returns:
        How many are seen in part, (1, 1, blocks of rows), and which, (1, 1, blocks of rows, blocks of keys), of which
        that many count; the same of those seen in full.
    """
    num_blocks = -(-length // SPARSE_BLOCK)
    starts = positions[::SPARSE_BLOCK]
    stops = torch.cat([positions[SPARSE_BLOCK - 1 :: SPARSE_BLOCK], positions[-1:]])[: len(starts)]
    # A last block of rows that is not full holds rows that are not there: it is computed with the mask.
    full = (starts + 1) // SPARSE_BLOCK
    if len(positions) % SPARSE_BLOCK:
        full[-1] = 0
    seen = stops // SPARSE_BLOCK + 1  # (blocks of rows,) that hold a visible key
    order = torch.arange(num_blocks, device=positions.device).expand(len(starts), -1)
    partial = (order + full[:, None]).clamp_max(num_blocks - 1)
    return [blocks.int().contiguous()[None, None] for blocks in (seen - full, partial, full, order)]


def milliseconds(kernel: Kernel, device: torch.device) -> float:
    """Median of some calls: on a GPU by its clock, with K/V out of its cache, so that launching does not count."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(kernel, warmup=20, rep=60, return_mode="median")
    times = []
    for i in range(-2, REPEATS):
        started = time.perf_counter()
        kernel()
        if i >= 0:
            times.append(1000 * (time.perf_counter() - started))
    return median(times)


def relative_error(
    out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
) -> float:
    """Largest difference from fp32 attention on evenly spread rows, over the largest value there."""
    rows = torch.linspace(0, len(positions) - 1, min(CHECKED_ROWS, len(positions)), device=out.device).long()
    args = AttentionArgs(query[:, :, rows], key, value, query.shape[-1] ** -0.5).float()
    expected = reference_attention(args, positions[rows][None])
    return ((out[:, :, rows].float() - expected).abs().max() / expected.abs().max()).item()


def measure(length: int, ratio: float, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Prints a line per kernel for `ratio` of the rows of one length; 1 is a whole causal prefill."""
    generator = torch.Generator(device).manual_seed(0)
    count = max(1, round(ratio * length))
    positions = torch.randperm(length, generator=generator, device=device)[:count].sort().values

    def random(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, args.head_dim, generator=generator, device=device, dtype=dtype)

    query, key, value = random(args.heads, count), random(args.kv_heads, length), random(args.kv_heads, length)
    flops = 4 * args.heads * args.head_dim * (positions + 1).sum().item()
    for name, make in kernels(query, key, value, positions):
        where = f"| {length:,} | {count:,} | {name} "
        try:
            kernel = make()
            error = relative_error(kernel(), query, key, value, positions)
            ms = milliseconds(kernel, device)
            print(f"{where}| {ms:.3f} | {flops / ms / 1e9:.3g} | {error:.1e} |", flush=True)
        except Exception as why_not:  # not installed, does not compile here, out of memory
            print(f"{where}| – | – | {f'{why_not} '.splitlines()[0][:60]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.3], help="shares of rows, scattered")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = f"{args.heads}/{args.kv_heads} heads of {args.head_dim}"
    print(f"{describe_machine(device)}; {heads}, {str(dtype).removeprefix('torch.')}\n")
    print("| keys | rows | kernel | ms | TFLOP/s | error |\n| --- | --- | --- | --- | --- | --- |")
    with torch.no_grad():
        for length in args.tokens:
            for ratio in (1.0, *args.ratios):
                measure(length, ratio, args, device, dtype)


if __name__ == "__main__":
    main()
