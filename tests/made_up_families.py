"""A decoder that no version of Transformers has, and variants of it whose KV cannot be reused.

Its rotary module is its own: six of sixteen dimensions turn, in neighbouring pairs, and the other way round.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfblend.model.hf_model import CACHE, cache_given


class MadeUpConfig(PreTrainedConfig):
    model_type = "made_up"

    def __init__(self, peculiarity=None, **kwargs):
        self.peculiarity = peculiarity
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 97, 64, 3
        self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.turned_dims = 4, 2, 16, 6
        super().__init__(**{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **kwargs})


class TwistRotary(nn.Module):
    def __init__(self, config):
        super().__init__()
        turns = 3.0 ** -torch.arange(config.turned_dims // 2).float()
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.turns
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # (B, N, 3)


def twist(x, cos, sin):
    dims = 2 * cos.shape[-1]
    a, b = x[..., 0:dims:2], x[..., 1:dims:2]
    turned = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., dims:]), -1)


class MadeUpLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, width)
        self.out = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, hidden_states, position_ids, tables, attention_mask, cache):
        config = self.config
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        states = self.qkv(nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:]))
        states = states.unflatten(-1, (sum(heads), config.head_dim)).transpose(1, 2)
        queries, keys, values = states.split(heads, 1)
        queries, keys = twist(queries, *tables), twist(keys, *tables)
        if config.peculiarity == "stretched":
            keys = keys * (1 + 0.1 * position_ids[:, None, :, None]).to(keys.dtype)
        if config.peculiarity == "scaled":
            keys = keys * torch.linspace(0.5, 1.5, config.head_dim, dtype=keys.dtype)
        if config.peculiarity == "tempered":
            queries = queries * (1 + 0.05 * position_ids[:, None, :, None]).to(queries.dtype)
        keys, values = cache.update(keys, values, self.layer_idx)
        if config.peculiarity == "alibi":
            slopes = torch.arange(keys.shape[2], device=keys.device, dtype=keys.dtype) + position_ids[0, 0]
            keys = keys * (1 + 0.02 * slopes[:, None])
        attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        mixed, _ = attend(self, queries, keys, values, attention_mask, scaling=config.head_dim**-0.5)
        return hidden_states + self.out(mixed.flatten(2)).tanh()


class MadeUpPreTrainedModel(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.normal_(0.0, 0.3)
        if isinstance(module, TwistRotary):
            module.turns.copy_(3.0 ** -torch.arange(len(module.turns)).float())


class MadeUpModel(MadeUpPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = TwistRotary(config)
        self.layers = nn.ModuleList(MadeUpLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        cache, peculiarity = cache_given(kwargs), self.config.peculiarity
        cache = DynamicCache() if cache is None else cache
        hidden_states = self.embed(input_ids)
        counted = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + cache.get_seq_length()
        position_ids = counted if position_ids is None or peculiarity == "ordinal" else position_ids
        if peculiarity == "absolute":
            waves = torch.arange(self.config.hidden_size, device=input_ids.device) / 10
            hidden_states = hidden_states + (position_ids[..., None] * waves).sin().to(hidden_states.dtype)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
            position_ids=position_ids, **{CACHE: cache},
        )  # fmt: skip
        if peculiarity == "bidirectional":
            hidden_states = hidden_states + hidden_states.mean(1, keepdim=True)
        tables = [table[:, None] for table in self.rotary(hidden_states, position_ids)]
        for layer in self.layers:
            if peculiarity == "absolute, late" and layer.layer_idx == 2:
                hidden_states = hidden_states + 0.2 * self.embed(position_ids)
            hidden_states = layer(hidden_states, position_ids, tables, mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


class MadeUpForCausalLM(MadeUpPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = MadeUpModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        output = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: output[CACHE]})
