"""The CUDA stream that is current in a thread, changed for some work so that no exception leaves it changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
