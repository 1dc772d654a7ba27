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
# # 6 Debugging a bad answer
#
# A blended answer is wrong. Is it the model, or is it the blending? What was recomputed? Does a higher ratio help?
# Which tokens are to blame? Four questions, one tool each; at the end, one call that asks the last two by itself.
#
# The case is real: SmolLM2-135M-Instruct, found by asking the demo's questions with other passages around. For
# another model write `load("folder or hub id")`; the answers asserted below are this model's.

# %%
import os
import warnings

import torch
from transformers import DynamicCache

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load
from hfblend.measure.blame import blame_prompt
from hfblend.measure.verify import verify_prompt

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on

SHORT = os.environ.get("HFBLEND_SHORT") == "1"  # at the end, looks at digits only
model, tokenizer = load(device="cpu")
data = demo_data()
documents = [f"{data['passages'][i]['title']}: {data['passages'][i]['text']}\n\n" for i in (0, 8, 9, 1)]
question = "In which year was the railway that serves Lake Ister opened?"
ask = f"Passages:\n{{documents}}Question: {question}\nAnswer with a few words."
messages = [{"role": "system", "content": data["system"]}, {"role": "user", "content": ask}]
prompt = hfblend.Prompt.from_chat(tokenizer, messages, documents)
store = hfblend.MemoryStore()


def text(ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


# %% [markdown]
# ## 1 The model, or the blending?
#
# `verify_prompt` prefills the prompt in full, blends it, and holds the two against each other. Here full prefill
# knows the year and the blended prompt does not, so it is the blending. `first_difference` is where the answers part.

# %%
found = verify_prompt(model, prompt, store=store, num_tokens=18)
print(found)
print("full prefill:", text(found.full_answer_ids))
print("blended:     ", text(found.blended_answer_ids))
assert "1866" in text(found.full_answer_ids)
assert "1866" not in text(found.blended_answer_ids)
part = found.first_difference
print("they part after:", repr(text(found.full_answer_ids[:part])))
assert text(found.full_answer_ids[:part]).endswith("opened in 1")

# %% [markdown]
# ## 2 What was recomputed?
#
# The trace says what was reused from where, and which tokens were recomputed. Nothing odd: every chunk was there, and
# 15 % of the moved tokens were chosen.

# %%
result = hfblend.blend(model, prompt, store=store, trace="tokens")
assert result.trace.hits == 4
assert not result.trace.fallback
hfblend.show(result.trace, tokenizer)

# %% [markdown]
# ## 3 Does a higher ratio help?
#
# To see that, the answer up to where it goes wrong is put after the prompt, and one number is looked at: how far the
# logit of full prefill's next token, 8, lies above that of the blended one's, 9. At 30 % it is right again.

# %%
ids = torch.cat([prompt.input_ids, torch.tensor([found.full_answer_ids[:part]])], 1)
begun = hfblend.Prompt(ids, prompt.chunk_spans)
right, wrong = found.full_answer_ids[part], found.blended_answer_ids[part]
assert (text(right), text(wrong)) == ("8", "9")


def margin(logits):
    return (logits[0, right] - logits[0, wrong]).item()


margins = {}
for ratio in (0.15, 0.3, 1.0):
    config = hfblend.BlendConfig(recompute_ratios=(ratio,))
    margins[ratio] = margin(hfblend.blend(model, begun, store=store, config=config).logits)
    print(f"ratio {ratio}: {margins[ratio]:+.2f}")
assert margins[0.15] < 0 < margins[0.3]
assert margins[1.0] > 0

# %% [markdown]
# `blender.calibrate` finds such a ratio over prompts of your own (`docs/quality.md`). One that mends one prompt may be
# more than others need.
#
# ## 4 Which tokens are to blame?
#
# With plain full reuse the answer is wrong as well. Now the true KV of one passage after the other, from a full
# prefill, takes the place of the reused KV: `steps` gives the reused KV to start from, and the suffix runs over it
# again.

# %%
nothing = hfblend.BlendConfig(check_layers=(), recompute_ratios=())
stops = {step.name: step for step in hfblend.steps(model, begun, store=store, config=nothing, max_new_tokens=1)}
suffix_start = prompt.chunk_spans[-1][1]
reused_kv = stops["realigned"].kv
true = DynamicCache()
with torch.no_grad():
    full_margin = margin(model(ids, past_key_values=true).logits[:, -1])


@torch.no_grad()
def mended(tokens):
    """The margin with the true KV of these tokens and the reused KV of all others."""
    cache = DynamicCache()
    for layer, kv in reused_kv.items():
        keys, values = (states[:, :, :suffix_start].clone() for states in kv)
        keys[:, :, tokens] = true.layers[layer].keys[:, :, tokens]
        values[:, :, tokens] = true.layers[layer].values[:, :, tokens]
        cache.update(keys, values, layer)
    return margin(model(ids[:, suffix_start:], past_key_values=cache).logits[:, -1])


stale = mended([])
assert stale < 0 < full_margin
assert abs(stale - margin(stops["generated"].result.logits)) < 1e-2
assert abs(mended(list(range(suffix_start))) - full_margin) < 1e-2
by_passage = [mended(list(range(*span))) for span in prompt.chunk_spans]
for document, value in zip(documents, by_passage):
    print(f"{value:+.2f} with the true KV of {document.split(':')[0]!r}")
assert abs(by_passage[0] - stale) < 1e-2  # it stands where it was computed, and is exact
to_blame = by_passage.index(max(by_passage))
assert by_passage[to_blame] > 0
assert documents[to_blame].startswith("Orla Venn")

# %% [markdown]
# Not the passage that holds the year: the last one, about somebody else, which was computed as if it stood first and
# has years of its own. Its true KV alone makes the answer right. Which of its sentences does most?

# %%
start, stop = prompt.chunk_spans[to_blame]
sentences = [[]]
for i in range(start, stop):
    sentences[-1].append(i)
    if text(ids[0, i]).strip().endswith("."):
        sentences.append([])
effects = {tuple(sentence): mended(sentence) - stale for sentence in sentences if sentence}
for sentence, effect in effects.items():
    print(f"{effect:+.2f} {text(ids[0, list(sentence)]).strip()}")
best = max(effects, key=effects.get)
assert best[0] == start  # "Orla Venn (1834 to 1902) was an engineer …"

# %% [markdown]
# One token is enough: the 9 of 1902, which is also what the blended answer says. At 15 % it was not recomputed. With
# the true KV of this token alone the answer is right.

# %%
of_token = {i: mended([i]) for i in best if not SHORT or text(ids[0, i]).strip().isdigit()}
culprit = max(of_token, key=of_token.get)
for i, value in of_token.items():
    print(f"{value:+.2f} {text(ids[0, i])!r} at {i}")
assert text(ids[0, culprit]) == text(wrong) == "9"
assert of_token[culprit] > 0
assert text(ids[0, culprit - 1 : culprit + 3]) == "1902"
assert culprit not in result.trace.selected_idx.tolist()

# %% [markdown]
# ## 5 All of it in one call
#
# `blame_prompt` (`blender.blame(prompt)` of a patched model) needs no guess. In addition to what the rule chose, it
# recomputes one whole passage at a time, then halves of the best ones, and looks for the smallest ratio that brings the
# answer back. It gives no token its true KV, as was done above: it recomputes it, as blending would. So it finds the
# same passage, and says which tokens of it, recomputed, would have been enough.

# %%
why = blame_prompt(model, prompt, store=store, tokenizer=tokenizer, num_tokens=18, seconds=20 if SHORT else 30)
print(why)
assert why.chunks[0].part == f"chunk {to_blame}"
assert why.fewest.part == f"chunk {to_blame}"
why
