"""Phase 1: each chunk's KV is found in the store, or prefilled alone, stored, and then treated exactly like a hit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch

from .caches import sent
from .chunks import Reader, prefill
from .config import BlendConfig
from .filler import require_filler
from .models import BlendableModel
from .prompt import ChunkSpans
from .reuse import Piece, Reuse, joined
from .separator import Span
from .store import Store, chunk_key
from .trace import BlendTrace, ChunkTrace, PhaseClock, Status

logger = logging.getLogger(__name__)


@dataclass
class LookUp:
    """One prompt's look-up.

    Args:
        ids: T token ids, drafts behind the prompt included.
        trace, clock: written to.
        prompt_length: tokens of the prompt itself.
    """

    host: BlendableModel
    ids: list[int]
    spans: ChunkSpans
    store: Store
    config: BlendConfig
    trace: BlendTrace
    clock: PhaseClock
    prompt_length: int

    def __post_init__(self) -> None:
        self._key = partial(chunk_key, self.host.fingerprint.digest, self.host.dtype, namespace=self.config.namespace)
        self._prefix_context: Reader | None = None
        self._filler_context: Reader | None = None

    def run(self) -> Reuse:
        """Finds, or makes, the KV of the prefix and of every chunk."""
        pieces: list[Piece] = []
        prefix_stop = self.spans[0][0] if self.spans else 0
        if prefix_stop:
            prefix, self.trace.prefix = self._find_or_prefill((0, prefix_stop), ())
            pieces.append(prefix)
            self._prefix_context = prefix.entry if self.config.chunk_prefix == "prompt" else None
        behind = self._chunk_prefix(prefix_stop)
        for span in self.spans:
            piece: Piece | None
            if self.config.on_miss == "isolated":
                piece, chunk_trace = self._find_or_prefill(span, behind)
            else:
                piece, chunk_trace = self._find(span, behind, accepts_in_context=True)
            pieces += [piece] if piece else []
            self.trace.chunks.append(chunk_trace)
        self.trace.bytes_reused = sum(piece.entry.num_bytes for piece in pieces)
        return self._partition(pieces)

    def _chunk_prefix(self, prefix_stop: int) -> tuple[int, ...]:
        """The ids that chunks are computed behind."""
        match self.config.chunk_prefix:
            case "prompt":
                return tuple(self.ids[:prefix_stop])
            case "filler":
                return (*self.ids[:prefix_stop], *self._filler())
            case "none":
                return ()
        bos = getattr(self.host.config, "bos_token_id", None)
        if bos is None:
            raise ValueError('chunk_prefix="bos" needs a bos_token_id in the model\'s config, which has none.')
        return (bos if isinstance(bos, int) else bos[0],)

    def _filler(self) -> tuple[int, ...]:
        """The filler, at most as long as half of the context that the model was trained for."""
        limit = getattr(self.host.config, "max_position_embeddings", None) or len(self.config.filler_ids) * 2
        return require_filler(self.config.filler_ids)[: limit // 2]

    def _find_or_prefill(self, span: Span, behind: tuple[int, ...]) -> tuple[Piece, ChunkTrace]:
        piece, chunk_trace = self._find(span, behind, accepts_in_context=False)
        if piece:
            return piece, chunk_trace
        key, context = chunk_trace.key, self._context(behind)
        return self._piece(span, self._prefill(key, self.ids[slice(*span)], behind, context), key, "miss")

    def _find(self, span: Span, behind: tuple[int, ...], accepts_in_context: bool) -> tuple[Piece | None, ChunkTrace]:
        """The span's entry in the store: computed alone behind those ids, else (if accepted) in some context."""
        ids = self.ids[slice(*span)]
        for ids_before in (behind, None) if accepts_in_context else (behind,):
            key = self._key(ids, ids_before)
            entry = self._open(key, len(ids))
            if entry is not None:
                return self._piece(span, entry, key, "hit")
        return None, ChunkTrace(span, key, "fresh")

    def _prefill(self, key: str, ids: list[int], behind: tuple[int, ...], continues: Reader | None) -> Reader:
        """Prefills ids alone and stores them; from then on they are treated exactly like a hit."""
        self.clock.end_of("look_up")
        chunk_kv = prefill(self.host, ids, behind, continues)
        self.store.put(key, chunk_kv)
        self.clock.end_of("prefill_chunks")
        self.trace.isolated_pairs += len(ids) * self.host.num_layers
        return chunk_kv

    def _context(self, behind: tuple[int, ...]) -> Reader | None:
        """KV of what chunks are computed behind, to continue from: the prefix's, or that of prefix and filler.

        The second is made, and stored, at the first chunk that is missing: a warm store does not ask for it.
        """
        if self.config.chunk_prefix == "filler" and behind and self._filler_context is None:
            ids = list(behind)
            key = self._key(ids, ())
            self._filler_context = self._open(key, len(ids)) or self._prefill(key, ids, (), None)
        return self._filler_context or self._prefix_context

    def _open(self, key: str, num_tokens: int) -> Reader | None:
        entry = self.store.open(key)
        return entry if entry is not None and self._fits(entry, num_tokens, key) else None

    def _fits(self, entry: Reader, num_tokens: int, key: str) -> bool:
        """Whether an entry can be this model's KV of that many tokens; if not, it is logged and treated as a miss."""
        keys, _ = entry.layer(0)
        got = (entry.num_layers, keys.shape[0], keys.shape[2], len(entry.cached_positions), keys.dtype)
        expected = (self.host.num_layers, 1, num_tokens, num_tokens, self.host.dtype)
        if got != expected:
            logger.warning(
                "The store's entry %s… is not this model's: (layers, batch, tokens, positions, dtype) are %s, expected "
                "%s. The chunk is computed again.",
                key[:12],
                got,
                expected,
            )
        return got == expected

    def _piece(self, span: Span, entry: Reader, key: str, status: Status) -> tuple[Piece, ChunkTrace]:
        """Exact is what stands where it was computed, behind the same ids, in the same RoPE regime."""
        start, stop = span
        exact = (
            len(entry.behind_ids) == start
            and list(entry.behind_ids) == self.ids[:start]
            and entry.cached_positions.tolist() == list(range(start, stop))
            and self.host.same_regime(entry.regime, len(self.ids))
        )
        return Piece(span, entry, exact), ChunkTrace(span, key, status, exact, int(entry.cached_positions[0]))

    def _partition(self, pieces: list[Piece]) -> Reuse:
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
