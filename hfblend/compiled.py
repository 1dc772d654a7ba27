"""Compiled code of a model, set aside while a prompt is blended: inside it nothing of hfblend is reached.

`module.compile()` leaves its code in one attribute of the instance, `torch.compile(module.forward)` in another. Both
are taken off until the prompt is in the cache; decoding is compiled again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Aside:
    """A module's compiled attributes, and how many callers want them aside."""

    attributes: dict[str, Any]
    count: int = 1


_lock = threading.Lock()
_aside: WeakKeyDictionary[nn.Module, _Aside] = WeakKeyDictionary()


def as_written(forward: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` was given, if this is what it made."""
    return getattr(forward, "_torchdynamo_orig_callable", forward)


@contextlib.contextmanager
def set_aside(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, calling these modules runs their code as it was written, in other threads too.

    The last one to leave puts back what the first one took.
    """
    taken = [module for module in modules if _take(module)]
    try:
        yield
    finally:
        for module in taken:
            _give_back(module)


def _take(module: nn.Module) -> bool:
    """Whether there is something to give back."""
    with _lock:
        if module in _aside:
            _aside[module].count += 1
            return True
        own = module.__dict__
        written = {"_compiled_call_impl": None, "forward": as_written(own.get("forward", module.forward))}
        compiled = {name: own[name] for name in written if own.get(name) not in (None, written[name])}
        if compiled:
            _aside[module] = _Aside(compiled)
            own.update({name: written[name] for name in compiled})
        return bool(compiled)


def _give_back(module: nn.Module) -> None:
    with _lock:
        aside = _aside[module]
        aside.count -= 1
        if aside.count == 0:
            module.__dict__.update(aside.attributes)
            del _aside[module]
