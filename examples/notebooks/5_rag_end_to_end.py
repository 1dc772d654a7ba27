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
# `pip install "hfblend[notebooks]"` brings `rank-bm25`. For another model write `load("folder or hub id")`.

# %%
import tempfile
from pathlib import Path

from rank_bm25 import BM25Okapi

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load
from hfblend.store import DiskStore

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
assert len(documents) == 12

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


def make_prompt(question):
    messages = [
        {"role": "system", "content": "You answer questions using only the passages given. Keep the answer short."},
        {"role": "user", "content": f"Passages:\n{{documents}}Question: {question}\nAnswer with a few words."},
    ]
    return hfblend.Prompt.from_chat(tokenizer, messages, [f"{name}: {documents[name]}\n\n" for name in find(question)])


# %% [markdown]
# ## Ask
#
# `patch` wraps this model's `generate`; the rest of the program stays as it was.


# %%
def ask(question):
    prompt = make_prompt(question)
    output = model.generate(**prompt.inputs(model.device), max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    trace = blender.trace
    assert trace.blended
    print(f"{question}\n  {find(question)}\n  {answer}")
    print(f"  {trace.hits} of {len(trace.chunks)} chunks found, first token after {trace.ttft_ms:.0f} ms\n")
    return answer, trace


question = "What is the main ingredient of pellow soup?"
again = "What is pellow soup eaten with?"
blender = hfblend.patch(model, store=DiskStore(work / "store"))
first_answer, first = ask(question)
_, second = ask(again)

# %% [markdown]
# The first question finds nothing in the store. The second one finds the same four documents, in another order, and
# all of them in the store, so its first token comes sooner.

# %%
assert sorted(find(question)) == sorted(find(again))
assert find(question) != find(again)
assert (first.hits, second.hits) == (0, 4)
assert second.ttft_ms < first.ttft_ms
assert "eel" in first_answer
hfblend.show(second)

# %% [markdown]
# ## In another process
#
# The store is a folder. Another model object, or another process on the same folder, finds what was computed; the key
# holds a digest of the weights, so a changed model finds nothing. And an answer does not depend on what the store
# held.

# %%
blender.remove()
blender = hfblend.patch(model, store=DiskStore(work / "store"))
answer, third = ask(question)
assert third.hits == len(third.chunks)
assert third.ttft_ms < first.ttft_ms
assert answer == first_answer

# %% [markdown]
# ## Beside full prefill
#
# The same call with `enabled=False` is a stock `generate`. How much sooner the first token comes depends on the
# prompt's length: this one is short (`docs/performance.md` has prompts of 2,000 to 33,000 tokens).

# %%
prompt = make_prompt(question)
off = hfblend.BlendConfig(enabled=False)
output = model.generate(**prompt.inputs(model.device), blend_config=off, max_new_tokens=24, do_sample=False)
assert not blender.trace.blended
print(f"full prefill: first token after {blender.trace.ttft_ms:.0f} ms, blended {third.ttft_ms:.0f} ms")
print(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
blender.remove()
