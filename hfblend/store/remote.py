"""Chunk KV behind a URL, shared by many machines. What cannot be trusted, or does not come in time, is a miss."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..chunks import ChunkKV
from ..optional import require
from .counts import StoreCounts
from .format import CorruptEntry, OtherVersion, dump, parse
from .keys import file_name_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

READS_AHEAD = 8  # entries at once

# Their puts are atomic and need no folders; elsewhere a file is written under a temporary name and moved.
_PUTS_ARE_ATOMIC = {"abfs", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a", "tos"}
_LATE = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one and the same from Python 3.11 on


class RemoteStore:
    """Keeps each chunk's KV as an object of its own, `<url>/<key>.safetensors`, wherever fsspec reaches.

    >>> store = RemoteStore("s3://bucket/chunks", timeout_s=5)  # doctest: +SKIP

    Several chunks of a prompt are read at once. An object is read whole and every byte is checked before any of it is
    used; a damaged one is logged, removed and prefilled again. Errors of the remote are logged, never raised, and cost
    reuse only. One answer that does not come within `timeout_s`, or `max_failures` errors in a row when reading or when
    writing, and the store asks for nothing for `pause_s`: a dead remote costs one timeout, not one a chunk. There is no
    budget and nothing is evicted: let the remote's own rules do that.

    Object stores put atomically. Elsewhere (`file://`, `sftp://`, …) a file is written under a temporary name and
    moved: as atomic as the filesystem's move, and not synced; a process that is killed leaves its temporary file. A
    half that is seen all the same does not pass the checks.

    Each request runs in a daemon thread, which never keeps a process from ending. After a timeout, filesystems that
    are asynchronous (S3, GCS, Azure) are told to give the request up, and the thread ends; with others it stays until
    the filesystem returns. fsspec's thread for its event loop lives as long as the process. A process that was forked
    needs a store of its own.

    Args:
        url: of the folder, as fsspec has it: `"s3://bucket/prefix"`, `"gs://…"`, `"memory://…"`.
        timeout_s: for one read or write.
        pause_s: for how long a remote that fails is left alone.
        max_failures: errors in a row after which it is.
        storage_options: of fsspec's filesystem: `endpoint_url`, `anon`, ….

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        ValueError: a protocol that fsspec does not know; limits that are not above 0.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        pause_s: float = 60.0,
        max_failures: int = 3,
        **storage_options: Any,
    ) -> None:
        if min(timeout_s, pause_s, max_failures) <= 0:
            raise ValueError(
                f"timeout_s, pause_s and max_failures must be above 0, got {timeout_s}, {pause_s} and {max_failures}."
            )
        self.url = re.sub(r"//[^/@]*@", "//", url)  # without a password, as it stands in logs
        self.timeout_s = timeout_s
        self._filesystem, root = _filesystem_at(url, self.url, storage_options)
        self._root = root.rstrip("/")
        protocol = self._filesystem.protocol  # one name, or several
        self._puts_are_atomic = not _PUTS_ARE_ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._reading, self._writing = _Breaker(max_failures, pause_s), _Breaker(max_failures, pause_s)
        is_async = getattr(self._filesystem, "async_impl", False)
        self.counts = StoreCounts()
        self._ahead: dict[str, Future[bytes | None]] = {}  # begun, and not yet asked for
        self._to_begin: deque[str] = deque()
        self._ahead_lock = threading.Lock()
        self._give_up: dict[str, Any] = {"timeout": timeout_s} if is_async else {}

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; what the remote refuses, or does not take in time, is logged and not kept."""
        path = self._path(key)
        if self._writing.is_open:
            return
        file = dump(key, chunk_kv)
        if self._ask(self._writing, "written to", lambda: self._write(path, file)):
            self.counts.add(stored=1, bytes_written=len(file))

    def open(self, key: str) -> ChunkKV | None:
        """The entry, in RAM and checked; `None` if there is none that can be trusted, or none in time."""
        path = self._path(key)
        with self._ahead_lock:
            begun = self._ahead.pop(key, None)
        file = self._ask(self._reading, "read from", lambda: self._read(path), begun)
        self._begin_next()
        if file is None:
            self.counts.add(misses=1)
            return None
        try:
            chunk_kv = parse(key, file)
            self.counts.add(hits=1, bytes_read=len(file))
            return chunk_kv
        except OtherVersion as error:
            logger.info("%s of %s is not read: %s", file_name_of(key), self.url, error)
        except CorruptEntry as error:
            name = file_name_of(key)
            logger.warning("%s of %s is damaged, removed and prefilled again: %s", name, self.url, error)
            self._ask(self._writing, "removed from", lambda: self._remove(path))
            self.counts.add(damaged=1)
        self.counts.add(misses=1)
        return None

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Begins to read these entries, some at once; what was begun for others and not taken is dropped."""
        with self._ahead_lock:
            self._ahead = {key: future for key, future in self._ahead.items() if key in keys}
            self._to_begin = deque(key for key in keys if key not in self._ahead)
        self._begin_next()

    def _begin_next(self) -> None:
        with self._ahead_lock:
            while self._to_begin and len(self._ahead) < READS_AHEAD and not self._reading.is_open:
                key = self._to_begin.popleft()
                self._ahead[key] = _begun(partial(self._read, self._path(key)))

    def __contains__(self, key: str) -> bool:
        """Whether there is an object of that key; whether it can be trusted is seen when it is read."""
        path = self._path(key)
        return bool(self._ask(self._reading, "looked for in", lambda: self._is_there(path)))

    def _path(self, key: str) -> str:
        return f"{self._root}/{file_name_of(key)}"

    # --- requests -------------------------------------------------------------------------------------------------

    def _read(self, path: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):  # a miss is an answer, not a failure
            return self._filesystem.cat_file(path, **self._give_up)
        return None

    def _is_there(self, path: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self._filesystem.info(path, **self._give_up)["type"] == "file"
        return False

    def _write(self, path: str, file: bytes) -> bool:
        """Whether it was written, and it is: anything else raises."""
        if self._puts_are_atomic:
            self._filesystem.pipe_file(path, file, **self._give_up)
            return True
        self._filesystem.makedirs(self._root, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._filesystem.pipe_file(temporary, file)
            self._filesystem.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self._filesystem.rm_file(temporary)
            raise
        return True

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(path, **self._give_up)

    def _ask(self, breaker: _Breaker, what: str, request: Callable[[], T], begun: Future[T] | None = None) -> T | None:
        """The answer to a request, perhaps one that has begun; `None`, and a line in the log, if there is none."""
        if breaker.is_open:
            return None
        try:
            answer = (begun or _begun(request)).result(self.timeout_s)
        except (Exception, asyncio.CancelledError) as error:  # every filesystem has its own
            self.counts.add(failed=1)
            late = isinstance(error, _LATE)
            reason = f"no answer within {self.timeout_s:g} s" if late else f"{type(error).__name__}: {error}"
            logger.warning("A chunk's KV could not be %s %s: %s", what, self.url, reason)
            opened = [one.open() for one in (self._reading, self._writing)] if late else [breaker.failed()]
            if any(opened):
                logger.warning("%s is left alone for %g s; chunks are prefilled.", self.url, breaker.pause_s)
            return None
        breaker.worked()
        return answer


class _Breaker:
    """Opens for `pause_s` after so many failures in a row; the first one after that opens it again."""

    def __init__(self, max_failures: int, pause_s: float) -> None:
        self.max_failures, self.pause_s = max_failures, pause_s
        self._failures, self._until = 0, 0.0
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether nothing is to be asked for."""
        return time.monotonic() < self._until

    def failed(self) -> bool:
        """Counts a failure; whether that one opens it."""
        with self._lock:
            self._failures += 1
        return self._failures >= self.max_failures and self.open()

    def open(self) -> bool:
        """Opens it at once; whether it was closed, so that of several threads one tells."""
        with self._lock:
            was_open = self.is_open
            self._failures, self._until = self.max_failures, time.monotonic() + self.pause_s
        return not was_open

    def worked(self) -> None:
        """Forgets the failures before."""
        with self._lock:
            self._failures = 0


def _filesystem_at(url: str, name: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's filesystem behind a URL, and the path in it."""
    core = require("fsspec.core", "fsspec", "remote", "A store behind a URL needs")
    try:
        return core.url_to_fs(url, **storage_options)
    except ImportError as error:
        raise ImportError(
            f"The store {name!r} needs a package that is missing: {error}. For S3, run "
            "`pip install 'hfblend[remote]'`; for others, `pip install` the package named."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"A store is a folder, a URL that fsspec can open or a store object, got {name!r}: {error}."
        ) from error


def _begun(request: Callable[[], T]) -> Future[T]:
    """What a request returns or raises, from a thread that no one has to wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(request())
        except BaseException as error:
            future.set_exception(error)

    # Not a ThreadPoolExecutor: its threads are joined when the process ends, a request that hangs included.
    threading.Thread(target=run, name="hfblend-remote", daemon=True).start()
    return future
