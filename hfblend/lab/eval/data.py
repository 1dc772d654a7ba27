"""Questions with the passages that answer them: from a file, or by name through the library `datasets`."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...prompts.prompt import Prompt
from ...util import require

logger = logging.getLogger(__name__)

QA, DIALOGUE, NEWS = "qa", "dialogue", "news"
LONGBENCH_NAMES = ("musique", "2wikimqa", "hotpotqa", "samsum", "multi_news")

# The user's message of each task; the passages stand where it says {documents}, the question at the end of the prompt.
FORMS = {
    QA: "Passages:\n{documents}Question: <question>\nAnswer with a few words.",
    DIALOGUE: "Summarize the last dialogue into a few short sentences. The others are examples.\n\n"
    "{documents}<question>",
    NEWS: "Passages:\n{documents}Write a one-page summary of all these news.",
}

# Without a chat template, what asks the model to go on; a dialogue's own question ends with `Summary:`.
_PLAIN_ENDINGS = {QA: "\nAnswer:", DIALOGUE: "", NEWS: "\nSummary:"}

_PASSAGE_MARKER = re.compile(r"^Passage \d+:[ \t]*\r?\n", re.MULTILINE)
_SHOT_START = re.compile(r"^(?=Dialogue: )", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question: empty where the task is the same for all passages (`NEWS`).
        answers: every accepted answer, or the reference summaries.
        passages: the chunks, in order.
        task: `QA`, `DIALOGUE` (the passages are worked examples) or `NEWS`.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    task: str = QA


# --- loading --------------------------------------------------------------------------------------------------------


def load(source: str) -> list[Example]:
    """The examples of a file, or of a set in `LONGBENCH_NAMES`.

    >>> load("musique.json")  # doctest: +SKIP

    Raises:
        ValueError: neither a file nor a known name, or a file that does not hold questions.
        ImportError: a name, without the package `datasets`.
    """
    if Path(source).is_file():
        return load_json(Path(source))
    if source in LONGBENCH_NAMES:
        return load_named(source)
    raise ValueError(f"{source} is no file and none of the sets known by name: {', '.join(LONGBENCH_NAMES)}.")


def load_json(path: Path) -> list[Example]:
    """The examples of a JSON list, or of JSON lines, in either form:

        {"question", "answers", "ctxs": [{"title", "text"}]}     the CacheBlend research repository's
        {"input", "answers", "context"}                          LongBench's; the context is split into passages

    Raises:
        ValueError: no JSON, no questions, or one that lacks something (its number is named).
    """
    rows = _rows(path)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} must hold a list of questions, got {'an empty list' if rows == [] else 'no list'}.")
    return [_example(row, f"{path}, question {i}") for i, row in enumerate(rows)]


def load_named(name: str) -> list[Example]:
    """LongBench's set of this name, by the library `datasets` (needs the network once, then its cache).

    Raises:
        ImportError: the package is missing.
        ValueError: a name not in `LONGBENCH_NAMES`.
    """
    if name not in LONGBENCH_NAMES:
        raise ValueError(f"Unknown set {name!r}; known by name: {', '.join(LONGBENCH_NAMES)}.")
    datasets = require("datasets", "datasets", "eval", "Sets by name need")
    # The repository itself holds a loading script, which `datasets` no longer runs; the hub's own conversion is plain.
    files = f"hf://datasets/THUDM/LongBench@refs%2Fconvert%2Fparquet/{name}/test/*.parquet"
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    return [_example(row, f"{name}, question {i}") for i, row in enumerate(rows)]


def digest(examples: Sequence[Example]) -> str:
    """A short hash of all examples, to tell one set from another."""
    text = json.dumps([asdict(example) for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds neither JSON nor JSON lines: {error}") from error


def _example(row: Any, where: str) -> Example:
    if not isinstance(row, dict) or not ("ctxs" in row or "context" in row):
        raise ValueError(f"{where}: expected an object with 'ctxs' or 'context', got {str(row)[:80]}.")
    question_key = "question" if "ctxs" in row else "input"
    question, answers = row.get(question_key), row.get("answers")
    if not isinstance(question, str):
        raise ValueError(f"{where}: '{question_key}' must be a text, got {question!r}.")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: 'answers' must be a list of texts, got {answers!r}.")
    passages = _ctxs(row["ctxs"], where) if "ctxs" in row else _split_context(row["context"], where)
    return Example(question, tuple(answers), passages, _task(question))


def _task(question: str) -> str:
    """SAMSum's questions are dialogues, MultiNews has none."""
    if not question.strip():
        return NEWS
    return DIALOGUE if question.lstrip().startswith("Dialogue:") else QA


def _ctxs(ctxs: Any, where: str) -> tuple[str, ...]:
    if not isinstance(ctxs, list) or not all(isinstance(c, dict) and isinstance(c.get("text"), str) for c in ctxs):
        raise ValueError(f"{where}: 'ctxs' must be a list of objects with a 'text'.")
    return _filled([titled(passage) for passage in ctxs], where)


def titled(passage: dict[str, Any]) -> str:
    """A passage's text, under its title if it has one."""
    return f"{passage['title']}\n{passage['text']}" if passage.get("title") else passage["text"]


def _split_context(context: Any, where: str) -> tuple[str, ...]:
    """At `Passage 1:` (the marker goes, so that a passage's text does not depend on its place) or `Dialogue: `."""
    if not isinstance(context, str):
        raise ValueError(f"{where}: 'context' must be a text, got {context!r}.")
    for border in (_PASSAGE_MARKER, _SHOT_START):
        if border.search(context):
            return _filled([text.strip() for text in border.split(context)], where)
    raise ValueError(
        f"{where}: 'context' has no line 'Passage 1:' and none that begins with 'Dialogue: ', so its passages cannot "
        "be told apart; write them as 'ctxs' instead."
    )


def _filled(texts: Sequence[str], where: str) -> tuple[str, ...]:
    passages = tuple(text for text in texts if text.strip())
    if not passages:
        raise ValueError(f"{where}: no passage has any text.")
    return passages


# --- the prompt -----------------------------------------------------------------------------------------------------


def to_prompt(tokenizer: Any, example: Example, max_context: int) -> Prompt:
    """The example as a chat with its passages as chunks; plain text where the tokenizer has no chat template.

    Passages are dropped from the end, whole, until the prompt has at most `max_context` tokens. That is logged.

    Raises:
        ValueError: even one passage is too long.
    """
    for count in range(len(example.passages), 0, -1):
        prompt = prompt_of(tokenizer, replace(example, passages=example.passages[:count]))
        if len(prompt) <= max_context:
            if dropped := len(example.passages) - count:
                logger.warning(
                    "Dropped the last %d of %d passages of %r: more than %d tokens.",
                    dropped, len(example.passages), example.question[:60], max_context,
                )  # fmt: skip
            return prompt
    raise ValueError(
        f"{example.question[:60]!r} with one passage has {len(prompt)} tokens, more than the {max_context} allowed; "
        "raise max_context."
    )


def prompt_of(tokenizer: Any, example: Example) -> Prompt:
    """The example with all its passages, however long."""
    documents = [passage_text(passage) for passage in example.passages]
    before, after = FORMS[example.task].split("{documents}")
    suffix = after.replace("<question>", example.question)
    if getattr(tokenizer, "chat_template", None) is None:
        return Prompt.from_texts(
            tokenizer,
            prefix=before,
            chunks=documents,
            suffix=suffix + _PLAIN_ENDINGS[example.task],
            add_special_tokens=True,
        )
    return Prompt.from_chat(tokenizer, [{"role": "user", "content": f"{before}{{documents}}{suffix}"}], documents)


def passage_text(passage: str) -> str:
    """A passage as it stands in the prompt."""
    return passage + "\n\n"
