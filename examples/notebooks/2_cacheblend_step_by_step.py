# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 CacheBlend step by step
#
# Each phase by hand, in about ten lines of PyTorch and Transformers, and held against the library's. Then
# `hfblend.steps`, which stops after every phase and lets you change what it found.
#
# Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, S rows of a pass, D head_dim, L
# layers. For another model write `load("folder or hub id")`; the hand-written code is for models that keep keys
# rotated in half pairs (Llama, Mistral, Qwen and their like).

# %%
import os
import warnings

import torch
from transformers import DynamicCache

import hfblend
from hfblend.demo.demo import demo_data, demo_prompt
from hfblend.demo.model import load

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on

SHORT = os.environ.get("HFBLEND_SHORT") == "1"
model, tokenizer = load(device="cpu")
data = demo_data()
order = [0, 5] if SHORT else [0, 5, 4, 1, 2, 3, 6, 7]
prompt = demo_prompt(tokenizer, data, data["questions"][3]["question"], order)
T, L = len(prompt), model.config.num_hidden_layers
ids, spans = prompt.input_ids, prompt.chunk_spans
prefix_stop = spans[0][0]

# CacheBlend's own rule, 15 % of the tokens, ranked at layer 1
config = hfblend.BlendConfig(selection="kv_deviation", recompute_ratios=(0.15,), check_layers=(1,))
stops = {step.name: step for step in hfblend.steps(model, prompt, config=config, tokenizer=tokenizer)}
print(*stops.values(), sep="\n")

# %% [markdown]
# ## 1 Look up: a chunk's KV, computed alone
#
# "Alone" is after the prompt's prefix and nothing else. So every chunk is computed at the same positions, those
# right after the prefix.


# %%
@torch.no_grad()
def prefill_alone(start, stop):
    """Layer -> keys and values (1, Hkv, stop − start, D) of a chunk right after the prefix."""
    alone = torch.cat([ids[:, :prefix_stop], ids[:, start:stop]], 1)
    cache = DynamicCache()
    model(alone, past_key_values=cache)
    return [(layer.keys[:, :, prefix_stop:], layer.values[:, :, prefix_stop:]) for layer in cache.layers]


chunk_kv = [prefill_alone(*span) for span in spans]
pieces = stops["looked_up"].pieces[1:]  # the first piece is the prefix
for mine, piece in zip(chunk_kv, pieces):
    assert piece.entry.cached_positions[0] == prefix_stop
    for layer in range(L):
        for own, theirs in zip(mine[layer], piece.entry.layer(layer)):
            torch.testing.assert_close(own, theirs, atol=2e-3, rtol=1e-3)

# %% [markdown]
# ## 2 Realign: keys move from their old positions to the new ones
#
# One rotation, by the difference of positions: $R(p_{new})\,R(p_{old})^{-1}$. Values do not move.


# %%
def turn(keys, by):
    """Keys (1, Hkv, n, D) moved `by` positions further."""
    angle = by * model.model.rotary_emb.inv_freq  # (D/2,)
    x, y = keys.chunk(2, -1)
    return torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)


realigned = stops["realigned"].kv  # layer -> keys, values (1, Hkv, T, D)
for (start, stop), mine in zip(spans, chunk_kv):
    for layer in (0, 1, L - 1):
        keys, values = mine[layer]
        torch.testing.assert_close(
            turn(keys, start - prefix_stop), realigned[layer][0][:, :, start:stop], atol=2e-3, rtol=1e-3
        )
        torch.testing.assert_close(values, realigned[layer][1][:, :, start:stop], atol=2e-3, rtol=1e-3)

# %% [markdown]
# ## 3 Select: where do reused values differ most from fresh ones?
#
# All tokens run through layer 0; layer 1's values are then those that a full prefill has. The 15 % of the moved
# tokens whose squared distance is largest are selected. The first chunk stands where it was computed, is exact, and
# no candidate.

# %%
with torch.no_grad():
    full = DynamicCache()
    full_logits = model(ids, past_key_values=full).logits[:, -1]
candidate_idx = torch.arange(spans[0][1], T)
candidate_idx = candidate_idx[[any(a <= i < b for a, b in spans[1:]) for i in candidate_idx.tolist()]]  # (N,)
difference = full.layers[1].values - realigned[1][1]  # (1, Hkv, T, D)
scores = difference.square().sum((1, 3))[0, candidate_idx]  # (N,)
count = -(-15 * len(candidate_idx) // 100)  # rounded up
selected_idx = candidate_idx[scores.topk(count).indices].sort().values

assert torch.equal(candidate_idx, stops["scored"].candidate_idx)
torch.testing.assert_close(scores, stops["scored"].scores, atol=1e-2, rtol=1e-3)
assert torch.equal(selected_idx, stops["selected"].selected_idx)

# %% [markdown]
# ## 4 Recompute: a forward over the selected rows and the question
#
# The trick that keeps it short: a cache whose `update` writes the fresh rows into the layer's full-length K/V and
# hands the whole layer to attention. The mask is drawn by position: a row sees the keys up to its own place. K/V of
# layers 0 and 1 are fresh for all tokens, because the pass that selected has computed them.


# %%
class MixingCache(DynamicCache):
    def update(self, keys, values, layer, *args, **kwargs):
        whole = blended_kv[layer]
        for states, fresh in zip(whole, (keys, values)):
            states[:, :, rows] = fresh
        return whole


fresh_idx = stops["selected"].fresh_idx  # what is not reused: the question, and what else stands outside chunks
rows = torch.cat([selected_idx, fresh_idx]).sort().values  # (S,)
blended_kv = [tuple(t.clone() for t in realigned[layer]) for layer in range(L)]
for layer in (0, 1):
    blended_kv[layer] = (full.layers[layer].keys.clone(), full.layers[layer].values.clone())
visible = torch.arange(T) <= rows[:, None]  # (S, T)
with torch.no_grad():
    logits = model(
        ids[:, rows], position_ids=rows[None], past_key_values=MixingCache(), attention_mask=visible[None, None]
    ).logits[:, -1]

recomputed = stops["recomputed"]
torch.testing.assert_close(logits, recomputed.logits, atol=2e-2, rtol=1e-3)
for layer in (0, 1, L // 2, L - 1):
    torch.testing.assert_close(blended_kv[layer][1], recomputed.kv[layer][1], atol=2e-2, rtol=1e-2)

# %% [markdown]
# How far it is from full prefill at the first new token. One token of one prompt says little about a rule
# (`docs/quality.md` measures fifty questions), and here full reuse may even come out ahead.


# %%
def kl(logits):
    """KL(full prefill ‖ this) of the first new token, in nats."""
    p, q = full_logits.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


nothing = hfblend.BlendConfig(check_layers=(), recompute_ratios=())
reuse_logits = hfblend.blend(model, prompt, config=nothing).logits
print(f"full reuse {kl(reuse_logits):.4f}, blended {kl(logits):.4f}")

# %% [markdown]
# ## 5 The same, with stops
#
# `hfblend.steps` runs the library's own phases and yields after each. With nothing replaced it ends where
# `hfblend.blend` does, bit by bit.

# %%
result = hfblend.blend(model, prompt, config=config)
assert torch.equal(stops["generated"].result.logits, result.logits)
print(stops["generated"].text)
hfblend.show(stops["generated"].trace)

# %% [markdown]
# What a step holds may be replaced. Here other tokens are chosen by hand: the first ones of every moved chunk (EPIC's
# rule), as many as before.

# %%
by_hand = torch.tensor([start + i for i in range(T) for start, stop in spans[1:] if start + i < stop])[:count]
for step in hfblend.steps(model, prompt, config=config, tokenizer=tokenizer):
    if step.name == "selected":
        step.selected_idx = by_hand
assert torch.equal(step.trace.selected_idx, by_hand.sort().values)
print(f"by hand {kl(step.result.logits):.4f}: {step.text}")

# %% [markdown]
# And here the reused KV is mended instead of recomputed: with the values and keys of the full prefill in its place,
# nothing is left to select, and full reuse equals full prefill.

# %%
for step in hfblend.steps(model, prompt, config=nothing):
    if step.name == "realigned":
        for layer, (keys, values) in step.kv.items():
            keys[:, :, candidate_idx] = full.layers[layer].keys[:, :, candidate_idx]
            values[:, :, candidate_idx] = full.layers[layer].values[:, :, candidate_idx]
assert kl(step.result.logits) < 1e-5
