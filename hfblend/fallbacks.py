"""Which calls of `generate` are blended, and why the others are not. `docs/fallbacks.md` lists the same reasons."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .config import BlendConfig
from .host import cache_given
from .prompt import ChunkSpans
from .separator import Separator


class Fallback(enum.Enum):
    """A reason for which a call goes through stock `generate`: what it says, and how loudly."""

    DISABLED = ("blending is disabled by its config.", logging.INFO)
    TRAINING_MODE = ("the model is in training mode; call model.eval().", logging.WARNING)
    NO_INPUT_IDS = ("there are no input_ids to find chunks in (inputs_embeds, or nothing).", logging.WARNING)
    BATCH = ("the batch holds different prompts; generate them one by one.", logging.WARNING)
    NO_CHUNKS = ("the prompt has no chunks: no chunk_spans, and no separator in its ids.", logging.INFO)
    TOO_FEW_TOKENS = ("the chunks have fewer tokens than min_reused_tokens.", logging.INFO)
    PADDING = ("the prompt is padded.", logging.WARNING)
    FILLED_CACHE = ("past_key_values is not empty: a second turn continues it.", logging.INFO)
    NO_CACHE = ("use_cache=False leaves nothing to put KV into.", logging.WARNING)
    ALL_ROWS_WANTED = ("hidden states or attentions of all tokens are asked for.", logging.WARNING)
    EXTRA_INPUTS = ("per-token inputs beside input_ids (position_ids, token types) are given.", logging.WARNING)
    NESTED = ("this generate runs inside another one of the same model (early-exit drafts).", logging.INFO)
    NOT_REACHED = ("no forward over the whole prompt reached the decoder (a compiled forward).", logging.WARNING)

    @property
    def reason(self) -> str:
        return self.value[0]

    @property
    def level(self) -> int:
        return self.value[1]


@dataclass
class Plan:
    """What a call is to be: blended, with its ids (1, T) and spans; or stock, with the reason."""

    num_tokens: int
    input_ids: torch.Tensor | None = None
    spans: ChunkSpans = field(default_factory=lambda: ChunkSpans(()))
    fallback: Fallback | None = None


def plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chunk_spans: ChunkSpans | None,
    config: BlendConfig,
    separator: Separator | None,
    nested: bool,
) -> Plan:
    """Decides about one call of `generate(*args, **kwargs)`, before anything runs.

    Raises:
        ValueError: chunk spans that do not fit the prompt.
    """
    ids = _input_ids(args, kwargs)
    if chunk_spans is not None and ids is not None:
        chunk_spans.check(ids.shape[1])
    num_tokens = 0 if ids is None else ids.shape[1]
    fallback = _before_splitting(model, ids, kwargs, config, nested)
    if fallback or ids is None:
        return Plan(num_tokens, fallback=fallback)
    spans = chunk_spans if chunk_spans is not None else _split(ids[0].tolist(), separator, config)
    fallback = _after_splitting(model, ids, kwargs, spans, config)
    return Plan(num_tokens, None if fallback else ids[:1], spans, fallback)


def _before_splitting(
    model: nn.Module, ids: torch.Tensor | None, kwargs: dict[str, Any], config: BlendConfig, nested: bool
) -> Fallback | None:
    if not config.enabled:
        return Fallback.DISABLED
    if nested:
        return Fallback.NESTED
    if model.training:
        return Fallback.TRAINING_MODE
    if ids is None or kwargs.get("inputs_embeds") is not None:
        return Fallback.NO_INPUT_IDS
    return Fallback.BATCH if (ids != ids[:1]).any() else None


def _after_splitting(
    model: nn.Module, ids: torch.Tensor, kwargs: dict[str, Any], spans: ChunkSpans, config: BlendConfig
) -> Fallback | None:
    cache = cache_given(kwargs)
    if not spans:
        return Fallback.NO_CHUNKS
    if sum(stop - start for start, stop in spans) < config.min_reused_tokens:
        return Fallback.TOO_FEW_TOKENS
    if _is_padded(model, ids, kwargs):
        return Fallback.PADDING
    if isinstance(cache, Cache) and int(cache.get_seq_length()) > 0:
        return Fallback.FILLED_CACHE
    if generate_option(model, kwargs, "use_cache") is False:
        return Fallback.NO_CACHE
    if any(generate_option(model, kwargs, name) for name in ("output_hidden_states", "output_attentions")):
        return Fallback.ALL_ROWS_WANTED
    if any(_is_per_token(value, ids) for name, value in kwargs.items() if name not in _TOKEN_INPUTS):
        return Fallback.EXTRA_INPUTS
    return None


_TOKEN_INPUTS = ("input_ids", "inputs", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask")


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    ids = next((v for v in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]) if v is not None), None)
    is_ids = torch.is_tensor(ids) and ids.ndim == 2 and not ids.is_floating_point() and ids.numel() > 0
    return ids if is_ids else None


def _split(ids: list[int], separator: Separator | None, config: BlendConfig) -> ChunkSpans:
    if separator is None:
        return ChunkSpans(())
    spans = ChunkSpans(separator.chunk_spans(ids))
    if not spans and len(ids) >= config.min_reused_tokens:
        separator.warn_if_hidden(ids)
    return spans


def _is_padded(model: nn.Module, ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether `generate` would mask some tokens: by the given mask, or because they are the padding token."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return bool(mask.shape != ids.shape or (mask != 1).any())
    pad, eos = (generate_option(model, kwargs, f"{kind}_token_id") for kind in ("pad", "eos"))
    eos = eos if isinstance(eos, list | tuple) else [eos]
    return pad is not None and pad not in eos and bool((ids == pad).any())


def _is_per_token(value: Any, ids: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.ndim >= 2 and value.shape[1] == ids.shape[1]


def generate_option(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` would resolve it: the call's, its `generation_config`'s, the model's."""
    if name in kwargs:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None
