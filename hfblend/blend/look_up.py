"""Phase 1: each chunk's KV is found in the store, or prefilled alone, stored, and then treated exactly like a hit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import BlendConfig
from ..kv.chunk import ChunkKV, Reader, prefill
from ..model.prefill import chunks_at_once, in_batches, prefill_together
from ..prompts.prompt import ChunkSpans
from ..prompts.separator import Span
from ..store import ReadsAhead, Store
from ..support.registry import BlendableModel
from ..trace.trace import BlendTrace, ChunkTrace, PhaseClock, Status
from .caches import sent
from .context import ChunkContext
from .reuse import Piece, Reuse, joined

Found = tuple[Piece | None, ChunkTrace]


@dataclass
class LookUp:
    """One prompt's look-up.

    Args:
        ids: T token ids, drafts behind the prompt included.
        trace, clock: written to.
        prompt_length: tokens of the prompt itself.
        lost: keys of entries that could not be read to their end; they count as missing.
    """

    host: BlendableModel
    ids: list[int]
    spans: ChunkSpans
    store: Store
    config: BlendConfig
    trace: BlendTrace
    clock: PhaseClock
    prompt_length: int
    lost: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._prefix_stop = self.spans[0][0] if self.spans else 0
        prefix_ids = self.ids[: self._prefix_stop]
        self._context = ChunkContext(self.host, self.store, self.config, prefix_ids, self._prefill, self.lost)
        self._keys: dict[tuple[Span, bool], str] = {}

    def run(self) -> Reuse:
        """Finds, or makes, the KV of the prefix and of every chunk."""
        pieces: list[Piece] = []
        isolated = self.config.on_miss == "isolated"
        self._read_ahead()
        if self._prefix_stop:
            prefix, self.trace.prefix = self._find((0, self._prefix_stop), (), accepts_in_context=False)
            if prefix is None and isolated:
                span, key = self.trace.prefix.span, self.trace.prefix.key
                entry = self._prefill(key, self.ids[slice(*span)], (), None)
                prefix, self.trace.prefix = self._piece(span, entry, key, "miss")
            pieces += [prefix] if prefix else []
            self._context.kv = prefix.entry if prefix and self.config.chunk_prefix == "prompt" else None
        behind = self._context.behind_ids
        found = [self._find(span, behind, accepts_in_context=not isolated) for span in self.spans]
        if isolated:
            self._prefill_missing(found)
        pieces += [piece for piece, _ in found if piece]
        self.trace.chunks += [chunk_trace for _, chunk_trace in found]
        self.trace.bytes_reused = sum(piece.entry.num_bytes for piece in pieces)
        self._context.kv = None  # the context knows this look-up, so an open file would wait for the garbage collector
        return self.partition(pieces)

    def _prefill_missing(self, found: list[Found]) -> None:
        """Prefills what was not found, each chunk once, and then treats it exactly like a hit."""
        missing = {chunk_trace.key: self.ids[slice(*chunk_trace.span)] for piece, chunk_trace in found if piece is None}
        if not missing:
            return
        behind_ids, behind = self._context.behind_ids, self._to_continue()
        made: dict[str, Reader] = {}
        self.clock.end_of("look_up")
        for batch in in_batches(missing.items(), chunks_at_once(self.host), len(behind_ids)):
            chunk_kvs = prefill_together(self.host, [ids for _, ids in batch], behind_ids, behind)
            for (key, ids), chunk_kv in zip(batch, chunk_kvs):
                self.trace.isolated_pairs += len(ids) * self.host.num_layers
                self.store.put(key, chunk_kv)
                made[key] = chunk_kv
        self.clock.end_of("prefill_chunks")
        seen: set[str] = set()
        for i, (piece, chunk_trace) in enumerate(found):
            if piece is None:
                key = chunk_trace.key
                found[i] = self._piece(chunk_trace.span, made[key], key, "hit" if key in seen else "miss")
                seen.add(key)

    def _to_continue(self) -> Reader | None:
        """KV of what chunks stand behind; computed again, once for the prompt, where the store has it quantised."""
        behind = self._context.to_continue()
        if behind is not None and behind.quantised:
            self._context.kv = behind = self._prefilled(list(self._context.behind_ids), (), None)
        return behind

    def _find(self, span: Span, behind: tuple[int, ...], accepts_in_context: bool) -> Found:
        """The span's entry in the store: computed alone behind those ids, else (if accepted) in some context."""
        ids = self.ids[slice(*span)]
        for ids_before in (behind, None) if accepts_in_context else (behind,):
            key = self._key(span, ids_before)
            entry = self._context.open(key, len(ids), None if ids_before is None else len(ids_before))
            if entry is not None:
                return self._piece(span, entry, key, "hit")
        return None, ChunkTrace(span, key, "fresh")

    def _read_ahead(self) -> None:
        """Tells a store whose entries take long to come what will be asked for."""
        if isinstance(self.store, ReadsAhead):
            prefix = [self._key((0, self._prefix_stop), ())] if self._prefix_stop else []
            self.store.read_ahead(prefix + [self._key(span, self._context.behind_ids) for span in self.spans])

    def _key(self, span: Span, behind: tuple[int, ...] | None) -> str:
        """The key of a span's ids behind those, or in some context. A span has one of each."""
        place = (span, behind is None)
        if place not in self._keys:
            self._keys[place] = self._context.key(self.ids[slice(*span)], behind)
        return self._keys[place]

    def _prefill(self, key: str, ids: list[int], behind: tuple[int, ...], continues: Reader | None) -> Reader:
        """Prefills ids alone and stores them; from then on they are treated exactly like a hit."""
        chunk_kv = self._prefilled(ids, behind, continues)
        self.store.put(key, chunk_kv)
        self.clock.end_of("prefill_chunks")
        return chunk_kv

    def _prefilled(self, ids: list[int], behind: tuple[int, ...], continues: Reader | None) -> ChunkKV:
        self.clock.end_of("look_up")
        chunk_kv = prefill(self.host, ids, behind, continues)
        self.clock.end_of("prefill_chunks")
        self.trace.isolated_pairs += len(ids) * self.host.num_layers
        return chunk_kv

    def _piece(self, span: Span, entry: Reader, key: str, status: Status) -> tuple[Piece, ChunkTrace]:
        """Exact is what stands where it was computed, behind the same ids, in the same RoPE regime, as computed.

        Quantised KV is not: an exact piece is never recomputed, and ratio 1 would keep its error.
        """
        start, stop = span
        exact = (
            entry.quantised is None
            and entry.num_behind == start
            and list(entry.behind_ids) == self.ids[:start]
            and entry.cached_positions.tolist() == list(range(start, stop))
            and self.host.same_regime(entry.regime, self.host.regime(len(self.ids)))
        )
        cached_start = int(entry.cached_positions[0])
        return Piece(span, entry, exact), ChunkTrace(span, key, status, exact, cached_start, entry.quantised)

    def partition(self, pieces: list[Piece]) -> Reuse:
        """Sorts pieces into exact and moved, and tokens into candidates and fresh ones."""
        last = self.prompt_length - 1  # its output is asked for, and that of drafts behind it
        starts = [piece.span[0] for piece in pieces] + [len(self.ids)]
        stops = [0] + [min(piece.span[1], last) for piece in pieces]
        moved = [piece for piece in pieces if not piece.exact]
        candidates = [torch.arange(piece.span[0], min(piece.span[1], last)) for piece in moved]
        fresh = joined([torch.arange(*gap) for gap in zip(stops, starts) if gap[0] < gap[1]])
        suffix_start = min(self.spans[-1][1], last) if self.spans else 0
        in_suffix = (fresh >= suffix_start) & (fresh <= last)
        # Counted on the CPU and sent together: no pass has to wait for a size.
        parts = [joined(candidates), fresh, fresh[in_suffix], fresh[~in_suffix]]
        on_device = sent(torch.cat(parts), self.host.device).split([len(part) for part in parts])
        reuse = Reuse([piece for piece in pieces if piece.exact], moved, *on_device)
        self.trace.candidate_idx, self.trace.fresh_idx = reuse.candidate_idx, reuse.fresh_idx
        return reuse
