"""The timeline of phases and layers. On a GPU, events are recorded at once and read only when the user looks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

Lane = Literal["phase", "ask", "load", "compute"]


@dataclass(frozen=True)
class Interval:
    """From `start_ms` to `stop_ms` after the clock began.

    Attributes:
        lane: `"phase"`, or of a layer: `"ask"` (a moment), `"load"` (its reused KV), `"compute"` (from its K/V to the
            next layer's).
        name: of the phase, or of the pass.
        layer: 0-based; `None` of a phase.
    """

    lane: Lane
    name: str
    start_ms: float
    stop_ms: float
    layer: int | None = None

    @property
    def ms(self) -> float:
        """The duration."""
        return self.stop_ms - self.start_ms


def ms_per_phase(timeline: Iterable[Interval]) -> dict[str, float]:
    """Returns phase -> milliseconds, phases of one name added up."""
    spent: dict[str, float] = {}
    for interval in timeline:
        if interval.lane == "phase":
            spent[interval.name] = spent.get(interval.name, 0.0) + interval.ms
    return spent


class PhaseClock:
    """Notes the ends of phases, and intervals within them; only `intervals` waits for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]
        self._layers: list[tuple[Lane, str, int, Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end_of(self, phase: str) -> None:
        """Ends a phase; the next one begins."""
        self._marks.append((phase, self._now()))

    @contextlib.contextmanager
    def layer(self, lane: Lane, name: str, layer: int) -> Iterator[None]:
        """Notes the time of work on a layer."""
        begin = self._now()
        try:
            yield
        finally:
            self._layers.append((lane, name, layer, begin, self._now()))

    @contextlib.contextmanager
    def layers_of_pass(self, name: str, cache: Any) -> Iterator[None]:
        """Notes the time of each layer in a pass: from the moment its cache has the layer's K/V to the next layer's.

        Hooks on the layers would tell more, and would change how a pass runs.
        """
        update, since, current = cache.update, self._now(), -1

        def end(layer: int) -> None:
            self._layers.append(("compute", name, layer, since, self._now()))

        def noted(key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
            nonlocal since, current
            end(layer_idx if current < 0 else current)
            current = layer_idx
            try:
                return update(key_states, value_states, layer_idx, *args, **kw)
            finally:
                since = self._now()

        cache.update = noted
        try:
            yield
        finally:
            del cache.update  # it refers to the cache: a cycle would keep K/V for the garbage collector
            if current >= 0:
                end(current)

    def intervals(self) -> list[Interval]:
        """Returns phases first, then layers, each in the order in which they ended."""
        origin = self._marks[0][1]

        def ms(moment: Any) -> float:
            if not self._on_gpu:
                return 1000 * (moment - origin)
            moment.synchronize()
            return origin.elapsed_time(moment)

        ends = [(phase, ms(moment)) for phase, moment in self._marks]
        phases = [Interval("phase", phase, begin, end) for (_, begin), (phase, end) in pairwise(ends)]
        return phases + [
            Interval(lane, name, ms(begin), ms(end), layer) for lane, name, layer, begin, end in self._layers
        ]
