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
# For another model write `load("folder or hub id")`; the first half reads a Llama-like model's rotary tables. The first
# cell installs hfblend where it is missing, and otherwise does nothing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hfblend") is None:  # on Colab, say
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "hfblend[display,plots]"], check=True)

# %%
import warnings

import torch
from transformers import DynamicCache

import hfblend
from hfblend.blend.rotation import rotate, rotation_between
from hfblend.demo.model import load
from hfblend.display.plots import new_figure

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on

model, tokenizer = load(device="cpu")
ids = tokenizer("The keeper read the tide clock each morning.", return_tensors="pt").input_ids


@torch.no_grad()
def cached(start):
    """Layer -> keys and values of the sentence, computed at the positions from `start` on."""
    cache = DynamicCache()
    model(ids, position_ids=torch.arange(start, start + ids.shape[1])[None], past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def apart(states, true):
    """The distance of two tensors, as a share of the second one's length."""
    return ((states - true).norm() / true.norm()).item()


# %% [markdown]
# ## The same sentence at two places
#
# Positions enter attention through keys and queries only, and only as differences. One rotation should map the keys at
# one place onto those at the other: each pair of dimensions turns by its own angle per position. `rotation_between`
# makes $R(p_{new})\,R(p_{old})^{-1}$ from the model's own tables, so every kind of RoPE scaling is in it.
#
# **Predict**: the sentence is computed at position 0 and at position 500. In which layers do its values differ? Its
# keys? Its keys, after the rotation?


# %%
def tables(start):
    """cos and sin (n, D/2) at the positions from `start` on."""
    cos, sin = model.model.rotary_emb(at_0[0][0], torch.arange(start, start + ids.shape[1])[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


at_0, at_500 = cached(0), cached(500)
moving = rotation_between(tables(0), tables(500))
values_apart = [apart(at_0[i][1], at_500[i][1]) for i in range(len(at_0))]
keys_apart = [apart(at_0[i][0], at_500[i][0]) for i in range(len(at_0))]
turned_apart = [apart(rotate(at_0[i][0], *moving, "half"), at_500[i][0]) for i in range(len(at_0))]

figure, (axes,) = new_figure(7, 3.4)
axes.semilogy(keys_apart, "o-", color="#D55E00", label="keys")
axes.semilogy(turned_apart, "s-", color="#0072B2", label="keys, rotated by 500 positions")
axes.semilogy([max(one, 1e-9) for one in values_apart], "^-", color="#009E73", label="values")
axes.set(xlabel="layer", ylabel="difference between the two places,\nas a share", ylim=(1e-10, 10))
axes.legend(frameon=False)
figure

# %% [markdown]
# Keys differ everywhere; rotated keys and values are the same but for rounding, in every layer. (At layer 0, before
# any attention, values are equal bit by bit; they are drawn at 1e-9.)
#
# ## Why it is exact
#
# A dot product of a query and a key that are both turned does not change, so attention sees only how far apart they
# are. Below, the query stands three positions after the key, first at 0, then at 500. And the angles differ: the first
# pair turns by one radian per position, the last hardly at all.

# %%
query, key = torch.randn(2, 1, 1, 1, model.config.head_dim).unbind()
products = []
for distance_from_zero in (0, 500):
    cos, sin = (t[:1] for t in tables(distance_from_zero))
    cos_3, sin_3 = (t[3:4] for t in tables(distance_from_zero))
    products.append((rotate(query, cos_3, sin_3, "half") * rotate(key, cos, sin, "half")).sum().item())
print(f"query · key: {products[0]:.4f} at position 0, {products[1]:.4f} at position 500")

angles = model.model.rotary_emb.inv_freq
figure, (axes,) = new_figure(5, 3)
axes.semilogy(2 * torch.pi / angles, color="#0072B2")
axes.set(xlabel="pair of dimensions", ylabel="positions for a full turn")
figure

# %% [markdown]
# ## With and without realigning
#
# Two short chunks after a prefix. The second was computed right after the prefix and stands elsewhere now.
#
# **Predict**: is the realigned key equal to a full prefill's at layer 0? At layer 1?

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

full = DynamicCache()
with torch.no_grad():
    model(prompt.input_ids, past_key_values=full)
true = [layer.keys[:, :, start:stop] for layer in full.layers]
turned = [apart(keys[:, :, start:stop], true[layer]) for layer, (keys, _) in realigned.kv.items()]
as_stored = [apart(piece.entry.layer(layer)[0], true[layer]) for layer in range(len(true))]

figure, (axes,) = new_figure(7, 3)
axes.plot([100 * one for one in as_stored], "o-", color="#D55E00", label="as stored")
axes.plot([100 * one for one in turned], "s-", color="#0072B2", label="realigned")
axes.set(xlabel="layer", ylabel="keys off full prefill's (%)", ylim=(0, None))
axes.legend(frameon=False)
figure

# %% [markdown]
# At layer 0, where a key depends on nothing but its token and its position, the realigned keys are those of a full
# prefill. Above, they are not, because the chunk has not seen the first one (notebook 1); but at every layer they are
# nearer than the keys as the store held them.
#
# ## Always from the stored copy
#
# Each prompt turns the keys anew from what the store holds. If each turned what the one before had left, rounding
# would add up: here in bfloat16, a hundred moves of seven positions against one of the same length.

# %%
keys = at_0[1][0].bfloat16()
by_seven = rotation_between(tables(0), tables(7))
moved, errors, errors_at_once = keys, [], []
for move in range(1, 101):
    in_one = rotation_between(tables(0), tables(7 * move))
    exact = rotate(keys.float(), *in_one, "half")
    moved = rotate(moved, *by_seven, "half")
    errors.append(apart(moved.float(), exact))
    errors_at_once.append(apart(rotate(keys, *in_one, "half").float(), exact))

figure, (axes,) = new_figure(7, 3)
axes.plot(range(1, 101), errors, color="#D55E00", label="each move from the one before")
axes.plot(range(1, 101), errors_at_once, color="#0072B2", label="each move from the stored copy")
axes.set(xlabel="moves of seven positions, in bfloat16", ylabel="relative error", ylim=(0, None))
axes.legend(frameon=False)
figure

# %% [markdown]
# ## Exercise
#
# Is the rotation's error from the *length* of a move, too? Move the keys of layer 1 once, by 7 and by 7,000 positions,
# and compare each with the same move in float32.
#
# <details><summary>Solution</summary>
#
# ```python
# lengths = {}
# for by in (7, 7000):
#     once = rotation_between(tables(0), tables(by))
#     lengths[by] = apart(rotate(keys, *once, "half").float(), rotate(keys.float(), *once, "half"))
# print(lengths)
# ```
#
# Hardly: 0.1 and 0.16 %. Over 7 positions some pairs hardly turn, and so are rounded less; beyond a few dozen it is
# one rounding, however far the keys go. Only the number of moves counts.
#
# </details>
