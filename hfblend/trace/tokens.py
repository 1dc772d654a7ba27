"""The tokens of a traced prompt, as columns.

Shapes: T all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from .facts import Facts

_COLUMNS = (
    "index", "id", "text", "part", "chunk", "origin", "status", "old_position", "new_position", "score", "selected",
)  # fmt: skip


def columns_of(trace: Facts, texts: list[str] | None) -> dict[str, list[Any]]:
    """Returns column -> T values; `None` where a value is not known."""
    count, chunks = trace.num_tokens, trace.chunks
    columns: dict[str, list[Any]] = {name: [None] * count for name in _COLUMNS}
    first, last = (chunks[0].span[0], chunks[-1].span[1]) if chunks else (count, count)
    selected = set(_listed(trace.selected_idx))
    columns["index"], columns["new_position"] = list(range(count)), list(range(count))
    columns["id"], columns["text"] = _listed(trace.input_ids) or columns["id"], texts or columns["text"]
    columns["part"] = ["prefix" if i < first else "gap" if i < last else "suffix" for i in range(count)]
    columns["status"], columns["selected"] = _statuses(trace, count), [i in selected for i in range(count)]
    for number, piece in [(None, trace.prefix), *enumerate(chunks)]:
        if piece is not None:
            start, stop = piece.span
            same: dict[str, Any] = {"origin": piece.status}
            if number is not None:
                same |= {"part": "chunk", "chunk": number}
            for name, value in same.items():
                columns[name][start:stop] = [value] * (stop - start)
            if piece.cached_start is not None:
                columns["old_position"][start:stop] = range(piece.cached_start, piece.cached_start + stop - start)
    for i, score in zip(_listed(trace.candidate_idx), _listed(trace.scores)):
        columns["score"][i] = score
    return columns


def _listed(values: torch.Tensor | None) -> list[Any]:
    return [] if values is None else values.tolist()


def _statuses(trace: Facts, count: int) -> list[str]:
    """Returns `"exact"` (reused unchanged), `"reused"` (moved), `"recomputed"` (moved and selected), `"computed"`."""
    if not trace.blended:
        return ["computed"] * count
    statuses = ["recomputed" if trace.computes_all else "exact"] * count
    marked = (("reused", trace.candidate_idx), ("recomputed", trace.selected_idx), ("computed", trace.fresh_idx))
    for status, idx in marked:
        for i in _listed(idx):
            statuses[i] = status
    return statuses


_LONGEST_CHARACTER = 8  # tokens of a byte each: some emoji of one code point and a mark after it


def texts_of(tokenizer: Any, ids: list[int]) -> list[str]:
    """Returns a text for each id. A character of several tokens stands at the first of them, a dot at each further one;
    a token that is part of no character is shown as the tokenizer writes it."""
    text_of = cache(partial(_text_of, tokenizer))
    decoded = cache(lambda some: tokenizer.decode(list(some)))
    texts: list[str] = []
    while len(texts) < len(ids):
        rest = ids[len(texts) : len(texts) + _LONGEST_CHARACTER]
        text = text_of(rest[0])
        if text is not None:
            texts.append(text)
        else:
            texts += _character(rest, decoded) or [str(tokenizer.convert_ids_to_tokens(rest[0]) or "")]
    return texts


def _text_of(tokenizer: Any, token_id: int) -> str | None:
    """Returns the text of a token; `None` for part of a character."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    text = tokenizer.decode([token_id])
    if "\ufffd" in text:
        return None
    if piece is None or not text:
        return str(piece or text or "")
    starts_word = piece.startswith(("▁", "Ġ")) and not text.startswith(" ")
    return f" {text}" if starts_word else text


def _character(ids: list[int], decoded: Callable[[tuple[int, ...]], str]) -> list[str]:
    """Returns the character that the first few ids make, as a text for each of them; nothing if they make none."""
    for count in range(2, len(ids) + 1):
        text = decoded(tuple(ids[:count]))
        if "\ufffd" not in text:
            return [text, *"·" * (count - 1)]
    return []
