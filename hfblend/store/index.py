"""Finds stored text in a prompt's ids, at any offset, without marks.

    stored text     ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁          a rolling hash of each window of ids; some windows are in a table
    prompt      · · · · ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ · · ·  the same windows are chosen here, wherever the text stands

Where a window is met, ids are compared one by one, as far as they agree: texts tokenise otherwise at their edges, and a
prompt may hold a part of a text. Hashes only say where to look; the cost grows with the prompt, not with the store.
Windows are chosen as in winnowing (Schleimer, Wilkerson, Aiken: SIGMOD 2003).

Shapes: T tokens of a prompt, n of a text, G groups of texts, m windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..kv.ids import plain_ids
from ..locks import Mutex

WINDOW = STRIDE = 16  # so that WINDOW + STRIDE - 1 equal ids always hold a window that is chosen
EDGE = 8  # ids of an entry that a prompt may have otherwise: tokens that merge with what stands next to the text
LEAST = 32  # ids of a match: shorter ones would cost more than they spare

_SAME = 8  # texts with one and the same window that are compared
_MOST = 2048  # places of texts in a prompt that are compared
_EACH = 8  # ids of texts that are compared for each of the prompt
_PENDING = 4096  # windows that are sorted anew, before they go into a larger table
_GROWTH = 8  # from one table to the next larger one
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)

Numbers = np.ndarray[Any, np.dtype[Any]]
_Windows = tuple[Numbers, Numbers]  # offsets in a prompt, or places among the ids of all texts, and hashes


class Match(NamedTuple):
    """A part of a stored text, found in a prompt.

    Attributes:
        start, stop: its tokens in the prompt.
        key: of the entry.
        offset: of the part in the entry's text.
        ids: of the whole entry.
    """

    start: int
    stop: int
    key: str
    offset: int
    ids: Numbers

    def within(self, start: int, stop: int) -> Match:
        """The part of it that lies there."""
        return self._replace(start=start, stop=stop, offset=self.offset + start - self.start)


class Hashed:
    """Ids, ready to be looked for.

    Attributes:
        sums: (T + 1,) `sums[n]` stands for the first n ids.
    """

    def __init__(self, ids: Sequence[int] | Numbers) -> None:
        plain = ids if isinstance(ids, np.ndarray) else np.frombuffer(plain_ids(ids), np.int64)
        self.ids = plain.astype(np.int32)  # (T,)
        self.sums = np.zeros(len(plain) + 1, np.uint64)
        np.cumsum(_mixed(plain.astype(np.uint64)) * _powers(len(plain)), out=self.sums[1:])

    @cached_property
    def windows(self) -> _Windows:
        """Offsets of windows, and their hashes: of any `STRIDE` windows in a row, the one with the smallest.

        Which they are depends on nothing else, so that a text and a prompt that holds it choose alike.
        """
        inverse = _powers(max(0, len(self.sums) - WINDOW), _INVERSE)
        hashes = _mixed((self.sums[WINDOW:] - self.sums[:-WINDOW]) * inverse)
        least = _over_stride(np.minimum, hashes)
        most = _over_stride(np.maximum, np.pad(least, STRIDE - 1))
        offsets = np.flatnonzero(most == hashes) if len(least) else np.empty(0, np.int64)
        return offsets, hashes[offsets]

    def followed_by(self, tail: Hashed) -> Numbers:
        """(T + 1,) what stands for the first n ids and then those of `tail`."""
        return self.sums + _powers(len(self.sums)) * tail.sums[-1]


class Index:
    """The texts of a store's entries. Those that were computed after the same ids are one group."""

    def __init__(self) -> None:
        self._groups: dict[tuple[int, int], _Group] = {}
        self._keys: Numbers | None = None  # (G, 2) of the groups, once they were asked for
        self._group_of: dict[str, _Group] = {}
        self._lock = Mutex()

    def __len__(self) -> int:
        return len(self._group_of)

    def __contains__(self, key: str) -> bool:
        return key in self._group_of

    def keys(self) -> list[str]:
        """Returns the key of every text."""
        with self._lock:
            return list(self._group_of)

    def add(self, key: str, ids: Sequence[int] | Numbers, num_behind: int, behind: int) -> None:
        """Adds an entry's text; `behind` stands for the `num_behind` ids that it was computed after (`Hashed.sums`)."""
        with self._lock:
            if key not in self._group_of and len(ids) >= LEAST:
                if (num_behind, behind) not in self._groups:
                    self._keys, self._groups[num_behind, behind] = None, _Group(num_behind, behind)
                group = self._groups[num_behind, behind]
                group.add(key, Hashed(ids))
                self._group_of[key] = group

    def discard(self, key: str) -> None:
        """Removes an entry's text, if it is there."""
        with self._lock:
            group = self._group_of.pop(key, None)
            if group is not None:
                group.discard(key)
                if not len(group):
                    self._keys = None
                    self._groups.pop(group.key, None)

    def clear(self) -> None:
        """Removes every text."""
        with self._lock:
            self._keys = None
            self._groups.clear()
            self._group_of.clear()

    def find(self, prompt: Hashed, place: Callable[[Numbers, Numbers], Numbers]) -> list[tuple[int, list[Match]]]:
        """Returns the matches of each group that a prompt can use, unordered, with what `place` says of the group.

        Args:
            place: of the groups' (G,) numbers of ids before them and (G,) sums; negative for those not to be used.
        """
        with self._lock:
            if self._keys is None:
                self._keys = np.array([*self._groups], np.uint64).reshape(-1, 2)
            places = place(self._keys[:, 0].astype(np.int64), self._keys[:, 1])
            used = [(int(places[i]), tuple(self._keys[i].tolist())) for i in np.flatnonzero(places >= 0)]
            return [(start, self._groups[key].find(prompt)) for start, key in used]


class _Group:
    """Texts, one after the other, and tables of their windows, the largest table first.

    An exception may end any step: a text is there once its end is, and what is past the last end is written over.
    """

    def __init__(self, num_behind: int, behind: int) -> None:
        self.key = num_behind, behind
        self._ids, self._ends, self._keys = _Growing(np.int32), _Growing(np.int64), list[str | None]()
        self._ends.extend([0])
        self._text_of: dict[str, int] = {}
        self._tables: list[_Table] = []
        self._pending: list[_Windows] = []

    def __len__(self) -> int:
        return len(self._text_of)

    def add(self, key: str, text: Hashed) -> None:
        number, start, (offsets, hashes) = len(self._starts), int(self._ends.rows[-1]), text.windows
        self._keys[number:] = [key]
        self._ids.extend(text.ids, start)
        self._ends.extend([len(self._ids)])
        self._text_of[key] = number
        self._pending.append((start + offsets, hashes))

    def discard(self, key: str) -> None:
        if (number := self._text_of.get(key)) is not None:
            self._keys[number] = None
            del self._text_of[key]
        if len(self._text_of) < len(self._keys) // 2:
            fresh = _Group(*self.key)
            for one, i in self._text_of.items():
                fresh.add(one, Hashed(self._ids.rows[self._starts[i] : self._stops[i]]))
            vars(self).update(vars(fresh))

    @property
    def _starts(self) -> Numbers:
        return self._ends.rows[:-1]

    @property
    def _stops(self) -> Numbers:
        return self._ends.rows[1:]

    def find(self, prompt: Hashed) -> list[Match]:
        """The longest parts of texts in a prompt, wherever windows of them are met."""
        self._sort()
        if not self._tables:
            return []
        offsets, hashes = prompt.windows
        numbers, places = (np.concatenate(parts) for parts in zip(*(table.find(hashes) for table in self._tables)))
        texts = np.searchsorted(self._starts, places, "right") - 1
        shifts = offsets[numbers] - (places - self._starts[texts])  # of the text's first id, in the prompt
        both, counts = np.unique((texts << 32) + shifts, return_counts=True)  # a text has less than 2³¹ ids
        most = both[np.argsort(-counts, kind="stable")[:_MOST]]
        texts = (most + 2**31) >> 32
        return self._compared(prompt.ids, texts, most - (texts << 32))

    def _compared(self, prompt: Numbers, texts: Numbers, shifts: Numbers) -> list[Match]:
        """The runs of equal ids of texts that begin at places of the prompt, which may lie before its start."""
        starts, stops = self._starts[texts], self._stops[texts]
        first = np.maximum(0, -shifts)
        sizes = np.minimum(stops - starts, len(prompt) - shifts) - first
        few = np.cumsum(sizes) <= _EACH * len(prompt) + _PENDING
        starts, stops, first, sizes, shifts, texts = (one[few] for one in (starts, stops, first, sizes, shifts, texts))
        ends = np.cumsum(sizes)
        number = np.repeat(np.arange(len(sizes)), sizes)
        at = np.arange(len(number)) + (first - ends + sizes)[number]  # in the text
        begin, end = _runs(self._ids.rows[starts[number] + at] == prompt[shifts[number] + at], ends)
        which, offsets, ids = number[begin], at[begin], self._ids.rows
        parts = (offsets + shifts[which], end - begin, offsets, texts[which], starts[which], stops[which])
        return [
            Match(start, start + size, key, offset, ids[first:last])
            for start, size, offset, text, first, last in zip(*map(np.ndarray.tolist, parts))
            if (key := self._keys[text]) is not None
        ]

    def _sort(self) -> None:
        """Brings new windows into a table, and tables that are near in size into one."""
        if not self._pending:
            return
        tables, pending = [*self._tables], self._pending
        if tables and len(tables[-1]) < _PENDING:
            pending = [*pending, tables.pop().windows]
        tables.append(_Table.of(pending))
        while len(tables) > 1 and len(tables[-2]) < _GROWTH * len(tables[-1]) > _PENDING:
            tables[-2:] = [_Table.of([one.windows for one in tables[-2:]])]
        self._tables, self._pending = tables, []


class _Table:
    """Hashes (m,) in order, of each at most `_SAME`, with the places of the windows.

    The first bits of a hash say where in the order it would be: `_first` has a number for each of their values.
    """

    def __init__(self, places: Numbers, hashes: Numbers) -> None:
        self._places, self._hashes = places, hashes
        bits = max(1, len(hashes).bit_length())
        self._shift = np.uint64(64 - bits)
        self._first = np.zeros(2**bits + 1, np.int32)
        np.cumsum(np.bincount((hashes >> self._shift).astype(np.int64), minlength=2**bits), out=self._first[1:])

    @classmethod
    def of(cls, windows: Iterable[_Windows]) -> _Table:
        places, hashes = (np.concatenate(parts) for parts in zip(*windows))
        order = np.argsort(hashes, kind="stable")
        hashes, places = hashes[order], places[order].astype(np.uint32)
        kept = np.ones(len(hashes), bool)
        kept[_SAME:] = hashes[_SAME:] != hashes[:-_SAME]
        return cls(places[kept], hashes[kept])

    @property
    def windows(self) -> _Windows:
        return self._places, self._hashes

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, hashes: Numbers) -> tuple[Numbers, Numbers]:
        """Which of some hashes are in the table, a number for each time, and the places of the windows."""
        bucket = (hashes >> self._shift).astype(np.int64)
        at, stops = self._first[bucket], self._first[bucket + 1]
        left, found = np.flatnonzero(at < stops), [(np.empty(0, np.int64), np.empty(0, np.uint32))]
        at, stops, wanted = at[left], stops[left], hashes[left]
        while len(left):
            here = self._hashes[at]
            hit = here == wanted
            found.append((left[hit], self._places[at[hit]]))
            at = at + 1
            more = (at < stops) & (here <= wanted)
            left, at, stops, wanted = left[more], at[more], stops[more], wanted[more]
        numbers, places = (np.concatenate(parts) for parts in zip(*found))
        return numbers, places.astype(np.int64)


class _Growing:
    """Numbers in one array with room for more."""

    def __init__(self, dtype: Any) -> None:
        self._room, self._length = np.empty(64, dtype), 0

    def __len__(self) -> int:
        return self._length

    @property
    def rows(self) -> Numbers:
        return self._room[: self._length]

    def extend(self, more: Sequence[int] | Numbers, start: int | None = None) -> None:
        """Puts numbers at `start`, by default after the last one; those after them are gone."""
        start = self._length if start is None else start
        stop = start + len(more)
        if stop > len(self._room):
            self._room = np.concatenate([self._room[:start], np.empty(stop, self._room.dtype)])
        self._room[start:stop] = more
        self._length = stop


def stands_for(ids: Sequence[int] | Numbers) -> int:
    """The number that stands for ids (`Hashed.sums`)."""
    return int(Hashed(ids).sums[-1])


def only_seen(matches: Iterable[Match]) -> list[Match]:
    """Leaves out parts whose rows have seen more than `EDGE` ids, at one place, that the prompt has not before them."""
    reached, kept = dict[str, int](), list[Match]()
    for one in sorted(matches, key=lambda match: match.start):
        if one.offset - reached.get(one.key, 0) <= EDGE:
            reached[one.key] = max(reached.get(one.key, 0), one.offset + one.stop - one.start)
            kept.append(one)
    return kept


def longest_first(matches: Iterable[Match], start: int, length: int, others: Iterable[Match] = ()) -> list[Match]:
    """Chooses matches in tokens [start, length), the longest first, none over another; returns them in order.

    What a longer one leaves of a match is taken, if it is long enough.

    Args:
        others: that none may lie over.
    """
    taken = np.zeros(length, bool)
    taken[:start] = True
    for one in others:
        taken[one.start : one.stop] = True
    chosen: list[Match] = []
    for match in sorted(matches, key=lambda one: (one.start - one.stop, one.start, one.offset, one.key)):
        place = taken[match.start : match.stop]
        if not place.any():
            parts = [match]
        else:
            free = zip(*_runs(~place, np.array([len(place)])))
            parts = [match.within(match.start + int(begin), match.start + int(end)) for begin, end in free]
        for part in parts:
            taken[part.start : part.stop] = True
        chosen += parts
    return sorted(chosen, key=lambda one: one.start)


def _runs(are: Numbers, ends: Numbers) -> tuple[Numbers, Numbers]:
    """Where runs of `LEAST` true values or more begin and end; none goes on over one of the `ends`."""
    before, after = np.zeros(len(are), bool), np.zeros(len(are), bool)
    before[1:], after[:-1] = are[:-1], are[1:]
    before[ends[:-1][ends[:-1] < len(are)]] = False
    after[ends[ends > 0] - 1] = False
    begin, end = np.flatnonzero(are & ~before), np.flatnonzero(are & ~after) + 1
    are_long = end - begin >= LEAST
    return begin[are_long], end[are_long]


def _over_stride(of_two: Any, numbers: Numbers) -> Numbers:
    """(m − STRIDE + 1,) the least, or the greatest, of each `STRIDE` numbers in a row."""
    for distance in (1, 2, 4, 8):
        numbers = of_two(numbers[:-distance], numbers[distance:])
    return numbers


def _mixed(numbers: Numbers) -> Numbers:
    """Spreads the bits of uint64 numbers."""
    numbers = (numbers ^ (numbers >> np.uint64(31))) * _MIX + np.uint64(_BASE)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX
    return numbers ^ (numbers >> np.uint64(31))


_known_powers: dict[int, Numbers] = {}


def _powers(count: int, base: int = _BASE) -> Numbers:
    """(count,) the powers of an odd number, modulo 2⁶⁴."""
    known = _known_powers.get(base)
    if known is None or len(known) < count:
        known = np.full(max(2 * count, 1024), base, np.uint64)
        known[0] = 1
        known = _known_powers[base] = np.cumprod(known, dtype=np.uint64)
    return known[:count]
