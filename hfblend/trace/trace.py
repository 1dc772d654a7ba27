"""The trace of a call: what was reused, what was recomputed, and where the milliseconds and bytes went; and its writer.

Three levels of detail, each with all of the one before:

    summary    chunks, figures, phases; which tokens were candidates, scored, selected: it costs nothing
    tokens     the prompt's ids and, through the tokenizer, its texts; how much a correction added
    full       layer x token maps, and when each layer was asked for, loaded and computed; costs time and memory

`hfblend.display` shows traces; this folder does not depend on it.

Shapes: T all tokens, N reused tokens that could be recomputed, S selected tokens, L layers, P pieces: the prefix, if
there is one, and the chunks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np
import torch

from ..arguments import one_of, require_tokenizer
from ..arguments import require as require_type
from ..config import BlendConfig
from ..kv.rows import KV, sent
from ..util import require
from .facts import TENSORS, ChunkTrace, Facts, Level
from .file import load_trace, save_trace
from .observer import Observer
from .timeline import Interval, PhaseClock, ms_per_phase
from .tokens import columns_of, texts_of


def as_level(level: str) -> Level:
    """Returns a level of detail; raises `ValueError` for another word."""
    one_of("trace", level, get_args(Level))
    return level  # type: ignore[return-value]


@dataclass
class BlendTrace(Facts):
    """One call of `generate` or `blend`.

    A (token, layer) pair counts as computed when that token went through that layer in this call. The last layer counts
    as a whole, although most rows leave only their K/V there. Pairs of chunks prefilled alone are counted separately,
    because a warm store has none.

    Attributes:
        blended: whether the call was blended.
        fallback: why not, as `docs/generate.md` names it; `fallback_reason` says it as a sentence, with what was
            found, what is needed, and what to do.
        num_tokens: T, tokens of the prompt's forward.
        num_layers: L.
        prefix, chunks: a `ChunkTrace` of each.
        candidate_idx: (N,) reused tokens that could be recomputed: those of chunks (and of a prefix that is quantised,
            or from another RoPE regime) that are not exact.
        scores: (N,) the selection rule's score of each, in its first round; `None` where nothing was ranked.
        selected_idx: (S,) of these, the recomputed ones.
        fresh_idx: tokens that are always computed: gaps, suffix, in-context misses, the last token.
        computed_pairs, isolated_pairs: see above.
        bytes_reused: bytes of chunk KV that were read to be reused.
        ttft_ms: from the call of `generate` to the first new token on the CPU; `None` until then.
        decision: the controller's, `None` without `recompute_ratios="auto"`.
        verification: how far this call is from its full prefill, where `patch(verify=...)` had it checked: the fields
            of `hfblend.Verification`, with `max_kl` and `within_bound`; or `{"error": ...}`.
        notes: remarks, one line each.
        level: of detail.
        settings: of the rule: selection, recompute_ratios, check_layers, chunk_prefix, correction.
        input_ids: (T,) on the CPU, from level `"tokens"` on.
        offsets: (L, 2, P) in fp32, from level `"tokens"` on: how much `correction` adds to the keys, their rotation
            off, and to the values of each of `pieces`: the root mean square over its tokens, KV heads (of this rank)
            and dimensions. NaN where no row is corrected: exact and computed pieces, layers whose K/V are fresh.
            `None` if no row is corrected at all.
        maps: level `"full"`.
        tokenizer: decodes the ids; never saved.
        texts: of the tokens, in a trace that was saved where a tokenizer was known.
    """

    def restart(self) -> None:
        """Drops all that was noted, for the same prompt."""
        kept = {name: getattr(self, name) for name in ("num_tokens", "num_layers", "level", "tokenizer")}
        vars(self).update(vars(BlendTrace(**kept)))

    @property
    def hits(self) -> int:
        """Chunks found in the store."""
        return sum(chunk.status in ("hit", "unused") for chunk in self.chunks)

    @property
    def misses(self) -> int:
        """Chunks not found in the store."""
        return len(self.chunks) - self.hits

    @property
    def reused_tokens(self) -> int:
        """Chunk tokens taken from the store or from an isolated prefill, exact ones included."""
        return sum(c.span[1] - c.span[0] for c in self.chunks if c.cached_start is not None)

    @property
    def selected_tokens(self) -> int:
        """Reused tokens that were recomputed."""
        return 0 if self.selected_idx is None else len(self.selected_idx)

    @property
    def total_pairs(self) -> int:
        """(token, layer) pairs of a full prefill."""
        return self.num_tokens * self.num_layers

    @property
    def recomputed_pairs_share(self) -> float:
        """Computed pairs over those of a full prefill; above 1 where blending cost more."""
        return self.computed_pairs / self.total_pairs if self.total_pairs else 0.0

    @property
    def phase_ms(self) -> dict[str, float]:
        """Milliseconds per phase: look_up, prefill_chunks, select, recompute, hand_over."""
        return ms_per_phase(self.timeline)

    @property
    def timeline(self) -> list[Interval]:
        """The time of each phase, and at level `"full"` of each layer's request, loading and computing.

        On a GPU, reading it waits until the work is done; nothing waits before.
        """
        return self.intervals()

    def token_texts(self, tokenizer: Any = None) -> list[str] | None:
        """Returns each token's text; `None` without ids, or where no tokenizer is known."""
        if self.texts is not None and tokenizer is None:
            return self.texts
        tokenizer = self.tokenizer if tokenizer is None else require_tokenizer(tokenizer)
        return None if tokenizer is None or self.input_ids is None else texts_of(tokenizer, self.input_ids.tolist())

    def token_columns(self, tokenizer: Any = None) -> dict[str, list[Any]]:
        """Returns column -> T values, as `to_frame` shows them; `None` where a value is not known."""
        return columns_of(self, self.token_texts(tokenizer))

    def to_frame(self, tokenizer: Any = None) -> Any:
        """Returns a pandas `DataFrame`, a row per token of the prompt.

        >>> trace.to_frame().query("selected").nlargest(10, "score")  # doctest: +SKIP

        Args:
            tokenizer: for the texts, where `patch` was given none.

        Returns:
            Columns `index`, `id`, `text`, `part` (prefix, chunk, gap, suffix), `chunk` (number), `origin` (the chunk's
            status), `status` (exact, reused, recomputed, computed), `old_position`, `new_position`, `score`,
            `selected`.

        Raises:
            ImportError: pandas is missing.
        """
        pandas = require("pandas", "pandas", "display", "A frame of a trace needs")
        frame = pandas.DataFrame(self.token_columns(tokenizer))
        return frame.astype(dict.fromkeys(("id", "chunk", "old_position"), "Int64") | {"score": "float64"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything into one file, safetensors with JSON in its header; texts too, if a tokenizer is known.

        >>> trace.save("call.trace")  # doctest: +SKIP
        >>> hfblend.show(hfblend.BlendTrace.load("call.trace"))  # doctest: +SKIP

        Raises:
            OSError: the file cannot be written.
        """
        save_trace(self, require_type("path", path, (str, os.PathLike), "the path of a file"), self.token_texts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlendTrace:
        """Reads a file of `save`.

        Raises:
            ValueError: a file that is no trace, or a damaged one.
            OSError: no such file.
        """
        facts = load_trace(require_type("path", path, (str, os.PathLike), "the path of a file"))
        return cls(**{field.name: getattr(facts, field.name) for field in fields(facts)})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, strings and lists, for JSON."""
        timeline = self.timeline
        found: dict[str, Any] = {
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            "settings": dict(self.settings),
            "prefix": self.prefix and vars(self.prefix),
            "chunks": [vars(chunk) for chunk in self.chunks],
            **{name: None if (t := getattr(self, name)) is None else plain_list(t) for name in TENSORS},
            "decision": None if self.decision is None else asdict(self.decision),
            "phase_ms": ms_per_phase(timeline),
        }
        if self.level != "summary":
            found["timeline"] = [asdict(interval) for interval in timeline]
        if self.maps is not None:
            found["maps"] = {name: plain_list(values) for name, values in self.maps.items().items()}
        return found

    def __repr__(self) -> str:
        return f"<BlendTrace: {self}>"

    def __str__(self) -> str:
        if not self.blended:
            reason = f" ({self.fallback_reason.rstrip('.')})" if self.fallback_reason else ""
            return f"not blended: {self.fallback or 'no call yet'}{reason}"
        exact = sum(chunk.exact for chunk in self.chunks)
        candidates = 0 if self.candidate_idx is None else len(self.candidate_idx)
        kinds = [piece.quantised for piece in (self.prefix, *self.chunks) if piece and piece.quantised]
        quantised = "".join(f", {kinds.count(kind)} in {kind}" for kind in dict.fromkeys(kinds))
        return (
            f"blended {self.num_tokens} tokens: {len(self.chunks)} chunks ({self.hits} hits, {self.misses} misses, "
            f"{exact} exact{quantised}), {self.selected_tokens} of {candidates} moved tokens recomputed, "
            f"{self.recomputed_pairs_share:.1%} of a full prefill's (token, layer) pairs"
            + (f", first token after {self.ttft_ms:.0f} ms" if self.ttft_ms is not None else "")
        )


_PLAIN_FIELDS = (
    "blended", "fallback", "fallback_reason", "num_tokens", "num_layers", "hits", "misses", "reused_tokens",
    "selected_tokens", "computed_pairs", "isolated_pairs", "total_pairs", "recomputed_pairs_share", "bytes_reused",
    "ttft_ms", "verification", "notes", "level",
)  # fmt: skip


def plain_list(values: torch.Tensor) -> list[Any]:
    """Returns nested lists, `None` for NaN and infinities, which JSON does not know."""
    if not values.is_floating_point():
        return values.tolist()
    numbers = values.double().numpy(force=True)
    plain = numbers.astype(object)
    plain[~np.isfinite(numbers)] = None
    return plain.tolist()


def name_of(rule: Any) -> str | None:
    """Returns the name in the settings, or that of the user's function."""
    return getattr(rule, "__name__", type(rule).__name__) if callable(rule) else rule


class Tracer(Observer):
    """Writes a `BlendTrace` of level `"summary"` or `"tokens"`, with a clock of the model's device."""

    _added: dict[int, torch.Tensor]  # layer -> (2, P)

    def __init__(self, trace: BlendTrace, device: torch.device) -> None:
        self.trace = trace
        self.clock = PhaseClock(device)
        self.trace.blended, self.trace.intervals = True, self.clock.intervals

    def phase_done(self, phase: str) -> None:
        self.clock.end_of(phase)

    def prefilled(self, pairs: int) -> None:
        self.trace.isolated_pairs += pairs

    def looked_up(self, prefix: ChunkTrace | None, chunks: list[ChunkTrace], num_bytes: int) -> None:
        self.trace.prefix, self.trace.chunks, self.trace.bytes_reused = prefix, chunks, num_bytes
        self.trace.scores = None

    def partitioned(self, candidate_idx: torch.Tensor, fresh_idx: torch.Tensor) -> None:
        self.trace.candidate_idx, self.trace.fresh_idx = candidate_idx, fresh_idx

    def realigned(self, config: BlendConfig) -> None:
        self._added = {}
        self.trace.settings = {
            "selection": name_of(config.selection),
            "recompute_ratios": list(config.fixed_ratios),
            "check_layers": list(config.check_layers),
            "chunk_prefix": config.chunk_prefix,
            "correction": name_of(config.correction),
        }

    def computed(self, pairs: int) -> None:
        self.trace.computed_pairs += pairs

    def scored(self, scores: torch.Tensor) -> None:
        if self.trace.scores is None:
            self.trace.scores = scores

    def corrected(self, layer_idx: int, sizes: Callable[[], torch.Tensor]) -> None:
        if self.trace.level != "summary":
            self._added[layer_idx] = sizes()

    def selected(self, selected_idx: torch.Tensor) -> None:
        self.trace.selected_idx = selected_idx

    def finish(self, buffers: Mapping[int, KV], fresh_up_to: int) -> None:
        pieces = self.trace.pieces
        moved = [i for i, one in enumerate(pieces) if one.cached_start is not None and not one.exact]
        if {size.shape[1] for size in self._added.values()} != {len(moved)}:  # none, or an algorithm reuses more
            return
        device = next(iter(self._added.values())).device
        offsets, columns = torch.full((self.trace.num_layers, 2, len(pieces)), torch.nan), torch.tensor(moved)
        offsets, columns = sent(offsets, device), sent(columns, device)
        for layer, size in self._added.items():  # a GPU is not waited for
            offsets[layer].index_copy_(1, columns, size.to(device))
        self.trace.offsets = offsets

    def note(self, text: str) -> None:
        self.trace.notes.append(text)
