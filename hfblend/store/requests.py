"""Requests to something far away: some at once, none that waits for ever, and none for a while once it fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, TypeVar

from ..locks import Mutex

T = TypeVar("T")
R = TypeVar("R")

REQUESTS = 32  # of a store at once; as many again for writing. A disk's 12 would leave a line idle while they travel.


class Breaker:
    """Opens for `pause_s` after so many failures in a row; the first one after that opens it again.

    What was begun and still waits is dropped when it opens, and nothing is begun before it closes.

    Args:
        most: requests at once.
    """

    def __init__(self, max_failures: int, pause_s: float, most: int) -> None:
        self.max_failures, self.pause_s = max_failures, pause_s
        self._failures, self._until = 0, 0.0
        self._lock = Mutex()
        self._threads = DaemonThreads(most, "hfblend-remote")

    def begin(self, request: Callable[[], T]) -> Future[T]:
        """Starts a request; one that is cancelled while it is open."""
        if not self.is_open:
            return self._threads.begin(request)
        dropped: Future[T] = Future()
        dropped.cancel()
        return dropped

    @property
    def is_open(self) -> bool:
        """Whether nothing is to be asked for."""
        return time.monotonic() < self._until

    def failed(self) -> bool:
        """Counts a failure; whether that one opens it."""
        with self._lock:
            self._failures += 1
        return self._failures >= self.max_failures and self.open()

    def open(self) -> bool:
        """Opens it at once; whether it was closed, so that of several threads one tells."""
        with self._lock:
            was_open = self.is_open
            self._failures, self._until = self.max_failures, time.monotonic() + self.pause_s
        self._threads.drop()
        return not was_open

    def worked(self) -> None:
        """Forgets the failures before, unless it has opened since that was asked."""
        with self._lock:
            if not self.is_open:
                self._failures = 0


def at_once(call: Callable[[T], R], many: Iterable[T]) -> Iterator[R]:
    """The answers of a call to each, in order, up to `REQUESTS` at once."""
    threads = DaemonThreads(REQUESTS, "hfblend-remote")
    begun = deque(threads.begin(partial(call, one)) for one in many)
    try:
        while begun:
            yield begun.popleft().result()
    except CancelledError as error:
        raise OSError("the process can have no more threads") from error


class DaemonThreads:
    """Up to `most` threads, which never keep a process from ending, and end themselves when nothing waits for them.

    A ThreadPoolExecutor's are joined when the process ends, one that hangs included.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._at_work: set[threading.Thread] = set()
        self._lock = Mutex()

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Calls in a thread, behind what was begun before; cancelled where no thread is to be had."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, call))
            if len(self._at_work) < self._most:
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                with contextlib.suppress(RuntimeError):  # the process may have no more of them
                    thread.start()
                    self._at_work.add(thread)
            if not self._at_work:
                self._waiting.clear()
                future.cancel()
        return future

    def drop(self) -> None:
        """Cancels what waits; a thread that hangs takes no other's place from now on."""
        with self._lock:
            for future, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._at_work.clear()

    def _work(self) -> None:
        this = threading.current_thread()
        while True:
            with self._lock:
                if this not in self._at_work or not self._waiting:
                    self._at_work.discard(this)
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call  # and what they hold
