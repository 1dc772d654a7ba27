"""Attention by position instead of a model's own during a pass, through Transformers' interface.

Shapes: B batch, H query heads, Hkv KV heads, S query rows, T keys, D head_dim.
"""

from __future__ import annotations

import functools
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.reference import AttentionArgs
from ..locks import ForwardLock
from .by_position import QueryRows, attend_in_pass

_EAGER = "eager_attention_forward"
_LEFT_OUT = {"sdpa": ("softcap", "s_aux")}  # given to Transformers' attention of this name, and not used by it

Predicate = Callable[..., torch.Tensor]  # (batch, head, query, key) indices -> whether the query sees the key


class AttentionNotReplaceable(Exception):
    """A layer's own attention does more than ours can; the message names it."""


@dataclass(frozen=True)
class _Scope:
    """The rows and windows of a pass that attends by position, and the thread that runs it."""

    rows: QueryRows
    windows: Mapping[int, int | None]
    learner: WindowLearner | None
    thread: int


_scope: ContextVar[_Scope | None] = ContextVar("hfblend_attention_scope", default=None)


def attend_by_position(
    lock: ForwardLock,
    config: Any,
    rows: QueryRows,
    windows: Mapping[int, int | None],
    learner: WindowLearner | None = None,
) -> None:
    """Lets layers of the model with this `config` attend through `attend`, as these rows, in exclusive work of `lock`.

    `attend_as` changes the rows midway. The config's setting changes for all threads; others that meet it get the
    model's own attention and masks.

    Args:
        windows: layer -> the window of its mask, as a `WindowLearner` found it. Other layers, and all of flash
            attention, which takes no mask, have the window that they name themselves.
        learner: finds the windows in this pass.
    """
    own = config._attn_implementation
    windows = {} if "flash" in own else windows
    _scope.set(_Scope(rows, windows, learner, threading.get_ident()))  # ends with the work's context
    lock.change(vars(config), "_attn_implementation_internal", _registered(own))


def attend_as(change: Callable[[QueryRows], QueryRows]) -> None:
    """Gives the rest of a pass that attends by position other rows."""
    scope = _scope.get()
    assert scope is not None
    _scope.set(replace(scope, rows=change(scope.rows)))


class WindowLearner:
    """Learns the window of every layer from the masks that the model itself asks for.

    A mask is asked for with a predicate, which can be put to the test at any distance. The model is given a marker in
    place of the mask, so that each layer shows which one it uses.

    Attributes:
        windows: layer -> window, `None` where a row sees everything before it.
    """

    def __init__(self) -> None:
        self._predicates: list[Predicate] = []
        self.windows: dict[int, int | None] = {}

    def marker(self, predicate: Predicate) -> torch.Tensor:
        """Returns a stand-in for a mask, (1, 1, 1, 1)."""
        self._predicates.append(predicate)
        return torch.full((1, 1, 1, 1), len(self._predicates) - 1)

    def note(self, layer: int, mask: torch.Tensor | None) -> None:
        """Notes the mask with which a layer attends.

        Raises:
            AttentionNotReplaceable: the mask is neither causal nor a window, or not the one that was given out.
        """
        is_marker = mask is not None and mask.shape == (1, 1, 1, 1) and not mask.is_floating_point()
        if mask is not None and not is_marker:
            raise AttentionNotReplaceable(f"layer {layer} makes its own attention mask")
        window = None if mask is None else window_of(self._predicates[int(mask)])
        if self.windows.setdefault(layer, window) != window:
            raise AttentionNotReplaceable(f"layer {layer} attends in several ways")


def window_of(predicate: Predicate) -> int | None:
    """Returns W if a row sees exactly the W last keys up to itself, `None` if it sees all of them.

    Raises:
        AttentionNotReplaceable: it sees anything else.
    """
    far = 1 << 20

    def sees(row: int, key: int) -> bool:
        index = [torch.tensor(i) for i in (0, 0, row, key)]
        return key >= 0 and bool(predicate(*index))

    first = bisect_left(range(far), True, key=lambda key: sees(far, key))
    window = None if first == 0 else far - first + 1
    steps = {0, 1, 2, 3, 5, 8, far // 3} | ({window - 1, window, window + 1, 2 * window} if window else set())
    for row in (*steps, far - 1):
        for key in {max(0, row + sign * step) for step in steps for sign in (1, -1)}:
            if sees(row, key) != (key <= row and (window is None or key > row - window)):
                raise AttentionNotReplaceable("a mask is neither causal nor a sliding window")
    return window


def _registered(implementation: str) -> str:
    """The name under which our attention stands in for `implementation`."""
    name = f"hfblend_{implementation}"
    if name not in AttentionInterface._global_mapping:
        own_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
        AttentionMaskInterface.register(name, _mask_for_others(own_mask))
        AttentionInterface.register(name, functools.partial(_attention_forward, implementation))  # last: both are there
    return name


def _current() -> _Scope | None:
    """Returns the scope of the pass that this is part of; a thread that was started in it may have its context only."""
    scope = _scope.get()
    return scope if scope is not None and scope.thread == threading.get_ident() else None


def _mask_for_others(own_mask: Callable[..., Any] | None) -> Callable[..., Any]:
    def make_mask(*args: Any, **kwargs: Any) -> Any:
        scope = _current()
        if scope is not None:
            return None if scope.learner is None else scope.learner.marker(kwargs["mask_function"])
        return None if own_mask is None else own_mask(*args, **kwargs)

    return make_mask


def _own_attention(implementation: str, module: nn.Module) -> Callable[..., Any]:
    """The function that a layer calls under this name; for `"eager"`, that in the module of the layer's class."""
    spaces = (vars(sys.modules[kind.__module__]) for kind in type(module).__mro__)
    eager = next((space[_EAGER] for space in spaces if _EAGER in space), None)
    found = ALL_ATTENTION_FUNCTIONS.get(implementation, eager)
    if found is None:
        raise RuntimeError("hfblend's attention was called outside its pass; another thread reached a switched model.")
    return found


def _attention_forward(implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The attention of layers while `implementation` is replaced: ours within a pass, else their own."""
    scope = _current()
    if scope is None:
        return _own_attention(implementation, module)(module, *args, **kwargs)
    used = {name: value for name, value in kwargs.items() if name not in _LEFT_OUT.get(implementation, ())}
    return _attend_in_scope(scope, module, *args, **used)


def _attend_in_scope(
    scope: _Scope,
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
    layer: int = getattr(module, "layer_idx", 0)
    if scope.learner is not None:
        scope.learner.note(layer, attention_mask)
    rows = scope.rows
    if query.shape[2] < rows.positions.shape[1]:  # models that share K/V may go on with the last rows only
        rows = rows.last(query.shape[2])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = scope.windows.get(layer, sliding_window)
    out = attend_in_pass(AttentionArgs(query, key, value, scaling, window, softcap, s_aux), rows, layer)
    return out.transpose(1, 2).contiguous(), None
