"""Faults over HTTP: the whole server goes on after each of them, and its clients learn what happened."""

from __future__ import annotations

import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import fsspec
import httpx
from helpers import make_llama
from test_remote_store import FaultyFileSystem
from test_serving_engine import DeadStore, killed, until
from typer.testing import CliRunner

from hfblend.cli import app
from hfblend.serving import schema
from hfblend.serving.gate import GateSettings
from hfblend.store import MemoryStore, RemoteStore, TieredStore

from live_server import served  # isort: skip

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HTTP = httpx.Client(timeout=60)
QUESTION = [{"role": "user", "content": "w10 w11"}]

pytestmark = [pytest.mark.usefixtures("remembered_proofs"), pytest.mark.thorough]


def documents(seed, sizes=(30, 30, 30)):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(6, 97)}" for _ in range(size)) for size in sizes]


def body(seed=0, sizes=(30, 30, 30), **options):
    return {"messages": QUESTION, "documents": documents(seed, sizes), "max_tokens": 4, "temperature": 0, **options}


def plain(**options):
    return {"messages": QUESTION, "max_tokens": 4, "temperature": 0, **options}


def post(server, content, path=CHAT, **headers):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"content-type": "application/json", **headers}
    return HTTP.post(f"{server.url}{path}", content=content, headers=headers)


def answered(response):
    """The usage of an answer."""
    assert response.status_code == 200, response.text
    return response.json()["usage"]


def require_error(response, *statuses):
    assert response.status_code in statuses, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"].endswith("_error")
    return error


def metrics(server):
    """Name -> value of the metrics without labels."""
    lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
    return {
        name: float(value) for name, value in (line.split() for line in lines if line[0] != "#" and "{" not in line)
    }


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


# --- prompts and bodies -----------------------------------------------------------------------------------------------


def test_a_prompt_larger_than_the_pool_hurts_nobody(server):
    for large in (plain(max_tokens=server.engine.capacity), body(sizes=[server.engine.capacity])):
        assert require_error(post(server, large), 400)["code"] == "context_length_exceeded"
    large = {"prompt": [7] * (server.engine.capacity + 1), "max_tokens": 1}
    assert require_error(post(server, large, COMPLETION), 400)["code"] == "context_length_exceeded"
    bodies = [body(i % 10, stream=i % 3 == 0) if i % 2 else plain(stream=i % 3 == 0) for i in range(100)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: post(server, one), bodies))
    assert [one.status_code for one in answers] == [200] * 100
    assert all("[DONE]" in one.text for one, asked in zip(answers, bodies) if asked["stream"])
    assert metrics(server)["hfblend_engine_rebuilt_total"] == 0


WRONG = [
    None, True, False, 0, -1, 1, 1.5, -0.0, math.nan, math.inf, 1e308, 2**63, 2**70, -(2**70), "", " ", "w7", "\ud800",
    "🙂\u202e\x00", "x" * 100_000, [], [None], [[]], [1, "a", {}], ["w7"] * 1000, {}, {"": ""}, {"a": {"b": [None]}},
    {"type": "text"}, {"role": "user"},
]  # fmt: skip


def nested(depth):
    inside: object = "w7"
    for _ in range(depth):
        inside = [inside]
    return inside


WRONG += [nested(10), nested(63), nested(500)]


INSIDE = {
    "messages": [
        lambda value: [{"role": value, "content": "w7"}],
        lambda value: [{"role": "user", "content": value}],
        lambda value: [{"role": "user", "content": [value]}],
        lambda value: [{"role": "user", "content": [{"type": "text", "text": value}]}],
        lambda value: [{"role": "user", "content": [{"type": "text", "text": "w7", "cache_control": value}]}],
        lambda value: [{"role": "user", "content": "w7", "name": value}],
        lambda value: [{"role": "assistant", "tool_calls": value}],
        lambda value: [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": value}}]}],
        lambda value: value if isinstance(value, list) else [value],
    ],
    "documents": [
        lambda value: [value],
        lambda value: [{"text": value}],
        lambda value: [{"data": value}],
        lambda value: [{"text": "w7", "title": value}],
    ],
    "hfblend": [lambda value, name=name: {name: value} for name in schema.BlendOptions.model_fields],
    "stream_options": [lambda value, name=name: {name: value} for name in schema.StreamOptions.model_fields],
    "tools": [lambda value: [value], lambda value: [{"type": "function", "function": {"name": value}}]],
    "chat_template_kwargs": [lambda value: {"add_generation_prompt": value}, lambda value: {"any": value}],
}
PLACES = {
    CHAT: [*schema.ChatBody.model_fields, *schema._NO_OPS, "unheard_of"],
    COMPLETION: [*schema.CompletionBody.model_fields, *schema._NO_OPS, "documents", "messages"],
}
GOOD = {CHAT: plain(max_tokens=1), COMPLETION: {"prompt": "w7", "max_tokens": 1}}


def wrong_bodies():
    """Every field, and those inside of some, with every value that may be wrong; each body with its path."""
    for path, names in PLACES.items():
        yield from ((path, {**GOOD[path], name: value}) for name in names for value in WRONG)
        for left_out in GOOD[path]:
            yield path, {name: value for name, value in GOOD[path].items() if name != left_out}
    for name, makers in INSIDE.items():
        yield from ((CHAT, {**GOOD[CHAT], name: make(value)}) for make in makers for value in WRONG)


RAW = [
    b"", b"{", b"}", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"\x00" * 10, b"{}" * 2, b"[" * 100_000,
    b'{"a":' * 100_000, b'{"messages": [}', b"messages=1", b'{"prompt": "w7", "prompt": "w8"}', b"{'prompt': 'w7'}",
    b'{"prompt": 1' + b"0" * 5000 + b"}", b'{"prompt": "\\ud800"}', '{"prompt": "w7"}'.encode("utf-16"),
]  # fmt: skip


@pytest.mark.parametrize("count", [500, pytest.param(None, marks=pytest.mark.slow)])
def test_malformed_bodies_get_errors(server, count):
    bodies = [(path, json.dumps(one).encode()) for path, one in wrong_bodies()]
    random.Random(0).shuffle(bodies)
    bodies = bodies[:count] + [(path, one) for path in (CHAT, COMPLETION) for one in RAW]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: post(server, one[1], one[0]), bodies))
    refused = [response for response in answers if response.status_code != 200]
    for response in refused:
        require_error(response, 400, 404)
    assert len(refused) >= 300
    assert answered(post(server, body(7)))["hfblend"]["fallback"] is None
    assert metrics(server)["hfblend_engine_rebuilt_total"] == 0


@pytest.mark.parametrize("name", schema.BlendOptions.model_fields)
def test_a_large_setting_does_not_hold_up_the_engine(server, name):
    """One of `range(setting)` would run in the engine's thread for ever."""
    for large in (2**62, [2**62], [1.0] * 100_000, [1] * 100_000):
        response = post(server, body(hfblend={name: large}))
        assert response.status_code in (200, 400), response.text
    assert answered(post(server, plain()))["completion_tokens"] == 4


def test_stop_strings_are_told_what_is_wrong_with_them(server):
    for stop, message in (
        ("x" * 257, "at most 256 characters"), (["x"] * 5, "at most 4 items"), ("", "at least 1 character"),
        (5, "valid list"), ([5], "valid string"),
    ):  # fmt: skip
        error = require_error(post(server, plain(stop=stop)), 400)
        assert error["param"] == "stop"
        assert message in error["message"]
    for stop in (None, [], "zz", ["zz"] * 4):
        assert answered(post(server, plain(stop=stop)))["completion_tokens"] == 4


def test_bodies_that_are_too_large_or_no_json_are_refused(server):
    require_error(post(server, plain(user="x" * (9 << 20))), 413)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a", ""):
        require_error(post(server, plain(), **{"content-type": kind}), 415)
    require_error(post(server, plain(), **{"content-encoding": "gzip"}), 415)
    assert post(server, plain()).status_code == 200


# --- the engine dies --------------------------------------------------------------------------------------------------


def events(text):
    return [event.removeprefix("data: ") for event in text.split("\n\n") if event]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_is_told_to_all_and_comes_back():
    with served() as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post, server, plain(max_tokens=1900, stream=stream)) for stream in (False, True)]
        until(lambda: len(server.engine.requests) == 2)
        until(lambda: metrics(server)["hfblend_engine_blocks_held"] >= 4)  # both have begun to answer
        killed(server.engine)
        refused = [post(server, plain(stream=stream)) for stream in (False, True)]
        whole, streamed = (one.result() for one in running)
        for response in (whole, *refused):
            assert require_error(response, 503)["code"] == "engine_down"
            assert int(response.headers["retry-after"]) > 0
        *others, last = events(streamed.text)
        assert json.loads(last)["error"]["code"] == "engine_down"
        assert len(others) > 1
        assert "[DONE]" not in others
        until(lambda: post(server, body()).status_code == 200, seconds=10)
        assert answered(post(server, body()))["hfblend"]["hits"] == 3  # the store is the old one
        assert metrics(server)["hfblend_engine_rebuilt_total"] == 1


# --- the store dies ---------------------------------------------------------------------------------------------------


def test_a_store_that_raises_costs_a_full_prefill():
    with served() as healthy:
        expected = post(healthy, body(hfblend={"enabled": False})).json()["choices"]
    with served(DeadStore()) as server:
        for count in (1, 2):
            answer = post(server, body())
            usage = answered(answer)
            assert answer.json()["choices"] == expected
            assert (usage["hfblend"]["fallback"], usage["hfblend"]["hits"]) == ("failed", 0)
            assert metrics(server)["hfblend_engine_failed_total"] == count


def test_a_store_whose_server_is_gone_costs_the_hits():
    """Chunks are computed anew, and asked for again when the store has paused."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.line_is_up.set()
    FaultyFileSystem.fault = None
    remote = RemoteStore("faulty://served", max_failures=2)
    try:
        with served(TieredStore([MemoryStore(1), remote])) as server:
            first = post(server, body())
            server.engine.store.flush()
            with blocks_forgotten(server):
                assert answered(post(server, body()))["hfblend"]["hits"] == 3
            FaultyFileSystem.fault = OSError("the server is gone")
            with blocks_forgotten(server):
                answer = post(server, body())
            usage = answered(answer)["hfblend"]
            assert answer.json()["choices"] == first.json()["choices"]
            assert (usage["hits"], usage["misses"], usage["fallback"]) == (0, 3, None)
            lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
            (failed,) = (one for one in lines if one.startswith("hfblend_store_failed_total") and "RemoteStore" in one)
            assert float(failed.split()[-1]) >= 2
    finally:
        FaultyFileSystem.fault = None


@contextmanager
def blocks_forgotten(server):
    """A time before which no K/V of earlier requests are left in blocks."""
    with server.engine.pause():
        server.engine.batch_processor.cache.evict_cached_blocks()
    yield


# --- the client leaves ------------------------------------------------------------------------------------------------


def leave(server, content, stream):
    """Asks, and leaves before the answer's end; returns the seconds until the blocks are free."""
    content = {**content, "max_tokens": 1500, "stream": stream}
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{server.url}{CHAT}", json=content, timeout=60) as response:
                lines = response.iter_lines()
                assert any('"content"' in line for line in lines)
        else:
            with ThreadPoolExecutor(1) as pool:
                asking = pool.submit(client.post, f"{server.url}{CHAT}", json=content, timeout=0.5)
                until(lambda: server.engine.numbers()["blocks_held"])
                with pytest.raises(httpx.ReadTimeout):
                    asking.result()
    left = time.monotonic()
    until(lambda: not server.engine.requests and not server.engine.numbers()["blocks_held"])
    return time.monotonic() - left


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server, stream):
    """Within a second: the best of three, since this machine may be busy."""
    for content in (body(), plain()):
        assert min(leave(server, content, stream) for _ in range(3)) < 1.0
    assert post(server, body()).status_code == 200


def test_clients_that_leave_a_full_queue_free_it():
    """Blocks for two, so that the other requests wait; all their clients leave."""
    with served(settings=GateSettings(max_requests=8), num_blocks=18) as server:
        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(give_up, server, body(seed, max_tokens=150)) for seed in range(16)]
            until(lambda: metrics(server)["hfblend_http_requests_inside"] == 8)
            outcomes = [one.result() for one in asking]
        assert outcomes.count(429) == 8
        until(lambda: not server.engine.requests and not server.engine.numbers()["blocks_held"])
        assert metrics(server)["hfblend_http_requests_inside"] == 0
        assert answered(post(server, body(99)))["completion_tokens"] == 4


def give_up(server, content):
    """The status of a refusal, or None after three seconds without an answer."""
    try:
        return httpx.post(f"{server.url}{CHAT}", json=content, timeout=3).status_code
    except httpx.ReadTimeout:
        return None


# --- tenants ----------------------------------------------------------------------------------------------------------

KEYS = GateSettings(keys={"key-a": "tenant-a", "key-b": "tenant-b"}, metrics_key="key-m")


def asked_by(tenant, server, content):
    return answered(post(server, content, authorization=f"Bearer key-{tenant}"))


@pytest.mark.parametrize("is_blended", [True, False])
def test_a_tenant_finds_nothing_of_another_one(is_blended):
    content = body(hfblend={"enabled": is_blended})
    with served(settings=KEYS) as server:
        own = [asked_by("a", server, content) for _ in range(2)]
        with blocks_forgotten(server):
            own.append(asked_by("a", server, content))
        other = [asked_by("b", server, content) for _ in range(2)]
        for tenants in (own, other):
            found = [(one["prompt_tokens_details"]["cached_tokens"] > 0, one["hfblend"]["hits"]) for one in tenants[:2]]
            assert found == [(False, 0), (True, 3 if is_blended else 0)]
        assert own[2]["hfblend"]["hits"] == (3 if is_blended else 0)
        require_error(post(server, content), 401)
        require_error(post(server, content, authorization="Bearer key-c"), 401)


def auc(low, high):
    """The probability that one of `high` is above one of `low`, and its standard error where that is a half."""
    ranks = {}
    for rank, value in enumerate(sorted([*low, *high]), 1):
        ranks.setdefault(value, []).append(rank)
    of_high = sum(sum(ranks[value]) / len(ranks[value]) for value in high)
    pairs = len(low) * len(high)
    return (of_high - len(high) * (len(high) + 1) / 2) / pairs, math.sqrt((len(low) + len(high) + 1) / 12 / pairs)


def test_auc_by_hand():
    assert auc([1, 2], [3, 4])[0] == 1
    assert auc([1, 3], [2, 2])[0] == 0.5
    assert auc([1, 2, 3], [2])[0] == 0.5


def timed(server, numbers, options):
    """Milliseconds to B's first token: of prompts that A asked just before, and of new ones; and of its own, again."""
    seen, unseen, again = [], [], []
    for number in numbers:
        of_a, of_nobody = ({**body(2 * number + i, sizes=[120] * 3), **options} for i in (0, 1))
        asked_by("a", server, of_a)
        turn = [(seen, of_a), (unseen, of_nobody)]
        for times, content in turn if random.Random(number).random() < 0.5 else turn[::-1]:
            times.append(asked_by("b", server, content)["hfblend"]["ttft_ms"])
        if number % 4 == 0:
            again.append(asked_by("b", server, of_a)["hfblend"]["ttft_ms"])
    return seen, unseen, again


@pytest.mark.slow  # and of a quiet machine
@pytest.mark.parametrize("is_blended", [True, False])
def test_time_does_not_tell_what_another_tenant_has(is_blended):
    """By the time that the server itself tells. Where 200 pairs look as if, chance decides: it is asked 600 more."""
    options = {"hfblend": {"enabled": is_blended}, "max_tokens": 2}  # stock keeps no blocks of an answer of one
    with served(MemoryStore("64MB"), KEYS, model=make_llama(layers=2)) as server:
        seen, unseen, again = timed(server, range(200), options)
        if abs(auc(seen, unseen)[0] - 0.5) > 0.05:
            for times, more in zip((seen, unseen, again), timed(server, range(200, 800), options)):
                times += more
    control, _ = auc(again, unseen)
    found, error = auc(seen, unseen)
    assert control > 0.6, f"AUC {control:.3f} of what B has: this machine's times tell nothing."
    assert abs(found - 0.5) <= 0.05, f"AUC {found:.3f} ± {error:.3f} of {len(seen)} pairs"
    print(f"AUC {found:.3f} ± {error:.3f} of {len(seen)} pairs; of what B has {control:.3f}")  # noqa: T201


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_wrong_file_of_keys_ends_the_command_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("hfblend.demo.model.load", None)
    file = tmp_path / "keys.txt"
    file.write_text("good-secret=tenant\nother-secret=tenant with blanks\n")
    outcome = CliRunner().invoke(app, ["serve", "--port", "0", "--api-keys", str(file)])
    assert outcome.exit_code == 2
    assert "Entry 2" in outcome.output
    assert "secret" not in outcome.output.replace(str(file), "")
