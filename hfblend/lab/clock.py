"""The clock of every measurement, turns, and the best that the machine can do, measured in the same run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from ..kv.streams import clocked, synchronize

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
Say = Callable[[str], None]

_BATCHES, _CALLS = 5, 4  # the best of so many batches counts, each of so many calls


class Turn(NamedTuple):
    """One timed call.

    Attributes:
        ms: on the host's clock, from the call to its return with an idle device.
        peak_gib: of GPU memory, which includes weights and stored chunks; `None` on a CPU.
        result: of the call.
    """

    ms: float
    peak_gib: float | None
    result: Any


def timed(call: Callable[[], Any], device: torch.device) -> Turn:
    """Calls once, on a device that is idle before and after."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds, result = clocked(call, device)
    return Turn(1000 * seconds, torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None, result)


def take_turns(
    calls: Mapping[K, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    say: Say = lambda what: None,
    *,
    warm_up: int = 1,
    drop_failed: bool = False,
) -> dict[K, list[Turn]]:
    """Times several calls in turns, so that a drift of the machine meets all of them alike.

    Args:
        warm_up: turns that do not count.
        drop_failed: a call that memory does not last for has no turn, and the others go on.

    Returns:
        `repeats` turns of each call.
    """
    turns: dict[K, list[Turn]] = {name: [] for name in calls}
    left = dict(calls)
    for i in range(-warm_up, repeats):
        for name, call in list(left.items()):
            say(f"{name}, turn {i + 1} of {repeats}")
            once = partial(timed, call, device)
            turn = if_memory_lasts(once) if drop_failed else once()
            if turn is None:
                del left[name]
                turns[name].clear()
            elif i >= 0:
                turns[name].append(turn)
    return turns


# --- memory -----------------------------------------------------------------------------------------------------------


def if_memory_lasts(call: Callable[[], T]) -> T | None:
    """The call's result; if memory runs out, frees what the call held and returns `None`."""
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


# --- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peaks:
    """The best rates of a device.

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
        """The roofline: milliseconds below which this device cannot compute and move that much at once."""
        return 1000 * max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    def batch() -> None:
        for _ in range(_CALLS):
            call()

    call()
    return min(clocked(batch, device)[0] for _ in range(_BATCHES)) / _CALLS
