"""A model's rotary embedding of queries and keys, in one kernel while a pass runs on a GPU.

Eager code takes a dozen kernels for it in every layer. In Transformers it is a function of a family's module; one that
gives what the usual form gives for random input is answered by the kernel while a pass of ours runs, and only for that
pass: other threads' calls of the same function go to the function.

    x · cos + rotate_half(x) · sin
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..attention.by_position import HALF, kernels
from ..locks import ForwardLock, Mutex, Running, innermost, only_inside

NAME = "apply_rotary_pos_emb"
_OURS = "_hfblend_answers_for"  # on what stands in for the function: the function

Namespace = dict[str, Any]  # of a module of Transformers

_answers: ContextVar[Callable[[], bool]] = ContextVar("hfblend_rotary", default=lambda: False)
_lock = Mutex()
_passes: dict[int, list[Running]] = {}  # id of a namespace -> passes that run in it


def find_rotary(decoder: nn.Module) -> list[Namespace]:
    """The namespaces whose function is of the usual form; none is common: pairing, order of arguments may differ."""
    names = {type(module).__module__ for module in decoder.modules()}
    found = [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]
    parameter = next(decoder.parameters())
    return [space for space in found if NAME in space and _is_usual(space[NAME], parameter.device, parameter.dtype)]


@torch.no_grad()
def _is_usual(function: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is about as close to what the function gives in fp64 as the function itself."""
    if not isinstance(function, FunctionType):
        return False
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    given = random(1, 4, 3, 32), random(1, 2, 3, 32), *(random(1, 3, 16).repeat(1, 1, 2) for _ in range(2))
    try:
        own, exact = function(*given), function(*(states.double() for states in given))
    except (RuntimeError, TypeError, ValueError, IndexError):  # of another form
        return False
    return all(
        ours.shape == truth.shape and bool((ours - truth).norm() <= 2 * (theirs - truth).norm())
        for ours, theirs, truth in zip(kernels.rotary(*given), own, exact)
    )


def rotary_in_one_kernel(lock: ForwardLock, namespaces: list[Namespace]) -> None:
    """Lets the kernel answer where this thread calls these namespaces' function in exclusive work of `lock`."""
    work = innermost()
    assert work is not None
    for namespace in namespaces:
        lock.undo_later(functools.partial(_leave, namespace, work))
        _enter(namespace, work)
    _answers.set(only_inside())  # ends with the work's context


def _enter(namespace: Namespace, work: Running) -> None:
    with _lock:
        _passes.setdefault(id(namespace), []).append(work)
        if not hasattr(namespace[NAME], _OURS):
            namespace[NAME] = _answering(namespace[NAME])


def _leave(namespace: Namespace, work: Running) -> None:
    """Puts the function back if no other pass, of this model or another, runs in its namespace."""
    with _lock:
        others = [one for one in _passes.get(id(namespace), ()) if one is not work and one.is_alive]
        if not others:
            namespace[NAME] = getattr(namespace[NAME], _OURS, namespace[NAME])
        _passes[id(namespace)] = others


def _answering(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rotary(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if _answers.get()() and not args and not kwargs and _fits(q, k, cos, sin):
            return kernels.rotary(q, k, cos, sin)
        return function(q, k, cos, sin, *args, **kwargs)

    setattr(rotary, _OURS, function)
    return rotary


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes what it is given: whole heads turn, tables alike, nothing to differentiate."""
    rows, dim = q.shape[-2:]
    return (
        q.ndim == k.ndim == 4
        and q.dtype == k.dtype
        and q.dtype in HALF
        and k.shape[-2:] == (rows, dim)
        and q.shape[0] == k.shape[0]
        and cos.shape == sin.shape == (cos.shape[0], rows, dim)
        and cos.shape[0] in (1, q.shape[0])
        and cos.stride() == sin.stride()
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1
        and dim % 2 == 0
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    )
