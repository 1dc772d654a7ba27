"""Chunks of a plain prompt, found without marks: stored texts stand somewhere in its ids (`find="stored"`).

    prompt    prefix | · a stored text · · · another, from its second token on · · question
    spans              [              ]      [                               ]

They become spans, as a separator's would. The look-up then finds each by its key, the hash of its ids and of those it
was computed after; a part of an entry is opened under the part's own key, once the entry's ids are those of the prompt.
So nothing that only looks alike is ever used.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..blend.look_up import ChunksOf
from ..blend.model import BlendableModel
from ..config import BlendConfig
from ..kv.chunk import ChunkKV, ChunkLost, Reader
from ..kv.ids import plain_ids
from ..kv.part import part_of
from ..prompts.prompt import ChunkSpans
from ..store import Store, tiers_of
from ..store.base import Findable, ReadsAhead
from ..store.index import Hashed, Index, Match, Numbers, longest_first, only_seen
from .learn import Traffic

logger = logging.getLogger(__name__)

_LATEST = 8  # beginnings that are looked at to say why nothing was found


class Place(NamedTuple):
    """Tokens [start, stop) of an entry with that key; they must be `ids`, computed after `after_ids`."""

    key: str
    start: int
    stop: int
    ids: array[int]
    after_ids: array[int]

    def holds(self, entry: Reader, scope: str) -> bool:
        """Whether that is so."""
        try:
            is_after = entry.scope == scope and plain_ids(entry.behind_ids) == self.after_ids
            return is_after and array("q", entry.ids[self.start : self.stop]) == self.ids
        except ChunkLost as error:
            logger.warning("%s", error)
            return False


@dataclass
class Finder:
    """Finds stored texts in the prompts of a call.

    Args:
        heard: earlier prompts, of which passages are learnt; `None`: none are.

    Attributes:
        places: key of a found chunk -> where its KV is.
    """

    model: BlendableModel
    store: Store
    config: BlendConfig
    heard: Traffic | None = None
    places: dict[str, Place] = field(default_factory=dict)
    _spans: dict[bytes, ChunkSpans] = field(default_factory=dict)

    def spans(self, ids: Sequence[int]) -> ChunkSpans:
        """Returns the spans of stored texts in a prompt, with a note of what was found; equal prompts share theirs."""
        ids = plain_ids(ids)
        key = ids.tobytes()
        if key not in self._spans:
            self._spans[key] = self._spans_in(ids)
        return self._spans[key]

    def _spans_in(self, ids: array[int]) -> ChunkSpans:
        prompt = Hashed(ids)
        by_start = self._found(prompt, self._place(prompt))
        chosen = {start: longest_first(only_seen(found), start, len(ids)) for start, found in by_start.items()}
        start = max(chosen, key=lambda start: start * bool(chosen[start]) + _tokens(chosen[start]), default=0)
        matches = self._placed(ids, start, chosen.get(start, ()))
        start, learnt = self._learnt(prompt, matches, start if matches else None)
        if not (matches or learnt):
            return ChunkSpans((), note=self._elsewhere(prompt))
        spans = sorted((one.start, one.stop) for one in (*matches, *learnt))
        return ChunkSpans(spans, note=_note(matches, learnt), prefix_stop=start)

    def _learnt(self, prompt: Hashed, matches: Sequence[Match], start: int | None) -> tuple[int, list[Match]]:
        """Returns the passages that an earlier prompt had too, and how many first tokens they are computed after."""
        if self.heard is None:
            return start or 0, []
        anywhere = self.config.chunk_prefix in ("bos", "none")
        start, learnt = self.heard.repeated(prompt, matches, 0 if anywhere else start)
        self.heard.add(prompt)
        return start, learnt

    @property
    def found_in(self) -> Store:
        """The store, in which parts of entries are found under the keys of the parts."""
        return _WithParts(self.store, self.places, self.scope) if self.places else self.store

    @property
    def scope(self) -> str:
        """The scope that is looked through."""
        return self._of_none.scope

    @cached_property
    def _of_none(self) -> ChunksOf:
        return self._chunks_after(())

    @property
    def _indexes(self) -> list[Index]:
        return indexes_of(self.store, self.scope)

    def _found(self, prompt: Hashed, place: Callable[[Numbers, Numbers], Numbers]) -> dict[int, list[Match]]:
        """Tokens of a prefix -> the matches of texts that were computed after it."""
        found: dict[int, list[Match]] = {}
        for index in self._indexes:
            for start, matches in index.find(prompt, place):
                found.setdefault(start, []).extend(matches)
        return found

    def _place(self, prompt: Hashed) -> Callable[[Numbers, Numbers], Numbers]:
        """Returns what says, of texts computed after so many ids that sum up so, how many tokens of the prompt make the
        prefix; −1 where the prompt does not begin with these ids."""
        tail = Hashed(self._of_none.after_ids)
        num_after = len(tail.ids)
        if self.config.chunk_prefix in ("bos", "none"):
            return lambda numbers, sums: np.where((numbers == num_after) & (sums == tail.sums[-1]), 0, -1)
        begins = prompt.followed_by(tail)

        def prefix(numbers: Numbers, sums: Numbers) -> Numbers:
            lengths = numbers - num_after
            is_inside = (lengths >= 0) & (lengths < len(begins))
            return np.where(is_inside & (begins[np.where(is_inside, lengths, 0)] == sums), lengths, -1)

        return prefix

    def _placed(self, ids: array[int], start: int, matches: Sequence[Match]) -> list[Match]:
        """Returns the matches, without whole texts whose key is not their entry's, and notes where the KV is: of equal
        texts, where it has seen the fewest other ids."""
        chunks_of, placed = self._chunks_after(ids[:start]), []
        after_ids, texts = plain_ids(chunks_of.after_ids), [ids[one.start : one.stop] for one in matches]
        for one, text, key in zip(matches, texts, chunks_of.keys((text, after_ids) for text in texts)):
            if key == one.key or len(text) < len(one.ids):
                if key not in self.places or one.offset < self.places[key].start:
                    self.places[key] = Place(one.key, one.offset, one.offset + len(text), text, after_ids)
                placed.append(one)
        return placed

    def _chunks_after(self, prefix_ids: Sequence[int]) -> ChunksOf:
        return ChunksOf(self.model, self.store, self.config, prefix_ids)

    def _elsewhere(self, prompt: Hashed) -> str:
        """Says which texts would have been found after another beginning, of the latest, if nothing was found."""
        found = self._found(prompt, lambda numbers, sums: np.where(np.arange(len(sums))[::-1] < _LATEST, numbers, -1))
        if not (best := max(found.values(), key=_tokens, default=[])):
            return "No text of the store was found in the prompt."
        matches = longest_first(best, 0, len(prompt.ids))
        return (
            f"{len(matches)} texts of the store, {_tokens(matches)} tokens, are in the prompt, but their KV was "
            "computed after another beginning (prefix, chunk_prefix) than the prompt's."
        )


def indexes_of(store: Store, scope: str) -> list[Index]:
    """The texts of a scope that the stores which a store is made of know."""
    return [tier.index(scope) for tier in tiers_of(store) if isinstance(tier, Findable)]


def _tokens(matches: Iterable[Match]) -> int:
    return sum(one.stop - one.start for one in matches)


def _note(matches: Sequence[Match], learnt: Sequence[Match]) -> str:
    parts = sum(one.stop - one.start < len(one.ids) for one in matches)
    also = f" {len(learnt)} passages, {_tokens(learnt)} tokens, came in an earlier prompt: learnt." if learnt else ""
    return f"Found {len(matches)} texts of the store ({parts} in part), {_tokens(matches)} tokens.{also}"


class _WithParts:
    """A store in which found chunks are entries, or parts of them."""

    def __init__(self, store: Store, places: Mapping[str, Place], scope: str) -> None:
        self._store, self._places, self._scope = store, places, scope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        self._store.put(key, chunk_kv)

    def open(self, key: str) -> Reader | None:
        place = self._places.get(key)
        if place is None:
            return self._store.open(key)
        entry = self._store.open(place.key)
        if key == place.key and entry is not None:
            return entry
        if entry is not None and place.holds(entry, self._scope):
            return part_of(entry, key, place.start, place.stop)
        for index in indexes_of(self._store, self._scope):  # it has gone since: not to be found again
            index.discard(place.key)
        return None if key == place.key else self._store.open(key)

    def read_ahead(self, keys: Sequence[str]) -> None:
        if isinstance(self._store, ReadsAhead):
            self._store.read_ahead([self._places[key].key if key in self._places else key for key in keys])
