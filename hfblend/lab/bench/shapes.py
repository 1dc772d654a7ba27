"""Models of a known shape with random weights (time does not depend on their values), and a model's unpatched twin."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ...demo.model import device_named

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {  # Llama-3.1-8B's
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}


def random_model(shape: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A Llama of that shape in eval mode, with `attn_implementation="sdpa"`.

    Args:
        shape: a name from `SHAPES`.
        device: default, the GPU if there is one, else the CPU.
        dtype: default, float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; the shapes are {', '.join(SHAPES)}.")
    device = device_named(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with device:  # weights and rotary tables are made where they stay
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def twin_of(model: Any) -> Any:
    """Another instance over the same weights: patching one leaves the other stock, so that both can take turns."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
