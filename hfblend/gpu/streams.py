"""The CUDA streams of hfblend: a prompt is blended while Python prepares `generate`, and chunks come from RAM.

caller's stream     …prepared…──────────────┬─ logits, decoding
side stream         passes ────────────────┘ joined
bus                 copies of chunk KV from RAM, some layers ahead
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from ..kv.streams import on_stream

T = TypeVar("T")


class Beside:
    """Work on a stream next to the caller's: it begins after the work queued there, and the caller waits when it joins.

    Each caller's stream has one side stream, so the next prompt takes up in order the memory that one gives back to the
    allocator. Tensors that leave for the caller's stream must be named in `join`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._done = device, None if device.type != "cuda" else torch.cuda.Event()

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """Runs work whose kernels are queued on the side stream; nothing changes without a GPU."""
        if self._done is None:
            return work(*args)
        caller = torch.cuda.current_stream(self.device)
        stream = _side_stream_of(caller)
        stream.wait_stream(caller)
        try:
            return on_stream(stream, work, *args)
        except BaseException:
            caller.wait_stream(stream)  # nothing may take the memory of running work
            raise
        finally:
            self._done.record(stream)

    def join(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """The current stream waits for that work, and may use these tensors, made there, for as long as it likes."""
        if self._done is None:
            return
        caller = torch.cuda.current_stream(self.device)
        caller.wait_event(self._done)
        made_here = (t for t in tensors if t.device == caller.device)  # elsewhere, work ran on the caller's own streams
        for tensor in {t.untyped_storage().data_ptr(): t for t in made_here}.values():
            tensor.record_stream(caller)


@functools.cache
def _side_stream_of(caller: torch.cuda.Stream) -> torch.cuda.Stream:
    return torch.cuda.Stream(caller.device)


@functools.cache
def bus_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for all that is read from RAM."""
    return torch.cuda.Stream(device)
