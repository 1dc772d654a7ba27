"""One pass: a stock forward over some rows of a prompt, each attending by its position, K/V mixed into the buffers.

Shapes: S rows of the pass, T all tokens, C hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..attention.by_position import AttentionRecord, QueryRows
from ..attention.switch import attend_as
from ..blend.caches import StopForward
from .hf_model import CACHE
from .layers import Watched, cut, resume, watch

if TYPE_CHECKING:
    from ..support.registry import BlendableModel

Forward = Callable[..., Any]


@dataclass
class Pass:
    """What a pass computes.

    Attributes:
        ids: (1, S) of its rows.
        rows: (S,) token indices, rising.
        seen_from: (S,) the last key that each row sees.
        length: T.
        stop_at: end at this layer: after its K/V, or, with a record, after its attention weights.
        hidden: (K,) tokens that the rows do not see.
        record: keeps the attention that the rows give.
        resume_at, resume_with: start at this layer, with what enters it, (1, S, C).
        num_read: rows at the end whose output is read; `None`: all.
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

    def run(
        self, host: BlendableModel, forward: Forward, cache: Any, state: Any = None, watch: bool = False
    ) -> tuple[Any, Watched | None]:
        """Runs it.

        Args:
            cache: its `update` mixes K/V, and stops the forward at `stop_at`; `take_last` leaves it with a few rows.
            state: a `kernels.State`, inside a CUDA graph.
            watch: keep what enters the layer `stop_at`.

        Returns:
            The forward's output, `None` if it was stopped; and what was watched.
        """
        return host.lock.exclusive(self._run, host, forward, cache, state, watch)

    def _run(
        self, host: BlendableModel, forward: Forward, cache: Any, state: Any, watch_layer: bool
    ) -> tuple[Any, Watched | None]:
        found, lock, layers = None, host.lock, host.layers
        mask = host.see_rows(QueryRows(self.seen_from[None], self.hidden, self.record, state), self.length)
        if host.attends_by_position:
            host.small_steps_in_one_kernel()
        if watch_layer and self.stop_at is not None and host.may_skip_layers:
            found = watch(lock, layers, self.stop_at, self.rows)
        if self.cuts(host):
            assert self.num_read is not None
            cache.stop_at = host.num_layers - 1

            def go_on_with(count: int) -> None:
                cache.take_last(count)
                attend_as(lambda rows: rows.last(count))

            cut(lock, layers, len(self.rows), self.num_read, go_on_with)
        if self.resume_at is not None:  # last, so outermost: the others meet what it brings
            assert self.resume_with is not None
            resume(lock, layers, self.resume_at, self.resume_with)
        return until_stopped(forward, self.ids, self.rows, mask, cache), found

    def pairs(self, host: BlendableModel) -> int:
        """(token, layer) pairs: the layers that its rows go through, the last one whole even where it is cut."""
        stop = host.num_layers if self.stop_at is None else self.stop_at
        return len(self.rows) * (stop - (self.resume_at or 0))

    def cuts(self, host: BlendableModel) -> bool:
        """Whether the last layer is spared the rows that nobody reads."""
        return (
            self.stop_at is None
            and self.num_read is not None
            and self.num_read < len(self.rows)
            and host.attends_by_position
            and host.num_layers - 1 in host.layouts
            and host.may_skip_layers
        )


def until_stopped(
    forward: Forward, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: Any, cache: Any
) -> Any:
    """A forward over ids at `positions` (S,) that its cache may end early."""
    try:
        return forward(
            input_ids=input_ids,
            position_ids=positions[None],
            attention_mask=attention_mask,
            use_cache=True,
            **{CACHE: cache},
        )
    except StopForward:
        return None
