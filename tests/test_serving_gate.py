"""The gate around an app: keys, limits, deadlines, cancellation, whole streams, metrics and spans."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import fastapi
import httpx
import uvicorn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, StreamingResponse
from transformers.cli.serving.server import build_server

from hfblend.serving import checks, telemetry
from hfblend.serving.caller import caller
from hfblend.serving.checks import parse_api_keys, read_api_keys
from hfblend.serving.gate import Gate, GateSettings

pytestmark = pytest.mark.thorough

CHAT = "/v1/chat/completions"
KEYS = {"key1": "tenantA", "key2": "tenantB", "key3=": "tenantA"}
EVENT, DONE = 'data: {"id": 1}\n\n', "data: [DONE]\n\n"
SECRET = "a secret of the app"


# --- apps -------------------------------------------------------------------------------------------------------------


class Notes:
    """What became of an app's requests."""

    def __init__(self) -> None:
        self.began = self.cancelled = self.tidied = 0
        self.seen, self.release = [], asyncio.Event()

    @contextlib.contextmanager
    def of(self, body, headers):
        self.began += 1
        self.seen.append((body, caller.get().namespace, headers))
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):  # the latter where a stream waits to be read
            self.cancelled += 1
            raise

    async def do(self, what):
        if what == "never":
            await asyncio.get_running_loop().create_future()
        elif what == "wait":
            await self.release.wait()
        elif what == "fail":
            raise RuntimeError(SECRET)
        elif what == "overhear":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().create_future()
        elif what == "cling":  # to its life
            for _ in range(2):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.get_running_loop().create_future()
            raise asyncio.CancelledError


def raw_app(notes):
    """An ASGI app that does what a body's `do`, `pieces`, `then`, `status` and `text` say."""

    async def app(scope, receive, send):
        if scope["type"] != "http":
            notes.seen.append(scope["type"])
            return
        body = json.loads((await receive())["body"] or b"{}")
        with notes.of(body, scope["headers"]):
            await notes.do(body.get("do"))
            if body.get("do") == "silent":
                return
            kind = body.get("kind", "text/event-stream; charset=utf-8" if "pieces" in body else "application/json")
            headers = [(b"content-type", kind.encode()), (b"x-of-app", b"yes")]
            headers += [(name.encode(), value.encode()) for name, value in body.get("headers", {}).items()]
            await send({"type": "http.response.start", "status": body.get("status", 200), "headers": headers})
            for piece in body.get("pieces", ()):
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            await notes.do(body.get("then"))
            text = body.get("text", "" if "pieces" in body else '{"ok": true}')
            await send({"type": "http.response.body", "body": text.encode()})

    return app


class Closing(StreamingResponse):
    """Closes its generator. Starlette leaves one that stands at a `yield` to the garbage collector."""

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


def stock_app(notes):
    """The same by Transformers' own server, FastAPI with a `BaseHTTPMiddleware` around its routes; and some routes."""

    class Handler:
        async def handle_request(self, body, request_id):
            if "pieces" in body:
                return Closing(pieces_of(body, request_id), media_type=body.get("kind", "text/event-stream"))
            with notes.of(body, request_id):
                await notes.do(body.get("do"))
            return JSONResponse({"ok": True}, background=BackgroundTask(tidy))

    async def pieces_of(body, request_id):
        with notes.of(body, request_id):
            for piece in body["pieces"]:
                yield piece
            await notes.do(body.get("then"))

    async def tidy():
        await asyncio.sleep(0.05)
        notes.tidied += 1

    state = SimpleNamespace(is_cb_alive=lambda: True)
    app = build_server(None, Handler(), Handler(), None, None, None, state)

    @app.post("/typed")
    async def typed(model: str = fastapi.Body(), n: int = fastapi.Body()):
        return {}

    return app


APPS = pytest.mark.parametrize("make", [raw_app, stock_app])


# --- clients ----------------------------------------------------------------------------------------------------------


def in_loop(test):
    """Runs a coroutine test in a loop with debug off."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 120))

    return run


def inside(app, options=None, **more):
    """A client of a gate in this process, and the gate."""
    gate = Gate(app, options, **more)
    transport = httpx.ASGITransport(gate)  # it raises what comes out of the app
    return httpx.AsyncClient(transport=transport, base_url="http://test"), gate


@contextlib.asynccontextmanager
async def live(app, options=None, http="auto", **more):
    """A gate under uvicorn on a free port, a client, and `send` for requests as bytes."""
    gate, place = Gate(app, options, **more), socket.socket()
    place.bind(("127.0.0.1", 0))
    config = uvicorn.Config(gate, http=http, log_level="critical", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([place]))
    await until(lambda: server.started)
    port = place.getsockname()[1]

    async def send(request):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await writer.drain()
        return reader, writer

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        try:
            yield SimpleNamespace(gate=gate, client=client, port=port, send=send)
        finally:
            server.should_exit = True
            await serving
            place.close()


async def until(is_so, seconds=10.0):
    for _ in range(int(seconds * 100)):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("It did not come to be in time.")


async def ask_directly(gate, body, send):
    """Gives a gate a request, and then a client that stays."""
    bodies = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.get_running_loop().create_future()

    headers = [(b"content-type", b"application/json")]
    await gate({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send)


def as_request(body, path=CHAT, more=""):
    text = json.dumps(body)
    return (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{more}"
        f"Content-Length: {len(text)}\r\n\r\n{text}"
    ).encode()


def error_of(response, status, code=None):
    """The message of an answer, which is an error as OpenAI's API writes it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"]
    assert error["code"] == code or code is None
    assert isinstance(error["message"], str)
    assert error["message"]
    return error["message"]


def sample(gate, name, **labels):
    return gate.telemetry.registry.get_sample_value(f"hfblend_http_{name}", labels) or 0


# --- keys -------------------------------------------------------------------------------------------------------------


@in_loop
async def test_a_key_chooses_the_namespace():
    notes = Notes()
    client, _ = inside(raw_app(notes), GateSettings(keys=KEYS))
    for headers, namespace in (
        ({"authorization": "Bearer key1"}, "tenantA"),
        ({"authorization": "bearer key2"}, "tenantB"),
        ({"x-api-key": "key3="}, "tenantA"),
    ):
        assert (await client.post(CHAT, json={}, headers=headers)).status_code == 200
        assert notes.seen[-1][1] == namespace
        assert caller.get().namespace == ""  # outside of the app's task


@in_loop
async def test_without_a_known_key_nothing_but_health_is_reached():
    notes = Notes()
    client, gate = inside(raw_app(notes), GateSettings(keys=KEYS))
    for headers in (
        {}, {"authorization": "Bearer key4"}, {"authorization": "Bearer"}, {"authorization": "Basic key1"},
        {"x-api-key": ""}, {"authorization": "Bearer key1 key2"}, {"authorization": b"Bearer \xff"},
        {"authorization": "Bearer tenantA"}, {"authorization": "Bearer " + checks.digest_of("key1").hex()},
    ):  # fmt: skip
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/health/"), ("POST", "/health"),
                             ("GET", "/metrics"), ("GET", "/openapi.json"), ("OPTIONS", CHAT)):  # fmt: skip
            response = await client.request(method, path, headers=headers)
            error_of(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert not notes.began
    assert (await client.get("/health")).status_code == 200
    assert sample(gate, "requests_total", route=CHAT, status="401", outcome="refused") == 18


@in_loop
async def test_websockets_are_shut_and_lifespans_pass():
    notes, sent = Notes(), []

    async def send(message):
        sent.append(message)

    gate = Gate(raw_app(notes))
    await gate({"type": "websocket", "path": "/"}, None, send)
    await gate({"type": "lifespan"}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert notes.seen == ["lifespan"]


def test_keys_are_read_from_a_variable_or_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv(checks.KEYS_VARIABLE, raising=False)
    assert read_api_keys() == {}
    monkeypatch.setenv(checks.KEYS_VARIABLE, " key1=tenantA , key2=tenantB,")
    assert read_api_keys() == {"key1": "tenantA", "key2": "tenantB"}
    (tmp_path / "keys").write_text("# of our customers\nkey1=tenantA\n\n  key2==tenantB\n")
    assert read_api_keys(tmp_path / "keys") == {"key1": "tenantA", "key2=": "tenantB"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=b,secret", "Entry 2 of HFBLEND_API_KEYS must be key=namespace"),
        ("=b", "Entry 1 of HFBLEND_API_KEYS needs a key"),
        ("secret=", "needs a namespace"),
        ("secret=a,secret=b", "Entry 2 .* has the key of an earlier one"),
        ("sec ret=a", "without blanks"),
        ("secrét=a", "visible ASCII"),
        ("secret=a/b", "needs a namespace of .* got 'a/b'"),
        ("secret=" + "n" * 65, "needs a namespace"),
    ],
)
def test_bad_keys_are_refused_without_showing_them(text, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_api_keys(text)
    assert "sec" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_requests": 0}, {"timeout_s": float("nan")}, {"max_body_bytes": -1}, {"max_requests_per_namespace": 0},
        {"keys": {"": "a"}}, {"keys": {"a": ""}}, {"metrics_key": ""}, {"keys": {"a": "b"}, "metrics_key": "a"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=r"must|needs"):
        GateSettings(**options)


def test_settings_do_not_show_keys():
    assert "key" not in repr(GateSettings(keys=KEYS, metrics_key="a-key"))


# --- bodies -----------------------------------------------------------------------------------------------------------

_DEEP = 100_000
BODIES = [
    b"", b" ", b"{", b"}", b"[]", b"1", b'"text"', b"null", b"true", b"{}{}", b"{'a': 1}", b"{a: 1}", b'{"a": }',
    b'{"a": 1,}', b'{"a" 1}', b'{"a": 01}', b'{"a": +1}', b'{"a": .5}', b'{"a": 0x1}', b'{"a": 1e999}', 
    b'{"a": -1e999}',
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}', b'{"a": nan}', b'{"a": ' + b"9" * 20 + b"}",
    b'{"a": ' + b"9" * 10_000 + b"}", b'{"a": -' + b"9" * 5_000 + b"}", b'{"a": 1e' + b"9" * 5_000 + b"}",
    b'{"a": 18446744073709551616}', b'{"a": -9223372036854775809}', b'{"a": 1, "a": 1}', b'{"b": [{"a": 1, "a": 2}]}',
    b'{"a": "\xff"}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
    '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32"),
    b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": ["b", {"c": "\\ud83d"}]}',
    b'{"a": "\\x"}', b'{"a": "\\u12"}', b'{"a": "\n"}', b'{"a": "\x00"}', b"\x00", b"\x1f\x8b\x08\x00", b'{"a": "',
    b"[" * _DEEP, b'{"a":' * _DEEP, b"[" * _DEEP + b"]" * _DEEP, b'{"a":' + b"[" * _DEEP + b"]" * _DEEP + b"}",
    b'{"a":' * _DEEP + b"1" + b"}" * _DEEP, b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b"<xml/>", b"a=1&b=2", b"-",
    b"/* {} */ {}", b"{} // {}", b"\x80" * 10, b"{\xc3\x28}", b"\n" * 10,
]  # fmt: skip
TYPES = [
    b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b"application/jsonp",
    b"json", b"application/json/x", b"\xff", b"application/ json", b";", b"application/xml+js\xf6n", b"a" * 5_000,
]  # fmt: skip
TIMEOUTS = [
    b"0", b"0.0", b"-1", b"nan", b"inf", b"1e3", b"1_0", b"", b" ", b"x", b"\xb2", b"1 s", b"9" * 400, b"1.", b".5",
    b"0x1", b"1,5", b"+1",
]  # fmt: skip
PATHS = [
    "/v1/chat/completions/", "/v1//chat/completions", "//", "/%00", "/%ff", "/%2e%2e/%2e%2e/etc/passwd", "/v1/chat/%",
    "/" + "a" * 8_000, "/v1/chat/completions%0d%0aSet-Cookie:x", "/%F0%9F%92%A9", "/v1/%2e%2e/models", "/;", "/~", "/*",
    "/typed/", "/models/load", "/reset/", "/v1/chat/completions%2F", "/ v1", "/v1/embeddings",
]  # fmt: skip
_MODELS = [None, 1, 1.5, True, [], {}, [[]], {"a": []}]
_NUMBERS = [None, "x", "1.5", 1.5, [], {}, [1], {"n": 1}, "", " ", 1e300]
TYPED = [{}, {"model": "m"}, {"n": 1}, *({"model": m, "n": n} for m, n in itertools.product(_MODELS, _NUMBERS))]


@in_loop
async def test_malformed_requests_get_an_error_of_openai_s_form_and_never_a_500():
    client, gate = inside(stock_app(Notes()))
    as_json = {"content-type": "application/json"}
    counted = 0
    for body in BODIES:
        error_of(await client.post(CHAT, content=body, headers=as_json), 400)
        counted += 1
    for kind in TYPES:
        error_of(await client.post(CHAT, content=b"{}", headers={"content-type": kind}), 415, "unsupported_media_type")
        counted += 1
    for value in TIMEOUTS:
        assert "x-request-timeout" in error_of(
            await client.post(CHAT, json={}, headers={"x-request-timeout": value}), 400
        )
        counted += 1
    for encoding in ("gzip", "br", "deflate, gzip", "x"):
        error_of(await client.post(CHAT, content=b"{}", headers={**as_json, "content-encoding": encoding}), 415)
        counted += 1
    for path, method in itertools.product(PATHS, ("GET", "POST")):
        response = await client.request(method, "http://test" + path, json={} if method == "POST" else None)
        if not response.is_redirect:
            error_of(response, response.status_code)
            assert response.status_code in (404, 405)
        counted += 1
    for body in TYPED:
        assert error_of(await client.post("/typed", json=body), 422).startswith(("model: ", "n: "))
        counted += 1
    for method in ("PUT", "PATCH", "DELETE", "GET", "TRACE", "BREW"):
        body = None if method in ("DELETE", "GET") else {}
        assert error_of(await client.request(method, CHAT, json=body), 405) == "Method Not Allowed"
        counted += 1
    assert counted >= 200
    assert gate._inside.total() == 0


@pytest.mark.parametrize("make", [stock_app])
@pytest.mark.parametrize("http", ["h11", "httptools"])
@in_loop
async def test_malformed_lines_do_not_reach_the_app_either(make, http):
    pytest.importorskip(http)
    notes = Notes()
    async with live(make(notes), http=http) as there:
        for line in (b"POST /%zz HTTP/1.1", b"POST /\xff HTTP/1.1", b"POST * HTTP/1.1", b"POST http://[ HTTP/1.1",
                     b"POST //%5c%5c HTTP/1.1", b"POST /?%ff=%00 HTTP/1.1", b"POST ? HTTP/1.1"):  # fmt: skip
            reader, writer = await there.send(
                line
                + b"\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
            )
            answer = await reader.read()
            assert answer.split(b" ", 2)[1] in (b"400", b"404", b"405"), answer
            writer.close()
    assert not notes.began


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", float("inf")]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
_TEXTS = st.binary(max_size=64) | _JSON.map(lambda value: json.dumps(value).encode())


@settings(max_examples=300, deadline=None)
@given(text=_TEXTS, cut=st.integers(0, 200), byte=st.binary(max_size=2))
@example(text=b'{"a": {"b": 1}}', cut=200, byte=b"")
def test_a_body_is_refused_or_the_app_can_read_it(text, cut, byte):
    body, refused = text[:cut] + byte + text[cut:], None
    try:
        checks.require_json_object(body, 64)
    except checks.Refused as raised:
        refused = raised
    if refused is None:
        assert json.dumps(json.loads(body), allow_nan=False, ensure_ascii=False).encode()
    else:
        assert refused.status == 400
        assert json.loads(refused.body)["error"]["message"] == str(refused)


@in_loop
async def test_good_bodies_reach_the_app_unchanged():
    notes = Notes()
    client, _ = inside(raw_app(notes))
    for body in ({"a": "é\u2028😀\\u0000"}, {"n": 2**64 - 1, "m": -(2**63)}, {"x": 1.5e300}, {"": {"": []}}):
        for kind in ("application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"):
            response = await client.post(CHAT, content=json.dumps(body), headers={"content-type": kind})
            assert response.json() == {"ok": True}
            assert notes.seen[-1][0] == body
    nested = functools.reduce(lambda inner, _: [inner], range(62), [])
    assert (await client.post(CHAT, json={"a": nested})).status_code == 200
    error_of(await client.post(CHAT, json={"a": [[nested, 1]]}), 400)


@in_loop
async def test_large_bodies_are_refused_declared_or_not():
    notes, options = Notes(), GateSettings(max_body_bytes=1000)

    async def pieces(size):
        for i in range(0, size, 100):
            yield b" " * min(100, size - i)

    async with live(raw_app(notes), options) as there:
        headers = {"content-type": "application/json"}
        for content in (b" " * 1001, pieces(1001), b" " * (20 << 20)):
            error_of(await there.client.post(CHAT, content=content, headers=headers), 413, "request_too_large")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1001\r\n\r\n"
        reader, writer = await there.send(head.encode())  # without the body
        assert b" 413 " in await reader.readline()
        writer.close()
        for method in ("GET", "DELETE"):
            error_of(await there.client.request(method, CHAT, content=b"1"), 413)
        assert (await there.client.post(CHAT, content=b'{"a": 1}'.ljust(1000), headers=headers)).status_code == 200
    assert notes.began == 1


@pytest.mark.parametrize("more", ["", "Authorization: Bearer key1\r\n"])
@in_loop
async def test_slow_clients_get_a_408_and_no_place_for_long(more):
    options = GateSettings(read_timeout_s=1.0, max_requests=1, keys=KEYS if more else {})
    async with live(raw_app(Notes()), options) as there:
        reader, writer = await there.send(as_request({"a": 1}, more=more)[:-2])
        await until(lambda: there.gate._inside.total() == 1)
        assert (await there.client.post(CHAT, json={}, headers={"x-api-key": "key1"})).status_code == 429
        answer = await asyncio.wait_for(reader.read(), 10)  # the server closes
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"\r\nconnection: close\r\n" in answer
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "request_timeout"
        writer.close()
        assert (await there.client.post(CHAT, json={}, headers={"x-api-key": "key1"})).status_code == 200


# --- places -----------------------------------------------------------------------------------------------------------


@APPS
@in_loop
async def test_no_more_requests_are_inside_than_there_are_places(make):
    notes = Notes()
    client, gate = inside(make(notes), GateSettings(max_requests=5, retry_after_s=7))
    asked = [asyncio.create_task(client.post(CHAT, json={"do": "wait"})) for _ in range(20)]
    await until(lambda: sum(task.done() for task in asked) == 15 and notes.began == 5)
    for response in [task.result() for task in asked if task.done()]:
        error_of(response, 429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "7"
    assert sample(gate, "requests_inside") == 5
    assert (await client.get("/health")).status_code == 200  # it needs no place
    notes.release.set()
    assert sorted([(await task).status_code for task in asked]) == [200] * 5 + [429] * 15
    again = [client.post(CHAT, json={"do": "wait"}) for _ in range(5)]
    assert [response.status_code for response in await asyncio.gather(*again)] == [200] * 5
    assert gate._inside.total() == 0


@in_loop
async def test_one_namespace_cannot_take_all_places():
    notes = Notes()
    options = GateSettings(keys=KEYS, max_requests=4, max_requests_per_namespace=3)
    client, _ = inside(raw_app(notes), options)

    def ask(key):
        return asyncio.create_task(client.post(CHAT, json={"do": "wait"}, headers={"x-api-key": key}))

    asked = [ask(key) for key in ("key1", "key1", "key3=", "key3=", "key2", "key2")]  # 1 and 3 are of one tenant
    await until(lambda: sum(task.done() for task in asked) == 2 and notes.began == 4)
    notes.release.set()
    assert [(await task).status_code for task in asked] == [200, 200, 200, 429, 200, 429]


# --- deadlines --------------------------------------------------------------------------------------------------------


@APPS
@in_loop
async def test_a_deadline_ends_a_request_with_a_504(make):
    notes = Notes()
    client, gate = inside(make(notes), GateSettings(timeout_s=0.6))
    for headers in ({}, {"x-request-timeout": "0.4"}, {"x-request-timeout": "99999"}):
        response = await client.post(CHAT, json={"do": "never"}, headers=headers)
        error_of(response, 504, "deadline_exceeded")
        assert response.headers["x-should-retry"] == "false"
    assert (notes.began, notes.cancelled) == (3, 3)
    assert sample(gate, "requests_total", route=CHAT, status="504", outcome="timeout") == 3
    assert gate._inside.total() == 0


@APPS
@in_loop
async def test_a_deadline_ends_a_stream_with_an_error_event(make):
    notes = Notes()
    async with live(make(notes), GateSettings(timeout_s=0.6)) as there:
        for pieces in ([EVENT], [EVENT, 'data: {"cut']):
            response = await there.client.post(CHAT, json={"pieces": pieces, "then": "never"})
            assert response.status_code == 200
            events = [event for event in response.text.split("\n\n") if event]
            assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
            assert events[0] == EVENT.strip()
        assert notes.cancelled == 2


@in_loop
async def test_a_deadline_cuts_other_answers_in_the_middle():
    async with live(raw_app(Notes()), GateSettings(timeout_s=0.6)) as there:
        with pytest.raises(httpx.RemoteProtocolError):
            await there.client.post(CHAT, json={"pieces": ["{"], "kind": "application/json", "then": "never"})
        await until(lambda: sample(there.gate, "requests_total", route=CHAT, status="200", outcome="timeout") == 1)


@in_loop
async def test_an_app_that_swallows_cancellations_is_cancelled_again_and_keeps_its_place():
    notes = Notes()
    client, gate = inside(raw_app(notes), GateSettings(timeout_s=0.3, max_requests=1))
    asked = asyncio.create_task(client.post(CHAT, json={"do": "cling"}))
    await until(lambda: notes.began == 1)
    await asyncio.sleep(0.5)
    assert (await client.post(CHAT, json={})).status_code == 429
    error_of(await asked, 504)
    assert notes.cancelled == 1
    assert gate._inside.total() == 0


@in_loop
async def test_a_client_that_does_not_read_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setattr("hfblend.serving.answer._LAST_WORD_S", 0.2)
    notes = Notes()
    async with live(raw_app(notes), GateSettings(timeout_s=0.3, max_body_bytes=16 << 20)) as there:
        pieces = ["data: " + "x" * 100_000 + "\n\n"] * 70
        _, writer = await there.send(as_request({"pieces": pieces}))
        await until(lambda: notes.cancelled == 1 and there.gate._inside.total() == 0)
        writer.transport.abort()


@pytest.mark.parametrize(
    "body", [{"pieces": [EVENT]}, {"text": "{}"}, {"status": 400}], ids=["events", "whole", "error"]
)
@in_loop
async def test_an_end_that_nobody_reads_holds_no_place(monkeypatch, body):
    monkeypatch.setattr("hfblend.serving.answer._LAST_WORD_S", 0.1)
    gate = Gate(raw_app(Notes()), GateSettings(timeout_s=0.5))

    async def send(message):
        if message["type"] == "http.response.body" and not message["more_body"]:
            await asyncio.get_running_loop().create_future()

    await ask_directly(gate, body, send)
    assert gate._inside.total() == 0


@in_loop
async def test_an_app_cannot_speak_after_its_deadline():
    sent = []

    async def send(message):
        sent.append(message)

    await ask_directly(Gate(raw_app(Notes()), GateSettings(timeout_s=0.5)), {"do": "overhear"}, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 504


# --- clients that leave -----------------------------------------------------------------------------------------------


@APPS
@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("body", [{"do": "never"}, {"pieces": [EVENT], "then": "never"}], ids=["whole", "streamed"])
@in_loop
async def test_a_client_that_leaves_ends_its_request(make, http, body):
    pytest.importorskip(http)
    notes = Notes()
    async with live(make(notes), http=http) as there:
        for leave in ("close", "abort"):
            reader, writer = await there.send(as_request(body))
            await until(lambda: notes.began == notes.cancelled + 1)
            if "pieces" in body:
                assert EVENT.strip().encode() in await reader.readuntil(EVENT.strip().encode())
            getattr(writer.transport, leave)()
            await until(lambda: notes.began == notes.cancelled and there.gate._inside.total() == 0)
        status = "200" if "pieces" in body else "none"
        assert sample(there.gate, "requests_total", route=CHAT, status=status, outcome="cancelled") == 2


def tasks_and_files():
    """Both of this process."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@APPS
@in_loop
async def test_nothing_is_left_of_200_aborted_requests(make):
    notes = Notes()
    kinds = [{"do": "never"}, {"pieces": [EVENT], "then": "never"}, {"pieces": [EVENT] * 50, "then": "never"}]
    async with live(make(notes), GateSettings(max_requests=20)) as there:
        gc.collect()  # sockets of earlier loops
        tasks, files = tasks_and_files()
        for turn in range(10):
            sent = [as_request(kinds[i % 3])[: -2 if i % 5 == 4 else None] for i in range(20)]  # one in five is cut
            pairs = await asyncio.gather(*map(there.send, sent))
            await until(lambda: there.gate._inside.total() == 20)
            if turn % 2:
                await until(lambda: notes.began == notes.cancelled + 16)
            for _, writer in pairs:
                writer.transport.abort()
            await until(lambda: there.gate._inside.total() == 0)
        await until(lambda: notes.began == notes.cancelled)
        await until(lambda: tasks_and_files()[0] <= tasks and tasks_and_files()[1] <= files)
        assert notes.began >= 80
        assert (await there.client.post(CHAT, json={})).status_code == 200


@in_loop
async def test_work_after_the_answer_is_not_a_client_that_left():
    notes = Notes()
    async with live(stock_app(notes)) as there:
        for _ in range(20):
            assert (await there.client.post(CHAT, json={})).json() == {"ok": True}
        await until(lambda: notes.tidied == 20)
        answered = {"route": CHAT, "status": "200", "outcome": "answered"}
        await until(lambda: sample(there.gate, "requests_total", **answered) == 20)


@in_loop
async def test_an_app_is_cancelled_with_the_server():
    notes = Notes()
    client, gate = inside(raw_app(notes))
    asked = asyncio.create_task(client.post(CHAT, json={"do": "never"}))
    await until(lambda: notes.began == 1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: notes.cancelled == 1 and gate._inside.total() == 0)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "end"),
    [
        ([], DONE),
        ([EVENT], DONE),
        ([EVENT, DONE], ""),
        ([EVENT, "data:[DO", "NE]\n\n"], ""),
        ([EVENT, "data: [DONE]\r\n\r", "\n"], ""),
        ([EVENT, "data: [DONE]"], "\n\n"),
        ([EVENT, DONE, ": ping\n\n"], ""),
        ([EVENT[:9], EVENT[9:-1], "\n"], DONE),
        ([EVENT.strip()], "\n\n" + DONE),
        (['data: {"text": "[DONE]"}\n\n'], DONE),
        ([EVENT, 'data: {"error": "x"}\n\n'], ""),
        ([EVENT, 'event: error\ndata: {"message": "x"}\n\n'], ""),
    ],
)
@in_loop
async def test_a_whole_stream_ends_with_done(pieces, end):
    client, _ = inside(raw_app(Notes()))
    for path in (CHAT, "/v1/completions"):
        assert (await client.post(path, json={"pieces": pieces})).text == "".join(pieces) + end
    assert (await client.post("/v1/responses", json={"pieces": pieces})).text.strip() == "".join(pieces).strip()
    assert (await client.post(CHAT, json={"pieces": pieces, "kind": "text/plain"})).text == "".join(pieces)


@in_loop
async def test_headers_of_the_app_fit_what_is_sent():
    client, _ = inside(raw_app(Notes()))
    body = {"pieces": [EVENT], "headers": {"content-length": str(len(EVENT))}}
    response = await client.post(CHAT, json=body)
    assert response.text == EVENT + DONE
    assert "content-length" not in response.headers
    response = await client.post(CHAT, json={**body, "headers": {"content-encoding": "identity"}})
    assert response.text == EVENT  # what may be compressed is not touched
    response = await client.post(CHAT, json={"status": 404, "text": "", "headers": {"content-encoding": "gzip"}})
    assert error_of(response, 404) == "Not Found"
    response = await client.post(CHAT, json={**body, "status": 404})
    assert response.text == EVENT  # no whole answer


@APPS
@in_loop
async def test_an_app_that_fails_gives_a_500_without_its_traceback(make, caplog):
    client, gate = inside(make(Notes()))
    response = await client.post(CHAT, json={"do": "fail"}, headers={"x-request-id": "mine-1"})
    error_of(response, 500)
    assert "secret" not in response.text
    assert any("mine-1" in record.message and record.exc_info for record in caplog.records)
    assert sample(gate, "requests_total", route=CHAT, status="500", outcome="error") == 1


@APPS
@in_loop
async def test_a_stream_that_fails_ends_with_an_error_event_and_no_done(make):
    client, _ = inside(make(Notes()))
    text = (await client.post(CHAT, json={"pieces": [EVENT, "data: cut"], "then": "fail"})).text
    assert text.startswith(EVENT)
    assert json.loads(text.strip().rsplit("data: ", 1)[1])["error"]["type"] == "server_error"
    assert "secret" not in text
    assert "DONE" not in text


@in_loop
async def test_an_app_that_answers_nothing_gives_a_500():
    client, _ = inside(raw_app(Notes()))
    error_of(await client.post(CHAT, json={"do": "silent"}), 500, "internal_error")


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (404, "Not Found", "Not Found"),
        (404, '{"detail": "No such model."}', "No such model."),
        (503, '{"error": "The engine is down."}', "The engine is down."),
        (422, '{"detail": [{"loc": ["body", "n"], "msg": "bad"}, {"loc": ["body"], "msg": "worse"}]}', "n: bad; worse"),
        (422, '{"detail": [1, {"loc": 1}, null]}', "1; None; None"),
        (500, "Traceback: a secret", "Internal Server Error"),
        (418, "", "I'm a Teapot"),
        (499, "[" * 100_000, "Error 499"),
        (400, '{"error": {"code": 1}}', "Bad Request"),
    ],
)
@in_loop
async def test_errors_of_the_app_get_openai_s_form(status, text, message):
    client, _ = inside(raw_app(Notes()))
    response = await client.post(CHAT, json={"status": status, "text": text})
    assert error_of(response, status) == message
    assert response.headers["x-of-app"] == "yes"


@in_loop
async def test_errors_of_openai_s_form_stay_as_the_app_wrote_them():
    client, _ = inside(raw_app(Notes()))
    text = '{"error": {"message": "m", "type": "t", "param": "p", "code": "c", "more": 1}}'
    assert (await client.post(CHAT, json={"status": 400, "text": text})).text == text


@in_loop
async def test_request_ids_are_the_client_s_if_they_are_safe():
    notes = Notes()
    client, _ = inside(raw_app(notes))
    for given_id in (b"my-id_1.2", b"a" * 64, b"a" * 65, b"", b"a b", b"a\xff", b"a;b", b"../x"):
        response = await client.post(CHAT, json={}, headers={"x-request-id": given_id})
        got = response.headers["x-request-id"]
        is_safe = given_id in (b"my-id_1.2", b"a" * 64)
        assert (got == given_id.decode("latin-1")) == is_safe
        assert [value for name, value in notes.seen[-1][2] if name == b"x-request-id"] == [got.encode()]
        assert len(got) <= 64
    first, second = [await client.post(CHAT, json={}) for _ in range(2)]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


# --- metrics and spans ------------------------------------------------------------------------------------------------


@in_loop
async def test_metrics_show_requests_collectors_and_the_engine_s_numbers():
    prometheus_client = pytest.importorskip("prometheus_client")
    extra = prometheus_client.metrics_core.GaugeMetricFamily("of_a_store", "A store.", value=3)
    numbers = {"waiting": 2, "blended_total": 4}

    class Collector:
        def collect(self):
            return [extra]

    one, gate = inside(raw_app(Notes()), extra=[Collector()], numbers=lambda: numbers)
    other, _ = inside(raw_app(Notes()))  # a second one in this process has its own numbers
    await one.post(CHAT, json={})
    await one.post(CHAT, json={"pieces": [EVENT]})
    await one.get("/any/path")
    response = await one.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        f'hfblend_http_requests_total{{outcome="answered",route="{CHAT}",status="200"}} 2.0',
        'hfblend_http_requests_total{outcome="answered",route="other",status="200"} 1.0',
        f'hfblend_http_first_byte_seconds_count{{route="{CHAT}"}} 2.0',
        f'hfblend_http_seconds_count{{route="{CHAT}"}} 2.0',
        "hfblend_http_requests_inside 0.0", "of_a_store 3.0", "hfblend_engine_waiting 2.0",
        "hfblend_engine_blended_total 4.0",
    ):  # fmt: skip
        assert line in response.text.splitlines()
    assert CHAT not in (await other.get("/metrics")).text
    error_of(await one.post("/metrics", json={}), 405)
    numbers["broken"] = "no number"
    assert "of_a_store 3.0" in (await one.get("/metrics")).text
    assert gate._inside.total() == 0


@pytest.mark.parametrize(
    ("options", "key", "status"),
    [
        ({}, None, 200), ({"metrics_key": "m"}, None, 401), ({"metrics_key": "m"}, "m", 200),
        ({"keys": KEYS}, None, 401), ({"keys": KEYS}, "key1", 401), ({"keys": KEYS, "metrics_key": "m"}, "key1", 401),
        ({"keys": KEYS, "metrics_key": "m"}, "m", 200),
    ],
)  # fmt: skip
@in_loop
async def test_metrics_are_open_to_their_own_key_only(options, key, status):
    client, _ = inside(raw_app(Notes()), GateSettings(**options))
    assert (await client.get("/metrics", headers={"x-api-key": key} if key else {})).status_code == status
    if key == "m":
        assert (await client.get("/v1/models", headers={"x-api-key": "m"})).status_code == (
            401 if "keys" in options else 200
        )


@in_loop
async def test_the_gate_works_without_prometheus_and_opentelemetry(monkeypatch):
    monkeypatch.setattr(telemetry, "_optional", lambda module: None)
    client, _ = inside(raw_app(Notes()), numbers=dict)
    assert (await client.post(CHAT, json={"pieces": [EVENT]})).text == EVENT + DONE
    assert "pip install 'hfblend[metrics]'" in error_of(await client.get("/metrics"), 501)


@in_loop
async def test_a_span_has_the_client_s_trace_and_one_child_a_phase():
    trace = pytest.importorskip("opentelemetry.trace")
    sdk, export = map(pytest.importorskip, ("opentelemetry.sdk.trace", "opentelemetry.sdk.trace.export"))
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    client, gate = inside(raw_app(Notes()))
    gate.telemetry._otel = SimpleNamespace(**{**vars(trace), "get_tracer": provider.get_tracer})
    parent = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    await client.post(CHAT, json={"pieces": [EVENT]}, headers=parent)
    *children, server = memory.get_finished_spans()
    assert [child.name for child in children] == ["read", "wait", "stream"]
    assert {child.parent.span_id for child in children} == {server.context.span_id}
    assert (server.name, server.kind) == (f"POST {CHAT}", trace.SpanKind.SERVER)
    assert (server.context.trace_id, server.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["hfblend.outcome"] == "answered"
    memory.clear()
    await client.post(CHAT, json={"do": "fail"}, headers={"traceparent": "00-broken"})
    *_, server = memory.get_finished_spans()
    assert server.parent is None
    assert server.status.status_code is trace.StatusCode.ERROR


@in_loop
@APPS
async def test_the_work_for_headers_grows_with_their_number_only(make, monkeypatch):
    """Each look at a header goes through all of them; a client chooses how many there are."""
    looks, look_up = [], Headers.__getitem__
    monkeypatch.setattr(Headers, "__getitem__", lambda self, name: (looks.append(name), look_up(self, name))[1])
    client, _ = inside(make(Notes()))
    counts = []
    for number in (0, 500):
        looks.clear()
        headers = {f"x-{i}": "a" for i in range(number)} | {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
        assert (await client.post(CHAT, json={}, headers=headers)).status_code == 200
        counts.append(len(looks))
    assert 0 < counts[0] == counts[1]


# --- the official client ----------------------------------------------------------------------------------------------


@in_loop
async def test_the_openai_client_raises_its_own_errors():
    openai = pytest.importorskip("openai")
    notes, options = Notes(), GateSettings(keys=KEYS, max_requests=1)
    chunk = 'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}\n\n'
    async with live(raw_app(notes), options) as there:
        url = f"http://127.0.0.1:{there.port}/v1"

        def ask(key="key1", retries=0, headers=None, **body):
            client = openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=retries)
            asked = {"model": "m", "messages": [], "stream": "pieces" in body, "extra_headers": headers}
            return client.chat.completions.create(**asked, extra_body=body)

        with pytest.raises(openai.AuthenticationError, match="not known"):
            await ask(key="key9")
        assert [got.id async for got in await ask(pieces=[chunk, chunk])] == ["1", "1"]
        stream = await ask(pieces=[chunk], then="fail")
        with pytest.raises(openai.APIError, match="The server failed"):
            [got async for got in stream]
        began = notes.began
        with pytest.raises(openai.InternalServerError, match="deadline"):
            await ask(retries=2, do="never", headers={"x-request-timeout": "0.6"})
        assert notes.began == began + 1  # it was not asked again
        await until(lambda: there.gate._inside.total() == 0)
        held = asyncio.create_task(ask(do="wait"))
        await until(lambda: there.gate._inside.total() == 1)
        with pytest.raises(openai.RateLimitError):
            await ask()
        again = asyncio.create_task(ask(retries=2))
        await asyncio.sleep(0.3)
        notes.release.set()
        await asyncio.gather(held, again)


def test_nothing_is_logged_of_keys(caplog):
    caplog.set_level(logging.DEBUG)

    @in_loop
    async def ask():
        client, _ = inside(raw_app(Notes()), GateSettings(keys={"very-secret": "tenant-name"}))
        await client.post(CHAT, json={"do": "fail"}, headers={"authorization": "Bearer very-secret"})

    ask()
    assert "Traceback" in caplog.text
    assert "very-secret" not in caplog.text
