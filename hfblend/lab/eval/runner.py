"""The measurements: every method at every ratio, question by question, against the question's own full prefill.

Shapes: P forced tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...generate.blend_one import BlendResult
from ...kv.chunk import ChunkKV
from ...measure.divergence import kl_divergence, teacher_forced_logits, top1_agreement
from ...measure.verify import FullAnswer
from ...model.hf_model import CACHE
from ...prompts.prompt import Prompt
from ...prompts.tokenize import Encoder
from ...store import MemoryStore
from ...store.format import dump, parse
from ...store.quantise import require_kv_dtype
from .data import NEWS, QA, Example, passage_text, to_prompt
from .metrics import best, f1_ids, f1_words, first_line, rouge_l
from .records import Record, RecordFile

if TYPE_CHECKING:
    from ..baselines import Method

FULL_PREFILL = "full_prefill"
FORCED_TOKENS = 16
_STORE_BYTES = 2**50  # no chunk of a question ever leaves its store

Blend = Callable[[], BlendResult]
Row = tuple["Method", float]


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on, besides model and data.

    Attributes:
        max_context: tokens of the longest prompt.
        answer_tokens: of the greedy answers; 0 measures none.
        seed: of methods that draw, and of the bootstrap.
        forced_tokens: P, of full prefill's own answer.
        kv_dtype: `"int8"` or `"fp8"`: chunk KV is what a store that keeps it in that gives back.
    """

    max_context: int = 6500
    answer_tokens: int = 32
    seed: int = 0
    forced_tokens: int = FORCED_TOKENS
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        require_kv_dtype(self.kv_dtype)


def methods_named(names: Sequence[str], methods: Mapping[str, Method]) -> list[Method]:
    """The methods of these names, each once.

    Raises:
        ValueError: no name, or an unknown one; the message lists them all.
    """
    unknown = [name for name in names if name not in methods]
    if unknown or not names:
        got = f"unknown: {', '.join(unknown)}" if unknown else "none named"
        raise ValueError(f"{got}. The methods are {', '.join(methods)}.")
    return [methods[name] for name in dict.fromkeys(names)]


def rows_of(methods: Iterable[Method], ratios: Sequence[float]) -> list[Row]:
    """(method, ratio) of every row: a method that knows only one ratio has one row."""
    return [
        (method, ratio)
        for method in methods
        for ratio in (dict.fromkeys(ratios) if method.fixed_ratio is None else [method.fixed_ratio])
    ]


@dataclass
class Runner:
    """Measures rows on questions and adds the records.

    Args:
        model: a causal LM in eval mode, not patched.
        examples: the whole data; a passage of the next example is the text unrelated to a question.
        records: what it holds already is not measured again.
        advance: called once per record and once per record found.
    """

    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    settings: Settings
    records: RecordFile
    advance: Callable[[], None] = lambda: None

    def run(self, questions: Iterable[int], rows: Sequence[Row]) -> list[Record]:
        """The records of these questions and rows, in order."""
        questions = list(questions)
        for question in questions:
            missing = [(m, ratio) for m, ratio in rows if (question, m.name, ratio) not in self.records.found]
            for _ in range(len(rows) - len(missing)):
                self.advance()
            if missing:
                self._measure_question(question, missing)
        return [self.records.found[question, m.name, ratio] for question in questions for m, ratio in rows]

    def _measure_question(self, index: int, rows: Sequence[Row]) -> None:
        question = _Question(self.model, self.tokenizer, self.examples, index, self.settings)
        stored: set[str] = set()
        for method, ratio in rows:
            if method.name not in stored:
                question.blend(method, ratio)  # puts the chunk KV into the store
                stored.add(method.name)
            self.records.add(question.measure(method, ratio))
            self.advance()


class _AsFromAFile(MemoryStore):
    """Gives back what a store gives that keeps files: here, KV in 8 bits.

    Args:
        kv_dtype: of the files.
        device: where entries are kept.
    """

    def __init__(self, kv_dtype: str, device: torch.device) -> None:
        super().__init__(_STORE_BYTES, device)
        self.kv_dtype = kv_dtype

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        super().put(key, parse(key, dump(key, chunk_kv, self.kv_dtype)))


def _store_of(kv_dtype: str | None, device: torch.device) -> MemoryStore:
    return MemoryStore(_STORE_BYTES) if kv_dtype is None else _AsFromAFile(kv_dtype, device)


class _Question:
    """One question: its prompt, its full prefill, and the store that all its methods share."""

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example], index: int, settings: Settings) -> None:
        self.model, self.tokenizer, self.index, self.settings = model, tokenizer, index, settings
        self.example, self.store = examples[index], _store_of(settings.kv_dtype, model.device)
        self.prompt = to_prompt(tokenizer, self.example, settings.max_context)
        other = examples[(index + 1) % len(examples)]
        unrelated = [] if other is self.example else Encoder(tokenizer).plain(passage_text(other.passages[0]))
        self.elsewhere = tuple(unrelated)
        full = FullAnswer.of(model, self.prompt, settings.forced_tokens)
        self.forced_ids, self.full_logits = full.ids, full.logits  # (P, V)

    def blend(self, method: Method, ratio: float) -> BlendResult:
        torch.manual_seed(self.settings.seed + self.index)
        return method.blend(
            self.model, self.prompt, ratio, self.store, tokenizer=self.tokenizer, elsewhere=self.elsewhere
        )

    def measure(self, method: Method, ratio: float) -> Record:
        """One record, of a method whose chunk KV is in the store."""
        blend = partial(self.blend, method, ratio)
        ttft_ms, result = timed(blend)
        kl, agreement, cache = 0.0, 1.0, result.cache  # full prefill's, by definition
        share = result.trace.recomputed_pairs_share
        if method.name != FULL_PREFILL:
            logits = teacher_forced_logits(self.model, self.prompt.input_ids, self.forced_ids, cache)
            kl = kl_divergence(self.full_logits, logits).mean().item()
            agreement = top1_agreement(self.full_logits, logits)
            if self.settings.answer_tokens:
                cache = _cut_back(cache, len(self.forced_ids), blend)
        scores = self._answer_scores(cache) if self.settings.answer_tokens else {}
        return Record(self.index, method.name, ratio, len(self.prompt), kl, agreement, ttft_ms, share, **scores)

    def _answer_scores(self, cache: Any) -> dict[str, Any]:
        """The greedy answer behind `cache` and its scores: F1 of answers, ROUGE-L of summaries."""
        ids = generated_ids(self.model, self.prompt, cache, max_new_tokens=self.settings.answer_tokens)
        answer, references = self.tokenizer.decode(ids, skip_special_tokens=True).strip(), self.example.answers
        said = answer if self.example.task == NEWS else first_line(answer)
        if self.example.task != QA:
            return {"answer": answer, "rouge_l": best(rouge_l, said, references)}
        by_ids = partial(f1_ids, tokenizer=self.tokenizer)
        return {
            "answer": answer,
            "f1": best(f1_words, said, references),
            "f1_ids": best(by_ids, said, references),
        }


def timed(blend: Blend) -> tuple[float, BlendResult]:
    """Milliseconds from the call to the first token's id on the host, and the result."""
    start = time.perf_counter()
    result = blend()
    result.logits.argmax(-1).item()
    return (time.perf_counter() - start) * 1e3, result


def generated_ids(model: Any, prompt: Prompt, cache: Any, **kwargs: Any) -> list[int]:
    """Greedy tokens behind a prompt, whose KV but the last token's is in `cache` (`None`: prefilled in full)."""
    input_ids = prompt.input_ids.to(model.device)
    output = model.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, **{CACHE: cache}, **kwargs
    )
    return output[0, len(prompt) :].tolist()


def _cut_back(cache: Any, count: int, blend: Blend) -> Any:
    """The cache without the `count` rows that teacher forcing added. Sliding layers have lost older rows for them:
    there the prompt is blended again."""
    if any(cache.is_sliding):
        return blend().cache
    cache.crop(-count)
    return cache
