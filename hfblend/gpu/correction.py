"""The offset correction by kernels, alike in a pass that Python runs and in one that is a CUDA graph.

Shapes: Hkv KV heads, S rows of a pass, T all tokens, D head_dim, R rotated pairs, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial

import torch

from ..blend.correction import BLOCK
from ..blend.reuse import Reuse
from ..blend.rotation import Tables
from ..blend.trust import DOUBTED, NUM_QUERIES, TRUSTED
from ..kernels.device import HAS_TRITON
from ..kernels.reference import AttentionArgs
from ..kv.rows import KV, rows_behind, sent
from ..model.hf_model import HFModel
from ..model.rotary_tables import TableKind, kind_of
from ..trace.observer import Observer

if HAS_TRITON:
    from ..kernels.correction import OffsetKernels, Turn
    from ..kernels.plan import Plan
    from ..kernels.trust import Asking


class Offsets:
    """The offset correction of one model's prompts, on its GPU."""

    def __init__(self, hf_model: HFModel) -> None:
        self.hf_model = hf_model
        self._kernels: OffsetKernels | None = None

    def of_prompt(self, reuse: Reuse, length: int, observer: Observer) -> OffsetCorrector:
        """The correction of a prompt of T tokens, on the current stream."""
        tables = [self.hf_model.unit_tables(kind, length) for kind in self._kinds]
        self._kernels = self._kernels or self._with(tables)
        return OffsetCorrector(self._kernels, tables, reuse, self.hf_model.device, observer)

    @cached_property
    def _kinds(self) -> list[TableKind]:
        return list(dict.fromkeys(kind_of(one) for one in self.hf_model.rotations if one is not None))

    def _with(self, tables: list[Tables]) -> OffsetKernels:
        turns: dict[int, Turn | None] = {}
        for layer in self.hf_model.layouts:
            rotation = self.hf_model.rotations[layer]
            if rotation is None:
                turns[layer] = None
                continue
            nth = self._kinds.index(kind_of(rotation))
            turns[layer] = Turn(rotation.slot, tables[nth][0].shape[1], rotation.pairing == "half", nth)
        return OffsetKernels(self.hf_model.layouts, turns, BLOCK, Asking(NUM_QUERIES, DOUBTED, TRUSTED))


class OffsetCorrector:
    """Corrects the reused rows of one prompt's moved pieces, each layer once: `Corrector` with `offset`, by kernels.

    Args:
        tables: cos and sin (at least T, R), in the order in which the kernels number them.
        observer: is told how much was added.

    Attributes:
        kernels: what corrects a layer.
    """

    def __init__(
        self, kernels: OffsetKernels, tables: list[Tables], reuse: Reuse, device: torch.device, observer: Observer
    ) -> None:
        self.kernels, self._tables, self._reuse, self._device = kernels, tables, reuse, device
        self._observer, self._done = observer, set[int]()
        self._rows: torch.Tensor | None = None
        self._numbers = torch.empty(0)

    def __call__(
        self, above: int, layer_idx: int, rows: torch.Tensor, fresh: KV, kv: KV, args: AttentionArgs | None = None
    ) -> None:
        """Corrects a layer in a pass that Python runs. Arguments as in `hfblend.blend.corrector.Corrector`."""
        if layer_idx <= above or layer_idx in self._done:  # a pass comes again to the layer where it was cut
            return
        self._done.add(layer_idx)
        buffer = rows_behind(kv)
        assert buffer is not None, "buffers are packed in rows"
        with torch.cuda.device_of(buffer):
            if rows is not self._rows:
                self._rows, self._numbers = rows, sent(torch.tensor(self.numbers_for(rows)), rows.device)
            self.kernels.correct(layer_idx, fresh, rows, buffer, self._numbers, args)
            self._tell([layer_idx], self._numbers)

    @cached_property
    def _plan(self) -> Plan:
        """Made in the first pass that corrects: a pass that selects is on its way by then."""
        spans, kernels = [piece.span for piece in self._reuse.moved], self.kernels
        return Plan(spans, kernels.block, kernels.layouts, self._tables, self._device, self._reuse.exact_from_start)

    def numbers_for(self, rows: torch.Tensor) -> list[int]:
        """The numbers by which the kernels find this prompt, in a pass over rows (S,), rising."""
        return self._plan.numbers_for(rows)

    def layers_above(self, above: int) -> list[int]:
        """The layers that a pass corrects; none if some are done, as graphs correct all."""
        layers = [layer for layer in sorted(self.kernels.layouts) if layer > above]
        return [] if self._done & set(layers) else layers

    def graph_ran(self, layers: list[int], numbers: torch.Tensor) -> None:
        """Notes that a graph has corrected layers, with these numbers."""
        self._done.update(layers)
        with torch.cuda.device_of(numbers):
            self._tell(layers, numbers)

    def _tell(self, layers: list[int], numbers: torch.Tensor) -> None:
        first, stop, kernels, plan = layers[0], layers[-1] + 1, self.kernels, self._plan
        # A trace keeps this: the plan's memory, to which the numbers lead, but not the prompt's chunks.
        sizes = cache(lambda: kernels.sizes(range(first, stop), numbers, plan.pieces))
        for layer in layers:
            self._observer.corrected(layer, partial(lambda nth: sizes()[nth], layer - first))


def in_graph(correct: Callable[..., None] | None) -> tuple[OffsetCorrector | None, list[int]]:
    """What corrects layers of a pass by kernels, and which; `None` where nothing does, or only Python.

    Args:
        correct: of a pass's cache, from `ReusedKV.correcting`.
    """
    if not isinstance(correct, partial) or not isinstance(correct.func, OffsetCorrector):
        return None, []
    layers = correct.func.layers_above(*correct.args)
    return correct.func if layers else None, layers
