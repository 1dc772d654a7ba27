"""Attention over blocks on a GPU without flash-attn: PyTorch's flash attention for prompts, our kernel for decoding.

Transformers decodes with block tables, inside CUDA graphs, only with flash-attn 2 or 3. With PyTorch's attention it
gathers all keys of all prompts for each new token, and makes masks of them.

Shapes: H query heads, Hkv KV heads, S new tokens of all prompts, T their keys, B prompts, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..kernels.device import HAS_TRITON
from ..support.registry import TestedModel

if HAS_TRITON:
    from ..kernels.paged import decode

NAME = "hfblend_flash_paged"  # for attention with "flash" in its name, Transformers makes no masks
_LARGEST_HEAD = 256


def takes(hf_model: TestedModel) -> bool:
    """Whether all layers of a model attend as these kernels do: to all tokens before, without softcap or sinks."""
    config: Any = getattr(hf_model.layer_owner, "config", hf_model.config)
    layouts = hf_model.layouts.values()
    return (
        hf_model.takes_kernels
        and hf_model.attends_by_position
        and hf_model.dtype.itemsize == 2
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not any(getattr(config, name, None) for name in ("sliding_window", "attn_logit_softcapping"))
        and not any(hasattr(module, "sinks") for module in hf_model.layer_owner.modules())
        and all(layout.key_dim == layout.value_dim <= _LARGEST_HEAD for layout in layouts)
    )


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object = None,
    scaling: float | None = None, *, cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, max_length_q: int,
    max_length_k: int, block_table: torch.Tensor | None = None, k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as Transformers calls it in a step of continuous batching.

    Args:
        query: (1, H, S, D).
        key, value: (1, Hkv, T, D), which the cache has gathered; with a block table, of the new tokens only.
        cu_seq_lens_q, cu_seq_lens_k: (B + 1,) int32.
        block_table: (B, any) int32, pages in `k_cache` and `v_cache`; each prompt has one new token.

    Returns:
        (1, S, H, D), and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if block_table is not None:
        assert k_cache is not None
        assert v_cache is not None
        out = decode(query, (key, value), (k_cache, v_cache), block_table, cu_seq_lens_k, scaling)
        return out.transpose(1, 2), None
    # The function in `torch.nn.attention.varlen` that calls this takes heads in groups from PyTorch 2.12 on.
    out = torch.ops.aten._flash_attention_forward(
        *(states[0].transpose(0, 1) for states in (query, key, value)), cu_seq_lens_q, cu_seq_lens_k,
        max_length_q, max_length_k, 0.0, True, False, scale=scaling,
    )[0]  # fmt: skip
    return out[None], None


AttentionInterface.register(NAME, attend)
