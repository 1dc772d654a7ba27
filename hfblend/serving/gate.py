"""The layer around an app: keys, limits, deadlines, cancellation, whole streams, metrics and spans.

It knows ASGI, not the app. A request goes through in the order of this file:

    key       chooses the namespace; /health needs none, and /metrics needs one of its own
    place     of a bounded number, before the body is read: what clients can make the server hold is bounded, too
    body      JSON in UTF-8, bounded in size, depth and time
    app       in a task that is cancelled when the client leaves or the deadline passes
    answer    errors in OpenAI's form; a stream ends with [DONE] if, and only if, it is whole: never after an error

CORS goes around the gate, so that refusals have its headers, too: `CORSMiddleware(Gate(app), …)`. Requests are bounded
here, not connections: uvicorn's `limit_concurrency` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import checks
from .answer import Answer
from .caller import Caller, caller
from .checks import Refused
from .telemetry import Numbers, Telemetry, Watched

logger = logging.getLogger(__name__)

_STREAMED = ("/v1/chat/completions", "/v1/completions")
_ROUTES = (*_STREAMED, "/v1/models", "/health", "/metrics")  # the others are one in metrics


@dataclass(frozen=True)
class GateSettings:
    """Limits of a gate.

    Attributes:
        keys: API key → namespace, as of `checks.read_api_keys`. None: open to all, all in the namespace "".
        metrics_key: opens /metrics, and nothing else. Without it, /metrics is open if there are no `keys`, else shut:
            a tenant's key does not show the others' traffic, and a proxy on this machine makes every client local.
        max_body_bytes: of one request.
        max_depth: levels of lists and objects in a body.
        read_timeout_s: until a body must be there.
        max_requests: with a body, inside at once, those that wait for the engine included; one more gets a 429.
        max_requests_per_namespace: so that one tenant cannot take all places.
        timeout_s: from a request's head to the end of its answer. The header `x-request-timeout` may ask for less.
        retry_after_s: what a 429 asks for.
    """

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    metrics_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 4 << 20
    max_depth: int = 64
    read_timeout_s: float = 30.0
    max_requests: int = 64
    max_requests_per_namespace: int | None = None
    timeout_s: float = 600.0
    retry_after_s: int = 1

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_depth", "read_timeout_s", "max_requests", "timeout_s", "retry_after_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}.")
        if self.max_requests_per_namespace is not None and self.max_requests_per_namespace < 1:
            raise ValueError(f"max_requests_per_namespace must be above 0, got {self.max_requests_per_namespace!r}.")
        for i, (key, namespace) in enumerate(self.keys.items(), 1):
            checks.require_api_key(key, namespace, f"Entry {i} of keys")
        if self.metrics_key is not None:
            checks.require_api_key(self.metrics_key, "metrics", "metrics_key")
        if self.metrics_key in self.keys:
            raise ValueError("metrics_key must not be one of keys: it shows what all tenants do.")


class Gate:
    """An ASGI app around another one.

    >>> uvicorn.run(Gate(app, GateSettings(keys=read_api_keys())))  # doctest: +SKIP

    The app finds who asks in `caller.caller`. Its task gets a `CancelledError` when nobody waits for the answer any
    more, streamed or not, and must then end what it began.

    Args:
        extra: collectors of prometheus_client for /metrics.
        numbers: of the engine, for /metrics; see `Telemetry`.

    Attributes:
        telemetry: its `registry` takes more collectors, as of `export_to_prometheus(store, registry=…)`.
    """

    def __init__(
        self, app: ASGIApp, settings: GateSettings | None = None, *, extra: Iterable[Any] = (),
        numbers: Numbers | None = None,
    ) -> None:  # fmt: skip
        self.app, self.settings = app, settings or GateSettings()
        self._inside = Counter[str]()
        self.telemetry = Telemetry(self._inside.total, extra, numbers)
        self._keys = {checks.digest_of(key): namespace for key, namespace in self.settings.keys.items()}
        self._metrics_keys = {checks.digest_of(key): "" for key in [self.settings.metrics_key] if key is not None}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "websocket":  # would pass by the keys
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)

    def namespace_of(self, route: str, headers: Headers) -> str:
        """Returns the namespace that a request's key opens; refuses it without one."""
        keys = self._metrics_keys if route == "/metrics" else self._keys
        if not keys and not (route == "/metrics" and self._keys):
            return ""
        key = checks.given_key(headers)
        namespace = None if key is None else keys.get(checks.digest_of(key))
        if namespace is None:
            message = "The API key is not known here." if key else "An API key is needed: Authorization: Bearer KEY."
            raise Refused(401, message, www_authenticate="Bearer")
        return namespace

    @contextlib.contextmanager
    def place(self, namespace: str) -> Iterator[None]:
        """Holds a place; refuses a request for which there is none."""
        most, own = self.settings.max_requests, self.settings.max_requests_per_namespace
        if self._inside.total() >= most or (own is not None and self._inside[namespace] >= own):
            raise Refused(429, "Too many requests; try again soon.", retry_after=str(self.settings.retry_after_s))
        self._inside[namespace] += 1
        try:
            yield
        finally:
            self._inside[namespace] -= 1

    async def show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app of /metrics."""
        if scope["method"] not in ("GET", "HEAD"):
            response = Response(status_code=405, headers={"allow": "GET, HEAD"})
        elif shown := await anyio.to_thread.run_sync(self.telemetry.text):  # a collector may ask a disk
            response = Response(shown[0], headers={"content-type": shown[1]})
        else:
            message = "Metrics need the package prometheus-client: run `pip install 'hfblend[metrics]'`."
            response = Response(checks.error_body(501, message), 501)
        await response(scope, receive, send)


class _Left(Exception):
    """The client has closed its connection."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, gate: Gate, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate, self.scope, self.receive, self.send = gate, scope, receive, send
        self.headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        self.route = path if path in _ROUTES else "other"
        self.id = checks.request_id(self.headers)
        self.deadline = 0.0
        self.body: bytes | None = None  # until the app has taken it
        self.left = asyncio.Event()
        self.watched: Watched
        self.answer: Answer

    async def run(self) -> None:
        """Answers the request. No exception of the app comes out."""
        with self.gate.telemetry.request(self.scope["method"], self.route, self.headers) as self.watched:
            self.answer = Answer(self.send, self.id, self.route in _STREAMED, self.watched)
            try:
                await self._pass()
            except Refused as refused:
                self.watched.outcome = "refused"
                await self.answer.fail(refused)
            except _Left:
                pass

    async def _pass(self) -> None:
        has_body = self.scope["method"] not in ("GET", "HEAD", "OPTIONS", "DELETE")
        is_open = self.route == "/health" and not has_body
        namespace = "" if is_open else self.gate.namespace_of(self.route, self.headers)
        allowed_s = checks.seconds_allowed(self.headers, self.gate.settings.timeout_s)
        self.deadline = asyncio.get_running_loop().time() + allowed_s
        if has_body:
            checks.require_json_headers(self.headers)
        with self.gate.place(namespace) if has_body else contextlib.nullcontext():
            self.watched.enter("read")
            self.body = await self._read(self.gate.settings.max_body_bytes if has_body else 0)
            if has_body:  # in a thread, so that no large one holds up the others
                check = checks.require_json_object
                await anyio.to_thread.run_sync(check, self.body, self.gate.settings.max_depth)
            self.watched.enter("wait")
            await self._ask_app(namespace)

    async def _read(self, limit: int) -> bytes:
        parts, size = list[bytes](), 0
        too_large = Refused(413, f"The body of this {self.scope['method']} may have {limit} bytes at most.")
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
            raise too_large
        try:
            with anyio.fail_after(min(self.gate.settings.read_timeout_s, self._left_s())):
                more = True
                while more:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise _Left
                    parts.append(message.get("body", b""))
                    more, size = message.get("more_body", False), size + len(parts[-1])
                    if size > limit:
                        raise too_large
        except TimeoutError:
            raise Refused(408, "The body did not come in time.", connection="close") from None
        return b"".join(parts)

    def _left_s(self) -> float:
        return max(0.0, self.deadline - asyncio.get_running_loop().time())

    # --- the app --------------------------------------------------------------------------------------------------

    async def _ask_app(self, namespace: str) -> None:
        app = self.gate.show_metrics if self.route == "/metrics" else self.gate.app
        others = [(name, value) for name, value in self.scope["headers"] if name != b"x-request-id"]
        scope = {**self.scope, "headers": [*others, (b"x-request-id", self.id.encode())], "extensions": {}}
        token = caller.set(Caller(namespace))
        task: asyncio.Future[None] = asyncio.ensure_future(app(scope, self._replay, self.answer.take))
        leaving = asyncio.create_task(self._leave())
        caller.reset(token)
        try:
            await asyncio.wait({task, leaving}, timeout=self._left_s(), return_when=asyncio.FIRST_COMPLETED)
            if self.answer.is_whole:  # servers call that a disconnect, too; the app may have something to tidy up
                await asyncio.wait({task}, timeout=self._left_s())
        finally:
            self.answer.is_closed = True
            leaving.cancel()
            task.cancel()
        try:
            await self._conclude(task)
        finally:
            while not (await asyncio.wait({task}, timeout=1.0))[0]:
                task.cancel()  # the app has swallowed the first one
            _ = task.cancelled() or task.exception()  # taken, or asyncio would log it

    async def _replay(self) -> Message:
        """The app's `receive`."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _leave(self) -> None:
        try:
            while (await self.receive())["type"] != "http.disconnect":
                pass
        finally:
            self.left.set()

    async def _conclude(self, task: asyncio.Future[None]) -> None:
        error = task.exception() if task.done() and not task.cancelled() else None
        if self.left.is_set() and not self.answer.is_whole:
            return
        if error is not None or (task.done() and not self.answer.is_whole):
            self.watched.outcome = "error"
            logger.error("Request %s: the app failed.", self.id, exc_info=error)
            await self.answer.fail(Refused(500, "The server failed at this request."))
        elif not self.answer.is_whole:
            self.watched.outcome = "timeout"
            await self.answer.fail(Refused(504, "The deadline of this request has passed.", x_should_retry="false"))
        else:
            self.watched.outcome = "answered"
            await self.answer.finish(self._left_s())
