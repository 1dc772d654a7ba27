"""The recording of a forward as CUDA graphs, whose kernels find a prompt's keys and values through a state.

Shapes: S rows of the pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..attention.by_position import HALF, LARGEST_HEAD_DIM
from ..blend.caches import RowsCache
from ..kernels.device import HAS_TRITON
from ..kernels.reference import AttentionArgs
from ..kv.rows import KV
from ..kv.streams import on_stream
from ..model.hf_model import HFModel

if HAS_TRITON:
    from ..kernels.rows import write_rows

# As many as a disk is asked for at once (`hfblend.store.loader`); the first parts have one each, to begin soon.
LAYERS_A_PART = 4

Part = tuple[torch.cuda.CUDAGraph, list[int]]  # the graph of some layers, and those layers


def can_record(hf_model: HFModel) -> bool:
    """Whether passes of this model can be CUDA graphs at all."""
    return (
        hf_model.takes_kernels
        and hf_model.dtype in HALF
        and hf_model.attends_by_position
        and not hf_model.length_dependent
        and all(max(layout.key_dim, layout.value_dim) <= LARGEST_HEAD_DIM for layout in hf_model.layouts.values())
        and not hf_model.has_hooks
    )


class GraphCache(RowsCache):
    """A `BlendingCache` inside a graph: rows are written through the state, and attention reads them through it.

    Args:
        reached: is told each layer that the pass comes to.
        correct: is given rows (S,), their fresh K/V and the queries with which the layer will attend (`None` if it is
            not told), once in each of the layers `corrected`.
    """

    def __init__(
        self,
        num_layers: int,
        rows: torch.Tensor,
        state: Any,
        stop_at: int | None,
        reached: Callable[[int], None] = lambda layer_idx: None,
        correct: Callable[..., None] | None = None,
        corrected: Iterable[int] = (),
    ) -> None:
        super().__init__(num_layers, rows, stop_at)
        self.state, self.reached, self._correct, self._uncorrected = state, reached, correct, set(corrected)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KV:
        self.reached(layer_idx)
        corrects, rows = layer_idx in self._uncorrected, self.rows  # a pass comes again to where it was cut
        self._uncorrected.discard(layer_idx)

        def mix(queries: AttentionArgs | None) -> None:
            if self._correct is not None and corrects:
                self._correct(layer_idx, rows, (key_states, value_states), queries)
            write_rows(key_states, value_states, rows, self.state, layer_idx)

        self.arrived(layer_idx, mix, waits=corrects)
        return key_states, value_states  # attention takes shapes from them, and K/V from the state


class Recording:
    """A pass that is recorded in parts.

    Args:
        pool: of CUDA graphs, whose memory they work in.

    Attributes:
        parts: the graph of some layers each, from where the first one's K/V are written, and those layers.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), pool
        self.parts: list[Part] = []
        self._is_open = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Records a call that names each layer to `reached`, in order. Returns what it returns."""
        torch.cuda.synchronize(self._stream.device)
        torch.cuda.empty_cache()
        return on_stream(self._stream, self._record, call)

    def _record(self, call: Callable[[], Any]) -> Any:
        self._begin()
        try:
            return call()
        finally:
            self._end()

    def close(self) -> None:
        """Ends a recording that was interrupted: while one is under way, this thread may allocate nothing."""
        if self._is_open:
            with contextlib.suppress(RuntimeError):  # it has ended, or cannot
                on_stream(self._stream, self._end)
            self._is_open = False

    def reached(self, layer_idx: int) -> None:
        """The call comes to where K/V of a layer are written."""
        if layer_idx in self.parts[-1][1]:
            return
        if len(self.parts) <= LAYERS_A_PART or layer_idx % LAYERS_A_PART == 0:
            self._end()
            self._begin()
        self.parts[-1][1].append(layer_idx)

    def _begin(self) -> None:
        self.parts.append((torch.cuda.CUDAGraph(), []))
        self._is_open = True
        self.parts[-1][0].capture_begin(self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        self.parts[-1][0].capture_end()
        self._is_open = False


def recorded(hf_model: HFModel, pool: Any, run: Callable[[Callable[[int], None]], Any]) -> tuple[Any, list[Part]]:
    """Runs a pass once, then records it, in exclusive work of the model's lock.

    Args:
        pool: of CUDA graphs, whose memory it works in; `None` makes a new one.
        run: the pass, called with a function that it may tell each layer it comes to, where a part may end.

    Returns:
        The output, in the pool's memory, and the parts.
    """
    side, caller = torch.cuda.Stream(hf_model.device), torch.cuda.current_stream(hf_model.device)
    side.wait_stream(caller)
    on_stream(side, run, lambda layer_idx: None)  # kernels are compiled and tuned, libraries make their workspaces
    caller.wait_stream(side)
    recording = Recording(hf_model.device, torch.cuda.graph_pool_handle() if pool is None else pool)
    hf_model.lock.undo_later(recording.close)
    return recording.run(lambda: run(recording.reached)), recording.parts
