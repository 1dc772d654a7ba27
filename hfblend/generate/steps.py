"""Blending, stopped after every phase: its result may be read, and replaced, before the next phase.

    for step in hfblend.steps(model, prompt, store=store):
        print(step)                                    # the phase, in one sentence
        if step.name == "selected":
            step.selected_idx = torch.tensor([41, 42, 97])    # other tokens, chosen by hand
    step.result.logits                                 # of the last step: those of `blend` if nothing was replaced

    looked_up → realigned → scored → selected → recomputed → generated

The phases are those of `Blending`; this file only stops between them. It is for teaching and debugging: all reused KV
is held twice. Replacements go into this one result, never into the store.

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, S selected tokens, D head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..arguments import require_tokenizer, whole
from ..blend.corrector import Corrector, corrector_of
from ..blend.reuse import Piece, Reuse, ReusedKV
from ..blend.selection import Evidence
from ..config import BlendConfig, as_config
from ..kv.chunk import ChunkKV, ChunkLost, Reader
from ..kv.rows import KV, ROOM, empty_kv, first_rows, full_length_cache
from ..model.hf_model import CACHE
from ..prompts.prompt import Prompt
from ..prompts.separator import Span
from ..store import Store, store_at
from ..support.registry import TestedModel, correction_of, model_of
from ..trace.observer import Observer
from ..trace.trace import BlendTrace
from .blending import Blending, BlendResult, require_prompt
from .hand_over import hand_over
from .stops import Generated, LookedUp, Realigned, Recomputed, Scored, Selected, Step, form_of


def steps(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 32,
) -> Iterator[Step]:
    """Blends one prompt and stops after every phase: each stop is a `Step` of `hfblend.generate.stops`.

    Tensors of a step may be changed in place or replaced; the next phase uses them. With nothing replaced, the last
    step's `result` is that of `hfblend.blend`.

    >>> *_, generated = hfblend.steps(model, prompt, store=store, tokenizer=tokenizer)  # doctest: +SKIP
    >>> generated.text  # doctest: +SKIP

    Args:
        model, prompt, store, config: as in `hfblend.blend`.
        tokenizer: to show the answer, and the trace, as text.
        max_new_tokens: of the answer; an end token may end it sooner.

    Raises:
        ValueError, TypeError: as `hfblend.blend`; and at the next step, for a replacement that does not fit.
    """
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    tested, config, prompt, store = model_of(model), as_config(config), require_prompt(prompt), store_at(store)
    if tokenizer is not None:
        require_tokenizer(tokenizer)
    trace = BlendTrace(level="summary" if tokenizer is None else "tokens", tokenizer=tokenizer)
    state = Stepping(tested, prompt.input_ids, prompt.chunk_spans, store, config, trace)
    return state.steps(tokenizer, max_new_tokens)


class Stepping(Blending):
    """A prompt that stops for the user at the stops of the algorithm."""

    @torch.no_grad()
    def steps(self, tokenizer: Any, max_new_tokens: int) -> Generator[Step, None, None]:
        """Runs phases 1 to 5 with a stop after each."""
        (stops, pieces), ranked = self._looked_up(), False
        looked_up = LookedUp(self.trace, sorted(pieces, key=_span_of))
        yield from self._stop(looked_up, "look_up")
        self.blend.reuse = self._use_pieces(looked_up.pieces)
        self.blend.model = _Holding(self.model)
        for name in stops:
            if name == "realigned":
                yield from self._realigned()
            if name == "scored" or (name == "selected" and not ranked):
                ranked = True
                yield from self._scored()
            if name == "selected":
                yield from self._selected()
        kv = {layer: first_rows(buffers, self.length) for layer, buffers in sorted(self.buffers.items())}
        logits = self.blend.output.logits[:, -1]
        recomputed = Recomputed(self.trace, dict(kv), logits)
        yield from self._stop(recomputed, "recompute")
        _use_kv(recomputed.kv, kv, recomputed.name)
        yield self._generated(_like("logits", recomputed.logits, logits), tokenizer, max_new_tokens)

    def _stop(self, step: Step, phase: str) -> Generator[Step, None, None]:
        """Stops: this time counts for no phase."""
        self.observer.phase_done(phase)
        yield step
        self.observer.phase_done("stopped")

    # --- 1 look up ------------------------------------------------------------------------------------------------

    def _looked_up(self) -> tuple[Iterator[str], list[Piece]]:
        """Looks up. Returns the further stops, and the pieces with copied entries, so that the store's never change."""
        while True:
            stops = self.prepared(self.model.last_logits).phases()
            try:
                next(stops)
                return stops, [replace(one, entry=_copy(one.entry)) for one in self.blend.reuse.pieces]
            except ChunkLost as error:
                self.begin_again(error)

    def _use_pieces(self, pieces: Sequence[Piece]) -> Reuse:
        pieces = sorted(pieces, key=_span_of)
        known = {chunk.span: chunk for chunk in self.blend.look_up.all_traces}
        spans = [piece.span for piece in pieces]
        if len(set(spans)) < len(spans) or not set(spans) <= set(known):
            raise ValueError(
                f"pieces must have spans of the prefix and of chunks, {list(known)}, each once, got {spans}."
            )
        for piece in pieces:
            (start, stop), tokens, layers = piece.span, len(piece.entry.cached_positions), piece.entry.num_layers
            if tokens != stop - start or layers != self.model.num_kv_layers:
                raise ValueError(
                    f"The piece at {piece.span} needs KV of {stop - start} tokens and {self.model.num_kv_layers} "
                    f"layers, got {tokens} tokens and {layers} layers."
                )
            known[piece.span].exact = piece.exact
        for span in set(known) - set(spans):
            if known[span].cached_start is not None:
                known[span].status, known[span].cached_start, known[span].exact = "unused", None, False
        return self.blend.look_up.partition(pieces)

    # --- 2 realign, 3 select --------------------------------------------------------------------------------------

    def _realigned(self) -> Generator[Step, None, None]:
        assert isinstance(self.blend.reused, HeldKV)
        shown = self.blend.reused.shown()
        step = Realigned(self.trace, dict(shown), *_moves(self.blend.reuse))
        yield from self._stop(step, "look_up")
        _use_kv(step.kv, shown, step.name)

    def _scored(self) -> Generator[Step, None, None]:
        blend, evidence = self.blend, self.blend.evidence
        if evidence is None:
            step = Scored(self.trace, blend.reuse.candidate_idx, None, None)
        else:
            step = Scored(self.trace, evidence.candidate_idx, blend.scores, _without_gradients(evidence))
        yield from self._stop(step, "select")
        if evidence is not None:
            blend.scores = _like("scores", step.scores, blend.scores)
        elif step.scores is not None:
            raise ValueError("No rule runs for this prompt, so scores are not used; replace selected_idx instead.")

    def _selected(self) -> Generator[Step, None, None]:
        blend = self.blend
        step = Selected(self.trace, blend.reuse.candidate_idx, blend.selected_idx, blend.reuse.fresh_idx)
        yield from self._stop(step, "select")
        blend.selected_idx = chosen = _as_candidates(step.selected_idx, blend.reuse.candidate_idx)
        if blend.config.recomputes_all and not torch.equal(chosen, blend.reuse.candidate_idx):
            blend.config = replace(blend.config, check_layers=(), recompute_ratios=())  # not a full prefill any more
        if blend.entered is not None and not torch.isin(chosen, blend.entered.rows).all():
            blend.entered = None  # gradual filtering left some out earlier: every layer computes all rows

    # --- 5 hand over ----------------------------------------------------------------------------------------------

    def _generated(self, logits: torch.Tensor, tokenizer: Any, max_new_tokens: int) -> Generated:
        answer_ids = self._answer(int(logits.argmax()), max_new_tokens)
        cache = DynamicCache(config=self.model.config)
        hand_over(self.buffers, self.length - 1, 1, cache)
        text = None if tokenizer is None else tokenizer.decode(answer_ids, skip_special_tokens=True)
        return Generated(self.trace, BlendResult(logits, cache, self.trace), answer_ids, text)

    def _answer(self, first_id: int, max_new_tokens: int) -> list[int]:
        """Answers greedily, by the class's `generate`, which does not blend even if the model is patched."""
        model: Any = self.model.model
        end = model.generation_config.eos_token_id
        if max_new_tokens == 1 or first_id in (end if isinstance(end, list) else [end]):
            return [first_id]
        cache = DynamicCache(config=self.model.config)
        hand_over(self.buffers, self.length, 1, cache)
        input_ids = torch.cat([self.input_ids, self.input_ids.new_tensor([[first_id]])], 1)
        kind: Any = type(model)
        output = kind.generate(
            model,
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens - 1,
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k")),  # settings of sampling warn without it
            num_beams=1,
            **{CACHE: cache},
        )
        return output[0, self.length :].tolist()


class _Holding:
    """The model, except that the reused KV it gathers is held and can be changed."""

    def __init__(self, model: TestedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def gather(self, reuse: Reuse, length: int, config: BlendConfig, observer: Observer) -> HeldKV:
        corrector = corrector_of(correction_of(config), self._model, reuse, length, observer)
        return HeldKV(self._model, reuse, length, observer, corrector)


class HeldKV(ReusedKV):
    """Every layer's reused KV, realigned once and held for changes; each pass takes a copy."""

    def __init__(
        self, model: TestedModel, reuse: Reuse, length: int, observer: Observer, corrector: Corrector | None
    ) -> None:
        super().__init__(model, reuse, length, observer, corrector)
        self._held: dict[int, KV] = {}
        for layer in range(model.num_kv_layers if reuse.exact or reuse.moved else 0):
            self._held[layer] = super().layer(layer)
            for states in self._held[layer]:
                states.index_fill_(2, reuse.fresh_idx.to(states.device), 0)

    def shown(self) -> dict[int, KV]:
        """Returns layer -> keys and values (1, Hkv, T, D), as views."""
        return {layer: first_rows(kv, self.length) for layer, kv in self._held.items()}

    def layer(self, layer_idx: int, fresh: KV | None = None) -> KV:
        if layer_idx not in self._held:
            return super().layer(layer_idx, fresh)
        held = first_rows(self._held[layer_idx], self.length)
        buffers = empty_kv(held, self.length + ROOM)
        for buffer, states in zip(buffers, held):
            buffer[:, :, : self.length] = states
        return buffers


def _span_of(piece: Piece) -> Span:
    return piece.span


# --- checks of replacements --------------------------------------------------------------------------------------


def _use_kv(replaced: Mapping[int, KV], held: Mapping[int, KV], name: str) -> None:
    """Writes replaced K/V to the place of the next phase; those changed in place are there already."""
    if set(replaced) != set(held):
        raise ValueError(f"{name}: kv must have the layers {sorted(held)}, got {sorted(replaced)}.")
    for layer, kv in held.items():
        for what, states, place in zip(("keys", "values"), replaced[layer], kv):
            if states is not place:
                place.copy_(_like(f"{name}: {what} of layer {layer}", states, place))


def _like(name: str, tensor: Any, expected: torch.Tensor) -> torch.Tensor:
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor of shape {tuple(expected.shape)}, got {tensor!r}.")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} must have shape {tuple(expected.shape)}, got {tuple(tensor.shape)}.")
    return tensor.to(expected.device)


def _as_candidates(chosen: Any, candidate_idx: torch.Tensor) -> torch.Tensor:
    """Returns chosen token indices, rising; `ValueError` for any that are no candidates."""
    if not torch.is_tensor(chosen) or chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise TypeError(f"selected_idx must be a tensor (S,) of whole token indices, got {form_of(chosen)}.")
    chosen = chosen.to(candidate_idx)
    others = chosen[~torch.isin(chosen, candidate_idx)].tolist()
    if others:
        raise ValueError(
            f"selected_idx must hold candidates, and the tokens {others} are none: they are exact, always "
            "computed, or not in the prompt. `step.candidate_idx` has those that may be selected."
        )
    return chosen.unique()


def _without_gradients(evidence: Evidence) -> Evidence:
    """Returns the evidence for a caller outside of `no_grad`."""
    no_grad = torch.no_grad()
    return replace(evidence, kv=no_grad(evidence.kv), suffix_attention=no_grad(evidence.suffix_attention))


def _copy(entry: Reader) -> ChunkKV:
    def layer(i: int) -> KV:
        keys, values = (states.clone() for states in entry.layer(i))
        return keys, values

    return ChunkKV(
        full_length_cache(map(layer, range(entry.num_layers))),
        entry.cached_positions.clone(),
        entry.behind_ids,
        entry.provenance,
        entry.regime,
        entry.quantised,
    )


def _moves(reuse: Reuse) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens of the pieces that moved, and their earlier positions."""
    now = [torch.arange(*piece.span) for piece in reuse.moved]
    before = [piece.entry.cached_positions for piece in reuse.moved]
    nothing = torch.empty(0, dtype=torch.long)
    return torch.cat([nothing, *now]), torch.cat([nothing, *before])
