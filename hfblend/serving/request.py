"""One request: whether its prompt is blended, and what its blocks are found under."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..config import BlendConfig, as_config
from ..generate.blending import require_known
from ..generate.fallbacks import Fallback
from ..prompts.filler import require_filler
from ..prompts.prompt import ChunkSpans, Prompt
from ..support.registry import TestedModel
from ..trace.trace import BlendTrace

_MOST_CHUNKS = 512  # a chunk that is missing is prefilled alone, in one step of the engine with all others


def checked(config: BlendConfig | None, model: TestedModel) -> BlendConfig:
    """Returns settings of requests; raises `ValueError` for those that would fail at every prompt."""
    config = as_config(config)
    config.require_layers(model.num_kv_layers)
    if config.is_auto:
        raise ValueError('The engine needs recompute_ratios as numbers, say (0.15,), got "auto".')
    if config.chunk_prefix == "filler":
        require_filler(config.filler_ids)
    return config


@dataclass
class Request:
    """A prompt on its way through the engine.

    Attributes:
        blends: whether it is to be blended; an error ends that.
        trace: of its blend; otherwise it says why it was not blended.
        num_matched: first tokens whose K/V were in blocks of an earlier request.
        is_cancelled: has no more outputs; its blocks are freed at the next step.
    """

    prompt: Prompt
    config: BlendConfig
    trace: BlendTrace
    blends: bool = field(init=False, default=True)
    num_matched: int = field(init=False, default=0)
    is_cancelled: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        num_chunk_tokens = sum(stop - start for start, stop in self.prompt.chunk_spans)
        reasons = {
            Fallback.DISABLED: not self.config.enabled,
            Fallback.NO_CHUNKS: not num_chunk_tokens,
            Fallback.TOO_FEW_TOKENS: num_chunk_tokens < self.config.min_reused_tokens,
        }
        if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
            self.prefill(reason.name.lower(), reason.reason)

    @classmethod
    def of(cls, model: TestedModel, prompt: Prompt | Sequence[int], config: BlendConfig) -> Request:
        """A request of a prompt, or of plain ids.

        Raises:
            ValueError: no ids, ids that the model has not, or so many chunks that a blend would hold up all others.
        """
        if len(prompt) == 0:
            raise ValueError("A prompt needs one or more tokens, got none.")
        if not isinstance(prompt, Prompt):
            prompt = Prompt(torch.tensor([list(prompt)], dtype=torch.int64), ChunkSpans(()))
        if (count := len(prompt.chunk_spans)) > _MOST_CHUNKS:
            raise ValueError(f"A prompt may have {_MOST_CHUNKS} chunks here, got {count}: join short ones.")
        require_known(array("q", prompt.ids), model.num_ids)
        return cls(prompt, checked(config, model), BlendTrace(num_tokens=len(prompt), num_layers=model.num_layers))

    def prefill(self, name: str, reason: str) -> None:
        """Leaves the prompt to a full prefill."""
        self.blends, self.trace.blended, self.trace.fallback, self.trace.fallback_reason = False, False, name, reason

    @property
    def num_blended(self) -> int:
        """Tokens up to the end of the last chunk, without the prompt's last token.

        A prefill of those after them, with the blended K/V before them, computes what blending computes.
        """
        return min(self.prompt.chunk_spans[-1][1], len(self.prompt) - 1)

    @cached_property
    def _digest(self) -> Any:
        """Of all that blended K/V depend on: the whole prompt, since its end may choose what is recomputed."""
        settings = repr((self.config, tuple(self.prompt.chunk_spans))).encode()
        return hashlib.sha256(settings + array("q", self.prompt.ids).tobytes())

    def salted(self, ids: list[int], page_size: int) -> list[int]:
        """Returns ids to be hashed page by page, each page's hash made from the one before it.

        The first page gives way to a digest of itself and of what sets this request apart: the namespace and, of a
        blended one, prompt and settings. No other request finds any of its pages.
        """
        if len(ids) < page_size:
            return ids
        salt = self._digest.copy() if self.blends else hashlib.sha256(b"plain")
        salt.update(repr((self.config.namespace, ids[:page_size])).encode())
        words = array("i", salt.digest())[:page_size]
        return [*words, *[0] * (page_size - len(words)), *ids[page_size:]]
