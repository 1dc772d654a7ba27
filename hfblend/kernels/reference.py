"""Attention as the kernels must compute it, in plain PyTorch: slow and clear.

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim, Dv dimensions of a value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class AttentionArgs:
    """The states and settings with which a model's layer calls attention.

    Attributes:
        query: (B, H, S, D).
        key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), keys at positions 0 … T − 1.
        sliding_window, softcap, sinks: as the model's own layers pass them; sinks are (H,) logits.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """T."""
        return self.key.shape[2]

    @property
    def is_plain(self) -> bool:
        """Whether it has no window, softcap or sinks."""
        return self.sliding_window is None and self.softcap is None and self.sinks is None

    def float(self) -> AttentionArgs:
        """The same in fp32."""
        return replace(self, query=self.query.float(), key=self.key.float(), value=self.value.float())


def visible(
    positions: torch.Tensor, length: int, sliding_window: int | None = None, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """The keys that each row may see: key ≤ row, and with a window, key > row − window.

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


def attention_weights(args: AttentionArgs, seen: torch.Tensor) -> torch.Tensor:
    """softmax(QKᵀ · scaling) over the keys that each row sees, in fp32; a sink takes its weight away from all of them.

    Args:
        seen: (B, S, T) bool.

    Returns:
        (B, H, S, T)
    """
    batch, heads, rows, head_dim = args.query.shape
    kv_heads = args.key.shape[1]
    grouped = args.query.reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
    scores = (grouped @ args.key.transpose(-1, -2)).float().view(batch, heads, rows, args.length).mul_(args.scaling)
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    scores.masked_fill_(~seen[:, None], -torch.inf)
    if args.sinks is not None:  # one more logit per head that takes weight and gives nothing
        scores = torch.cat([scores, args.sinks.float().view(1, heads, 1, 1).expand(batch, -1, rows, 1)], -1)
    return scores.softmax(-1)[..., : args.length]


def reference_attention(
    args: AttentionArgs, positions: torch.Tensor, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention in fp32 with every option, of rows at `positions` (B, S), without the keys `hidden` (K,).

    Returns:
        (B, H, S, Dv)
    """
    weights = attention_weights(args.float(), visible(positions, args.length, args.sliding_window, hidden))
    return weighted(args.value, weights).to(args.query.dtype)


def weighted(value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums of values (B, Hkv, T, Dv) by weights (B, H, S, T): (B, H, S, Dv) in fp32."""
    batch, kv_heads, length, value_dim = value.shape
    out = weights.view(batch, kv_heads, -1, length) @ value.float()
    return out.view(*weights.shape[:3], value_dim)
