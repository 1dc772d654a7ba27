"""A folder at a URL, through fsspec: each call is a request, in the thread that calls."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from ..arguments import closest, described
from ..util import require
from .folders import File
from .requests import LATE, at_once

T = TypeVar("T")
R = TypeVar("R")

# Their puts are atomic and need no folders; elsewhere a file is written under a temporary name and moved.
_PUTS_ARE_ATOMIC = {"abfs", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a", "tos"}
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "created")  # as filesystems call it


class RemoteFolder:
    """A folder at a URL, whose password is left out of `url`. Methods as of `LocalFolder`.

    Asynchronous filesystems keep to `timeout_s` for a request. Raises as `RemoteStore`.
    """

    def __init__(self, url: str, timeout_s: float, storage_options: dict[str, Any]) -> None:
        self.url = re.sub(r"//[^/@]*@", "//", str(url))
        self.filesystem, root = _filesystem_at(url, self.url, storage_options)
        self._root = root.rstrip("/")
        protocol = self.filesystem.protocol  # one name, or several
        self._puts_are_atomic = not _PUTS_ARE_ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._give_up = {"timeout": timeout_s} if getattr(self.filesystem, "async_impl", False) else {}

    def files(self) -> Iterator[File]:
        with _as_os_errors():
            self.filesystem.invalidate_cache(self._root)  # others write, too
            try:
                found = self.filesystem.ls(self._root, detail=True, **self._give_up)
            except FileNotFoundError:
                found = []
            self.filesystem.invalidate_cache(self._root)
        for one in found:
            if one["type"] == "file":
                yield File(one["name"].rpartition("/")[2], int(one["size"] or 0), _changed(one))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with _as_os_errors():
            return self.filesystem.cat_file(self._path(name), start=start, end=stop, **self._give_up)

    def write(self, name: str, data: bytes) -> None:
        with _as_os_errors():
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
        """Removes a file; returns why it cannot be removed."""
        try:
            with _as_os_errors(), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(self._path(name), **self._give_up)
        except LATE:
            raise
        except OSError as error:
            return error
        return None

    def state(self, name: str) -> tuple[int, Any]:
        with _as_os_errors():
            self.filesystem.invalidate_cache(self._path(name))
            info = self.filesystem.info(self._path(name), **self._give_up)
            if info["type"] != "file":
                raise FileNotFoundError(f"{name} is no file")
            return int(info["size"] or 0), (info.get("ETag"), _changed(info))

    def each(self, call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
        return at_once(call, many)

    def drop_from_ram(self, name: str) -> None:
        """Does nothing: no copy is on this machine."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turns every filesystem's own exceptions into `OSError`s."""
    try:
        yield
    except (OSError, *LATE):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _changed(info: dict[str, Any]) -> float:
    """Returns when a file was changed, in seconds since 1970; 0 if the filesystem does not say."""
    when = next((info[name] for name in _CHANGED if info.get(name) is not None), 0.0)
    if isinstance(when, str):
        with contextlib.suppress(ValueError):  # HTTP's, which are no ISO dates
            return datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp()  # Python 3.10 knows no Z
        return 0.0
    return when.timestamp() if isinstance(when, datetime) else float(when)


def _filesystem_at(url: str, name: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """Returns fsspec's filesystem for a URL, and the path in it."""
    if not isinstance(url, str) or "://" not in url:
        raise ValueError(
            f"url must be of a folder, such as 's3://bucket/prefix', got {described(url)}; a folder of this machine is "
            "hfblend.store.DiskStore(path)."
        )
    if not url.rpartition("://")[2].strip("/ "):
        raise ValueError(f"url must name a folder after ://, such as 's3://bucket/prefix', got {name!r}.")
    fsspec = require("fsspec", "fsspec", "remote", "A store at a URL needs")
    try:
        return fsspec.core.url_to_fs(url, **storage_options)
    except ImportError as error:
        raise ImportError(
            f"The store {name!r} needs a package that is missing: {error}. For S3, run "
            "`pip install 'hfblend[remote]'`; for others, `pip install` the package named."
        ) from error
    except ValueError as error:
        guess = closest(name.partition("://")[0], fsspec.available_protocols())
        raise ValueError(
            f"A store is a folder, a URL that fsspec can open or a store object, got {name!r}: {error}."
            + (f" Did you mean {guess}://…?" if guess else "")
        ) from error
