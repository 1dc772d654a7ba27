"""The engine against the bare graph, against itself without reuse, and what a blend costs those that decode.

    python benchmarks/serving.py                         on a GPU: a model of Llama-8B's shape, prompts of 16K tokens
    python benchmarks/serving.py --shape tiny --tokens 1024 --batches 2 --answer 8 --requests 4     a trial on a CPU

    decoding      tokens a second of full batches, and of one CUDA graph of the model's forward over as many rows with
                  as many keys, replayed without an engine
    throughput    requests a second, answers included: the same prompts blended and prefilled in full, in turns
    gap           the longest time between two tokens of requests that decode while a prompt is blended

Chunks come from a pool, and are stored beforehand on the model's device. Weights and ids are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfblend import BlendConfig, MemoryStore, Prompt
from hfblend.lab.synthetic import PromptMaker, random_model
from hfblend.serving import attention
from hfblend.serving.engine import Engine

RATIO = 0.15


class Pages:
    """A cache for `bare_step`: each layer's pages, as an engine's cache hands them to attention."""

    def __init__(self, model: Any, batch: int, length: int, page: int = 256) -> None:
        config, per_prompt = model.config, -(-length // page)
        shape = (batch * per_prompt, page, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
        self._pages = [
            tuple(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self.table = torch.randperm(shape[0], device=model.device, dtype=torch.int32).view(batch, per_prompt)

    def update(self, keys: Any, values: Any, layer: int, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kwargs["k_cache"], kwargs["v_cache"] = self._pages[layer]
        return keys, values


@torch.no_grad()
def bare_step(model: Any, batch: int, length: int, turns: int = 30) -> float:
    """Seconds of one decoding step of so many prompts of that length, as one CUDA graph."""
    pages = Pages(model, batch, length)
    ends = torch.arange(batch + 1, device=model.device, dtype=torch.int32)
    ids = torch.randint(3, model.config.vocab_size, (1, batch), device=model.device)
    positions = torch.full((1, batch), length - 1, device=model.device)
    unmasked = torch.zeros(1, 1, 1, 1, device=model.device)

    def step() -> None:
        hidden = model.model(
            input_ids=ids, position_ids=positions, attention_mask=unmasked, cache=pages, use_cache=False,
            cu_seq_lens_q=ends, cu_seq_lens_k=ends * length, max_length_q=1, max_length_k=1, block_table=pages.table,
        ).last_hidden_state  # fmt: skip
        ids.copy_(model.lm_head(hidden).argmax(-1))

    own = model.config._attn_implementation
    model.config._attn_implementation_internal = attention.NAME
    try:
        step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return min(timed(graph.replay, turns) for _ in range(3))
    finally:
        model.config._attn_implementation_internal = own


def timed(work: Callable[[], object], turns: int) -> float:
    """Seconds of one turn on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(turns):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / turns / 1000


class Watched:
    """Requests sent to an engine, and when each of their tokens came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sent: dict[str, float] = {}
        self.came: dict[str, list[float]] = {}
        self._running: set[str] = set()

    def send(self, prompt: Prompt, answer: int) -> str:
        request_id = self._engine.add_request(prompt, max_new_tokens=answer, streaming=True, eos_token_id=-1)
        self.sent[request_id], self.came[request_id] = time.perf_counter(), []
        self._running.add(request_id)
        return request_id

    def receive(self) -> None:
        output = self._engine.get_result(timeout=1)
        if output is None:
            return
        if output.error is not None:
            raise RuntimeError(output.error)
        self.came[output.request_id].append(time.perf_counter())
        if output.is_finished():
            self._running.discard(output.request_id)

    def run(self, prompts: Sequence[Prompt], at_once: int, answer: int) -> float:
        """Seconds that these requests take, with so many of them in the engine."""
        begin, left = time.perf_counter(), list(prompts)
        while left or self._running:
            while left and len(self._running) < at_once:
                self.send(left.pop(0), answer)
            self.receive()
        return time.perf_counter() - begin

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to each request's first token."""
        return [times[0] - self.sent[request_id] for request_id, times in self.came.items()]

    def tokens_per_second(self) -> float:
        """While all requests decoded."""
        begin, end = max(times[0] for times in self.came.values()), min(times[-1] for times in self.came.values())
        return sum(begin < at <= end for times in self.came.values() for at in times) / (end - begin)


def of_decoding(engine: Engine, prompts: Sequence[Prompt], batch: int, answer: int) -> dict[str, float]:
    watched = Watched(engine)
    watched.run(prompts[:batch], batch, answer)
    return {"tokens/s": watched.tokens_per_second()}


def of_gap(engine: Engine, prompts: Sequence[Prompt], batch: int, answer: int, blends: int = 3) -> dict[str, float]:
    """Milliseconds: a blend alone, a step, and the longest gap of others while prompts are blended."""
    alone = Watched(engine)
    alone.run(prompts[:blends], 1, 2)
    watched, late = Watched(engine), list(prompts[blends : 2 * blends])
    old = [watched.send(prompt, answer) for prompt in prompts[2 * blends : 2 * blends + batch]]
    while watched._running:
        watched.receive()
        have = min(len(watched.came[one]) for one in old)
        if late and have >= (blends - len(late) + 1) * answer // (blends + 2):
            watched.send(late.pop(0), 2)
    begin = max(watched.came[one][0] for one in old)
    gaps = [b - a for one in old for a, b in zip(watched.came[one], watched.came[one][1:]) if a >= begin]
    return {
        "blend": 1000 * statistics.median(alone.first_tokens), "step": 1000 * statistics.median(gaps),
        "longest gap": 1000 * max(gaps),
    }  # fmt: skip


def of_throughput(
    make: Callable[[bool], Engine], prompts: Sequence[Prompt], at_once: int, answer: int
) -> dict[str, Any]:
    """Requests a second and the median TTFT, blended and in full, in two turns."""
    found: dict[str, Any] = {"blended": [], "in full": []}
    for name, enabled in (("blended", True), ("in full", False)) * 2:
        with make(enabled) as engine:
            watched = Watched(engine)
            seconds = watched.run(prompts, at_once, answer)
        found[name].append((len(prompts) / seconds, statistics.median(watched.first_tokens)))
    best = {name: max(rate for rate, _ in turns) for name, turns in found.items()}
    return {**found, "ratio": best["blended"] / best["in full"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b")
    parser.add_argument("--tokens", type=int, default=16384, help="of a prompt's chunks")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--store-bytes", default="12GB")
    parser.add_argument("--max-bytes", default=None)
    args = parser.parse_args()
    model = random_model(args.shape)
    halves, prompts = PromptMaker(model.config.vocab_size).batch(args.tokens, max(*args.batches, args.requests) + 8)
    length, store = len(prompts[0]), MemoryStore(args.store_bytes)
    report: dict[str, Any] = {"shape": args.shape, "device": str(model.device), "prompt tokens": length}

    def make(enabled: bool = True) -> Engine:
        return Engine(model, store, BlendConfig(recompute_ratios=(RATIO,), enabled=enabled), max_bytes=args.max_bytes)

    if model.device.type == "cuda":
        for batch in args.batches:
            report[f"bare graph, {batch}"] = {"tokens/s": batch / bare_step(model, batch, length + args.answer)}
    with make() as engine:
        Watched(engine).run([*halves, *prompts[:2]], 1, 2)  # fills the store, and records graphs
        for batch in args.batches:
            report[f"engine, {batch}"] = of_decoding(engine, prompts, batch, args.answer)
        report["gap, ms"] = of_gap(engine, prompts, min(args.batches), 2 * args.answer)
    report["throughput"] = of_throughput(make, prompts[: args.requests], max(args.batches), args.answer)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
