"""Scores of answers against references, and bootstrap intervals of means over questions: pure functions.

KL divergence and top-1 agreement are in `hfblend/measure/divergence.py`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import mean
from typing import Any

import torch

from ...prompts.tokenize import Encoder
from ...util import require

NUM_RESAMPLES = 10_000
_TAILS = (0.025, 0.975)  # of a 95 % interval

Interval = tuple[float, float]


# --- answers ----------------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Normalises as SQuAD does: lower case, no punctuation, no articles, single spaces.

    >>> normalize_answer("The  Exeter-College, Oxford.")
    'exetercollege oxford'
    """
    letters = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def first_line(text: str) -> str:
    """The first line with text: a model's additions below its answer are not scored."""
    return text.strip().partition("\n")[0].strip()


def f1_words(answer: str, reference: str) -> float:
    """F1 of the words that both share, after `normalize_answer`.

    >>> f1_words("at Exeter College", "Exeter College")
    0.8
    """
    return _f1(normalize_answer(answer).split(), normalize_answer(reference).split())


def f1_ids(answer: str, reference: str, tokenizer: Any) -> float:
    """F1 of the token ids that both share, after `normalize_answer`, as the CacheBlend research repository counts."""
    encode = Encoder(tokenizer)
    return _f1(encode(normalize_answer(answer)), encode(normalize_answer(reference)))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F-measure with stemming, by the library `rouge-score`; `ImportError` without it."""
    return require_rouge().RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure


def require_rouge() -> Any:
    """The library's module; raises `ImportError` that says how to install it."""
    return require("rouge_score.rouge_scorer", "rouge-score", "eval", "ROUGE-L needs")


def string_match(answer: str, reference: str) -> float:
    """1 if a reference occurs anywhere in an answer, else 0: case is ignored, and control characters are line breaks.

    Source: RULER, `postprocess_pred` and `string_match_part`; a reference's spaces at both ends are dropped as well.

    >>> string_match("It was Exeter College, Oxford.", "exeter college")
    1.0
    """
    said = re.sub(r"[\x00-\x1f]", "\n", answer.strip())
    return float(reference.strip().lower() in said.lower())


def share_found(answer: str, references: Sequence[str]) -> float:
    """The share of references that occur in an answer, for questions with several answers (`string_match_all`).

    >>> share_found("48213 and 90125", ["48213", "77001"])
    0.5
    """
    return mean(string_match(answer, reference) for reference in references)


def best(score: Callable[[str, str], float], answer: str, references: Iterable[str]) -> float:
    """The highest score against any accepted reference."""
    return max(score(answer, reference) for reference in references)


def _f1(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """2PR / (P + R) of two bags; two empty ones agree."""
    if not answer or not reference:
        return float(not answer and not reference)
    return 2 * (Counter(answer) & Counter(reference)).total() / (len(answer) + len(reference))


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def bootstrap_mean_ci(values: Sequence[float], seed: int = 0) -> Interval:
    """The 95 % interval of a mean over questions: percentiles of 10,000 means, each of as many questions drawn with
    replacement. Raises `ValueError` without values.

    >>> bootstrap_mean_ci([0.5, 0.5, 0.5])
    (0.5, 0.5)
    """
    return bootstrap_ratio_ci(values, [1.0] * len(values), seed)


def bootstrap_ratio_ci(values: Sequence[float], baseline_values: Sequence[float], seed: int = 0) -> Interval:
    """The 95 % interval of mean(values) / mean(baseline_values), both of the same questions in the same order.

    Each resample draws questions, not values, so that a hard question weighs on both means alike. Raises `ValueError`
    without values, or with unequal numbers of them.

    >>> bootstrap_ratio_ci([1.0, 4.0], [2.0, 8.0])
    (0.5, 0.5)
    """
    if len(values) != len(baseline_values):
        raise ValueError(f"A ratio is paired by question, got {len(values)} and {len(baseline_values)} values.")
    if not values:
        raise ValueError("The bootstrap needs at least one value, got none.")
    means, baseline_means = _resampled_means(seed, values, baseline_values)
    low, high = torch.quantile(means / baseline_means, torch.tensor(_TAILS, dtype=torch.float64)).tolist()
    return low, high


def recovered(
    values: Sequence[float], floor: Sequence[float], full: Sequence[float], seed: int = 0
) -> tuple[float, Interval] | None:
    """The share of the gap between a floor and full prefill that a method recovers, and its 95 % interval.

        Σ (value − floor) / Σ (full − floor)        over questions; resampled by question

    >>> recovered([0.5, 0.5], floor=[0.0, 0.0], full=[1.0, 1.0])
    (0.5, (0.5, 0.5))

    Args:
        values, floor, full: a score of the same questions in the same order, higher is better.

    Returns:
        `None` without questions, and where full prefill's lead is too uncertain to be divided by: it is gone in more
        than one resample of 40.
    """
    gains = [value - low for value, low in zip(values, floor, strict=True)]
    gaps = [high - low for high, low in zip(full, floor, strict=True)]
    if sum(gaps) <= 0:
        return None
    mean_gains, mean_gaps = _resampled_means(seed, gains, gaps)
    shares, leads = mean_gains / mean_gaps, mean_gaps > 0
    low = torch.quantile(shares.where(leads, -math.inf), _TAILS[0], interpolation="lower").item()
    high = torch.quantile(shares.where(leads, math.inf), _TAILS[1], interpolation="higher").item()
    return None if math.isinf(low) or math.isinf(high) else (sum(gains) / sum(gaps), (low, high))


def _resampled_means(seed: int, *rows: Sequence[float]) -> Sequence[torch.Tensor]:
    """The means (R,) of each row of values in R resamples, which draw the same questions for every row."""
    values, count = torch.tensor([list(row) for row in rows], dtype=torch.float64), len(rows[0])
    drawn = torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return [row[drawn].mean(1) for row in values]
