"""Compiled code of a model, set aside while a prompt is blended: inside it nothing of hfblend is reached.

`module.compile()` leaves its code in one attribute of the instance, `torch.compile(module.forward)` in another. Both
are taken off until the prompt is in the cache; decoding is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ..locks import Mutex, Running, put_back

T = TypeVar("T")


@dataclass
class _Aside:
    """A module's compiled attributes, what stands there meanwhile, and the work that wants them aside."""

    compiled: dict[str, Any]
    written: dict[str, Any]
    owners: list[Running]

    def put_back(self, module: nn.Module) -> None:
        for name, value in self.written.items():
            put_back(vars(module), name, value, self.compiled[name])


_lock = Mutex()
_aside: WeakKeyDictionary[nn.Module, _Aside] = WeakKeyDictionary()


def as_written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given, if this is what it made."""
    return getattr(forward, "_torchdynamo_orig_callable", forward)


def run_as_written(modules: tuple[nn.Module, ...], work: Callable[..., T], /, **kwargs: Any) -> T:
    """Runs some work in which these modules run their code as it was written, in other threads too."""
    if not _aside and not any(map(_compiled, modules)):
        return work(**kwargs)
    owner = Running()
    return owner.do(_run, owner, modules, work, kwargs)


def _run(owner: Running, modules: tuple[nn.Module, ...], work: Callable[..., T], kwargs: dict[str, Any]) -> T:
    set_aside(owner, *modules)
    try:
        return work(**kwargs)
    finally:
        give_back(owner)


def set_aside(owner: Running, *modules: nn.Module) -> None:
    """Has these modules run their code as it was written, until `give_back`, or until the owner's work is over."""
    tidy()
    for module in modules:
        with _lock:
            if module in _aside:
                _aside[module].owners.append(owner)
            elif compiled := _compiled(module):
                written = {name: as_written(value) if name == "forward" else None for name, value in compiled.items()}
                _aside[module] = _Aside(compiled, written, [owner])
                vars(module).update(written)


def give_back(owner: Running) -> None:
    """Ends what `set_aside` began. The last owner's modules get back what the first one took."""
    for module, aside in list(_aside.items()):
        with _lock:
            aside.owners = [one for one in aside.owners if one is not owner and one.is_alive]
            if not aside.owners and _aside.get(module) is aside:
                aside.put_back(module)
                del _aside[module]


def tidy() -> None:
    """Gives back what interrupted work has left aside."""
    if _aside:
        give_back(Running())


def _compiled(module: nn.Module) -> dict[str, Any]:
    """The compiled attributes of a module, by name."""
    own = vars(module)
    found = {name: own.get(name) for name in ("_compiled_call_impl", "forward")}
    written = {"_compiled_call_impl": None, "forward": as_written(found["forward"])}  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if value not in (None, written[name])}
