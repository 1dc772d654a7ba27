"""Chunk KV on disk, which outlives the process and is shared by many. What cannot be trusted is a miss."""

from __future__ import annotations

import contextlib
import logging
import os
from functools import partial
from pathlib import Path

from ..kv.chunk import ChunkKV, ChunkLost
from .base import require_chunk_kv, require_folder
from .folders import LocalFolder
from .format import HEAD_BYTES, Contents, CorruptEntry, OtherVersion, contents_of, dump, header_bytes
from .keys import file_name_of
from .loader import FileSource, LayerwiseChunk, Places
from .quantise import require_kv_dtype, takes
from .upkeep import InFiles

logger = logging.getLogger(__name__)


class DiskStore(InFiles):
    """Keeps each chunk's KV in a file of its own, up to a byte budget; the least recently used goes first.

    >>> store = DiskStore("~/.cache/hfblend/chunks", max_bytes="50GB")  # doctest: +SKIP

    A file is written under a temporary name, synced and renamed, so that a crash leaves no half of it. It is read a
    layer at a time, and every byte of a layer is checked before any of it is used; a damaged file is logged, prefilled
    again, and removed if a second reading agrees. A full, read-only or failing disk is logged, and costs reuse only.
    Several processes may use one folder.

    Args:
        path: a folder of its own; made if it is not there.
        max_bytes: of all files together; a number or `"8GB"`, `"512MiB"`. One store never passes it; several that
            write into a folder at the same time may, by a 32nd of it or by one entry for each.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits, near what was computed; `None`, as computed. An entry in
            8 bits that is not of that kind is a miss.

    Raises:
        ValueError: a budget that is no size; no such `kv_dtype`; a file, or a URL, in the place of a folder.
        OSError: the folder cannot be made.
    """

    _folder: LocalFolder

    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int | str = "50GB", *, kv_dtype: str | None = None
    ) -> None:
        self.kv_dtype = require_kv_dtype(kv_dtype)
        self.path = require_folder(path)
        self.where = str(self.path)
        super().__init__(LocalFolder(self.path), max_bytes)

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; what the disk refuses is logged and not kept, nor is KV in 8 bits of another kind."""
        name = file_name_of(key)
        chunk_kv = require_chunk_kv(chunk_kv)
        if not takes(self.kv_dtype, chunk_kv.quantised):
            logger.info("A chunk's KV that was in %s is not kept in %s.", chunk_kv.quantised, self.path)
            return
        file = dump(key, chunk_kv, self.kv_dtype)
        try:
            if not self._make_room(len(file), key):
                self._say_no_room(len(file))
                return
            try:
                self._folder.write(name, file)
            finally:
                self._settle(len(file))
            self.counts.add(stored=1, bytes_written=len(file))
        except OSError as error:
            self.counts.add(failed=1)
            logger.warning("A chunk's KV could not be written to %s: %s", self.path, error)

    def open(self, key: str) -> LayerwiseChunk | None:
        """The entry, its header checked, its layers read and checked as they are asked for; `None` if there is none.

        A layer that cannot be read, or turns out to be damaged, raises `ChunkLost` then; a damaged entry is removed
        once a second reading brings the same bytes.
        """
        name, chunk = file_name_of(key), None
        try:
            with contextlib.ExitStack() as opened:
                stream = opened.enter_context(self._folder.open(name))
                head = stream.read(HEAD_BYTES)
                head += stream.read(max(0, header_bytes(head[:8]) - len(head)))
                contents = contents_of(key, head, os.fstat(stream.fileno()).st_size)
                contents.require_served_by(self.kv_dtype)
                source = FileSource(stream, head[: contents.layers[0].start])
                opened.pop_all()  # from here on the source closes it
                chunk = LayerwiseChunk(source, contents, self.counts, partial(self._lost, key, contents))
        except (FileNotFoundError, ChunkLost):
            pass
        except OtherVersion as error:
            logger.info("%s is not read: %s", self._path(key), error)
        except (CorruptEntry, OSError) as error:
            self._lost(key, None, error)
        self.counts.add(**{"misses" if chunk is None else "hits": 1})
        if chunk is not None:
            with contextlib.suppress(OSError):
                self._folder.touch(name)  # used just now
        return chunk

    def _lost(self, key: str, opened: Contents | None, error: Exception, places: Places = ()) -> None:
        if isinstance(error, CorruptEntry):
            self.drop_from_ram(key)  # so that the disk is asked again
            self._damaged(key, error, opened, places)
        else:  # the next reading may succeed
            logger.warning("A chunk's KV could not be read from %s, it is prefilled again: %s", self._path(key), error)
            self.counts.add(failed=1)

    def drop_from_ram(self, key: str) -> None:
        """Asks the system to let go of its copy of an entry in RAM, as for one that was not used for long."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self._folder.open(file_name_of(key)) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def __contains__(self, key: str) -> bool:
        """Whether there is a file of that key; none where the folder cannot be looked into."""
        with contextlib.suppress(OSError):
            return self._folder.has(file_name_of(key))
        return False

    def _path(self, key: str) -> Path:
        return self.path / file_name_of(key)
