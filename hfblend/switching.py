"""Our attention in the place of a model's own, for the length of a pass, through Transformers' own interface.

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from .attention import QueryRows, attend_in_pass

_rows: ContextVar[QueryRows | None] = ContextVar("hfblend_query_rows", default=None)


@contextlib.contextmanager
def attention_by_position(config: Any, rows: QueryRows) -> Iterator[None]:
    """While it lasts, layers of the model with this `config` attend through `attend`, as these rows.

    `attend_as` changes the rows in the middle.

    The setting is model-wide; the caller keeps other forwards out. Code of other threads that only reads the setting
    (mask builders) is served as before.
    """
    own = config._attn_implementation
    config._attn_implementation_internal = _registered(own)
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)
        config._attn_implementation_internal = own


def attend_as(change: Callable[[QueryRows], QueryRows]) -> None:
    """Within `attention_by_position`: the rest of the pass has other rows."""
    rows = _rows.get()
    assert rows is not None
    _rows.set(change(rows))


def _registered(implementation: str) -> str:
    """The name under which our attention stands in for `implementation`."""
    name = f"hfblend_{implementation}"
    if name not in AttentionInterface._global_mapping:
        own_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
        AttentionInterface.register(name, _attention_forward)
        AttentionMaskInterface.register(name, _mask_for_others(own_mask))
    return name


def _mask_for_others(own_mask: Callable[..., Any] | None) -> Callable[..., Any]:
    def make_mask(*args: Any, **kwargs: Any) -> Any:
        if _rows.get() is not None or own_mask is None:
            return None
        return own_mask(*args, **kwargs)

    return make_mask


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` in the form that Transformers' layers call: returns (B, S, H, D) and no weights."""
    rows = _rows.get()
    if rows is None:
        raise RuntimeError("hfblend's attention was called outside its pass; another thread reached a switched model.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = getattr(module, "layer_idx", 0)
    out = attend_in_pass(query, key, value, rows, layer, scaling, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None
