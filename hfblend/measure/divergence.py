"""Distances between blended output and a full prefill's, and the logits that they compare.

Shapes: P predicted tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..arguments import number_in, whole
from ..model.hf_model import CACHE
from ..prompts.prompt import Prompt
from ..support.registry import model_of

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # to be tried, upwards


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


@dataclass(frozen=True)
class FullAnswer:
    """Full prefill's greedy answer to a prompt: P ids, and the logits (P, V) in fp32 that each was chosen by."""

    ids: list[int]
    logits: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, prompt: Prompt, num_tokens: int, until_end: bool = False) -> FullAnswer:
        """Prefills and decodes once, by the model's stock code; `until_end` lets the model end the answer earlier."""
        return cls(*greedy(model, prompt, whole("num_tokens", num_tokens, 1), until_end))


def greedy(
    model: nn.Module, prompt: Prompt, num_tokens: int, until_end: bool = False, cache: Cache | None = None
) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, and the logits (P, V) before any processor changed them, of the class's stock `generate`."""
    given: dict[str, Any] = {} if until_end else {"min_new_tokens": num_tokens}
    given |= {} if cache is None else {CACHE: cache}
    input_ids = prompt.input_ids.to(model_of(model).device)
    kind: Any = type(model)
    unused = dict.fromkeys(("temperature", "top_p", "top_k"))  # settings of sampling, which warn without it
    output = kind.generate(
        model, input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=num_tokens,
        do_sample=False, num_beams=1, num_return_sequences=1, output_logits=True, return_dict_in_generate=True,
        **given, **unused,
    )  # fmt: skip
    return output.sequences[0, input_ids.shape[1] :].tolist(), torch.cat(output.logits).float()


def require_bound(max_kl: Any) -> None:
    """Raises `ValueError` or `TypeError` unless it is a number of nats, 0 or more."""
    number_in("max_kl, in nats,", max_kl, 0, float("inf"))


def describe_machine(device: torch.device) -> str:
    """The processor that ran a measurement, in one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
