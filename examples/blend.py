"""LMCache's blending example on hfblend: plain ids, chunks between separators, plain `model.generate(input_ids)`.

    sys # # chunk1 # # chunk2 # # chunk3 # # question      every chunk is new
    sys # # chunk2 # # chunk1 # # chunk3 # # question      all are found, in another order
    sys # # chunk3 # # chunk4 # # chunk1 # # question      one is new

The settings come from the environment, under LMCache's names or hfblend's:

    LMCACHE_BLEND_RECOMPUTE_RATIOS=0.3 python examples/blend.py [--model ID_OR_FOLDER]
"""

import argparse

import torch

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

parser = argparse.ArgumentParser(description="Blend three prompts that share chunks.")
parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
model, tokenizer = load(parser.parse_args().model)
config = hfblend.BlendConfig.from_env()
if config.separator is None:
    raise SystemExit("This example splits ids at a separator; set LMCACHE_BLEND_SPECIAL_STR to some text.")


def encode(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


data = demo_data()
texts = [passage["text"] for passage in data["passages"]]
separator = encode(config.separator) if isinstance(config.separator, str) else list(config.separator)
system, question = encode(data["system"]), encode("In short, Orla Venn was born in the village of")
chunk1, chunk2, chunk3, chunk4 = (encode("\n".join(texts[i : i + 3])) for i in (0, 3, 6, 9))


def run(name, chunks):
    ids = list(system)
    for piece in (*chunks, question):
        ids += separator + piece
    output = model.generate(torch.tensor([ids], device=model.device), max_new_tokens=16, do_sample=False)
    trace = blender.trace
    print(f"{name}: {tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)!r}")
    print(
        f"  hits {trace.hits}, misses {trace.misses}, exact {sum(chunk.exact for chunk in trace.chunks)}, "
        f"selected {trace.selected_tokens} of {trace.reused_tokens} tokens, ttft {trace.ttft_ms:.0f} ms"
    )


with hfblend.patch(model, config=config, tokenizer=tokenizer) as blender:
    run("first", [chunk1, chunk2, chunk3])
    run("reordered", [chunk2, chunk1, chunk3])
    run("one new", [chunk3, chunk4, chunk1])
