"""The tokens of a traced prompt, as columns.

Shapes: T all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from .facts import Facts


def columns_of(trace: Facts, texts: list[str] | None) -> dict[str, list[Any]]:
    """Returns column -> T values; `None` where a value is not known."""
    count = trace.num_tokens
    nothing: list[Any] = [None] * count
    columns: dict[str, list[Any]] = {
        "index": list(range(count)),
        "id": nothing if trace.input_ids is None else trace.input_ids.tolist(),
        "text": texts or nothing,
        **_places(trace, count),
        "status": _statuses(trace, count),
        "new_position": list(range(count)),
        "score": list(nothing),
        "selected": [False] * count,
    }
    if trace.scores is not None and trace.candidate_idx is not None:
        for i, score in zip(trace.candidate_idx.tolist(), trace.scores.tolist()):
            columns["score"][i] = score
    for i in [] if trace.selected_idx is None else trace.selected_idx.tolist():
        columns["selected"][i] = True
    order = "index id text part chunk origin status old_position new_position score selected"
    return {name: columns[name] for name in order.split()}


def _places(trace: Facts, count: int) -> dict[str, list[Any]]:
    """Returns the part of the prompt that each token stands in, and its position when it was computed."""
    chunks = trace.chunks
    first, last = (chunks[0].span[0], chunks[-1].span[1]) if chunks else (count, count)
    part = ["prefix" if i < first else "gap" if i < last else "suffix" for i in range(count)]
    columns: dict[str, list[Any]] = {"part": part}
    columns |= {name: [None] * count for name in ("chunk", "origin", "old_position")}
    for number, piece in [(None, trace.prefix), *enumerate(chunks)]:
        if piece is None:
            continue
        start, stop = piece.span
        columns["origin"][start:stop] = [piece.status] * (stop - start)
        if number is not None:
            part[start:stop] = ["chunk"] * (stop - start)
            columns["chunk"][start:stop] = [number] * (stop - start)
        if piece.cached_start is not None:
            columns["old_position"][start:stop] = range(piece.cached_start, piece.cached_start + stop - start)
    return columns


def _statuses(trace: Facts, count: int) -> list[str]:
    """Returns `"exact"` (reused unchanged), `"reused"` (moved), `"recomputed"` (moved and selected), `"computed"`."""
    if not trace.blended:
        return ["computed"] * count
    statuses = ["recomputed" if trace.computes_all else "exact"] * count
    marked = (("reused", trace.candidate_idx), ("recomputed", trace.selected_idx), ("computed", trace.fresh_idx))
    for status, idx in marked:
        for i in [] if idx is None else idx.tolist():
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
