"""Phase 1: each chunk's KV is found in the store, or prefilled alone, stored, and then treated exactly like a hit.

Shapes: N reused tokens that could be recomputed.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..config import BlendConfig
from ..kv.chunk import ChunkKV, ChunkLost, Provenance, Reader
from ..kv.ids import plain_ids
from ..kv.rows import KV, full_length_cache, rows_at, sent
from ..prompts.filler import require_filler
from ..prompts.prompt import ChunkSpans
from ..prompts.separator import Span
from ..store.base import ReadsAhead, Store
from ..store.keys import chunk_keys, scope_of
from ..trace.facts import ChunkTrace, Status
from ..trace.observer import Observer
from .model import BlendableModel
from .reuse import Piece, Reuse, tokens_of

logger = logging.getLogger(__name__)

_MOST_AFTER = 2**24  # ids that an entry captured in some context may claim: more than any model's context

Text = tuple[Sequence[int], Sequence[int] | None]  # ids, and those they are computed after; `None`: in some context
Found = tuple[Piece | None, ChunkTrace]


class ChunksOf:
    """Chunk KV of one model after one prefix: found in the store, or prefilled and stored.

    Args:
        prefix_ids: everything before the first chunk.
        lost: keys of entries that turned out unreadable; they count as missing.

    Attributes:
        after_ids: the ids that chunks are computed after.
        kv: KV of `after_ids`, once it is at hand.

    Raises:
        ValueError: `chunk_prefix="bos"` without a BOS, `"filler"` without its ids.
    """

    def __init__(
        self,
        model: BlendableModel,
        store: Store,
        config: BlendConfig,
        prefix_ids: Sequence[int],
        observer: Observer | None = None,
        lost: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.store, self.config, self.prefix_ids, self.lost = model, store, config, prefix_ids, lost
        self.observer = observer or Observer()
        self.kv: Reader | None = None
        self.after_ids = self._after_ids()
        # Asked for every chunk of a prompt, which waits for it.
        self._digest, self._dtype, self._layouts = model.digest, model.dtype, tuple(model.layouts.values())
        self._token_bytes = sum(layout.width for layout in self._layouts) * self._dtype.itemsize

    @property
    def scope(self) -> str:
        """The scope in which these chunks are found in plain prompts."""
        return scope_of(self._digest, self._dtype, self.config.namespace)

    def keys(self, texts: Iterable[Text]) -> list[str]:
        """The keys of texts."""
        return chunk_keys(self._digest, self._dtype, texts, self.config.namespace)

    def open(self, keys: Sequence[str], texts: Sequence[Text]) -> list[Reader | None]:
        """Returns the entries of texts; `None` where the store has none that can be this model's KV of the text.

        A file's header may claim anything, so what it claims is compared before any of it is read.
        """
        return self.model.entries_of_all([self._usable(key, *text) for key, text in zip(keys, texts)])

    def _usable(self, key: str, ids: Sequence[int], after_ids: Sequence[int] | None) -> Reader | None:
        entry = None if key in self.lost else self.store.open(key)
        if entry is None:
            return None
        num_after = None if after_ids is None else len(after_ids)
        try:
            is_usable = self._fits(entry, len(ids), num_after, key) and entry.cached_positions.shape == (len(ids),)
        except ChunkLost as error:
            logger.warning("%s", error)
            return None
        return entry if is_usable else None

    def prefill(self, key: str, ids: Sequence[int], after_ids: Sequence[int], after: Reader | None = None) -> Reader:
        """Prefills ids alone and stores them."""
        chunk_kv = self._prefilled([ids], after_ids, after)[0]
        self.store.put(key, chunk_kv)
        self.observer.phase_done("prefill_chunks")
        return chunk_kv

    def prefill_missing(
        self, missing: Mapping[str, Sequence[int]], batch_size: int | None = None
    ) -> Iterator[dict[str, Reader]]:
        """Prefills chunks by key, each alone after `after_ids`, and stores them; yields what each batch made."""
        after = self.to_continue() if missing else None
        for batch in self.model.batches(missing, len(self.after_ids), batch_size):
            made = dict(zip(batch, self._prefilled(list(batch.values()), self.after_ids, after)))
            for key, chunk_kv in made.items():
                self.store.put(key, chunk_kv)
            self.observer.phase_done("prefill_chunks")
            yield dict(made)

    def _prefilled(
        self, chunks: Sequence[Sequence[int]], after_ids: Sequence[int], after: Reader | None
    ) -> list[ChunkKV]:
        self.observer.phase_done("look_up")
        chunk_kvs = self.model.prefill(chunks, after_ids, after)
        chunk_kvs = [replace(kv, ids=ids, scope=self.scope) for kv, ids in zip(chunk_kvs, chunks)]
        self.observer.phase_done("prefill_chunks")
        self.observer.prefilled(sum(map(len, chunks)) * self.model.num_layers)
        return chunk_kvs

    def to_continue(self) -> Reader | None:
        """KV of prefix, or of prefix and filler, to compute chunks from; `None` where that is not worth storing.

        It is looked for, and made, at the first chunk that is missing: a warm store is not asked for it. Quantised KV
        is computed again, since KV computed after it would carry its error.
        """
        if self.kv is None and self.after_ids and self.config.chunk_prefix in ("prompt", "filler"):
            (key,) = self.keys([(self.after_ids, ())])
            (self.kv,) = self.open([key], [(self.after_ids, ())])
            self.kv = self.kv or self.prefill(key, self.after_ids, ())
        if self.kv is not None and self.kv.quantised:
            self.kv = self._prefilled([self.after_ids], (), None)[0]
        return self.kv

    def _after_ids(self) -> Sequence[int]:
        match self.config.chunk_prefix:
            case "prompt":
                return plain_ids(self.prefix_ids)
            case "filler":
                return array("q", (*self.prefix_ids, *self._filler()))
            case "none":
                return ()
        bos = getattr(self.model.config, "bos_token_id", None)
        if bos is None:
            raise ValueError('chunk_prefix="bos" needs a bos_token_id in the model\'s config, which has none.')
        return (bos if isinstance(bos, int) else bos[0],)

    def _filler(self) -> tuple[int, ...]:
        """The filler, at most as long as half of the context that the model was trained for."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or len(self.config.filler_ids) * 2
        return require_filler(self.config.filler_ids)[: limit // 2]

    def _fits(self, entry: Reader, num_tokens: int, num_after: int | None, key: str) -> bool:
        """Whether an entry can be this model's KV of that many tokens; if not, logs it: the chunk counts as missing."""
        after = min(entry.num_behind, _MOST_AFTER) if num_after is None else num_after
        got = (entry.num_layers, len(entry), entry.num_behind, entry.num_bytes, entry.dtype, entry.layouts)
        num_bytes = num_tokens * self._token_bytes
        expected = (len(self._layouts), num_tokens, after, num_bytes, self._dtype, self._layouts)
        if got != expected:
            logger.warning(
                "The store's entry %s… is not this model's: (layers, tokens, ids before them, bytes, dtype, layouts) "
                "are %s, expected %s. The chunk is computed again.",
                key[:12],
                got,
                expected,
            )
        return got == expected


def is_exact(model: BlendableModel, entry: Reader, ids: array[int], span: Span, length: int) -> bool:
    """Whether an entry stands where it was computed, after the same ids, in the RoPE regime of a prompt of `length`.

    Quantised KV is not exact: an exact piece is never recomputed, and ratio 1 would keep its error.
    """
    start, stop = span
    return (
        entry.quantised is None
        and entry.num_behind == start
        and plain_ids(entry.behind_ids) == ids[:start]
        and entry.cached_positions.tolist() == list(range(start, stop))
        and model.same_regime(entry.regime, model.regime(length))
    )


@dataclass
class LookUp:
    """One prompt's look-up.

    Args:
        ids: T token ids, drafts after the prompt included.
        prompt_length: tokens of the prompt itself.
        lost: keys of entries that turned out unreadable; they count as missing.
        prefilled: keys of chunks that this prompt prefilled before such an entry was met.
        given: KV of the first tokens, which the caller has: it is the prefix, and chunks in it are none of this prompt.
    """

    model: BlendableModel
    ids: array[int]
    spans: ChunkSpans
    store: Store
    config: BlendConfig
    observer: Observer
    prompt_length: int
    lost: frozenset[str] = frozenset()
    prefilled: frozenset[str] = frozenset()
    given: Reader | None = None
    prefix: ChunkTrace | None = field(default=None, init=False)
    chunks: list[ChunkTrace] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._prefix_stop = self.spans.prefix_stop
        prefix_ids = self.ids[: self._prefix_stop]
        self._chunks_of = ChunksOf(self.model, self.store, self.config, prefix_ids, self.observer, self.lost)
        if self.given is not None:
            self._prefix_stop = len(self.given)
            self.spans = self.spans.from_token(self._prefix_stop)

    @property
    def new_rows(self) -> torch.Tensor:
        """All tokens but those whose KV the caller has: no pass computes these."""
        start = 0 if self.given is None else len(self.given)
        return torch.arange(start, len(self.ids), device=self.model.device)

    @property
    def all_traces(self) -> list[ChunkTrace]:
        """The traces of the prefix, if there is one, and of the chunks."""
        return [self.prefix, *self.chunks] if self.prefix else self.chunks

    def run(self) -> Reuse:
        """Finds, or makes, the KV of the prefix and of every chunk."""
        found = self._find_alone()
        if self.config.on_miss == "isolated":
            self._prefill_prefix(found)
            self._prefill_missing(found)
        else:
            self._find_in_context(found)
        self._chunks_of.kv = None  # an open file would wait for the garbage collector
        pieces, traces = [piece for piece, _ in found if piece], [trace for _, trace in found]
        self.prefix, self.chunks = (traces[0], traces[1:]) if self._prefix_stop else (None, traces)
        for chunk in self.chunks:
            if chunk.key in self.prefilled:
                chunk.status = "miss"
        self.num_bytes = sum(piece.entry.num_bytes for piece in pieces)
        self.observer.looked_up(self.prefix, self.chunks, self.num_bytes)
        return self.partition(pieces)

    def _find_alone(self) -> list[Found]:
        """The prefix, if there is one, and the chunks, each computed alone after what chunks are computed after."""
        after_ids, stop = self._chunks_of.after_ids, self._prefix_stop
        spans, texts = list(self.spans), [(self.ids[slice(*span)], after_ids) for span in self.spans]
        if stop and self.given is None:
            spans, texts = [(0, stop), *spans], [(self.ids[:stop], ()), *texts]
        keys = self._chunks_of.keys(texts)
        if isinstance(self.store, ReadsAhead):  # its entries take long to come
            self.store.read_ahead(keys)
        found = self._find(spans, keys, texts)
        return found if self.given is None else [self._piece((0, stop), self.given, "", "hit"), *found]

    def _find_in_context(self, found: list[Found]) -> None:
        """Looks for the chunks that were not found alone: some prompt may have left its own KV of them."""
        spans = [trace.span for piece, trace in found if piece is None and trace.span[0] >= self._prefix_stop]
        texts: list[Text] = [(self.ids[slice(*span)], None) for span in spans]
        again = dict(zip(spans, self._find(spans, self._chunks_of.keys(texts), texts)))
        found[:] = [again.get(trace.span, (piece, trace)) for piece, trace in found]

    def _find(self, spans: Sequence[Span], keys: Sequence[str], texts: Sequence[Text]) -> list[Found]:
        """The entries of spans in the store."""
        return [
            (None, ChunkTrace(span, key, "fresh")) if entry is None else self._piece(span, entry, key, "hit")
            for span, key, entry in zip(spans, keys, self._chunks_of.open(keys, texts))
        ]

    def _prefill_prefix(self, found: list[Found]) -> None:
        """Prefills the prefix, if it was not found: chunks may be computed after it."""
        if not self._prefix_stop:
            return
        piece, trace = found[0]
        if piece is None:
            entry = self._chunks_of.prefill(trace.key, self.ids[: self._prefix_stop], ())
            piece, trace = found[0] = self._piece(trace.span, entry, trace.key, "miss")
        if self.config.chunk_prefix == "prompt" and len(piece.entry) <= len(self._chunks_of.after_ids):
            self._chunks_of.kv = piece.entry

    def _prefill_missing(self, found: list[Found]) -> None:
        """Prefills what was not found, each chunk once, and then treats it exactly like a hit."""
        missing = {chunk.key: self.ids[slice(*chunk.span)] for piece, chunk in found if piece is None}
        made: dict[str, Reader] = {}
        for batch in self._chunks_of.prefill_missing(missing):
            made |= batch
        seen: set[str] = set()
        for i, (piece, chunk) in enumerate(found):
            if piece is None:
                found[i] = self._piece(chunk.span, made[chunk.key], chunk.key, "hit" if chunk.key in seen else "miss")
                seen.add(chunk.key)

    def _piece(self, span: Span, entry: Reader, key: str, status: Status) -> tuple[Piece, ChunkTrace]:
        exact = is_exact(self.model, entry, self.ids, span, len(self.ids))
        cached_start = int(entry.cached_positions[0])
        return Piece(span, entry, exact), ChunkTrace(span, key, status, exact, cached_start, entry.quantised)

    def partition(self, pieces: list[Piece]) -> Reuse:
        """Sorts pieces into exact and moved, and tokens into candidates and fresh ones."""
        last = self.prompt_length - 1  # its output is read, and that of drafts after it
        starts = [piece.span[0] for piece in pieces] + [len(self.ids)]
        stops = [0] + [min(piece.span[1], last) for piece in pieces]
        moved = [piece for piece in pieces if not piece.exact]
        candidates = tokens_of((piece.span[0], min(piece.span[1], last)) for piece in moved)
        fresh = tokens_of(gap for gap in zip(stops, starts) if gap[0] < gap[1])
        suffix_start = min(self.spans[-1][1], last) if self.spans else 0
        in_suffix = (fresh >= suffix_start) & (fresh <= last)
        # Counted on the CPU and sent together: no pass has to wait for a size.
        parts = [candidates, fresh, fresh[in_suffix], fresh[~in_suffix]]
        on_device = sent(torch.from_numpy(np.concatenate(parts)), self.model.device).split(list(map(len, parts)))
        reuse = Reuse([piece for piece in pieces if piece.exact], moved, *on_device)
        self.observer.partitioned(reuse.candidate_idx, reuse.fresh_idx)
        return reuse

    # --- once the prompt is blended -------------------------------------------------------------------------------

    def keep_fresh(self, buffers: Mapping[int, KV]) -> None:
        """Stores what was computed inside this prompt, as long as nothing before it was reused from elsewhere."""
        if self.given is not None:  # which may be blended itself
            return
        for chunk in self.all_traces:
            if chunk.status in ("hit", "miss") and not chunk.exact:
                return
            if chunk.status == "fresh":
                self.keep(chunk, buffers)

    def keep(self, chunk: ChunkTrace, buffers: Mapping[int, KV]) -> None:
        """Stores a chunk, or the prefix, that this prompt computed."""
        start, stop = chunk.span
        positions = torch.arange(start, stop)
        kv = full_length_cache(rows_at(states, positions) for _, states in sorted(buffers.items()))
        provenance: Provenance = "isolated" if chunk is self.prefix else "in_context"
        after_ids = tuple(self.ids[:start])
        origin, regime = self.model.origin_of(self.ids[start:stop], after_ids), self.model.regime(len(self.ids))
        self.store.put(chunk.key, ChunkKV(kv, positions, after_ids, provenance, regime, origin=origin))

    def note_what_was_not_kept(self) -> None:
        """Says when the store is too small for this prompt: its chunks push each other out and miss every time."""
        if getattr(self.store, "logs_what_it_lost", False):
            return
        prefilled = [chunk for chunk in self.chunks if chunk.status == "miss"]
        lost = sum(self.store.open(chunk.key) is None for chunk in prefilled)
        if lost:
            note = (
                f"{lost} of {len(prefilled)} chunks prefilled for this prompt are not in the store any more: it is too "
                f"small for them ({self.num_bytes} bytes; give it more), or could not keep them, as its log says. They "
                "will be prefilled again."
            )
            self.observer.note(note)
            logger.warning(note)
