"""Runs a pass: a stock forward over all tokens of a prompt, or over some, each attending by its position."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from ..attention.by_position import QueryRows
from ..attention.switch import attend_as, attend_by_position
from ..blend.caches import RecordingCache
from ..blend.model import Forward, Pass, Watched
from ..util import StopForward
from .hf_model import CACHE, HFModel, UnsupportedModel
from .layers import cut, resume, watch


def run_all(model: HFModel, forward: Forward, ids: torch.Tensor, cache: RecordingCache) -> tuple[Any, Watched | None]:
    """Runs a forward over all tokens (1, T), which its cache may end, in exclusive work of the model's lock."""
    rows, found = torch.arange(ids.shape[1], device=ids.device), None
    model.small_steps_in_one_kernel()
    if cache.stop_at is not None and model.may_skip_layers:
        found = watch(model.lock, model.layers, cache.stop_at, rows)
    return until_stopped(forward, ids, rows, None, cache), found


def run_rows(
    model: HFModel, forward: Forward, one: Pass, cache: Any, state: Any = None, watches: bool = False
) -> tuple[Any, Watched | None]:
    """Runs a forward over some rows, in exclusive work of the model's lock.

    Args:
        cache: its `update` mixes K/V, and stops the forward at `stop_at`; `take_last` leaves it with a few rows.
        state: a `kernels.state.State`, inside a CUDA graph.
        watches: keep what enters the layer `stop_at`.

    Returns:
        The forward's output, `None` if it was stopped; and what was watched.
    """
    found, lock, layers = None, model.lock, model.layers
    cache.is_told = model.attends_to_cache
    mask = see_rows(model, QueryRows(one.seen_from[None], one.length, one.hidden, one.record, state, cache.attending))
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


# --- attention of selected rows ---------------------------------------------------------------------------------------


def see_rows(model: HFModel, rows: QueryRows) -> Any:
    """Everything a forward over rows of a prompt needs to see exactly its past.

    Called in the exclusive work that the forward is part of. Rows that do not see some keys, or record their
    attention, need `attends_by_position`.

    Returns the `attention_mask` to pass. Where attention is replaced, no mask is made at all.
    """
    if not model.attends_by_position:
        return mask_rows(model, rows.positions[0], rows.length)
    attend_by_position(model.lock, model.layer_owner.config, rows, model.windows)
    return None


def mask_rows(model: HFModel, rows: torch.Tensor, length: int) -> Any:
    """The selected rows of the model's own masks, (1, 1, S, T) or a dict of them by layer type."""
    embeds = torch.zeros(1, length, 0, dtype=model.dtype, device=rows.device)
    positions = torch.arange(length, device=rows.device)[None]
    try:
        masks = create_masks_for_generate(
            config=model.config,
            inputs_embeds=embeds,
            attention_mask=torch.ones_like(positions),
            position_ids=positions,
            **{CACHE: None},
        )
    except TypeError as error:  # Transformers 5.17 cannot make the masks of chunked attention ahead
        raise UnsupportedModel(f"its masks cannot be made outside its forward: {error}") from error
    if isinstance(masks, dict):
        return {kind: _take_rows(model, mask, rows, length) for kind, mask in masks.items()}
    return _take_rows(model, masks, rows, length)


def _take_rows(model: HFModel, mask: Any, rows: torch.Tensor, length: int) -> torch.Tensor:
    if mask is None:  # the model would have used a causal kernel
        return (torch.arange(length, device=rows.device) <= rows[:, None])[None, None]
    if not torch.is_tensor(mask):
        raise UnsupportedModel(
            f"rows of a {type(mask).__name__} ({model.config._attn_implementation}) cannot be taken; load the model "
            'with attn_implementation="sdpa" or "eager"'
        )
    return mask.index_select(2, rows.to(mask.device))
