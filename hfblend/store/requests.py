"""Requests to a store's files: to a disk at once; to a remote in threads, none endless, and none while it fails."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, TypeVar

from ..locks import Mutex
from .counts import StoreCounts

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

REQUESTS = 32  # of a store at once; as many again for writing. A disk's 12 would leave a line idle while they travel.
LATE = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)  # one and the same from Python 3.11 on


class Requests:
    """Reads, or writes, of one store. Failures are logged, counted, and `OSError`s; one that repeats is logged once.

    Without a timeout, the thread that asks makes them. With one, other threads do: after one late answer, or
    `max_failures` errors in a row, none is made for `pause_s`. The first error after a pause begins another. When one
    begins, requests that still wait are dropped.

    Args:
        answers: exceptions that are an answer, not a failure: the file is missing, or damaged.

    Attributes:
        siblings: all that pause when one of them is late.
    """

    def __init__(
        self, where: str, counts: StoreCounts, answers: tuple[type[Exception], ...] = (),
        *, timeout_s: float | None = None, pause_s: float = 0.0, max_failures: int = 1,
    ) -> None:  # fmt: skip
        self._where, self._counts, self._answers = where, counts, answers
        self._timeout_s, self._pause_s, self._max_failures = timeout_s, pause_s, max_failures
        self._failures, self._until = 0, 0.0
        self._said, self._pause_said = "", False  # in the log since the last answer
        self._lock, self._threads = Mutex(), None if timeout_s is None else DaemonThreads(REQUESTS, "hfblend-remote")
        self.siblings: tuple[Requests, ...] = (self,)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is asked for the time being."""
        return time.monotonic() < self._until

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Starts a request; it is cancelled during a pause."""
        if self._threads is None:
            return completed(call)
        if not self.is_paused:
            return self._threads.begin(call)
        dropped: Future[T] = Future()
        dropped.cancel()
        return dropped

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """Returns the answer to a request; raises as `answer`."""
        return self.answer(what, self.begin(call))

    def answer(self, what: str, begun: Future[T], within_s: float | None = None) -> T:
        """Returns the answer to a request that has begun; `what` is its kind, as "read from".

        Raises one of `answers`, or `OSError` if none comes within so many seconds (default, the timeout) or in a pause.
        """
        within_s = within_s or self._timeout_s
        try:
            if self.is_paused and not begun.done():
                raise CancelledError
            answer = begun.result(within_s)
        except CancelledError:
            raise OSError(f"{self._where} is left alone") from None
        except self._answers:
            self._succeeded()
            raise
        except (Exception, asyncio.CancelledError) as error:  # every filesystem raises others
            is_late = isinstance(error, LATE)
            reason = f"no answer within {within_s:g} s" if is_late and within_s else f"{type(error).__name__}: {error}"
            self._counts.add(failed=1)
            if self._said != reason:
                logger.warning("A chunk's KV could not be %s %s: %s", what, self._where, reason)
            self._said = reason
            self._failed(is_late)
            raise OSError(reason) from error
        finally:
            del begun  # or a frame of what it raised would hold it, and so the whole pass
        self._succeeded()
        return answer

    def _succeeded(self) -> None:
        """Forgets earlier failures, unless a pause has begun since the request was made."""
        if self._failures or self._said:
            with self._lock:
                if not self.is_paused:
                    self._failures, self._said, self._pause_said = 0, "", False

    def _failed(self, is_late: bool) -> None:
        if self._threads is None:
            return
        with self._lock:
            self._failures += 1
        pausing = self.siblings if is_late else (self,) if self._failures >= self._max_failures else ()
        was_said = any(one._pause_said for one in self.siblings)
        if sum(one._pause() for one in pausing) and not was_said:
            logger.warning("%s is left alone for %g s; chunks are prefilled.", self._where, self._pause_s)

    def _pause(self) -> bool:
        """Begins a pause; returns whether there was none, so that of several threads one logs it."""
        with self._lock:
            was_paused = self.is_paused
            self._failures, self._until = self._max_failures, time.monotonic() + self._pause_s
            self._pause_said = True
        assert self._threads is not None
        self._threads.drop()
        return not was_paused


def completed(call: Callable[[], T]) -> Future[T]:
    """Makes a call; returns its answer or exception as a thread would."""
    future: Future[T] = Future()
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error.with_traceback(None))  # whose frames would hold the future, and it the error
    return future


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
    """Up to `most` threads, which never keep a process from ending, and end when nothing waits for them.

    A ThreadPoolExecutor's are joined when the process ends, one that hangs included, and it starts none after that.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._at_work: set[threading.Thread] = set()
        self._lock = Mutex()

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Queues a call; it is cancelled if the process can start no thread for it."""
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
