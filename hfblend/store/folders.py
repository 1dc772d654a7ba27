"""Folders with a file for each entry: on this machine's disks, and at URLs with the same methods."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..arguments import closest, described
from ..util import require
from .requests import LATE, at_once

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
R = TypeVar("R")

_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_ABANDONED = re.compile(r"[0-9a-f]{64}\.(\d{1,10})\.[0-9a-f]{32}\.tmp")  # key, process, any
_ABANDONED_S = 3600  # a temporary file of that age was left by a process that is gone
_AHEAD_S = 24 * 3600  # clocks of machines that share a folder may differ by less


class File(NamedTuple):
    """A file of a folder; `num_bytes` that it takes up; `changed` in seconds since 1970, 0 if unknown."""

    name: str
    num_bytes: int
    changed: float


class LocalFolder:
    """A folder on a disk. Links in it are not followed; only writing changes anything in it; errors are `OSError`s."""

    most_bytes: int | None = None  # of a file

    def __init__(self, path: Path) -> None:
        self.path, self._is_tidy = path, False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}; a store's folder cannot be made there, name another place"
            raise OSError(error.errno, reason, str(path)) from None

    def files(self) -> Iterator[File]:
        """All files; other processes may add and remove some meanwhile."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as found:
            for one in found:
                with contextlib.suppress(FileNotFoundError):
                    if one.is_file(follow_symlinks=False):
                        state = one.stat(follow_symlinks=False)
                        # A file used while a clock was ahead must not stay for years: its time is not known.
                        is_known = 0 <= state.st_mtime <= time.time() + _AHEAD_S
                        # A file with holes takes up less than its length; some filesystems do not tell.
                        taken = 512 * getattr(state, "st_blocks", 0) or state.st_size
                        yield File(one.name, min(state.st_size, taken), state.st_mtime if is_known else 0.0)

    def open(self, name: str) -> FileIO:
        """Opens a file for reading, without a buffer; raises `OSError` for all but regular files, waits for no pipe."""
        number = os.open(self.path / name, _READ)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(f"{name} is no file")
        return FileIO(number)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Returns bytes [start, stop) of a file, fewer if it ends before."""
        with self.open(name) as stream:
            stream.seek(start)
            return stream.readall() if stop is None else stream.read(stop - start)

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it; a half of it is never seen."""
        temporary = self.path / f"{Path(name).stem}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
        self.path.mkdir(parents=True, exist_ok=True)  # it may have been removed
        if not self._is_tidy:
            self._is_tidy = True
            self._remove_abandoned()
        try:
            with open(temporary, "xb") as stream:
                _lock(stream.fileno())
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path / name)
            self._sync()
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, names: Iterable[str]) -> dict[str, OSError]:
        """Removes files, those that are there. Returns the reason for each that cannot be removed."""
        refused = {}
        for name in names:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                if not os.path.isdir(self.path / name):  # which is none of ours
                    refused[name] = error
        return refused

    def state(self, name: str) -> tuple[int, Any]:
        """Returns a file's bytes, and a value that changes when another file takes its place."""
        state = os.lstat(self.path / name)
        if not stat.S_ISREG(state.st_mode):
            raise FileNotFoundError(f"{name} is no file")
        return state.st_size, (state.st_dev, state.st_ino)

    def each(self, call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
        """The answers of a call to each, in order."""
        return map(call, many)

    def touch(self, name: str) -> None:
        """Makes a file count as changed now."""
        os.utime(self.path / name)

    def drop_from_ram(self, name: str) -> None:
        """Asks the system to let go of its copy of a file in RAM."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self.open(name) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _sync(self) -> None:
        if os.name != "posix":  # elsewhere a folder cannot be opened
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # filesystems that sync no folders
                raise
        finally:
            os.close(folder)

    def _remove_abandoned(self) -> None:
        """Removes temporary files of processes killed while they wrote: named as `write` does, an hour old, process
        and lock gone."""
        with contextlib.suppress(OSError), os.scandir(self.path) as found:
            for one in found:
                name = _ABANDONED.fullmatch(one.name)
                with contextlib.suppress(OSError):
                    if name and is_abandoned(int(name[1]), one.stat(follow_symlinks=False)):
                        with self.open(one.name) as stream:
                            if _lock(stream.fileno()):
                                os.unlink(one.path)


def is_abandoned(process: int, made: os.stat_result) -> bool:
    """Whether a file or folder that a process made is left over: an hour old, the process gone from this machine."""
    if abs(time.time() - made.st_mtime) < _ABANDONED_S:  # a clock may have been ahead
        return False
    try:
        if os.name == "posix":  # elsewhere a signal 0 is no question, and an open file cannot be removed
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's
        return False
    return os.name != "posix"


def _lock(number: int) -> bool:
    """Locks an open file until it is closed, or its process ends; returns whether that was possible."""
    with contextlib.suppress(OSError):  # another process has it, or the filesystem has no locks
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


# --- at a URL -----------------------------------------------------------------------------------------------------

# Their puts are atomic and need no folders; elsewhere a file is written under a temporary name and moved.
_PUTS_ARE_ATOMIC = {"abfs", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "s3", "s3a", "tos"}
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "created")  # as filesystems call it


class RemoteFolder:
    """A folder at a URL, whose password is left out of `url`. Methods as of `LocalFolder`, each one request through
    fsspec in the thread that calls.

    Asynchronous filesystems keep to `timeout_s` for a request. Raises as `RemoteStore`.
    """

    most_bytes: int | None = None

    def __init__(self, url: str, timeout_s: float, storage_options: dict[str, Any]) -> None:
        self.url = re.sub(r"//[^/@]*@", "//", str(url))
        self.filesystem, root = _filesystem_at(url, self.url, storage_options)
        self._root = root.rstrip("/")
        protocol = self.filesystem.protocol  # one name, or several
        self._puts_are_atomic = not _PUTS_ARE_ATOMIC.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
        self._give_up = {"timeout": timeout_s} if getattr(self.filesystem, "async_impl", False) else {}

    def files(self) -> Iterator[File]:
        with as_os_errors():
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
        with as_os_errors():
            return self.filesystem.cat_file(self._path(name), start=start, end=stop, **self._give_up)

    def write(self, name: str, data: bytes) -> None:
        with as_os_errors():
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
        try:
            with as_os_errors(), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(self._path(name), **self._give_up)
        except LATE:
            raise
        except OSError as error:
            return error
        return None

    def state(self, name: str) -> tuple[int, Any]:
        with as_os_errors():
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
def as_os_errors() -> Iterator[None]:
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
