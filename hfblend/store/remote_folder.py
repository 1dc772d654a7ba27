"""A folder behind a URL, through fsspec: each call is a request in the thread that calls. A `Folder`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from ..arguments import closest, described
from ..util import require
from .folders import File
from .requests import at_once

# Their puts are atomic and need no folders; elsewhere a file is written under a temporary name and moved.
_PUTS_ARE_ATOMIC = {"abfs", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a", "tos"}
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "created")  # as filesystems call it
# What a request that is late ends in; one and the same from Python 3.11 on.
LATE = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: as fsspec has it.
        timeout_s: of one request; filesystems that are not asynchronous do not keep to it.
        storage_options: of fsspec's filesystem.

    Attributes:
        url: without a password, as it stands in logs.

    Raises:
        ImportError: fsspec or the package of the URL's protocol is missing (the message says what to install).
        ValueError: a protocol that fsspec does not know; no bucket or path after it.
    """

    def __init__(self, url: str, timeout_s: float, storage_options: dict[str, Any]) -> None:
        self.url = re.sub(r"//[^/@]*@", "//", str(url))
        self.filesystem, root = _filesystem_at(url, self.url, storage_options)
        self._root = root.rstrip("/")
        protocol = self.filesystem.protocol  # one name, or several
        self._puts_are_atomic = not _PUTS_ARE_ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._give_up = {"timeout": timeout_s} if getattr(self.filesystem, "async_impl", False) else {}

    def files(self) -> Iterator[File]:
        with _errors_of_a_system():
            self.filesystem.invalidate_cache(self._root)  # others write, too
            try:
                found = self.filesystem.ls(self._root, detail=True, **self._give_up)
            except FileNotFoundError:
                found = []
            self.filesystem.invalidate_cache(self._root)
        for one in found:
            if one["type"] == "file":
                yield File(one["name"].rpartition("/")[2], int(one["size"] or 0), _changed(one))

    def has(self, name: str) -> bool:
        with _errors_of_a_system(), contextlib.suppress(FileNotFoundError):
            return self.filesystem.info(self._path(name), **self._give_up)["type"] == "file"
        return False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with _errors_of_a_system():
            return self.filesystem.cat_file(self._path(name), start=start, end=stop, **self._give_up)

    def write(self, name: str, data: bytes) -> None:
        with _errors_of_a_system():
            if self._puts_are_atomic:
                self.filesystem.pipe_file(self._path(name), data, **self._give_up)
                return
            self.filesystem.makedirs(self._root, exist_ok=True)
            temporary = f"{self._path(name)}.{uuid.uuid4().hex}.tmp"
            try:
                self.filesystem.pipe_file(temporary, data)
                self.filesystem.mv(temporary, self._path(name))
            except BaseException:
                with contextlib.suppress(Exception):
                    self.filesystem.rm_file(temporary)
                raise

    def remove(self, names: Iterable[str]) -> dict[str, OSError]:
        names = list(names)
        return {name: error for name, error in zip(names, at_once(self._refusal_of, names)) if error is not None}

    def _refusal_of(self, name: str) -> OSError | None:
        """Removes a file; why it cannot be."""
        try:
            with _errors_of_a_system(), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(self._path(name), **self._give_up)
        except LATE:
            raise
        except OSError as error:
            return error
        return None

    def state(self, name: str) -> tuple[int, Any]:
        with _errors_of_a_system():
            self.filesystem.invalidate_cache(self._path(name))
            info = self.filesystem.info(self._path(name), **self._give_up)
            return int(info["size"] or 0), (info.get("ETag"), _changed(info))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _errors_of_a_system() -> Iterator[None]:
    """Every filesystem has errors of its own; here they are `OSError`s."""
    try:
        yield
    except (OSError, *LATE):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _changed(info: dict[str, Any]) -> float:
    """Seconds since 1970, of what a filesystem says of a file; 0 if it does not."""
    when = next((info[name] for name in _CHANGED if info.get(name) is not None), 0.0)
    if isinstance(when, str):
        with contextlib.suppress(ValueError):  # HTTP's, which are no ISO dates
            return datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()  # Python 3.10 knows no Z
        return 0.0
    return when.timestamp() if isinstance(when, datetime) else float(when)


def _filesystem_at(url: str, name: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's filesystem behind a URL, and the path in it."""
    if not isinstance(url, str) or "://" not in url:
        raise ValueError(
            f"url must be of a folder, such as 's3://bucket/prefix', got {described(url)}; a folder of this machine is "
            "hfblend.store.DiskStore(path)."
        )
    if not url.rpartition("://")[2].strip("/ "):
        raise ValueError(f"url must name a folder after ://, such as 's3://bucket/prefix', got {name!r}.")
    core = require("fsspec.core", "fsspec", "remote", "A store behind a URL needs")
    try:
        return core.url_to_fs(url, **storage_options)
    except ImportError as error:
        raise ImportError(
            f"The store {name!r} needs a package that is missing: {error}. For S3, run "
            "`pip install 'hfblend[remote]'`; for others, `pip install` the package named."
        ) from error
    except ValueError as error:
        registry = require("fsspec.registry", "fsspec", "remote", "A store behind a URL needs")
        guess = closest(name.partition("://")[0], registry.available_protocols())
        raise ValueError(
            f"A store is a folder, a URL that fsspec can open or a store object, got {name!r}: {error}."
            + (f" Did you mean {guess}://…?" if guess else "")
        ) from error
