"""Cuts documents into passages at paragraphs, and finds those that are near to a question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..util import require
from .read import Document

PASSAGE_CHARACTERS = 1000  # about 160 English words, 220 tokens
_WORD = r"[\u2e80-\u9fff]|[^\W\u2e80-\u9fff]+"  # or one character of a script that parts no words


@dataclass(frozen=True)
class Passage:
    """A part of a document: whole paragraphs, unless one alone is too long."""

    name: str
    text: str

    def __str__(self) -> str:
        """The passage as it stands in a prompt."""
        return f"{self.name}: {self.text}"


def passages_of(document: Document, characters: int = PASSAGE_CHARACTERS) -> list[Passage]:
    """Returns a document's passages, none longer than `characters`; a heading stays with the paragraph after it."""
    pieces = [piece for paragraph in _paragraphs(document.text) for piece in _split(paragraph, characters)]
    return [Passage(document.name, text) for text in _joined(pieces, characters, "\n\n")]


def _paragraphs(text: str) -> Iterator[str]:
    headings = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if not (paragraph := paragraph.strip()):
            continue
        if re.fullmatch("#{1,6} .*", paragraph):
            headings += f"{paragraph}\n\n"
        else:
            yield headings + paragraph
            headings = ""
    if headings:
        yield headings.strip()


def _split(paragraph: str, characters: int) -> list[str]:
    """Returns a paragraph, or parts of one that is too long: sentences together, or letters of a longer sentence."""
    if len(paragraph) <= characters:
        return [paragraph]
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n", paragraph) if part]
    pieces = [part[i : i + characters] for part in sentences for i in range(0, len(part), characters)]
    return _joined(pieces, characters, " ")


def _joined(pieces: Sequence[str], characters: int, between: str) -> list[str]:
    """Returns pieces joined to texts as long as `characters` allows."""
    texts: list[str] = []
    for piece in pieces:
        if texts and len(texts[-1]) + len(between) + len(piece) <= characters:
            texts[-1] += between + piece
        else:
            texts.append(piece)
    return texts


def nearest(passages: Sequence[Passage], question: str, count: int) -> list[int]:
    """Returns the indices of the `count` passages that are nearest to a question by BM25, the nearest first.

    Raises:
        ImportError: the package `bm25s` is missing.
    """
    bm25s = require("bm25s", "bm25s", "ask", "Finding passages needs")
    options = {"token_pattern": _WORD, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize([str(one) for one in passages], **options), show_progress=False)
    found, _ = index.retrieve(bm25s.tokenize(question, **options), k=min(count, len(passages)), show_progress=False)
    return [int(i) for i in found[0]]
