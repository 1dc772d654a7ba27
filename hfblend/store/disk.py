"""Chunk KV in a folder of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import require_folder
from .files import FileStore
from .folders import LocalFolder, is_abandoned
from .format import Contents
from .journal import INDEX, Journal, LocalTexts
from .keys import file_name_of
from .loader import Source
from .sources import FileSource

_APART = re.compile(r"hfblend-profile\.(\d{1,10})\.\w{8}")  # the process that made it


class DiskStore(FileStore):
    """Keeps each chunk's KV in a file of a folder, up to a byte budget; the least recently used goes first.

    >>> store = DiskStore("~/.cache/hfblend/chunks", max_bytes="50GB")  # doctest: +SKIP

    A file is written under a temporary name, synced and renamed, so that a crash leaves no half of it. It is read a
    layer at a time, and every byte of a layer is checked before any of it is used; a damaged file is logged, prefilled
    again, and removed if a second reading agrees. A full, read-only or failing disk is logged, and costs reuse only.
    Several processes may use one folder.

    Args:
        path: a folder for nothing else; made if it is not there.
        max_bytes: of all files together; a number or `"8GB"`, `"512MiB"`. One store never passes it; several that
            write into a folder at the same time may, by a 32nd of it or by one entry for each.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits; `None`, as computed. 8 bits of another kind are a miss.

    Raises:
        ValueError: an invalid budget or `kv_dtype`; a file, or a URL, instead of a folder.
        OSError: the folder cannot be made.
    """

    _folder: LocalFolder

    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int | str = "50GB", *, kv_dtype: str | None = None
    ) -> None:
        self.path = require_folder(path)
        super().__init__(LocalFolder(self.path), str(self.path), max_bytes, kv_dtype)

    @contextlib.contextmanager
    def apart(self) -> Iterator[DiskStore]:
        for folder in self.path.iterdir():
            name = _APART.fullmatch(folder.name)
            with contextlib.suppress(OSError):
                if name and not folder.is_symlink() and is_abandoned(int(name[1]), folder.lstat()):
                    DiskStore(folder).clear()
                    folder.rmdir()  # fails if something else is there
        with tempfile.TemporaryDirectory(prefix=f"hfblend-profile.{os.getpid()}.", dir=self.path) as made:
            yield DiskStore(made, 2**60, kv_dtype=self.kv_dtype)

    def clear(self) -> None:
        super().clear()
        self._remove(file.name for file in self._folder.files() if file.name.endswith(INDEX))

    def _texts_of(self, scope: str, *how: Any) -> LocalTexts:
        return LocalTexts(Journal(self._folder, scope + INDEX), *how)

    def _opened(self, key: str) -> tuple[Source, Contents]:
        return self._reading.ask("read from", lambda: FileSource.opened(self._folder, key, self._reading))

    def _note_used(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._folder.touch(file_name_of(key))

    def _path(self, key: str) -> Path:
        return self.path / file_name_of(key)
