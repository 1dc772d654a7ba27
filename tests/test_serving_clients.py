"""Clients of others against the live server: OpenAI's, LangChain's and LlamaIndex's, streamed and not."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai

from live_server import served  # isort: skip

DOCUMENTS = [" ".join(f"w{6 + (i * 31 + j * 7) % 90}" for j in range(30)) for i in range(3)]
QUESTION = "w10 w11"
COUNT = 6  # of the answer's tokens


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture(autouse=True)
def empty(server):
    """Every test finds a store without chunks, and blocks without K/V."""
    with server.engine.pause():
        server.engine.batch_processor.cache.evict_cached_blocks()
    server.engine.store._entries.clear()


def reordered(number):
    """The documents of a question: the same ones, each time in another order."""
    return DOCUMENTS[number:] + DOCUMENTS[:number]


def check(answers):
    """(text, usage) of a whole answer, of one with the documents in another order, and of a streamed one as that."""
    (_, first), (whole, second), (streamed, third) = answers
    assert streamed == whole != ""
    found = [(usage["hfblend"]["hits"], usage["hfblend"]["misses"]) for usage in (first, second, third)]
    assert found == [(0, 3), (3, 0), (3, 0)]
    for usage in (first, second, third):
        assert usage["completion_tokens"] == COUNT
        assert usage["total_tokens"] == usage["prompt_tokens"] + COUNT
        assert usage["hfblend"]["fallback"] is None
        assert usage["hfblend"]["ttft_ms"] > 0
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert 0 < second["prompt_tokens_details"]["cached_tokens"] < second["prompt_tokens"]
    assert 0 < second["hfblend"]["recomputed"] < second["prompt_tokens"]


# --- OpenAI -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def asked(client, number, **options):
    messages = [{"role": "user", "content": QUESTION}]
    extra = {"documents": reordered(number)}
    options = {"messages": messages, "max_tokens": COUNT, "temperature": 0, "extra_body": extra, **options}
    return client.chat.completions.create(model="tiny", **options)


def test_openai(client):
    whole = [asked(client, number) for number in (0, 1)]
    *chunks, last = asked(client, 1, stream=True, stream_options={"include_usage": True})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    answers = [(one.choices[0].message.content, one.usage) for one in whole]
    check([(text, usage.model_dump()) for text, usage in [*answers, (text, last.usage)]])


def test_the_five_lines_of_the_page(server, capsys):
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(import openai\n.+?)```", page, re.DOTALL)[1]
    exec(block.replace("http://127.0.0.1:8000", server.url), {})
    assert "'misses': 2" in capsys.readouterr().out


def test_openai_without_documents(client):
    assert client.models.list().data[0].id == "tiny"
    texts = []
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=QUESTION, max_tokens=COUNT, temperature=0.7, seed=1, stream=stream
        )
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        texts.append(text)
    assert texts[0] == texts[1] != ""


def test_openai_names_the_error(client):
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported") as refused:
        asked(client, 0, logprobs=True)
    assert refused.value.param == "logprobs"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": QUESTION}])


def test_openai_by_many_at_once(server):
    async def all_answers():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(asked(client, number % 3) for number in range(9)))

    answers = asyncio.run(all_answers())
    texts = [one.choices[0].message.content for one in answers]
    assert texts == texts[:3] * 3
    assert all(one.usage.hfblend["fallback"] is None for one in answers)


# --- frameworks -------------------------------------------------------------------------------------------------------


def test_langchain(server):
    package = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options = {"base_url": f"{server.url}/v1", "api_key": "any", "model": "tiny", "max_retries": 0}
    model = package.ChatOpenAI(**options, temperature=0, max_tokens=COUNT, stream_usage=True)
    whole = [model.invoke(QUESTION, extra_body={"documents": reordered(number)}) for number in (0, 1)]
    first, *others = model.bind(extra_body={"documents": reordered(1)}).stream(QUESTION)
    assert len(others) >= COUNT
    streamed = sum(others, first)
    usage = whole[1].response_metadata["token_usage"]
    # Of a stream, it keeps only the counts that it knows.
    counts = [one.usage_metadata for one in (whole[1], streamed)]
    assert [(one["input_tokens"], one["output_tokens"]) for one in counts] == [(usage["prompt_tokens"], COUNT)] * 2
    assert all(one["input_token_details"]["cache_read"] > 0 for one in counts)
    check([(one.content, one.response_metadata["token_usage"]) for one in whole] + [(streamed.content, usage)])


def test_llamaindex(server):
    package = pytest.importorskip(
        "llama_index.llms.openai_like", reason="llama-index-llms-openai-like is not installed"
    )
    types = pytest.importorskip("llama_index.core.llms")
    question = [types.ChatMessage(role="user", content=QUESTION)]

    def model(number):
        extra = {"extra_body": {"documents": reordered(number)}}
        options = {"api_base": f"{server.url}/v1", "api_key": "any", "model": "tiny", "max_retries": 0}
        return package.OpenAILike(
            **options, is_chat_model=True, temperature=0, max_tokens=COUNT, additional_kwargs=extra
        )

    whole = [model(number).chat(question) for number in (0, 1)]
    *pieces, last = model(1).stream_chat(question)
    assert len(pieces) >= COUNT
    answers = [(one.message.content, one.raw.usage.model_dump()) for one in [*whole, last]]
    check(answers)
