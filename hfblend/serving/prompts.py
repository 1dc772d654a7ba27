"""Prompts of checked bodies, with their chunks."""

from __future__ import annotations

import inspect
import json
import uuid
from typing import Any

import torch

from ..prompts.prompt import ChunkSpans, Prompt
from ..prompts.separator import Separator
from .schema import ChatBody, Message, refusal


class Prompts:
    """Makes prompts with a tokenizer.

    Args:
        separator: text between the chunks of prompts without other chunks; `None`, they have none.
    """

    def __init__(self, tokenizer: Any, separator: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.separator = None if separator is None else Separator(separator, tokenizer)
        functions = (tokenizer.apply_chat_template, Prompt.from_chat)
        self._not_for_clients = {name for one in functions for name in inspect.signature(one).parameters}

    def of_chat(self, body: ChatBody) -> Prompt:
        """Returns the chat template's prompt; its chunks are the documents, or the parts with `cache_control`."""
        if refused := self._not_for_clients & body.chat_template_kwargs.keys():
            raise refusal(f"{min(refused)} is not for clients.", param="chat_template_kwargs")
        mark, chunks = f"{{{uuid.uuid4().hex}}}", list[str]()
        messages = [_for_template(message, mark, chunks) for message in body.messages]
        options = {"tools": body.usable_tools, **body.chat_template_kwargs}
        if body.documents and chunks:
            raise refusal("Chunks come as documents or as parts with cache_control; got both.", param="documents")
        if body.documents:
            return Prompt.from_chat(self.tokenizer, messages, body.documents, **options)
        if chunks:
            each = [[chunk] for chunk in chunks]
            return Prompt.from_chat(self.tokenizer, messages, each, placeholder=mark, document_end="", **options)
        template = {"add_generation_prompt": True, "return_dict": False, **options}
        return self.of_ids(self.tokenizer.apply_chat_template(messages, **template))

    def of_text(self, text: str | list[int]) -> Prompt:
        """Returns the prompt of a text, with the tokenizer's special tokens, or of ids."""
        return self.of_ids(self.tokenizer(text)["input_ids"] if isinstance(text, str) else text)

    def of_ids(self, ids: list[int]) -> Prompt:
        """Returns the prompt of ids, split at the separator."""
        input_ids = torch.tensor([ids], dtype=torch.int64)
        if self.separator is None:
            return Prompt(input_ids, ChunkSpans(()))
        self.separator.warn_if_hidden(ids)
        return Prompt.from_separated_ids(input_ids, self.separator)


def _for_template(message: Message, mark: str, chunks: list[str]) -> dict[str, Any]:
    """Returns a message as chat templates read it, a mark in the place of each chunk, which is added to `chunks`."""
    fields = message.model_dump(exclude_none=True, exclude={"content", "annotations"})
    for call in fields.get("tool_calls", ()):  # templates write arguments as they like
        if isinstance(text := call["function"]["arguments"], str):
            call["function"]["arguments"] = json.loads(text)
    if not isinstance(message.content, list):
        return {**fields, "content": message.content or ""}
    pieces = []
    for part in message.content:
        if part.cache_control:
            chunks.append(part.text)
        pieces += [mark if part.cache_control else part.text, "" if part.text[-1:].isspace() else "\n\n"]
    return {**fields, "content": "".join(pieces[:-1])}
