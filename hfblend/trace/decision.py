"""A controller's decision on one prompt."""

from __future__ import annotations

from dataclasses import dataclass


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
