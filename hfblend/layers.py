"""Decoder layers in a pass that need not do all of their work: watched, resumed in the middle, or cut short at the end.

    watched     the hidden states that enter a layer are kept
    resumed     a later pass over some of those rows starts there: nothing is computed twice
    cut         in the last layer all rows leave their K/V, and only the rows that somebody reads go on

        layer 0 … c − 1      layer c …                  last layer
        skipped              rows S, all of the layer    K/V of rows S; attention and MLP of the last row

Hooks and instance attributes are set for the length of a pass and taken off in `finally`; the layers' code is their
own. They act in the thread of the pass only: where a model is being patched, or no longer is, others do not wait.

Shapes: S rows of a pass, C hidden size, L layers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .caches import StopForward


@dataclass
class Watched:
    """What entered a layer.

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


@contextlib.contextmanager
def watched(layers: nn.ModuleList, layer: int, rows: torch.Tensor) -> Iterator[Watched]:
    """Keeps what enters a layer of a pass over `rows`."""
    found = Watched(layer, rows)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(args, kwargs)
        plain = hidden is not None and hidden.ndim == 3 and hidden.shape[:2] == (1, len(rows))
        found.hidden = hidden if plain and returns_tensor else None

    returns_tensor = True

    def note_form(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal returns_tensor
        returns_tensor = torch.is_tensor(output)

    hooks = [layers[layer].register_forward_pre_hook(_here(keep), with_kwargs=True)]
    if layer:
        hooks.append(layers[layer - 1].register_forward_hook(_here(note_form)))
    with _removed_afterwards(hooks):
        yield found


@contextlib.contextmanager
def resumed(layers: nn.ModuleList, layer: int, hidden: torch.Tensor) -> Iterator[None]:
    """A pass inside it starts at `layer`, with these hidden states (1, S, C); the layers before it do nothing."""

    me = threading.get_ident()

    def skipped(own: Callable[..., Any]) -> Callable[..., Any]:
        def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if threading.get_ident() == me else own(hidden_states, *args, **kwargs)

        return pass_on

    def take_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _with_hidden(args, kwargs, hidden)

    before = [(module, module.__dict__.get("forward")) for module in layers[:layer]]
    for module, _ in before:
        module.forward = skipped(module.forward)
    try:
        with _removed_afterwards([layers[layer].register_forward_pre_hook(_here(take_up), with_kwargs=True)]):
            yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


@contextlib.contextmanager
def cut(layers: nn.ModuleList, num_rows: int, num_read: int, go_on_with: Callable[[int], None]) -> Iterator[None]:
    """In the last layer, all rows of a pass leave their K/V, and the last `num_read` of them go on.

    Args:
        num_rows: S.
        go_on_with: called with `num_read` when the others have left their K/V: cache and attention now meet those rows.
    """
    last = layers[-1]

    def stop_most(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = _hidden(args, kwargs)
        if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != (1, num_rows):
            return None
        with contextlib.suppress(StopForward):
            module.forward(*args, **kwargs)  # its cache stops it after K/V
        go_on_with(num_read)
        rest = slice(num_rows - num_read, None)
        return tuple(_rows_of(a, num_rows, rest) for a in args), {
            name: _rows_of(value, num_rows, rest) for name, value in kwargs.items()
        }

    with _removed_afterwards([last.register_forward_pre_hook(_here(stop_most), with_kwargs=True)]):
        yield


def has_foreign_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody watches or steers these modules from outside: hooks, offloading."""
    return any(m._forward_hooks or m._forward_pre_hooks or "_hf_hook" in m.__dict__ for m in modules)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if torch.is_tensor(hidden) else None


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> Any:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _rows_of(value: Any, num_rows: int, rest: slice) -> Any:
    """The rows that go on, of whatever has one entry per row: hidden states, positions, rotary tables."""
    if isinstance(value, tuple):
        return tuple(_rows_of(one, num_rows, rest) for one in value)
    if torch.is_tensor(value) and value.ndim >= 2 and value.shape[1] == num_rows:
        return value[:, rest]
    return value


def _here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, in this thread; in others it does nothing."""
    me = threading.get_ident()

    @functools.wraps(hook)
    def only_here(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == me else None

    return only_here


@contextlib.contextmanager
def _removed_afterwards(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
