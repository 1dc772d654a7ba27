"""What looks after a folder of entries, near or far: what is there, whether it is whole, and what must go.

Beside an entry's file may stand two empty ones: `<key>.pin` while it is pinned, and `<key>.used`, which is as old as
its last use where its own file's age cannot be set.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..locks import Mutex
from .counts import StoreCounts
from .folders import Folder
from .format import (
    HEAD_BYTES,
    Contents,
    CorruptEntry,
    OtherVersion,
    contents_of,
    header_bytes,
    header_of,
    origin_of,
    parse,
)
from .keys import SUFFIX, file_name_of, is_file_name
from .loader import Places
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PIN, USED = ".pin", ".used"

# Shares of a budget: freed beyond what is needed, where entries must go; and written before the folder is listed again.
# Others write, too: the second is what each store may add to what they do not know of each other.
_FREED, _UNSEEN = 1 / 16, 1 / 32
_RESTS = 16  # times as long as a list took that found no room


@dataclass(frozen=True)
class StoredEntry:
    """What an entry's file and its header say of it.

    Attributes:
        num_bytes: of the file.
        last_used: seconds since 1970; of a remote without a budget, when it was written.
        pinned: whether it stays when others must go.
        model, fingerprint: whose KV it is; empty in files of earlier versions.
        damaged: what is wrong with the header; empty if nothing is, and then the rest is filled in.
    """

    key: str
    num_bytes: int
    last_used: float
    pinned: bool = False
    tokens: int = 0
    layers: int = 0
    dtype: str = ""
    provenance: str = ""
    model: str = ""
    fingerprint: str = ""
    damaged: str = ""


@dataclass
class _Kept:
    """An entry's files, by the folder's list."""

    key: str
    num_bytes: int = 0
    last_used: float = 0.0
    names: list[str] = field(default_factory=list)

    @property
    def is_pinned(self) -> bool:
        return self.key + PIN in self.names


class InFiles:
    """A store that keeps each entry in a file of a folder, up to a byte budget. Base of `DiskStore` and `RemoteStore`.

    Args:
        folder: where.
        max_bytes: of all entries together; `None`, as many as there are.

    Raises:
        ValueError: a budget that is no size.
    """

    where: str  # as it stands in logs

    def __init__(self, folder: Folder, max_bytes: int | str | None) -> None:
        self.max_bytes = None if max_bytes is None else num_bytes_of(max_bytes)
        self.counts = StoreCounts()
        self._folder = folder
        self._room, self._full_until = 0, 0.0  # bytes that may be written before the folder is listed; when it may be
        self._given, self._settled = 0, 0  # bytes that had room since the store was made; those of puts that are over
        self._room_lock, self._looking = Mutex(), Mutex()
        self._refusal_said = False

    def entries(self) -> Iterator[StoredEntry]:
        """Every entry, by its header; the data are not read.

        Raises:
            OSError: the folder cannot be listed.
        """
        return (entry for entry in self._each(self._entry, self._kept()) if entry is not None)

    def keys(self) -> list[str]:
        """The key of every entry.

        Raises:
            OSError: the folder cannot be listed.
        """
        return [one.key for one in self._kept()]

    def fault_of(self, key: str) -> str | None:
        """What is wrong with an entry, every byte read; `None` if it is whole, or gone."""
        try:
            parse(key, self._folder.read(file_name_of(key)))
        except FileNotFoundError:
            return None
        except (OSError, CorruptEntry, OtherVersion) as error:
            return str(error)
        return None

    def pin(self, key: str) -> None:
        """An entry stays when others must go, whoever makes room in the folder, until `unpin`.

        Raises:
            KeyError: there is none of that key.
            OSError: the folder cannot be written.
        """
        if not self._folder.has(file_name_of(key)):
            raise KeyError(f"There is no entry {key[:12]}… to pin; store it first.")
        self._folder.write(key + PIN, b"")

    def unpin(self, key: str) -> None:
        """An entry may go again.

        Raises:
            OSError: the folder cannot be written.
        """
        file_name_of(key)  # a key, and no path
        self._remove([key + PIN])

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there, pinned or not.

        Raises:
            OSError: it cannot be removed.
        """
        self._remove([file_name_of(key), key + PIN, key + USED])

    def prune(self, max_bytes: int | str | None = None) -> None:
        """Removes the least recently used entries until the rest fits; pinned ones stay.

        Args:
            max_bytes: into so many; default, the store's own budget.

        Raises:
            OSError: those that can be removed are, and they are not enough.
        """
        budget = self.max_bytes if max_bytes is None else num_bytes_of(max_bytes)
        if budget is not None:
            self._full_until = 0.0
            held, refused = self._remove_until(budget, self._kept())
            if held > budget and refused:
                raise refused[0]

    def clear(self) -> None:
        """Removes every entry.

        Raises:
            OSError: they cannot be removed.
        """
        self._remove([name for one in self._kept() for name in one.names])

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries' files."""
        return sum(one.num_bytes for one in self._kept())

    def __len__(self) -> int:
        return len(self._kept())

    def _remove(self, names: Iterable[str]) -> None:
        self._full_until = 0.0
        for error in self._folder.remove(names).values():
            raise error

    # --- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, needed: int, key: str) -> bool:
        """Lets the least recently used entries go, but not that of `key`, until so many bytes fit; whether they do.

        A put costs the same however many entries there are: most list nothing (`_FREED`, `_UNSEEN`). One that had room
        is followed by `_settle`, whatever comes of it.
        """
        if self.max_bytes is None or self._take(needed):
            return True
        if needed > self.max_bytes or time.monotonic() < self._full_until:
            return False
        with self._looking:  # one thread of a store; those that waited may find what it has found
            return self._take(needed) or self._look_for_room(needed, key, self.max_bytes)

    def _take(self, needed: int) -> bool:
        with self._room_lock:
            has_room = needed <= self._room
            if has_room:
                self._room -= needed
                self._given += needed
        return has_room

    def _settle(self, num_bytes: int) -> None:
        """A put that had room for so many bytes is over: a list that begins from now on shows what it has written."""
        with self._room_lock:
            self._settled += num_bytes

    def _look_for_room(self, needed: int, key: str, budget: int) -> bool:
        began = time.monotonic()
        with self._room_lock:
            self._room, under_way = 0, self._given - self._settled  # by other threads, and perhaps not in the list
        others = [one for one in self._kept() if one.key != key]
        held = sum(one.num_bytes for one in others)
        if held + under_way + needed > budget:
            held, _ = self._remove_until(max(0, budget - needed - under_way), others, int(_FREED * budget))
        if held + needed > budget:
            now = time.monotonic()
            self._full_until = now + _RESTS * (now - began)
        free = budget - held - under_way
        if free < needed:
            return False
        with self._room_lock:
            self._room = max(0, min(free, int(_UNSEEN * budget)) - needed)
            self._given += needed
        return True

    def _say_no_room(self, num_bytes: int) -> None:
        fits = num_bytes <= (self.max_bytes or 0)
        why = (
            "what is pinned, cannot be removed or is being written leaves no room" if fits else "the entry does not fit"
        )
        logger.warning(
            "A chunk's KV of %d bytes is not kept in %s of %d: %s.", num_bytes, self.where, self.max_bytes, why
        )

    def _remove_until(self, budget: int, kept: list[_Kept], more: int = 0) -> tuple[int, list[OSError]]:
        """Removes the least recently used entries until the others fit, or are pinned, or cannot be removed.

        Args:
            more: bytes that may go beyond that.

        Returns:
            The bytes of those that stay, and why some could not be removed.
        """
        held, errors = sum(one.num_bytes for one in kept), list[OSError]()
        waiting = deque(sorted((one for one in kept if not one.is_pinned), key=lambda one: one.last_used))
        while held > budget and waiting:
            going, left = [], held
            while waiting and (left > budget or left - waiting[0].num_bytes >= budget - more > 0):
                going.append(waiting.popleft())
                left -= going[-1].num_bytes
            refused = self._folder.remove([name for one in going for name in one.names])
            gone = [one for one in going if file_name_of(one.key) not in refused]
            held -= sum(one.num_bytes for one in gone)
            errors += refused.values()
            self.counts.add(evicted=len(gone))
        if errors and not self._refusal_said:
            self._refusal_said = True
            logger.warning("Some entries of %s cannot be removed, others go in their place: %s", self.where, errors[0])
        return held, errors

    # --- damage ---------------------------------------------------------------------------------------------------

    def _damaged(self, key: str, error: CorruptEntry, opened: Contents | None = None, places: Places = ()) -> None:
        """Says that an entry is damaged, and removes it if a second reading brings the same bytes.

        Args:
            opened: by its header, where that was whole; `places` of it were not.
        """
        self.counts.add(damaged=1)
        outcome = "is damaged, removed"
        try:
            if not self._in_time(lambda: self._removed_if_damaged(key, error, opened, places)):
                outcome = "came damaged, a second reading does not agree or it was replaced, stays"
        except OSError as second:
            outcome = f"came damaged, cannot be read again or removed ({second}), stays"
        logger.warning("%s of %s %s and prefilled again: %s", file_name_of(key), self.where, outcome, error)

    def _removed_if_damaged(self, key: str, error: CorruptEntry, opened: Contents | None, places: Places) -> bool:
        name = file_name_of(key)
        try:
            state = self._folder.state(name)
            is_damaged = self._comes_alike(key, state[0], error, opened, places)
            if not is_damaged or self._folder.state(name) != state:
                return False
        except FileNotFoundError:
            return True
        for refusal in self._folder.remove([name]).values():
            raise refusal
        return True

    def _comes_alike(
        self, key: str, num_bytes: int, error: CorruptEntry, opened: Contents | None, places: Places
    ) -> bool:
        """Whether a second reading brings the bytes that were damaged, and not only some that are.

        Raises:
            OSError: something else than the file of so many bytes answers.
        """

        def read(start: int, stop: int) -> bytes:
            data, stop = self._folder.read(file_name_of(key), start, stop), min(stop, num_bytes)
            data = data[start:stop] if len(data) == num_bytes else data  # some filesystems read no parts
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
            return data

        head = read(0, HEAD_BYTES)
        if len(head) < min(num_bytes, header_bytes(head[:8])):
            head += read(len(head), header_bytes(head[:8]))
        try:
            if opened is not None and num_bytes != opened.layers[-1].stop:  # as the system itself says
                return contents_of(key, head, opened.layers[-1].stop) == opened
            contents = contents_of(key, head, num_bytes)
            for place in places if contents == opened else ():
                place.require_whole(memoryview(read(place.start, place.stop)))
        except OtherVersion:
            return False
        except CorruptEntry as second:
            return second.came == error.came != ""
        return False

    def _in_time(self, call: Callable[[], T]) -> T:
        """A call's answer, as soon as this store waits for one."""
        return call()

    # --- lists ----------------------------------------------------------------------------------------------------

    def _kept(self) -> list[_Kept]:
        """Every entry's files."""
        found: dict[str, _Kept] = {}
        for name, num_bytes, changed in self._folder.files():
            key, dot, ending = name.rpartition(".")
            if dot + ending not in (SUFFIX, PIN, USED) or not is_file_name(key + SUFFIX):
                continue
            one = found.setdefault(key, _Kept(key))
            one.names.append(name)
            one.num_bytes += num_bytes
            if dot + ending != PIN:
                one.last_used = max(one.last_used, changed)
        return [one for one in found.values() if file_name_of(one.key) in one.names]

    def _entry(self, one: _Kept) -> StoredEntry | None:
        """What its header says; `None` if it is gone."""
        entry, name = StoredEntry(one.key, one.num_bytes, one.last_used, one.is_pinned), file_name_of(one.key)
        try:
            header = header_of(self._head(name))
            layers = [place for layer, place in header.items() if layer.startswith("layer_")]
            origin, provenance = origin_of(header["__metadata__"]), header["__metadata__"]["provenance"]
            tokens, dtype = header["cached_positions"]["shape"][0], layers[0]["dtype"]
            if type(tokens) is not int or not isinstance(dtype, str) or not isinstance(provenance, str):
                raise TypeError("its header holds what no header holds")
            return replace(
                entry,
                tokens=tokens,
                layers=len(layers),
                dtype=dtype,
                provenance=provenance,
                model="" if origin is None else origin.model,
                fingerprint="" if origin is None else origin.fingerprint,
            )
        except FileNotFoundError:
            return None
        except (OSError, CorruptEntry, LookupError, TypeError, AttributeError) as error:
            return replace(entry, damaged=str(error) or type(error).__name__)

    def _head(self, name: str) -> bytes:
        """A file's header."""
        start = self._folder.read(name, 0, 8)
        return start + self._folder.read(name, 8, header_bytes(start))

    def _each(self, call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
        """The answers of a call to each, in order."""
        return map(call, many)
