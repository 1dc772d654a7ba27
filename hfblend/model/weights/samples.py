"""A sample of the numbers of many tensors, cheap enough to be taken before every prompt.

Version counters do not tell all changes: fused optimizers, `.data`, NumPy and DLPack views, DeepSpeed's flat buffers
and `_unsafe_preserve_version_counter` write past them. The sample finds those by content.

    ■ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚ ⬚    The sample of a matrix: each step goes some rows down and 0.618 of a row to the right,
    ⬚ ⬚ ⬚ ⬚ ⬚ ■ ⬚ ⬚    so that few elements meet every block of rows and every block of columns.
    ⬚ ⬚ ■ ⬚ ⬚ ⬚ ⬚ ⬚
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...kernels.device import HAS_TRITON, has_kernels

if HAS_TRITON:
    from ...kernels.small import sample

Place: TypeAlias = tuple[int, int]  # of a sample in a tensor's memory: how many elements, and how far apart

_WHOLE = 1 << 13  # elements: norms, biases and rotary tables are compared whole
_ONE_OF = 1 << 14  # elements of a larger tensor, within these limits: a GPU reads more in less time
_ON_CPU, _ON_GPU = (32, 1024), (1024, 4096)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Samples:
    """Some elements of each tensor, as they were when this was made.

    On a CPU, this holds the tensors' memory; on a GPU, only its addresses, so that moving a model frees the GPU.

    Args:
        tensors: `None` and empty ones have no sample.
    """

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(tensors):
            if tensor is not None and tensor.data_ptr():
                groups.setdefault((tensor.device, _bits(tensor).dtype), []).append(i)
        self._numbers = list(groups.values())
        self._groups = [_Group([tensors[i] for i in numbers]) for numbers in self._numbers]  # type: ignore[misc]
        self._then = self.take()
        self._memory = [memory.cdata for group in self._groups for memory in group.memory]
        self._count = len(tensors)

    def take(self) -> list[torch.Tensor]:
        """These elements as they are now. Each tensor must still have its memory; no GPU is waited for."""
        return [group.take() for group in self._groups]

    def are_as_they_were(self, now: list[torch.Tensor] | None = None) -> bool:
        """Whether all these elements have the same bits, `now` or in what `take` gave."""
        return all(map(torch.equal, self.take() if now is None else now, self._then))

    def has_lost_memory(self) -> bool:
        """Whether a tensor was given other memory, `weight.data = …`: the next one may be given the old address."""
        return any(map(torch.UntypedStorage._expired, self._memory))

    def of_each(self) -> list[bytes]:
        """Each tensor's elements, as they were."""
        found = [b""] * self._count
        for numbers, group, then in zip(self._numbers, self._groups, self._then):
            for i, sample in zip(numbers, then.cpu().split(group.counts)):
                found[i] = sample.numpy().tobytes()
        return found


class _Group:
    """Tensors of one device whose elements have one size.

    Attributes:
        counts: elements in each sample.
        take: gives all samples, one after the other, as integers.
        memory: of the tensors, where only addresses are kept.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        device, places = tensors[0].device, [_place(tensor) for tensor in tensors]
        self.counts = [count for count, _ in places]
        self.memory: list[StorageWeakRef] = []
        self.take: Callable[[], torch.Tensor]
        if device.type == "cpu":
            views = [view.numpy() for view in reference_views(tensors, places)]
            self.take = lambda: torch.from_numpy(np.concatenate(views))  # in half of the time of torch.cat
            return
        self.memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        if has_kernels(device):
            rows = zip(tensors, places, accumulate(self.counts, initial=0))
            table = torch.tensor([(t.data_ptr(), step, start, count) for t, (count, step), start in rows])
            self.take = functools.partial(sample, table.to(device), sum(self.counts), _bits(tensors[0]).dtype)
        else:
            self.take = lambda: torch.cat(reference_views(tensors, places))


def reference_views(tensors: Sequence[torch.Tensor], places: Sequence[Place]) -> list[torch.Tensor]:
    """Each tensor's sample as a view of its memory: the reference of the kernel."""
    return [_bits(tensor).as_strided((count,), (step,)) for tensor, (count, step) in zip(tensors, places)]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers of their size."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.view(_INTEGERS[tensor.element_size()])


def _place(tensor: torch.Tensor) -> Place:
    """The place of a tensor's sample in its memory, whose gaps, if it has any, count as elements."""
    bits = _bits(tensor)
    strides = sorted(stride for size, stride in zip(bits.shape, bits.stride()) if size > 1 and stride)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(bits.shape, bits.stride()))
    if extent <= _WHOLE:
        return extent, 1
    least, most = _ON_CPU if tensor.device.type == "cpu" else _ON_GPU
    wanted = min(max(extent // _ONE_OF, least), most)
    row = strides[1] if len(strides) > 1 else extent
    rows = extent // (wanted * row)
    step = rows * row - int(0.382 * row) if rows else extent // wanted
    while math.gcd(step, row) > 1:
        step -= 1
    return (extent - 1) // step + 1, step
