"""Closeness to full prefill at several ratios, on real weights.

    python benchmarks/quality.py                            the demo's questions, passages in two orders
    python benchmarks/quality.py --data FILE --n 12         a JSON list of {"question", "answers", "ctxs": [{"text"}]}

Per method: KL(full prefill || blended) in nats and top-1 agreement, mean over the first 16 tokens of full prefill's own
greedy answer (the end token does not stop it), and how many greedy answers of 24 tokens hold an accepted answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import track

import hfblend
from hfblend.demo import demo_data, demo_prompt
from hfblend.demo_model import load
from hfblend.measures import kl_divergence, teacher_forced_logits, top1_agreement

RATIOS = (0.05, 0.15, 0.30)
METHODS = {"full reuse": hfblend.BlendConfig(check_layers=(), recompute_ratios=(), min_reused_tokens=0)} | {
    f"ratio {ratio:.2f}": hfblend.BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0) for ratio in RATIOS
}


def demo_cases(tokenizer: Any) -> list[tuple[hfblend.Prompt, list[str]]]:
    data = demo_data()
    order = list(range(len(data["passages"])))
    return [
        (demo_prompt(tokenizer, data, question["question"], passages), question["answers"])
        for question in data["questions"]
        for passages in (order, order[::-1])
    ]


def file_cases(tokenizer: Any, path: Path, count: int) -> list[tuple[hfblend.Prompt, list[str]]]:
    cases = []
    for row in json.loads(path.read_text(encoding="utf-8"))[:count]:
        ask = f"Passages:\n{{documents}}Question: {row['question']}\nAnswer with a few words."
        documents = [passage["text"] + "\n\n" for passage in row["ctxs"]]
        cases.append(
            (hfblend.Prompt.from_chat(tokenizer, [{"role": "user", "content": ask}], documents), row["answers"])
        )
    return cases


def holds_an_answer(tokenizer: Any, model: Any, prompt: hfblend.Prompt, cache: Any, answers: list[str]) -> bool:
    output = model.generate(prompt.input_ids, past_key_values=cache, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).lower()
    return any(answer.lower() in text for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON file; default: the demo's questions")
    parser.add_argument("--n", type=int, default=12, help="how many questions of the file")
    parser.add_argument("--model", help="hub id or folder; default SmolLM2-135M-Instruct")
    args = parser.parse_args()
    model, tokenizer = load(args.model, "cpu", torch.float32)
    cases = file_cases(tokenizer, args.data, args.n) if args.data else demo_cases(tokenizer)
    found: dict[str, list[tuple[float, float, bool]]] = {method: [] for method in ("full prefill", *METHODS)}
    for prompt, answers in track(cases, "Questions"):
        forced = model.generate(prompt.input_ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        forced_ids = forced[0, len(prompt) :].tolist()
        full = teacher_forced_logits(model, prompt.input_ids, forced_ids)
        found["full prefill"].append((0.0, 1.0, holds_an_answer(tokenizer, model, prompt, None, answers)))
        store = hfblend.MemoryStore()
        for method, config in METHODS.items():
            result = hfblend.blend(model, prompt, store=store, config=config)
            logits = teacher_forced_logits(model, prompt.input_ids, forced_ids, result.cache)
            result = hfblend.blend(model, prompt, store=store, config=config)
            right = holds_an_answer(tokenizer, model, prompt, result.cache, answers)
            found[method].append((kl_divergence(full, logits).mean().item(), top1_agreement(full, logits), right))
    lengths = [len(prompt) for prompt, _ in cases]
    print(f"{len(cases)} prompts of {min(lengths)} to {max(lengths)} tokens\n")
    print("| method | KL, nats | top-1 agreement | answers found |\n| --- | --- | --- | --- |")
    for method, rows in found.items():
        kl, agreement, right = zip(*rows)
        print(f"| {method} | {mean(kl):.3f} | {mean(agreement):.3f} | {sum(right)} of {len(right)} |")


if __name__ == "__main__":
    main()
