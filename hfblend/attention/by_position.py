"""Attention of queries at given positions over all keys: key position ≤ query position, and nothing later.

`attend` is the one front door: the Triton kernel on a GPU, PyTorch's attention with a mask elsewhere, and the plain
reference for what neither can do. `switching.py` puts it in the place of a model's own attention for the length of a
pass, so that a stock forward over scattered rows sees exactly what each row saw in a full prefill:

        keys 0 1 2 3 4 5
    row 1    ■ ■ ⬚ ⬚ ⬚ ⬚
    row 3    ■ ■ ■ ■ ⬚ ⬚      not the bottom-right triangle over the rows, which would show row 1 the key of row 3
    row 5    ■ ■ ■ ■ ■ ■

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ..util import StopForward

kernels: Any  # None where there is no Triton, which comes with PyTorch for GPUs
try:
    from .. import kernels
except ImportError:
    kernels = None

HALF = (torch.float16, torch.bfloat16)  # what the attention kernel computes in
LARGEST_HEAD_DIM = 256  # that it takes


def visible(
    positions: torch.Tensor, length: int, sliding_window: int | None = None, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Which keys each row may see: key ≤ row, and with a window, key > row − window.

    Args:
        positions: (B, S) positions of the rows; keys stand at 0 … `length` − 1.
        hidden: (K,) keys that no row may see, because they are not computed yet.

    Returns:
        (B, S, T) bool.
    """
    keys = torch.arange(length, device=positions.device)
    seen = keys <= positions[..., None]
    if sliding_window is not None:
        seen &= keys > positions[..., None] - sliding_window
    return seen if hidden is None else seen.index_fill_(-1, hidden.to(seen.device), False)


def mask_of(hidden: torch.Tensor, length: int) -> torch.Tensor:
    """(T,) uint8, 1 at the keys `hidden` (K,)."""
    return torch.zeros(length, dtype=torch.uint8, device=hidden.device).index_fill_(0, hidden, 1)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    seen: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(QKᵀ · scaling) over the keys that each row sees, in fp32; a sink takes its weight away from all of them.

    Args:
        query: (B, H, S, D); key: (B, Hkv, T, D); seen: (B, S, T) bool; sinks: (H,) logits.

    Returns:
        (B, H, S, T)
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
    scores = (grouped @ key.transpose(-1, -2)).float().view(batch, heads, rows, length) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:  # one more logit per head that takes weight and gives nothing
        scores = torch.cat([scores, sinks.float().view(1, heads, 1, 1).expand(batch, -1, rows, 1)], -1)
    return scores.softmax(-1)[..., :length]


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain attention in fp32, every option of `attend`. Slow and clear: what all faster ways are tested against."""
    batch, heads, rows, _ = query.shape
    seen = visible(positions, key.shape[2], sliding_window, hidden)
    weights = attention_weights(query.float(), key.float(), seen, scaling, softcap, sinks)
    out = weights.view(batch, key.shape[1], -1, key.shape[2]) @ value.float()
    return out.reshape(batch, heads, rows, value.shape[-1]).to(query.dtype)


def sdpa_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """PyTorch's attention without repeating K/V: (B, Hkv) is the batch, and a group of query heads the heads.

    Args:
        mask: (B, 1, S, T) additive, in the dtype of `query`.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, length = key.shape[1:3]
    groups = heads // kv_heads
    mask = mask[:, None].expand(batch, kv_heads, 1, rows, length).reshape(batch * kv_heads, 1, rows, length)
    key, value = (t.reshape(batch * kv_heads, 1, length, t.shape[-1]).expand(-1, groups, -1, -1) for t in (key, value))
    query = query.reshape(batch * kv_heads, groups, rows, head_dim)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, rows, -1)


class AttentionRecord:
    """Keeps, per wanted layer, how much attention each key received: the mean over the rows of a pass.

    Args:
        layers: the layers to record; the pass ends in the last one.

    Attributes:
        received: layer -> (H, T) in fp32.
    """

    ROWS_AT_ONCE = 64  # so that memory is linear in T, however many rows a pass has

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.received = tuple(dict.fromkeys(layers)), dict[int, torch.Tensor]()

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, *how: Any) -> None:
        """Records one layer; `how` is the rest of `attention_weights`. Raises `StopForward` after the last one."""
        if layer in self.layers:
            blocks = zip(query.split(self.ROWS_AT_ONCE, 2), seen.split(self.ROWS_AT_ONCE, 1))
            sums = [attention_weights(q, key, rows, *how)[0].sum(1) for q, rows in blocks]
            self.received[layer] = torch.stack(sums).sum(0) / query.shape[2]
        self.end_if_complete()

    def end_if_complete(self) -> None:
        """Raises `StopForward` if no layer is left to record."""
        if len(self.received) == len(self.layers):
            raise StopForward


class QueryRows:
    """The rows of one pass: their positions (B, S), and what is made from them, each once a pass.

    Args:
        hidden: (K,) keys that no row sees.
        record: keeps the attention that keys receive in this pass.
        state: a `kernels.State`: K/V are found through it, inside a CUDA graph.
    """

    def __init__(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
        state: Any = None,
    ) -> None:
        self.positions, self.hidden, self.record, self.state = positions, hidden, record, state
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}

    def for_kernels(self, device: torch.device) -> torch.Tensor:
        """(B, S) positions as the kernels read them."""
        key = ("positions", device)
        if key not in self._masks:
            self._masks[key] = self.positions.to(device, torch.int32).contiguous()
        return self._masks[key]

    def last(self, count: int) -> QueryRows:
        """The last `count` rows."""
        return QueryRows(self.positions[:, -count:], self.hidden, self.record, self.state)

    def visible(self, length: int, window: int | None, device: torch.device) -> torch.Tensor:
        """(B, S, T) bool."""
        return visible(self.positions.to(device), length, window, self.hidden)

    def hidden_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """(T,) uint8 for the kernels, 1 where no row sees the key; inside a graph, they find it in the state."""
        if self.hidden is None or self.state is not None:
            return self.hidden
        key = ("hidden", length, device)
        if key not in self._masks:
            self._masks[key] = mask_of(self.hidden.to(device), length)
        return self._masks[key]

    def additive_mask(self, length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(B, 1, S, T): 0 where visible, the lowest number of `dtype` elsewhere; rows start 16-aligned."""
        key = (length, window, dtype, device)
        if key not in self._masks:
            padded = -(-length // 16) * 16
            mask = torch.zeros(*self.positions.shape, padded, dtype=dtype, device=device)[..., :length]
            mask.masked_fill_(~self.visible(length, window, device), torch.finfo(dtype).min)
            self._masks[key] = mask[:, None]
        return self._masks[key]


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: an NVIDIA GPU of compute capability 8.0 or more."""
    is_nvidia = kernels is not None and device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_on_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the Triton kernel takes these states: on a GPU, in half precision, heads of up to 256 dimensions."""
    return (
        has_kernels(query.device)
        and query.dtype in HALF
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= LARGEST_HEAD_DIM
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and key.stride(2) * key.shape[2] < 2**31  # it counts elements in 32 bits
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: QueryRows,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the rows of a pass over all keys, the fastest way that is exact here.

    | states | way |
    | --- | --- |
    | on a GPU, fp16 or bf16 | `kernels.attend`: no mask is made |
    | with softcap or sinks, elsewhere | `reference_attention` |
    | all others | `sdpa_attention`, with a mask that is made once a pass |

    Args:
        query: (B, H, S, D); key, value: (B, Hkv, T, D), keys at positions 0 … T − 1.
        rows: the positions of the queries.
        sliding_window, softcap, sinks: as the model's own layers pass them.

    Returns:
        (B, H, S, D)
    """
    length = key.shape[2]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    if runs_on_kernels(query, key, value):
        return _attend_by_kernel(query, key, value, rows, scaling, sliding_window, softcap, sinks)[0]
    if softcap is not None or sinks is not None:
        positions = rows.positions.to(query.device)
        return reference_attention(query, key, value, positions, scaling, sliding_window, softcap, sinks, rows.hidden)
    mask = rows.additive_mask(length, sliding_window, query.dtype, query.device)
    return sdpa_attention(query, key, value, mask, scaling)


def attend_in_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: QueryRows,
    layer: int,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attend` for one layer of a pass, which may be recorded, or find its K/V through a state."""
    how = (scaling, sliding_window, softcap, sinks)
    if rows.state is not None or runs_on_kernels(query, key, value):
        if rows.record is not None and layer in rows.record.layers:
            return _recorded_by_kernel(query, key, value, rows, layer, *how)
        return _attend_by_kernel(query, key, value, rows, *how, layer=layer)[0]
    if rows.record is not None:
        seen = rows.visible(key.shape[2], sliding_window, query.device)
        rows.record.add(layer, query, key, seen, scaling, softcap, sinks)
    return attend(query, key, value, rows, *how)


def _attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: QueryRows,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    layer: int = 0,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden = rows.hidden_mask(key.shape[2], query.device)
    with _current(query.device):
        return kernels.attend(
            query, key, value, rows.for_kernels(query.device), scaling, sliding_window, softcap, sinks, hidden,
            state=rows.state, layer=layer, return_lse=return_lse,
        )  # fmt: skip


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, kernels run on that GPU: Triton asks for the current one, and a model may be on several."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _recorded_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: QueryRows,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a layer that is recorded."""
    record, hidden = rows.record, rows.hidden_mask(key.shape[2], query.device)
    assert record is not None
    out, lse = _attend_by_kernel(query, key, value, rows, scaling, sliding_window, softcap, sinks, layer, True)
    received = query.new_empty(0 if rows.state else query.shape[1], key.shape[2], dtype=torch.float32)
    with _current(query.device):
        kernels.received(
            query, key, lse, rows.for_kernels(query.device), scaling, sliding_window, softcap, hidden,
            out=received, state=rows.state, layer=layer, slot=record.layers.index(layer) if rows.state else 0,
        )  # fmt: skip
    record.received[layer] = received
    record.end_if_complete()
    return out
