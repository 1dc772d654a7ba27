"""A chunk read from its file a layer at a time, ahead of the pass that needs it.

    the pass asks for layer     0           1           2
    threads are at              1 2 3 4     2 3 4 5     3 4 5 6        of every chunk of the prompt at once

A layer is checked when it arrives. At most LAYERS_AHEAD + 1 layers of a chunk are in memory, unless it is kept.

Shapes: n tokens of the chunk, Hkv KV heads, D head_dim, W width of a row.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO

import torch

from ..caches import KV, RowLayout, full_length_cache
from ..chunks import ChunkKV, ChunkLost, Provenance
from .counts import StoreCounts
from .format import Contents, CorruptEntry, Place

logger = logging.getLogger(__name__)

LAYERS_AHEAD = 4
READERS = 8  # threads, of all stores of the process together


class LayerwiseChunk:
    """A chunk in a file whose header has been checked. A `Reader`.

    Args:
        stream: the file; it stays open, so that the chunk can be read on when its name is gone.
        contents: of the file.
        counts: of the store; what is read is added.
        lost: called when a layer turns out to be damaged, before `ChunkLost` is raised.

    Raises:
        CorruptEntry: positions or ids are not what was written.
        OSError: they cannot be read.
    """

    def __init__(
        self, stream: FileIO, contents: Contents, counts: StoreCounts, lost: Callable[[Exception], None]
    ) -> None:
        self._stream, self._contents, self._counts, self._lost = stream, contents, counts, lost
        weakref.finalize(self, stream.close)
        self._reading = threading.Lock()
        self._ahead: dict[int, Future[KV]] = {}
        self._latest: tuple[int, KV] | None = None
        self._kept: dict[int, KV] | None = None
        self._whole: Callable[[ChunkKV], None] = lambda chunk_kv: None
        self.cached_positions = self._read(contents.places["cached_positions"])
        self.behind_ids = tuple(self._read(contents.places["behind_ids"]).tolist())
        self.provenance: Provenance = contents.provenance
        self.regime = contents.regime

    @property
    def layouts(self) -> tuple[RowLayout, ...]:
        return self._contents.layouts

    @property
    def dtype(self) -> torch.dtype:
        return self._contents.layer(0).dtype

    @property
    def num_layers(self) -> int:
        return len(self._contents.layouts)

    @property
    def num_bytes(self) -> int:
        places = map(self._contents.layer, range(self.num_layers))
        return sum(place.stop - place.start for place in places)

    def layer(self, layer_idx: int) -> KV:
        """Keys and values (1, Hkv, n, D), packed in rows, in RAM (pinned beside a GPU).

        Raises:
            ChunkLost: they cannot be read, or are not what was written.
        """
        if self._latest is not None and self._latest[0] == layer_idx:
            return self._latest[1]
        if self._kept is not None and layer_idx in self._kept:
            return self._kept[layer_idx]
        self.prefetch(layer_idx)
        try:
            kv = self._ahead.pop(layer_idx).result()
        except (OSError, CorruptEntry) as error:
            self._lost(error)
            raise ChunkLost(self._contents.key, str(error)) from error
        self._latest = layer_idx, kv
        self._keep(layer_idx, kv)
        return kv

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading this layer and the next few."""
        for i in range(layer_idx, min(layer_idx + LAYERS_AHEAD + 1, self.num_layers)):
            if i not in self._ahead and not (self._kept and i in self._kept):
                self._ahead[i] = _threads().submit(self._read_layer, i)

    def keep(self, whole: Callable[[ChunkKV], None]) -> None:
        """Keeps every layer that is read, and hands the whole chunk over once all of them are there."""
        self._kept, self._whole = {}, whole

    def _keep(self, layer_idx: int, kv: KV) -> None:
        if self._kept is None:
            return
        self._kept[layer_idx] = kv
        if len(self._kept) == self.num_layers:
            cache = full_length_cache(self._kept[i] for i in range(self.num_layers))
            self._whole(ChunkKV(cache, self.cached_positions, self.behind_ids, self.provenance, self.regime))

    def _read_layer(self, layer_idx: int) -> KV:
        rows = self._read(self._contents.layer(layer_idx))
        return self._contents.layouts[layer_idx].views(rows[None])

    def _read(self, place: Place) -> torch.Tensor:
        began = time.perf_counter()
        data = torch.empty(place.stop - place.start, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        with self._reading:
            self._stream.seek(place.start)
            read = 0
            while read < len(data):
                more = self._stream.readinto(data[read:].numpy().data)
                if not more:
                    raise CorruptEntry(f"it ends after {read} of {len(data)} bytes of a tensor")
                read += more
        tensor = place.tensor(data)
        self._counts.add(bytes_read=len(data), read_seconds=time.perf_counter() - began)
        return tensor


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, "hfblend-read")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
