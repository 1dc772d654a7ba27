"""A prompt blended, with all that plugs into the algorithm: controller, trace, retries, a separate CUDA stream.

A call of `generate` (`call.py`) makes a `Blending` for each of its prompts, `blend` makes one outside of it.

Shapes: Hkv KV heads, T all tokens, D head_dim.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..arguments import described, require
from ..blend.algorithm import Blend
from ..blend.look_up import LookUp
from ..blend.model import Forward
from ..blend.reuse import Reuse
from ..config import BlendConfig, as_config
from ..controller import BlendShape, Controller, loads_of
from ..kv.chunk import ChunkKV, ChunkLost
from ..kv.ids import ids_in
from ..kv.rows import KV
from ..kv.streams import Beside
from ..prompts.prompt import ChunkSpans, Prompt
from ..store import Store, store_at
from ..support.registry import TestedModel, model_of
from ..trace.facts import Level
from ..trace.recorder import Recorder
from ..trace.trace import BlendTrace, Tracer, as_level
from .hand_over import hand_over

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
        ids: `input_ids` on the CPU, if known: reading them from a GPU waits for all its work.
        algorithm: `Blend`, or a subclass.
        given: KV of the first tokens, which the caller has.
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
        ids: torch.Tensor | None = None,
        algorithm: type[Blend] = Blend,
        given: ChunkKV | None = None,
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
        device = model.device
        self.input_ids = input_ids.to(device)
        self.length = self.input_ids.shape[1]
        self.prompt_length = prompt_length or self.length
        self.ids = ids_in((self.input_ids if ids is None else ids)[0])
        spans.check(self.length)
        require_known(self.ids, model.num_ids)
        self.trace = BlendTrace() if trace is None else trace
        self._algorithm, self._beside, self._given = algorithm, Beside(device), given
        self._lost, self._prefilled = frozenset[str](), frozenset[str]()
        self.trace.num_tokens, self.trace.num_layers = self.length, model.num_layers
        if self.trace.level != "summary":
            self.trace.input_ids = torch.tensor(self.ids)
        if spans.note:
            self.trace.notes.append(spans.note)
        if given is not None:
            self.trace.notes.append(f"Continues a cache of {len(given)} tokens, which no pass computes.")
        self.observer = (Recorder if self.trace.level == "full" else Tracer)(self.trace, device)

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
        made = [trace.scores, trace.candidate_idx, trace.fresh_idx, trace.selected_idx, trace.offsets]
        made += trace.maps.items().values() if trace.maps else ()
        made += [] if output is None else output.values()
        buffers = (states for kv in self.buffers.values() for states in kv)
        self._beside.join([t for t in (*made, *buffers) if torch.is_tensor(t)])

    def prepared(self, forward: Forward) -> Blend:
        """Returns a blend that has not begun; on a GPU, a pass without chunks runs already, while Python looks up."""
        config = self.config.settled()
        look_up = LookUp(
            self.model, self.ids, self.spans, self.store, config, self.observer, self.prompt_length, self._lost,
            self._prefilled, self._given,
        )  # fmt: skip
        num_read = self.length - self.prompt_length + 1
        self.blend = blend = self._algorithm(
            self.model, forward, self.input_ids, look_up, config, self.observer, num_read
        )
        if self.config.is_auto:
            blend.settle = Settle(self.config, self.controller, look_up, self.trace, self.input_ids.device)
        surely = self.config.selection == "kv_deviation" and self.config.check_layers and self.spans
        if self.input_ids.is_cuda and surely and not (self.config.recomputes_all or self._given):
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


def require_known(ids: Any, num_ids: int | None) -> None:
    """Raises `ValueError` for ids outside the embedding: an index error of PyTorch's on a CPU, worse on a GPU."""
    found = np.frombuffer(ids, np.int64)
    if num_ids and not 0 <= found.min() <= found.max() < num_ids:
        raise ValueError(
            f"The prompt has token ids from {found.min()} to {found.max()}; the model's are 0 … {num_ids} − 1. Is the "
            "tokenizer another model's, or was a token added without resize_token_embeddings?"
        )


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


# --- outside of `generate` --------------------------------------------------------------------------------------------


@dataclass
class BlendResult:
    """The result of `blend`.

    Attributes:
        logits: (1, vocabulary) of the first new token.
        cache: KV of every prompt token but the last, so that `model.generate(ids, past_key_values=cache)` continues it.
        trace: of this blend.
    """

    logits: torch.Tensor
    cache: DynamicCache
    trace: BlendTrace


@torch.no_grad()
def blend(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    algorithm: type[Blend] | None = None,
    controller: Controller | None = None,
    trace: Level = "summary",
) -> BlendResult:
    """Blends one prompt, outside `generate`. The model may be patched or not; it is not changed.

    >>> result = blend(model, prompt, store=store)  # doctest: +SKIP
    >>> model.generate(prompt.input_ids, past_key_values=result.cache)  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode.
        prompt: any prompt; one without chunks is prefilled in full.
        store: of chunk KV: a store, a folder or a URL; default, a new `MemoryStore`.
        config: default `BlendConfig()`. `min_reused_tokens` is not applied here.
        algorithm: a subclass of `Blend` with another phase, as those of `hfblend.lab.baselines`.
        controller: settles `recompute_ratios="auto"`; needed for that.
        trace: its level of detail, `"summary"`, `"tokens"` or `"full"`: see `hfblend.BlendTrace`.

    Raises:
        UnsupportedModel: the model's KV cannot be moved.
        ValueError: a check layer beyond the model, a model in training mode, `torch.autocast` in another dtype,
            `"auto"` without a controller, or no such level.
        TypeError: an argument of another type.
    """
    tested, config, prompt, store = model_of(model), as_config(config), require_prompt(prompt), store_at(store)
    if algorithm is not None and not (isinstance(algorithm, type) and issubclass(algorithm, Blend)):
        raise TypeError(f"algorithm must be a subclass of hfblend.blend.algorithm.Blend, got {described(algorithm)}.")
    require("controller", controller, (Controller, type(None)), "a hfblend.controller.Controller")
    noted = BlendTrace(level=as_level(trace))
    state = Blending(
        tested, prompt.input_ids, prompt.chunk_spans, store, config, noted,
        controller=controller, algorithm=algorithm or Blend,
    )  # fmt: skip
    output = state.run(tested.last_logits)
    cache = DynamicCache(config=tested.config)
    hand_over(state.buffers, len(prompt) - 1, 1, cache)
    state.observer.phase_done("hand_over")
    return BlendResult(output.logits[:, -1], cache, noted)


def require_prompt(prompt: Any, name: str = "prompt", expected: str = "a hfblend.Prompt") -> Prompt:
    """Returns the prompt.

    Raises:
        TypeError: text, ids or `prompt.inputs()`; says how to make a prompt of them.
    """
    if isinstance(prompt, Prompt):
        return prompt
    how = "make one with Prompt.from_texts, Prompt.from_chat or Prompt(input_ids, chunk_spans)"
    if isinstance(prompt, Mapping):
        how = "pass the prompt itself, not its inputs()"
    raise TypeError(f"{name} must be {expected}, got {described(prompt)}: {how}.")


def require_prompts(prompts: Any, asked_by: str) -> list[Prompt]:
    """Returns several prompts as a list.

    Raises:
        TypeError: not prompts only.
        ValueError: an empty list.
    """
    if isinstance(prompts, Prompt):
        raise TypeError("prompts must be a list of prompts, got one prompt; write [prompt].")
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        require_prompt(prompts, "prompts", "a hfblend.Prompt or a list of them")
    listed = [require_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    if not listed:
        raise ValueError(f"{asked_by} needs one or more prompts, got none.")
    return listed
