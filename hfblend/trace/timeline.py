"""When what happened: phases, and layers. On a GPU, events are recorded now and read only when somebody looks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

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
        """How long it took."""
        return self.stop_ms - self.start_ms


def ms_per_phase(timeline: Iterable[Interval]) -> dict[str, float]:
    """Phase -> milliseconds, phases of the same name added up."""
    spent: dict[str, float] = {}
    for interval in timeline:
        if interval.lane == "phase":
            spent[interval.name] = spent.get(interval.name, 0.0) + interval.ms
    return spent


@dataclass(frozen=True)
class SavedTimeline:
    """What a clock showed, read from a file."""

    saved: tuple[Interval, ...]

    def intervals(self) -> list[Interval]:
        """In the order in which they ended."""
        return list(self.saved)


class PhaseClock:
    """Notes when phases end, and intervals within them; nothing waits for a GPU before `intervals` is called."""

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
        """Notes what is done to a layer inside it."""
        begin = self._now()
        try:
            yield
        finally:
            self._layers.append((lane, name, layer, begin, self._now()))

    def intervals(self) -> list[Interval]:
        """Phases first, then layers, each in the order in which they ended."""
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


class KeepsUpdates(Protocol):
    """A cache, as a pass meets it."""

    update: Any


class LayersOfPass:
    """Notes when a pass computes each layer: from the moment its cache has the layer's K/V to the next layer's.

    Hooks on the layers would tell more, and would change how a pass runs.
    """

    def __init__(self, clock: PhaseClock, name: str, cache: KeepsUpdates) -> None:
        self.clock, self.name = clock, name
        self._update, self._since = cache.update, clock._now()
        self._layer: int | None = None
        cache.update = self._noted

    def _noted(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kw: Any
    ) -> Any:
        self._end(layer_idx)
        self._layer = layer_idx
        try:
            return self._update(key_states, value_states, layer_idx, *args, **kw)
        finally:
            self._since = self.clock._now()

    def end(self) -> None:
        """The pass is over."""
        if self._layer is not None:
            self._end(self._layer)

    def _end(self, layer_idx: int) -> None:
        layer = layer_idx if self._layer is None else self._layer
        self.clock._layers.append(("compute", self.name, layer, self._since, self.clock._now()))
