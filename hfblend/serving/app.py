"""The server: Transformers' own serving app, in front of one `Engine`.

    body -> schema.py: checked -> prompts.py: ids, chunks -> Engine: tokens -> Reply: text -> stock's responses

Routes, responses, and the parsing of tool calls are those of `transformers serve`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from starlette.exceptions import HTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    BaseHandler,
    GenerationState,
    ReasoningText,
    ToolCall,
    build_response_parser,
    response_events_to_chunks,
)

from ..prompts.prompt import Prompt
from ..store import flush
from .caller import caller
from .engine import Engine, EngineDown
from .prompts import Prompts
from .request import checked
from .schema import ChatBody, CompletionBody, invalid, parsed, refusal
from .text import Text

logger = logging.getLogger(__name__)

_UNFIT = (TypeError, ValueError)
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


def build_app(engine: Engine, tokenizer: Any, name: str, separator: str | None = None) -> FastAPI:
    """Returns the app of a started engine, which it stops at its end.

    Args:
        tokenizer: the model's, a fast one; chats need its chat template.
        name: that clients call the model by.
        separator: text between the chunks of plain prompts; default, they have none.

    Raises:
        ValueError: a tokenizer without Rust's, or a separator that it does not know.
    """
    served = Served(engine, tokenizer, name, separator)
    state, none = EngineState(engine), cast(Any, None)  # the other routes are taken off
    app = build_server(served, Chats(served, state), Completions(served, state), none, none, none, state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    for kind in (HTTPException, RequestValidationError, EngineDown, Exception):
        app.exception_handler(kind)(_refused)
    return app


async def _refused(request: Request, error: Exception) -> JSONResponse:
    error = _as_http(error)
    return JSONResponse(error.detail, error.status_code, error.headers)


def _as_http(error: Exception) -> HTTPException:
    """An error as a client is told it."""
    if isinstance(error, RequestValidationError):
        return invalid(error.errors())
    if isinstance(error, EngineDown):
        return refusal(str(error), 503, code="engine_down", headers={"Retry-After": "2"})
    if not isinstance(error, HTTPException):
        logger.error("A request failed.", exc_info=error)
        return refusal("The server failed at this request.", 500)
    if isinstance(error.detail, dict):
        return error
    return refusal(str(error.detail), error.status_code, headers=dict(error.headers or {}))


@contextmanager
def _client_errors(kinds: Any, param: str | None, code: str | None = None) -> Iterator[None]:
    """Refuses a request whose content raises an error of these kinds."""
    try:
        yield
    except HTTPException:
        raise
    except kinds as error:
        logger.info("A request was refused.", exc_info=True)
        raise refusal(str(error) or type(error).__name__, param=param, code=code) from error


class Served(ModelManager):
    """The one model that is served, in the place of stock's manager of many, whose `__init__` would load them."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, separator: str | None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("The server needs a fast tokenizer, which decodes token by token; this one is in Python.")
        self.engine, self.tokenizer, self.name = engine, tokenizer, name
        self.prompts = Prompts(tokenizer, separator)

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.name, "object": "model", "created": 0, "owned_by": "hfblend"}]

    get_gen_models = list_models  # its name in Transformers 5.23

    def shutdown(self) -> None:
        """Ends the engine, and writes what the store has not yet written."""
        self.engine.stop(hard_stop=True)
        flush(self.engine.store)


class EngineState(GenerationState):
    """Tells stock's `/health` whether the engine takes requests."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(continuous_batching=True)
        self.engine = engine

    def is_cb_alive(self) -> bool:
        return self.engine.is_up


class Reply:
    """An answer on its way from the engine: its tokens become text, reasoning and tool calls.

    Text that may be the beginning of a stop string waits until the next token.

    Attributes:
        output: the engine's last one.
        finish_reason: `None` before the end.
    """

    def __init__(self, served: Served, kind: str, parser: Any, stops: list[str], started: float) -> None:
        self.id, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())  # ids of a client's might be another's
        self.engine = served.engine
        self.output: Any = None
        self.num_tokens, self.num_calls = 0, 0
        self.finish_reason: str | None = None
        self._ttft_ms: float | None = None
        self._started, self._stops, self._parser, self._held, self._unparsed = started, stops, parser, "", ""
        eos = self.engine.generation_config.eos_token_id
        self._eos = eos if isinstance(eos, list) else [eos]
        self._text = Text(served.tokenizer._tokenizer, skips_special=parser is None)
        self._queue = asyncio.Queue[Any]()
        if parser is not None:
            self._parse(lambda: parser.initial_events)

    def start(self, prompt: Prompt, **options: Any) -> None:
        """Adds the request to the engine; raises its errors."""
        self.prompt = prompt
        self.engine.register_result_handler(self.id, self._take)
        try:
            self.engine.add_request(prompt, self.id, record_timestamps=True, **options)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the request, if it has not ended."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self.engine.cancel_request(self.id)

    async def items(self) -> AsyncIterator[str | ToolCall]:
        """Yields text, `ReasoningText` and tool calls; raises `EngineDown`."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def usage(self) -> CompletionUsage:
        """The tokens, those whose K/V were there before, and the chunks."""
        trace, num_matched = self.output.trace, min(self.output.num_matched, len(self.prompt))
        found = [range(*piece.span) for piece in trace.pieces if piece.status == "hit"]
        selected = [] if trace.selected_idx is None else trace.selected_idx.tolist()
        cached = sum(map(len, found)) - sum(any(i in one for one in found) for i in selected)
        hits = trace.hits if trace.chunks or not trace.blended else len(self.prompt.chunk_spans)  # in blocks
        facts = {"hits": hits, "misses": trace.misses, "recomputed": trace.selected_tokens, "fallback": trace.fallback}
        return CompletionUsage.model_validate({
            "prompt_tokens": len(self.prompt),
            "completion_tokens": self.num_tokens,
            "total_tokens": len(self.prompt) + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": max(cached, num_matched)},
            "hfblend": {**facts, "ttft_ms": self._ttft_ms},
        })  # fmt: skip

    # --- on the event loop, whenever the engine has an output -----------------------------------------------------

    def _take(self, output: Any) -> None:
        if self.finish_reason is not None:
            return
        self.output = output
        try:
            self._read(output)
        except Exception as error:  # stock gives other requests their outputs after this
            self._queue.put_nowait(error)

    def _read(self, output: Any) -> None:
        new = output.generated_tokens[self.num_tokens :]
        if new and self._ttft_ms is None:
            self._ttft_ms = round(1000 * ((output.timestamps or [time.perf_counter()])[0] - self._started), 3)
        for token in new:
            self.num_tokens += 1
            is_shown = self._parser is not None or token not in self._eos  # a parser takes it for the end of a part
            self._held += self._text.add(token) if is_shown else ""
            if self._release():
                self.close()
                return self._end("stop")
        if output.error is not None:
            logger.warning("Request %s failed: %s", self.id, output.error)
            self._queue.put_nowait(EngineDown("The engine failed at this request; try again soon."))
        elif output.is_finished():
            self._say(self._held + self._text.rest())
            self._end("stop" if output.generated_tokens[-1] in self._eos else "length")

    def _release(self) -> bool:
        """Says the text that belongs to no stop string; returns whether one has come."""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        beginnings = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        end = min(places, default=len(self._held) - max(beginnings, default=0))
        self._say(self._held[:end])
        self._held = self._held[end:]
        return bool(places)

    def _say(self, text: str) -> None:
        if text and self._parser is not None:
            self._unparsed += text
            self._parse(lambda: self._parser.feed(text))
        elif text:
            self._queue.put_nowait(text)

    def _parse(self, events: Callable[[], Any]) -> None:
        """Passes on what the parser made of the text; a tool call that it cannot read comes as text."""
        try:
            items = response_events_to_chunks(events())
        except Exception as error:
            logger.info("An answer goes on unparsed: %s", error)
            items, self._parser = [self._unparsed], None
        for item in items:
            self._unparsed = ""
            self.num_calls += isinstance(item, ToolCall)
            self._queue.put_nowait(item)

    def _end(self, reason: str) -> None:
        if self._parser is not None:
            self._parse(lambda: self._parser.finalize()[1])
        self.finish_reason = "tool_calls" if self.num_calls else reason
        self._queue.put_nowait(None)


class _Stream(StreamingResponse):
    """Server-sent events, which end their request however they end."""

    def __init__(self, events: AsyncIterator[str], reply: Reply) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.reply = reply

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self.reply.close()


class _Handler(BaseHandler):
    """Both routes: a checked body, its prompt, and the answer as a whole or as events."""

    model_manager: Served
    body: type[Any]
    kind: str  # of ids
    object: str  # of events

    def __init__(self, served: Served, state: EngineState) -> None:
        super().__init__(served, state)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        started, served = time.perf_counter(), self.model_manager
        asked = parsed(self.body, body)
        if asked.model not in (None, served.name):
            message = f"The model {asked.model!r} does not exist; this server has {served.name!r}."
            raise refusal(message, 404, param="model", code="model_not_found")
        prompt, parser = await asyncio.to_thread(self._prepared, asked)
        reply = Reply(served, self.kind, parser, asked.stops, started)
        self._start(reply, asked, prompt)
        if asked.stream:
            return _Stream(self._events(reply, asked.includes_usage), reply)
        try:
            items = [item async for item in reply.items()]
        finally:
            reply.close()
        return JSONResponse(self._whole(reply, items))

    def _start(self, reply: Reply, asked: Any, prompt: Prompt) -> None:
        engine = self.model_manager.engine
        namespace = caller.get().namespace or engine.config.namespace
        with _client_errors(_UNFIT, "hfblend"):
            chosen = asked.hfblend.model_dump(exclude_unset=True)
            config = checked(replace(engine.config, namespace=namespace, **chosen), engine.hf_model)
        wanted = asked.max_new_tokens or engine.generation_config.max_new_tokens or 1
        code = "context_length_exceeded" if len(prompt) + wanted > engine.capacity else None
        with _client_errors(_UNFIT, None, code):
            streaming = bool(asked.stream or asked.stops)
            options = {"max_new_tokens": asked.max_new_tokens, "streaming": streaming, **asked.sampling}
            reply.start(prompt, config=config, **options)

    async def _events(self, reply: Reply, includes_usage: bool) -> AsyncIterator[str]:
        num_calls = 0
        try:
            async for item in reply.items():
                yield self._event(reply, item, num_calls)
                num_calls += isinstance(item, ToolCall)
            usage = None if includes_usage else reply.usage()
            yield self._event(reply, finish_reason=reply.finish_reason, usage=usage)
            if includes_usage:
                yield self.chunk_to_sse(json.dumps(self._usage_alone(reply)))
        except Exception as error:
            yield self.chunk_to_sse(json.dumps(_as_http(error).detail))

    def _usage_alone(self, reply: Reply) -> dict[str, Any]:
        head = {"id": reply.id, "object": self.object, "created": reply.created, "model": self.model_manager.name}
        return {**head, "choices": [], "usage": reply.usage().model_dump()}

    def _prepared(self, asked: Any) -> tuple[Prompt, Any]:
        """The prompt, and the parser of its answer if there is one."""
        raise NotImplementedError

    def _event(self, reply: Reply, item: Any = None, num_calls: int = 0, **end: Any) -> str:
        """The event of an item, which comes after so many tool calls, or of the end."""
        raise NotImplementedError

    def _whole(self, reply: Reply, items: list[Any]) -> dict[str, Any]:
        """The answer that is not streamed."""
        raise NotImplementedError


class Chats(_Handler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    body, kind, object = ChatBody, "chatcmpl", "chat.completion.chunk"

    def _prepared(self, asked: ChatBody) -> tuple[Prompt, Any]:
        served, model = self.model_manager, cast(Any, self.model_manager.engine.model)
        with _client_errors(Exception, "messages"):  # chat templates raise whatever they like
            prompt = served.prompts.of_chat(asked)
            return prompt, build_response_parser(served.tokenizer, model, prompt.ids, tools=asked.usable_tools)

    async def _events(self, reply: Reply, includes_usage: bool) -> AsyncIterator[str]:
        yield self._build_chunk_sse(reply.id, model=self.model_manager.name, role="assistant")
        async for event in super()._events(reply, includes_usage):
            yield event

    def _event(self, reply: Reply, item: Any = None, num_calls: int = 0, **end: Any) -> str:
        name = "content"
        if isinstance(item, ToolCall):
            name, item = "tool_calls", [{"index": num_calls, **_call(reply, item, num_calls)}]
        elif isinstance(item, ReasoningText):
            name = "reasoning_content"
        return self._build_chunk_sse(reply.id, model=self.model_manager.name, **{name: item}, **end)

    def _whole(self, reply: Reply, items: list[Any]) -> dict[str, Any]:
        calls = [item for item in items if isinstance(item, ToolCall)]
        reasoning = "".join(item for item in items if isinstance(item, ReasoningText))
        return self._build_completion(
            reply.id,
            "".join(item for item in items if type(item) is str),
            self.model_manager.name,
            str(reply.finish_reason),
            reply.usage(),
            [_call(reply, call, i) for i, call in enumerate(calls)] or None,
            reasoning or None,
        )


def _call(reply: Reply, call: ToolCall, number: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"{reply.id}_tool_call_{number}", "type": "function", "function": function}


class Completions(_Handler, CompletionHandler):
    """`/v1/completions`."""

    body, kind, object = CompletionBody, "cmpl", "text_completion"

    def _prepared(self, asked: CompletionBody) -> tuple[Prompt, Any]:
        with _client_errors(Exception, "prompt"):
            return self.model_manager.prompts.of_text(asked.prompt), None

    def _event(self, reply: Reply, item: Any = None, num_calls: int = 0, **end: Any) -> str:
        return self._build_chunk_sse(reply.id, self.model_manager.name, item or "", **end)

    def _whole(self, reply: Reply, items: list[Any]) -> dict[str, Any]:
        reason: Any = reply.finish_reason
        choice = CompletionChoice(text="".join(items), index=0, finish_reason=reason)
        head: dict[str, Any] = {"id": reply.id, "created": reply.created, "model": self.model_manager.name}
        whole = Completion(**head, object="text_completion", choices=[choice], usage=reply.usage())
        return whole.model_dump(exclude_none=True)
