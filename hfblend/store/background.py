"""Entries on their way into other stores, written by a thread that lives as long as there are any.

put       first store ──┬── back to the caller, who computes on
thread                  └── to RAM, during the GPU's work ── store in RAM ── folder ── remote        one by one
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kv.chunk import ChunkKV
from ..kv.rows import KV, full_length_cache
from ..kv.streams import on_stream
from ..locks import Condition
from .base import Store
from .format import rows_of
from .memory import MemoryStore
from .sizes import num_bytes_of

logger = logging.getLogger(__name__)

_RAM = torch.device("cpu")


class Background:
    """Puts entries into stores, in the order in which they come.

    The thread is no daemon, so a process that ends writes what waits; it ends with the last entry, so it need not be
    stopped. (A ThreadPoolExecutor's would idle on.) In a forked process nothing waits: its parent writes it.

    Args:
        max_bytes: of entries that may wait, though one entry always may; a number or `"4GB"`.
    """

    def __init__(self, max_bytes: int | str) -> None:
        self.max_bytes = num_bytes_of(max_bytes)
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Makes it as new: nothing waits, and no thread holds a lock."""
        self.at_work = threading.RLock()  # held by the thread while it is inside of a store
        self._changed = Condition()
        self._jobs: deque[_Job] = deque()
        self._entries: dict[str, ChunkKV] = {}  # key -> the newest that waits
        self._thread: threading.Thread | None = None
        self._is_working = False
        self.num_bytes = 0  # of what waits

    def put(self, key: str, chunk_kv: ChunkKV, stores: Sequence[Store]) -> None:
        """Writes an entry soon; now, in the caller's thread, if too much is waiting."""
        job = _Job(key, chunk_kv, stores)
        if not self._queued(job):
            with self._changed:  # an older entry of the key must not come last
                self._changed.wait_for(lambda: key not in self._entries)
            job.run()

    def offer(self, key: str, chunk_kv: ChunkKV, stores: Sequence[Store]) -> None:
        """Writes an entry soon, unless too much is waiting or this is."""
        if key not in self._entries:
            self._queued(_Job(key, chunk_kv, stores))

    def get(self, key: str) -> ChunkKV | None:
        """Returns the newest waiting entry of that key."""
        return self._entries.get(key)

    def keys(self) -> list[str]:
        """Returns the keys that wait."""
        with self._changed:
            return list(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def flush(self) -> None:
        """Returns once all that waits now is written."""
        with self._changed:
            if self._jobs:
                last = self._jobs[-1]
                self._changed.wait_for(lambda: last not in self._jobs or not self._has_thread())

    def close(self) -> None:
        """Returns once all is written and the thread has ended; the next entry starts another."""
        self.flush()
        if self._thread is not None:
            self._thread.join()

    def _queued(self, job: _Job) -> bool:
        with self._changed:
            is_full = self._jobs and self.num_bytes + job.chunk_kv.held_bytes > self.max_bytes
            if is_full or not self._has_thread():
                return False
            self._jobs.append(job)
            self._entries[job.key] = job.chunk_kv
            self.num_bytes += job.chunk_kv.held_bytes
        return True

    def _has_thread(self) -> bool:
        """Whether a thread is at work; starts one if none is, or an exception has ended it."""
        if self._is_working and self._thread is not None and self._thread.is_alive():
            return True
        thread = threading.Thread(target=self._work, name="hfblend-store", daemon=False)
        try:
            thread.start()
        except RuntimeError:  # the process is ending, or may have no more threads
            return False
        self._thread, self._is_working = thread, True
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._is_working = False
                    return
                job = self._jobs[0]
            with self.at_work:
                job.run()
            with self._changed:
                self._jobs.popleft()
                self.num_bytes -= job.chunk_kv.held_bytes
                if self._entries.get(job.key) is job.chunk_kv:
                    del self._entries[job.key]
                self._changed.notify_all()
            del job  # and its memory


class _Job:
    """An entry and its stores to come. Made in the thread that has computed it or read it."""

    def __init__(self, key: str, chunk_kv: ChunkKV, stores: Sequence[Store]) -> None:
        self.key, self.chunk_kv, self.stores = key, chunk_kv, stores
        devices: set[torch.device] = {chunk_kv.layer(i)[0].device for i in range(chunk_kv.num_layers)}
        devices |= {place for store in stores if (place := _place_in(store)) is not None}
        gpus = [device for device in devices if device.type == "cuda"]
        self._streams = {gpu: torch.cuda.current_stream(gpu) for gpu in gpus}
        self._ready = [stream.record_event() for stream in self._streams.values()]

    def run(self) -> None:
        """Puts it everywhere; what fails is logged."""
        copies: dict[torch.device | None, ChunkKV] = {None: self.chunk_kv}
        for store in self.stores:
            place = _place_in(store)
            try:
                if place not in copies:
                    copies[place] = self._at(place)
                store.put(self.key, copies[place])
            except Exception as error:  # every store raises others
                logger.warning("A chunk's KV could not be put into a %s: %s", type(store).__name__, error)

    def _at(self, place: torch.device | None) -> ChunkKV:
        """Returns the entry on that device, every byte of it."""
        if place is None or _lies_in(self.chunk_kv, place):
            return self.chunk_kv
        in_ram = self.chunk_kv if _lies_in(self.chunk_kv, _RAM) else self._in_ram()
        return in_ram if place == _RAM else self._on_gpu(in_ram, place)

    def _in_ram(self) -> ChunkKV:
        """Copies it as soon as it is computed, while the GPUs go on with later work."""
        for gpu, ready in zip(self._streams, self._ready):
            _copying(gpu).wait_event(ready)
        layers = map(self.chunk_kv.layer, range(self.chunk_kv.num_layers))
        rows = [on_stream(_copying(kv[0].device) if kv[0].is_cuda else None, _pinned_rows, kv) for kv in layers]
        for gpu in self._streams:
            _wait_for(_copying(gpu))
        return _around(rows, self.chunk_kv)

    def _on_gpu(self, in_ram: ChunkKV, gpu: torch.device) -> ChunkKV:
        """Copies into memory of the caller's stream, so that it is reused only after that stream's reads of it."""
        stream = self._streams[gpu]
        sources = [rows_of(in_ram.layer(i)) for i in range(in_ram.num_layers)]
        rows = [on_stream(stream, torch.empty_like, source, device=gpu) for source in sources]
        _copying(gpu).wait_event(stream.record_event())
        for target, source in zip(rows, sources):
            on_stream(_copying(gpu), target.copy_, source, non_blocking=True)
        _wait_for(_copying(gpu))
        return _around(rows, in_ram)


def _place_in(store: Store) -> torch.device | None:
    """Returns the device on which a store has its entries' tensors, or from which it writes them; `None`: any."""
    return store.device if isinstance(store, MemoryStore) else _RAM


def keeps_unchanged(store: Store, chunk_kv: ChunkKV) -> bool:
    """Whether a store takes an entry without moving a byte of it."""
    return isinstance(store, MemoryStore) and (store.device is None or _lies_in(chunk_kv, store.device))


def _lies_in(chunk_kv: ChunkKV, place: torch.device) -> bool:
    return all(chunk_kv.layer(i)[0].device == place for i in range(chunk_kv.num_layers))


def _pinned_rows(kv: KV) -> torch.Tensor:
    """Returns the rows (n, W) in pinned memory; they are there once the current stream's copy is done."""
    rows = rows_of(kv)
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)


def _around(rows: Sequence[torch.Tensor], like: ChunkKV) -> ChunkKV:
    """Returns an entry as `like` whose layers are these rows (n, W)."""
    return replace(like, cache=full_length_cache(layout.views(one[None]) for layout, one in zip(like.layouts, rows)))


@functools.cache
def _copying(gpu: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(gpu)


def _wait_for(stream: torch.cuda.Stream) -> None:
    done = torch.cuda.Event(blocking=True)
    done.record(stream)
    done.synchronize()


# --- the process --------------------------------------------------------------------------------------------------

_all: weakref.WeakSet[Background] = weakref.WeakSet()
_held: list[Background] = []
_forking = threading.Lock()  # threads that fork at once do so in turn: they would let go each other's


def _hold() -> None:
    """Makes a fork wait until no entry is being written: the child would find a store's locks taken for good."""
    _forking.acquire()
    _held.extend(_all)
    for one in _held:
        one.at_work.acquire()


def _let_go(in_child: bool = False) -> None:
    for one in _held:
        one.forget() if in_child else one.at_work.release()
    _held.clear()
    _forking.release()


@atexit.register
def _flush_all() -> None:
    """Writes what other functions have put at exit; earlier threads have been waited for."""
    for one in list(_all):
        one.flush()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=functools.partial(_let_go, True))
