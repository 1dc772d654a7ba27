"""Reads prompts from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..arguments import described, require
from ..demo.passages import demo_data, question_prompt
from ..lab.eval.data import titled
from ..prompts.prompt import Prompt

_PASSAGES = ("passages", "ctxs", "chunks")  # names of the list of passages that a question is about


def read_prompts(source: str, tokenizer: Any) -> list[Prompt]:
    """Reads the prompts of a JSON file, one object or a list of them; `-` is standard input.

        {"question": "…", "passages": ["…", {"title": "…", "text": "…"}]}     a chat, as `hfblend ask` writes it
        {"prefix": "…", "chunks": ["…", "…"], "suffix": "…"}                  these texts and nothing else

    "passages" may also be called "ctxs" or "chunks", and a "suffix" after a "prefix" "question".

    Raises:
        ValueError: a source of another form; the message names it.
    """
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        rows = json.loads(text.removeprefix("\ufeff"))
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    rows = rows if isinstance(rows, list) else [rows]
    if not rows:
        raise ValueError(f"{name} holds no prompt.")
    return [_prompt_of_row(row, f"{name}, prompt {i}", tokenizer) for i, row in enumerate(rows)]


def _prompt_of_row(row: Any, where: str, tokenizer: Any) -> Prompt:
    """Builds the prompt of one object; errors say `where` it stands."""
    names = set(row) if isinstance(row, dict) else set()
    try:
        if "chunks" in names and ("suffix" in names or {"prefix", "question"} <= names):
            suffix = row["suffix"] if "suffix" in row else row["question"]
            pieces = {"prefix": row.get("prefix", ""), "chunks": _texts(row["chunks"]), "suffix": suffix}
            return Prompt.from_texts(tokenizer, **pieces, add_special_tokens=True)
        passages = [row[name] for name in _PASSAGES if name in names]
        if "question" in names and passages:
            question = require("question", row["question"], str, "a text")
            return question_prompt(tokenizer, demo_data()["system"], _texts(passages[0]), question)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(
        f'{where} needs "question" and "passages", or "prefix", "chunks" and "suffix"; got {sorted(names)}.'
    )


def _texts(passages: Any) -> list[str]:
    listed = passages if isinstance(passages, list) else [passages]
    texts = [titled(one) if isinstance(one, dict) and isinstance(one.get("text"), str) else one for one in listed]
    for text in texts:
        if not (isinstance(passages, list) and isinstance(text, str)):
            raise TypeError(
                f'passages and chunks must be lists of texts, or of {{"title", "text"}}, got {described(text)}.'
            )
    return texts
