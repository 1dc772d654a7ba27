"""What a call did: what was reused, what was recomputed, and where the milliseconds and bytes went.

Three levels of detail, each with all of the one before:

    summary    chunks, figures, phases; which tokens were candidates, scored, selected: all of it is there anyway
    tokens     the prompt's ids and, through the tokenizer, its texts
    full       layer x token maps, and when each layer was asked for, loaded and computed; costs time and memory

A trace knows nothing of how it is shown: `hfblend.display`.

Shapes: T all tokens, N reused tokens that could be recomputed, S selected tokens, L layers.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch

from ..arguments import one_of, require_tokenizer
from ..arguments import require as require_type
from ..config import BlendConfig
from ..util import require
from .decision import Decision
from .timeline import Interval, PhaseClock, SavedTimeline, ms_per_phase
from .tokens import columns_of, texts_of

__all__ = ["BlendTrace", "ChunkTrace", "LayerMaps", "Level", "PhaseClock", "Status", "as_level", "settings_of"]

Status = Literal["hit", "miss", "fresh", "unused"]
Level = Literal["summary", "tokens", "full"]


def as_level(level: str) -> Level:
    """A level of detail, checked.

    Raises:
        ValueError: none of the three.
    """
    one_of("trace", level, get_args(Level))
    return level  # type: ignore[return-value]


def settings_of(config: BlendConfig) -> dict[str, Any]:
    """What says how tokens were chosen, plain."""
    rule = config.selection
    return {
        "selection": getattr(rule, "__name__", type(rule).__name__) if callable(rule) else rule,
        "recompute_ratios": list(config.fixed_ratios),
        "check_layers": list(config.check_layers),
        "chunk_prefix": config.chunk_prefix,
    }


@dataclass
class ChunkTrace:
    """What happened to one chunk, or to the prefix.

    Attributes:
        span: [start, stop) in the prompt.
        key: the store's key (a hex digest).
        status: `"hit"` (found), `"miss"` (prefilled alone, stored, then used like a hit), `"fresh"` (computed inside
            this prompt) or `"unused"` (found, and yet computed inside this prompt, which was quicker).
        exact: reused where and behind what it was computed, so that nothing of it need be recomputed.
        cached_start: position of its first token when it was computed; `None` if nothing was reused.
        quantised: `"int8"` or `"fp8"`, where its KV was kept in that: near what was computed, and never exact.
    """

    span: tuple[int, int]
    key: str
    status: Status
    exact: bool = False
    cached_start: int | None = None
    quantised: str | None = None


@dataclass(eq=False)
class LayerMaps:
    """Level `"full"`: a figure per layer and token, each (L, T) in fp32; NaN where it is not known.

    Attributes:
        key_deviation, value_deviation: ‖computed − reused‖ / ‖computed‖ over heads and dimensions of a token's K or V,
            where both are known: recomputed tokens at every layer, all candidates up to a check layer. What was
            computed stands on KV that is itself blended: this is no distance from a full prefill.
        attention: attention that a token received from the suffix, mean over heads and rows, where the rule asked for
            it; `None` if it never did.
    """

    key_deviation: torch.Tensor
    value_deviation: torch.Tensor
    attention: torch.Tensor | None = None

    def items(self) -> dict[str, torch.Tensor]:
        """Name -> map, of those that are there."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class BlendTrace:
    """One call of `generate` or `blend`.

    A (token, layer) pair counts as computed when that token went through that layer in this call, the last layer whole
    although rows that nobody reads leave only their K/V there; pairs of chunks prefilled alone are counted apart,
    because a warm store has none.

    Attributes:
        blended: whether the call was blended.
        fallback: why not, as `docs/generate.md` names it; `fallback_reason` says it as a sentence, with what was
            found, what is needed, and what to do.
        num_tokens: T, tokens of the prompt's forward.
        prefix, chunks: what happened to each.
        candidate_idx: (N,) reused tokens that could be recomputed: those of chunks (and of a prefix that is quantised,
            or from another RoPE regime) that are not exact.
        scores: (N,) what the selection rule gave each, in its first round; `None` where nothing was ranked.
        selected_idx: (S,) of these, the recomputed ones.
        fresh_idx: tokens that are always computed: gaps, suffix, in-context misses, the last token.
        computed_pairs, isolated_pairs: see above.
        bytes_reused: bytes of chunk KV that were read to be reused.
        ttft_ms: from the call of `generate` to the first new token on the host; `None` until then.
        decision: what the controller settled, `None` without `recompute_ratios="auto"`.
        verification: how far this call is from its full prefill, where `patch(verify=...)` had it checked: what
            `hfblend.Verification` holds, with `max_kl` and `within_bound`; or `{"error": ...}`.
        notes: remarks, one line each.
        level: of detail.
        settings: of the rule: selection, recompute_ratios, check_layers, chunk_prefix.
        input_ids: (T,) on the CPU, from level `"tokens"` on.
        maps: level `"full"`.
        tokenizer: says what the ids are; never saved.
        texts: of the tokens, in a trace that was saved where a tokenizer was known.
    """

    blended: bool = False
    fallback: str | None = None
    fallback_reason: str = ""
    num_tokens: int = 0
    num_layers: int = 0
    prefix: ChunkTrace | None = None
    chunks: list[ChunkTrace] = field(default_factory=list)
    candidate_idx: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    selected_idx: torch.Tensor | None = None
    fresh_idx: torch.Tensor | None = None
    computed_pairs: int = 0
    isolated_pairs: int = 0
    bytes_reused: int = 0
    ttft_ms: float | None = None
    decision: Decision | None = None
    verification: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    clock: PhaseClock | SavedTimeline | None = field(default=None, repr=False)
    level: Level = "summary"
    settings: dict[str, Any] = field(default_factory=dict)
    input_ids: torch.Tensor | None = field(default=None, repr=False)
    maps: LayerMaps | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    texts: list[str] | None = field(default=None, repr=False)

    def restart(self) -> None:
        """Forgets what was noted, for the same prompt."""
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
    def _quantised(self) -> str:
        """`", 3 in int8"`, chunks and prefix; empty where none is."""
        pieces = [self.prefix, *self.chunks] if self.prefix else self.chunks
        kinds = [piece.quantised for piece in pieces if piece.quantised]
        return "".join(f", {kinds.count(kind)} in {kind}" for kind in dict.fromkeys(kinds))

    @property
    def selected_tokens(self) -> int:
        """How many reused tokens were recomputed."""
        return 0 if self.selected_idx is None else len(self.selected_idx)

    @property
    def computes_all(self) -> bool:
        """Whether every token was computed, exact ones too: ratio 1."""
        ratios = self.settings.get("recompute_ratios") or (0,)
        return all(ratio == 1 for ratio in ratios)

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
        """When each phase ran, and at level `"full"` when each layer was asked for, loaded and computed.

        On a GPU, reading it waits until the work is done; nothing waits before.
        """
        return self.clock.intervals() if self.clock else []

    def token_texts(self, tokenizer: Any = None) -> list[str] | None:
        """Each token's text; `None` without ids, or where no tokenizer is known."""
        if self.texts is not None and tokenizer is None:
            return self.texts
        tokenizer = self.tokenizer if tokenizer is None else require_tokenizer(tokenizer)
        return None if tokenizer is None or self.input_ids is None else texts_of(tokenizer, self.input_ids.tolist())

    def token_columns(self, tokenizer: Any = None) -> dict[str, list[Any]]:
        """Column -> T values: what `to_frame` shows; `None` where something is not known."""
        return columns_of(self, self.token_texts(tokenizer))

    def to_frame(self, tokenizer: Any = None) -> Any:
        """A pandas `DataFrame`, a row per token of the prompt.

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
        from .file import save_trace

        save_trace(self, require_type("path", path, (str, os.PathLike), "the path of a file"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlendTrace:
        """Reads what `save` wrote.

        Raises:
            ValueError: a file that is no trace, or a damaged one.
            OSError: no such file.
        """
        from .file import load_trace

        return load_trace(require_type("path", path, (str, os.PathLike), "the path of a file"))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        plain = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        plain["settings"] = dict(self.settings)
        tensors = {name: None if (t := getattr(self, name)) is None else plain_list(t) for name in TENSORS}
        chunks = {"prefix": self.prefix and vars(self.prefix), "chunks": [vars(chunk) for chunk in self.chunks]}
        decision = None if self.decision is None else asdict(self.decision)
        timeline = self.timeline
        found = {**plain, **chunks, **tensors, "decision": decision, "phase_ms": ms_per_phase(timeline)}
        if self.level != "summary":
            found["timeline"] = [asdict(interval) for interval in timeline]
        if self.maps is not None:
            found["maps"] = {name: plain_list(values) for name, values in self.maps.items().items()}
        return found

    def __str__(self) -> str:
        if not self.blended:
            reason = f" ({self.fallback_reason.rstrip('.')})" if self.fallback_reason else ""
            return f"not blended: {self.fallback or 'no call yet'}{reason}"
        exact = sum(chunk.exact for chunk in self.chunks)
        candidates = 0 if self.candidate_idx is None else len(self.candidate_idx)
        return (
            f"blended {self.num_tokens} tokens: {len(self.chunks)} chunks ({self.hits} hits, {self.misses} misses, "
            f"{exact} exact{self._quantised}), {self.selected_tokens} of {candidates} moved tokens recomputed, "
            f"{self.recomputed_pairs_share:.1%} of a full prefill's (token, layer) pairs"
            + (f", first token after {self.ttft_ms:.0f} ms" if self.ttft_ms is not None else "")
        )


_PLAIN_FIELDS = (
    "blended", "fallback", "fallback_reason", "num_tokens", "num_layers", "hits", "misses", "reused_tokens",
    "selected_tokens", "computed_pairs", "isolated_pairs", "total_pairs", "recomputed_pairs_share", "bytes_reused",
    "ttft_ms", "verification", "notes", "level",
)  # fmt: skip
TENSORS = ("candidate_idx", "scores", "selected_idx", "fresh_idx", "input_ids")


def plain_list(values: torch.Tensor) -> list[Any]:
    """Nested lists, `None` for what is no number: JSON knows no NaN."""
    plain = values.tolist()
    if not values.is_floating_point() or bool(values.isfinite().all()):
        return plain

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(one) for one in value]
        return value if math.isfinite(value) else None

    return cleaned(plain)
