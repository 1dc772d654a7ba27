"""An answer of a replica, passed on; another replica goes on if the first one dies.

Call    a request, so that it can be sent again
played  the answer of an app to a call, in the process of the app
Sent    the events that a client has: a repeated answer is cut to those that it lacks
Relay   the ASGI app of a process without a model
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .caller import Caller, caller
from .checks import error_body
from .routing import chunks_in

logger = logging.getLogger(__name__)

_ATTEMPTS = 4
_HEADERS = (b"content-type", b"x-request-id")  # for the app; keys stay here
_CHANNELS = ("content", "reasoning_content", "text", "tool_calls")


@dataclass(frozen=True)
class Call:
    """A request in a plain form.

    Attributes:
        caller: as the gate has found.
        chunks: hashes, by which a replica is chosen.
    """

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    caller: Caller = field(default_factory=caller.get)
    chunks: frozenset[int] = frozenset()

    @property
    def is_repeatable(self) -> bool:
        """Whether the same answer can be expected again: a greedy or a seeded one.

        Without a temperature the model's default counts, which is not known here. If that samples, a repeated answer
        differs from what was sent, which is noticed.
        """
        with suppress(ValueError, AttributeError, RecursionError):
            asked = json.loads(self.body)
            return asked.get("seed") is not None or not asked.get("temperature")
        return True

    def scope(self) -> Scope:
        """The ASGI scope of the call."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
            "method": self.method, "path": self.path, "raw_path": self.path.encode(), "root_path": "",
            "query_string": self.query, "headers": self.headers, "client": None, "server": None,
        }  # fmt: skip


async def played(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """Yields an app's messages; ends its task if nobody wants more of them."""
    messages, bodies = asyncio.Queue[Message | None](), [{"type": "http.request", "body": call.body}]

    async def receive() -> Message:
        return bodies.pop() if bodies else await asyncio.Future()  # the client's leaving cancels the task

    token = caller.set(call.caller)
    task = asyncio.ensure_future(app(call.scope(), receive, messages.put))
    caller.reset(token)
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:  # after its answer, a 500
            logger.error("A request failed.", exc_info=task.exception())


class Differs(RuntimeError):
    """A repeated answer is not the one of which the client has the beginning."""


class Sent:
    """A streamed answer as far as its client has it."""

    def __init__(self) -> None:
        self._id: str | None = None
        self._created: Any = None
        self._said, self._ahead = dict.fromkeys(_CHANNELS, ""), dict.fromkeys(_CHANNELS, "")
        self._is_repeated = False

    @property
    def has_text(self) -> bool:
        """Whether more than the head of the answer was sent."""
        return any(self._said.values())

    def repeat(self) -> None:
        """From now on, events are those of another run."""
        self._is_repeated, self._ahead = True, dict(self._said)

    def news(self, event: bytes) -> bytes:
        """Returns the part of an event that the client lacks, under the answer's first id; empty if it has all.

        Raises:
            Differs: the event is not what was sent.
        """
        data = _json_of(event)
        if data is None or "choices" not in data:
            return event
        if self._id is None:
            self._id, self._created = data["id"], data.get("created")
        if self._is_repeated:  # the ids of tool calls begin with the answer's, too
            data = json.loads(json.dumps(data).replace(data["id"], self._id)) | {"created": self._created}
        says = not data["choices"]
        for choice in data["choices"]:
            said = self._cut(choice.get("delta", choice))  # completions have no delta
            if choice.get("finish_reason") and any(self._ahead.values()):
                raise Differs("it is shorter than what was sent")
            says = says or said or bool(choice.get("finish_reason"))
        if not self._is_repeated:
            return event
        return b"data: " + json.dumps(data).encode() if says else b""

    def _cut(self, delta: dict[str, Any]) -> bool:
        """Takes off what was sent; returns whether anything is left."""
        says = False
        for channel in _CHANNELS:
            if not (value := delta.get(channel)):
                continue
            text = value if isinstance(value, str) else json.dumps([one["function"] for one in value])
            count = min(len(text), len(self._ahead[channel]))
            if text[:count] != self._ahead[channel][:count]:
                raise Differs(f"its {channel} is not what was sent")
            self._ahead[channel] = self._ahead[channel][count:]
            self._said[channel] += text[count:]
            if count:
                delta[channel] = text[count:] if isinstance(value, str) else None
            says = says or count < len(text)
        return says


def _json_of(event: bytes) -> Any:
    """The object of an event; `None` if it has none, as `[DONE]`."""
    return json.loads(event.removeprefix(b"data:")) if event.startswith((b"data: {", b"data:{")) else None


class _Answer:
    """The client's side: heads and whole answers wait until they are complete, events are passed on."""

    def __init__(self, send: Send) -> None:
        self._send, self.sent = send, Sent()
        self.is_started = self.is_whole = False
        self.repeat()

    def repeat(self) -> None:
        """From now on, messages are those of another run."""
        self._head: Message = {}
        self._held = b""
        if self.is_started:
            self.sent.repeat()

    async def take(self, message: Message) -> None:
        """Passes on a message."""
        if message["type"] == "http.response.start":
            self._head = message
            return
        self._held += message.get("body", b"")
        more = message.get("more_body", False)
        self.is_whole = not more
        is_stream = Headers(raw=self._head["headers"]).get("content-type", "").startswith("text/event-stream")
        if is_stream:
            await self._pass_events(more)
        elif self.is_started:
            raise Differs(f"it failed with status {self._head['status']}")
        elif not more:
            await self._write(self._held, False)

    async def _pass_events(self, more: bool) -> None:
        *events, self._held = self._held.split(b"\n\n")
        news = [new for event in events if (new := self.sent.news(event))]
        if news or not more:
            await self._write(b"".join(new + b"\n\n" for new in news) + (b"" if more else self._held), more)

    async def _write(self, body: bytes, more: bool) -> None:
        if not self.is_started:
            self.is_started = True
            await self._send(self._head)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def fail(self, why: str) -> None:
        """Says that there is no (further) answer."""
        error = error_body(503, why, "replica_lost")
        if self.is_started:
            await self._write(b"data: " + error + b"\n\n", False)
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"2")]
        self._head = {"type": "http.response.start", "status": 503, "headers": headers}
        await self._write(error, False)


class Relay:
    """Passes requests on to replicas.

    An answer that was lost with its replica is asked for again. If the client has its beginning, only one that is
    greedy or seeded is, and the client gets what it lacks.

    Args:
        ask: sends a call to a replica, and yields its messages.
        lost: the exceptions of `ask` when a replica is lost.
        separator: of chunks in plain prompts.
    """

    def __init__(
        self, ask: Callable[[Call], AsyncGenerator[Message]], lost: tuple[type[Exception], ...],
        separator: str | None = None,
    ) -> None:  # fmt: skip
        self.ask, self.lost, self.separator = ask, lost, separator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        chunks = chunks_in(body, caller.get().namespace, self.separator)
        headers = [(name, value) for name, value in scope["headers"] if name in _HEADERS]
        head = (scope["method"], scope["path"], scope["query_string"], headers)
        await self._answer(Call(*head, body, chunks=chunks), _Answer(send))

    async def _answer(self, call: Call, answer: _Answer) -> None:
        for _ in range(_ATTEMPTS):
            try:
                async with aclosing(self.ask(call)) as messages:
                    async for message in messages:
                        await answer.take(message)
                if not answer.is_whole:
                    await answer.fail("The replica failed at this request.")
                return
            except self.lost as error:
                logger.warning("A replica was lost with a request: %s", type(error).__name__)
                if answer.sent.has_text and not call.is_repeatable:
                    return await answer.fail(
                        "The replica was lost in mid-answer. The answer was sampled without a seed, so that no other "
                        "replica can go on with it: ask again, with a seed or temperature 0 to be safe."
                    )
                answer.repeat()
            except Differs as error:
                return await answer.fail(f"The replica was lost, and another one's answer does not go on: {error}.")
        await answer.fail(f"{_ATTEMPTS} replicas were lost with this request.")
