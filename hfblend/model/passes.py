"""Runs a pass: a stock forward over all tokens of a prompt, or over some, each attending by its position."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.by_position import QueryRows
from ..attention.switch import attend_as
from ..blend.caches import RecordingCache
from ..blend.model import Forward, Pass, Watched
from ..util import StopForward
from .hf_model import CACHE, HFModel
from .layers import cut, resume, watch


def run_all(model: HFModel, forward: Forward, ids: torch.Tensor, cache: RecordingCache) -> tuple[Any, Watched | None]:
    """Runs a forward over all tokens (1, T), which its cache may end."""
    return model.lock.exclusive(_run_all, model, forward, ids, cache)


def _run_all(model: HFModel, forward: Forward, ids: torch.Tensor, cache: RecordingCache) -> tuple[Any, Watched | None]:
    rows, found = torch.arange(ids.shape[1], device=ids.device), None
    model.small_steps_in_one_kernel()
    if cache.stop_at is not None and model.may_skip_layers:
        found = watch(model.lock, model.layers, cache.stop_at, rows)
    return until_stopped(forward, ids, rows, None, cache), found


def run_rows(
    model: HFModel, forward: Forward, one: Pass, cache: Any, state: Any = None, watches: bool = False
) -> tuple[Any, Watched | None]:
    """Runs a forward over some rows.

    Args:
        cache: its `update` mixes K/V, and stops the forward at `stop_at`; `take_last` leaves it with a few rows.
        state: a `kernels.State`, inside a CUDA graph.
        watches: keep what enters the layer `stop_at`.

    Returns:
        The forward's output, `None` if it was stopped; and what was watched.
    """
    return model.lock.exclusive(_run_rows, model, forward, one, cache, state, watches)


def _run_rows(
    model: HFModel, forward: Forward, one: Pass, cache: Any, state: Any, watches: bool
) -> tuple[Any, Watched | None]:
    found, lock, layers = None, model.lock, model.layers
    mask = model.see_rows(QueryRows(one.seen_from[None], one.hidden, one.record, state), one.length)
    if model.attends_by_position:
        model.small_steps_in_one_kernel()
    if watches and one.stop_at is not None and model.may_skip_layers:
        found = watch(lock, layers, one.stop_at, one.rows)
    if _cuts(model, one):
        assert one.num_read is not None
        cache.stop_at = model.num_layers - 1

        def go_on_with(count: int) -> None:
            cache.take_last(count)
            attend_as(lambda rows: rows.last(count))

        cut(lock, layers, len(one.rows), one.num_read, go_on_with)
    if one.resume_at is not None:  # last, so outermost: the others meet what it brings
        assert one.resume_with is not None
        resume(lock, layers, one.resume_at, one.resume_with)
    return until_stopped(forward, one.ids, one.rows, mask, cache), found


def _cuts(model: HFModel, one: Pass) -> bool:
    """Whether the last layer is spared the rows that are not read."""
    return (
        one.stop_at is None
        and one.num_read is not None
        and one.num_read < len(one.rows)
        and model.attends_by_position
        and model.num_layers - 1 in model.layouts
        and model.may_skip_layers
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
