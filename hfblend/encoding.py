"""Text to token ids, a piece at a time."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any


class Encoder:
    """Text to ids, without special tokens added, and for a document without special tokens parsed."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def plain(self, text: str) -> list[int]:
        """A document's ids: special tokens written in it are plain text."""
        ids = self._split(text)
        if not self._special_ids.intersection(ids):
            return ids
        # This tokenizer knows a special token as a word, or ignores the option: cut the token's text after one letter.
        names = sorted((t for t in self.tokenizer.all_special_tokens if len(t) > 1), key=len, reverse=True)
        cuts = re.sub("|".join(map(re.escape, names)), lambda m: f"{m[0][0]}\0{m[0][1:]}", text)
        ids = [i for part in cuts.split("\0") for i in self._split(part)]
        if found := self._special_ids.intersection(ids):
            raise ValueError(f"A chunk's text holds special tokens {found} that cannot be split: {text[:60]!r}.")
        return ids

    def _split(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}

    @property
    def leading_special_tokens(self) -> list[int]:
        text = "a"
        with_special, without = self.tokenizer(text)["input_ids"], self(text)
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(without)] == without)
        return with_special[: next(starts, 0)]
