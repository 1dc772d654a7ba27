"""What a call did: what was reused, what was recomputed, and where the milliseconds and bytes went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from .controller import Decision

Status = Literal["hit", "miss", "fresh", "unused"]


class PhaseClock:
    """Milliseconds per phase. On a GPU, events are recorded now and read only when somebody looks: no synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end_of(self, phase: str) -> None:
        """Ends a phase; the next one begins."""
        self._marks.append((phase, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Phase -> milliseconds, phases of the same name added up."""
        spent: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:]):
            if self._on_gpu:
                end.synchronize()
                ms = begin.elapsed_time(end)
            else:
                ms = 1000 * (end - begin)
            spent[phase] = spent.get(phase, 0.0) + ms
        return spent


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


@dataclass
class BlendTrace:
    """One call of `generate` or `blend`.

    A (token, layer) pair counts as computed when that token went through that layer in this call, the last layer whole
    although rows that nobody reads leave only their K/V there; pairs of chunks prefilled alone are counted apart,
    because a warm store has none.

    Attributes:
        blended: whether the call was blended; if not, `fallback` says why (see `docs/fallbacks.md`).
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
    """

    blended: bool = False
    fallback: str | None = None
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
    clock: PhaseClock | None = field(default=None, repr=False)

    def restart(self) -> None:
        """Forgets what was noted, for the same prompt."""
        vars(self).update(vars(BlendTrace(num_tokens=self.num_tokens, num_layers=self.num_layers)))

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
        return self.clock.milliseconds() if self.clock else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        plain = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        tensors = {
            name: None if (t := getattr(self, name)) is None else t.tolist()
            for name in ("candidate_idx", "scores", "selected_idx", "fresh_idx")
        }
        chunks = {"prefix": self.prefix and vars(self.prefix), "chunks": [vars(chunk) for chunk in self.chunks]}
        decision = None if self.decision is None else asdict(self.decision)
        return {**plain, **chunks, **tensors, "decision": decision, "phase_ms": self.phase_ms}

    def __str__(self) -> str:
        if not self.blended:
            return f"not blended: {self.fallback or 'no call yet'}"
        exact = sum(chunk.exact for chunk in self.chunks)
        candidates = 0 if self.candidate_idx is None else len(self.candidate_idx)
        return (
            f"blended {self.num_tokens} tokens: {len(self.chunks)} chunks ({self.hits} hits, {self.misses} misses, "
            f"{exact} exact{self._quantised}), {self.selected_tokens} of {candidates} moved tokens recomputed, "
            f"{self.recomputed_pairs_share:.1%} of a full prefill's (token, layer) pairs"
            + (f", first token after {self.ttft_ms:.0f} ms" if self.ttft_ms is not None else "")
        )


_PLAIN_FIELDS = (
    "blended", "fallback", "num_tokens", "num_layers", "hits", "misses", "reused_tokens", "selected_tokens",
    "computed_pairs", "isolated_pairs", "total_pairs", "recomputed_pairs_share", "bytes_reused", "ttft_ms",
    "verification", "notes",
)  # fmt: skip
