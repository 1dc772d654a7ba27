"""Folders with a file for each entry: what stores over them ask for, and those of this machine's disks.

Those behind a URL are in `remote_folder.py`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol

_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
_TEMPORARY = ".tmp"
_ABANDONED_S = 3600  # a temporary file of that age was left by a process that is gone
_AHEAD_S = 24 * 3600  # clocks of machines that share a folder may differ by less


class File(NamedTuple):
    """A file of a folder; `changed` in seconds since 1970, 0 where the folder does not tell."""

    name: str
    num_bytes: int
    changed: float


class Folder(Protocol):
    """Files by their names. What cannot be done is an `OSError`."""

    def files(self) -> Iterable[File]:
        """All files; other processes may add and remove some meanwhile."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before.

        Raises:
            FileNotFoundError: it is not there.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces it; nobody sees a half of it."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Removes files; those that are not there are left out."""
        ...


class LocalFolder:
    """A folder on a disk. Links in it are not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()

    def files(self) -> Iterator[File]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as found:
            for one in found:
                with contextlib.suppress(FileNotFoundError):
                    if one.is_file(follow_symlinks=False):
                        state = one.stat(follow_symlinks=False)
                        # What was used while a clock was ahead must not stay for years: its time is not known.
                        is_ahead = state.st_mtime > time.time() + _AHEAD_S
                        yield File(one.name, state.st_size, 0.0 if is_ahead else state.st_mtime)

    def has(self, name: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG(os.lstat(self.path / name).st_mode)
        return False

    def open(self, name: str) -> FileIO:
        """A file to be read, without a buffer.

        Raises:
            OSError: what has the name is no file; nobody waits for who writes into a pipe.
        """
        number = os.open(self.path / name, _READ)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(f"{name} is no file")
        return FileIO(number)

    def remove_if(self, name: str, opened: os.stat_result) -> None:
        """Removes a file, if it is the one that was opened, and no other process has put a new one in its place."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self.path / name), opened):
                self.remove([name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with self.open(name) as stream:
            stream.seek(start)
            return stream.readall() if stop is None else stream.read(stop - start)

    def write(self, name: str, data: bytes) -> None:
        temporary = self.path / f"{Path(name).stem}.{os.getpid()}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path / name)
            self._sync()
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        """A file counts as changed now."""
        os.utime(self.path / name)

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
        """Temporary files of processes that were killed while they wrote."""
        for path in self.path.glob(f"*{_TEMPORARY}"):
            with contextlib.suppress(OSError):
                if abs(time.time() - path.lstat().st_mtime) > _ABANDONED_S:  # a clock may have been ahead
                    path.unlink()
