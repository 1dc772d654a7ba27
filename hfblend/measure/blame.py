"""The reason why a blended answer is not full prefill's: the chunks and tokens that, recomputed too, bring it back.

    ■ recomputed, · reused           chunk 0     chunk 1     chunk 2
    as the settings' rule chose      · · ■ ·     ■ · · ·     · · · ■      the answer that is asked about
    … and all of one chunk           · · ■ ·     ■ ■ ■ ■     · · · ■      for each chunk: how close is it now?
    … and half of the best one       · · ■ ·     ■ ■ ■ ·     · · · ■      the better half again, down to one token
    … or by a higher ratio           ■ · ■ ·     ■ · ■ ·     · ■ · ■      the smallest that brings the answer back

Each figure is measured by a blend. Nothing here is monotone: a token more can also take the answer away again. So the
ratio is the smallest of those tried, and the tokens are some that suffice, not the fewest.

An answer ends where the model ends it. It counts as full prefill's if, given full prefill's answer so far, the most
likely token is the same at every place: then the greedy answers are equal too.

Shapes: P tokens of full prefill's answer, T tokens of the prompt, N reused tokens that could be recomputed.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..arguments import described, is_function, number_in, require_tokenizer
from ..blend.rules import scores_of
from ..blend.selection import Evidence
from ..config import BlendConfig, as_config
from ..generate.blending import BlendResult, blend, require_prompt
from ..prompts.prompt import Prompt
from ..store import Store, store_at
from ..trace.progress import told
from ..trace.trace import BlendTrace
from .divergence import RATIOS, FullAnswer, greedy, kl_divergence, teacher_forced_logits
from .results import Blame, Stretch, TriedRatio, counted, first_difference

_PRECISION = 0.01  # of the ratio
_HALVED = 3  # chunks whose tokens are looked at


@torch.no_grad()
def blame_prompt(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    tokenizer: Any = None,
    num_tokens: int = 64,
    seconds: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Blame:
    """Answers a prompt after a full prefill and blended, and searches for what made the difference.

    >>> found = blame_prompt(model, prompt, store=store, tokenizer=tokenizer)  # doctest: +SKIP
    >>> print(found)  # doctest: +SKIP
    The answers part at word 8: full prefill '1866.', blended '1902.'; … Chunk 3, …

    Args:
        model: a causal LM in eval mode, patched or not.
        prompt, store, config: as in `hfblend.blend`; `recompute_ratios="auto"` counts as `least_ratio`.
        tokenizer: for the texts.
        num_tokens: the longest answer; it ends earlier where the model ends it.
        seconds: no new blend begins after these. Half of them, at most, go to the chunks, a quarter to the ratio.
        progress: called with a line of text after each blend; what it raises ends the search.

    Raises:
        ValueError, TypeError: as `hfblend.blend`; a negative time.
    """
    prompt, config, store = require_prompt(prompt), as_config(config).settled(), store_at(store)
    number_in("seconds", seconds, 0, float("inf"))
    if progress is not None and not is_function(progress):
        raise TypeError(f"progress must be a function of a text, got {described(progress)}.")
    tokenizer = None if tokenizer is None else require_tokenizer(tokenizer)
    started = time.perf_counter()
    with told("Searching for what changed the answer") as line:

        def tell(text: str) -> None:
            line.say(f"Searching for what changed the answer: {text}")
            if progress is not None:
                progress(text)

        full = FullAnswer.of(model, prompt, num_tokens, until_end=True)
        return _Search(model, prompt, store, config, full, num_tokens, started, seconds, tell).run(tokenizer)


@dataclass(frozen=True)
class _Given:
    """A rule that selects given tokens. The settings' own rule runs as well, for the passes that it asks for."""

    config: BlendConfig
    tokens: torch.Tensor

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        if self.config.check_layers:
            scores_of(replace(evidence, config=self.config), lambda note: None)
        return torch.isin(evidence.candidate_idx, self.tokens.to(evidence.candidate_idx))


@dataclass
class _Search:
    model: nn.Module
    prompt: Prompt
    store: Store
    config: BlendConfig
    full: FullAnswer
    num_tokens: int
    started: float
    seconds: float
    tell: Callable[[str], None]
    num_blends: int = 0
    is_complete: bool = True
    base_kl: float = 0.0

    def run(self, tokenizer: Any) -> Blame:
        result = self.blend(self.config)
        if result.trace.misses:  # what is asked about is the answer of a store that has the chunks
            result = self.blend(self.config)
        token_kl, restores = self.distance(copy.deepcopy(result.cache))
        blended_ids, _ = greedy(self.model, self.prompt, self.num_tokens, until_end=True, cache=result.cache)
        trace, self.base_kl = result.trace, token_kl.mean().item()
        trace.tokenizer = tokenizer
        self.tell(f"as it is: KL {self.base_kl:.2g}")
        candidates = [] if trace.candidate_idx is None else trace.candidate_idx.tolist()
        chosen = set() if trace.selected_idx is None else set(trace.selected_idx.tolist())
        chunks = sorted(self.chunks(trace, candidates, chosen), key=lambda one: one.kl)
        ratios = [] if restores or not candidates else sorted(self.ratios(), key=lambda one: one.ratio)
        stretches = list(self.halves(chunks, candidates, chosen))
        return Blame(
            full_answer_ids=self.full.ids,
            blended_answer_ids=blended_ids,
            first_difference=first_difference(self.full.ids, blended_ids),
            token_kl=token_kl.tolist(),
            restores=restores,
            ratio=min(self.config.fixed_ratios, default=0.0),
            ratios=ratios,
            chunks=chunks,
            stretches=stretches,
            num_blends=self.num_blends,
            seconds=time.perf_counter() - self.started,
            is_complete=self.is_complete,
            trace=trace,
        )

    # --- what is tried --------------------------------------------------------------------------------------------

    def chunks(self, trace: BlendTrace, candidates: list[int], chosen: set[int]) -> Iterator[Stretch]:
        """Each chunk as a whole; those with the highest scores first, should time run out."""
        names = [*(["prefix"] if trace.prefix else []), *(f"chunk {i}" for i in range(len(trace.chunks)))]
        scores = dict(zip(candidates, [0.0] * len(candidates) if trace.scores is None else trace.scores.tolist()))
        parts = [(name, [i for i in candidates if piece.span[0] <= i < piece.span[1]])
                 for name, piece in zip(names, trace.pieces)]  # fmt: skip
        parts = [(name, tokens) for name, tokens in parts if set(tokens) - chosen]
        parts.sort(key=lambda part: -sum(scores[i] for i in part[1] if i not in chosen))
        for name, tokens in parts:
            if self.is_over(0.5):
                return
            yield self.stretch(name, tokens, candidates, chosen)

    def ratios(self) -> Iterator[TriedRatio]:
        """Ratios upwards to the first that brings the answer back; then between it and the last that did not."""
        low = min(self.config.fixed_ratios, default=0.0)
        for high in [ratio for ratio in RATIOS if ratio > low]:
            if self.is_over(0.75):
                return
            yield (tried := self.ratio(high))
            if tried.restores:
                break
            low = high
        else:
            return
        while high - low > _PRECISION and not self.is_over(0.75):
            middle = round((low + high) / 2, 4)
            yield (tried := self.ratio(middle))
            low, high = (low, middle) if tried.restores else (middle, high)

    def halves(self, chunks: list[Stretch], candidates: list[int], chosen: set[int]) -> Iterator[Stretch]:
        """Both halves of the best chunk's tokens, both halves of the closer one, and so on; then of the next chunk."""
        for chunk in [one for one in chunks if one.kl < self.base_kl][:_HALVED]:
            tokens = [i for i in candidates if chunk.start <= i < chunk.stop and i not in chosen]
            while len(tokens) > 1:
                middle, tried = len(tokens) // 2, []
                for half in (tokens[:middle], tokens[middle:]):
                    if self.is_over(1.0):
                        return
                    tried.append((self.stretch(chunk.part, half, candidates, chosen), half))
                    yield tried[-1][0]
                tokens = min(tried, key=lambda one: (not one[0].restores, one[0].kl))[1]

    # --- how it is measured ---------------------------------------------------------------------------------------

    def is_over(self, share: float) -> bool:
        """Whether this share of the time is used up."""
        is_over = time.perf_counter() - self.started >= share * self.seconds
        self.is_complete &= not is_over
        return is_over

    def stretch(self, part: str, tokens: Sequence[int], candidates: list[int], chosen: set[int]) -> Stretch:
        wanted = sorted(chosen.union(tokens))
        rule = _Given(self.config, torch.tensor(wanted))
        config = replace(self.settings(len(wanted) / len(candidates)), selection=rule)
        more = len(set(tokens) - chosen)
        kl, restores = self.measured(config, f"{part}, {counted(more)} more")
        return Stretch(part, tokens[0], tokens[-1] + 1, more, kl, restores)

    def ratio(self, ratio: float) -> TriedRatio:
        return TriedRatio(ratio, *self.measured(self.settings(ratio), f"ratio {ratio:g}"))

    def settings(self, ratio: float) -> BlendConfig:
        """The settings with another ratio; those that select nothing get a layer at which to rank."""
        layers = self.config.check_layers or (1,)
        return replace(self.config, check_layers=layers, recompute_ratios=(ratio,) * len(layers))

    def measured(self, config: BlendConfig, what: str) -> tuple[float, bool]:
        token_kl, restores = self.distance(self.blend(config).cache)
        kl = token_kl.mean().item()
        self.tell(f"{what}: KL {kl:.2g}{', full prefill’s answer' if restores else ''}")
        return kl, restores

    def blend(self, config: BlendConfig) -> BlendResult:
        self.num_blends += 1
        return blend(self.model, self.prompt, store=self.store, config=config, trace="tokens")

    def distance(self, cache: Any) -> tuple[torch.Tensor, bool]:
        """The KL (P,) of a blended prompt, whose cache grows, and whether every most likely token is full prefill's."""
        logits = teacher_forced_logits(self.model, self.prompt.input_ids, self.full.ids, cache).float()
        return kl_divergence(self.full.logits, logits), torch.equal(self.full.logits.argmax(-1), logits.argmax(-1))
