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
# # 3 RoPE and positions
#
# A cached key was rotated for the position at which it was computed. To reuse it elsewhere it is rotated once more,
# by the difference. This notebook shows why that is exact, what happens without it, and why keys are always moved
# from their stored copy.
#
# For another model write `load("folder or hub id")`; the first half reads a Llama-like model's rotary tables.

# %%
import warnings

import torch
from matplotlib.figure import Figure
from transformers import DynamicCache

import hfblend
from hfblend.blend.rotation import rotate, rotation_between
from hfblend.demo.model import load

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on

model, tokenizer = load(device="cpu")
ids = tokenizer("The keeper read the tide clock each morning.", return_tensors="pt").input_ids


@torch.no_grad()
def cached(start):
    """Layer -> keys and values of the sentence, computed at the positions from `start` on."""
    cache = DynamicCache()
    model(ids, position_ids=torch.arange(start, start + ids.shape[1])[None], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


# %% [markdown]
# ## The same sentence at two places
#
# Positions enter attention through keys and queries only, and only as differences. So the same sentence at position 0
# and at position 500 has the same values in every layer, and other keys.

# %%
at_0, at_500 = cached(0), cached(500)
for (keys_0, values_0), (keys_500, values_500) in zip(at_0, at_500):
    torch.testing.assert_close(values_0, values_500, atol=2e-3, rtol=1e-3)
    assert (keys_0 - keys_500).norm() > 0.1 * keys_0.norm()

# %% [markdown]
# ## One rotation maps one onto the other
#
# Each pair of dimensions of a key turns by its own angle per position. `rotation_between` makes
# $R(p_{new})\,R(p_{old})^{-1}$ from the model's own tables, so every kind of RoPE scaling is in it.


# %%
def tables(start):
    """cos and sin (n, D/2) at the positions from `start` on."""
    cos, sin = model.model.rotary_emb(at_0[0][0], torch.arange(start, start + ids.shape[1])[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


moving = rotation_between(tables(0), tables(500))
for (keys_0, _), (keys_500, _) in zip(at_0, at_500):
    torch.testing.assert_close(rotate(keys_0, *moving, "half"), keys_500, atol=5e-3, rtol=1e-3)

# %% [markdown]
# Why it is exact: a dot product of a query and a key that are both turned does not change, so attention sees only how
# far apart they are. And the angles differ: the first pair turns by one radian per position, the last hardly at all.

# %%
query, key = torch.randn(2, 1, 1, 1, model.config.head_dim).unbind()
products = []
for distance_from_zero in (0, 500):
    cos, sin = (t[:1] for t in tables(distance_from_zero))
    cos_3, sin_3 = (t[3:4] for t in tables(distance_from_zero))
    products.append((rotate(query, cos_3, sin_3, "half") * rotate(key, cos, sin, "half")).sum())
torch.testing.assert_close(products[0], products[1], atol=1e-3, rtol=1e-3)

angles = model.model.rotary_emb.inv_freq
assert angles[0] == 1
assert angles[-1] < 1e-3
figure = Figure(figsize=(5, 3), layout="constrained")
axes = figure.subplots()
axes.semilogy(2 * torch.pi / angles, color="#0072B2")
axes.set(xlabel="pair of dimensions", ylabel="positions for a full turn")
figure

# %% [markdown]
# ## With and without realigning
#
# Two short chunks after a prefix. The second was computed right after the prefix and stands elsewhere now. At layer
# 0, where a key depends on nothing but its token and its position, the realigned keys are those of a full prefill.
# Above, they are not, because the chunk has not seen the first one (notebook 1); but at every layer they are nearer
# than the keys as the store held them.

# %%
prompt = hfblend.Prompt.from_texts(
    tokenizer,
    prefix="<|im_start|>user\n",
    chunks=["The lamp of the tower is red. ", "The boat in the harbour is called Morning Star. "],
    suffix="What is the boat called?<|im_end|>\n<|im_start|>assistant\n",
)
steps = {step.name: step for step in hfblend.steps(model, prompt, max_new_tokens=1)}
piece, realigned = steps["looked_up"].pieces[-1], steps["realigned"]
start, stop = piece.span
print("second chunk:", realigned.cached_positions.tolist(), "→", realigned.moved_idx.tolist())
assert realigned.moved_idx.tolist() == list(range(start, stop))

full = DynamicCache()
with torch.no_grad():
    model(prompt.input_ids, past_key_values=full)
for layer, (keys, _) in realigned.kv.items():
    true = full.layers[layer].keys[:, :, start:stop]
    turned = (keys[:, :, start:stop] - true).norm() / true.norm()
    as_stored = (piece.entry.layer(layer)[0] - true).norm() / true.norm()
    assert turned < as_stored
    if layer == 0:
        assert turned < 1e-4
    if layer in (0, 1, 15, 29):
        print(f"layer {layer:2}: keys off by {turned:.1%} realigned, {as_stored:.1%} as stored")

# %% [markdown]
# ## Always from the stored copy
#
# Each prompt turns the keys anew from what the store holds. If each turned what the one before had left, rounding
# would add up: here in bfloat16, a hundred moves of seven positions against one of seven hundred.

# %%
keys = at_0[1][0].bfloat16()
exact = rotate(keys.float(), *rotation_between(tables(0), tables(700)), "half")
at_once = rotate(keys, *rotation_between(tables(0), tables(700)), "half")
in_small_moves = keys
for _ in range(100):
    in_small_moves = rotate(in_small_moves, *rotation_between(tables(0), tables(7)), "half")
errors = [((moved.float() - exact).norm() / exact.norm()).item() for moved in (at_once, in_small_moves)]
print(f"relative error: {errors[0]:.4f} at once, {errors[1]:.4f} in a hundred moves")
assert errors[1] > 3 * errors[0]
