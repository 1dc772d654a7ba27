"""Who may run a model's forward while its attention is switched."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakValueDictionary


class ForwardLock:
    """Many stock forwards of a model at once, or one pass that has its attention switched.

    Whoever has to wait gets his turn in the order of coming: forwards of threads that decode overlap, and would keep a
    pass out for good. The holder of a side may take the shared one again, and of the exclusive side that, too (a pass
    may run the whole model).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()
        self._sharing: dict[int, int] = {}  # thread -> how often it holds the shared side
        self._owner: int | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            if self._owner != me and me not in self._sharing:
                self._wait_in_line(lambda: self._owner is None)
            self._sharing[me] = self._sharing.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing[me] -= 1
                if not self._sharing[me]:
                    del self._sharing[me]
                    self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            nested = self._owner == me
            if not nested:
                self._wait_in_line(lambda: self._owner is None and not self._sharing)
                self._owner = me
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._owner = None
                    self._changed.notify_all()

    def _wait_in_line(self, may_enter: Callable[[], bool]) -> None:
        turn = object()
        self._line.append(turn)
        try:
            self._changed.wait_for(lambda: self._line[0] is turn and may_enter())
        finally:
            self._line.remove(turn)
            self._changed.notify_all()  # the next one may share with this one


_guard = threading.Lock()
_locks: WeakValueDictionary[int, ForwardLock] = WeakValueDictionary()  # id of a config -> its lock


def lock_of(config: Any) -> ForwardLock:
    """The lock of all models that have this very config: attention is switched there."""
    with _guard:
        return _locks.setdefault(id(config), ForwardLock())
