"""A prompt blended, with all that plugs into the algorithm: controller, trace, retries, a separate CUDA stream.

Shapes: Hkv KV heads, T all tokens, D head_dim.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..blend.algorithm import Blend
from ..blend.look_up import LookUp
from ..blend.model import Forward
from ..blend.reuse import Reuse
from ..config import BlendConfig
from ..controller import BlendShape, Controller, loads_of
from ..gpu.streams import Beside
from ..kv.chunk import ChunkLost
from ..kv.rows import KV
from ..prompts.prompt import ChunkSpans
from ..store import Store
from ..support.registry import TestedModel
from ..trace.recorder import Recorder, Tracer
from ..trace.trace import BlendTrace

logger = logging.getLogger(__name__)


class Blending:
    """One prompt.

    Args:
        model: past its self-test.
        input_ids: (1, T).
        spans: of the chunks.
        store, config: as in `hfblend.blend`.
        prompt_length: without the draft tokens that follow the prompt; default T.
        controller: settles `recompute_ratios="auto"`.
        ids: `input_ids` as numbers, if known: reading them from a GPU waits for all its work.
        algorithm: `Blend`, or a subclass.
        weights_are_known: whether this call has already checked the weights for changes, which waits for a GPU, too.

    Attributes:
        blend: the state of the phases, once started.
    """

    blend: Blend

    def __init__(
        self,
        model: TestedModel,
        input_ids: torch.Tensor,
        spans: ChunkSpans,
        store: Store,
        config: BlendConfig,
        trace: BlendTrace | None = None,
        *,
        prompt_length: int | None = None,
        controller: Controller | None = None,
        ids: list[int] | None = None,
        algorithm: type[Blend] = Blend,
        weights_are_known: bool = False,
    ) -> None:
        config.require_layers(model.num_kv_layers)
        model.require_own_dtype()
        if config.is_auto:
            model.ranks.require_one()
            if controller is None:
                raise ValueError(
                    'recompute_ratios="auto" needs a controller, got none. `hfblend.patch` makes one; for '
                    "`hfblend.blend` pass controller=Controller(profile_of(model, store, config))."
                )
        if not weights_are_known:
            model.fingerprint.current(model.model)
        self.model, self.spans, self.store, self.config, self.controller = model, spans, store, config, controller
        self.input_ids = input_ids.to(model.device)
        self.length = self.input_ids.shape[1]
        self.prompt_length = prompt_length or self.length
        self.ids = ids or self.input_ids[0].tolist()
        spans.check(self.length)
        self.trace = BlendTrace() if trace is None else trace
        self._algorithm, self._beside = algorithm, Beside(model.device)
        self._lost, self._prefilled = frozenset[str](), frozenset[str]()
        self.trace.num_tokens, self.trace.num_layers = self.length, model.num_layers
        if self.trace.level != "summary":
            self.trace.input_ids = torch.tensor(self.ids)
        if spans.note:
            self.trace.notes.append(spans.note)
        self.observer = (Recorder if self.trace.level == "full" else Tracer)(self.trace, model.device)

    @property
    def buffers(self) -> dict[int, KV]:
        """Layer -> blended K/V (1, Hkv, T + room, D)."""
        return self.blend.buffers

    def run(self, forward: Forward) -> Any:
        """Runs phases 1 to 4. Returns the output of the last pass, whose last row belongs to the last token.

        Args:
            forward: the decoder's or the whole model's forward.
        """
        output = self.start(forward)
        self.join(output)
        return output

    def start(self, forward: Forward) -> Any:
        """Runs on a separate stream of a GPU: call `join` before the current stream uses the result."""
        return self._beside.run(self._blended, forward)

    def _blended(self, forward: Forward) -> Any:
        while True:
            blend = self.prepared(forward)
            try:
                output = blend.run()
            except ChunkLost as error:
                self.begin_again(error)
                continue
            blend.look_up.note_what_was_not_kept()
            return output

    def join(self, output: Any) -> None:
        """Makes the current stream wait for the work of `start`; `output` is its result."""
        trace = self.trace
        made = [trace.scores, trace.candidate_idx, trace.fresh_idx, trace.selected_idx]
        made += trace.maps.items().values() if trace.maps else ()
        made += [] if output is None else output.values()
        buffers = (states for kv in self.buffers.values() for states in kv)
        self._beside.join([t for t in (*made, *buffers) if torch.is_tensor(t)])

    def prepared(self, forward: Forward) -> Blend:
        """Returns a blend that has not begun; on a GPU, a pass without chunks runs already, while Python looks up."""
        config = self.config.settled()
        look_up = LookUp(
            self.model, self.ids, self.spans, self.store, config, self.observer, self.prompt_length, self._lost,
            self._prefilled,
        )  # fmt: skip
        num_read = self.length - self.prompt_length + 1
        self.blend = blend = self._algorithm(
            self.model, forward, self.input_ids, look_up, config, self.observer, num_read
        )
        if self.config.is_auto:
            blend.settle = Settle(self.config, self.controller, look_up, self.trace, self.model.device)
        surely = self.config.selection == "kv_deviation" and self.config.check_layers and self.spans
        if self.model.device.type == "cuda" and surely and not self.config.recomputes_all:
            blend.full_pass(config.check_layers[0])
            self.observer.phase_done("select")
        return blend

    def stopped_at(self, stop: str, forward: Forward) -> Blend:
        """Returns a blend that ran to one of the stops of `Blend.phases`."""
        blend = self.prepared(forward)
        for name in blend.phases():
            if name == stop:
                return blend
        raise ValueError(f"A blend does not stop at {stop!r}.")

    def begin_again(self, lost: ChunkLost) -> None:
        """Treats an entry that turned out unreadable as missing from now on. Each can cause one restart."""
        logger.warning("%s; the prompt is blended again without it.", lost)
        self._lost |= {lost.key}
        self._prefilled |= {chunk.key for chunk in self.trace.chunks if chunk.status == "miss"}
        self.trace.notes.append(f"{lost}; blended again without it.")


@dataclass
class Settle:
    """Settles `recompute_ratios="auto"` after phase 1. If a full prefill is quicker, only exact chunks are reused."""

    config: BlendConfig
    controller: Controller | None
    look_up: LookUp
    trace: BlendTrace
    device: torch.device

    def __call__(self, reuse: Reuse) -> tuple[BlendConfig, Reuse]:
        """Returns settings with a ratio, and the pieces to reuse."""
        assert self.controller is not None
        num_exact = sum(stop - start for start, stop in (piece.span for piece in reuse.exact))
        shape = BlendShape(len(self.look_up.ids), num_exact, reuse.fresh_idx.numel())
        decision = self.trace.decision = self.controller.decide(shape, loads_of(reuse, self.device))
        if decision.ratio is not None:
            return self.config.settled(decision.ratio), reuse
        self.trace.notes.append(f"Computed in full: {decision.reason}.")
        logger.info("A prompt is computed in full: %s.", decision.reason)
        for chunk in self.look_up.chunks:
            if chunk.status == "hit" and not chunk.exact:
                chunk.status, chunk.cached_start = "unused", None
        return self.config.settled(), self.look_up.partition(reuse.exact)
