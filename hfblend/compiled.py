"""A compiled model's prefill, which is blended, runs as Python; its decoding stays compiled.

Inside a compiled forward nothing of hfblend is reached. Until the prompt's own forward has been, compiled code is
therefore set to run as it was written; this is a setting of the whole process, so calls in several threads count.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_lock = threading.Lock()
_count = 0
_stance: Any = None


def is_compiled(*modules: nn.Module) -> bool:
    """Whether calling one of these modules runs compiled code, not its `forward` as it was written."""
    return any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in modules
    )


@contextlib.contextmanager
def as_written(*modules: nn.Module) -> Iterator[None]:
    """While it lasts, nothing runs compiled, if one of these is. The first caller sets that, the last one ends it."""
    if not is_compiled(*modules):
        yield
        return
    global _count, _stance
    with _lock:
        _count += 1
        if _count == 1:
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _lock:
            _count -= 1
            if _count == 0:
                _stance.__exit__(None, None, None)
