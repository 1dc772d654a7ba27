"""Who may run a model's forward while its attention is switched."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class ForwardLock:
    """Many stock forwards of a model at once, or one pass that has its attention switched.

    The holder of the exclusive side may take either side again (a pass may run the whole model).
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shared = 0
        self._owner: int | None = None

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            nested = self._owner == me
            if not nested:
                self._changed.wait_for(lambda: self._owner is None)
                self._shared += 1
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._shared -= 1
                    self._changed.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            nested = self._owner == me
            if not nested:
                self._changed.wait_for(lambda: self._owner is None and self._shared == 0)
                self._owner = me
        try:
            yield
        finally:
            if not nested:
                with self._changed:
                    self._owner = None
                    self._changed.notify_all()
