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
# # 4 Which tokens?
#
# CacheBlend rests on three observations (arXiv 2405.16444, section 4.3). Here they are measured on a small model,
# with the pictures of the paper's figures 6 to 8. Not all of them hold on it, which is why hfblend's default rule is
# another.
#
# For another model write `load("folder or hub id")`; what the text says holds for SmolLM2-135M-Instruct and this
# prompt. The first cell installs hfblend where it is missing, and otherwise does nothing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hfblend") is None:  # on Colab, say
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "hfblend[display,plots]"], check=True)

# %%
import os

import pandas as pd

import hfblend
from hfblend.demo.model import load
from hfblend.demo.passages import demo_data, demo_prompt
from hfblend.lab import insights

SHORT = os.environ.get("HFBLEND_SHORT") == "1"
model, tokenizer = load(device="cpu")
data = demo_data()
order = [0, 5, 4] if SHORT else [0, 5, 4, 1, 2, 3]
prompt = demo_prompt(tokenizer, data, data["questions"][3]["question"], order)
store = hfblend.MemoryStore()  # the chunks are prefilled once
deviation = insights.deviation_by_layer(model, prompt, store=store).value  # (L, N): reused V from full prefill's
L, N = deviation.shape
print(len(prompt), "tokens,", N, "of them reused from elsewhere")

# %% [markdown]
# ## 1 A few tokens carry most of the deviation (figure 7)
#
# If all tokens deviated alike, the 15 % that CacheBlend recomputes would carry 15 % of a layer's deviation.
# **Predict**: how much do the 15 % most deviating ones carry?

# %%
share = insights.share_of_deviation(deviation, 0.15)
insights.figure_of_deviation(deviation)

# %% [markdown]
# From layer 1 on, over twice their share of each layer's deviation (right, where the curves leave the grey band).
#
# ## 2 Layers rank tokens alike (figure 8)
#
# CacheBlend chooses at layer 1 for all the layers above. That is good if a token that deviates at layer 1 deviates at
# the others, too. **Predict**: does layer 1 tell more about layer 2 or about the last one?

# %%
matrix = insights.rank_correlation_matrix(deviation)
neighbours = insights.rank_correlation(deviation)[1:]
insights.figure_of_rank_correlation(matrix)

# %% [markdown]
# Neighbours rank alike. But layer 1, where CacheBlend chooses, says much less about late layers than about layer 2.
# (Layer 0 says nothing: there nothing has been attended to, and what deviates is rounding.)
#
# ## 3 Recomputing few tokens brings attention back (figure 6)
#
# The suffix's attention over blended KV, compared with that over full prefill's. Both rules start from full reuse and
# end at full prefill. **Predict**: which is lower at 15 %, the rule that takes the most deviating values (CacheBlend's)
# or the one that takes what the question looks at?

# %%
ratios = (0.0, 0.15, 1.0) if SHORT else (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
lines = {}
for rule in ("kv_deviation", "suffix_attention"):
    config = hfblend.BlendConfig(selection=rule)
    lines[rule] = insights.attention_deviation(model, prompt, ratios, store=store, config=config)  # (R, L)
insights.figure_of_attention_deviation(ratios, lines)

# %% [markdown]
# At 15 %, the tokens that the question looks at bring back more than those whose values deviate.
#
# ## What the question looks at
#
# The tokens with the highest scores of both rules:

# %%
traces, rows = {}, {}
for rule in lines:
    config = hfblend.BlendConfig(selection=rule)
    traces[rule] = hfblend.blend(model, prompt, store=store, config=config, trace="tokens").trace
    best = traces[rule].candidate_idx[traces[rule].scores.topk(12).indices].sort().values
    rows[rule] = [repr(tokenizer.decode(i)) for i in prompt.input_ids[0, best]]
pd.DataFrame(rows).T

# %%
hfblend.show(traces["suffix_attention"], tokenizer)

# %%
hfblend.plot_scores(traces["suffix_attention"])

# %% [markdown]
# ## A rule of your own
#
# One function from the evidence to scores. This one weighs attention by how much would be fetched there. **Predict**:
# how many of its choices will be those of the two rules above?


# %%
def by_attention_and_value_norm(evidence):
    layers = range(evidence.num_layers // 2, evidence.num_layers)
    attention = evidence.suffix_attention(layers).mean((0, 1))  # (layers, H, N) -> (N,)
    _, (_, values) = evidence.kv(1)  # fresh and reused (keys, values) at layer 1, each (1, Hkv, N, D)
    return attention * values.float().norm(dim=-1).mean((0, 1))


def choices_in_common(traces):
    """The share of each rule's chosen tokens that another one chooses, too."""
    chosen = {rule: set(trace.selected_idx.tolist()) for rule, trace in traces.items()}
    return pd.DataFrame({a: {b: len(chosen[a] & chosen[b]) / len(chosen[a]) for b in chosen} for a in chosen})


config = hfblend.BlendConfig(selection=by_attention_and_value_norm)
traces["own rule"] = hfblend.blend(model, prompt, store=store, config=config).trace
common = choices_in_common(traces)
common.style.format("{:.0%}").background_gradient(cmap="Blues", vmin=0, vmax=1.4)

# %% [markdown]
# Many tokens that the question looks at are not those that deviate most: the two rules have about half of their choices
# in common, where chance would give 15 %.
#
# ## Exercise
#
# Check that chance gives 15 %: write a rule that scores at random, and compare.
#
# <details><summary>Solution</summary>
#
# ```python
# import torch
#
#
# def at_random(evidence):
#     return torch.rand(len(evidence.candidate_idx))
#
#
# random = hfblend.BlendConfig(selection=at_random)
# traces["random"] = hfblend.blend(model, prompt, store=store, config=random).trace
# print(choices_in_common(traces)["random"])
# ```
#
# The 15 % that are chosen at random hold about 15 % of any other rule's choices, more or less: there are few of them.
#
# </details>
