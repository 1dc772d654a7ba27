"""Chunk KV on disk, which outlives the process and is shared by many. What cannot be trusted is a miss."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from ..chunks import ChunkKV
from .counts import StoreCounts
from .format import HEAD_BYTES, CorruptEntry, OtherVersion, contents_of, dump, header_bytes, header_of, parse
from .keys import file_name_of, is_file_name
from .loader import FileSource, LayerwiseChunk
from .quantisation import require_kv_dtype, takes
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_ABANDONED_S = 3600  # a temporary file of that age was left by a process that is gone


@dataclass(frozen=True)
class DiskEntry:
    """What a file's header says of it.

    Attributes:
        num_bytes: of the file.
        last_used: seconds since 1970.
        pinned: whether it stays when others must go.
        damaged: what is wrong with the header; empty if nothing is, and then the rest is filled in.
    """

    key: str
    num_bytes: int
    last_used: float
    pinned: bool = False
    tokens: int = 0
    layers: int = 0
    dtype: str = ""
    provenance: str = ""
    damaged: str = ""


class DiskStore:
    """Keeps each chunk's KV in a file of its own, up to a byte budget; the least recently used goes first.

    >>> store = DiskStore("~/.cache/hfblend/chunks", max_bytes="50GB")  # doctest: +SKIP

    A file is written under a temporary name, synced and renamed, so that a crash leaves no half of it. It is read a
    layer at a time, and every byte of a layer is checked before any of it is used; a damaged file is logged, removed
    and prefilled again. A full, read-only or failing disk is logged, and costs reuse only. Several processes may use
    one folder.

    Args:
        path: a folder of its own; made if it is not there.
        max_bytes: of all files together; a number or `"8GB"`, `"512MiB"`. Processes that write at the same time may
            pass it for a while.
        kv_dtype: `"int8"` or `"fp8"` keeps KV in 8 bits, near what was computed; `None`, as computed. An entry in
            8 bits that is not of that kind is a miss.

    Raises:
        ValueError: a budget that is no size; no such `kv_dtype`.
        OSError: the folder cannot be made.
    """

    def __init__(
        self, path: str | os.PathLike[str], max_bytes: int | str = "50GB", *, kv_dtype: str | None = None
    ) -> None:
        self.max_bytes, self.kv_dtype = num_bytes_of(max_bytes), require_kv_dtype(kv_dtype)
        self.path = Path(path).expanduser()
        self.counts = StoreCounts()
        self._surely_free = 0  # bytes
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; what the disk refuses is logged and not kept, nor is KV in 8 bits of another kind."""
        path = self._path(key)
        if not takes(self.kv_dtype, chunk_kv.quantised):
            logger.info("A chunk's KV that was in %s is not kept in %s.", chunk_kv.quantised, self.path)
            return
        file = dump(key, chunk_kv, self.kv_dtype)
        if len(file) > self.max_bytes:
            logger.warning("A chunk's KV of %d bytes does not fit into %d bytes; not kept.", len(file), self.max_bytes)
            return
        temporary = self.path / f"{key}.{os.getpid()}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            self._make_room(len(file), key)
            with open(temporary, "xb") as stream:
                stream.write(file)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            self._sync_folder()
            self.counts.add(stored=1, bytes_written=len(file))
        except OSError as error:
            self.counts.add(failed=1)
            logger.warning("A chunk's KV could not be written to %s: %s", self.path, error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def open(self, key: str) -> LayerwiseChunk | None:
        """The entry, its header checked, its layers read and checked as they are asked for; `None` if there is none.

        A layer that turns out to be damaged raises `ChunkLost` then, and the entry is removed.
        """
        path = self._path(key)

        def give_up(error: Exception) -> None:
            logger.warning("%s is damaged, removed and prefilled again: %s", path, error)
            self.counts.add(damaged=1)
            with contextlib.suppress(OSError):
                path.unlink()

        chunk = None
        try:
            with contextlib.ExitStack() as opened:
                stream = opened.enter_context(FileIO(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))))
                head = stream.read(HEAD_BYTES)
                head += stream.read(max(0, header_bytes(head[:8]) - len(head)))
                contents = contents_of(key, head, os.fstat(stream.fileno()).st_size)
                contents.require_served_by(self.kv_dtype)
                source = FileSource(stream, head[: contents.layers[0].start])
                chunk = LayerwiseChunk(source, contents, self.counts, give_up)
                opened.pop_all()  # from here on the chunk closes it
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("A chunk's KV could not be read from %s, it is prefilled again: %s", path, error)
            self.counts.add(failed=1)
        except OtherVersion as error:
            logger.info("%s is not read: %s", path, error)
        except CorruptEntry as error:
            give_up(error)
        self.counts.add(**{"misses" if chunk is None else "hits": 1})
        if chunk is not None:
            with contextlib.suppress(OSError):
                os.utime(path)  # used just now
        return chunk

    def entries(self) -> Iterator[DiskEntry]:
        """Every entry, by its header; the data are not read."""
        for path, size, used in self._files():
            entry = DiskEntry(path.stem, size, used, self._pin(path.stem).exists())
            try:
                with open(path, "rb") as stream:
                    start = stream.read(8)
                    header = header_of(start + stream.read(header_bytes(start) - 8))
                layers = [one for name, one in header.items() if name.startswith("layer_")]
                yield replace(
                    entry,
                    tokens=header["cached_positions"]["shape"][0],
                    layers=len(layers),
                    dtype=layers[0]["dtype"],
                    provenance=header["__metadata__"]["provenance"],
                )
            except FileNotFoundError:
                continue
            except (OSError, CorruptEntry, LookupError, TypeError) as error:
                yield replace(entry, damaged=str(error) or type(error).__name__)

    def fault_of(self, key: str) -> str | None:
        """What is wrong with an entry, every byte read; `None` if it is whole, or gone."""
        try:
            parse(key, self._path(key).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, CorruptEntry, OtherVersion) as error:
            return str(error)
        return None

    def pin(self, key: str) -> None:
        """An entry stays when others must go, whoever makes room in the folder, until `unpin`.

        Raises:
            KeyError: there is none of that key.
            OSError: the folder cannot be written.
        """
        if key not in self:
            raise KeyError(f"There is no entry {key[:12]}… to pin; store it first.")
        self._pin(key).touch()

    def unpin(self, key: str) -> None:
        """An entry may go again."""
        self._pin(key).unlink(missing_ok=True)

    def drop_from_ram(self, key: str) -> None:
        """Asks the system to let go of its copy of an entry in RAM, as for one that was not used for long."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open(self._path(key), "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there, pinned or not."""
        self.unpin(key)
        self._path(key).unlink(missing_ok=True)

    def prune(self) -> None:
        """Removes the least recently used entries until the rest fits into `max_bytes`; pinned ones stay."""
        self._make_room(0, None)

    def clear(self) -> None:
        """Removes every entry."""
        for path, _, _ in self._files():
            self.remove(path.stem)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def __len__(self) -> int:
        return sum(1 for _ in self._files())

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def _path(self, key: str) -> Path:
        return self.path / file_name_of(key)

    def _pin(self, key: str) -> Path:
        """An empty file that is there while the entry is pinned."""
        return self._path(key).with_suffix(".pin")

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """Path, bytes and time of the last use of every entry; other processes may add and remove some meanwhile."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as found:
            for one in found:
                if is_file_name(one.name):
                    with contextlib.suppress(FileNotFoundError):
                        if one.is_file(follow_symlinks=False):
                            state = one.stat(follow_symlinks=False)
                            yield Path(one.path), state.st_size, state.st_mtime

    def _make_room(self, needed: int, key: str | None) -> None:
        """Removes the least recently used entries, but not that of `key`, until so many bytes more fit.

        The folder is not looked through again before half of what was free is written: others write too.
        """
        if key is not None and needed <= self._surely_free:
            self._surely_free -= needed
            return
        others = [one for one in self._files() if key is None or one[0] != self._path(key)]
        free = self.max_bytes - sum(size for _, size, _ in others)
        may_go = [one for one in others if not self._pin(one[0].stem).exists()]
        for path, size, _ in sorted(may_go, key=lambda one: one[2]):
            if free >= needed:
                break
            path.unlink(missing_ok=True)
            self.counts.add(evicted=1)
            free += size
        self._surely_free = max(0, free - needed) // 2

    def _sync_folder(self) -> None:
        if os.name != "posix":  # elsewhere a folder cannot be opened
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _remove_abandoned(self) -> None:
        """Temporary files of processes that were killed while they wrote."""
        for path in self.path.glob(f"*{_TEMPORARY}"):
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                    path.unlink()
