"""CacheBlend in five phases, each one or a few stock forwards with a cache of ours.

    prefix | chunk 1 | chunk 2 | … | suffix          token ids and spans
      1 look up     each chunk's KV in the store; what is missing is prefilled alone and stored
      2 realign     cached keys move to their new positions, layer by layer, as each layer arrives
      3 select      the reused tokens whose KV deviates most at the check layer
      4 recompute   those tokens, the gaps and the suffix through all layers, over the reused KV of the rest
      5 hand over   the KV goes into the user's cache, the last row to the LM head; decoding is stock

Shapes: B batch (1 here: identical rows are blended once), Hkv KV heads, T all tokens, N reused tokens that could be
recomputed, S rows of a pass, D head_dim, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from . import selection
from .caches import KV, ROOM, BlendingCache, RecordingCache, StopForward, full_length_cache, hand_over
from .chunks import ChunkKV
from .config import BlendConfig
from .lookup import LookUp
from .models import BlendableModel, host_of
from .prompt import ChunkSpans, Prompt
from .reuse import Reuse, ReusedKV
from .store import MemoryStore, Store
from .trace import BlendTrace, PhaseClock

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]


@dataclass
class BlendResult:
    """What `blend` returns.

    Attributes:
        logits: (1, vocabulary) of the first new token.
        cache: KV of every prompt token but the last, so that `model.generate(ids, past_key_values=cache)` continues it.
        trace: what was done.
    """

    logits: torch.Tensor
    cache: DynamicCache
    trace: BlendTrace


def blend(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | None = None,
    config: BlendConfig | None = None,
) -> BlendResult:
    """Blends one prompt, outside `generate`. The model may be patched or not; it is not changed.

    >>> result = blend(model, prompt, store=store)  # doctest: +SKIP
    >>> model.generate(prompt.input_ids, past_key_values=result.cache)  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode.
        prompt: any prompt; one without chunks is prefilled in full.
        store: where chunk KV is looked up and kept; default, a new `MemoryStore`.
        config: default `BlendConfig()`. `min_reused_tokens` is not applied here.

    Raises:
        UnsupportedModel: the model's KV cannot be moved.
        ValueError: a check layer beyond the model, or a model in training mode.
    """
    host, config = host_of(model), BlendConfig() if config is None else config
    with torch.no_grad():
        input_ids = prompt.input_ids.to(host.device)
        state = Blending(host, input_ids, prompt.chunk_spans, MemoryStore() if store is None else store, config)
        output = state.run(host.last_logits)
        cache = DynamicCache(config=host.config)
        hand_over(state.buffers, len(prompt) - 1, 1, cache)
    return BlendResult(output.logits[:, -1], cache, state.trace)


@dataclass
class Blending:
    """The state of one blended prompt; `run` goes through the phases in order.

    Args:
        host: the model, past its self-test.
        input_ids: (1, T) on the host's device.
        spans: of the chunks.
        store, config: as in `blend`.
        prompt_length: tokens of the prompt, if draft tokens follow it; default T.
    """

    host: BlendableModel
    input_ids: torch.Tensor
    spans: ChunkSpans
    store: Store
    config: BlendConfig
    trace: BlendTrace = field(default_factory=BlendTrace)
    prompt_length: int | None = None
    buffers: dict[int, KV] = field(default_factory=dict)  # layer -> (1, Hkv, T + room, D), filled by the passes

    def __post_init__(self) -> None:
        self.config.require_layers(self.host.num_layers)
        self.length = self.input_ids.shape[1]
        self.ids: list[int] = self.input_ids[0].tolist()
        self.spans.check(self.length)
        self.clock = PhaseClock(self.host.device)
        trace = self.trace
        trace.blended, trace.clock = True, self.clock
        trace.num_tokens, trace.num_layers = self.length, self.host.num_layers
        if self.spans.differs_from_joined_text:
            trace.notes.append("The joined text would tokenise to other ids than its pieces do.")

    def run(self, forward: Forward) -> Any:
        """Phases 1 to 4. Returns the output of the last pass, whose last row belongs to the last token.

        Args:
            forward: the decoder's or the whole model's forward.
        """
        reuse = self.look_up()
        reused = self.realign(reuse)
        self.clock.end_of("look_up")
        selected_idx = self.select(forward, reuse, reused)
        self.clock.end_of("select")
        output = self.recompute(forward, reuse, reused, selected_idx)
        self.clock.end_of("recompute")
        self.keep_fresh_chunks()
        self._note_what_was_not_kept()
        return output

    # --- 1 look up ------------------------------------------------------------------------------------------------

    def look_up(self) -> Reuse:
        """Finds, or makes, the KV of the prefix and of every chunk."""
        length = self.prompt_length or self.length
        return LookUp(self.host, self.ids, self.spans, self.store, self.config, self.trace, self.clock, length).run()

    # --- 2 realign ------------------------------------------------------------------------------------------------

    def realign(self, reuse: Reuse) -> ReusedKV:
        """Prepares the rotations; keys move when a layer is asked for."""
        reused = ReusedKV(self.host, reuse, self.length)
        if not self.config.layerwise:
            reused.preload()
        return reused

    # --- 3 select -------------------------------------------------------------------------------------------------

    def select(self, forward: Forward, reuse: Reuse, reused: ReusedKV) -> torch.Tensor:
        """The reused tokens to recompute, (S,) rising.

        One pass over all tokens stops at the first check layer; K/V up to there are fresh for every token and stay.
        Each further check layer is one pass over the rows still in the running, stopped there, that ranks them again:
        the paper's gradual filtering.
        """
        kept = reuse.candidate_idx
        if kept.numel() == 0 or not self.config.check_layers:
            return kept[:0]
        everywhere = torch.arange(self.length, device=self.host.device)
        for layer, ratio in zip(self.config.check_layers, self.config.recompute_ratios):
            if self.buffers:
                self._pass(forward, reused, torch.cat([kept, reuse.fresh_idx]).sort().values, stop_at=layer)
            else:
                cache = RecordingCache(self.host.num_layers, layer, room=ROOM)
                with self.host.lock.shared():
                    _until_stopped(forward, self.input_ids, everywhere, None, cache)
                self.buffers.update(cache.recorded)
                self.trace.computed_pairs += self.length * layer
            kept = self._highest(kept, layer, ratio, reuse, reused)
        return kept

    def _highest(self, kept: torch.Tensor, layer: int, ratio: float, reuse: Reuse, reused: ReusedKV) -> torch.Tensor:
        """Of the tokens still in the running, those with the largest deviation at this layer."""
        candidates = reuse.candidate_idx
        fresh = _rows_of(self.buffers[layer], kept)
        stored = _rows_of(reused.moved_kv(layer, fresh), torch.searchsorted(candidates, kept))
        scores = selection.kv_deviation(fresh, stored, self.config.deviation)[0]
        if self.trace.deviation is None:
            self.trace.deviation = scores
        forced = selection.chunk_starts(kept, [p.span for p in reuse.moved], self.config.force_chunk_start)
        count = selection.budget(ratio, candidates.numel())
        return kept[selection.highest(scores, count, forced.to(scores.device)).to(kept.device)]

    # --- 4 recompute ----------------------------------------------------------------------------------------------

    def recompute(self, forward: Forward, reuse: Reuse, reused: ReusedKV, selected_idx: torch.Tensor) -> Any:
        """One forward over the selected tokens, the gaps and the suffix; every other row of a layer is reused.

        At ratio 1 every token of the prompt is a row, the prefix too: nothing reused is left.
        """
        if self.config.recomputes_all:
            rows = torch.arange(self.length, device=self.host.device)
        else:
            rows = torch.cat([selected_idx, reuse.fresh_idx]).sort().values
        self.trace.selected_idx = selected_idx
        return self._pass(forward, reused, rows)

    def _pass(self, forward: Forward, reused: ReusedKV, rows: torch.Tensor, stop_at: int | None = None) -> Any:
        """A forward over `rows` (S,) that blends its K/V into the buffers, to the end or up to layer `stop_at`."""
        num_layers = self.host.num_layers
        cache = BlendingCache(num_layers, self.buffers, reused.layer, rows, self.length, stop_at)
        self.trace.computed_pairs += len(rows) * (num_layers if stop_at is None else stop_at)
        with self.host.rows_pass(rows, self.length) as attention_mask:
            return _until_stopped(forward, self.input_ids[:, rows], rows, attention_mask, cache)

    # --- 5 hand over ----------------------------------------------------------------------------------------------

    def keep_fresh_chunks(self) -> None:
        """Stores chunks computed inside this prompt, as long as nothing before them was reused from elsewhere."""
        if self.trace.prefix and not self.trace.prefix.exact:
            return
        for chunk in self.trace.chunks:
            if chunk.status == "hit" and not chunk.exact:
                return
            if chunk.status != "fresh":
                continue
            start, stop = chunk.span
            rows = slice(start, stop)
            kv = full_length_cache(
                (keys[:, :, rows].clone(), values[:, :, rows].clone())
                for _, (keys, values) in sorted(self.buffers.items())
            )
            regime = self.host.regime(self.length)
            chunk_kv = ChunkKV(kv, torch.arange(start, stop), tuple(self.ids[:start]), "in_context", regime)
            self.store.put(chunk.key, chunk_kv)

    def _note_what_was_not_kept(self) -> None:
        """Says when the store is too small for this prompt: its chunks push each other out and miss every time."""
        prefilled = [chunk for chunk in self.trace.chunks if chunk.status == "miss"]
        lost = sum(self.store.open(chunk.key) is None for chunk in prefilled)
        if lost:
            note = (
                f"{lost} of {len(prefilled)} chunks prefilled for this prompt are not in the store any more: too small "
                f"for them ({self.trace.bytes_reused} bytes), and they will be prefilled again. Give it more bytes."
            )
            self.trace.notes.append(note)
            logger.warning(note)


def _until_stopped(
    forward: Forward, input_ids: torch.Tensor, positions: torch.Tensor, attention_mask: Any, cache: Any
) -> Any:
    """A forward over ids at `positions` (S,) that its cache may end early."""
    try:
        return forward(
            input_ids=input_ids,
            position_ids=positions[None],
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
        )
    except StopForward:
        return None


def _rows_of(kv: KV, rows: torch.Tensor) -> KV:
    keys, values = (states.index_select(2, rows.to(states.device)) for states in kv)
    return keys, values
