"""The file of one chunk, on a disk or at a URL: filled into buffers, by threads that read ahead of the pass."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from typing import TypeVar

from ..locks import Mutex
from .folders import LocalFolder, RemoteFolder
from .format import HEAD_BYTES, MOST_UNASKED, Contents, CorruptEntry, contents_of, header_bytes
from .keys import file_name_of
from .requests import Requests

T = TypeVar("T")

READERS = 12  # threads that read from disks, of all stores of the process together


class FileSource:
    """A file on a disk. It stays open as long as this lives, so that it can be read on when its name is gone. The first
    bytes, `head`, are not read again."""

    def __init__(self, stream: FileIO, head: bytes, requests: Requests) -> None:
        self.requests, self._stream, self._head, self._seeking = requests, stream, head, Mutex()
        weakref.finalize(self, stream.close)

    @classmethod
    def opened(cls, folder: LocalFolder, key: str, requests: Requests) -> tuple[FileSource, Contents]:
        """Returns an entry's file and its contents, by its header."""
        with contextlib.ExitStack() as opened:
            stream = opened.enter_context(folder.open(file_name_of(key)))
            head = stream.read(HEAD_BYTES)
            head += stream.read(max(0, header_bytes(head[:8]) - len(head)))
            contents = contents_of(key, head, os.fstat(stream.fileno()).st_size)
            if len(head) < contents.first_stop <= MOST_UNASKED:
                head += stream.read(contents.first_stop - len(head))
            opened.pop_all()  # from here on the source closes it
            return cls(stream, head[: contents.first_stop], requests), contents

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fills a buffer with the bytes from `start` on; raises `CorruptEntry` if the file ends before, or goes on."""
        here = self._head[start : start + len(buffer)]
        buffer[: len(here)] = here
        read = len(here)
        while read < len(buffer):
            more = self._read_into(buffer[read:], start + read)
            if not more:
                raise CorruptEntry(f"it ends after {read} of {len(buffer)} bytes of a tensor")
            read += more

    def _read_into(self, buffer: memoryview, start: int) -> int | None:
        if hasattr(os, "preadv"):
            return os.preadv(self._stream.fileno(), [buffer], start)
        with self._seeking:
            self._stream.seek(start)
            return self._stream.readinto(buffer)

    def tier(self, start: int) -> str:
        """Returns where the bytes from `start` on are read from, of `hfblend.controller.TIERS`."""
        if hasattr(os, "RWF_NOWAIT"):
            with contextlib.suppress(OSError):
                os.preadv(self._stream.fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
                return "page_cache"
        return "disk"  # or the system does not say

    def begin(self, read: Callable[[], T]) -> Future[T]:
        """Calls `read` in a thread, soon."""
        return _threads().submit(read)


class ObjectSource:
    """A file at a URL, with the methods of `FileSource`: its first bytes, and its length by its header (`None` if these
    are all)."""

    def __init__(self, folder: RemoteFolder, name: str, head: bytes, num_bytes: int | None, requests: Requests) -> None:
        self.requests, self._folder, self._name = requests, folder, name
        self._head, self._num_bytes = head, num_bytes

    @classmethod
    def opened(cls, folder: RemoteFolder, key: str, requests: Requests) -> tuple[ObjectSource, Contents]:
        """Returns an entry's file and its contents, by its header; positions and ids are read with it."""
        name = file_name_of(key)
        head = folder.read(name, 0, HEAD_BYTES)
        is_whole = len(head) != HEAD_BYTES  # shorter; or longer, if the filesystem reads no parts
        if not is_whole and header_bytes(head[:8]) > len(head):
            head += folder.read(name, len(head), header_bytes(head[:8]))
        contents = contents_of(key, head, len(head) if is_whole else None)
        stop = contents.first_stop
        if not is_whole and len(head) < stop <= MOST_UNASKED:
            head += folder.read(name, len(head), stop)
        return cls(folder, name, head, None if is_whole else contents.layers[-1].stop, requests), contents

    def fill(self, buffer: memoryview, start: int) -> None:
        stop = start + len(buffer)
        stop += stop == self._num_bytes  # one byte more, which must not be there
        is_here = self._num_bytes is None or stop <= len(self._head)
        data = self._head[start:stop] if is_here else self._folder.read(self._name, start, stop)
        if len(data) > stop - start:
            raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
        if len(data) != len(buffer):
            raise CorruptEntry(f"from byte {start} on it has {len(data)} bytes, not {len(buffer)}")
        buffer[:] = data

    def tier(self, start: int) -> str:
        return "remote"

    def begin(self, read: Callable[[], T]) -> Future[T]:
        return self.requests.begin(read)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "hfblend-read")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
