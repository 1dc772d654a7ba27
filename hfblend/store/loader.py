"""A chunk read from its file, near or far, some layers at a time, ahead of the pass that needs them.

    the pass asks for layer     0 1 2 3         4 5 6 7
    threads are at              4 5 6 7         8 9 10 11           of every chunk of the prompt at once

A layer is checked when it arrives. At most 2 · LAYERS_A_READ layers of a chunk are in memory, unless it is kept.

Threads do what lets other threads run, reads and checksums, and little else: buffers are made, and tensors formed in
them, by the thread that asks. With 8 threads that make tensors, Python's lock costs more than the reading. That thread
makes few calls for the same reason: each may have to wait for the lock.

Shapes: n tokens of the chunk, Hkv KV heads, D head_dim, W width of a row.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import cached_property
from io import FileIO
from typing import Protocol, TypeVar

import torch

from ..kv.chunk import ChunkKV, ChunkLost, Provenance, in_memory
from ..kv.ids import Ids
from ..kv.origin import Origin
from ..kv.rows import KV, RowLayout, pins_memory
from ..locks import Mutex
from .counts import StoreCounts
from .format import MOST_UNASKED, Contents, CorruptEntry, Place, QuantisedPlace, memory_of, views_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
Places = Sequence[Place | QuantisedPlace]

LAYERS_A_READ = 4  # neighbours in the file; each read costs a turn of Python's lock, or a request
READERS = 12  # threads that read from disks, of all stores of the process together


class Source(Protocol):
    """The file behind a chunk, and the threads that read it."""

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fills a buffer with the bytes from `start` on, in the thread that calls.

        Raises:
            CorruptEntry: the file ends before, or does not where it must.
            OSError: they cannot be read.
        """
        ...

    def tier(self, start: int) -> str:
        """Where the bytes from `start` on are read from, of `hfblend.controller.TIERS`."""
        ...

    def begin(self, read: Callable[[], T]) -> Future[T]:
        """Calls `read` in a thread, soon."""
        ...

    def result(self, begun: Future[T]) -> T:
        """What that call returns or raises; `OSError` if it does not come in time."""
        ...


class FileSource:
    """A file on a disk. It stays open as long as this lives, so that it can be read on when its name is gone.

    Args:
        head: what has been read of it, its layers not included.
    """

    def __init__(self, stream: FileIO, head: bytes) -> None:
        self._stream, self._head, self._reading = stream, head, Mutex()
        weakref.finalize(self, stream.close)

    def fill(self, buffer: memoryview, start: int) -> None:
        here = self._head[start : start + len(buffer)]
        buffer[: len(here)] = here
        read = len(here)
        while read < len(buffer):
            more = self._read_into(buffer[read:], start + read)
            if not more:
                raise CorruptEntry(f"it ends after {read} of {len(buffer)} bytes of a tensor")
            read += more

    def _read_into(self, buffer: memoryview, start: int) -> int | None:
        if hasattr(os, "preadv"):
            return os.preadv(self._stream.fileno(), [buffer], start)
        with self._reading:
            self._stream.seek(start)
            return self._stream.readinto(buffer)

    def tier(self, start: int) -> str:
        """`"page_cache"` where the system still has them in its own RAM, and says so."""
        if hasattr(os, "RWF_NOWAIT"):
            with contextlib.suppress(OSError):
                os.preadv(self._stream.fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
                return "page_cache"
        return "disk"

    def begin(self, read: Callable[[], T]) -> Future[T]:
        return _threads().submit(read)

    def result(self, begun: Future[T]) -> T:
        try:
            return begun.result()
        finally:
            del begun  # or a frame of what it raised would hold it, and so the whole pass


class LayerwiseChunk:
    """A chunk in a file whose header has been checked. A `Reader`.

    Args:
        source: the file.
        contents: of the file.
        counts: of the store; what is read is added.
        lost: called with the error and where it stands when something cannot be read or is damaged, before `ChunkLost`
            is raised.

    Raises:
        ChunkLost: positions or ids came with the header, and are not what was written. Those of which a header claims
            so many that they did not come with it are read when they are asked for.
    """

    def __init__(
        self,
        source: Source,
        contents: Contents,
        counts: StoreCounts,
        lost: Callable[[Exception, Places], None],
    ) -> None:
        self._source, self._contents, self._counts, self._lost = source, contents, counts, lost
        self._ahead: dict[int, Future[list[torch.Tensor]]] = {}  # of a run of layers, by its number
        self._latest: tuple[int, list[torch.Tensor]] | None = None
        self._kept: dict[int, torch.Tensor] | None = None
        self._whole: Callable[[ChunkKV], None] = lambda chunk_kv: None
        self.provenance: Provenance = contents.provenance
        self.regime, self.num_behind = contents.regime, contents.num_behind
        if contents.first_stop <= MOST_UNASKED:
            _ = self.cached_positions, self.behind_ids

    def __len__(self) -> int:
        return self._contents.num_tokens

    @cached_property
    def cached_positions(self) -> torch.Tensor:
        """Where the tokens stood (n,). Raises `ChunkLost` as `layer` does."""
        return self._small("cached_positions", self._contents.positions_of)

    @cached_property
    def behind_ids(self) -> Ids:
        """The ids before them. Raises `ChunkLost` as `layer` does."""
        return self._small("behind_ids", lambda ids: Ids.from_bytes(memory_of(ids)))

    @property
    def layouts(self) -> tuple[RowLayout, ...]:
        return self._contents.layouts

    @property
    def dtype(self) -> torch.dtype:
        return self._contents.layers[0].dtype

    @property
    def quantised(self) -> str | None:
        return self._contents.quantised

    @property
    def origin(self) -> Origin | None:
        return self._contents.origin

    @property
    def num_layers(self) -> int:
        return len(self._contents.layouts)

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for place in self._contents.layers)

    def tier_beside(self, device: torch.device) -> str:
        """Where its last layer is read from: a file is rarely in part in the system's RAM."""
        return self._source.tier(self._contents.layers[-1].start)

    def layer(self, layer_idx: int) -> KV:
        """Keys and values (1, Hkv, n, D), packed in rows, in RAM (pinned beside a GPU).

        Raises:
            ChunkLost: they cannot be read, or are not what was written.
        """
        return self._contents.layouts[layer_idx].views(self.rows(layer_idx)[None])

    def rows(self, layer_idx: int) -> torch.Tensor:
        """The rows (n, W) of `layer`."""
        if self._kept is not None and layer_idx in self._kept:
            return self._kept[layer_idx]
        run, at = divmod(layer_idx, LAYERS_A_READ)
        if self._latest is None or self._latest[0] != run:
            self.prefetch(layer_idx)
            try:
                self._latest = run, self._source.result(self._ahead.pop(run))
            except (OSError, CorruptEntry) as error:
                start = run * LAYERS_A_READ
                raise self._given_up(error, self._contents.layers[start : start + LAYERS_A_READ]) from error
            self._keep(run * LAYERS_A_READ, self._latest[1])
        return self._latest[1][at]

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading this layer, its neighbours, and the next few."""
        first = layer_idx // LAYERS_A_READ
        if self._latest is not None and self._latest[0] < first:
            self._latest = None
        for run in (first, first + 1):
            layers = range(run * LAYERS_A_READ, min((run + 1) * LAYERS_A_READ, self.num_layers))
            is_here = self._latest is not None and self._latest[0] == run
            is_kept = self._kept is not None and all(i in self._kept for i in layers)
            if layers and run not in self._ahead and not is_here and not is_kept:
                self._ahead[run] = self._begun(self._contents.layers[layers.start : layers.stop])

    def keep(self, whole: Callable[[ChunkKV], None]) -> None:
        """Keeps every layer that is read, and hands the whole chunk over once all of them are there."""
        self._kept, self._whole = {}, whole

    def _keep(self, first: int, rows: Sequence[torch.Tensor]) -> None:
        """Neighbours that nobody asked for too: a rule that never asks for layer 0 would keep nothing."""
        if self._kept is None:
            return
        self._kept.update(enumerate(rows, first))
        if len(self._kept) == self.num_layers:
            self._whole(in_memory(self))

    def _given_up(self, error: Exception, places: Places) -> ChunkLost:
        self._lost(error, places)
        return ChunkLost(self._contents.key, str(error))

    def _begun(self, places: Places) -> Future[list[torch.Tensor]]:
        """Reading of layers that stand one behind the other; it is over already where no thread is to be had."""
        read = self._to_read(places)
        try:
            return self._source.begin(read)
        except RuntimeError:  # the process is ending, or may have no more threads
            return _over(self._to_read(places))  # another buffer: what was begun may be read all the same

    def _small(self, name: str, as_asked: Callable[[torch.Tensor], T]) -> T:
        """A tensor beside the layers: now, where it came with the header, else when a thread has read it."""
        place = self._contents.places[name]
        try:
            came = place.stop <= MOST_UNASKED
            return as_asked(self._read(place) if came else self._source.result(self._begun([place]))[0])
        except (OSError, CorruptEntry) as error:
            raise self._given_up(error, [place]) from error

    def _read(self, place: Place) -> torch.Tensor:
        data = torch.empty(place.stop - place.start, dtype=torch.uint8)
        memory = data.numpy().data
        self._source.fill(memory, place.start)
        place.require_whole(memory)
        return place.tensor(data)

    def _to_read(self, places: Places) -> Callable[[], list[torch.Tensor]]:
        """What a thread has to do for layers that stand one behind the other, with the buffer made: returns their rows,
        or raises, once the chunk is given up."""
        start, num_bytes = places[0].start, places[-1].stop - places[0].start
        data = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pins_memory())
        rows, memory = views_of(places, data), data.numpy().data
        source, counts, chunk = self._source, self._counts, weakref.ref(self)

        def read() -> list[torch.Tensor]:
            if chunk() is None:
                raise CancelledError
            began = time.perf_counter()
            source.fill(memory, start)
            for place in places:
                place.require_whole(memory[place.start - start : place.stop - start])
            read_rows = rows or [place.tensor(data[place.start - start : place.stop - start]) for place in places]
            counts.add(bytes_read=num_bytes, read_seconds=time.perf_counter() - began)
            return read_rows

        return read


def _over(read: Callable[[], T]) -> Future[T]:
    """A call made here, as if a thread had."""
    over: Future[T] = Future()
    try:
        over.set_result(read())
    except (OSError, CorruptEntry) as error:
        over.set_exception(error.with_traceback(None))  # whose frames would hold the future, and it the error
    return over


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "hfblend-read")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
