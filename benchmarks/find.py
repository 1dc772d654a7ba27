"""Stored passages found in plain prompts, against the same passages marked, and the cost of the index.

    python benchmarks/find.py musique_dev.json --questions 0:50         SmolLM2, on a CPU about a minute a question
    python benchmarks/find.py --index 100000                            the index alone

A question's passages are stored one by one after its prompt's prefix. Then the whole prompt is written as one text and
tokenised at once, so that tokens merge where passages meet. Both prompts are compared with their own full prefill,
over the tokens of its answer. Times are of the CPU, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from array import array
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfblend
from hfblend import BlendConfig, MemoryStore
from hfblend.blend.look_up import ChunksOf
from hfblend.demo.model import load
from hfblend.generate.find import Finder
from hfblend.generate.precompute import precompute, prefill_chunk
from hfblend.lab.eval.data import FORMS, QA, load_json, passage_text, to_prompt
from hfblend.measure.divergence import FullAnswer, kl_divergence, teacher_forced_logits
from hfblend.support.registry import model_of


def plain_ids(tokenizer: Any, example: Any, num_passages: int) -> torch.Tensor:
    """The prompt as one text, tokenised at once (1, T)."""
    form = FORMS[QA].replace("<question>", example.question)
    text = form.replace("{documents}", "".join(map(passage_text, example.passages[:num_passages])))
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def blended(model: Any, prompt: hfblend.Prompt, store: Any) -> tuple[float, float]:
    """The KL of a blended prompt from its full prefill, in nats, the mean over 16 tokens; CPU seconds of the blend."""
    full, began = FullAnswer.of(model, prompt, 16), time.process_time()
    cache = hfblend.blend(model, prompt, store=store).cache
    seconds = time.process_time() - began
    logits = teacher_forced_logits(model, prompt.input_ids, full.ids, cache)
    return kl_divergence(full.logits, logits).mean().item(), seconds


def of_question(model: Any, tokenizer: Any, example: Any) -> dict[str, float]:
    """The figures of one question, by name."""
    marked, store, config = to_prompt(tokenizer, example, 8192), MemoryStore("8GB"), BlendConfig(find="stored")
    ids = plain_ids(tokenizer, example, len(marked.chunk_spans))
    precompute(model, marked.chunk_ids[::-1], prefix=marked.prefix_ids, store=store)
    finder, began = Finder(model_of(model), store, config), time.process_time()
    found = hfblend.Prompt(ids, finder.spans(ids[0].tolist()))
    searching = time.process_time() - began
    kl_marked, s_marked = blended(model, marked, store)
    kl_found, s_found = blended(model, found, finder.found_in)
    share = sum(map(len, found.chunk_ids)) / sum(map(len, marked.chunk_ids))
    return {
        "tokens": len(found), "found": share, "kl marked": kl_marked, "kl found": kl_found,
        "s marked": s_marked, "s found": s_found + searching, "searching ms": 1000 * searching,
    }  # fmt: skip


def of_index(num_chunks: int, chunk: int = 170, length: int = 16384) -> None:
    """Prints how long a prompt of stored texts is looked through, and the bytes that the index takes for a text."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, eos_token_id=None)).eval()
    model, store, random = model_of(tiny), MemoryStore("1TB"), np.random.default_rng(0)
    config = BlendConfig(find="stored")
    texts = random.zipf(1.3, size=(num_chunks, chunk)).clip(max=49_000)
    chunks_of = ChunksOf(model, store, config, ())
    one = prefill_chunk(tiny, [1] * chunk)
    tracemalloc.start()
    for ids in map(np.ndarray.tolist, texts):
        store.put(*chunks_of.keys([(ids, ())]), replace(one, ids=ids, scope=chunks_of.scope))
    before = tracemalloc.get_traced_memory()[0]
    Finder(model, store, config).spans(texts[0].tolist())
    num_bytes = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    ms = []
    for _ in range(50):
        parts = (part for _ in range(length) for part in (random.integers(0, 49_000, 4), random.choice(texts)[1:-1]))
        ids = np.concatenate(list(islice(parts, 2 * length // chunk)))[:length]
        ids = array("q", ids.astype(np.int64).tobytes())
        began = time.process_time()
        spans = Finder(model, store, config).spans(ids)
        ms.append(1000 * (time.process_time() - began))
    print(
        f"{num_chunks:,} texts of {chunk} ids, {num_bytes / num_chunks:,.0f} bytes each; {len(spans)} found in "
        f"{length:,}: {statistics.median(ms):.2f} ms, at least {min(ms):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--questions", default="0:50")
    parser.add_argument("--index", type=int, metavar="CHUNKS")
    args = parser.parse_args()
    if args.index:
        of_index(args.index)
    if args.data is None:
        return
    model, tokenizer = load()
    rows = []
    for number in range(*map(int, args.questions.split(":"))):
        rows.append(of_question(model, tokenizer, load_json(args.data)[number]))
        means = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        print(number, " ".join(f"{name} {value:.4g}" for name, value in means.items()), flush=True)


if __name__ == "__main__":
    main()
