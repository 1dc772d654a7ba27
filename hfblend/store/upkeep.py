"""What looks after a folder of entries, near or far: what is there, whether it is whole, and what must go.

Beside an entry's file may stand two empty ones: `<key>.pin` while it is pinned, and `<key>.used`, which is as old as
its last use where its own file's age cannot be set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from .counts import StoreCounts
from .folders import Folder
from .format import CorruptEntry, OtherVersion, header_bytes, header_of, origin_of, parse
from .keys import SUFFIX, file_name_of, is_file_name
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

PIN, USED = ".pin", ".used"


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
        slack: where entries must go, so much of `max_bytes` is freed beyond what is needed, so that the folder need not
            be listed again at once.

    Raises:
        ValueError: a budget that is no size.
    """

    def __init__(self, folder: Folder, max_bytes: int | str | None, slack: float = 0.0) -> None:
        self.max_bytes = None if max_bytes is None else num_bytes_of(max_bytes)
        self.counts = StoreCounts()
        self._folder, self._slack = folder, slack
        self._surely_free = 0  # bytes

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
        self._folder.remove([key + PIN])

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there, pinned or not.

        Raises:
            OSError: it cannot be removed.
        """
        self._folder.remove([file_name_of(key), key + PIN, key + USED])

    def prune(self, max_bytes: int | str | None = None) -> None:
        """Removes the least recently used entries until the rest fits; pinned ones stay.

        Args:
            max_bytes: into so many; default, the store's own budget.

        Raises:
            OSError: they cannot be removed.
        """
        budget = self.max_bytes if max_bytes is None else num_bytes_of(max_bytes)
        if budget is not None:
            self._remove_until(budget, self._kept())

    def clear(self) -> None:
        """Removes every entry.

        Raises:
            OSError: they cannot be removed.
        """
        self._folder.remove([name for one in self._kept() for name in one.names])

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries' files."""
        return sum(one.num_bytes for one in self._kept())

    def __len__(self) -> int:
        return len(self._kept())

    def _make_room(self, needed: int, key: str) -> bool:
        """Lets the least recently used entries go, but not that of `key`, until so many bytes fit; whether they do.

        The folder is not listed again before half of what was free is written: others write too.
        """
        if self.max_bytes is None:
            return True
        if needed > self.max_bytes:
            return False
        if needed <= self._surely_free:
            self._surely_free -= needed
            return True
        others = [one for one in self._kept() if one.key != key]
        held = sum(one.num_bytes for one in others)
        if held + needed > self.max_bytes:
            held = self._remove_until(self.max_bytes - needed - int(self._slack * self.max_bytes), others)
        free = self.max_bytes - held - needed
        self._surely_free = max(0, free) // 2
        return free >= 0

    def _say_no_room(self, num_bytes: int, where: str) -> None:
        why = "the entry does not fit" if num_bytes > (self.max_bytes or 0) else "pinned entries leave no room"
        logger.warning("A chunk's KV of %d bytes is not kept in %s of %d: %s.", num_bytes, where, self.max_bytes, why)

    def _remove_until(self, budget: int, kept: list[_Kept]) -> int:
        """Removes the least recently used entries until the others fit, or are pinned; the bytes of those that stay."""
        held, names = sum(one.num_bytes for one in kept), []
        for one in sorted((one for one in kept if not one.is_pinned), key=lambda one: one.last_used):
            if held <= budget:
                break
            names += one.names
            held -= one.num_bytes
            self.counts.add(evicted=1)
        self._folder.remove(names)
        return held

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
        except (OSError, CorruptEntry, LookupError, TypeError) as error:
            return replace(entry, damaged=str(error) or type(error).__name__)

    def _head(self, name: str) -> bytes:
        """A file's header."""
        start = self._folder.read(name, 0, 8)
        return start + self._folder.read(name, 8, header_bytes(start))

    def _each(self, call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
        """The answers of a call to each, in order."""
        return map(call, many)
