"""Questions with the passages that answer them: from a file, or by name through the library `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...prompts.prompt import Prompt
from ...prompts.tokenize import Encoder
from ...util import require

logger = logging.getLogger(__name__)

QA, DIALOGUE, NEWS, NEEDLES = "qa", "dialogue", "news", "needles"
SUMMARIES = (DIALOGUE, NEWS)
LONGBENCH_NAMES = ("musique", "2wikimqa", "hotpotqa", "samsum", "multi_news")
GENERATED_NAMES = ("needles_multikey", "needles_multivalue", "needles_multiquery", "variable_tracking")

# The user's message of each task; {documents} stands for the passages, <question> for the question.
FORMS = {
    QA: "Passages:\n{documents}Question: <question>\nAnswer with a few words.",
    DIALOGUE: "Summarize the last dialogue into a few short sentences. The others are examples.\n\n"
    "{documents}<question>",
    NEWS: "Passages:\n{documents}Write a one-page summary of all these news.",
    NEEDLES: "Passages:\n{documents}Question: <question>",
}

# Without a chat template, this asks the model to go on; a dialogue's own question ends with `Summary:`.
_PLAIN_ENDINGS = {QA: "\nAnswer:", DIALOGUE: "", NEWS: "\nSummary:", NEEDLES: "\n"}

# The borders in LongBench's contexts; `Passage 1:` goes, so that a passage's text does not depend on its place.
_BORDERS = (re.compile(r"^Passage \d+:[ \t]*\r?\n", re.MULTILINE), re.compile(r"^(?=Dialogue: )", re.MULTILINE))


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question: empty where the task is the same for all passages (`NEWS`).
        answers: every accepted answer, or the reference summaries; of `NEEDLES`, all that must be said.
        passages: the chunks, in order.
        task: `QA`, `DIALOGUE` (the passages are worked examples), `NEWS`, or `NEEDLES` (generated, see `tasks.py`).
        opening: of the answer, put into the model's mouth at the end of the prompt.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    task: str = QA
    opening: str = ""


# --- loading ----------------------------------------------------------------------------------------------------------


def load(source: str) -> list[Example]:
    """The examples of a file, or of a set in `LONGBENCH_NAMES`.

    Raises:
        ValueError: neither a file nor a known name, or a file that does not hold questions.
        ImportError: a name, without the package `datasets`.
    """
    if Path(source).is_file():
        return load_json(Path(source))
    if source not in LONGBENCH_NAMES:
        names = ", ".join((*LONGBENCH_NAMES, *GENERATED_NAMES))
        raise ValueError(f"{source} is no file and none of the sets known by name: {names}.")
    datasets = require("datasets", "datasets", "eval", "Sets by name need")
    # The repository itself holds a loading script, which `datasets` no longer runs; the hub's own conversion is plain.
    files = f"hf://datasets/THUDM/LongBench@refs%2Fconvert%2Fparquet/{source}/test/*.parquet"
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    return [_example(row, f"{source}, question {i}") for i, row in enumerate(rows)]


def is_generated(source: str) -> bool:
    """Whether `source` names a task of `tasks.py`, whose questions are made for a tokenizer; a file comes first."""
    return source in GENERATED_NAMES and not Path(source).is_file()


def load_json(path: Path) -> list[Example]:
    """The examples of a JSON list, or of JSON lines, in either form:

        {"question", "answers", "ctxs": [{"title", "text"}]}     the CacheBlend research repository's
        {"input", "answers", "context"}                          LongBench's; the context is split into passages

    Raises:
        ValueError: no JSON, no questions, or an incomplete one (its number is named).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        is_lines = text.lstrip().startswith("{")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds neither JSON nor JSON lines: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of questions, got {'an empty list' if rows == [] else 'no list'}.")
    return [_example(row, f"{path}, question {i}") for i, row in enumerate(rows)]


def digest(examples: Sequence[Example]) -> str:
    """A short hash of all examples, to tell one set from another.

    Of generated ones, only the first counts: seed, length and tokenizer make it what it is, and how many were generated
    must not matter to a run that goes on with more.
    """
    telling = examples[:1] if examples and examples[0].task == NEEDLES else examples
    rows = [asdict(example) for example in telling]
    # without empty openings, so that earlier versions' records of a file still fit
    text = json.dumps([{name: value for name, value in row.items() if value or name != "opening"} for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def titled(passage: Mapping[str, Any]) -> str:
    """A passage's text, under its title if it has one."""
    return f"{passage['title']}\n{passage['text']}" if passage.get("title") else passage["text"]


def _example(row: Any, where: str) -> Example:
    try:
        return _parsed(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _parsed(row: Any) -> Example:
    if not isinstance(row, dict) or not ("ctxs" in row or "context" in row):
        raise ValueError(f"expected an object with 'ctxs' or 'context', got {str(row)[:80]}.")
    question_key = "question" if "ctxs" in row else "input"
    question, answers = row.get(question_key), row.get("answers")
    if not isinstance(question, str):
        raise ValueError(f"'{question_key}' must be a text, got {question!r}.")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"'answers' must be a list of texts, got {answers!r}.")
    texts = _ctxs(row["ctxs"]) if "ctxs" in row else _split(row["context"])
    passages = tuple(text for text in texts if text.strip())
    if not passages:
        raise ValueError("no passage has any text.")
    is_dialogue = question.lstrip().startswith("Dialogue:")  # SAMSum's; MultiNews has no questions
    return Example(question, tuple(answers), passages, DIALOGUE if is_dialogue else QA if question.strip() else NEWS)


def _ctxs(ctxs: Any) -> list[str]:
    if isinstance(ctxs, list) and all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in ctxs):
        return [titled(passage) for passage in ctxs]
    raise ValueError("'ctxs' must be a list of objects with a 'text'.")


def _split(context: Any) -> list[str]:
    if not isinstance(context, str):
        raise ValueError(f"'context' must be a text, got {context!r}.")
    border = next((border for border in _BORDERS if border.search(context)), None)
    if border is None:
        raise ValueError(
            "'context' has no line 'Passage 1:' and none that begins with 'Dialogue: ', so its passages cannot be told "
            "apart; write them as 'ctxs' instead."
        )
    return [text.strip() for text in border.split(context)]


# --- the prompt -------------------------------------------------------------------------------------------------------


def to_prompt(tokenizer: Any, example: Example, max_context: int) -> Prompt:
    """The example as a chat with its passages as chunks; plain text where the tokenizer has no chat template.

    Drops whole passages from the end until the prompt has at most `max_context` tokens, and logs it.

    Raises:
        ValueError: even one passage is too long; or all of them are, of `NEEDLES`, which may be in any passage.
    """
    question, given = example.question[:60], len(example.passages)
    least = given if example.task == NEEDLES else 1
    for count in range(given, least - 1, -1):
        prompt = prompt_of(tokenizer, replace(example, passages=example.passages[:count]))
        if len(prompt) <= max_context:
            if count < given:
                message = "Dropped the last %d of %d passages of %r: more than %d tokens."
                logger.warning(message, given - count, given, question, max_context)
            return prompt
    length, passages = len(prompt), "one passage" if least == 1 else f"{least} passages"
    raise ValueError(
        f"{question!r} with {passages} has {length} tokens, more than the {max_context} allowed; raise max_context."
    )


def prompt_of(tokenizer: Any, example: Example) -> Prompt:
    """The example with all its passages, however long."""
    documents = [passage_text(passage) for passage in example.passages]
    before, after = FORMS[example.task].split("{documents}")
    suffix = after.replace("<question>", example.question)
    if getattr(tokenizer, "chat_template", None) is not None:
        messages = [{"role": "user", "content": f"{before}{{documents}}{suffix}"}]
        prompt = Prompt.from_chat(tokenizer, messages, documents)
    else:
        suffix += _PLAIN_ENDINGS[example.task]
        prompt = Prompt.from_texts(tokenizer, prefix=before, chunks=documents, suffix=suffix, add_special_tokens=True)
    opening = Encoder(tokenizer).after(example.opening)
    return Prompt(torch.tensor([prompt.ids + opening]), prompt.chunk_spans)


def passage_text(passage: str) -> str:
    """A passage as it stands in the prompt."""
    return passage + "\n\n"
