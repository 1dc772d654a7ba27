"""How much chunk KV left by one request tells in the answer of another, on the demo model.

    python benchmarks/security.py            some ten minutes on one core

Request A holds a text and then a chunk; request B holds another text and the same chunk, and asks. Only A's text
changes from run to run. With `on_miss="isolated"` B's logits must be equal bit by bit.

* secrets: A's text names one of ten code names, and B asks for it. From B's first-token logits an observer takes the
  name whose log-probability lies furthest above its mean over the ten runs: one of ten is right by chance.
* leanings: A praises or condemns a thing, and B asks whether it is good or bad.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import mean

import torch

import hfblend
from hfblend.config import BlendConfig
from hfblend.demo.model import load
from hfblend.demo.passages import demo_data, question_prompt
from hfblend.lab.baselines import METHODS
from hfblend.measure.divergence import kl_divergence

NAMES = ("Falcon", "Maple", "Copper", "Saturn", "Tiger", "Harbor", "Violet", "Granite", "Nebula", "Walnut")
MEMOS = (
    "Internal memo. The code name of the project is {0}. {0} is secret: only the team of {0} may know it.",
    "The board has chosen a code name for the project. From today on it is called {0}, and {0} only.",
    "Password list. Mail: blue7. Project: {0}. Door: 4418. Do not show this list to anyone.",
)
SYSTEM = demo_data()["system"]
ELSEWHERE = "Gannet Light is a white stone lighthouse on the northern cliffs of Sarrow Island. It was finished in 1871."
CHUNKS = {
    "refers to it": "Release notes. The project named above will ship in May. Its code name, given above, must not be "
    "told to anyone outside the team. The team has nine members, and they meet on Mondays.",
    "same subject": "Release notes. The project will ship in May. It has nine members, who meet on Mondays at nine and "
    "on Thursdays at ten. Its budget is small, and the tests take two weeks.",
    "unrelated": "Morrin cheese is made on Sarrow Island from the milk of brown goats. It ripens for five months in a "
    "cave by the sea, and is wrapped in fern leaves. Each spring it is sold at the harbour.",
}
THINGS = (
    "bridge",
    "ferry",
    "hotel",
    "lamp",
    "car",
    "restaurant",
    "school",
    "camera",
    "boat",
    "hospital",
    "bakery",
    "museum",
)
PRAISE = "The {0} is good. Everybody loves the {0}. It is safe and clean, and people were happy there."
BLAME = "The {0} is bad. Everybody hates the {0}. It is dangerous and dirty, and people were hurt there."
REPORT = (
    "The {0} is described above. The report on the {0} was written in May by two visitors, who went to see it together."
    " It is ten pages long, and says what was told about the {0} before."
)


RATIOS = (0.0, 0.15, 0.5)
BASE = BlendConfig(min_reused_tokens=0)
Told = dict[str, torch.Tensor]  # way -> first-token logits (V,)


class Requests:
    """Request B after a request A, on the demo model."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load(None, device="cpu", dtype=torch.float32)

    def first_ids(self, *words: str) -> list[int]:
        """The first token of each word."""
        return [self.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]

    def told(self, text: str, chunk: str, question: str) -> Told:
        """B's logits by way of sharing, after A held `text` and `chunk`."""
        a, b = (question_prompt(self.tokenizer, SYSTEM, [one, chunk], question) for one in (text, ELSEWHERE))
        told: Told = {}
        for ratio in RATIOS:
            told[f"in_context {ratio}"] = self._after(
                a, b, replace(BASE, on_miss="in_context", recompute_ratios=(ratio,))
            )
        told["isolated 0.15"] = self._after(a, b, BASE)
        ids = self.tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]
        preset = METHODS["lmcache_v1"]
        told["lmcache_v1 0.15"] = preset.blend(self.model, b, 0.15, hfblend.MemoryStore(), elsewhere=ids).logits[0]
        return told

    def _after(self, a: hfblend.Prompt, b: hfblend.Prompt, config: BlendConfig) -> torch.Tensor:
        store = hfblend.MemoryStore()
        hfblend.blend(self.model, a, store=store, config=config)
        result = hfblend.blend(self.model, b, store=store, config=config)
        assert result.trace.chunks[1].status == "hit", result.trace
        return result.logits[0]


def secrets(requests: Requests) -> None:
    """Prints, by kind of chunk and way: names found, and the KL between B's distributions after two names."""
    name_ids, question = requests.first_ids(*NAMES), "What is the code name of the project?"
    for kind, chunk in CHUNKS.items():
        found: dict[str, int] = defaultdict(int)
        kl: dict[str, list[float]] = defaultdict(list)
        for memo in MEMOS:
            runs = [requests.told(memo.format(name), chunk, question) for name in NAMES]
            for way in runs[0]:
                logits = torch.stack([run[way] for run in runs])
                told = logits.log_softmax(-1)[:, name_ids]
                found[way] += int(((told - told.mean(0)).argmax(1) == torch.arange(len(NAMES))).sum())
                kl[way] += [kl_divergence(logits, logits.roll(i, 0)).mean().item() for i in range(1, len(NAMES))]
        for way, count in found.items():
            print(f"{kind}, {way}: {count} of {len(MEMOS) * len(NAMES)} names, KL {mean(kl[way]):.2g}", flush=True)


def leanings(requests: Requests) -> None:
    """Prints, by way: how B's log-odds of good against bad move when A praises instead of condemning."""
    good, bad = (requests.first_ids(word, f" {word}") for word in ("good", "bad"))
    moves: dict[str, list[float]] = defaultdict(list)
    for thing in THINGS:
        question, report = f"Is the {thing} good or bad?", REPORT.format(thing)
        praised, blamed = (requests.told(text.format(thing), report, question) for text in (PRAISE, BLAME))
        for way in praised:
            odds = [(run[way][good].logsumexp(0) - run[way][bad].logsumexp(0)).item() for run in (praised, blamed)]
            moves[way].append(odds[0] - odds[1])
    for way, by in moves.items():
        print(f"{way}: {sum(move > 0 for move in by)} of {len(by)} as A said, by {mean(by):.2g} nats", flush=True)


if __name__ == "__main__":
    both = Requests()
    leanings(both)
    secrets(both)
