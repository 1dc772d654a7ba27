"""CacheBlend in five phases, each one or a few stock forwards with a cache of ours.

    prefix | chunk 1 | chunk 2 | … | suffix          token ids and spans
      1 look up     each chunk's KV in the store; what is missing is prefilled alone and stored
      2 realign     cached keys move to their new positions, layer by layer, as each layer arrives
      3 select      the reused tokens that a rule scores highest, say those that the suffix attends to
      4 recompute   those tokens, the gaps and the suffix through all layers, over the reused KV of the rest
      5 hand over   the KV goes into the user's cache, the last row to the LM head; decoding is stock

Shapes: B batch (1 here: prompts of a batch are blended one by one), Hkv KV heads, T all tokens, N reused tokens that
could be recomputed, S rows of a pass, D head_dim, L layers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.by_position import AttentionRecord
from ..config import BlendConfig
from ..controller import BlendShape, Controller
from ..gpu.graphs import graphs_of
from ..gpu.streams import Beside
from ..kv.chunk import ChunkKV, ChunkLost, Provenance
from ..model.layers import Watched, watch
from ..model.passes import Forward, Pass, until_stopped
from ..prompts.prompt import ChunkSpans
from ..store import RemoteStore, Store
from ..support.registry import BlendableModel
from ..trace.recorder import Recorder
from ..trace.trace import BlendTrace, ChunkTrace, PhaseClock, settings_of
from . import selection
from .caches import KV, ROOM, BlendingCache, RecordingCache, full_length_cache
from .look_up import LookUp
from .reuse import Reuse, ReusedKV

logger = logging.getLogger(__name__)


class AttentionNotRecorded(Exception):
    """A rule asked for attention that this model's own attention code does not show."""

    def __init__(self, model_name: str) -> None:
        super().__init__(
            f"Attention of {model_name} cannot be recorded (hfblend's does not take its place, see docs/models.md); "
            'tokens are selected by "kv_deviation" instead.'
        )


@dataclass
class Ranking:
    """A round of phase 3: what the rule looked at, and the scores (N,) that it gave."""

    evidence: selection.Evidence
    scores: torch.Tensor


@dataclass
class Blending:
    """The state of one blended prompt; `run` goes through the phases in order.

    Args:
        host: the model, past its self-test.
        input_ids: (1, T).
        spans: of the chunks.
        store, config: as in `blend`.
        prompt_length: tokens of the prompt, if draft tokens follow it; default T.
        controller: settles `recompute_ratios="auto"`.
        ids: `input_ids` as numbers, where they are known: to read them, Python waits until a GPU has done all else.
        weights_are_known: whether the same call has already looked whether weights changed, which waits for a GPU, too.
    """

    host: BlendableModel
    input_ids: torch.Tensor
    spans: ChunkSpans
    store: Store
    config: BlendConfig
    trace: BlendTrace = field(default_factory=BlendTrace)
    prompt_length: int | None = None
    controller: Controller | None = None
    ids: list[int] = field(default_factory=list)
    weights_are_known: bool = False
    buffers: dict[int, KV] = field(default_factory=dict)  # layer -> (1, Hkv, T + room, D), filled by the passes

    def __post_init__(self) -> None:
        self.config.require_layers(self.host.num_kv_layers)
        self.host.require_own_dtype()
        if self.config.is_auto:
            self.host.ranks.require_one()
        if self.config.is_auto and self.controller is None:
            raise ValueError(
                'recompute_ratios="auto" needs a controller, got none. `hfblend.patch` makes one; for `hfblend.blend` '
                "pass controller=Controller(profile_of(model, store, config))."
            )
        if not self.weights_are_known:
            self.host.fingerprint.current(self.host.model)
        self.input_ids = self.input_ids.to(self.host.device)
        self.length = self.input_ids.shape[1]
        self.ids = self.ids or self.input_ids[0].tolist()
        self.spans.check(self.length)
        self._prompt_stop = self.prompt_length or self.length
        self._fresh_up_to = -1  # the last layer whose K/V are fresh for every token
        self._entered: Watched | None = None  # what entered the last check layer
        self._lost: frozenset[str] = frozenset()  # keys of entries that could not be read to their end
        self._prefilled: frozenset[str] = frozenset()  # and of chunks that were prefilled before that was known
        self._beside = Beside(self.host.device)
        self._asked = self.config  # before "auto" is settled
        self.clock = PhaseClock(self.host.device)
        trace = self.trace
        trace.blended, trace.clock = True, self.clock
        trace.num_tokens, trace.num_layers = self.length, self.host.num_layers
        if trace.level != "summary":
            trace.input_ids = torch.tensor(self.ids)
        self._recorder = Recorder(trace, self.clock) if trace.level == "full" else None
        if self.spans.note:
            trace.notes.append(self.spans.note)

    def run(self, forward: Forward) -> Any:
        """Phases 1 to 4. Returns the output of the last pass, whose last row belongs to the last token.

        Args:
            forward: the decoder's or the whole model's forward.
        """
        output = self.start(forward)
        self.join(output)
        return output

    def start(self, forward: Forward) -> Any:
        """`run` beside the current stream of a GPU: before anything there uses what it made, `join` must be called."""
        return self._beside.run(self._phases, forward)

    def join(self, output: Any) -> None:
        """The current stream waits for what `start` began; `output` is what it returned."""
        trace = self.trace
        made = [trace.scores, trace.candidate_idx, trace.fresh_idx, trace.selected_idx]
        made += trace.maps.items().values() if trace.maps else ()
        made += [] if output is None else output.values()
        buffers = (states for kv in self.buffers.values() for states in kv)
        self._beside.join([t for t in (*made, *buffers) if torch.is_tensor(t)])

    def _phases(self, forward: Forward) -> Any:
        """An entry that cannot be read to its end is given up, and all begins again without it: once an entry."""
        while True:
            try:
                return self._attempt(forward)
            except ChunkLost as error:
                self._begin_again(error)

    def _begin_again(self, lost: ChunkLost) -> None:
        logger.warning("%s; the prompt is blended again without it.", lost)
        self._lost |= {lost.key}
        self.buffers.clear()
        self._fresh_up_to, self._entered = -1, None
        trace = self.trace
        self._prefilled |= {chunk.key for chunk in trace.chunks if chunk.status == "miss"}
        trace.notes.append(f"{lost}; blended again without it.")
        trace.prefix, trace.chunks, trace.scores = None, [], None

    def _attempt(self, forward: Forward) -> Any:
        self._keep_the_gpu_busy(forward)
        reuse = self.decide(self.look_up())
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
        self._look_up = LookUp(
            self.host, self.ids, self.spans, self.store, self.config, self.trace, self.clock, self._prompt_stop,
            self._lost,
        )  # fmt: skip
        reuse = self._look_up.run()
        for chunk in self.trace.chunks:
            if chunk.key in self._prefilled:
                chunk.status = "miss"
        return reuse

    def decide(self, reuse: Reuse) -> Reuse:
        """Settles the ratio, if it is "auto"; where a full prefill is quicker, only what is exact is reused."""
        if self.controller is None or not self._asked.is_auto:
            return reuse
        num_exact = sum(stop - start for start, stop in (piece.span for piece in reuse.exact))
        shape = BlendShape(self.length, num_exact, reuse.fresh_idx.numel())
        decision = self.trace.decision = self.controller.decide(shape, reuse.loads(self.host.device))
        if decision.ratio is not None:
            self.config = self._asked.settled(decision)
            return reuse
        self.config = self._asked.settled()  # nothing is left to be selected
        self.trace.notes.append(f"Computed in full: {decision.reason}.")
        logger.info("A prompt is computed in full: %s.", decision.reason)
        for chunk in self.trace.chunks:
            if chunk.status == "hit" and not chunk.exact:
                chunk.status, chunk.cached_start = "unused", None
        return self._look_up.partition(reuse.exact)

    # --- 2 realign ------------------------------------------------------------------------------------------------

    def realign(self, reuse: Reuse) -> ReusedKV:
        """Prepares the rotations; keys move when a layer is asked for."""
        self.trace.settings = settings_of(self.config)
        if self._recorder is not None:
            reused = self._recorder.reused(self.host, reuse, self.length)
        else:
            reused = ReusedKV(self.host, reuse, self.length)
        if not self.config.layerwise:
            reused.preload()
        return reused

    # --- 3 select -------------------------------------------------------------------------------------------------

    def select(self, forward: Forward, reuse: Reuse, reused: ReusedKV) -> torch.Tensor:
        """The reused tokens to recompute, (S,) rising: those that the rule gives the highest scores.

        Passes run when the rule asks for what they find. Several check layers are rounds, each among the tokens that
        the one before kept: the paper's gradual filtering.
        """
        rankings = self.rankings(forward, reuse, reused)
        while True:
            try:
                next(rankings)
            except StopIteration as end:
                return end.value

    def rankings(self, forward: Forward, reuse: Reuse, reused: ReusedKV) -> Generator[Ranking, None, torch.Tensor]:
        """Each round of `select`, whose scores may be replaced before it goes on; returns the selected tokens."""
        kept = reuse.candidate_idx
        if self.config.recomputes_all:
            return kept
        for layer, ratio in zip(self.config.check_layers, self.config.fixed_ratios):
            if kept.numel() == 0:
                break
            evidence = self._evidence(forward, reuse, reused, kept, layer)
            ranking = Ranking(evidence, self._scores(evidence))
            yield ranking
            scores = ranking.scores
            self.trace.scores = scores if self.trace.scores is None else self.trace.scores
            starts = selection.chunk_starts(kept, [p.span for p in reuse.moved], self.config.force_chunk_start)
            kept = kept[selection.highest(scores, self.budget(ratio, reuse), starts).to(kept.device)]
        return kept if self.config.check_layers else kept[:0]

    def budget(self, ratio: float, reuse: Reuse) -> int:
        """How many of the prompt's reused tokens a ratio recomputes."""
        return selection.budget(ratio, reuse.candidate_idx.numel())

    def _evidence(
        self, forward: Forward, reuse: Reuse, reused: ReusedKV, kept: torch.Tensor, check_layer: int
    ) -> selection.Evidence:
        """What a rule may ask for, about the tokens still in the running: all heads, wherever they are computed."""
        ranks = self.host.ranks

        def all_heads(kv: KV) -> KV:
            return ranks.gathered(kv[0], 1), ranks.gathered(kv[1], 1)

        def kv(layer: int) -> tuple[KV, KV]:
            self._compute_up_to(layer, forward, reuse, reused, kept)
            fresh = _rows_of(self.buffers[layer], kept)
            places = torch.searchsorted(reuse.candidate_idx, kept)
            return all_heads(fresh), all_heads(_rows_of(reused.moved_kv(layer, fresh), places))

        def suffix_attention(layers: Sequence[int]) -> torch.Tensor:
            received = self._suffix_attention(layers, forward, reuse, reused)
            return ranks.gathered(torch.stack([received[layer].to(kept.device)[:, kept] for layer in layers]), 1)

        spans = [piece.span for piece in reuse.moved]
        return selection.Evidence(kept, spans, check_layer, self.host.num_layers, self.config, kv, suffix_attention)

    def _scores(self, evidence: selection.Evidence) -> torch.Tensor:
        """(N,) from the rule of the config; a model whose attention cannot be recorded is ranked by deviation."""
        rule = self.config.selection
        rule = rule if callable(rule) else selection.RULES[rule]
        try:
            scores = rule(evidence)
        except AttentionNotRecorded as error:
            self.trace.notes.append(str(error))
            logger.warning("%s", error)
            scores = selection.by_kv_deviation(evidence)
        if scores.shape != evidence.candidate_idx.shape:
            raise ValueError(
                f"A selection rule must return one score per candidate, {tuple(evidence.candidate_idx.shape)}, got "
                f"{tuple(scores.shape)}."
            )
        scores = scores if scores.is_floating_point() else scores.float()  # whole numbers and flags are scores, too
        return self.host.ranks.as_first(scores.to(evidence.candidate_idx.device))

    def _compute_up_to(self, layer: int, forward: Forward, reuse: Reuse, reused: ReusedKV, kept: torch.Tensor) -> None:
        """Fresh K/V at `layer` for the tokens still in the running.

        The first time, a pass over all tokens stops there: K/V up to there are fresh for every token, and stay. From
        there on, a pass over the tokens in the running and the fresh ones goes further.
        """
        if layer <= self._fresh_up_to:
            reused.prefetch(layer)
            return
        if self._fresh_up_to >= 0:
            rows = torch.cat([kept, reuse.fresh_idx]).sort().values
            self._pass(forward, reused, rows, stop_at=layer)
            self._fresh_up_to = layer
        else:
            self._compute_all_up_to(layer, forward)
        reused.prefetch(layer)

    def _compute_all_up_to(self, layer: int | None, forward: Forward) -> Any:
        """The pass over all tokens, to its end where there is no `layer` to stop at; its output."""
        rows = torch.arange(self.length, device=self.host.device)
        cache = RecordingCache(self.host.num_layers, layer, room=ROOM)

        def run() -> Any:
            self.host.small_steps_in_one_kernel()
            if layer is not None and self.host.may_skip_layers:
                self._entered = watch(self.host.lock, self.host.layers, layer, rows)
            with self._recorder.layers_of("all tokens", cache) if self._recorder else contextlib.nullcontext():
                return until_stopped(forward, self.input_ids, rows, None, cache)

        output = self.host.lock.exclusive(run)
        self.buffers.update(cache.recorded)
        self._fresh_up_to = self.host.num_layers if layer is None else layer
        self.trace.computed_pairs += self.length * self._fresh_up_to
        return output

    def _keep_the_gpu_busy(self, forward: Forward) -> None:
        """Starts the pass over all tokens, which needs no chunk, where it will be asked for: Python then looks up."""
        surely = self.config.selection == "kv_deviation" and self.config.check_layers and self.spans
        if self.host.device.type == "cuda" and surely and not self.config.recomputes_all:
            self._compute_all_up_to(self.config.check_layers[0], forward)
            self.clock.end_of("select")

    def _suffix_attention(
        self, layers: Sequence[int], forward: Forward, reuse: Reuse, reused: ReusedKV
    ) -> dict[int, torch.Tensor]:
        """Layer -> (H, T) attention received from the suffix in one pass of it over the reused KV.

        Other fresh tokens (gaps, chunks that are computed in this prompt) have no KV yet: nobody sees them.
        """
        if not layers or not 0 <= min(layers) <= max(layers) < self.host.num_layers:
            raise ValueError(f"Layers must be one or more of 0 … {self.host.num_layers - 1}, got {tuple(layers)}.")
        if not self.host.attends_by_position:
            raise AttentionNotRecorded(type(self.host.model).__name__)
        record = AttentionRecord(layers)
        hidden = reuse.unread_idx if reuse.unread_idx.numel() else None
        self._entered = None  # rows of this pass do not see the hidden ones: every layer computes them again
        self._pass(forward, reused, reuse.suffix_idx, stop_at=max(layers), hidden=hidden, record=record)
        if len(record.received) < len(record.layers):  # a layer without attention, or with one of its own
            raise AttentionNotRecorded(type(self.host.model).__name__)
        if self._recorder is not None:
            self._recorder.keep_attention(record.received)
        return record.received

    # --- 4 recompute ----------------------------------------------------------------------------------------------

    def recompute(self, forward: Forward, reuse: Reuse, reused: ReusedKV, selected_idx: torch.Tensor) -> Any:
        """One forward over the selected tokens, the gaps and the suffix; every other row of a layer is reused.

        At ratio 1 every token of the prompt is a row, the prefix too: nothing reused is left. Layers that a pass over
        all tokens went through are not computed again: the rows go on from what entered the check layer.
        """
        if self.config.recomputes_all:
            rows = torch.arange(self.length, device=self.host.device)
        else:
            rows = torch.cat([selected_idx, reuse.fresh_idx]).sort().values
        self.trace.selected_idx = selected_idx
        if self.is_nearly_all(reuse):
            output = self._compute_all_up_to(None, forward)
        else:
            output = self._pass(forward, reused, rows)
        if self._recorder is not None:
            self._recorder.finish(self.buffers, selected_idx, self._fresh_up_to)
        return output

    def is_nearly_all(self, reuse: Reuse) -> bool:
        """Whether what is exact is so little that a forward over all tokens, which needs no positions, is quicker."""
        is_exact = type(self).seen_from is Blending.seen_from
        return is_exact and self._fresh_up_to < 0 and not reuse.moved and reuse.fresh_idx.numel() > 0.9 * self.length

    def _pass(
        self,
        forward: Forward,
        reused: ReusedKV,
        rows: torch.Tensor,
        stop_at: int | None = None,
        hidden: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
    ) -> Any:
        """A forward over `rows` (S,) that blends its K/V into the buffers.

        Args:
            stop_at: end at this layer: after its K/V, or, with a record, after its attention weights.
            hidden: tokens that the rows do not see.
            record: keeps the attention that the rows give.
        """
        host, entered = self.host, self._entered
        if entered is not None and entered.hidden is None:
            entered = None
        one = Pass(
            self.input_ids[:, rows], rows, self.seen_from(rows), self.length, stop_at, hidden, record,
            resume_at=entered.layer if entered else None, resume_with=entered.of_rows(rows) if entered else None,
            num_read=self.length - self._prompt_stop + 1,
        )  # fmt: skip
        self.trace.computed_pairs += one.pairs(host)

        def cleared(buffers: KV) -> KV:
            """Rows that are not computed yet are never left uninitialised: even unseen, 0 · NaN is NaN."""
            if hidden is not None:
                for states in buffers:
                    states.index_fill_(2, hidden.to(states.device), 0)
            return buffers

        def load_all(layers: Sequence[int]) -> None:
            loaded = reused.layers([layer for layer in layers if layer not in self.buffers])
            self.buffers.update((layer, cleared(kv)) for layer, kv in loaded.items())

        if self._may_be_graph(one, reused):
            if reused.is_near:
                load_all(list(host.layouts))  # by one kernel
            ran, output = graphs_of(host).run(forward, one, {**reused.unfilled, **self.buffers}, load_all)
            if ran:
                return output

        def load(layer_idx: int, fresh: KV) -> KV:
            return cleared(reused.layer(layer_idx, fresh))

        cache = BlendingCache(host.num_layers, self.buffers, load, rows, self.length, None if record else stop_at)
        kind = "suffix" if record else "recompute" if stop_at is None else "filter"
        with self._recorder.layers_of(kind, cache) if self._recorder else contextlib.nullcontext():
            output, seen = one.run(host, forward, cache, watch=record is None)
        self._entered = self._entered if seen is None else seen
        return output

    def _may_be_graph(self, one: Pass, reused: ReusedKV) -> bool:
        """Whether this pass needs nothing that a CUDA graph cannot give."""
        return self.config.cuda_graphs and reused.by_kernel and (one.stop_at is None or one.record is not None)

    def seen_from(self, rows: torch.Tensor) -> torch.Tensor:
        """(S,) the last key position that each row of a pass sees: its own."""
        return rows

    # --- 5 hand over ----------------------------------------------------------------------------------------------

    def keep_fresh_chunks(self) -> None:
        """Stores what was computed inside this prompt, as long as nothing before it was reused from elsewhere."""
        prefix = self.trace.prefix
        for chunk in [prefix, *self.trace.chunks] if prefix else self.trace.chunks:
            if chunk.status in ("hit", "miss") and not chunk.exact:
                return
            if chunk.status == "fresh":
                self.keep(chunk)

    def keep(self, chunk: ChunkTrace) -> None:
        """Stores a chunk, or the prefix, that this prompt computed."""
        start, stop = chunk.span
        rows = slice(start, stop)
        kv = full_length_cache(
            (keys[:, :, rows].clone(), values[:, :, rows].clone()) for _, (keys, values) in sorted(self.buffers.items())
        )
        provenance: Provenance = "isolated" if chunk is self.trace.prefix else "in_context"
        behind_ids, positions = tuple(self.ids[:start]), torch.arange(start, stop)
        origin = self.host.origin_of(self.ids[rows], behind_ids)
        regime = self.host.regime(self.length)
        self.store.put(chunk.key, ChunkKV(kv, positions, behind_ids, provenance, regime, origin=origin))

    def _note_what_was_not_kept(self) -> None:
        """Says when the store is too small for this prompt: its chunks push each other out and miss every time.

        A remote says itself what it could not keep.
        """
        if isinstance(self.store, RemoteStore):
            return
        prefilled = [chunk for chunk in self.trace.chunks if chunk.status == "miss"]
        lost = sum(self.store.open(chunk.key) is None for chunk in prefilled)
        if lost:
            note = (
                f"{lost} of {len(prefilled)} chunks prefilled for this prompt are not in the store any more: it is too "
                f"small for them ({self.trace.bytes_reused} bytes; give it more), or could not keep them, as its log "
                "says. They will be prefilled again."
            )
            self.trace.notes.append(note)
            logger.warning(note)


def _rows_of(kv: KV, rows: torch.Tensor) -> KV:
    keys, values = (states.index_select(2, rows.to(states.device)) for states in kv)
    return keys, values
