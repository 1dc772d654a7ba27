"""Chunk KV at a URL, shared by many machines."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from copy import copy
from functools import partial
from typing import Any

from ..arguments import closest, number_in, whole
from ..locks import Mutex
from .files import FileStore
from .folders import RemoteFolder
from .format import Contents
from .journal import RemoteTexts
from .keys import file_name_of
from .loader import Source
from .redis import RedisFolder, is_redis
from .sources import ObjectSource
from .upkeep import USED

_MARKED_FOR_S = 24 * 3600.0  # an entry that is used often is marked once a day


class RemoteStore(FileStore):
    """Keeps each chunk's KV as an object `<url>/<key>.safetensors`, wherever fsspec reaches.

    >>> store = RemoteStore("s3://bucket/chunks", timeout_s=5)  # doctest: +SKIP

    An object is read as `DiskStore` reads a file: its header first, for all chunks of a prompt at once, then a layer at
    a time, ahead of the pass, with up to 32 requests at once and every byte checked. Errors of the remote are logged,
    never raised, and cost reuse only: after one answer later than `timeout_s`, or `max_failures` errors in a row, the
    store asks for nothing for `pause_s`. So a dead remote costs one timeout, not one a chunk or a layer.

    With a budget, the least recently used entries go when others need their place. Objects do not say when they were
    read, so an entry that is found is marked by an empty object, once a day and process: give all processes that share
    a remote the same `max_bytes`.

    Object stores put atomically. Elsewhere (`file://`, `sftp://`, …) a file is written under a temporary name and
    moved, not synced; a half of one does not pass the checks. A filesystem that cannot read parts of a file sends all
    of it: then a chunk is in memory whole. Requests run in daemon threads, which never keep a process from ending; a
    late one is given up by asynchronous filesystems (S3, GCS, Azure), and runs on with others. A process that was
    forked needs a new store.

    Args:
        url: of the folder, as fsspec has it: `"s3://bucket/prefix"`, `"gs://…"`, `"memory://…"`. Or of a Redis or
            Valkey server: `"redis://user:password@host:6379/0?prefix=tenant:&ttl=3600"`, `"rediss://…"`,
            `"valkey://…"`, `"unix:///run/redis.sock?db=0"`; it evicts by itself, pinned entries too.
        max_bytes: of all objects together; a number or `"1TB"`. Default, as many as there are. Several stores that
            write at the same time may pass it, by a 32nd of it or by one entry for each.
        timeout_s: for one write, and for one read from when it is waited for.
        pause_s, max_failures: how long a failing remote is left alone; after how many errors in a row.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits, as in `DiskStore`.
        storage_options: of fsspec's filesystem: `endpoint_url`, `anon`, …; of Redis: `prefix` of its keys (default
            `"hfblend:"`), `ttl` in seconds from when an entry was written, and its client's options.

    Raises:
        ImportError: fsspec, redis or the package of the URL's protocol is missing (the message says what to install).
        TypeError: a limit that is no number; an option that is spelt almost like one of these.
        ValueError: an unknown protocol; a URL without a bucket or a path; an invalid limit, budget or `kv_dtype`.
    """

    logs_what_it_lost = True  # a caller need not look whether its entries were kept
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
        limits: dict[str, Any] = {"timeout_s": timeout_s, "pause_s": pause_s}
        for name, limit in limits.items():
            if not number_in(name, limit, 0, float("inf")):
                raise ValueError(f"{name} must be above 0, got {limit}.")
        limits["max_failures"] = whole("max_failures", max_failures, 1)
        folder = (RedisFolder if is_redis(url) else RemoteFolder)(url, timeout_s, storage_options)
        super().__init__(folder, folder.url, max_bytes, kv_dtype, **limits)
        self.url, self.timeout_s = folder.url, timeout_s
        self._ahead: dict[str, Future[tuple[ObjectSource, Contents]]] = {}  # begun, and not yet asked for
        self._ahead_lock = Mutex()
        self._marked: dict[str, float] = {}  # key -> when it was marked as used

    def read_ahead(self, keys: Sequence[str]) -> None:
        """Begins to read the headers of these entries; drops what was begun for others and not taken."""
        with self._ahead_lock:
            for key in self._ahead.keys() - set(keys):
                self._ahead.pop(key).cancel()
            for key in keys:
                if key not in self._ahead:
                    self._ahead[key] = self._begin_to_open(key)

    @contextlib.contextmanager
    def apart(self) -> Iterator[RemoteStore]:
        like = copy(self)
        like.max_bytes = None
        yield like

    def remove(self, key: str) -> None:
        self._taken(key)
        super().remove(key)

    def _texts_of(self, scope: str, *how: Any) -> RemoteTexts:
        return RemoteTexts(self.timeout_s, *how)

    def _opened(self, key: str) -> tuple[Source, Contents]:
        begun = self._taken(key)
        if begun is None or begun.cancelled():
            begun = self._begin_to_open(key)
        try:
            return self._reading.answer("read from", begun)
        finally:
            del begun  # see `Requests.answer`

    def _begin_to_open(self, key: str) -> Future[tuple[ObjectSource, Contents]]:
        file_name_of(key)
        return self._reading.begin(partial(ObjectSource.opened, self._folder, key, self._reading))

    def _taken(self, key: str) -> Future[tuple[ObjectSource, Contents]] | None:
        with self._ahead_lock:
            return self._ahead.pop(key, None)

    def _note_used(self, key: str) -> None:
        """Marks an entry as used now, in the background; if that fails, it may be evicted too early."""
        if self.max_bytes is None or time.monotonic() - self._marked.get(key, -_MARKED_FOR_S) < _MARKED_FOR_S:
            return
        self._marked[key] = time.monotonic()
        self._writing.begin(lambda: self._folder.write(key + USED, b""))

    def _note_written(self, key: str) -> None:
        self._taken(key)
        self._marked[key] = time.monotonic()


def _refuse_misspelt(storage_options: Iterable[str]) -> None:
    """Raises `TypeError` for an option that is spelt like one of the store's own: a filesystem would ignore it."""
    own = inspect.signature(RemoteStore).parameters.keys() - {"storage_options"}
    for name in storage_options:
        if guess := closest(name, own, 0.75):
            raise TypeError(f"RemoteStore has no option {name!r}. Did you mean {guess!r}?")
