"""Chunk KV behind a URL, shared by many machines. What cannot be trusted, or does not come in time, is a miss."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..chunks import ChunkKV
from ..optional import require
from .counts import StoreCounts
from .format import HEAD_BYTES, Contents, CorruptEntry, OtherVersion, contents_of, dump, header_bytes, header_of
from .keys import file_name_of
from .loader import LayerwiseChunk
from .quantisation import require_kv_dtype, takes
from .requests import Breaker

logger = logging.getLogger(__name__)

T = TypeVar("T")

REQUESTS = 32  # of a store at once; as many again for writing. A disk's 8 would leave a line idle while they travel.

# Their puts are atomic and need no folders; elsewhere a file is written under a temporary name and moved.
_PUTS_ARE_ATOMIC = {"abfs", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a", "tos"}
_LATE = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one and the same from Python 3.11 on


class RemoteStore:
    """Keeps each chunk's KV as an object of its own, `<url>/<key>.safetensors`, wherever fsspec reaches.

    >>> store = RemoteStore("s3://bucket/chunks", timeout_s=5)  # doctest: +SKIP

    An object is read as a file on a disk is: first its header, for all chunks of a prompt at once, then a layer at a
    time, ahead of the pass and with up to 32 requests at once. Every byte of a layer is checked before any of it is
    used; a damaged object is logged, removed and prefilled again. Errors of the remote are logged, never raised, and
    cost reuse only. One answer that does not come within `timeout_s` of being waited for, or `max_failures` errors in a
    row when reading or when writing, and the store asks for nothing for `pause_s`: a dead remote costs one timeout, not
    one a chunk or a layer. There is no budget and nothing is evicted: let the remote's own rules do that.

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
        timeout_s: for one write, and for one read from when it is waited for.
        pause_s: for how long a remote that fails is left alone.
        max_failures: errors in a row after which it is.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits, as in `DiskStore`.
        storage_options: of fsspec's filesystem: `endpoint_url`, `anon`, ….

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        ValueError: a protocol that fsspec does not know; limits that are not above 0; no such `kv_dtype`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        pause_s: float = 60.0,
        max_failures: int = 3,
        kv_dtype: str | None = None,
        **storage_options: Any,
    ) -> None:
        if min(timeout_s, pause_s, max_failures) <= 0:
            raise ValueError(
                f"timeout_s, pause_s and max_failures must be above 0, got {timeout_s}, {pause_s} and {max_failures}."
            )
        self.url = re.sub(r"//[^/@]*@", "//", url)  # without a password, as it stands in logs
        self.timeout_s, self.kv_dtype = timeout_s, require_kv_dtype(kv_dtype)
        self._filesystem, root = _filesystem_at(url, self.url, storage_options)
        self._root = root.rstrip("/")
        protocol = self._filesystem.protocol  # one name, or several
        self._puts_are_atomic = not _PUTS_ARE_ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._reading, self._writing = (Breaker(max_failures, pause_s, REQUESTS) for _ in range(2))
        is_async = getattr(self._filesystem, "async_impl", False)
        self.counts = StoreCounts()
        self._ahead: dict[str, Future[tuple[_Object, Contents]]] = {}  # begun, and not yet asked for
        self._ahead_lock = threading.Lock()
        self._give_up: dict[str, Any] = {"timeout": timeout_s} if is_async else {}

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; what the remote refuses, or does not take in time, is logged and not kept."""
        path = self._path(key)
        if self._writing.is_open:
            return
        if not takes(self.kv_dtype, chunk_kv.quantised):
            logger.info("A chunk's KV that was in %s is not kept in %s.", chunk_kv.quantised, self.url)
            return
        file = dump(key, chunk_kv, self.kv_dtype)
        self._forget(key)
        if self._ask(self._writing, "written to", lambda: self._write(path, file)):
            self.counts.add(stored=1, bytes_written=len(file))

    def open(self, key: str) -> LayerwiseChunk | None:
        """The entry, its header checked, its layers read and checked as they are asked for.

        `None` if there is none that can be trusted, or none in time. A layer of which that turns out later raises
        `ChunkLost` then; a damaged entry is removed.
        """
        chunk = None
        try:
            source, contents = self._answer(self._reading, "read from", self._begun_for(key))
            contents.require_served_by(self.kv_dtype)
            chunk = LayerwiseChunk(source, contents, self.counts, partial(self._lost, key))
        except OtherVersion as error:
            logger.info("%s of %s is not read: %s", file_name_of(key), self.url, error)
        except (CorruptEntry, OSError) as error:
            self._lost(key, error)
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
        return self._reading.begin(partial(_Object.opened, self, key, self._path(key)))

    def _forget(self, key: str) -> Future[tuple[_Object, Contents]] | None:
        """What was begun for an entry, once."""
        with self._ahead_lock:
            return self._ahead.pop(key, None)

    def _lost(self, key: str, error: Exception) -> None:
        """Removes an entry that is damaged. Of one that did not come, `_answer` has said so."""
        if isinstance(error, CorruptEntry):
            name, path = file_name_of(key), self._path(key)
            logger.warning("%s of %s is damaged, removed and prefilled again: %s", name, self.url, error)
            self._ask(self._writing, "removed from", lambda: self._remove(path))
            self.counts.add(damaged=1)

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there; what the remote refuses is logged."""
        path = self._path(key)
        self._forget(key)
        self._ask(self._writing, "removed from", lambda: self._remove(path))

    def __contains__(self, key: str) -> bool:
        """Whether there is an object of that key; whether it can be trusted is seen when it is read."""
        path = self._path(key)
        return bool(self._ask(self._reading, "looked for in", lambda: self._is_there(path)))

    def _path(self, key: str) -> str:
        return f"{self._root}/{file_name_of(key)}"

    # --- requests -------------------------------------------------------------------------------------------------

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, fewer where it ends before, in the thread that calls."""
        try:
            return self._filesystem.cat_file(path, start=start, end=stop, **self._give_up)
        except FileNotFoundError as error:
            raise _Missing("it is not there") from error

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

    def _ask(self, breaker: Breaker, what: str, request: Callable[[], T]) -> T | None:
        """The answer to a request; `None`, and a line in the log, if there is none."""
        with contextlib.suppress(OSError):
            return self._answer(breaker, what, breaker.begin(request))
        return None

    def _answer(self, breaker: Breaker, what: str, begun: Future[T]) -> T:
        """The answer to a request that has begun.

        Raises:
            OSError: there is none, which is logged; or the remote is left alone; or what was read is not there.
            CorruptEntry, OtherVersion: what was read is that.
        """
        try:
            if breaker.is_open and not begun.done():
                raise concurrent.futures.CancelledError
            answer = begun.result(self.timeout_s)
        except concurrent.futures.CancelledError:
            raise OSError(f"{self.url} is left alone") from None
        except (_Missing, CorruptEntry, OtherVersion):  # answers, not failures
            breaker.worked()
            raise
        except (Exception, asyncio.CancelledError) as error:  # every filesystem has its own
            self.counts.add(failed=1)
            late = isinstance(error, _LATE)
            reason = f"no answer within {self.timeout_s:g} s" if late else f"{type(error).__name__}: {error}"
            logger.warning("A chunk's KV could not be %s %s: %s", what, self.url, reason)
            opened = [one.open() for one in (self._reading, self._writing)] if late else [breaker.failed()]
            if any(opened):
                logger.warning("%s is left alone for %g s; chunks are prefilled.", self.url, breaker.pause_s)
            raise OSError(reason) from error
        finally:
            del begun  # or a frame of what it raised would hold it, and so the whole pass
        breaker.worked()
        return answer


class _Missing(OSError):
    """There is no such object."""


class _Object:
    """A chunk's object. A `Source`.

    Args:
        head: its first bytes.
        is_whole: whether they are all of it.
        num_bytes: of all of it, by its header.
    """

    def __init__(self, store: RemoteStore, path: str, head: bytes, is_whole: bool, num_bytes: int) -> None:
        self._store, self._path, self._head, self._is_whole, self._num_bytes = store, path, head, is_whole, num_bytes

    @classmethod
    def opened(cls, store: RemoteStore, key: str, path: str) -> tuple[_Object, Contents]:
        """An object and what it holds, by its header; positions and ids are read with it."""
        head = store.read(path, 0, HEAD_BYTES)
        is_whole = len(head) != HEAD_BYTES  # shorter; or longer, where the filesystem reads no parts
        if not is_whole and header_bytes(head[:8]) > len(head):
            head += store.read(path, len(head), header_bytes(head[:8]))
        num_bytes = len(head) if is_whole else _stated_bytes(head)
        contents = contents_of(key, head, num_bytes)
        stop = max(contents.places[name].stop for name in ("cached_positions", "behind_ids"))
        if not is_whole and stop > len(head):
            head += store.read(path, len(head), stop)
        return cls(store, path, head, is_whole, num_bytes), contents

    def fill(self, buffer: memoryview, start: int) -> None:
        stop = start + len(buffer)
        stop += stop == self._num_bytes  # one byte more, which must not be there
        is_here = self._is_whole or stop <= len(self._head)
        data = self._head[start:stop] if is_here else self._store.read(self._path, start, stop)
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
    except (LookupError, TypeError, ValueError):
        return 0


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
