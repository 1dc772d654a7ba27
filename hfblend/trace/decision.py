"""The ratio that a controller settled for one prompt, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """What to do with one prompt, and the forecast behind it, in ms.

    Attributes:
        ratio: to recompute; `None`: compute the prompt in full.
        reason: in words.
        full_ms, compute_ms, load_ms: a full prefill; the blend's own computing, and its loading.
        ttft_ms: of what was decided; `None`, and `load_ms` too, where a tier is not known.
    """

    ratio: float | None
    reason: str
    full_ms: float
    compute_ms: float
    load_ms: float | None
    ttft_ms: float | None

    @property
    def share(self) -> float:
        """The ratio, 1 where the prompt is computed in full."""
        return 1.0 if self.ratio is None else self.ratio
