"""Several processes of one host, a GPU each, against one of them: stored chunks and answered requests a second.

    python benchmarks/replicas.py --replicas 2                          a model of Llama-8B's shape
    python benchmarks/replicas.py --shape tiny --tokens 512 --chunks 8 --requests 2 --answer 4     a trial on a CPU

What a cluster adds (a router, retries) is left out: this is what the GPUs, the host's cores and the shared folder
allow. All processes begin each part together; its time is that of the slowest.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from hfblend import BlendConfig, MemoryStore
from hfblend.generate.precompute import precompute
from hfblend.lab.synthetic import PromptMaker, random_model
from hfblend.serving.engine import Engine
from hfblend.store import DiskStore, flush


def stored(model: Any, args: Any, folder: Path, share: slice) -> float:
    """Seconds to compute a share of the chunks and store them in the shared folder."""
    maker, store = PromptMaker(model.config.vocab_size, seed=1), DiskStore(folder, "200GB")
    prefix, chunks = maker.ids(32), [maker.ids(512) for _ in range(args.chunks)]
    begin = time.perf_counter()
    precompute(model, chunks[share], prefix=prefix, store=store)
    flush(store)
    return time.perf_counter() - begin


def answered(model: Any, args: Any, share: slice, ready: Any) -> float:
    """Seconds to answer a share of the requests, whose chunks this process has on its GPU."""
    _, prompts = PromptMaker(model.config.vocab_size, seed=2).batch(args.tokens, 2 + args.requests)
    settings = BlendConfig(recompute_ratios=(0.15,))
    with Engine(model, MemoryStore(args.store_bytes), settings, max_bytes=args.max_bytes) as engine:
        _wait_for(engine, prompts[:2], 2)
        mine = prompts[2:][share]
        _wait_for(engine, mine, 2)  # fills the store
        ready.wait()
        begin = time.perf_counter()
        _wait_for(engine, mine, args.answer)
        return time.perf_counter() - begin


def _wait_for(engine: Engine, prompts: Any, answer: int) -> None:
    ids = {engine.add_request(prompt, max_new_tokens=answer, eos_token_id=-1) for prompt in prompts}
    while ids:
        output = engine.get_result(timeout=1)
        if output is not None and output.is_finished():
            ids.remove(output.request_id)


def replica(number: int, replicas: int, args: Any, folder: Path, barrier: Any, results: Any) -> None:
    """One process: its share of both parts."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", number % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    model, share = random_model(args.shape, device), slice(number, None, replicas)
    precompute(model, [[5] * 512] * 2, store=MemoryStore())  # compiles
    barrier.wait()
    results.put(("chunks/s", args.chunks / stored(model, args, folder, share)))
    if args.requests:
        results.put(("requests/s", args.requests / answered(model, args, share, barrier)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--tokens", type=int, default=16384, help="of a prompt's chunks")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--store-bytes", default="12GB")
    parser.add_argument("--max-bytes", default=None)
    parser.add_argument("--folder", default=None, help="the shared store; default, a temporary one")
    args = parser.parse_args()
    report: dict[str, Any] = {"shape": args.shape, "GPUs": torch.cuda.device_count(), "cores": os.cpu_count()}
    for replicas in (1, args.replicas):
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            given = (replicas, args, Path(folder), context.Barrier(replicas), results)
            multiprocessing.spawn(replica, given, replicas)  # ends all of them if one fails
        rates: dict[str, float] = {}
        while not results.empty():
            name, rate = results.get()
            rates[name] = min(rate, rates.get(name, rate))
        report[f"{replicas} replicas"] = rates
    one, several = report["1 replicas"], report[f"{args.replicas} replicas"]
    report["ratio"] = {name: several[name] / one[name] for name in one}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
