"""An answer on its way out: errors in OpenAI's form, streams that end well."""

from __future__ import annotations

import re

import anyio
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send

from . import checks
from .checks import Refused
from .telemetry import Watched

_LAST_WORD_S = 5.0  # for an error at a deadline, to a client that may have stopped reading


class Answer:
    """What a client gets, from the app or, as `fail`, from the gate.

    Errors of the app are held until they are whole, and get OpenAI's form. A whole stream ends with `[DONE]`; one with
    an error does not, so that `[DONE]` says that nothing is missing. The end of a stream waits until the app returns:
    `BaseHTTPMiddleware` ends a stream that failed as if it were whole, and raises only then.

    Attributes:
        is_whole: the app has given all of it.
        is_closed: to the app.
    """

    def __init__(self, send: Send, request_id: str, needs_done: bool, watched: Watched) -> None:
        self._send, self._id, self._needs_done, self._watched = send, request_id, needs_done, watched
        self.is_whole = self.is_closed = self._is_started = False
        self._head: Message | None = None
        self._held: bytearray | None = None
        self._events: _Events | None = None

    async def take(self, message: Message) -> None:
        """Passes on a message: the app's `send`."""
        if self.is_closed or self.is_whole:
            raise OSError("This answer is over: it is whole, the client has left, or the deadline has passed.")
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self._head is not None:
            await self._go_on(self._head, message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"The gate passes on a start, and then a body, got {message['type']!r}.")

    async def _begin(self, message: Message) -> None:
        headers, status = MutableHeaders(raw=[*message.get("headers", ())]), message["status"]
        headers["x-request-id"] = self._id
        self._head = {"type": "http.response.start", "status": status, "headers": headers.raw}
        if headers.get("content-type", "").startswith("text/event-stream") and "content-encoding" not in headers:
            self._events = _Events(status == 200 and self._needs_done)
            del headers["content-length"]  # the end may be ours
        elif status >= 400:
            self._held = bytearray()
            return
        await self._start(self._head)

    async def _go_on(self, head: Message, body: bytes, more: bool) -> None:
        if self._held is not None:
            self._held += body
            if not more:
                await self._answer(head["status"], checks.in_openai_form(head["status"], bytes(self._held)),
                                   MutableHeaders(raw=head["headers"]))  # fmt: skip
        elif self._events is not None:
            self._events.add(body)
            await self._write(body, True)
        else:
            await self._write(body, more)
        self.is_whole = not more

    async def finish(self, within_s: float) -> None:
        """Ends a whole answer, once the app has returned."""
        with anyio.move_on_after(max(within_s, _LAST_WORD_S)):
            if self._events is not None:
                await self._write(self._events.ending(), False)

    async def fail(self, refused: Refused) -> None:
        """Sends an error in the way that is left; if none is, the server closes the connection in mid-answer."""
        with anyio.move_on_after(_LAST_WORD_S):
            if not self._is_started:
                headers = MutableHeaders({**refused.headers, "x-request-id": self._id})
                await self._answer(refused.status, refused.body, headers)
            elif self._events is not None:
                await self._write(b"\n\ndata: " + refused.body + b"\n\n", False)  # after an event cut short, too

    async def _answer(self, status: int, body: bytes, headers: MutableHeaders) -> None:
        headers["content-type"], headers["content-length"] = "application/json", str(len(body))
        del headers["content-encoding"]
        await self._start({"type": "http.response.start", "status": status, "headers": headers.raw})
        await self._write(body, False)

    async def _start(self, message: Message) -> None:
        await self._send(message)
        self._is_started, self._watched.status = True, message["status"]

    async def _write(self, body: bytes, more: bool) -> None:
        if body:
            self._watched.byte_sent()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


class _Events:
    """A stream of server-sent events, and what it lacks at its end.

    Args:
        needs_done: whether `[DONE]` ends it.
    """

    _LAST = re.compile(rb'(?m)^data: ?\[DONE\]|^event: ?error|^data: ?\{"error"')

    def __init__(self, needs_done: bool) -> None:
        self._needs_done, self._open, self._is_over = needs_done, b"", False

    def add(self, chunk: bytes) -> None:
        """Takes a piece of the stream, which may end anywhere."""
        *whole, self._open = (self._open + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        self._is_over = self._is_over or any(map(self._LAST.search, whole))

    def ending(self) -> bytes:
        """The end of the last event, and `[DONE]`, unless the app has sent it or an error."""
        is_over = self._is_over or self._LAST.search(self._open) or not self._needs_done
        return (b"\n\n" if self._open.strip() else b"") + (b"" if is_over else b"data: [DONE]\n\n")
