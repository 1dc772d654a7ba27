"""Separators in plain token ids; the chunks are the ids between them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from ..arguments import require_text, require_tokenizer, token_ids
from .tokenize import Encoder

logger = logging.getLogger(__name__)

_FUSES = "fuses it with its neighbours (such as a document's last space), and does not split there"
Span = tuple[int, int]  # [start, stop) in token indices


class Separator:
    """A separator as token ids, found in plain ids.

    Many tokenisers fuse a separator's last space with the next word, so `matches` looks for its encoding with and
    without trailing white space, the longer one first. Matches are taken from the left and do not overlap: if a
    separator overlaps itself (`# #` in `# # #`), the leftmost counts, and the rest belongs to the chunk.

    Args:
        separator: text (needs `tokenizer`) or token ids.

    Raises:
        TypeError: neither, or an invalid tokenizer.
        ValueError: text without a tokenizer, or text that tokenises to nothing.
    """

    def __init__(self, separator: str | Sequence[int], tokenizer: Any = None) -> None:
        self.text = separator if isinstance(separator, str) else None
        self.tokenizer = tokenizer
        if isinstance(separator, str):
            if tokenizer is None:
                raise ValueError(
                    f"separator must be token ids, got the text {separator!r}: pass a tokenizer, or give its ids."
                )
            encode = Encoder(require_tokenizer(tokenizer))
            separator = require_text("separator", separator)
            variants = {tuple(encode.after(separator)), tuple(encode.after(separator.rstrip()))} - {()}
        else:
            variants = {tuple(token_ids("separator", separator, expected="a text or a list of token ids"))} - {()}
        require_a_token(separator, variants)
        stands_for_itself = not self.text or self.text == getattr(tokenizer, "unk_token", None)
        unknown = None if stands_for_itself else getattr(tokenizer, "unk_token_id", None)  # stands for other texts, too
        self.variants = sorted((ids for ids in variants if unknown not in ids), key=len, reverse=True)
        self._firsts = {ids[0] for ids in self.variants}
        self._warned = False
        if any(ids[:n] == ids[-n:] for ids in self.variants for n in range(1, len(ids))):
            logger.info("The separator's ids %s overlap themselves; in a run the leftmost match counts.", self.variants)
        if self.text and not self.is_found_in_joined_text():
            self._warn(f"the sample {self._sample!r}", 2, len(self._in_sample()))

    @property
    def _sample(self) -> str:
        return f"A passage.{self.text}Another passage.{self.text}A question"

    def is_found_in_joined_text(self) -> bool:
        """Whether the separator's ids are found at its text in joined text."""
        return len(self._in_sample()) == 2

    def _in_sample(self) -> list[Span]:
        return self.matches(Encoder(self.tokenizer)(self._sample))

    def matches(self, ids: Sequence[int]) -> list[Span]:
        """Returns the spans of the separators in `ids`, from the left."""
        ids, found, stop = list(ids), [], 0
        for i in [i for i, token in enumerate(ids) if token in self._firsts]:
            length = next((len(v) for v in self.variants if tuple(ids[i : i + len(v)]) == v), 0)
            if length and i >= stop:
                stop = i + length
                found.append((i, stop))
        return found

    def chunk_spans(self, ids: Sequence[int]) -> list[Span]:
        """Returns the spans of the chunks between separators."""
        cuts = self.matches(ids)
        return [(left[1], right[0]) for left, right in pairwise(cuts) if left[1] < right[0]]

    def warn_if_hidden(self, ids: Sequence[int]) -> None:
        """Warns, once, if the text of `ids` holds the separator more often than its ids are found."""
        if self.text and not self._warned:
            written = Encoder(self.tokenizer).decode(ids).count(self.text.rstrip() or self.text)
            if written > (found := len(self.matches(ids))):
                self._warn("a prompt", written, found)

    def _warn(self, where: str, written: int, found: int) -> None:
        self._warned = True
        logger.warning(
            "The text of %s holds the separator %r %d times, its token ids %s only %d times: this tokenizer %s. Choose "
            "another separator, strip the documents, or use Prompt.from_texts.",
            where, self.text, written, self.variants, found, _FUSES if self.variants else "does not know it",
        )  # fmt: skip


def require_a_token(separator: Any, ids: Collection[Any]) -> None:
    """Raises `ValueError` for a separator without ids."""
    if not ids:
        raise ValueError(f"separator must have a token, got {separator!r}, which tokenises to nothing; choose another.")
