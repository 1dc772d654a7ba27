"""The model as the algorithm sees it. `hfblend.support.registry.TestedModel` answers for those of Transformers.

Shapes: B batch, H heads, Hkv KV heads, S rows of a pass, T all tokens, N reused tokens that could be recomputed,
D head_dim, C hidden size, R rotated pairs (2R ≤ D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..attention.record import AttentionRecord
from ..config import BlendConfig
from ..kv.chunk import ChunkKV, Reader
from ..kv.origin import Origin
from ..kv.rows import RowLayout
from ..trace.observer import Observer
from .caches import BlendingCache, RecordingCache
from .reuse import Reuse, ReusedKV, ReusingModel

Forward = Callable[..., Any]


class AttentionNotRecorded(Exception):
    """A rule asked for attention that this model's own attention code does not show."""

    def __init__(self, model_name: str) -> None:
        super().__init__(
            f"Attention of {model_name} cannot be recorded (hfblend's does not take its place, see docs/models.md); "
            'tokens are selected by "kv_deviation" instead.'
        )


@dataclass
class Watched:
    """The hidden states that entered a layer in a pass.

    Attributes:
        layer: its index.
        rows: (S,) token indices, rising.
        hidden: (1, S, C); `None` until the pass was there, or where a layer's input is not of this form.
    """

    layer: int
    rows: torch.Tensor
    hidden: torch.Tensor | None = None

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(1, S', C) of some of the rows."""
        assert self.hidden is not None
        return self.hidden.index_select(1, torch.searchsorted(self.rows, rows).to(self.hidden.device))


@dataclass
class Pass:
    """A forward over some rows of a prompt, each attending by its position.

    Attributes:
        ids: (1, S) of its rows.
        rows: (S,) token indices, rising.
        seen_from: (S,) the last key that each row sees.
        length: T.
        stop_at: the layer where it ends: after its K/V, or, with a record, after its attention weights.
        hidden: (K,) tokens that the rows do not see.
        record: keeps the attention that the rows give.
        resume_at, resume_with: the layer where it starts, and (1, S, C) that enters it.
        num_read: how many rows at the end have their output read; `None`: all.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    seen_from: torch.Tensor
    length: int
    stop_at: int | None = None
    hidden: torch.Tensor | None = None
    record: AttentionRecord | None = None
    resume_at: int | None = None
    resume_with: torch.Tensor | None = None
    num_read: int | None = None

    def pairs(self, num_layers: int) -> int:
        """(token, layer) pairs: the layers that its rows go through, the last one whole even where it is cut."""
        stop = num_layers if self.stop_at is None else self.stop_at
        return len(self.rows) * (stop - (self.resume_at or 0))


class BlendableModel(ReusingModel, Protocol):
    """A model whose chunk KV can be moved and blended.

    Attributes:
        layouts: per layer that holds K/V, the shape of one token's state.
        attends_by_position: whether rows may attend through hfblend's attention, which hides tokens and keeps records.
    """

    layouts: dict[int, RowLayout]
    attends_by_position: bool
    config: Any

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str:
        """The fingerprint of weights and configuration."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_layers(self) -> int: ...

    def full_pass(self, forward: Forward, ids: torch.Tensor, cache: RecordingCache) -> tuple[Any, Watched | None]:
        """A forward over all tokens, ended by its cache. Returns its output, `None` if it was ended, and what entered
        the layer where it ended."""
        ...

    def rows_pass(self, forward: Forward, one: Pass, cache: BlendingCache, watch: bool) -> tuple[Any, Watched | None]:
        """A forward over some rows whose K/V are mixed into the cache's buffers. Returns as `full_pass`."""
        ...

    def gather(self, reuse: Reuse, length: int, config: BlendConfig, observer: Observer) -> ReusedKV:
        """The reused K/V of a prompt of `length` tokens."""
        ...

    def prefill(self, chunks: Sequence[Sequence[int]], after_ids: Sequence[int], after: Reader | None) -> list[ChunkKV]:
        """K/V of chunks, each computed alone after `after_ids`, whose K/V may be at hand."""
        ...

    def batches(
        self, chunks: Mapping[str, Sequence[int]], num_after: int, batch_size: int | None = None
    ) -> Iterator[dict[str, Sequence[int]]]:
        """Chunks by key, those to prefill together."""
        ...

    def origin_of(self, ids: Sequence[int], after_ids: Sequence[int]) -> Origin: ...

    def same_regime(self, one: int, other: int) -> bool: ...

    def all_heads(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """The heads of every process that shares the model, of states with this one's heads in dimension `dim`."""
        ...

    def agreed(self, scores: torch.Tensor) -> torch.Tensor:
        """The same scores in every process that shares the model."""
        ...

    def entries_of_all(self, entries: list[Reader | None]) -> list[Reader | None]:
        """The stored entries that every process that shares the model has, each its own; `None` for the others."""
        ...
