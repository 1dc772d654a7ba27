"""Locks, and changes of a model, that no exception leaves in force.

Ctrl-C raises between any two steps of Python, also where clean-up begins or ends: `finally` alone is not enough.

    claim     counts while the function that made it stands on its thread's stack; a thread that waits looks every 50 ms
    change    is noted together with its undoing before it is made; the next claim undoes leftovers of earlier ones
    context   a pass runs in a copy of its thread's context, which Python itself leaves: a change acts in there only

So leftovers of an exception have no effect at once, and are gone when hfblend is next reached.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_LOOK_S = 0.05
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ABSENT = object()


_holders: dict[CodeType, str] = {}


def keeps_alive(name: str) -> Callable[[F], F]:
    """Decorates a function whose local variable of this name is a `Running`, alive while the function runs."""

    def mark(function: F) -> F:
        _holders[function.__code__] = name
        return function

    return mark


class Running:
    """Work of one thread, alive as long as a function that `keeps_alive` it stands on the thread's stack."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    @keeps_alive("self")
    def do(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Runs the work, and returns its result."""
        return work(*args, **kwargs)

    @property
    def is_alive(self) -> bool:
        return _is_on_stack(self.thread, self._is_at)

    def _is_at(self, frame: FrameType) -> bool:
        return _runs(frame) is self


def innermost() -> Running | None:
    """Returns the `Running` that this call is part of; of several, the last one begun."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and _runs(frame) is None:
        frame = frame.f_back
    return None if frame is None else _runs(frame)


def _runs(frame: FrameType) -> Running | None:
    name = _holders.get(frame.f_code)
    return None if name is None else frame.f_locals.get(name)


def _is_on_stack(thread: int, is_it: Callable[[FrameType], bool]) -> bool:
    frame = sys._getframe() if thread == threading.get_ident() else sys._current_frames().get(thread)
    last = None
    while frame is not None:
        if is_it(frame):
            return True
        last, frame = frame, frame.f_back
    # A generator that was suspended during this look has lost its caller: nothing is known until the next look.
    return last is not None and bool(last.f_code.co_flags & _SUSPENDED)


class _Claim(Running):
    """A place in the line before a lock.

    Attributes:
        alone: whether it shares with no other.
        over: taken as long as the claim lasts.
    """

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone, self.over = alone, threading.Lock()
        self.over.acquire()


class _Line:
    """Claims in the order of coming. Every step on the list is one call of C, so none is done by half."""

    def __init__(self) -> None:
        self._claims: list[Any] = []

    def _enter(self, claim: Any) -> None:
        """Returns once no earlier claim of another thread keeps this one out."""
        self._claims.append(claim)
        if self._claims[0] is claim:
            return
        while (other := self._before(claim)) is not None:
            if other.over.acquire(timeout=_LOOK_S):
                other.over.release()
            elif not other.is_alive:
                self._leave(other)

    def _before(self, claim: Any) -> Any:
        for other in tuple(self._claims):
            if other is claim:
                return None
            if other.thread != claim.thread and (other.alone or claim.alone):
                return other
        return None

    def _leave(self, claim: Any) -> None:
        try:
            self._claims.remove(claim)
            claim.over.release()
        except (ValueError, RuntimeError):  # another thread has found it dead
            pass

    def _own(self) -> list[Any]:
        """Returns the claims of this thread."""
        me = threading.get_ident()
        return [claim for claim in tuple(self._claims) if claim.thread == me]


class ForwardLock(_Line):
    """Many stock forwards of a model at once, or one pass that changes it.

    Waiting threads get their turn in the order of coming, since overlapping forwards of threads that decode would keep
    a pass out for good. The holder of a side may take the shared one again, and the holder of the exclusive side that,
    too (a pass may run the whole model).
    """

    def __init__(self) -> None:
        super().__init__()
        self._undo: list[Callable[[], None]] = []

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds a side of it: it runs inside a forward of the model."""
        return bool(self._claims) and self._is_held()

    @keeps_alive("claim")
    def shared(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Runs some work that needs the model unchanged."""
        if self.is_mine:
            return work(*args, **kwargs)
        claim = _Claim(alone=False)
        try:
            self._enter(claim)
            self._undo_from(0)
            return work(*args, **kwargs)
        finally:
            self._leave(claim)

    @keeps_alive("claim")
    def exclusive(self, work: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """Runs some work in a copied context, alone with the model; its changes are undone afterwards."""
        claim, context, is_inside = _Claim(alone=True), contextvars.copy_context(), self.is_mine
        if not is_inside:
            self._enter(claim)
        elif not self._is_held(alone=True):  # waiting for itself would never end
            raise RuntimeError("A prompt cannot be blended inside a forward of the same model; do it outside.")
        kept = len(self._undo) if is_inside else 0
        try:
            self._undo_from(kept)
            context.run(_passes.set, (*_passes.get(), claim))
            return context.run(work, *args, **kwargs)
        finally:
            self._undo_from(kept)
            self._leave(claim)

    def change(self, names: dict[str, Any], name: str, value: Any) -> None:
        """Sets an attribute until the exclusive work is over, or, if that cannot undo it, until the next claim."""
        before = names.get(name, _ABSENT)
        self.undo_later(functools.partial(put_back, names, name, value, before))
        names[name] = value

    def undo_later(self, undo: Callable[[], None]) -> None:
        """Notes how to undo the next step of exclusive work; `undo` may run twice, and before that step."""
        _changed.add(self)
        self._undo.append(undo)

    def tidy(self) -> None:
        """Undoes the changes of interrupted work, unless a pass runs."""
        if self._undo and not any(claim.alone and claim.is_alive for claim in tuple(self._claims)):
            self.shared(lambda: None)

    def _undo_from(self, kept: int) -> None:
        for undo in reversed(self._undo[kept:]):
            undo()
            with contextlib.suppress(ValueError):  # another thread was quicker
                self._undo.remove(undo)
        if not self._undo:
            _changed.discard(self)

    def _is_held(self, alone: bool = False) -> bool:
        """Whether this thread is inside, on that side."""
        living = []
        for claim in self._own():
            living.append(claim) if claim.is_alive else self._leave(claim)
        return any(claim.alone or not alone for claim in living)


_changed: set[ForwardLock] = set()  # keeps those alive that have something to undo


def put_back(names: dict[str, Any], name: str, value: Any, before: Any = _ABSENT) -> None:
    """Sets an attribute to what it was before, unless it has been set to something else since."""
    if names.get(name, _ABSENT) is not value:
        return
    if before is _ABSENT:
        names.pop(name, None)
    else:
        names[name] = before


_passes: contextvars.ContextVar[tuple[Running, ...]] = contextvars.ContextVar("hfblend_passes", default=())


def only_inside() -> Callable[[], bool]:
    """Returns a function that says whether it is called in the exclusive work, and the thread, of this call."""
    (*_, claim) = _passes.get()

    def is_inside() -> bool:
        return claim in _passes.get() and claim.thread == threading.get_ident()

    return is_inside


class _Held(_Claim):
    """A claim on a `Mutex`, by the frame that holds it.

    It keeps the frame's id, since the frame would keep its variables in memory. Another frame of the same function and
    thread that is given that id comes to the mutex first, and drops this claim there.
    """

    def __init__(self, frame: FrameType) -> None:
        assert not frame.f_code.co_flags & _SUSPENDED, "a generator may stop inside, and its frame leave the stack"
        super().__init__(alone=True)
        self._frame, self._code = id(frame), frame.f_code

    def _is_at(self, frame: FrameType) -> bool:
        return frame.f_code is self._code and id(frame) == self._frame


class Mutex(_Line):
    """`threading.Lock` for `with`, which the next thread gets if an interrupted one has left it locked."""

    def __enter__(self) -> None:
        if self._claims:
            self._drop_own()  # it cannot be inside: an exception has left this
        self._enter(_Held(sys._getframe(1)))

    def __exit__(self, *error: object) -> None:
        self._drop_own()

    def _drop_own(self) -> None:
        for claim in self._own():
            self._leave(claim)


class Condition(Mutex):
    """`threading.Condition` whose waiting threads look by themselves: no interrupted one can leave them waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._gates: list[Any] = []

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Returns, inside `with`, once the condition holds; lets other threads in meanwhile."""
        while not is_so():
            gate = threading.Lock()
            gate.acquire()
            self._gates.append(gate)
            self._drop_own()
            gate.acquire(timeout=_LOOK_S)
            self._enter(_Held(sys._getframe(1)))
            with contextlib.suppress(ValueError):  # nothing has opened it
                self._gates.remove(gate)

    def notify_all(self) -> None:
        """Lets threads that wait look at once."""
        gates, self._gates = self._gates, []
        for gate in gates:
            with contextlib.suppress(RuntimeError):  # an interrupted thread has opened it
                gate.release()


_guard = Mutex()
_locks: WeakValueDictionary[int, ForwardLock] = WeakValueDictionary()  # id of a config -> its lock


def lock_of(config: Any) -> ForwardLock:
    """Returns the lock of all models that share this config object, in which attention is switched."""
    with _guard:
        return _locks.setdefault(id(config), ForwardLock())
