"""Prompts of random ids: time does not depend on what they say."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...prompts.prompt import Prompt

_FIRST_ID = 3  # below it, special tokens of many vocabularies


@dataclass(frozen=True)
class Layout:
    """How many tokens the parts of a prompt have."""

    prefix: int = 32
    chunk: int = 512
    suffix: int = 32


class PromptMaker:
    """Makes prompts of one layout; the same seed gives the same ones."""

    def __init__(self, vocabulary: int, layout: Layout | None = None, seed: int = 0) -> None:
        self._vocabulary, self._layout, self._random = vocabulary, layout or Layout(), random.Random(seed)

    def ids(self, count: int) -> list[int]:
        """Random token ids."""
        return [self._random.randrange(_FIRST_ID, self._vocabulary) for _ in range(count)]

    def prompt(self, chunk_tokens: int) -> Prompt:
        """One prompt whose chunks have that many tokens together; the last may be shorter than the others."""
        size = self._layout.chunk
        chunks = [self.ids(min(size, chunk_tokens - start)) for start in range(0, chunk_tokens, size)]
        return Prompt.from_ids(self.ids(self._layout.prefix), chunks, self.ids(self._layout.suffix))

    def stream(self, chunk_tokens: int, count: int) -> tuple[list[Prompt], Iterator[Prompt]]:
        """Prompts that share a prefix and a pool of chunks, twice as many as a prompt holds.

        Returns:
            Two prompts that together hold the pool, and `count` prompts with chunks drawn from it in random order, each
            with a suffix of its own.
        """
        each = max(1, chunk_tokens // self._layout.chunk)
        prefix, pool = self.ids(self._layout.prefix), [self.ids(self._layout.chunk) for _ in range(2 * each)]

        def holding(chunks: list[list[int]]) -> Prompt:
            return Prompt.from_ids(prefix, chunks, self.ids(self._layout.suffix))

        return (
            [holding(pool[:each]), holding(pool[each:])],
            (holding(self._random.sample(pool, each)) for _ in range(count)),
        )
