"""Which replica a prompt goes to, and what a client gets when a replica is lost; without Ray."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

import httpx
import pytest

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")

from hfblend.serving.caller import Caller, caller
from hfblend.serving.relay import Call, Differs, Relay, Sent, played
from hfblend.serving.routing import _FEW, _REMEMBERED, Balance, chunks_in

CHAT = "/v1/chat/completions"


def chat(documents=(), system="be brief", **options):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "w10"}]
    return json.dumps({"messages": messages, "documents": list(documents), **options}).encode()


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_chunks_are_the_same_in_any_order_and_after_any_question():
    one, other = chunks_in(chat(["a", "b"])), chunks_in(chat(["b", "a"], temperature=1))
    assert len(one) == 2
    assert one == other
    assert len(one & chunks_in(chat(["b", "c"]))) == 1


def test_a_tenant_and_a_system_prompt_have_chunks_of_their_own():
    assert not chunks_in(chat(["a"])) & chunks_in(chat(["a"]), "tenant")
    assert not chunks_in(chat(["a"])) & chunks_in(chat(["a"], system="be long"))


def test_parts_and_pieces_are_chunks():
    parts = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("a", "b")]
    asked = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "which?"}]}]}
    assert len(chunks_in(json.dumps(asked).encode())) == 2
    plain = json.dumps({"prompt": "first # a # b # which?"}).encode()
    assert len(chunks_in(plain, separator=" # ")) == 2
    assert chunks_in(plain, separator=" # ") == chunks_in(
        json.dumps({"prompt": "first # b # a # why?"}).encode(), "", " # "
    )
    assert not chunks_in(plain)
    assert not chunks_in(json.dumps({"prompt": "no chunks"}).encode(), separator=" # ")


_UNFIT = (
    b"", b"{", b"[1]", b"3", b"\xff", b"[" * 9999, b'{"documents": 3}', b'{"messages": [3, {"content": [3]}]}',
    b'{"messages": {"a": 1}}',
)  # fmt: skip


@pytest.mark.parametrize("body", _UNFIT)
def test_bodies_that_the_app_will_refuse_have_no_chunks(body):
    assert chunks_in(body) == frozenset()


# --- choice -----------------------------------------------------------------------------------------------------------

NONE = {"a": frozenset(), "b": frozenset()}


def test_a_prompt_goes_where_its_chunks_are():
    balance = Balance()
    first = balance.ranked("1", {1, 2, 3}, NONE)[0]
    balance.ended("1", first)
    assert balance.ranked("2", {2, 3, 4}, NONE)[0] == first
    other = balance.ranked("3", {7, 8}, NONE)[0]
    assert other != first
    assert balance.ranked("4", {8, 7, 1}, NONE)[0] == other


def test_chunks_that_a_replica_tells_of_count():
    assert Balance().ranked("1", {1, 2}, {**NONE, "b": frozenset({2})})[0] == "b"


def test_a_replica_has_a_few_requests_or_at_most_twice_as_many_as_another():
    balance, chunks = Balance(), {1, 2, 3}
    load = Counter()
    for i in range(60):
        load[balance.ranked(str(i), chunks, NONE)[0]] += 1
        assert max(load.values()) <= max(_FEW, 2 * min(load["a"], load["b"]))
    assert load["a"] + load["b"] == 60


def test_requests_that_were_sent_elsewhere_or_have_ended_count_there():
    balance = Balance()
    chosen, other = balance.ranked("1", {1}, NONE)
    balance.sent("1", other, {1})
    assert balance.running == {"1": other}
    balance.ended("1", chosen)  # an end of an earlier attempt
    assert balance.running == {"1": other}
    balance.ended("1", other)
    assert balance.running == {}


def test_chunks_of_replicas_that_are_gone_are_forgotten_and_old_ones_too():
    balance = Balance()
    balance.ranked("1", {1}, {"gone": frozenset()})
    balance.ranked("2", set(range(10, 10 + _REMEMBERED)), {"a": frozenset()})
    balance.ranked("3", {1}, {"a": frozenset()})
    assert set(balance._held) == {"a"}
    assert len(balance._held["a"]) == _REMEMBERED
    assert 10 not in balance._held["a"]


# --- answers ----------------------------------------------------------------------------------------------------------


def event(name, created=1, **delta):
    end = {"finish_reason": delta.pop("end")} if "end" in delta else {}
    choice = {"index": 0, "delta": delta, **end}
    return b"data: " + json.dumps({"id": name, "created": created, "choices": [choice]}).encode()


def delta_of(news):
    data = json.loads(news.removeprefix(b"data: "))
    return data["id"], data["created"], {k: v for k, v in data["choices"][0]["delta"].items() if v}


def test_a_repeated_answer_is_cut_to_what_is_new():
    sent = Sent()
    first = [event("one", role="assistant"), event("one", content="a b"), event("one", content=" c")]
    assert [sent.news(one) for one in first] == first
    sent.repeat()
    again = [event("two", 2, role="assistant"), event("two", 2, content="a"), event("two", 2, content=" b c d")]
    assert [sent.news(one) for one in again[:2]] == [b"", b""]
    assert delta_of(sent.news(again[2])) == ("one", 1, {"content": " d"})
    sent.repeat()  # and a third replica
    assert sent.news(event("three", content="a b c d")) == b""
    assert delta_of(sent.news(event("three", end="stop"))) == ("one", 1, {})


def test_reasoning_and_tool_calls_are_cut_as_well():
    sent = Sent()

    def call(name, number):
        function = {"name": f"look{number}", "arguments": "{}"}
        return event(name, tool_calls=[{"id": f"{name}_tool_call_{number}", "function": function}])

    for one in (event("one", reasoning_content="hm"), event("one", content="x"), call("one", 0)):
        sent.news(one)
    sent.repeat()
    assert sent.news(event("two", reasoning_content="hm")) == b""
    assert sent.news(event("two", content="x")) == b""
    assert sent.news(call("two", 0)) == b""
    assert delta_of(sent.news(call("two", 1)))[2]["tool_calls"][0]["id"] == "one_tool_call_1"
    sent.repeat()
    sent.news(event("three", reasoning_content="hm"))
    with pytest.raises(Differs, match="tool_calls"):
        sent.news(call("three", 7))


def test_completions_usage_and_done_pass():
    sent = Sent()
    text = b'data: {"id": "one", "created": 1, "choices": [{"index": 0, "text": "a b"}]}'
    assert sent.news(text) == text
    sent.repeat()
    new = sent.news(b'data: {"id": "two", "created": 2, "choices": [{"index": 0, "text": "a b c"}]}')
    assert json.loads(new[6:])["choices"][0]["text"] == " c"
    usage = b'data: {"id": "two", "created": 2, "choices": [], "usage": {"total_tokens": 3}}'
    assert json.loads(sent.news(usage)[6:]) == {"id": "one", "created": 1, "choices": [], "usage": {"total_tokens": 3}}
    assert sent.news(b"data: [DONE]") == b"data: [DONE]"
    error = b'data: {"error": {"message": "no"}}'
    assert sent.news(error) == error


@pytest.mark.parametrize("last", [event("two", content="a c"), event("two", end="length")])
def test_an_answer_that_is_another_one_is_noticed(last):
    sent = Sent()
    sent.news(event("one", content="a b"))
    sent.repeat()
    with pytest.raises(Differs):
        sent.news(last)


@pytest.mark.parametrize(
    ("options", "is_repeatable"),
    [({}, True), ({"temperature": 0}, True), ({"temperature": 1}, False), ({"temperature": 1, "seed": 0}, True)],
)
def test_greedy_and_seeded_answers_are_repeatable(options, is_repeatable):
    assert Call("POST", CHAT, b"", [], chat(**options)).is_repeatable == is_repeatable


# --- the relay --------------------------------------------------------------------------------------------------------


class Lost(Exception):
    """A replica was lost."""


START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
WHOLE = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}


def body(*events, more=True):
    return {"type": "http.response.body", "body": b"".join(one + b"\n\n" for one in events), "more_body": more}


def streamed(name, *texts):
    events = [event(name, role="assistant"), *(event(name, content=text) for text in texts)]
    return [START, *map(body, events), body(event(name, end="stop")), body(more=False)]


def asked(*runs, options=None):
    """What a client gets from replicas that say these messages; a number is a loss after so many of the last run."""
    calls, left = [], list(runs)

    async def ask(call):
        calls.append(call)
        messages = left.pop(0)
        for message in messages:
            if message is Lost:
                raise Lost
            yield message

    async def client():
        transport = httpx.ASGITransport(Relay(ask, (Lost,)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await http.post(CHAT, content=chat(["a"], **(options or {})))

    answer = asyncio.run(client())
    return answer, calls


def text_of(answer):
    events = [json.loads(one[6:]) for one in answer.text.split("\n\n") if one]
    choices = [one["choices"][0] for one in events if one.get("choices")]
    error = next((one["error"] for one in events if "error" in one), None)
    return (
        "".join(one["delta"].get("content") or "" for one in choices),
        {one["id"] for one in events if "id" in one},
        error,
    )


def test_an_answer_passes_unchanged():
    run = streamed("one", "a", " b")
    answer, calls = asked(run)
    assert answer.content == b"".join(message.get("body", b"") for message in run)
    assert len(calls[0].chunks) == 1
    whole, _ = asked([WHOLE, {"type": "http.response.body", "body": b"{}"}])
    assert whole.json() == {}


def test_an_answer_lost_before_its_first_token_is_asked_for_again():
    sampled = {"temperature": 1}
    one = streamed("one", "a")
    for lost in ([Lost], [START, Lost], [*one[:2], Lost]):
        answer, calls = asked(lost, streamed("two", "x", " y"), options=sampled)
        assert text_of(answer)[0] == "x y"
        assert text_of(answer)[2] is None
        assert len(calls) == 2
        assert answer.text.count('"role"') == 1
    whole, _ = asked([WHOLE, Lost], [WHOLE, {"type": "http.response.body", "body": b"{}"}], options=sampled)
    assert whole.json() == {}


def test_no_token_comes_twice():
    one, two = streamed("one", "a", " b"), streamed("two", "a", " b", " c")
    answer, _ = asked([*one[:3], Lost], [*two[:4], Lost], streamed("three", "a b", " c", " d"))
    assert text_of(answer) == ("a b c d", {"one"}, None)
    assert answer.text.count("finish_reason") == 1


def test_a_half_event_is_not_passed_on_twice():
    half = {"type": "http.response.body", "body": event("one", content=" b")[:20], "more_body": True}
    answer, _ = asked([*streamed("one", "a")[:3], half, Lost], streamed("two", "a", " b"))
    assert text_of(answer) == ("a b", {"one"}, None)


def test_what_cannot_go_on_is_an_error_in_the_stream():
    cut = [*streamed("one", "a", " b")[:4], Lost]
    sampled, calls = asked(cut, options={"temperature": 1})
    assert text_of(sampled)[0] == "a b"
    assert text_of(sampled)[2]["code"] == "replica_lost"
    assert len(calls) == 1
    differs, _ = asked(cut, streamed("two", "a", " x"))
    assert "does not go on" in text_of(differs)[2]["message"]
    failed = [{**WHOLE, "status": 503}, {"type": "http.response.body", "body": b"{}"}]
    assert "status 503" in text_of(asked(cut, failed)[0])[2]["message"]


def test_attempts_are_bounded():
    answer, calls = asked(*[[Lost]] * 9)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert answer.headers["retry-after"]
    assert len(calls) == 4


def test_an_app_that_ends_in_mid_answer_is_an_error():
    answer, calls = asked(streamed("one", "a")[:3])
    assert "failed" in text_of(answer)[2]["message"]
    assert len(calls) == 1


# --- the app's side ---------------------------------------------------------------------------------------------------


def test_an_app_is_played_for_the_caller_and_ends_with_its_client():
    seen, ended = [], []

    async def app(scope, receive, send):
        seen.append((scope["path"], caller.get().namespace, (await receive())["body"]))
        try:
            await send(START)
            await receive()
        finally:
            ended.append(True)

    async def client():
        messages = played(app, Call("POST", CHAT, b"", [], b"{}", Caller("tenant")))
        assert await anext(messages) == START
        assert not ended
        await messages.aclose()

    asyncio.run(client())
    assert seen == [(CHAT, "tenant", b"{}")]
    assert ended == [True]
    assert caller.get() == Caller()


def test_an_app_that_fails_is_logged(caplog):
    async def app(scope, receive, send):
        await send(WHOLE)
        raise ValueError("broken")

    async def client():
        return [message async for message in played(app, Call("GET", "/health", b"", [], b""))]

    assert asyncio.run(client()) == [WHOLE]
    assert "broken" in caplog.text


@pytest.mark.parametrize("words", [["serve", "--ray", "--port", "0"], ["precompute", "--ray", "--store", "chunks"]])
def test_without_ray_the_commands_say_what_to_install(monkeypatch, tmp_path, words):
    from typer.testing import CliRunner

    from hfblend.cli import app

    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "corpus").write_text('"a text"')
    corpus = ["--corpus", str(tmp_path / "corpus")] if words[0] == "precompute" else []
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, [*words, *corpus])
    assert outcome.exit_code == 1
    assert "pip install 'hfblend[ray]'" in " ".join(outcome.output.split())
