"""Chunk KV in files, which outlive the process and are shared by many: in a folder or at a URL.

An entry that is damaged, of another version or late is a miss, and costs reuse only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from ..kv.chunk import ChunkKV, ChunkLost
from ..locks import Mutex
from .base import require_chunk_kv
from .folders import LocalFolder, RemoteFolder
from .format import HEAD_BYTES, Contents, CorruptEntry, OtherVersion, contents_of, dump, header_bytes
from .index import Index, stands_for
from .journal import Text, Texts
from .keys import file_name_of
from .loader import LayerwiseChunk, Places, Source
from .quantise import require_kv_dtype, takes
from .requests import Requests
from .upkeep import Upkeep

logger = logging.getLogger(__name__)

_MAKING_ROOM_S = 600.0  # listing and removing many objects may take so long


class FileStore(Upkeep):
    """Keeps each chunk's KV in a file `<key>.safetensors`. Base of `DiskStore` and `RemoteStore`."""

    def __init__(
        self, folder: LocalFolder | RemoteFolder, where: str, max_bytes: int | str | None, kv_dtype: str | None,
        **limits: Any,
    ) -> None:  # fmt: skip
        super().__init__(folder, where, max_bytes)
        self.kv_dtype = require_kv_dtype(kv_dtype)
        self._reading = Requests(where, self.counts, (FileNotFoundError, CorruptEntry, OtherVersion), **limits)
        self._writing = Requests(where, self.counts, **limits)
        self._texts: dict[str, Texts] = {}  # by scope
        self._texts_lock = Mutex()
        self._reading.siblings = self._writing.siblings = (self._reading, self._writing)

    def __repr__(self) -> str:
        budget = "" if self.max_bytes is None else f", {self.max_bytes / 1e9:,.1f} GB at most"
        kept = f", in {self.kv_dtype}" if self.kv_dtype else ""
        return f"<{type(self).__name__} at {self.where}{budget}{kept}; {self.counts}>"

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        """Keeps an entry; one that is refused, late, or in 8 bits of another kind, is logged and not kept."""
        name = file_name_of(key)
        chunk_kv = require_chunk_kv(chunk_kv)
        if self._writing.is_paused:
            return
        if not takes(self.kv_dtype, chunk_kv.quantised):
            logger.info("A chunk's KV that was in %s is not kept in %s.", chunk_kv.quantised, self.where)
            return
        file = dump(key, chunk_kv, self.kv_dtype)
        if len(file) > (self._folder.most_bytes or len(file)):
            logger.warning(
                "A chunk's KV of %d bytes is not kept in %s, where an entry has at most %d: make chunks shorter, or "
                "keep KV in 8 bits (kv_dtype).", len(file), self.where, self._folder.most_bytes,
            )  # fmt: skip
            return
        with contextlib.suppress(OSError), contextlib.ExitStack() as over:
            if self.max_bytes is not None:
                made_room = self._writing.begin(partial(self._make_room, len(file), key))
                over.callback(made_room.add_done_callback, partial(self._settle_if_given, len(file)))  # even if late
                if not self._writing.answer("given room in", made_room, _MAKING_ROOM_S):
                    self._say_no_room(len(file))
                    return
            self._writing.ask("written to", lambda: self._folder.write(name, file))
            self._note_written(key)
            if chunk_kv.scope and chunk_kv.provenance == "isolated":
                self._texts_in(chunk_kv.scope).note(Text.of(key, chunk_kv))
            self.counts.add(stored=1, bytes_written=len(file))

    def _settle_if_given(self, num_bytes: int, made_room: Future[bool]) -> None:
        if not made_room.cancelled() and made_room.exception() is None and made_room.result():
            self._settle(num_bytes)

    def open(self, key: str) -> LayerwiseChunk | None:
        """Returns the entry, its header checked; `None` if there is none that can be trusted, or none in time.

        Layers are read and checked when they are asked for, and raise `ChunkLost` if they are damaged or unreadable.
        """
        file_name_of(key)
        chunk = None
        try:
            source, contents = self._opened(key)
            contents.require_served_by(self.kv_dtype)
            chunk = LayerwiseChunk(source, contents, self.counts, partial(self._lost, key, contents))
            self._note_used(key)
        except ChunkLost:
            pass
        except OtherVersion as error:
            logger.info("%s of %s is not read: %s", file_name_of(key), self.where, error)
        except (CorruptEntry, OSError) as error:
            self._lost(key, None, error)
        self.counts.add(**{"misses" if chunk is None else "hits": 1})
        return chunk

    def index(self, scope: str) -> Index:
        """Returns the texts of the entries of one scope, up to date."""
        texts = self._texts_in(scope)
        texts.refresh()
        return texts.index

    def _texts_in(self, scope: str) -> Texts:
        with self._texts_lock:
            if scope not in self._texts:
                self._texts[scope] = self._texts_of(scope, self.keys, partial(self._read_texts, scope))
            return self._texts[scope]

    def _texts_of(self, scope: str, *how: Any) -> Texts:
        raise NotImplementedError

    def _read_texts(self, scope: str, keys: Iterable[str]) -> Iterator[Text]:
        found = self._folder.each(partial(self._text, scope), keys)
        return (text for text in found if text is not None)

    def _text(self, scope: str, key: str) -> Text | None:
        """Returns an entry's text, by its header; `None` if it cannot be read now."""
        name = file_name_of(key)
        try:
            head = self._folder.read(name, 0, HEAD_BYTES)
            if len(head) < header_bytes(head[:8]):
                head += self._folder.read(name, len(head), header_bytes(head[:8]))
            contents = contents_of(key, head, None)
            if not contents.ids or contents.scope != scope or contents.provenance != "isolated":
                return Text(key)
            place = contents.places["behind_ids"]
            data = head if place.stop <= len(head) else self._folder.read(name, 0, place.stop)
            behind = np.frombuffer(data[place.start : place.stop], np.int64)
            return Text(key, np.frombuffer(contents.ids, "<u4"), len(behind), stands_for(behind))
        except (CorruptEntry, OtherVersion, ValueError):
            return Text(key)
        except OSError:
            return None

    def __contains__(self, key: str) -> bool:
        """Whether there is a file of that key; whether it can be trusted is seen when it is read."""
        name = file_name_of(key)
        with contextlib.suppress(OSError):
            return self._reading.ask("looked for in", partial(self._has, name))
        return False

    def drop_from_ram(self, key: str) -> None:
        """Asks the system to let go of its copy of an entry's file in RAM, if it has one."""
        self._folder.drop_from_ram(file_name_of(key))

    def apart(self) -> contextlib.AbstractContextManager[FileStore]:
        """Yields a store in the same place whose entries push none of this one's out."""
        raise NotImplementedError

    def _opened(self, key: str) -> tuple[Source, Contents]:
        raise NotImplementedError

    def _note_used(self, key: str) -> None: ...

    def _note_written(self, key: str) -> None: ...

    # --- damage ---------------------------------------------------------------------------------------------------

    def _lost(self, key: str, opened: Contents | None, error: Exception, places: Places = ()) -> None:
        """Says that an entry is damaged, and removes it if a second reading brings the same bytes.

        `opened` is the entry by its header, if that was whole; `places` of it were not.
        """
        if not isinstance(error, CorruptEntry):  # an `OSError` that `Requests.answer` has logged
            return
        self.counts.add(damaged=1)
        self.drop_from_ram(key)  # so that the disk is asked again
        outcome = "is damaged, removed"
        try:
            if not self._writing.ask("removed from", partial(self._removed_if_damaged, key, error, opened, places)):
                outcome = "came damaged, a second reading does not agree or it was replaced, stays"
        except OSError as second:
            outcome = f"came damaged, cannot be read again or removed ({second}), stays"
        logger.warning("%s of %s %s and prefilled again: %s", file_name_of(key), self.where, outcome, error)

    def _removed_if_damaged(self, key: str, error: CorruptEntry, opened: Contents | None, places: Places) -> bool:
        name = file_name_of(key)
        try:
            state = self._folder.state(name)
            is_damaged = self._comes_alike(key, state[0], error, opened, places)
            if not is_damaged or self._folder.state(name) != state:
                return False
        except FileNotFoundError:
            return True
        for refusal in self._folder.remove([name]).values():
            raise refusal
        return True

    def _comes_alike(
        self, key: str, num_bytes: int, error: CorruptEntry, opened: Contents | None, places: Places
    ) -> bool:
        """Whether a second reading brings the same damaged bytes, not only some that are damaged."""

        def read(start: int, stop: int) -> bytes:
            data, stop = self._folder.read(file_name_of(key), start, stop), min(stop, num_bytes)
            data = data[start:stop] if len(data) == num_bytes else data  # some filesystems read no parts
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came where {stop - start} were asked for")
            return data

        head = read(0, HEAD_BYTES)
        if len(head) < min(num_bytes, header_bytes(head[:8])):
            head += read(len(head), header_bytes(head[:8]))
        try:
            if opened is not None and num_bytes != opened.layers[-1].stop:  # as the system itself says
                return contents_of(key, head, opened.layers[-1].stop) == opened
            contents = contents_of(key, head, num_bytes)
            for place in places if contents == opened else ():
                place.require_whole(memoryview(read(place.start, place.stop)))
        except OtherVersion:
            return False
        except CorruptEntry as second:
            return second.came == error.came != ""
        return False
