"""Distances between blended output and a full prefill's, and the logits that they compare.

Shapes: P predicted tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..model.hf_model import CACHE


def kl_divergence(full_logits: torch.Tensor, other_logits: torch.Tensor) -> torch.Tensor:
    r"""KL(full || other) of each predicted token, in nats, in fp32.

        KL(p || q) = Σ_v p_v (log p_v − log q_v)

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])

    Args:
        full_logits, other_logits: (P, V).

    Returns:
        (P,)
    """
    _require_same_shape(full_logits, other_logits)
    log_p, log_q = full_logits.float().log_softmax(-1), other_logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).clamp_min(0)


def top1_agreement(full_logits: torch.Tensor, other_logits: torch.Tensor) -> float:
    """The share in [0, 1] of predicted tokens whose most likely token is the same, from logits (P, V) each."""
    _require_same_shape(full_logits, other_logits)
    return (full_logits.argmax(-1) == other_logits.argmax(-1)).float().mean().item()


def _require_same_shape(full_logits: torch.Tensor, other_logits: torch.Tensor) -> None:
    if full_logits.ndim != 2 or full_logits.shape != other_logits.shape:
        raise ValueError(
            f"Logits must be (P, V) and of one shape, got {tuple(full_logits.shape)} and {tuple(other_logits.shape)}."
        )


@torch.no_grad()
def teacher_forced_logits(
    model: Any, prompt_ids: torch.Tensor, forced_ids: Sequence[int], cache: Cache | None = None
) -> torch.Tensor:
    """The logits with which a model predicts each of `forced_ids` after a prompt, in one stock forward.

    >>> full = teacher_forced_logits(model, prompt.input_ids, answer_ids)  # doctest: +SKIP
    >>> blended = hfblend.blend(model, prompt, store=store)  # doctest: +SKIP
    >>> other = teacher_forced_logits(model, prompt.input_ids, answer_ids, blended.cache)  # doctest: +SKIP

    Args:
        prompt_ids: (1, T).
        forced_ids: the P tokens to predict; each sees those before it, whatever would have been predicted.
        cache: KV of the first T − 1 prompt tokens, which then grows by the forced ones; `None` is a full prefill.

    Returns:
        (P, V)

    Raises:
        ValueError: a cache of another length, or no tokens to predict.
    """
    if not forced_ids:
        raise ValueError("forced_ids needs at least one token to predict, got none.")
    length = prompt_ids.shape[1]
    if cache is not None and cache.get_seq_length() != length - 1:
        raise ValueError(
            f"The cache must hold all prompt tokens but the last ({length - 1}), got {cache.get_seq_length()}; "
            "`hfblend.blend` returns such a cache."
        )
    forced = torch.tensor([list(forced_ids[:-1])], dtype=prompt_ids.dtype, device=prompt_ids.device)
    ids = torch.cat([prompt_ids if cache is None else prompt_ids[:, -1:], forced], 1).to(model.device)
    logits = model(input_ids=ids, logits_to_keep=len(forced_ids), **{CACHE: cache}).logits
    return logits[0, -len(forced_ids) :]


def describe_machine(device: torch.device) -> str:
    """The processor that ran a measurement, in one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
