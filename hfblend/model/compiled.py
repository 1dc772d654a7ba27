"""Compiled code of a model, set aside while a prompt is blended: it calls nothing of hfblend.

`module.compile()` leaves its code in one attribute of the instance, `torch.compile(module.forward)` in another. Both
are taken off until the prompt is in the cache; decoding is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ..locks import Mutex, Running, keeps_alive, put_back

T = TypeVar("T")


@dataclass
class _Aside:
    """A module's compiled attributes, those that replace them meanwhile, and the work that wants them aside."""

    compiled: dict[str, Any]
    written: dict[str, Any]
    owners: list[Running]


_lock = Mutex()
_aside: WeakKeyDictionary[nn.Module, _Aside] = WeakKeyDictionary()


def as_written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The function that `torch.compile` was given, if it made this one; else this one."""
    return getattr(forward, "_torchdynamo_orig_callable", forward)


@keeps_alive("owner")
def run_as_written(modules: tuple[nn.Module, ...], work: Callable[..., T], /, **kwargs: Any) -> T:
    """Runs some work in which these modules run their code uncompiled, in other threads too."""
    if _run_as_written(modules):
        return work(**kwargs)
    owner = Running()
    try:
        set_aside(owner, *modules)
        return work(**kwargs)
    finally:
        give_back(owner)


def set_aside(owner: Running, *modules: nn.Module) -> None:
    """Has these modules run their code uncompiled, until `give_back`, or until the owner's work is over."""
    tidy()
    if _run_as_written(modules):
        return
    with _lock:
        for module in modules:
            if module in _aside:
                _aside[module].owners.append(owner)
            elif compiled := _compiled(module):
                written = {name: as_written(value) if name == "forward" else None for name, value in compiled.items()}
                _aside[module] = _Aside(compiled, written, [owner])
                vars(module).update(written)


def give_back(owner: Running) -> None:
    """Ends the owner's `set_aside`. A module without owners gets its compiled code back."""
    for module, aside in list(_aside.items()):
        with _lock:
            aside.owners = [one for one in aside.owners if one is not owner and one.is_alive]
            if not aside.owners and _aside.get(module) is aside:
                for name, value in aside.written.items():
                    put_back(vars(module), name, value, aside.compiled[name])
                del _aside[module]


def tidy() -> None:
    """Gives compiled code back that interrupted work has set aside."""
    if _aside:
        give_back(Running())


def _run_as_written(modules: tuple[nn.Module, ...]) -> bool:
    """Whether these modules run their code uncompiled already, and no work has set any aside."""
    return not _aside and not any(map(_compiled, modules))


def _compiled(module: nn.Module) -> dict[str, Any]:
    """The compiled attributes of a module, by name."""
    call, forward = (vars(module).get(name) for name in ("_compiled_call_impl", "forward"))
    found = {} if call is None else {"_compiled_call_impl": call}
    return found if forward is None or as_written(forward) is forward else {**found, "forward": forward}
