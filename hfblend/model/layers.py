"""Decoder layers in a pass that need not do all of their work: watched, resumed in the middle, or cut short at the end.

    watched     the hidden states that enter a layer are kept
    resumed     a later pass over some of those rows starts there: nothing is computed twice
    cut         in the last layer all rows leave their K/V, and only the rows whose output is read go on

        layer 0 … c − 1      layer c …                  last layer
        skipped              rows S, all of the layer    K/V of rows S; attention and MLP of the last row

Their `forward` is wrapped for the length of a pass, and the wrapper acts in that pass only: threads that reach a layer
without waiting (where a model is being patched, or no longer is) meet the layer's own code, and so does a forward after
a pass that was interrupted.

Shapes: S rows of a pass, C hidden size, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..blend.model import Watched
from ..locks import ForwardLock, only_inside
from ..util import StopForward


def watch(lock: ForwardLock, layers: nn.ModuleList, layer: int, rows: torch.Tensor) -> Watched:
    """Keeps what enters a layer of a pass over `rows`, in exclusive work of `lock`."""
    found, returns_tensor = Watched(layer, rows), True

    def keep(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        plain = hidden is not None and hidden.ndim == 3 and hidden.shape[:2] == (1, len(rows))
        found.hidden = hidden if plain and returns_tensor else None
        return own(*args, **kwargs)

    def note_form(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal returns_tensor
        output = own(*args, **kwargs)
        returns_tensor = torch.is_tensor(output)
        return output

    wrap_forward(lock, layers[layer], keep)
    if layer:
        wrap_forward(lock, layers[layer - 1], note_form)
    return found


def resume(lock: ForwardLock, layers: nn.ModuleList, layer: int, hidden: torch.Tensor) -> None:
    """Lets a pass start at `layer`, with these hidden states (1, S, C); the layers before it do nothing."""

    def skip(own: Callable[..., Any], hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states

    def take_up(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_hidden(args, kwargs, hidden)
        return own(*args, **kwargs)

    for module in layers[:layer]:
        wrap_forward(lock, module, skip)
    wrap_forward(lock, layers[layer], take_up)


def cut(
    lock: ForwardLock, layers: nn.ModuleList, num_rows: int, num_read: int, go_on_with: Callable[[int], None]
) -> None:
    """Lets all rows of a pass leave their K/V in the last layer, and the last `num_read` of them go on.

    Args:
        num_rows: S.
        go_on_with: called with `num_read` when the others have left their K/V: cache and attention now meet those rows.
    """

    def stop_most(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_of(args, kwargs)
        if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != (1, num_rows):
            return own(*args, **kwargs)
        with contextlib.suppress(StopForward):
            own(*args, **kwargs)  # its cache stops it after K/V
        go_on_with(num_read)
        rest = slice(num_rows - num_read, None)
        kwargs = {name: _rows_of(value, num_rows, rest) for name, value in kwargs.items()}
        return own(*(_rows_of(value, num_rows, rest) for value in args), **kwargs)

    wrap_forward(lock, layers[-1], stop_most)


def wrap_forward(lock: ForwardLock, module: nn.Module, around: Callable[..., Any]) -> None:
    """Calls `around(forward, …)` in place of a module's `forward(…)`, in the exclusive work of `lock` that this is."""
    own, is_inside = module.forward, only_inside()

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_inside():
            return around(own, *args, **kwargs)
        lock.tidy()
        return own(*args, **kwargs)

    lock.change(vars(module), "forward", forward)


def hook_before(lock: ForwardLock, module: nn.Module, before: Callable[..., Any]) -> None:
    """Calls `before(args, kwargs)`, which returns those to go on with, before any `forward` of a module, in the
    exclusive work of `lock`."""
    hooks, is_inside = module._forward_pre_hooks, only_inside()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return before(args, kwargs) if is_inside() else None

    def remove() -> None:
        for key in [key for key, own in tuple(hooks.items()) if own is hook]:
            hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)

    lock.undo_later(remove)
    module.register_forward_pre_hook(hook, with_kwargs=True)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if torch.is_tensor(hidden) else None


def with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _rows_of(value: Any, num_rows: int, rest: slice) -> Any:
    """The rows that go on, of anything with one entry per row: hidden states, positions, rotary tables."""
    if isinstance(value, tuple):
        return tuple(_rows_of(one, num_rows, rest) for one in value)
    if torch.is_tensor(value) and value.ndim >= 2 and value.shape[1] == num_rows:
        return value[:, rest]
    return value
