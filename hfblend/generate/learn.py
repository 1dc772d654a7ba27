"""Passages that come again in other prompts, noticed as they pass (`find="learn"`).

A passage that stands in an earlier prompt, too, becomes a chunk of this one: prefilled alone and stored, it is found
from then on as every stored text is. Only ids are remembered, of the latest prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..locks import Mutex
from ..store.index import Hashed, Index, Match, Numbers, longest_first

MOST = 2**22  # ids that are remembered, 10 bytes each
LEAST = 64  # ids of a passage that is learnt


class Traffic:
    """The latest plain prompts of one scope.

    Args:
        most: ids of all of them together.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._index, self._prompts = Index(), dict[str, Numbers]()
        self._count, self._lock = 0, Mutex()

    @property
    def num_ids(self) -> int:
        """Ids that are remembered."""
        return sum(map(len, self._prompts.values()))

    def repeated(self, prompt: Hashed, taken: Sequence[Match], start: int | None) -> tuple[int, list[Match]]:
        """Returns the passages of a prompt that came before, outside of the matches that are taken, and what they are
        computed after: so many first tokens.

        Args:
            start: those of the matches; `None`: as many as all the earlier prompts with these passages share.
        """
        with self._lock:
            found = [match for _, found in self._index.find(prompt, lambda n, sums: n) for match in found]
            found = [match for match in found if match.key in self._prompts]
            earlier = [self._prompts[key] for key in {match.key for match in found}]
        if start is None:
            start = min((_shared(prompt.ids, one) for one in earlier), default=0)
        chosen = longest_first(found, start, len(prompt.ids), taken)
        return start, [match for match in chosen if match.stop - match.start >= LEAST]

    def add(self, prompt: Hashed) -> None:
        """Remembers a prompt, and forgets the oldest ones that there is no room for."""
        with self._lock:
            key, self._count = str(self._count), self._count + 1
            self._prompts[key] = prompt.ids
            self._index.add(key, prompt.ids, 0, 0)
            too_many = self.num_ids - self.most
            while too_many > 0:
                oldest = next(iter(self._prompts))
                self._index.discard(oldest)
                too_many -= len(self._prompts.pop(oldest))


def _shared(one: Numbers, other: Numbers) -> int:
    """How many first ids of two prompts are the same."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
