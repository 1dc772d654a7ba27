"""Upkeep of a folder of entries, near or far: listing, checking, and removing what must go.

Next to an entry's file may stand two empty ones: `<key>.pin` while it is pinned, and `<key>.used`, which is as old as
its last use, if that file's age cannot be set.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ..locks import Mutex
from .counts import StoreCounts
from .folders import LocalFolder, RemoteFolder
from .format import CorruptEntry, OtherVersion, header_bytes, header_of, origin_of, parse
from .keys import SUFFIX, file_name_of, is_key
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)

PIN, USED = ".pin", ".used"

# Shares of a budget: freed beyond what is needed, when entries must go; and written before the folder is listed again.
# Others write, too: the second is what each store may add unseen by them.
_FREED, _UNSEEN = 1 / 16, 1 / 32
_RESTS = 16  # times as long as a list took that found no room


@dataclass(frozen=True)
class StoredEntry:
    """An entry by its file and its header.

    Attributes:
        num_bytes: of the file.
        last_used: seconds since 1970; of a remote without a budget, when it was written.
        pinned: whether it stays when others must go.
        model, fingerprint: of the model that computed it; empty in files of earlier versions.
        damaged: the fault of the header; empty if it has none, and then the rest is filled in.
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
class _Listed:
    key: str
    num_bytes: int = 0
    last_used: float = 0.0
    names: list[str] = field(default_factory=list)

    @property
    def is_pinned(self) -> bool:
        return self.key + PIN in self.names


class Upkeep:
    """Looks after the entries of a folder, called `where` in logs, up to a byte budget (`None`: no bound)."""

    def __init__(self, folder: LocalFolder | RemoteFolder, where: str, max_bytes: int | str | None) -> None:
        self.max_bytes = None if max_bytes is None else num_bytes_of(max_bytes)
        self.where, self.counts = where, StoreCounts()
        self._folder = folder
        self._room, self._full_until = 0, 0.0  # bytes to write before the folder is listed; no list before that time
        self._under_way = 0  # bytes of puts that were given room and are not over
        self._room_lock, self._looking = Mutex(), Mutex()
        self._refusal_said = False

    def entries(self) -> Iterator[StoredEntry]:
        """Every entry, by its header; the data are not read. Raises `OSError` if the folder cannot be listed."""
        return (entry for entry in self._folder.each(self._entry, self._listed()) if entry is not None)

    def keys(self) -> list[str]:
        """Returns the key of every entry. Raises `OSError` if the folder cannot be listed."""
        return [one.key for one in self._listed()]

    def fault_of(self, key: str) -> str | None:
        """Reads every byte of an entry; returns its fault, `None` if it is whole, or gone."""
        try:
            parse(key, self._folder.read(file_name_of(key)))
        except FileNotFoundError:
            return None
        except (OSError, CorruptEntry, OtherVersion) as error:
            return str(error)
        return None

    def pin(self, key: str) -> None:
        """Keeps an entry when others must go, whichever process makes room in the folder, until `unpin`.

        Raises:
            KeyError: there is none of that key.
            OSError: the folder cannot be written.
        """
        if not self._has(file_name_of(key)):
            raise KeyError(f"There is no entry {key[:12]}… to pin; store it first.")
        self._folder.write(key + PIN, b"")

    def unpin(self, key: str) -> None:
        """Lets an entry go again. Raises `OSError` if the folder cannot be written."""
        file_name_of(key)  # a key, and no path
        self._remove([key + PIN])

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there, pinned or not. Raises `OSError` if it cannot be removed."""
        self._remove([file_name_of(key), key + PIN, key + USED])

    def prune(self, max_bytes: int | str | None = None) -> None:
        """Removes the least recently used entries until the rest fits into so many bytes (default, the store's budget).

        Pinned ones stay. Raises `OSError` if too many cannot be removed; those that can are.
        """
        budget = self.max_bytes if max_bytes is None else num_bytes_of(max_bytes)
        if budget is not None:
            self._full_until = 0.0
            held, refused = self._remove_until(budget, self._listed())
            if held > budget and refused:
                raise refused[0]

    def clear(self) -> None:
        """Removes every entry. Raises `OSError` if one cannot be removed."""
        self._remove([name for one in self._listed() for name in one.names])

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries' files."""
        return sum(one.num_bytes for one in self._listed())

    def __len__(self) -> int:
        return len(self._listed())

    def _has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return bool(self._folder.state(name))
        return False

    def _remove(self, names: Iterable[str]) -> None:
        self._full_until = 0.0
        for error in self._folder.remove(names).values():
            raise error

    # --- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, needed: int, key: str) -> bool:
        """Removes the least recently used entries, except `key`, until so many bytes fit; returns whether they do.

        Most puts list nothing (`_FREED`, `_UNSEEN`). One that had room is followed by `_settle`, whatever comes of it.
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
                self._under_way += needed
        return has_room

    def _settle(self, num_bytes: int) -> None:
        """Notes that a put that had room for so many bytes is over: lists that begin from now on show its file."""
        with self._room_lock:
            self._under_way -= num_bytes

    def _look_for_room(self, needed: int, key: str, budget: int) -> bool:
        began = time.monotonic()
        with self._room_lock:
            self._room, under_way = 0, self._under_way  # by other threads, and perhaps not in the list
        others = [one for one in self._listed() if one.key != key]
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
            self._under_way += needed
        return True

    def _say_no_room(self, num_bytes: int) -> None:
        is_full = num_bytes <= (self.max_bytes or 0)
        why = "what is pinned, stuck or being written leaves no room" if is_full else "the entry does not fit"
        logger.warning(
            "A chunk's KV of %d bytes is not kept in %s of %d: %s.", num_bytes, self.where, self.max_bytes, why
        )

    def _remove_until(self, budget: int, listed: list[_Listed], more: int = 0) -> tuple[int, list[OSError]]:
        """Removes the least recently used entries, as far as possible, until the others fit; up to `more` bytes beyond.

        Returns the bytes of those that stay, and why some could not be removed.
        """
        held, errors = sum(one.num_bytes for one in listed), list[OSError]()
        waiting = deque(sorted((one for one in listed if not one.is_pinned), key=lambda one: one.last_used))
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

    # --- lists ----------------------------------------------------------------------------------------------------

    def _listed(self) -> list[_Listed]:
        found: dict[str, _Listed] = {}
        for name, num_bytes, changed in self._folder.files():
            key, dot, ending = name.rpartition(".")
            if dot + ending not in (SUFFIX, PIN, USED) or not is_key(key):
                continue
            one = found.setdefault(key, _Listed(key))
            one.names.append(name)
            one.num_bytes += num_bytes
            if dot + ending != PIN:
                one.last_used = max(one.last_used, changed)
        return [one for one in found.values() if file_name_of(one.key) in one.names]

    def _entry(self, one: _Listed) -> StoredEntry | None:
        """Returns an entry by its header; `None` if it is gone."""
        entry, name = StoredEntry(one.key, one.num_bytes, one.last_used, one.is_pinned), file_name_of(one.key)
        try:
            start = self._folder.read(name, 0, 8)
            header = header_of(start + self._folder.read(name, 8, header_bytes(start)))
            layers = [place for layer, place in header.items() if layer.startswith("layer_")]
            origin, provenance = origin_of(header["__metadata__"]), header["__metadata__"]["provenance"]
            tokens, dtype = header["cached_positions"]["shape"][0], layers[0]["dtype"]
            if type(tokens) is not int or not isinstance(dtype, str) or not isinstance(provenance, str):
                raise TypeError("its header holds what no header holds")
            if origin is not None:
                entry = replace(entry, model=origin.model, fingerprint=origin.fingerprint)
            return replace(entry, tokens=tokens, layers=len(layers), dtype=dtype, provenance=provenance)
        except FileNotFoundError:
            return None
        except (OSError, CorruptEntry, LookupError, TypeError, AttributeError) as error:
            return replace(entry, damaged=str(error) or type(error).__name__)
