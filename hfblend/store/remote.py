"""Chunk KV behind a URL, shared by many machines. What cannot be trusted, or does not come in time, is a miss."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..arguments import closest, number_in, whole
from ..kv.chunk import ChunkKV, ChunkLost
from ..locks import Mutex
from .base import require_chunk_kv
from .format import (
    HEAD_BYTES,
    MOST_UNASKED,
    Contents,
    CorruptEntry,
    OtherVersion,
    contents_of,
    dump,
    header_bytes,
    header_of,
)
from .keys import file_name_of
from .loader import LayerwiseChunk, Places
from .quantise import require_kv_dtype, takes
from .remote_folder import LATE, RemoteFolder
from .requests import REQUESTS, Breaker, at_once
from .upkeep import USED, InFiles

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_MAKING_ROOM_S = 600.0  # listing and removing many objects may take so long
_MARKED_FOR_S = 24 * 3600.0  # an entry that is used often is marked once a day


class RemoteStore(InFiles):
    """Keeps each chunk's KV as an object of its own, `<url>/<key>.safetensors`, wherever fsspec reaches.

    >>> store = RemoteStore("s3://bucket/chunks", timeout_s=5)  # doctest: +SKIP

    An object is read as a file on a disk is: first its header, for all chunks of a prompt at once, then a layer at a
    time, ahead of the pass and with up to 32 requests at once. Every byte of a layer is checked before any of it is
    used; a damaged object is logged, prefilled again, and removed if a second reading agrees. Errors of the remote are
    logged, never raised, and cost reuse only. One answer that does not come within `timeout_s` of being waited for, or
    `max_failures` errors in a row when reading or when writing, and the store asks for nothing for `pause_s`: a dead
    remote costs one timeout, not one a chunk or a layer.

    With a budget, the least recently used entries go when others need their place. Objects do not say when they were
    read, so an entry that is found is marked by an empty object beside it, once a day and process: give all processes
    that share a remote the same `max_bytes`.

    Object stores put atomically. Elsewhere (`file://`, `sftp://`, …) a file is written under a temporary name and
    moved: as atomic as the filesystem's move, and not synced; a process that is killed leaves its temporary file. A
    half that is seen all the same does not pass the checks.

    A filesystem that cannot read a part of a file sends all of it: then a chunk is in memory whole.

    Requests run in daemon threads, which never keep a process from ending, and end with the last request. After a
    timeout, filesystems that are asynchronous (S3, GCS, Azure) are told to give the request up, and the thread ends;
    with others it stays until the filesystem returns. fsspec's thread for its event loop lives as long as the process.
    A process that was forked needs a store of its own.

    Args:
        url: of the folder, as fsspec has it: `"s3://bucket/prefix"`, `"gs://…"`, `"memory://…"`.
        max_bytes: of all objects together; a number or `"1TB"`. Default, as many as there are: let the remote's own
            rules remove them, or `prune`. Several stores that write at the same time may pass it, by a 32nd of it or
            by one entry for each.
        timeout_s: for one write, and for one read from when it is waited for.
        pause_s: for how long a remote that fails is left alone.
        max_failures: errors in a row after which it is.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits, as in `DiskStore`.
        storage_options: of fsspec's filesystem: `endpoint_url`, `anon`, ….

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        TypeError: a limit that is no number; an option that is spelt almost like one of these.
        ValueError: a protocol that fsspec does not know; a URL without a bucket or a path; limits that are not above 0;
            a budget that is no size; no such `kv_dtype`.
    """

    _folder: RemoteFolder

    def __init__(
        self,
        url: str,
        max_bytes: int | str | None = None,
        *,
        timeout_s: float = 10.0,
        pause_s: float = 60.0,
        max_failures: int = 3,
        kv_dtype: str | None = None,
        **storage_options: Any,
    ) -> None:
        _refuse_misspelt(storage_options)
        for name, limit in (("timeout_s", timeout_s), ("pause_s", pause_s)):
            if not number_in(name, limit, 0, float("inf")):
                raise ValueError(f"{name} must be above 0, got {limit}.")
        max_failures = whole("max_failures", max_failures, 1)
        self.timeout_s, self.kv_dtype = timeout_s, require_kv_dtype(kv_dtype)
        super().__init__(RemoteFolder(url, timeout_s, storage_options), max_bytes)
        self.url = self.where = self._folder.url
        self._reading, self._writing = (Breaker(max_failures, pause_s, REQUESTS) for _ in range(2))
        self._ahead: dict[str, Future[tuple[_Object, Contents]]] = {}  # begun, and not yet asked for
        self._ahead_lock = Mutex()
        self._marked: dict[str, float] = {}  # key -> when it was marked as used

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; what the remote refuses, or does not take in time, is logged and not kept."""
        name = file_name_of(key)
        chunk_kv = require_chunk_kv(chunk_kv)
        if self._writing.is_open:
            return
        if not takes(self.kv_dtype, chunk_kv.quantised):
            logger.info("A chunk's KV that was in %s is not kept in %s.", chunk_kv.quantised, self.url)
            return
        file = dump(key, chunk_kv, self.kv_dtype)
        self._forget(key)
        with contextlib.suppress(OSError), contextlib.ExitStack() as over:
            if self.max_bytes is not None:
                made_room = self._writing.begin(partial(self._make_room, len(file), key))
                over.callback(made_room.add_done_callback, partial(self._settle_if_given, len(file)))  # even if late
                if not self._answer(self._writing, "given room in", made_room, _MAKING_ROOM_S):
                    self._say_no_room(len(file))
                    return
            written = self._writing.begin(lambda: self._folder.write(name, file))
            self._answer(self._writing, "written to", written)
            self._marked[key] = time.monotonic()
            self.counts.add(stored=1, bytes_written=len(file))

    def _settle_if_given(self, num_bytes: int, made_room: Future[bool]) -> None:
        if not made_room.cancelled() and made_room.exception() is None and made_room.result():
            self._settle(num_bytes)

    def open(self, key: str) -> LayerwiseChunk | None:
        """The entry, its header checked, its layers read and checked as they are asked for.

        `None` if there is none that can be trusted, or none in time. A layer of which that turns out later raises
        `ChunkLost` then; a damaged entry is removed once a second reading brings the same bytes.
        """
        chunk = None
        try:
            source, contents = self._answer(self._reading, "read from", self._begun_for(key))
            contents.require_served_by(self.kv_dtype)
            chunk = LayerwiseChunk(source, contents, self.counts, partial(self._lost, key, contents))
            self._mark(key)
        except ChunkLost:
            pass
        except OtherVersion as error:
            logger.info("%s of %s is not read: %s", file_name_of(key), self.url, error)
        except (CorruptEntry, OSError) as error:
            self._lost(key, None, error)
        self.counts.add(**{"misses" if chunk is None else "hits": 1})
        return chunk

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Begins to read the headers of these entries; what was begun for others and not taken is dropped."""
        with self._ahead_lock:
            for key in self._ahead.keys() - set(keys):
                self._ahead.pop(key).cancel()
            for key in keys:
                if key not in self._ahead:
                    self._ahead[key] = self._begin_to_open(key)

    def _begun_for(self, key: str) -> Future[tuple[_Object, Contents]]:
        begun = self._forget(key)
        return self._begin_to_open(key) if begun is None or begun.cancelled() else begun

    def _begin_to_open(self, key: str) -> Future[tuple[_Object, Contents]]:
        return self._reading.begin(partial(_Object.opened, self, key, file_name_of(key)))

    def _forget(self, key: str) -> Future[tuple[_Object, Contents]] | None:
        """What was begun for an entry, once."""
        with self._ahead_lock:
            return self._ahead.pop(key, None)

    def _mark(self, key: str) -> None:
        """Notes beside an entry that it is used now, in the background; if that fails, it may go too early."""
        if self.max_bytes is None or time.monotonic() - self._marked.get(key, -_MARKED_FOR_S) < _MARKED_FOR_S:
            return
        self._marked[key] = time.monotonic()
        self._writing.begin(lambda: self._folder.write(key + USED, b""))

    def _lost(self, key: str, opened: Contents | None, error: Exception, places: Places = ()) -> None:
        if isinstance(error, CorruptEntry):  # of what did not come, `_answer` has said so
            self._damaged(key, error, opened, places)

    def _in_time(self, call: Callable[[], T]) -> T:
        return self._answer(self._writing, "removed from", self._writing.begin(call))

    def remove(self, key: str) -> None:
        self._forget(key)
        super().remove(key)

    def __contains__(self, key: str) -> bool:
        """Whether there is an object of that key; whether it can be trusted is seen when it is read."""
        name = file_name_of(key)
        with contextlib.suppress(OSError):
            there = self._reading.begin(lambda: self._folder.has(name))
            return self._answer(self._reading, "looked for in", there)
        return False

    def _each(self, call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
        return at_once(call, many)

    # --- requests -------------------------------------------------------------------------------------------------

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, fewer where it ends before, in the thread that calls."""
        try:
            return self._folder.read(name, start, stop)
        except FileNotFoundError as error:
            raise _Missing("it is not there") from error

    def _answer(self, breaker: Breaker, what: str, begun: Future[T], within_s: float | None = None) -> T:
        """The answer to a request that has begun.

        Args:
            within_s: default, `timeout_s`.

        Raises:
            OSError: there is none, which is logged; or the remote is left alone; or what was read is not there.
            CorruptEntry, OtherVersion: what was read is that.
        """
        within_s = within_s or self.timeout_s
        try:
            if breaker.is_open and not begun.done():
                raise concurrent.futures.CancelledError
            answer = begun.result(within_s)
        except concurrent.futures.CancelledError:
            raise OSError(f"{self.url} is left alone") from None
        except (_Missing, CorruptEntry, OtherVersion):  # answers, not failures
            breaker.worked()
            raise
        except (Exception, asyncio.CancelledError) as error:  # every filesystem has its own
            self.counts.add(failed=1)
            late = isinstance(error, LATE)
            reason = f"no answer within {within_s:g} s" if late else f"{type(error).__name__}: {error}"
            logger.warning("A chunk's KV could not be %s %s: %s", what, self.url, reason)
            opened = [one.open() for one in (self._reading, self._writing)] if late else [breaker.failed()]
            if any(opened):
                logger.warning("%s is left alone for %g s; chunks are prefilled.", self.url, breaker.pause_s)
            raise OSError(reason) from error
        finally:
            del begun  # or a frame of what it raised would hold it, and so the whole pass
        breaker.worked()
        return answer


def _refuse_misspelt(storage_options: Iterable[str]) -> None:
    """Raises `TypeError` for an option that is spelt like one of the store's own: a filesystem would ignore it."""
    own = inspect.signature(RemoteStore).parameters.keys() - {"storage_options"}
    for name in storage_options:
        if guess := closest(name, own, 0.75):
            raise TypeError(f"RemoteStore has no option {name!r}. Did you mean {guess!r}?")


class _Missing(OSError):
    """There is no such object."""


class _Object:
    """A chunk's object. A `Source`.

    Args:
        head: its first bytes.
        is_whole: whether they are all of it.
        num_bytes: of all of it, by its header.
    """

    def __init__(self, store: RemoteStore, name: str, head: bytes, is_whole: bool, num_bytes: int) -> None:
        self._store, self._name, self._head, self._is_whole, self._num_bytes = store, name, head, is_whole, num_bytes

    @classmethod
    def opened(cls, store: RemoteStore, key: str, name: str) -> tuple[_Object, Contents]:
        """An object and what it holds, by its header; positions and ids are read with it."""
        head = store.read(name, 0, HEAD_BYTES)
        is_whole = len(head) != HEAD_BYTES  # shorter; or longer, where the filesystem reads no parts
        if not is_whole and header_bytes(head[:8]) > len(head):
            head += store.read(name, len(head), header_bytes(head[:8]))
        num_bytes = len(head) if is_whole else _stated_bytes(head)
        contents = contents_of(key, head, num_bytes)
        stop = contents.first_stop
        if not is_whole and len(head) < stop <= MOST_UNASKED:
            head += store.read(name, len(head), stop)
        return cls(store, name, head, is_whole, num_bytes), contents

    def fill(self, buffer: memoryview, start: int) -> None:
        stop = start + len(buffer)
        stop += stop == self._num_bytes  # one byte more, which must not be there
        is_here = self._is_whole or stop <= len(self._head)
        data = self._head[start:stop] if is_here else self._store.read(self._name, start, stop)
        if len(data) > stop - start:
            raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
        if len(data) != len(buffer):
            raise CorruptEntry(f"from byte {start} on it has {len(data)} bytes, not {len(buffer)}")
        buffer[:] = data

    def tier(self, start: int) -> str:
        return "remote"

    def begin(self, read: Callable[[], T]) -> Future[T]:
        return self._store._reading.begin(read)

    def result(self, begun: Future[T]) -> T:
        try:
            return self._store._answer(self._store._reading, "read from", begun)
        finally:
            del begun


def _stated_bytes(head: bytes) -> int:
    """How long an object is by its header; 0 where that says nothing, and `contents_of` says why."""
    try:
        tensors = [one for name, one in header_of(head).items() if name != "__metadata__"]
        return header_bytes(head[:8]) + int(max(one["data_offsets"][1] for one in tensors))
    except (LookupError, TypeError, ValueError, OverflowError):
        return 0
