"""Bodies of requests, checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import HTTPException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..arguments import described
from ..config import Correction, Deviation, Selection
from ..prompts.tokenize import FIELDS
from .checks import openai_error

_STOP = Annotated[str, Field(min_length=1, max_length=256)]
# Fields of OpenAI's that would change the answer, and that are not supported -> values that change nothing.
_NO_OPS: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "function_call": ("none",), "store": (False,),
    "parallel_tool_calls": (True,), "service_tier": ("auto", "default"), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class BlendOptions(_Object):
    """The settings of blending that a client may choose for its request, as in `BlendConfig`."""

    enabled: bool = True
    recompute_ratios: list[float] = []
    check_layers: list[int] = []
    score_layers: list[int] | None = None
    selection: Selection | None = None
    deviation: Deviation | None = None
    correction: Correction | None = None
    min_reused_tokens: int = 0
    force_chunk_start: int = 0


class StreamOptions(_Object):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Body(_Object):
    """The options of chats and completions."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[_STOP], BeforeValidator(_as_list), Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    hfblend: BlendOptions = BlendOptions()
    # Accepted, and without effect on the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return self.stop or []

    @property
    def sampling(self) -> dict[str, Any]:
        """The options of sampling that were given."""
        return self.model_dump(include={"temperature", "top_p", "top_k", "seed"}, exclude_none=True)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of the usage alone."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CacheControl(_Lenient):
    type: Literal["ephemeral"]


class TextPart(_Object):
    """A part of a message; with `cache_control`, it is a chunk."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class _Called(_Lenient):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(_Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Called


class _Function(_Object):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Object):
    type: Literal["function"]
    function: _Function


class Message(_Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Clients send answers back with these.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None


def _text_of(document: Any) -> Any:
    """Returns a document's text, its title on a line before it; of objects, and of Cohere's `{"data": {…}}`."""
    if isinstance(document, dict):
        data = document.get("data")
        fields = document | data if isinstance(data, dict) else document
        texts = [text for name in (*FIELDS, "snippet") if isinstance(text := fields.get(name), str)]
        if not texts:
            raise ValueError('a document is a text, or an object with a "text" or a "snippet"')
        title = fields.get("title")
        document = f"{title}\n{texts[0]}" if isinstance(title, str) and title else texts[0]
    if isinstance(document, str) and not document.strip():
        raise ValueError("a document must not be empty")
    return document


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    documents: list[Annotated[str, BeforeValidator(_text_of)]] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        """The tools as they were given, unless none may be called."""
        tools = self.tools if self.tool_choice != "none" else None
        return [tool.model_dump(exclude_unset=True) for tool in tools] if tools else None


def _only_one(prompt: Any) -> Any:
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int) else prompt


class CompletionBody(Body):
    """The body of `/v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_only_one)]

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens


AnyBody = TypeVar("AnyBody", bound=Body)


def parsed(kind: type[AnyBody], body: dict[str, Any]) -> AnyBody:
    """Returns a checked body; raises the refusal of one with fields that are unknown, unfit or not supported."""
    for name in _NO_OPS.keys() & body.keys():
        value = body[name]
        if value is not None and not any(type(value) is type(one) and value == one for one in _NO_OPS[name]):
            raise refusal(f"{name} is not supported here, got {described(value)}: leave it out.", param=name)
    try:
        return kind.model_validate({name: value for name, value in body.items() if name not in _NO_OPS})
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from error


def invalid(errors: Any) -> HTTPException:
    """The refusal of a body, for the first of pydantic's or FastAPI's errors."""
    place = [part for part in errors[0]["loc"] if part != "body"]
    where = f"{'.'.join(map(str, place))}: " if place else ""
    field = place[0] if place and isinstance(place[0], str) else None  # of JSON that cannot be read, a number
    return refusal(where + errors[0]["msg"], param=field)


def refusal(
    message: str, status: int = 400, *, param: str | None = None, code: str | None = None,
    headers: dict[str, str] | None = None,
) -> HTTPException:  # fmt: skip
    """The refusal of a request, with an error in OpenAI's form."""
    error = openai_error(status, message, code, param)["error"]
    # A client's half of a surrogate pair, quoted, could not be encoded.
    clean = {name: text and text.encode(errors="replace").decode() for name, text in error.items()}
    return HTTPException(status, {"error": clean}, headers)
