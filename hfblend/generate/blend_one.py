"""A prompt blended outside `generate`: its logits, its cache, its trace."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..arguments import described, require
from ..blend.algorithm import Blend
from ..config import BlendConfig, as_config
from ..controller import Controller
from ..prompts.prompt import Prompt
from ..store import Store, store_at
from ..support.registry import model_of
from ..trace.facts import Level
from ..trace.trace import BlendTrace, as_level
from .blending import Blending
from .hand_over import hand_over


@dataclass
class BlendResult:
    """The result of `blend`.

    Attributes:
        logits: (1, vocabulary) of the first new token.
        cache: KV of every prompt token but the last, so that `model.generate(ids, past_key_values=cache)` continues it.
        trace: of this blend.
    """

    logits: torch.Tensor
    cache: DynamicCache
    trace: BlendTrace


@torch.no_grad()
def blend(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    algorithm: type[Blend] | None = None,
    controller: Controller | None = None,
    trace: Level = "summary",
) -> BlendResult:
    """Blends one prompt, outside `generate`. The model may be patched or not; it is not changed.

    >>> result = blend(model, prompt, store=store)  # doctest: +SKIP
    >>> model.generate(prompt.input_ids, past_key_values=result.cache)  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode.
        prompt: any prompt; one without chunks is prefilled in full.
        store: of chunk KV: a store, a folder or a URL; default, a new `MemoryStore`.
        config: default `BlendConfig()`. `min_reused_tokens` is not applied here.
        algorithm: a subclass of `Blend` with another phase, as those of `hfblend.lab.baselines`.
        controller: settles `recompute_ratios="auto"`; needed for that.
        trace: its level of detail, `"summary"`, `"tokens"` or `"full"`: see `hfblend.BlendTrace`.

    Raises:
        UnsupportedModel: the model's KV cannot be moved.
        ValueError: a check layer beyond the model, a model in training mode, `torch.autocast` in another dtype,
            `"auto"` without a controller, or no such level.
        TypeError: an argument of another type.
    """
    tested, config, prompt, store = model_of(model), as_config(config), require_prompt(prompt), store_at(store)
    if algorithm is not None and not (isinstance(algorithm, type) and issubclass(algorithm, Blend)):
        raise TypeError(f"algorithm must be a subclass of hfblend.blend.algorithm.Blend, got {described(algorithm)}.")
    require("controller", controller, (Controller, type(None)), "a hfblend.controller.Controller")
    noted = BlendTrace(level=as_level(trace))
    state = Blending(
        tested, prompt.input_ids, prompt.chunk_spans, store, config, noted,
        controller=controller, algorithm=algorithm or Blend,
    )  # fmt: skip
    output = state.run(tested.last_logits)
    cache = DynamicCache(config=tested.config)
    hand_over(state.buffers, len(prompt) - 1, 1, cache)
    state.observer.phase_done("hand_over")
    return BlendResult(output.logits[:, -1], cache, noted)


def require_prompt(prompt: Any, name: str = "prompt", expected: str = "a hfblend.Prompt") -> Prompt:
    """Returns the prompt.

    Raises:
        TypeError: text, ids or `prompt.inputs()`; says how to make a prompt of them.
    """
    if isinstance(prompt, Prompt):
        return prompt
    how = "make one with Prompt.from_texts, Prompt.from_chat or Prompt(input_ids, chunk_spans)"
    if isinstance(prompt, Mapping):
        how = "pass the prompt itself, not its inputs()"
    raise TypeError(f"{name} must be {expected}, got {described(prompt)}: {how}.")


def require_prompts(prompts: Any, asked_by: str) -> list[Prompt]:
    """Returns several prompts as a list.

    Raises:
        TypeError: not prompts only.
        ValueError: an empty list.
    """
    if isinstance(prompts, Prompt):
        raise TypeError("prompts must be a list of prompts, got one prompt; write [prompt].")
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        require_prompt(prompts, "prompts", "a hfblend.Prompt or a list of them")
    listed = [require_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    if not listed:
        raise ValueError(f"{asked_by} needs one or more prompts, got none.")
    return listed
