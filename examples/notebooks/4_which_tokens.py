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
# For another model write `load("folder or hub id")`; what is asserted holds for SmolLM2-135M-Instruct and this
# prompt.

# %%
import os

import torch

import hfblend
from hfblend.demo.demo import demo_data, demo_prompt
from hfblend.demo.model import load
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
# From layer 1 on, the 15 % most deviating tokens carry over twice their share of each layer's deviation.

# %%
share = insights.share_of_deviation(deviation, 0.15)
print([f"{x:.0%}" for x in share.tolist()])
assert share[1:].min() > 0.30
insights.figure_of_deviation(deviation)

# %% [markdown]
# ## 2 Layers rank tokens alike (figure 8)
#
# Neighbours do. But layer 1, where CacheBlend chooses, says much less about late layers than about layer 2. (Layer 0
# is left out: there nothing has been attended to, and deviation is rounding.)

# %%
matrix = insights.rank_correlation_matrix(deviation)
neighbours = insights.rank_correlation(deviation)[1:]
print(f"neighbours {neighbours.mean():.2f}; layers 1 and 2 {matrix[1, 2]:.2f}, 1 and {L - 1} {matrix[1, L - 1]:.2f}")
assert neighbours.mean() > 0.7
assert matrix[1, L // 2 :].mean() < matrix[1, 2] - 0.1
insights.figure_of_rank_correlation(matrix)

# %% [markdown]
# ## 3 Recomputing few tokens brings attention back (figure 6)
#
# The suffix's attention over blended KV, compared with that over full prefill's. Both rules start from full reuse and
# end at full prefill. At 15 %, the tokens that the question looks at bring back more than those whose values deviate.

# %%
ratios = (0.0, 0.15, 1.0) if SHORT else (0.0, 0.05, 0.15, 0.3, 0.5, 1.0)
lines = {}
for rule in ("kv_deviation", "suffix_attention"):
    config = hfblend.BlendConfig(selection=rule)
    lines[rule] = insights.attention_deviation(model, prompt, ratios, store=store, config=config)  # (R, L)
    print(rule, [f"{x:.3f}" for x in lines[rule].mean(-1).tolist()])
at_15 = {rule: line.mean(-1)[ratios.index(0.15)] for rule, line in lines.items()}
assert at_15["suffix_attention"] < at_15["kv_deviation"]
assert all(line[-1].max() < 1e-3 < line[0].max() for line in lines.values())
insights.figure_of_attention_deviation(ratios, lines)

# %% [markdown]
# ## What the question looks at
#
# The scores of the default rule, and the tokens with the highest. Many of them are not those that deviate most: the two
# rules have about half of their choices in common, where chance would give 15 %.

# %%
chosen = {}
for rule in lines:
    result = hfblend.blend(model, prompt, store=store, config=hfblend.BlendConfig(selection=rule), trace="tokens")
    chosen[rule] = set(result.trace.selected_idx.tolist())
    best = result.trace.candidate_idx[result.trace.scores.topk(12).indices].sort().values
    print(f"{rule:16}", [tokenizer.decode(i) for i in prompt.input_ids[0, best]])
common = len(chosen["kv_deviation"] & chosen["suffix_attention"])
print(common, "of", len(chosen["kv_deviation"]), "tokens are chosen by both")
assert 0.15 * len(chosen["kv_deviation"]) < common < 0.7 * len(chosen["kv_deviation"])
hfblend.show(result.trace, tokenizer)

# %%
hfblend.plot_scores(result.trace)

# %% [markdown]
# ## A rule of your own
#
# One function from the evidence to scores. This one weighs attention by how much would be fetched there.


# %%
def by_attention_and_value_norm(evidence):
    layers = range(evidence.num_layers // 2, evidence.num_layers)
    attention = evidence.suffix_attention(layers).mean((0, 1))  # (layers, H, N) -> (N,)
    _, (_, values) = evidence.kv(1)  # fresh and reused (keys, values) at layer 1, each (1, Hkv, N, D)
    return attention * values.float().norm(dim=-1).mean((0, 1))


config = hfblend.BlendConfig(selection=by_attention_and_value_norm)
own = hfblend.blend(model, prompt, store=store, config=config)
assert torch.equal(own.trace.candidate_idx, result.trace.candidate_idx)
assert own.trace.selected_tokens == result.trace.selected_tokens
