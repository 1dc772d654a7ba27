"""The machine under a benchmark: its clock, its memory, and what it can do at best, measured in the same run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ...kv.streams import synchronize

T = TypeVar("T")

_BATCHES, _CALLS = 5, 4  # the best of so many batches counts, each of so many calls


@dataclass(frozen=True)
class Peaks:
    """What the device does at best.

    Attributes:
        flops_per_s: of a large matrix product in the model's dtype, on random data.
        bytes_per_s: read and written, of a large copy inside the device's memory.
        load_bytes_per_s: from pinned RAM to the GPU in one large copy; `None` on a CPU.
    """

    flops_per_s: float
    bytes_per_s: float
    load_bytes_per_s: float | None

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Peaks:
        """Takes a second or so."""
        on_gpu = device.type == "cuda"
        side, num_bytes = (8192, 2**30) if on_gpu else (1024, 2**27)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product_s = _best_seconds(lambda: torch.mm(a, b), device)
        copy_s = _best_seconds(lambda: target.copy_(source), device)
        load = None
        if on_gpu:
            pinned = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
            load = num_bytes / _best_seconds(lambda: target.copy_(pinned, non_blocking=True), device)
        return cls(2 * side**3 / product_s, 2 * num_bytes / copy_s, load)

    def least_ms(self, flops: float, num_bytes: float) -> float:
        """The roofline: milliseconds below which this device cannot do it, computing and moving at once."""
        return 1000 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    call()
    times = []
    for _ in range(_BATCHES):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(_CALLS):
            call()
        synchronize(device)
        times.append((time.perf_counter() - started) / _CALLS)
    return min(times)


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, float | None, T]:
    """Milliseconds on the host from the call to its return with an idle device; GiB of GPU memory at its peak."""
    on_gpu = device.type == "cuda"
    synchronize(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    ms = 1000 * (time.perf_counter() - started)
    return ms, torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None, result


def if_memory_lasts(call: Callable[[], T]) -> T | None:
    """The call's result; `None`, and what it held is freed, if memory ran out."""
    try:
        return call()
    except torch.OutOfMemoryError:
        pass  # the traceback holds the call's tensors; it is gone only after this block
    free_memory()
    return None


def free_memory() -> None:
    """Gives unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
