"""The measurements: every method at every ratio, question by question, against the question's own full prefill.

Shapes: P forced tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...generate.blending import BlendResult
from ...kv.chunk import ChunkKV
from ...measure.divergence import FullAnswer, kl_divergence, teacher_forced_logits, top1_agreement
from ...model.hf_model import CACHE
from ...prompts.prompt import Prompt
from ...prompts.tokenize import Encoder
from ...store import MemoryStore
from ...store.format import dump, parse
from ..baselines import STORE_BYTES, Case
from ..clock import timed
from ..report import Results, header_of
from ..settings import EvalSettings
from .data import NEEDLES, NEWS, QA, SUMMARIES, Example, digest, passage_text, to_prompt
from .metrics import best, f1_ids, f1_words, first_line, rouge_l, share_found, string_match
from .records import Record, RecordFile
from .summary import FULL_PREFILL, summarize

Blend = Callable[[], BlendResult]


def run(
    model: Any,
    name: str,
    settings: EvalSettings,
    source: str,
    examples: Sequence[Example],
    questions: range,
    *,
    tokenizer: Any,
    records: Path | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Results:
    """Measures a model on questions, and sums up: the content of the JSON file, `rows` and a header.

    Args:
        name, source: of the model and the examples, for the report.
        questions: indices into `examples`.
        records, advance: as in `Runner`.

    Raises:
        ValueError: a records file of another run, or a prompt too long.
    """
    data = {"source": Path(source).name, "digest": digest(examples)}
    header = header_of(model, name, settings.of_a_record()) | {"hfblend": __version__, "data": data}
    runner = Runner(model, tokenizer, examples, settings, RecordFile(records, header), advance)
    found = runner.run(questions)
    lengths = [record.tokens for record in found]
    return header | {
        "questions": [questions.start, questions.stop],
        "tokens": [min(lengths), max(lengths)],
        "baseline": settings.baseline,
        "rows": summarize(found, settings.baseline, settings.seed),
    }


@dataclass
class Runner:
    """Measures the cases of its settings on questions and adds the records.

    Args:
        model: a causal LM in eval mode, not patched.
        examples: the whole data; a passage of the next example is the text unrelated to a question.
        records: measurements that it holds are not repeated.
        advance: called once per record, measured or found.
    """

    model: Any
    tokenizer: Any
    examples: Sequence[Example]
    settings: EvalSettings
    records: RecordFile
    advance: Callable[[], None] = lambda: None

    @cached_property
    def corpus(self) -> list[list[int]]:
        """The ids of all passages of the data: a knowledge base in which chunks have neighbours."""
        encoder = Encoder(self.tokenizer)
        return [encoder.plain(passage_text(passage)) for example in self.examples for passage in example.passages]

    def run(self, questions: Iterable[int]) -> list[Record]:
        """The records of these questions, in order."""
        found, cases = [], self.settings.cases()
        for index in questions:
            question: _Question | None = None
            for case in cases:
                key = index, case.method.name, case.ratio
                if key not in self.records.found:
                    question = question or _Question(self, index)
                    self.records.add(question.measure(case))
                found.append(_with_match(self.records.found[key], self.examples[index]))
                self.advance()
        return found


class _AsFromAFile(MemoryStore):
    """A store in memory that gives chunk KV back as files in 8 bits would."""

    def __init__(self, kv_dtype: str, device: torch.device) -> None:
        super().__init__(STORE_BYTES, device)
        self.kv_dtype = kv_dtype

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        super().put(key, parse(key, dump(key, chunk_kv, self.kv_dtype)))


def _store_of(kv_dtype: str | None, device: torch.device) -> MemoryStore:
    return MemoryStore(STORE_BYTES) if kv_dtype is None else _AsFromAFile(kv_dtype, device)


class _Question:
    """One question: its prompt, its full prefill, and the store that all its methods share."""

    def __init__(self, runner: Runner, index: int) -> None:
        self.runner, self.model = runner, runner.model
        self.tokenizer, self.settings = runner.tokenizer, runner.settings
        self.index, self.example = index, runner.examples[index]
        self.store, self.stored = _store_of(self.settings.kv_dtype, self.model.device), set[str]()
        self.prompt = to_prompt(self.tokenizer, self.example, self.settings.max_context)
        other = runner.examples[(index + 1) % len(runner.examples)]
        unrelated = [] if other is self.example else Encoder(self.tokenizer).plain(passage_text(other.passages[0]))
        self.elsewhere = tuple(unrelated)
        self.full = FullAnswer.of(self.model, self.prompt, self.settings.forced_tokens)

    def blend(self, case: Case) -> BlendResult:
        """Blends, up to the first token's id on the host."""
        torch.manual_seed(self.settings.seed + self.index)
        about: dict[str, Any] = {"tokenizer": self.tokenizer, "elsewhere": self.elsewhere}
        if case.method.takes == "corpus":
            about["corpus"] = self.runner.corpus
        result = case.method.blend(self.model, self.prompt, case.ratio, self.store, **about)
        result.logits.argmax(-1).item()
        return result

    def measure(self, case: Case) -> Record:
        """Measures a method once its chunk KV is in the store."""
        if case.method.name not in self.stored:
            self.blend(case)
            self.stored.add(case.method.name)
        blend, asks_answer = partial(self.blend, case), self.settings.answer_tokens > 0
        prompt, turn = case.method.prompt_of(self.prompt), timed(blend, self.model.device)
        kl, agreement, cache = 0.0, 1.0, turn.result.cache  # full prefill's, by definition
        share = turn.result.trace.recomputed_pairs_share * len(prompt) / len(self.prompt)
        if case.method.name != FULL_PREFILL:
            logits = teacher_forced_logits(self.model, prompt.input_ids, self.full.ids, cache)
            kl = kl_divergence(self.full.logits, logits).mean().item()
            agreement = top1_agreement(self.full.logits, logits)
            cache = _cut_back(cache, len(self.full.ids), blend) if asks_answer else None
        scores = self._answer_scores(prompt, cache) if asks_answer else {}
        figures = (len(self.prompt), kl, agreement, turn.ms, share)
        return Record(self.index, case.method.name, case.ratio, *figures, **scores)

    def _answer_scores(self, prompt: Prompt, cache: Any) -> dict[str, Any]:
        """The greedy answer over a cache, and its scores."""
        input_ids, count = prompt.input_ids.to(self.model.device), self.settings.answer_tokens
        how = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, CACHE: cache}
        ids = self.model.generate(input_ids, **how, max_new_tokens=count)[0, len(prompt) :].tolist()
        answer = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return {"answer": answer, **answer_scores(answer, self.example, self.tokenizer)}


def answer_scores(answer: str, example: Example, tokenizer: Any) -> dict[str, float]:
    """The scores of an answer by name: ROUGE-L of summaries, F1 and string match of answers.

    The first line counts, but for string match, which looks at all that was said, as RULER does.
    """
    said, references = first_line(answer), example.answers
    if example.task in SUMMARIES:
        return {"rouge_l": best(rouge_l, answer if example.task == NEWS else said, references)}
    if example.task == NEEDLES:
        return {"string_match": share_found(answer, references)}
    by_ids = partial(f1_ids, tokenizer=tokenizer)
    f1 = {"f1": best(f1_words, said, references), "f1_ids": best(by_ids, said, references)}
    return {**f1, "string_match": best(string_match, answer, references)}


def _with_match(record: Record, example: Example) -> Record:
    """The record; its string match from its answer, if the file is older than this score."""
    if example.task != QA or record.answer is None or record.string_match is not None:
        return record
    return replace(record, string_match=best(string_match, record.answer, example.answers))


def _cut_back(cache: Any, count: int, blend: Blend) -> Any:
    """The cache without the rows that teacher forcing added; blended again where sliding layers lost older rows."""
    if any(cache.is_sliding):
        return blend().cache
    cache.crop(-count)
    return cache
