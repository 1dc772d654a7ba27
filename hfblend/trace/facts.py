"""The facts of one call, without what reads, shows or saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .timeline import Interval

Status = Literal["hit", "miss", "fresh", "unused"]
Level = Literal["summary", "tokens", "full"]
TENSORS = ("candidate_idx", "scores", "selected_idx", "fresh_idx", "input_ids", "offsets")


@dataclass
class ChunkTrace:
    """The way of one chunk, or of the prefix, through a call.

    Attributes:
        span: [start, stop) in the prompt.
        key: the store's key (a hex digest); empty for what the user's cache held.
        status: `"hit"` (found), `"miss"` (prefilled alone, stored, then used like a hit), `"fresh"` (computed inside
            this prompt) or `"unused"` (found, and yet computed inside this prompt, which was quicker).
        exact: reused at its old position, after the same tokens, so that none of it needs recomputing.
        cached_start: position of its first token when it was computed; `None` if nothing was reused.
        quantised: `"int8"` or `"fp8"` if its KV was stored so: close to what was computed, and never exact.
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
            where both are known: recomputed tokens at every layer, all candidates up to a check layer. Computed K/V
            stand on KV that is itself blended: this is no distance from a full prefill.
        attention: attention that a token received from the suffix, mean over heads and rows, where the rule asked for
            it; `None` if it never did.
    """

    key_deviation: torch.Tensor
    value_deviation: torch.Tensor
    attention: torch.Tensor | None = None

    def items(self) -> dict[str, torch.Tensor]:
        """Returns name -> map, without absent ones."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Decision:
    """The ratio for one prompt, the reason, and the forecast that it rests on, in ms.

    Attributes:
        ratio: to recompute; `None`: compute the prompt in full.
        reason: as a message.
        full_ms, compute_ms, load_ms: of a full prefill, of the blend's computing, and of its loading.
        ttft_ms: of the decision; `None`, and `load_ms` too, where a tier is not known.
    """

    ratio: float | None
    reason: str
    full_ms: float
    compute_ms: float
    load_ms: float | None
    ttft_ms: float | None

    @property
    def share(self) -> float:
        """The ratio; 1 where the prompt is computed in full."""
        return 1.0 if self.ratio is None else self.ratio


@dataclass
class Facts:
    """The attributes of a `BlendTrace`, which explains them."""

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
    intervals: Callable[[], list[Interval]] = field(default=list, repr=False, compare=False)
    level: Level = "summary"
    settings: dict[str, Any] = field(default_factory=dict)
    input_ids: torch.Tensor | None = field(default=None, repr=False)
    offsets: torch.Tensor | None = field(default=None, repr=False)
    maps: LayerMaps | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    texts: list[str] | None = field(default=None, repr=False)

    @property
    def pieces(self) -> list[ChunkTrace]:
        """The prefix, if there is one, and the chunks."""
        return [self.prefix, *self.chunks] if self.prefix else self.chunks

    @property
    def computes_all(self) -> bool:
        """Whether every token was computed, exact ones too: ratio 1."""
        ratios = self.settings.get("recompute_ratios") or (0,)
        return all(ratio == 1 for ratio in ratios)
