"""One running `generate` of a patched model: its prompts are blended, one by one, when its prefill is reached.

    row 0   · · · p r o m p t      Blending  ─┐
    row 1   a n o t h e r · p      Blending  ─┼─ one cache, one row of hidden states each ─ stock `generate` goes on
    row 2   · · · p r o m p t      as row 0  ─┘

Shapes: B rows of the batch, k copies of each that beams and returned sequences need, T columns, C hidden size.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..config import BlendConfig
from ..controller import Controller
from ..locks import Running
from ..model.compiled import give_back
from ..model.hf_model import CACHE, CACHE_NAMES, cache_given
from ..prompts.prompt import ChunkSpans
from ..store import Store
from ..support.registry import TestedModel
from ..trace.facts import Level
from ..trace.trace import BlendTrace
from .asked import OUTPUTS, Asked
from .blending import Blending
from .fallbacks import Fallback
from .hand_over import SideBySide, growing_layers, hand_over
from .request import Plan, found_chunks, generate_option

logger = logging.getLogger("hfblend.patching")

# Calls that cannot be blended before the decoder is reached: drafts may precede it, or options change its forward.
_WAIT_FOR = {"assistant_model", "custom_generate", "inputs_embeds"}
_CONTINUES = (Fallback.FILLED_CACHE, Fallback.NO_CHUNKS, Fallback.TOO_FEW_TOKENS)  # after a look at model and mask
_WAIT_IF_SET = ("output_attentions", "output_hidden_states", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass(eq=False)
class Call(Running):
    """The state of one call.

    Args:
        hf_model: the model.
        plan: the prompts to blend, or why none is.
        by_stock: whether Transformers' own loops run it.
        config, store, controller: of every prompt.
        started: the time of the user's call, by `time.perf_counter`.
        level, tokenizer: of the traces.

    Attributes:
        is_waiting: whether the forward that prefills is still to come.
        is_prefilling: whether it runs; forwards inside it are none of the call's.
        asked: arguments of the whole model's forward while it runs.
        traces_of_prompts: one for each different prompt; of a call that is not blended, one.
    """

    hf_model: TestedModel
    plan: Plan
    by_stock: bool
    config: BlendConfig
    store: Store
    controller: Controller | None
    started: float
    level: Level
    tokenizer: Any

    def __post_init__(self) -> None:
        super().__init__()
        self.is_waiting, self.is_prefilling = self.plan.fallback is None, False
        self._tokens_seen = self.plan.num_given
        self.asked: dict[str, Any] | None = None
        self._ahead: tuple[Blending, Any] | None = None  # a blend begun before its forward was reached, and its output
        lengths = [self.plan.num_tokens] if self.plan.fallback else self.plan.lengths
        self.traces_of_prompts = [
            BlendTrace(num_tokens=n, num_layers=self.hf_model.num_layers, level=self.level, tokenizer=self.tokenizer)
            for n in lengths
        ]
        if self.plan.fallback:
            self._fall_back(self.plan.fallback, self.plan.found)

    @property
    def is_blended(self) -> bool:
        """Whether it was blended, or is still going to be."""
        return self.traces_of_prompts[0].fallback is None

    @property
    def traces(self) -> list[BlendTrace]:
        """One per row; rows of one prompt share theirs."""
        traces = self.traces_of_prompts
        return traces if self.plan.fallback else [traces[i] for i in self.plan.prompt_of_row]

    # --- the first token, and the end -----------------------------------------------------------------------------

    def note_forward(self, num_tokens: int) -> None:
        """Notes that a forward begins: the first one after the whole prompt means that the first new token is there."""
        if self._tokens_seen >= self.plan.num_tokens:
            self._note_first_token()
        self._tokens_seen += num_tokens

    def end(self, output: Any) -> None:
        """Notes the end of the call, with the result of `generate`."""
        if self.is_waiting:
            self._fall_back(Fallback.NOT_REACHED)
        # A single new token is followed by no forward that would have marked its arrival.
        sequences = output if torch.is_tensor(output) else getattr(output, "sequences", None)
        if sequences is not None and sequences.shape[1] == self.plan.num_tokens + 1:
            self._note_first_token()

    def _note_first_token(self) -> None:
        for trace in self.traces_of_prompts:
            if trace.ttft_ms is None:
                trace.ttft_ms = 1000 * (time.perf_counter() - self.started)

    def _fall_back(self, fallback: Fallback, found: str = "") -> None:
        self.is_waiting = False
        said = f"{fallback.reason} {found}".strip()
        for trace in self.traces_of_prompts:
            trace.blended, trace.fallback, trace.fallback_reason = False, fallback.name.lower(), said
        logger.log(fallback.level, "Not blended, stock generate runs: %s", said)

    # --- the prefill ----------------------------------------------------------------------------------------------

    def is_whole_batch(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a forward prefills the call's prompts (perhaps with draft tokens after them) into an empty cache, or
        after the given one.

        Args:
            ids: (B · k, T or more), without the tokens that are given.
            kwargs: the forward's other arguments.
        """
        num_given = self.plan.num_given
        if not self.is_waiting or torch.is_grad_enabled() or ids.shape[1] < self.plan.num_tokens - num_given:
            return False
        if kwargs.get("inputs_embeds") is not None:
            return False
        copies, rest = divmod(ids.shape[0], len(self.plan.prompt_of_row))
        cache = cache_given(kwargs)
        if rest or (0 if cache is None else int(cache.get_seq_length())) != num_given:
            return False
        if self.plan.given is not None and cache.layers[0].keys is not self.plan.given.layer(0)[0]:
            return False
        assert self.plan.input_ids is not None
        expected = self.plan.input_ids[:, num_given:].repeat_interleave(copies, 0)
        if not bool((ids[:, : expected.shape[1]] == expected).all()):
            return False
        ids = self._whole(ids)
        lengths = [self.plan.lengths[place] for place in self.plan.prompt_of_row]
        asked = Asked(self.hf_model, self.plan.num_tokens, num_given, lengths, ids, kwargs, self.asked, self.by_stock)
        if reason := asked.reason_against():
            self._fall_back(reason, "It changed inside this call." if reason is Fallback.MODEL_CHANGED else "")
            self.give_up_ahead()
        return self.is_waiting

    @torch.compiler.disable
    def blended_forward(self, kwargs: dict[str, Any]) -> Any:
        """Returns the decoder's output for all prompts, with the rows of the last pass only, and fills the cache."""
        ids, cache = self._whole(kwargs.pop("input_ids")), cache_given(kwargs)
        cache = DynamicCache(config=self.hf_model.config) if cache is None else cache
        # Masks and positions follow from the padding in the plan.
        for name in ("attention_mask", "position_ids", "use_cache", *CACHE_NAMES):
            kwargs.pop(name, None)
        self.is_waiting, self.is_prefilling = False, True
        if ids.shape[1] > self.plan.num_tokens or not all(value is None or value is False for value in kwargs.values()):
            self.give_up_ahead()
        try:
            if self.plan.is_one_prompt:
                output, state = self._one_prompt(ids, kwargs)
                hand_over(state.buffers, ids.shape[1], ids.shape[0], cache)
                output.last_hidden_state = output.last_hidden_state.expand(ids.shape[0], -1, -1)  # (B · k, S, C)
            else:
                output, state = self._side_by_side(ids, kwargs, cache)
        finally:
            self.is_prefilling = False
            give_back(self)
        state.observer.phase_done("hand_over")
        output[CACHE] = cache
        return output

    def _whole(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids (B · k, T or more) of a forward, and before them those that are given."""
        if not self.plan.num_given:
            return ids
        assert self.plan.input_ids is not None
        return torch.cat([self.plan.input_ids[:1, : self.plan.num_given].expand(len(ids), -1).to(ids.device), ids], 1)

    def _one_prompt(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Any, Blending]:
        if self._ahead is None:
            self.traces_of_prompts[0].restart()
            self._ahead = self._blend(0, ids[:1], kwargs)
        (state, output), self._ahead = self._ahead, None
        state.join(output)
        return output, state

    def _side_by_side(self, ids: torch.Tensor, kwargs: dict[str, Any], cache: Any) -> tuple[Any, Blending]:
        """Blends each different prompt once and copies its K/V to its rows; holds K/V of one prompt at a time twice."""
        copies = ids.shape[0] // len(self.plan.prompt_of_row)
        kv = SideBySide(ids.shape[0], ids.shape[1])
        hidden = [torch.empty(0)] * ids.shape[0]  # (1, 1, C) each
        for place, length in enumerate(self.plan.lengths):
            rows = [row for row in range(ids.shape[0]) if self.plan.prompt_of_row[row // copies] == place]
            padding = self.plan.num_tokens - length
            state, output = self._blend(place, ids[rows[0] : rows[0] + 1, padding:], kwargs)
            state.join(output)
            kv.put(rows, state.buffers, length)
            for row in rows:
                hidden[row] = output.last_hidden_state[:, -1:]
            state.buffers.clear()
        hand_over(kv.buffers, ids.shape[1], 1, cache)
        output.last_hidden_state = torch.cat(hidden)
        return output, state

    def _blend(self, place: int, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Blending, Any]:
        """Starts to blend a prompt; `ids` (1, n) may end in draft tokens, `kwargs` go to the forward."""
        prompt, length, reason = self.plan.prompts[place], self.plan.lengths[place], self.plan.prefilled.get(place)
        trace = self.traces_of_prompts[place]
        spans = ChunkSpans(()) if reason else prompt.chunk_spans
        known_ids = prompt.input_ids if ids.shape[1] == length else None
        state = Blending(
            self.hf_model, ids, spans, self.store, self.config, trace,
            prompt_length=length, controller=self.controller, ids=known_ids, given=self.plan.given,
            weights_are_known=place > 0 or (self.by_stock and self.config.find is not None),
        )  # fmt: skip
        if reason:
            found = f" {found_chunks([prompt.chunk_spans], self.config, None)}" if prompt.chunk_spans else ""
            trace.notes.append(f"Prefilled in full, next to the other prompts of its batch: {reason.reason}{found}")
        return state, state.start(functools.partial(self.hf_model.decoder_forward, **kwargs))

    # --- decoding -------------------------------------------------------------------------------------------------

    def decoded(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """Returns the decoder's output for the next token, by a CUDA graph, its K/V in the cache.

        `None`, nothing done, where the decoder's own forward is to run.
        """
        if ids.shape != (1, 1) or self.is_waiting or not self._may_replay:
            return None
        cache = cache_given(kwargs)
        layers = growing_layers(cache)
        return self.hf_model.decoding.step(kwargs, cache, layers) if layers else None

    @cached_property
    def _may_replay(self) -> bool:
        """Whether tokens may be decoded by a graph: after one prompt that was blended here or in an earlier turn. It
        has no padding, so that no mask of Transformers' loop hides a token.
        """
        hf_model, plan = self.hf_model, self.plan
        if not (self.by_stock and self.config.cuda_graphs and plan.is_one_prompt and hf_model.takes_kernels):
            return False
        if self.is_blended:
            return True
        configs = hf_model.decoder.config, hf_model.model.config
        if plan.fallback not in _CONTINUES or any(getattr(one, name, None) for one in configs for name in OUTPUTS):
            return False
        hf_model.fingerprint.current(hf_model.model)  # weights may have changed since then
        return True

    # --- ahead of it ----------------------------------------------------------------------------------------------

    def blend_ahead(self, kwargs: dict[str, Any]) -> None:
        """Starts a GPU on the prompt before stock `generate` prepares itself, which takes Python some milliseconds.

        Batches, and calls with drafts or with options that reach the decoder, wait: their forward may differ.
        """
        waits = any(generate_option(self.hf_model.model, kwargs, name) for name in _WAIT_IF_SET)
        if not self.is_waiting or not self.plan.is_one_prompt or waits or _WAIT_FOR & kwargs.keys():
            return
        assert self.plan.input_ids is not None
        self._ahead = torch.no_grad()(self._blend)(0, self.plan.input_ids[:1], {})

    def give_up_ahead(self) -> None:
        """Drops a blend that was begun ahead and is not used; it ends before anything takes its memory."""
        if self._ahead is not None:
            state, output = self._ahead
            state.join(output)
            self._ahead = None
