"""One prompt blended outside `generate`: its logits, its cache, its trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .blending import Blending
from .caches import hand_over
from .config import BlendConfig
from .controller import Controller
from .models import host_of
from .prompt import Prompt
from .store import MemoryStore, Store
from .trace import BlendTrace, Level, as_level


@dataclass
class BlendResult:
    """What `blend` returns.

    Attributes:
        logits: (1, vocabulary) of the first new token.
        cache: KV of every prompt token but the last, so that `model.generate(ids, past_key_values=cache)` continues it.
        trace: what was done.
    """

    logits: torch.Tensor
    cache: DynamicCache
    trace: BlendTrace


def blend(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | None = None,
    config: BlendConfig | None = None,
    algorithm: type[Blending] | None = None,
    controller: Controller | None = None,
    trace: Level = "summary",
) -> BlendResult:
    """Blends one prompt, outside `generate`. The model may be patched or not; it is not changed.

    >>> result = blend(model, prompt, store=store)  # doctest: +SKIP
    >>> model.generate(prompt.input_ids, past_key_values=result.cache)  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode.
        prompt: any prompt; one without chunks is prefilled in full.
        store: where chunk KV is looked up and kept; default, a new `MemoryStore`.
        config: default `BlendConfig()`. `min_reused_tokens` is not applied here.
        algorithm: a subclass of `Blending` that does a phase in another way, as those of `hfblend.baselines`.
        controller: settles `recompute_ratios="auto"`; needed for that.
        trace: its level of detail, `"summary"`, `"tokens"` or `"full"`: see `hfblend.BlendTrace`.

    Raises:
        UnsupportedModel: the model's KV cannot be moved.
        ValueError: a check layer beyond the model, a model in training mode, `torch.autocast` in another dtype,
            `"auto"` without a controller, or no such level.
    """
    host, config = host_of(model), BlendConfig() if config is None else config
    with torch.no_grad():
        store = MemoryStore() if store is None else store
        noted = BlendTrace(level=as_level(trace))
        state = (algorithm or Blending)(
            host, prompt.input_ids, prompt.chunk_spans, store, config, noted, controller=controller
        )  # fmt: skip
        output = state.run(host.last_logits)
        cache = DynamicCache(config=host.config)
        hand_over(state.buffers, len(prompt) - 1, 1, cache)
        state.clock.end_of("hand_over")
    return BlendResult(output.logits[:, -1], cache, state.trace)
