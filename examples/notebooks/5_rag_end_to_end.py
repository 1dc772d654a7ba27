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
# # 5 RAG end to end
#
# A folder of text files, BM25 to find what a question needs, a chunk store on disk, and plain `model.generate`. The
# first question pays for prefilling its documents; from then on every question that finds them reuses them, in
# whatever order they come, in later processes too.
#
# For another model write `load("folder or hub id")`. The first cell installs hfblend where it is missing, and otherwise
# does nothing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hfblend") is None:  # on Colab, say
    packages = ["hfblend[display,plots]", "rank-bm25"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)

# %%
import tempfile
import warnings
from pathlib import Path

import pandas as pd
from rank_bm25 import BM25Okapi
from transformers import DynamicCache

import hfblend
from hfblend.demo.model import load
from hfblend.demo.passages import demo_data
from hfblend.display.plots import new_figure
from hfblend.store import DiskStore

warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")  # `cache`, from 5.24 on
pd.set_option("display.max_colwidth", None)
model, tokenizer = load(device="cpu")

# %% [markdown]
# ## A folder of documents
#
# Twelve invented texts of about 150 tokens each; put your own `.txt` files in their place.

# %%
work = Path(tempfile.mkdtemp())
folder = work / "documents"
folder.mkdir()
for passage in demo_data()["passages"]:
    (folder / f"{passage['title']}.txt").write_text(passage["text"], encoding="utf-8")

documents = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
pd.DataFrame({"begins": {name: f"{text[:70]} …" for name, text in documents.items()}})

# %% [markdown]
# ## Search
#
# A document is a chunk: the same text gives the same ids, and so the same key in the store. What would break that is
# to write something of the question into the chunk, such as its rank.


# %%
def words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


index = BM25Okapi([words(f"{name} {text}") for name, text in documents.items()])


def find(question, count=4):
    return index.get_top_n(words(question), list(documents), n=count)


SYSTEM = {"role": "system", "content": "You answer questions using only the passages given. Keep the answer short."}


def turn(question):
    return {"role": "user", "content": f"Passages:\n{{documents}}Question: {question}\nAnswer with a few words."}


def texts(question):
    return [f"{name}: {documents[name]}\n\n" for name in find(question)]


def make_prompt(question):
    return hfblend.Prompt.from_chat(tokenizer, [SYSTEM, turn(question)], texts(question))


question = "What is the soup served at the Lantern Festival called?"
again = "What is the main ingredient of pellow soup, served at the festival?"
pd.DataFrame({question: find(question), again: find(again)})

# %% [markdown]
# ## Ask
#
# Both questions find the same four documents, in another order. `patch` wraps this model's `generate`; the rest of the
# program stays as it was.
#
# **Predict**: how many of the four chunks will the second question find in the store? And which first token comes
# sooner?


# %%
asked, answers = [], []


def ask(question, note):
    prompt = make_prompt(question)
    output = model.generate(**prompt.inputs(model.device), max_new_tokens=24, do_sample=False)
    answers.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    asked.append(blender.trace)
    found = f"{blender.trace.hits} of {len(blender.trace.chunks)}"
    return {"": note, "question": question, "answer": answers[-1], "chunks found": found}


blender = hfblend.patch(model, store=DiskStore(work / "store"))
table = [ask(question, "first"), ask(again, "second")]
pd.DataFrame(table).set_index("")

# %% [markdown]
# The first question finds nothing in the store. The second one finds all four, so its first token comes sooner. What
# it did:

# %%
hfblend.show(asked[1])

# %% [markdown]
# ## In another process
#
# The store is a folder. Another model object, or another process on the same folder, finds what was computed; the key
# holds a digest of the weights, so a changed model finds nothing. And an answer does not depend on what the store
# held: here the first question again, with a new store object on the same folder, as a new process would have.

# %%
blender.remove()
blender = hfblend.patch(model, store=DiskStore(work / "store"))
table.append(ask(question, "first, new process"))
pd.DataFrame(table).set_index("")

# %% [markdown]
# ## Next to full prefill
#
# The same call with `enabled=False` is a stock `generate`. How much sooner the first token comes depends on the
# prompt's length: this one is short (`docs/performance.md` has prompts of 2,000 to 33,000 tokens).

# %%
prompt = make_prompt(question)
off = hfblend.BlendConfig(enabled=False)
output = model.generate(**prompt.inputs(model.device), blend_config=off, max_new_tokens=24, do_sample=False)
full_answer, full_trace = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True), blender.trace
print("full prefill:", full_answer)

names = ["nothing stored yet", "another question,\nsame documents", "first question again", "full prefill"]
figure, (axes,) = new_figure(7, 2.6)
times = [trace.ttft_ms for trace in (*asked, full_trace)]
axes.barh(names, times, color=["#E69F00", "#0072B2", "#0072B2", "0.6"])
axes.invert_yaxis()
axes.set(xlabel="time to the first token, ms")
figure

# %% [markdown]
# ## A second turn
#
# A conversation goes on as with stock `generate`: the cache of a turn comes back with the ids of all turns. Documents
# of the new turn are blended after it. The messages say `{documents}` twice, so there is a list of documents for each.
#
# **Predict**: of how many tokens and chunks will the second turn's trace speak?

# %%
prompt = make_prompt(question)
cache = DynamicCache(config=model.config)
options = {"past_key_values": cache, "max_new_tokens": 24, "do_sample": False}
ids = model.generate(**prompt.inputs(model.device), **options)
answer = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)

messages = [SYSTEM, turn(question), {"role": "assistant", "content": answer}, turn(again)]
prompt = hfblend.Prompt.from_chat(tokenizer, messages, [texts(question), texts(again)])
held = prompt.crop(cache, ids)  # all of it, unless the answer's text has other tokens than were generated
model.generate(**prompt.inputs(model.device), **options)
second_trace = blender.trace
print(f"{held} of {len(prompt)} tokens were in the cache.", *second_trace.notes)
print(second_trace)

# %% [markdown]
# Of all tokens, and of the four chunks that are new: the first turn, its documents among them, is the prefix. These
# four were found in the store, though they were computed for a first turn.

# %% [markdown]
# ## Exercise
#
# Ask something that finds other documents, "Who built Gannet Light?". Which of its four chunks are found in the store?
# Say it from `find`, then look at the trace.
#
# <details><summary>Solution</summary>
#
# ```python
# other = "Who built Gannet Light?"
# print("known:", set(find(other)) & set(find(question)))
# ask(other, "other documents")
# print([chunk.status for chunk in blender.trace.chunks], find(other), answers[-1])
# ```
#
# Those that a question before had found. A chunk's neighbours do not matter to its key, nor does its place.
#
# </details>
#
# At the end, the model's own `generate` comes back:

# %%
blender.remove()
