"""The texts of a store of files, by which their entries are found in prompts.

    <scope>.index    in a folder: a line for each entry that was put, which other processes read as it grows
    headers          of the entries, with the same texts: read where a folder lacks the file, or lines; and at URLs

A line that is damaged, or was cut off by a crash, is passed over. Nothing here is trusted: an entry is used only under
the key that its text has.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ..kv.chunk import ChunkKV
from ..locks import Mutex
from .folders import LocalFolder
from .index import Index, stands_for
from .keys import file_name_of
from .requests import LATE, DaemonThreads

logger = logging.getLogger(__name__)

INDEX = ".index"
_STALE_S = 30.0  # how old the texts of a URL may be
_SLACK = 1024  # entries that may be gone before the folder is listed
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))  # waits for no pipe


class Text(NamedTuple):
    """An entry's text; without ids, if it is none that is found in this scope."""

    key: str
    ids: np.ndarray[Any, Any] = np.empty(0, np.uint32)
    num_behind: int = 0
    behind: int = 0

    @classmethod
    def of(cls, key: str, entry: ChunkKV) -> Text:
        return cls(key, np.array(entry.ids, np.uint32), entry.num_behind, stands_for(entry.behind_ids))

    @property
    def line(self) -> bytes:
        said = f"{self.key} {self.num_behind} {self.behind:x} ".encode() + base64.b64encode(self.ids.astype("<u4").data)
        return said + b" " + xxhash.xxh3_64_hexdigest(said).encode()

    @classmethod
    def in_line(cls, line: bytes) -> Text | None:
        """Returns a line's text; `None` if it is not what was written."""
        said, _, digest = line.rpartition(b" ")
        if xxhash.xxh3_64_hexdigest(said).encode() != digest:
            return None
        with contextlib.suppress(ValueError):
            key, num_behind, behind, ids = said.decode().split(" ")
            file_name_of(key)
            before = int(num_behind), int(behind, 16)
            if 0 <= before[0] < 2**31 and 0 <= before[1] < 2**64:
                return cls(key, np.frombuffer(base64.b64decode(ids), "<u4"), *before)
        return None


class Journal:
    """A file of lines that many processes append to and read.

    Attributes:
        damaged: lines that were.
    """

    def __init__(self, folder: LocalFolder, name: str) -> None:
        self._folder, self.name = folder, name
        self._path, self._read_to, self._file = folder.path / name, 0, (0, 0)
        self.damaged = 0

    @property
    def is_there(self) -> bool:
        return self._path.exists()

    def append(self, texts: Iterable[Text]) -> None:
        """Appends lines, if there is such a file; raises `OSError`."""
        # An end of line on both sides: a line that was cut off takes none of these with it.
        lines = b"".join(b"\n" + text.line + b"\n" for text in texts)
        with contextlib.suppress(FileNotFoundError):
            while not self._appended(lines):
                pass

    def _appended(self, lines: bytes) -> bool:
        """Appends to the file; returns whether it is still the one of that name."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | _FLAGS)
        try:
            os.write(file, lines)
            return os.fstat(file).st_ino == os.stat(self._path).st_ino
        finally:
            os.close(file)

    def keep(self, keys: Container[str]) -> None:
        """Makes the file anew, with the whole lines of these keys; raises `OSError`."""
        lines = self._folder.read(self.name).split(b"\n") if self._path.exists() else []
        kept = {text.key: line for line in lines if (text := Text.in_line(line)) is not None and text.key in keys}
        self._folder.write(self.name, b"".join(line + b"\n" for line in kept.values()))

    def begin_anew(self) -> None:
        """Lets the next `news` bring every text."""
        self._file = (0, 0)

    def news(self) -> tuple[bool, list[Text]]:
        """Returns whether the file was begun anew or is not there, and the texts that have come since the last call."""
        try:
            state = os.stat(self._path)
        except FileNotFoundError:
            self._file = (0, 0)
            return True, []
        is_new = (state.st_dev, state.st_ino) != self._file or state.st_size < self._read_to
        if is_new:
            self._file, self._read_to, self.damaged = (state.st_dev, state.st_ino), 0, 0
        if state.st_size == self._read_to:
            return is_new, []
        data = self._folder.read(self.name, self._read_to)
        data = data[: data.rfind(b"\n") + 1]  # what follows is being written
        self._read_to += len(data)
        texts = [Text.in_line(line) for line in data.split(b"\n") if line]
        self.damaged += texts.count(None)
        return is_new, [text for text in texts if text is not None]


class Texts:
    """The texts of a scope in a store of files.

    Args:
        keys: lists the store's entries.
        read: reads texts of entries from their headers.

    Attributes:
        index: of the texts, up to date after `refresh`.
    """

    def __init__(self, keys: Callable[[], list[str]], read: Callable[[Iterable[str]], Iterator[Text]]) -> None:
        self.index, self._keys, self._read = Index(), keys, read
        self._known = set[str]()  # keys, with texts and without
        self._looking = Mutex()

    def note(self, text: Text) -> None:
        """Takes the text of an entry that was put."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Takes the texts that have come since."""
        raise NotImplementedError

    def _take(self, texts: Iterable[Text]) -> None:
        for text in texts:
            self.index.add(text.key, text.ids, text.num_behind, text.behind)
            self._known.add(text.key)  # last: an exception may come between

    def _compared(self) -> set[str]:
        """Drops texts of entries that are gone; returns the keys of those whose text is not known."""
        there = set(self._keys())
        for key in self._known - there:
            self.index.discard(key)
        self._known &= there
        return there - self._known


class LocalTexts(Texts):
    """The texts in a folder of this machine: each process sees at once what another has put."""

    def __init__(self, journal: Journal, *how: Any) -> None:
        super().__init__(*how)
        self._journal, self._listed, self._next = journal, 0, 0.0

    def note(self, text: Text) -> None:
        with contextlib.suppress(OSError):  # the entry is not found until the next process looks
            self._journal.append([text])

    def refresh(self) -> None:
        with self._looking:
            if time.monotonic() < self._next:
                return
            try:
                is_new, texts = self._journal.news()
                self._take(texts)
                if is_new or self._journal.damaged or len(self._known) > 2 * self._listed + _SLACK:
                    self._repair()
            except OSError as error:  # a folder that may not be written, for one
                logger.warning("%s is left alone for %g s: %s", self._journal.name, _STALE_S, error)
                self._next = time.monotonic() + _STALE_S
            except BaseException:  # an interrupt: what was read may not have been taken
                self._journal.begin_anew()
                raise

    def _repair(self) -> None:
        """Makes the file as complete as the folder's entries, and no larger than twice that."""
        lines, missing, damaged = len(self._known), self._compared(), self._journal.damaged
        self._listed = len(self._known) + len(missing)
        found = list(self._read(missing))
        self._take(found)
        if damaged:
            logger.warning("%d lines of %s are damaged; it is made anew.", damaged, self._journal.name)
        if missing:
            logger.info("%s lacks %d entries; their headers were read.", self._journal.name, len(missing))
        if damaged or lines > 2 * self._listed + _SLACK or not self._journal.is_there:
            self._journal.keep(self._known)
        self._journal.append(found)
        _, texts = self._journal.news()
        self._take(texts)


class RemoteTexts(Texts):
    """The texts at a URL, as they were up to half a minute ago; a thread reads headers, and calls wait for it once.

    Args:
        timeout_s: how long the first call waits.
    """

    def __init__(self, timeout_s: float, *how: Any) -> None:
        super().__init__(*how)
        self._timeout_s, self._thread = timeout_s, DaemonThreads(1, "hfblend-index")
        self._begun: Future[None] | None = None
        self._next = 0.0  # time of the next look

    def note(self, text: Text) -> None:
        if self._begun is not None:
            self._take([text])

    def refresh(self) -> None:
        with self._looking:
            is_first = self._begun is None
            if time.monotonic() >= self._next and (self._begun is None or self._begun.done()):
                self._begun, self._next = self._thread.begin(self._look), time.monotonic() + _STALE_S
            begun = self._begun
        if is_first and begun is not None:
            with contextlib.suppress(*LATE, CancelledError):
                begun.result(self._timeout_s)

    def _look(self) -> None:
        try:
            for text in self._read(self._compared()):
                self._take([text])
        except OSError as error:
            logger.warning("The entries at a URL could not be listed, newer ones are not found: %s", error)
