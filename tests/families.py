"""Tiny random models of every decoder family that the installed Transformers has.

`SETTINGS` says what a family needs beside `COMMON` so that it can be built small, and so that its peculiarity shows: a
window or chunk shorter than the prompt, layers of both kinds, K/V that are really shared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from helpers import VOCABULARY
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW, CHUNK = 24, 16
LARGEST = 20_000_000  # parameters
SPREAD = 0.2  # of what would be ones or zeros

# Given to every config that knows the name.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "n_vocab": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.15, "init_std": 0.15,  # logits far enough apart for greedy tokens to mean something
    "use_cache": True,
    "is_decoder": True, "tie_word_embeddings": False,
    # layers
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "decoder_layers": 4, "encoder_layers": 2,
    # width
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim_model": 64, "word_embed_proj_dim": 64, "embedding_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "ffn_hidden_size": 96,
    "dim_ff": 96, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "dim_head": 16,
    "rotary_dim": 8,
    # positions
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "sliding_window": WINDOW, "attention_chunk_size": CHUNK,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
}  # fmt: skip

# Latent attention: all query heads have keys of their own, of which a part is turned.
LATENT: dict[str, Any] = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip

INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32}
CHUNKED = ["chunked_attention", "full_attention"] * 2
BOTH = ["sliding_attention", "full_attention"] * 2
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = DEFAULT_ROPE | {"mrope_section": [2, 3, 3]}
WINDOW_FROM_LAYER_2 = {"use_sliding_window": True, "max_window_layers": 2}
SHORT_AND_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}

# Beside a text model: a tower that text-only prompts never enter.
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_layers": 1,
    "depth": 1, "num_heads": 2, "embed_dim": 32, "image_size": 32, "patch_size": 16, "out_hidden_size": 64,
    "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "projection_dim": 64,
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "head_dim": 16,
    "num_key_value_heads": 2, "num_global_layers": 1, "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0], "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    "max_num_tiles": 1,
}  # fmt: skip

# Family, or family and variant -> its settings beside COMMON.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(BOTH[:2], DEFAULT_ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | INDEX,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "gemma4_text": {"layer_types": BOTH * 2, "num_hidden_layers": 8, "num_kv_shared_layers": 4},
    "gemma4_text short": {"num_kv_shared_layers": 2},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | INDEX,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"layer_types": CHUNKED, "no_rope_layers": [1, 0, 1, 0]},
    "llama4_text tuned": {"layer_types": CHUNKED, "no_rope_layers": [1, 0, 1, 0], "floor_scale": 16},
    "llava": {"text_config": {"model_type": "llama"}},
    "longcat_flash": LATENT | {"num_layers": 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": LATENT,
    "phi3 partial": {"rope_parameters": DEFAULT_ROPE | {"partial_rotary_factor": 0.5}},
    "phi3 longrope": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_parameters": SHORT_AND_LONG,
    },
    "qwen2": WINDOW_FROM_LAYER_2,
    "qwen3": WINDOW_FROM_LAYER_2,
    "qwen2_moe": WINDOW_FROM_LAYER_2,
    "qwen3_moe": WINDOW_FROM_LAYER_2,
    "qwen2_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "qwen3_vl": {"text_config": {"rope_parameters": SECTIONS}},
    "sarvam_mla": LATENT,
    "smollm3": {"use_sliding_window": True, "layer_types": BOTH, "no_rope_layers": [1, 1, 0, 1]},
    "youtu": LATENT,
    "zaya": {"num_experts_per_tok": 1},
}

# Built with their vision tower; only text goes in.
WITH_TOWER = (
    "gemma3", "gemma4", "internvl", "llama4", "llava", "mistral3", "mllama", "paligemma", "qwen2_5_vl", "qwen2_vl",
    "qwen3_vl", "smolvlm",
)  # fmt: skip


# Reason -> families that `patch` refuses with it.
_REASONS = {
    "which keep more than keys and values": """
        axk2 bailing_hybrid bamba deepseek_v32 falcon_h1 falcon_mamba glm_moe_dsa granitemoehybrid hy_v4
        inkling2_loop_text inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba
        mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next
        recurrent_gemma zamba zaya
    """,
    "differ from a forward over all tokens": """
        bart bigbird_pegasus blenderbot blenderbot-small bloom marian mbart mvp pegasus plbart roformer trocr
    """,
    "keys and values both change": """
        bert bert-generation big_bird biogpt camembert ctrl data2vec-text electra ernie git gpt-sw3 gpt2
        gpt_bigcode gpt_neo megatron-bert opt rembert roberta roberta-prelayernorm roc_bert whisper xglm xlm
        xlm-roberta xlm-roberta-xl
    """,
    "what a token gives depends on those after it": """
        paligemma
    """,
    "what comes out of it changes": """
        dory
    """,
    "a norm with weights after the rotation": """
        hunyuan_v1_dense hunyuan_v1_moe
    """,
    "cannot run with explicit position_ids and a cache": """
        cpmant gemma4_unified_assistant prophetnet xlstm xmod
    """,
    "decoder layers, as many as its config says": """
        hrm_text longcat_flash
    """,
    "caches no keys and values": """
        openai-gpt rwkv xlnet
    """,
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

# These pass, or are refused for the reason above, from a later Transformers on. 5.17 makes no masks of chunks ahead;
# before 5.24 codegen and gptj have no rotary module, mllama takes no lengths by row, and cohere_compass_text is large.
LATER = {
    "codegen", "cohere_compass_text", "doge", "gemma4_unified_assistant", "gptj", "llama4", "llama4_text",
    "llama4_text tuned", "mllama", "recurrent_gemma", "xlm",
}  # fmt: skip
IS_OLDEST = Version(transformers.__version__) < Version("5.24")

# Family -> why no small random model of it is here.
NOT_BUILT = {
    "blt": "its smallest form has 96 million parameters: tables of byte groups",
    "deepseek_v4": "its smallest form has 20 million parameters",
    "dots3_note": "its towers do not take small settings",
    "dots3_note_text": "its smallest form has 97 million parameters",
    "gemma3n": "its towers need timm; `gemma3n_text` is its decoder",
    "gemma4_assistant": "a draft model of gemma4, which reads the K/V of another model",
    "musicgen": "its decoder is called with codes of several codebooks",
    "musicgen_melody": "its decoder is called with codes of several codebooks",
    "qwen4_exp": "its config takes no small settings",
    "qwen4_exp_text": "its config takes no small settings",
    "reformer": "no K/V cache of Transformers' kind",
    "zamba2": "its config takes no small settings; recurrent layers",
}


@torch.no_grad()
def as_trained(model: Any) -> Any:
    """Puts random numbers on norms, biases, scales and sinks, which are built as ones or zeros and trained to others.

    With norms of ones, a norm of keys after their rotation looks like one before it.
    """
    generator = torch.Generator().manual_seed(1)
    for _, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point() and tensor.numel() and (tensor == tensor.flatten()[0]).all():
            tensor += SPREAD * torch.randn(tensor.shape, generator=generator).to(tensor)
    return model


_made: dict[str, Any] = {}  # models that nothing has run, by the family's name


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: a model type, perhaps with a variant behind it.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.split()[0]

    def make(self) -> Any:
        """The model, with the same random weights each time.

        Raises:
            MemoryError: its settings do not make it small.
        """
        if self.name not in _made:
            _made[self.name] = self._make()
        return copy.deepcopy(_made[self.name])

    def _make(self) -> Any:
        config = self._config()
        auto = AutoModelForCausalLM if self.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise MemoryError(f"{self.name} has {size} parameters; give it smaller settings.")
        torch.manual_seed(0)
        return as_trained(auto.from_config(config)).eval()

    def _config(self) -> Any:
        default = CONFIG_MAPPING[self.kind]()
        given = dict(self.settings)
        for name in default.sub_configs:
            if isinstance(getattr(default, name, None), PreTrainedConfig):
                given[name] = _sub_config(name, getattr(default, name), given.get(name, {}))
        return CONFIG_MAPPING[self.kind](**{**_known(default, COMMON), **given})


def _sub_config(name: str, default: Any, given: dict[str, Any]) -> dict[str, Any]:
    kind = given.get("model_type", default.model_type)
    if kind != default.model_type:
        default = CONFIG_MAPPING[kind]()
    common = COMMON if "text" in name or "language" in name else TOWER
    return {"model_type": kind, **_known(default, common), **given}


def _known(default: Any, common: dict[str, Any]) -> dict[str, Any]:
    """The common settings that a config has, and layers of both kinds where it has windows."""
    found = {name: value for name, value in common.items() if name in {*vars(default), *default.attribute_map}}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if common is COMMON and "layer_types" in vars(default):
        if len(kinds) > 1:
            found["layer_types"] = [kinds[i % len(kinds)] for i in range(COMMON["num_hidden_layers"])]
        elif kinds == ["full_attention"] and "sliding_window" in found and getattr(default, "use_sliding_window", True):
            found["layer_types"] = BOTH
    return found


FAMILIES = {
    name: Family(name, SETTINGS.get(name, {}))
    for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *SETTINGS, *WITH_TOWER})
    if name.split()[0] in CONFIG_MAPPING and not (IS_OLDEST and name in LATER)
}
