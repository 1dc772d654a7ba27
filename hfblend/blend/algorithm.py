"""CacheBlend: five phases over one prompt, each one or a few stock forwards with a cache of ours.

    prefix | chunk 1 | chunk 2 | … | suffix          token ids and spans
      1 look up     each chunk's KV in the store; what is missing is prefilled alone and stored
      2 realign     cached keys turn to their new positions, layer by layer, as each layer arrives
      3 select      the reused tokens that a rule scores highest, say those that the suffix attends to
      4 recompute   those tokens, the gaps and the suffix through all layers, over the reused KV of the rest
      5 hand over   the KV goes into the user's cache, the last row to the LM head; decoding is stock (`generate/`)

Source: CacheBlend (arXiv 2405.16444) section 4. Shapes: H heads, Hkv KV heads, T all tokens, N reused tokens that could
be recomputed, S rows of a pass, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.by_position import AttentionRecord
from ..config import BlendConfig
from ..kv.rows import KV, ROOM, rows_at
from ..trace.observer import Observer
from .caches import BlendingCache, RecordingCache
from .look_up import LookUp
from .model import AttentionNotRecorded, BlendableModel, Forward, Pass, Watched
from .reuse import Reuse, ReusedKV, merged
from .rules import chunk_starts, scores_of
from .selection import Evidence, budget, highest


@dataclass
class Blend:
    """One prompt on its way through the phases; `buffers` end as its blended KV.

    Args:
        forward: the decoder's or the whole model's own forward.
        ids: (1, T).
        config: settings, every ratio a number.
        num_read: rows at the end whose output is read: the prompt's last token, and drafts after it.
        settle: chooses settings by what was found, and what of it to reuse.

    What the phases found so far (`reuse` … `output`) may be replaced at a stop of `phases`, which reads it again.
    """

    model: BlendableModel
    forward: Forward
    ids: torch.Tensor
    look_up: LookUp
    config: BlendConfig
    observer: Observer = field(default_factory=Observer)
    num_read: int = 1
    settle: Callable[[Reuse], tuple[BlendConfig, Reuse]] | None = None
    buffers: dict[int, KV] = field(default_factory=dict)  # layer -> (1, Hkv, T + room, D)
    fresh_up_to: int = -1  # the last layer whose K/V are fresh for every token
    entered: Watched | None = None  # what entered the last check layer: later passes resume there
    reuse: Reuse = field(init=False)
    reused: ReusedKV = field(init=False)
    evidence: Evidence | None = field(init=False, default=None)
    scores: torch.Tensor = field(init=False)
    selected_idx: torch.Tensor = field(init=False)
    output: Any = field(init=False, default=None)

    @property
    def length(self) -> int:
        return self.ids.shape[1]  # T

    def run(self) -> Any:
        """Phases 1 to 4. Returns the output of the last pass, whose last row belongs to the last token."""
        list(self.phases())
        return self.output

    def phases(self) -> Iterator[str]:
        """Phases 1 to 4, with a stop after each, and one at every ranking."""
        self.reuse = self.find()
        if self.settle is not None:
            self.config, self.reuse = self.settle(self.reuse)
        yield "looked_up"
        self.observer.realigned(self.config)
        self.reused = self.model.gather(self.reuse, self.length, self.config, self.observer)
        self.observer.phase_done("look_up")
        yield "realigned"
        yield from self.select()
        self.observer.phase_done("select")
        yield "selected"
        self.observer.selected(self.selected_idx)
        self.output = self.recompute()
        self.observer.finish(self.buffers, self.fresh_up_to)
        self.observer.phase_done("recompute")
        self.keep()
        yield "recomputed"

    # --- 1 look up ------------------------------------------------------------------------------------------------

    def find(self) -> Reuse:
        """The KV of the prefix and of every chunk, and the tokens that are left to compute."""
        return self.look_up.run()

    def keep(self) -> None:
        """Stores what this prompt computed and others may reuse."""
        self.look_up.keep_fresh(self.buffers)

    # --- 3 select -------------------------------------------------------------------------------------------------

    def select(self) -> Iterator[str]:
        """Settles the (S,) tokens to recompute: each check layer ranks what the one before kept (gradual filtering)."""
        candidates = self.reuse.candidate_idx
        self.selected_idx = candidates if self.config.check_layers else candidates[:0]
        if self.config.recomputes_all:
            return
        for layer, ratio in zip(self.config.check_layers, self.config.fixed_ratios):
            if not len(self.selected_idx):
                return
            evidence = self.evidence = self.evidence_at(layer)
            try:
                self.scores = self.model.agreed(scores_of(evidence, self.observer.note))
                yield "scored"
            finally:
                self.evidence = None  # it refers to this object: a cycle would keep buffers for the garbage collector
            self.observer.scored(self.scores)
            starts = chunk_starts(self.selected_idx, evidence.spans, self.config.force_chunk_start)
            best = highest(self.scores, self.budget(ratio), starts)
            self.selected_idx = self.selected_idx[best.to(self.selected_idx.device)]

    def budget(self, ratio: float) -> int:
        """How many of the prompt's reused tokens a ratio recomputes."""
        return budget(ratio, len(self.reuse.candidate_idx))

    def evidence_at(self, check_layer: int) -> Evidence:
        """What a rule may ask for, about the tokens still in the running; passes run when it asks."""
        model, reuse, kept = self.model, self.reuse, self.selected_idx

        def all_heads(kv: KV) -> KV:
            return model.all_heads(kv[0], 1), model.all_heads(kv[1], 1)

        def kv(layer: int) -> tuple[KV, KV]:
            self.compute_up_to(layer, kept)
            fresh, places = rows_at(self.buffers[layer], kept), torch.searchsorted(reuse.candidate_idx, kept)
            return all_heads(fresh), all_heads(rows_at(self.reused.moved_kv(layer, fresh), places))

        def attention(layers: Sequence[int]) -> torch.Tensor:
            received = self.suffix_attention(layers)
            return model.all_heads(torch.stack([received[i].to(kept.device)[:, kept] for i in layers]), 1)

        return Evidence(kept, [p.span for p in reuse.moved], check_layer, model.num_layers, self.config, kv, attention)

    def compute_up_to(self, layer: int, kept: torch.Tensor) -> None:
        """Fresh K/V at `layer`: of all tokens the first time, of those still in the running from there on."""
        if self.fresh_up_to < 0:
            self.full_pass(layer)
        elif layer > self.fresh_up_to:
            self.rows_pass("filter", merged(kept, self.reuse.fresh_idx), stop_at=layer)
            self.fresh_up_to = layer
        self.reused.prefetch(layer)

    def suffix_attention(self, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Layer -> (H, T) attention received from the suffix in one pass of it over the reused KV. Other fresh tokens
        (gaps, chunks that are computed in this prompt) have no KV yet: no row sees them."""
        if not layers or not 0 <= min(layers) <= max(layers) < self.model.num_layers:
            raise ValueError(f"Layers must be one or more of 0 … {self.model.num_layers - 1}, got {tuple(layers)}.")
        if not self.model.attends_by_position:
            raise AttentionNotRecorded(self.model.name)
        record, hidden = AttentionRecord(layers), self.reuse.unread_idx
        self.entered = None  # rows of this pass do not see the hidden ones: every layer computes them again
        self.rows_pass("suffix", self.reuse.suffix_idx, max(layers), hidden if len(hidden) else None, record)
        if len(record.received) < len(record.layers):  # a layer without attention, or with one of its own kind
            raise AttentionNotRecorded(self.model.name)
        self.observer.attention(record.received)
        return record.received

    # --- 4 recompute ----------------------------------------------------------------------------------------------

    def recompute(self) -> Any:
        """One forward over the selected tokens, the gaps and the suffix; every other row of a layer is reused.

        At ratio 1 every token is a row, the prefix too unless its KV is given. Layers that a pass over all tokens went
        through are not computed again: the rows go on from what entered the check layer.
        """
        if self.is_nearly_all():
            return self.full_pass(None)
        rows = self.look_up.new_rows if self.config.recomputes_all else merged(self.selected_idx, self.reuse.fresh_idx)
        return self.rows_pass("recompute", rows)

    def is_nearly_all(self) -> bool:
        """Whether what is exact is so little that a forward over all tokens, which needs no positions, is quicker."""
        return self.fresh_up_to < 0 and not self.reuse.moved and len(self.reuse.fresh_idx) > 0.9 * self.length

    # --- the two kinds of forward ---------------------------------------------------------------------------------

    def full_pass(self, stop_at: int | None) -> Any:
        """All tokens whose KV is not given, up to the K/V of layer `stop_at`; their K/V are fresh, and stay."""
        self.fresh_up_to = self.model.num_layers if stop_at is None else stop_at
        if self.look_up.given is not None:
            return self.rows_pass("all tokens", self.look_up.new_rows, stop_at)
        cache = RecordingCache(self.model.num_layers, stop_at, room=ROOM)
        with self.observer.of_pass("all tokens", cache):
            output, self.entered = self.model.full_pass(self.forward, self.ids, cache)
        self.buffers.update(cache.recorded)
        self.observer.computed(self.length * self.fresh_up_to)
        return output

    def rows_pass(
        self,
        name: str,
        rows: torch.Tensor,
        stop_at: int | None = None,
        hidden: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
    ) -> Any:
        """A forward over `rows` (S,), each of which sees its past, and whose K/V replace the reused."""
        entered = self.entered if self.entered is not None and self.entered.hidden is not None else None
        one = Pass(
            self.ids[:, rows], rows, self.seen_from(rows), self.length, stop_at, hidden, record,
            resume_at=entered.layer if entered else None, resume_with=entered.of_rows(rows) if entered else None,
            num_read=self.num_read,
        )  # fmt: skip
        self.observer.computed(one.pairs(self.model.num_layers))
        cache = BlendingCache(
            self.model.num_layers, self.buffers, rows, self.length, None if record else stop_at, self.reused, hidden,
            None if record else self.reused.correcting(above=self.fresh_up_to),
        )  # fmt: skip
        with self.observer.of_pass(name, cache):
            output, seen = self.model.rows_pass(self.forward, one, cache, watch=record is None)
        self.entered = self.entered if seen is None else seen
        return output

    def seen_from(self, rows: torch.Tensor) -> torch.Tensor:
        """(S,) the last key position that each row of a pass sees: its own."""
        return rows
