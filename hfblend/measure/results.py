"""The results of measuring: the distance from full prefill, the ratio that keeps it small, what changed an answer.

Shapes: P tokens of full prefill's answer, T tokens of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import BlendConfig
from ..trace.trace import BlendTrace, name_of

_QUOTED = 60  # characters of a text in a sentence


# --- the distance of one prompt ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """Distances of a blended prompt from its full prefill, over the first tokens of full prefill's greedy answer.

    Attributes:
        kl: KL(full prefill ‖ blended) in nats, mean over the tokens.
        largest_logit_difference: over all tokens and the whole vocabulary.
        top1_agreement: share in [0, 1] of tokens whose most likely token is the same.
        first_difference: index of the first token at which the two greedy answers part; `None` if they are equal.
        full_answer_ids, blended_answer_ids: the two greedy answers, not forced.
        recomputed_pairs_share: computed (token, layer) pairs over those of a full prefill.
        trace: of the blended prompt.
    """

    kl: float
    largest_logit_difference: float
    top1_agreement: float
    first_difference: int | None
    full_answer_ids: list[int]
    blended_answer_ids: list[int]
    recomputed_pairs_share: float
    trace: BlendTrace = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON; the trace too."""
        return {**vars(self), "trace": self.trace.to_dict()}

    def __repr__(self) -> str:
        return f"<Verification: {self}>"

    def __str__(self) -> str:
        count = len(self.full_answer_ids)
        answers = "same answer" if self.first_difference is None else f"answers part at token {self.first_difference}"
        return (
            f"KL {self.kl:.2e} nats over {count} tokens, top-1 agreement {self.top1_agreement:.0%}, {answers}, largest "
            f"logit difference {self.largest_logit_difference:.2e}, {self.recomputed_pairs_share:.1%} of a full "
            "prefill's (token, layer) pairs"
        )


# --- a ratio for many prompts -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationRow:
    """One setting, over all prompts.

    Attributes:
        recompute_ratio: of each check layer.
        layers: the check layers, or for `"suffix_attention"` the score layers (`None`: its own choice).
        correction: of the rows that stay reused.
        kl: in nats, mean over the prompts; `largest_kl`, of the worst prompt.
        top1_agreement, recomputed_pairs_share: mean over the prompts.
    """

    recompute_ratio: float
    layers: tuple[int, ...] | None
    correction: str | Callable[..., Any] | None
    kl: float
    largest_kl: float
    top1_agreement: float
    recomputed_pairs_share: float

    @property
    def correction_name(self) -> str:
        """As shown: `offset`, `none`, or the name of the user's function."""
        return name_of(self.correction) or "none"


@dataclass(frozen=True)
class Calibration:
    """The settings with the smallest ratio that meets the bound, and a row for each that was tried."""

    config: BlendConfig
    max_kl: float
    rows: list[CalibrationRow]

    def __repr__(self) -> str:
        ratios = ", ".join(f"{ratio:g}" for ratio in self.config.fixed_ratios)
        return f"<Calibration: ratio {ratios} keeps the KL at {self.max_kl:g} nats or less; {len(self.rows)} tried>"

    def __str__(self) -> str:
        lines = [
            f"{'ratio':>6} {'layers':>12} {'correction':>10} {'KL, nats':>10} {'largest':>10} {'top-1':>6} {'pairs':>6}"
        ]
        for row in self.rows:
            layers = "default" if row.layers is None else ",".join(map(str, row.layers))
            lines.append(
                f"{row.recompute_ratio:6.2f} {layers:>12} {row.correction_name:>10} {row.kl:10.2e} "
                f"{row.largest_kl:10.2e} {row.top1_agreement:6.0%} {row.recomputed_pairs_share:6.1%}"
            )
        return "\n".join(lines)


# --- what changed an answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TriedRatio:
    """A ratio above that of the settings: its mean KL in nats, and whether full prefill's answer is back."""

    ratio: float
    kl: float
    restores: bool


@dataclass(frozen=True)
class Stretch:
    """Tokens `[start, stop)` of a chunk, all recomputed in addition to what the rule had chosen.

    Attributes:
        part: `"chunk 2"`, numbered from 0, or `"prefix"`.
        more: how many of them the rule had not chosen.
        kl: in nats, mean over the answer's tokens.
        restores: whether full prefill's answer is back.
    """

    part: str
    start: int
    stop: int
    more: int
    kl: float
    restores: bool


@dataclass(frozen=True)
class Blame:
    """A blended answer next to full prefill's, and what would have to be recomputed to bring that one back.

    Attributes:
        full_answer_ids, blended_answer_ids: the greedy answers, up to the model's end token.
        first_difference: index of the first token at which they part; `None` if they are equal.
        token_kl: (P) KL(full prefill ‖ blended) in nats at each token of full prefill's answer.
        restores: whether nothing more is needed.
        ratio: of the settings.
        ratios: higher ones that were tried, rising.
        chunks: each chunk that has reused tokens left, recomputed as a whole; the closest to full prefill first.
        stretches: halves of the best chunks, in the order in which they were tried.
        num_blends, seconds: the cost of the search.
        is_complete: whether it ended before its time did.
        trace: of the blended prompt, with its tokens.
    """

    full_answer_ids: list[int]
    blended_answer_ids: list[int]
    first_difference: int | None
    token_kl: list[float]
    restores: bool
    ratio: float
    ratios: list[TriedRatio]
    chunks: list[Stretch]
    stretches: list[Stretch]
    num_blends: int
    seconds: float
    is_complete: bool
    trace: BlendTrace = field(repr=False)

    @property
    def kl(self) -> float:
        """Mean of `token_kl`."""
        return sum(self.token_kl) / len(self.token_kl)

    @property
    def smallest_ratio(self) -> float | None:
        """The smallest ratio that was found to give full prefill's answer."""
        found = [one.ratio for one in self.ratios if one.restores]
        return self.ratio if self.restores else min(found, default=None)

    @property
    def fewest(self) -> Stretch | None:
        """The fewest more tokens that were found to give full prefill's answer; `None`: none, or none are needed."""
        found = [] if self.restores else [one for one in (*self.chunks, *self.stretches) if one.restores]
        return min(found, key=lambda one: (one.more, one.kl), default=None)

    def falls(self) -> list[float | None]:
        """Returns for each of the prompt's T tokens by how many nats the KL falls when the smallest stretch around it
        that was tried is recomputed; `None`: not tried, or recomputed already."""
        found: list[float | None] = [None] * self.trace.num_tokens
        for one in (*self.chunks, *self.stretches):  # halves come after what they are halves of
            found[one.start : one.stop] = [self.kl - one.kl] * (one.stop - one.start)
        for i in self.recomputed():
            found[i] = None
        return found

    def recomputed(self) -> set[int]:
        """Returns the tokens that the rule chose."""
        chosen = self.trace.selected_idx
        return set() if chosen is None else set(chosen.tolist())

    def words(self) -> tuple[list[str], list[str]]:
        """Returns the words of full prefill's and of the blended answer, each with the space before it; token ids if no
        tokenizer is known."""
        tokenizer = self.trace.tokenizer

        def words(ids: list[int]) -> list[str]:
            if tokenizer is None:
                return [f" {i}" for i in ids]
            return re.findall(r"\s*\S+", tokenizer.decode(ids, skip_special_tokens=True).strip())

        return words(self.full_answer_ids), words(self.blended_answer_ids)

    def first_different_word(self) -> int | None:
        """Returns the index of the first word at which the answers part, which may be the end of the shorter one."""
        return first_difference(*self.words())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain numbers, lists and strings, for JSON; the trace too."""
        found = asdict(replace(self, trace=BlendTrace()))
        found |= {"kl": self.kl, "smallest_ratio": self.smallest_ratio, "trace": self.trace.to_dict()}
        return {**found, "fewest": self.fewest and asdict(self.fewest)}

    def __str__(self) -> str:
        return " ".join(self.sentences())

    def __repr__(self) -> str:
        return f"<Blame: {self}>"

    def sentences(self) -> list[str]:
        """Returns what was found, as sentences."""
        return [self._difference(), *self._cure(), self._cost()]

    def _difference(self) -> str:
        kl = f"mean KL {self.kl:.2g} nats over {len(self.token_kl)} tokens"
        place = self.first_different_word()
        if self.first_difference is None or place is None:
            words = "" if self.first_difference is None else " in its words"
            return f"The blended answer is full prefill's{words}; {kl}."
        said = [repr(words[place].strip()) if place < len(words) else "ends" for words in self.words()]
        return f"The answers part at word {place + 1}: full prefill {said[0]}, blended {said[1]}; {kl}."

    def _cure(self) -> Iterator[str]:
        if not self.chunks:
            yield "No token was reused that could be recomputed." if self.is_complete else "No chunk was tried."
            return
        best = self.chunks[0]
        if best.kl >= self.kl:
            yield "No chunk alone, recomputed as a whole, brings it closer."
        else:
            yield f"{best.part.capitalize()}, recomputed as a whole, brings it closest: KL {best.kl:.2g}."
        if self.restores:
            return
        if (fewest := self.fewest) is not None:
            yield f"To bring it back, recompute {counted(fewest.more)} more: {self.place_of(fewest)}."
        else:
            yield f"No chunk {'alone' if self.is_complete else 'that was tried'} brings it back."
        if self.smallest_ratio is not None:
            yield f"Ratio {self.smallest_ratio:g} instead of {self.ratio:g} brings it back."
        elif self.ratios:
            yield f"No ratio that was tried, up to {self.ratios[-1].ratio:g}, brings it back."

    def place_of(self, stretch: Stretch) -> str:
        """Returns where a stretch stands: chunk 3, tokens 504 to 512, 'was born in 1902'."""
        texts, start, stop = self.trace.token_texts(), stretch.start, stretch.stop
        place = f"{stretch.part}, " + (f"tokens {start} to {stop - 1}" if stop - start > 1 else f"token {start}")
        if texts is None:
            return place
        text = " ".join("".join(texts[start:stop]).split())
        return f"{place}, {text[:_QUOTED] + '…' if len(text) > _QUOTED else text!r}"

    def _cost(self) -> str:
        ended = "" if self.is_complete else ", when the time was up"
        return f"({self.num_blends} blends, {self.seconds:.0f} s{ended}.)"


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """Returns the first index at which two answers differ, which may be the end of the shorter one; `None`: nowhere."""
    end = None if len(one) == len(other) else min(len(one), len(other))
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), end)


def counted(tokens: int) -> str:
    return f"{tokens} token{'' if tokens == 1 else 's'}"
