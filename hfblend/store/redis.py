"""Chunk KV on a Redis or Valkey server: one value for each entry, read in ranges; the server evicts and expires."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import xxhash

from ..arguments import described, whole
from ..util import require
from .folders import File, RemoteFolder, as_os_errors
from .format import HEAD_BYTES
from .requests import LATE

# As written -> as the client has it. A value of `unix://` is the socket's path.
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
_PREFIX = "hfblend:"
_LISTED_AT_ONCE = 1000
_CONNECTIONS = 1024  # more than threads that read and write, so that none waits for another's


def is_redis(url: str) -> bool:
    """Whether a URL is of a Redis or Valkey server."""
    return isinstance(url, str) and url.partition("://")[0] in _SCHEMES and "://" in url


class RedisFolder(RemoteFolder):
    """The keys of a database that begin with a prefix, as a folder: `<prefix><name>`. `url` has no user or password.

    An entry is one value, set by one command, so that no half of it is seen. One that the server has evicted or that
    has expired is a missing file, also between two ranges of it.

    Args:
        url: `redis://user:password@host:6379/0?prefix=tenant:&ttl=3600`; `rediss://` over TLS, `valkey://`, or of a
            socket, `unix:///run/redis.sock?db=0`. Other parts of the query are options of the client.
        timeout_s: for connecting, and for each answer.
        options: `prefix`, `ttl` in seconds from when an entry was written, and the client's, such as `ssl_ca_certs`.
    """

    most_bytes: int | None = 512 * 2**20  # of a value, as servers are set up (`proto-max-bulk-len`)

    def __init__(self, url: str, timeout_s: float, options: dict[str, Any]) -> None:
        redis = require("redis", "redis", "redis", "A store on Redis needs")
        self._late = redis.TimeoutError
        asked = {**_parts_of(url, redis.connection.parse_url), **options}
        self._root = str(asked.pop("prefix", _PREFIX))
        ttl = asked.pop("ttl", None)
        self._ttl_s = None if ttl is None else whole("ttl", int(ttl) if str(ttl).isdigit() else ttl, 1)
        self.url = _shown(url, asked, self._root)
        # A connection that the server closed while it was idle is tried anew, once; what is late is not.
        again = redis.retry.Retry(redis.backoff.NoBackoff(), 1, (redis.ConnectionError,))
        bounds: dict[str, Any] = {"socket_timeout": timeout_s, "retry": again, "max_connections": _CONNECTIONS}
        if "path" not in asked:
            bounds["socket_connect_timeout"] = timeout_s
        pool = redis.ConnectionPool(**bounds | asked | {"decode_responses": False})
        try:
            pool.make_connection()  # connects to nothing
        except TypeError as error:
            raise ValueError(f"An option of the store {self.url} is not one of the client's: {error}.") from None
        self._client = redis.Redis(connection_pool=pool)

    def files(self) -> Iterator[File]:
        pattern = re.sub(r"([*?\[\]\\^-])", r"\\\1", self._root) + "*"
        with self._answers():
            found = list(dict.fromkeys(self._client.scan_iter(pattern, count=_LISTED_AT_ONCE)))
        for start in range(0, len(found), _LISTED_AT_ONCE):
            yield from self._described(found[start : start + _LISTED_AT_ONCE])

    def _described(self, paths: list[bytes]) -> Iterator[File]:
        """Asks for bytes and last uses by commands that count as no use."""
        with self._answers(), self._client.pipeline(transaction=False) as asked:
            for path in paths:
                asked.memory_usage(path, samples=0).object("idletime", path)
            answers = asked.execute(raise_on_error=False)
            for num_bytes in answers[::2]:
                if isinstance(num_bytes, Exception):
                    raise num_bytes
        for path, num_bytes, idle_s in zip(paths, answers[::2], answers[1::2]):
            if num_bytes is not None:  # None: it has gone meanwhile
                used = time.time() - idle_s if isinstance(idle_s, int) else 0.0  # evicting by frequency knows none
                yield File(path.decode(errors="replace").removeprefix(self._root), num_bytes, used)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        bounds = self._path(name), start, -1 if stop is None else stop - 1
        with self._answers():
            if data := self._client.getrange(*bounds):
                return data
            if not self._client.exists(bounds[0]):
                raise FileNotFoundError(f"{name} is not there, or no longer")
            return self._client.getrange(*bounds)  # it has come meanwhile, or is as short as that

    def write(self, name: str, data: bytes) -> None:
        with self._answers():
            self._client.set(self._path(name), data, ex=self._ttl_s)

    def remove(self, names: Iterable[str]) -> dict[str, OSError]:
        names = list(names)
        try:
            with self._answers():
                if names:
                    self._client.unlink(*map(self._path, names))
        except LATE:
            raise
        except OSError as error:
            return dict.fromkeys(names, error)
        return {}

    def state(self, name: str) -> tuple[int, Any]:
        with self._answers(), self._client.pipeline(transaction=False) as asked:
            path = self._path(name)
            is_there, num_bytes, head = asked.exists(path).strlen(path).getrange(path, 0, HEAD_BYTES - 1).execute()
        if not is_there:
            raise FileNotFoundError(f"{name} is not there")
        return num_bytes, xxhash.xxh3_128_hexdigest(head)  # a header has the checksums of all that follows

    def _path(self, name: str) -> str:
        return self._root + name

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        with as_os_errors():
            try:
                yield
            except self._late as error:
                raise TimeoutError(str(error)) from error


def _parts_of(url: str, parse_url: Any) -> dict[str, Any]:
    """Returns a URL's parts as the client has them. Errors do not quote it: it may hold a password."""
    scheme, _, rest = url.partition("://")
    path = urlsplit(url).path.strip("/")
    try:
        parts = parse_url(f"{_SCHEMES[scheme]}://{rest}")
        is_read = scheme == "unix" or "@" not in path
    except ValueError:
        is_read = False
    if not is_read:
        raise ValueError(
            f"The URL of a {scheme} store cannot be read; it is {scheme}://user:password@host:6379/0?prefix=tenant:, "
            "with %2F for / and %40 for @ in a password."
        )
    if scheme != "unix" and path and not path.isdigit():
        raise ValueError(f"After the host comes a database's number, got {described(path)}: write ?prefix={path}: .")
    return parts


def _shown(url: str, parts: dict[str, Any], prefix: str) -> str:
    """Returns a URL without user, password and options."""
    at = parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}/{parts.get('db', 0)}"
    return f"{url.partition('://')[0]}://{at}?prefix={prefix}"
