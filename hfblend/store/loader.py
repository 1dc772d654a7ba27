"""A chunk read from its file, near or far, some layers at a time, ahead of the pass that needs them.

    the pass asks for layer     0 1 2 3         4 5 6 7
    threads are at              4 5 6 7         8 9 10 11           of every chunk of the prompt at once

A layer is checked when it arrives. At most 2 · LAYERS_A_READ layers of a chunk are in memory, unless it is kept.

Threads only read and take checksums, which lets other threads run: buffers are made, and tensors formed in them, by the
thread that asks. With 8 threads that make tensors, Python's lock costs more than the reading. That thread makes few
calls for the same reason: each may have to wait for the lock.

Shapes: n tokens of the chunk, Hkv KV heads, D head_dim, W width of a row.
"""

from __future__ import annotations

import logging
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import cached_property
from typing import Protocol, TypeVar

import torch

from ..kv.chunk import ChunkKV, ChunkLost, Provenance, in_memory
from ..kv.ids import Ids
from ..kv.rows import KV, pins_memory
from .counts import StoreCounts
from .format import MOST_UNASKED, Contents, CorruptEntry, Place, QuantisedPlace, memory_of, views_of
from .requests import Requests, completed

logger = logging.getLogger(__name__)

T = TypeVar("T")
Places = Sequence[Place | QuantisedPlace]

LAYERS_A_READ = 4  # neighbours in the file; each read costs a turn of Python's lock, or a request


class Source(Protocol):
    """The file of one chunk, with requests to it."""

    requests: Requests

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fills a buffer with the bytes from `start` on; raises `CorruptEntry` if the file ends before, or goes on."""
        ...

    def tier(self, start: int) -> str:
        """Returns where the bytes from `start` on are read from, of `hfblend.controller.TIERS`."""
        ...

    def begin(self, read: Callable[[], T]) -> Future[T]:
        """Calls `read` in a thread, soon."""
        ...


class LayerwiseChunk:
    """A chunk in a file whose header has been checked. A `Reader`.

    The store's `counts` grow by what is read; `lost` is called with an error and its places before `ChunkLost` is
    raised: at once, if positions or ids that came with the header are damaged. Very many are read when asked for.
    """

    def __init__(
        self, source: Source, contents: Contents, counts: StoreCounts, lost: Callable[[Exception, Places], None]
    ) -> None:
        self._source, self._contents, self._counts, self._lost = source, contents, counts, lost
        self._ahead: dict[int, Future[list[torch.Tensor]]] = {}  # of a run of layers, by its number
        self._latest: tuple[int, list[torch.Tensor]] | None = None
        self._kept: dict[int, torch.Tensor] | None = None
        self._whole: Callable[[ChunkKV], None] = lambda chunk_kv: None
        self.provenance: Provenance = contents.provenance
        self.regime, self.quantised = contents.regime, contents.quantised
        self.num_behind = contents.places["behind_ids"].shape[0]
        self.origin, self.layouts, self.num_layers = contents.origin, contents.layouts, len(contents.layouts)
        self.dtype, self.num_bytes, self.scope = contents.layers[0].dtype, contents.num_bytes, contents.scope
        if contents.first_stop <= MOST_UNASKED:
            _ = self.cached_positions, self.behind_ids

    def __len__(self) -> int:
        return self._contents.places["cached_positions"].shape[0]

    @cached_property
    def cached_positions(self) -> torch.Tensor:
        """The tokens' positions when cached (n,). Raises `ChunkLost` as `layer` does."""
        return self._small("cached_positions", self._contents.positions_of)

    @cached_property
    def behind_ids(self) -> Ids:
        """The ids before them. Raises `ChunkLost` as `layer` does."""
        return self._small("behind_ids", lambda ids: Ids.from_bytes(memory_of(ids)))

    @property
    def ids(self) -> array[int]:
        """Its own ids; none in files of earlier versions."""
        return self._contents.own_ids

    def tier_beside(self, device: torch.device) -> str:
        """Returns where its last layer is read from: a file is rarely in part in the system's RAM."""
        return self._source.tier(self._contents.layers[-1].start)

    def layer(self, layer_idx: int) -> KV:
        """Returns keys and values (1, Hkv, n, D), packed in rows, in RAM (pinned if there is a GPU).

        Raises `ChunkLost` if they cannot be read, or are damaged.
        """
        return self.layouts[layer_idx].views(self.rows(layer_idx)[None])

    def rows(self, layer_idx: int) -> torch.Tensor:
        """Returns the rows (n, W) of `layer`."""
        if self._kept is not None and layer_idx in self._kept:
            return self._kept[layer_idx]
        run, at = divmod(layer_idx, LAYERS_A_READ)
        if self._latest is None or self._latest[0] != run:
            self.prefetch(layer_idx)
            start = run * LAYERS_A_READ
            try:
                self._latest = run, self._source.requests.answer("read from", self._ahead.pop(run))
            except (OSError, CorruptEntry) as error:
                raise self._given_up(error, self._contents.layers[start : start + LAYERS_A_READ]) from error
            if self._kept is not None:  # neighbours that were not asked for, too: some rules never ask for layer 0
                self._kept.update(enumerate(self._latest[1], start))
                if len(self._kept) == self.num_layers:
                    self._whole(in_memory(self))
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

    def _given_up(self, error: Exception, places: Places) -> ChunkLost:
        self._lost(error, places)
        return ChunkLost(self._contents.key, str(error))

    def _begun(self, places: Places) -> Future[list[torch.Tensor]]:
        """Begins to read adjacent layers; reads them now if the process can start no thread."""
        try:
            return self._source.begin(self._to_read(places))
        except RuntimeError:  # the process is ending, or may have no more threads
            return completed(self._to_read(places))  # another buffer: what was begun may be read all the same

    def _small(self, name: str, as_asked: Callable[[torch.Tensor], T]) -> T:
        """Returns a tensor that is not a layer: now, if it came with the header, else once a thread has read it."""
        place = self._contents.places[name]
        try:
            if place.stop <= MOST_UNASKED:
                return as_asked(self._read(place))
            return as_asked(self._source.requests.answer("read from", self._begun([place]))[0])
        except (OSError, CorruptEntry) as error:
            raise self._given_up(error, [place]) from error

    def _read(self, place: Place) -> torch.Tensor:
        data = torch.empty(place.stop - place.start, dtype=torch.uint8)
        memory = data.numpy().data
        self._source.fill(memory, place.start)
        place.require_whole(memory)
        return place.tensor(data)

    def _to_read(self, places: Places) -> Callable[[], list[torch.Tensor]]:
        """Makes a buffer for adjacent layers, and returns a thread's work: fills it and returns the layers' rows, or
        raises if the chunk has been given up."""
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
