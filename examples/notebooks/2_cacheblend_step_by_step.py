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
# rotated in half pairs (Llama, Mistral, Qwen and their like). The first cell installs hfblend where it is missing, and
# otherwise does nothing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hfblend") is None:  # on Colab, say
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "hfblend[display,plots]"], check=True)

# %%
import os
import warnings

import pandas as pd
import torch
from transformers import DynamicCache

import hfblend
from hfblend.demo.model import load
from hfblend.demo.passages import demo_data, demo_prompt
from hfblend.display.plots import new_figure

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on

SHORT = os.environ.get("HFBLEND_SHORT") == "1"
model, tokenizer = load(device="cpu")
data = demo_data()
order = [0, 5] if SHORT else [0, 5, 4, 1, 2, 3, 6, 7]
prompt = demo_prompt(tokenizer, data, data["questions"][3]["question"], order)
T, L = len(prompt), model.config.num_hidden_layers
ids, spans = prompt.input_ids, prompt.chunk_spans
prefix_stop = spans[0][0]

# CacheBlend as published: its own rule, 15 % of the tokens, ranked at layer 1, and no correction of the others
config = hfblend.BlendConfig(selection="kv_deviation", recompute_ratios=(0.15,), check_layers=(1,), correction=None)
stops = {step.name: step for step in hfblend.steps(model, prompt, config=config, tokenizer=tokenizer)}
print(*stops.values(), sep="\n")

# %% [markdown]
# These are the phases. Each is now done by hand; `off` collects the largest difference from the library's tensors, as a
# share of their largest value.

# %%
off = {}


def compare(phase, mine, library):
    """Keeps the largest difference of two tensors, relative to the library's largest value."""
    share = ((mine - library).abs().max() / library.abs().max()).item()
    off[phase] = max(off.get(phase, 0.0), share)


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
    for layer in range(L):
        for own, theirs in zip(mine[layer], piece.entry.layer(layer)):
            compare("1 look up", own, theirs)
computed_at = [piece.entry.cached_positions[0].item() for piece in pieces]
pd.DataFrame({"computed at": computed_at, "stands at": [start for start, _ in spans]}).rename_axis("chunk").T

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
        compare("2 realign", turn(keys, start - prefix_stop), realigned[layer][0][:, :, start:stop])
        compare("2 realign", values, realigned[layer][1][:, :, start:stop])

# %% [markdown]
# ## 3 Select: where do reused values differ most from fresh ones?
#
# All tokens run through layer 0; layer 1's values are then those that a full prefill has. The 15 % of the moved
# tokens whose squared distance is largest are selected. The first chunk stands where it was computed, is exact, and
# no candidate.
#
# **Predict**: will the selected tokens lie evenly over a chunk, at its beginning, or at its end?

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
compare("3 select", scores, stops["scored"].scores)

figure, (axes,) = new_figure(9, 3)
is_selected = torch.isin(candidate_idx, selected_idx)
axes.plot(candidate_idx[~is_selected], scores[~is_selected], ".", color="0.6", label="reused")
axes.plot(candidate_idx[is_selected], scores[is_selected], "^", color="#D55E00", label="selected")
for start, _ in spans:
    axes.axvline(start, color="0.85", zorder=0)
axes.set(xlabel="position in the prompt; lines: chunks begin", ylabel="squared distance of values")
axes.legend(frameon=False)
figure

# %% [markdown]
# Mostly at the beginning: computed alone, a chunk's first tokens saw little more than the prefix, and now they see all
# passages before them. Later tokens have their own chunk to look at, both times.
#
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
compare("4 recompute", logits, recomputed.logits)
for layer in (0, 1, L // 2, L - 1):
    compare("4 recompute", blended_kv[layer][1], recomputed.kv[layer][1])

figure, (axes,) = new_figure(7, 3)
axes.imshow(visible, aspect="auto", cmap="Blues", vmin=0, vmax=1.6, interpolation="nearest")
axes.set(
    xlabel="keys of all tokens",
    ylabel=f"the {len(rows)} rows that are run",
    title="blue: the row sees the key",
    yticks=[],
)
figure

# %% [markdown]
# All four phases, held against the library's: what is left is rounding.

# %%
pd.Series(off, name="largest relative difference").map("{:.1e}".format).to_frame()

# %% [markdown]
# ## 5 The same, with stops
#
# `hfblend.steps` runs the library's own phases and yields after each. With nothing replaced it ends where
# `hfblend.blend` does, bit by bit.

# %%
result = hfblend.blend(model, prompt, config=config)
print("bit by bit:", torch.equal(stops["generated"].result.logits, result.logits))
hfblend.show(stops["generated"].trace)

# %% [markdown]
# What a step holds may be replaced. Here other tokens are chosen by hand: the first ones of every moved chunk (EPIC's
# rule), as many as before.
#
# And then the reused KV is mended instead of recomputed: the keys and values of the full prefill are put in its place,
# and nothing is selected. **Predict**: how far from full prefill does that end?


# %%
def kl(logits):
    """KL(full prefill ‖ this) of the first new token, in nats."""
    p, q = full_logits.log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum().item()


by_hand = torch.tensor([start + i for i in range(T) for start, stop in spans[1:] if start + i < stop])[:count]
for step in hfblend.steps(model, prompt, config=config, tokenizer=tokenizer):
    if step.name == "selected":
        step.selected_idx = by_hand

nothing = hfblend.BlendConfig(check_layers=(), recompute_ratios=())
for mended in hfblend.steps(model, prompt, config=nothing, max_new_tokens=1):
    if mended.name == "realigned":
        for layer, (keys, values) in mended.kv.items():
            keys[:, :, candidate_idx] = full.layers[layer].keys[:, :, candidate_idx]
            values[:, :, candidate_idx] = full.layers[layer].values[:, :, candidate_idx]

distances = {
    "full reuse": kl(hfblend.blend(model, prompt, config=nothing).logits),
    "blended": kl(logits),
    "chunk starts, by hand": kl(step.result.logits),
    "true KV put in": kl(mended.result.logits),
}
figure, (axes,) = new_figure(7, 2.4)
axes.barh(list(distances), list(distances.values()), color="#0072B2")
axes.invert_yaxis()
axes.set(xlabel="KL from full prefill at the first new token, nats")
figure

# %% [markdown]
# With the true KV nothing is left to recompute: full reuse equals full prefill. Do not read much into the other bars:
# one token of one prompt says little about a rule (`docs/quality.md` measures fifty questions).
#
# ## Exercise
#
# Select every candidate by hand. Which bar should the KL be like, and why?
#
# <details><summary>Solution</summary>
#
# ```python
# for every in hfblend.steps(model, prompt, config=config, max_new_tokens=1):
#     if every.name == "selected":
#         every.selected_idx = every.candidate_idx
# print(f"{kl(every.result.logits):.1e}")
# ```
#
# The last one: with every moved token recomputed, nothing that was computed without its context is left.
#
# </details>
