"""A conversation of five turns, each with other documents: every turn blends after the cache of the earlier ones.

    turn 1   system | documents | question 1 | answer 1
    turn 2   ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ | documents | question 2 | answer 2      ▨ in the cache

The documents are computed once, before. Stock generate answers the same questions, and keeps a cache too.

python examples/conversation.py
"""

from __future__ import annotations

import argparse
import random
from importlib import resources

import torch
from transformers import DynamicCache

import hfblend
from hfblend.demo.demo import demo_data
from hfblend.demo.model import load

STOCK = hfblend.BlendConfig(enabled=False)


class Conversation:
    """The messages of a conversation, the documents of each turn, and the cache that holds both with its ids."""

    def __init__(self, blender: hfblend.Blender, system: str, config: hfblend.BlendConfig | None = None) -> None:
        self.blender, self.config = blender, config
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}]
        self.documents: list[list[str]] = []
        self.cache, self.ids = DynamicCache(config=blender.model.config), torch.empty(1, 0, dtype=torch.long)

    def ask(self, question: str, documents: list[str], max_new_tokens: int = 24) -> str:
        model, tokenizer = self.blender.model, self.blender.tokenizer
        self.messages.append({"role": "user", "content": f"{{documents}}{question} Answer with a few words."})
        self.documents.append(documents)
        prompt = hfblend.Prompt.from_chat(tokenizer, self.messages, self.documents)  # the whole conversation
        prompt.crop(self.cache, self.ids)  # should an answer's text have other tokens than were generated
        options = {"past_key_values": self.cache, "max_new_tokens": max_new_tokens, "do_sample": False}
        self.ids = model.generate(**prompt.inputs(model.device), **options, blend_config=self.config)
        answer = tokenizer.decode(self.ids[0, len(prompt) :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def corpus() -> tuple[list[str], list[str]]:
    """The passages that the questions are about, and entries of an encyclopaedia."""
    passages = [f"{passage['title']}: {passage['text']}" for passage in demo_data()["passages"]]
    entries = (resources.files("hfblend") / "data" / "filler.txt").read_text(encoding="utf-8")
    return passages, entries.strip().split("\n\n")


def turns_of(count: int) -> list[tuple[str, list[str]]]:
    """Five questions, each with `count` documents: the two that answer it, and others, some from earlier turns."""
    (passages, entries), turns = corpus(), []
    for number, asked in enumerate(demo_data()["questions"][:5]):
        chance = random.Random(number)
        needed = [passages[i] for i in asked["passages"]]
        others = [text for text in passages + entries if text not in needed]
        documents = needed[:count] + chance.sample(others, max(0, count - len(needed)))
        chance.shuffle(documents)
        turns.append((asked["question"], documents))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation with other documents in each turn.")
    parser.add_argument("--documents", type=int, default=10, help="in each turn (default %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.15, help="of reused tokens to recompute (default %(default)s)")
    given = parser.parse_args()
    model, tokenizer = load()
    config = hfblend.BlendConfig(recompute_ratios=(given.ratio,), min_reused_tokens=0)
    with hfblend.patch(model, config, tokenizer) as blender:
        system, turns = demo_data()["system"], turns_of(given.documents)
        opening = [{"role": "system", "content": system}, {"role": "user", "content": "{documents}"}]
        prefix = hfblend.Prompt.from_chat(tokenizer, opening, turns[0][1]).prefix_ids
        print(blender.precompute({text for _, documents in turns for text in documents}, prefix=prefix))
        ours, stock = Conversation(blender, system), Conversation(blender, system, STOCK)
        for number, (question, documents) in enumerate(turns, 1):
            print(f"\n{number}. {question}")
            answer = ours.ask(question, documents)
            trace = blender.trace
            print(f"   {answer}\n   {trace}")
            answer, ms = stock.ask(question, documents), blender.trace.ttft_ms
            print(f"   stock: {answer}\n   first token after {ms:.0f} ms: {ms / trace.ttft_ms:.1f} times as long")


if __name__ == "__main__":
    main()
