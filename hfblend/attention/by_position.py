"""Attention of queries at given positions over all keys: key position ≤ query position, and nothing later.

`attend` is the one front door: the Triton kernel on a GPU, PyTorch's attention with a mask elsewhere, and the plain
reference where neither can. `switch.py` puts it in the place of a model's own attention for the length of a pass, so
that in a stock forward over scattered rows each row sees exactly the keys that it saw in a full prefill:

        keys 0 1 2 3 4 5
    row 1    ■ ■ ⬚ ⬚ ⬚ ⬚
    row 3    ■ ■ ■ ■ ⬚ ⬚      not the bottom-right triangle over the rows, which would show row 1 the key of row 3
    row 5    ■ ■ ■ ■ ■ ■

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.device import HAS_TRITON, has_kernels
from ..kernels.reference import AttentionArgs, mask_of, reference_attention, visible
from .record import AttentionRecord

if HAS_TRITON:
    from ..kernels import by_position as kernel

HALF = (torch.float16, torch.bfloat16)  # what the attention kernel computes in
LARGEST_HEAD_DIM = 256  # that it takes


def sdpa_attention(args: AttentionArgs, mask: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention without repeating K/V: (B, Hkv) is the batch, and a group of query heads the heads.

    Args:
        args: softcap and sinks are not used, nor is the window, which is in the mask.
        mask: (B, 1, S, T) additive, in the dtype of the query.
    """
    batch, heads, rows, head_dim = args.query.shape
    kv_heads, length = args.key.shape[1:3]
    groups = heads // kv_heads
    mask = mask[:, None].expand(batch, kv_heads, 1, rows, length).reshape(batch * kv_heads, 1, rows, length)
    key, value = (
        states.reshape(batch * kv_heads, 1, length, states.shape[-1]).expand(-1, groups, -1, -1)
        for states in (args.key, args.value)
    )
    query = args.query.reshape(batch * kv_heads, groups, rows, head_dim)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=args.scaling)
    return out.reshape(batch, heads, rows, -1)


@dataclass(eq=False)
class QueryRows:
    """The rows of one pass over T keys, and masks of them, each made once a pass.

    Attributes:
        positions: (B, S).
        length: T.
        hidden: (K,) keys that no row sees.
        record: keeps the attention that keys receive in this pass.
        state: a `kernels.state.State`: K/V are found through it, inside a CUDA graph.
        attending: is told each layer that begins to attend, and with what.
    """

    positions: torch.Tensor
    length: int
    hidden: torch.Tensor | None = None
    record: AttentionRecord | None = None
    state: Any = None
    attending: Callable[[int, AttentionArgs], None] | None = None
    _made: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def _once(self, *key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def for_kernels(self, device: torch.device) -> torch.Tensor:
        """(B, S) positions as the kernels read them."""
        return self._once("positions", device, make=lambda: self.positions.to(device, torch.int32).contiguous())

    def last(self, count: int) -> QueryRows:
        """The last `count` rows."""
        positions = self.positions[:, -count:]
        return QueryRows(positions, self.length, self.hidden, self.record, self.state, self.attending)

    def visible(self, window: int | None, device: torch.device) -> torch.Tensor:
        """(B, S, T) bool."""
        return self._once("visible", window, device, make=lambda: self._visible(window, device))

    def _visible(self, window: int | None, device: torch.device) -> torch.Tensor:
        return visible(self.positions.to(device), self.length, window, self.hidden)

    def hidden_mask(self, device: torch.device) -> torch.Tensor | None:
        """(T,) uint8 for the kernels, 1 at keys that no row sees; inside a graph, kernels find it in the state."""
        hidden = self.hidden
        if hidden is None or self.state is not None:
            return hidden
        return self._once("hidden", device, make=lambda: mask_of(hidden.to(device), self.length))

    def additive_mask(self, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(B, 1, S, T): 0 where visible, the lowest number of `dtype` elsewhere; rows start 16-aligned."""

        def make() -> torch.Tensor:
            padded = -(-self.length // 16) * 16
            mask = torch.zeros(*self.positions.shape, padded, dtype=dtype, device=device)[..., : self.length]
            return mask.masked_fill_(~self._visible(window, device), torch.finfo(dtype).min)[:, None]

        return self._once("additive", window, dtype, device, make=make)


def runs_on_kernels(args: AttentionArgs) -> bool:
    """Whether the Triton kernel takes these states: on a GPU, in half precision, heads of up to 256 dimensions."""
    query, key, value = args.query, args.key, args.value
    return (
        has_kernels(query.device)
        and query.dtype in HALF
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= LARGEST_HEAD_DIM
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and key.stride(2) * key.shape[2] < 2**31  # it counts elements in 32 bits
    )


def attend(args: AttentionArgs, rows: QueryRows) -> torch.Tensor:
    """Attention of the rows of a pass over all keys, the fastest way that is exact here.

    | states | way |
    | --- | --- |
    | on a GPU, fp16 or bf16 | `kernels.by_position`: no mask is made |
    | with softcap or sinks, elsewhere | `reference_attention` |
    | all others | `sdpa_attention`, with a mask that is made once a pass |

    Returns:
        (B, H, S, D)
    """
    device = args.query.device
    if args.sliding_window is not None and args.sliding_window >= rows.length:
        args = replace(args, sliding_window=None)
    if runs_on_kernels(args):
        return _attend_by_kernel(args, rows)[0]
    if args.softcap is not None or args.sinks is not None:
        return reference_attention(args, rows.positions.to(device), rows.hidden)
    return sdpa_attention(args, rows.additive_mask(args.sliding_window, args.query.dtype, device))


def attend_in_pass(args: AttentionArgs, rows: QueryRows, layer: int) -> torch.Tensor:
    """`attend` for one layer of a pass, which may be recorded, or find its K/V through a state."""
    if rows.attending is not None:
        rows.attending(layer, args)
    if rows.state is not None or runs_on_kernels(args):
        if rows.record is not None and layer in rows.record.layers:
            return _recorded_by_kernel(args, rows, rows.record, layer)
        return _attend_by_kernel(args, rows, layer)[0]
    out = None
    if rows.record is not None:
        out = rows.record.add(layer, args, rows.visible(args.sliding_window, args.query.device))
    return attend(args, rows) if out is None else out


def _attend_by_kernel(
    args: AttentionArgs, rows: QueryRows, layer: int = 0, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    device = args.query.device
    positions, hidden = rows.for_kernels(device), rows.hidden_mask(device)
    with _current(device):
        return kernel.attend(args, positions, hidden, state=rows.state, layer=layer, return_lse=return_lse)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one, on which Triton launches: a model may be on several."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _recorded_by_kernel(args: AttentionArgs, rows: QueryRows, record: AttentionRecord, layer: int) -> torch.Tensor:
    """Attention of a layer that is recorded."""
    query = args.query
    out, lse = _attend_by_kernel(args, rows, layer, return_lse=True)
    assert lse is not None
    received = query.new_empty(0 if rows.state else query.shape[1], args.length, dtype=torch.float32)
    slot = record.layers.index(layer) if rows.state else 0
    positions, hidden = rows.for_kernels(query.device), rows.hidden_mask(query.device)
    with _current(query.device):
        kernel.received(args, lse, positions, hidden, out=received, state=rows.state, layer=layer, slot=slot)
    record.received[layer] = received
    record.end_if_complete()
    return out
