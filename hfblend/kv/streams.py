"""The CUDA streams of hfblend: a prompt is blended while Python prepares `generate`, and chunks come from RAM.

caller's stream     …prepared…──────────────┬─ logits, decoding
side stream         passes ────────────────┘ joined
bus                 copies of chunk KV from RAM, some layers ahead

The stream that is current in a thread changes for some work, so that no exception leaves it changed.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from ..locks import Running, keeps_alive

T = TypeVar("T")

_switched = threading.local()  # .notes: work of this thread, and the streams that were current before it


@keeps_alive("running")
def on_stream(stream: torch.cuda.Stream | None, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Runs work with `stream`, and its device, current; `None` changes nothing."""
    if stream is None:
        return work(*args, **kwargs)
    switch_back()
    running, before = Running(), (torch.cuda.current_stream(stream.device), torch.cuda.current_stream())
    notes = vars(_switched).setdefault("notes", [])
    notes.append((running, before))
    try:
        torch.cuda.set_stream(stream)
        return work(*args, **kwargs)
    finally:
        for one in before:
            torch.cuda.set_stream(one)
        notes.pop()


def switch_back() -> None:
    """Makes the streams current that were so before interrupted work, once its kernels are done."""
    notes = vars(_switched).get("notes")
    while notes and not notes[-1][0].is_alive:
        for stream in notes[-1][1]:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
            torch.cuda.set_stream(stream)
        notes.pop()


def synchronize(device: torch.device) -> None:
    """Waits for all that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Calls once; returns the seconds on the host's clock, the device idle before and after, and the result."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


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
