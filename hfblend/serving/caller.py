"""The caller of the request that is being answered, set by the gate and read by the app."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        namespace: of the store and of blocks; chosen by the API key.
    """

    namespace: str = ""


caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 (it is frozen)
