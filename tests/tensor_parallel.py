"""One rank of a tensor-parallel model: what tests/test_large_models.py starts twice. Writes what it found as JSON.

python -m torch.distributed.run --nproc-per-node 2 tests/tensor_parallel.py CHECKPOINT FOLDER gloo|nccl
"""

from __future__ import annotations

import json
import os
import pathlib
import sys

import torch
import torch.distributed as dist
from helpers import config, generate, largest_difference, make_prompt, store_of_true_kv
from transformers import AutoModelForCausalLM

import hfblend
from hfblend.store import DiskStore
from hfblend.support.registry import model_of

PROMPT = make_prompt()
RULES = ("kv_deviation", "suffix_attention", "mixed")


def run(model, settings, store, found, name):
    with hfblend.patch(model, config=settings, store=store) as blender:
        output = generate(model, PROMPT.inputs(model.device))
        trace = blender.trace
        found[name] = {
            "blended": trace.blended,
            "hits": trace.hits,
            "selected": trace.selected_idx.tolist(),
            "tokens": output.sequences[0].tolist(),
        }
    return output


def main(checkpoint: str, folder: pathlib.Path, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    rank = dist.get_rank()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, tp_plan="auto").eval()
    stock = generate(model, {"input_ids": PROMPT.input_ids.to(model.device)})
    found = {"key": model_of(model).fingerprint.digest, "heads": model_of(model).layouts[0].key_heads}
    found["stock"] = stock.sequences[0].tolist()
    whole = run(model, config(1.0), None, found, "ratio 1")
    true = run(model, config(0.3), store_of_true_kv(model, PROMPT), found, "true KV")
    found["largest_difference"] = [largest_difference(output, stock) for output in (whole, true)]
    for rule in RULES:
        run(model, config(0.3, selection=rule), None, found, rule)
    shared = folder / "chunks"  # one folder for both ranks
    run(model, config(0.3), DiskStore(shared), found, "disk, cold")
    run(model, config(0.3), DiskStore(shared), found, "disk, warm")
    partial = hfblend.MemoryStore()
    run(model, config(0.3), partial, found, "one rank lost its chunks, before")
    if rank == 1:
        partial.clear()
    run(model, config(0.3), partial, found, "one rank lost its chunks")
    with hfblend.patch(model, config=config(0.3)) as blender:
        found["precomputed"] = blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids).computed
    try:
        hfblend.blend(model, PROMPT, config=config(0.3, recompute_ratios="auto"))
    except ValueError as error:
        found["auto"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3])
