"""Reads prompts from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..arguments import described, require
from ..lab.eval.data import Example, prompt_of, titled
from ..prompts.prompt import Prompt


def read_prompts(source: str, tokenizer: Any) -> list[Prompt]:
    """Reads the prompts of a JSON file, one object or a list of them; `-` is standard input.

        {"prefix": "…", "chunks": ["…", "…"], "suffix": "…"}         "question" says the same as "suffix"
        {"question": "…", "ctxs": [{"title": "…", "text": "…"}]}     a chat about passages, if there is a template

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
    if isinstance(row, dict) and "chunks" in row:
        row = {"prefix": "", **({"suffix": row["question"]} if "question" in row else {}), **row}
    names = set(row) if isinstance(row, dict) else set()
    try:
        if {"prefix", "chunks", "suffix"} <= names:
            pieces = {"prefix": row["prefix"], "chunks": _texts(row["chunks"]), "suffix": row["suffix"]}
            return Prompt.from_texts(tokenizer, **pieces, add_special_tokens=True)
        if {"question", "ctxs"} <= names:
            question = require("question", row["question"], str, "a text")
            return prompt_of(tokenizer, Example(question, (), tuple(_texts(row["ctxs"]))))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f'{where} needs "prefix", "chunks" and "suffix", or "question" and "ctxs"; got {sorted(names)}.')


def _texts(passages: Any) -> list[str]:
    listed = passages if isinstance(passages, list) else [passages]
    texts = [titled(one) if isinstance(one, dict) and isinstance(one.get("text"), str) else one for one in listed]
    for text in texts:
        if not (isinstance(passages, list) and isinstance(text, str)):
            raise TypeError(
                f'chunks and ctxs must be lists of texts, or of {{"title", "text"}}, got {described(text)}.'
            )
    return texts
