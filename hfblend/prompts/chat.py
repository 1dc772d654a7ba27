"""Documents in the text of a chat template, and their borders."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise, zip_longest
from typing import Any

from ..arguments import described, require_text
from .tokenize import Encoder, field_in, parses_nothing

_CHANGES = (
    "The chat template changes text around the documents, or documents as a whole: {}. "
    "Move the documents to another place in the messages, or build the prompt with Prompt.from_texts."
)
Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[str]], str]  # the documents' texts -> the prompt's text


def as_messages(messages: Any) -> Messages:
    """Returns messages, checked; one text is one user message."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(
            'messages must be a list of dicts such as {"role": "user", "content": "Who?"}, or one text, '
            f"got {described(messages)}."
        )
    for text in texts_within(messages):
        require_text("A message", text)
    return messages


class Chat:
    """Messages with documents, as a tokenizer's chat template writes them. The documents replace the `placeholder`,
    each with its end of `ends` after it, `sizes` of them where it stands first, second, …; or they are the template's
    own `documents` (`None`). `options` are other arguments of `apply_chat_template`."""

    def __init__(
        self,
        encode: Encoder,
        messages: Messages,
        documents: Sequence[Any],
        placeholder: str | None,
        ends: Sequence[str],
        sizes: Sequence[int],
        **options: Any,
    ) -> None:
        self.encode, self.tokenizer = encode, encode.tokenizer
        self.documents, self.placeholder, self.ends, self.options = documents, placeholder, ends, options
        self.messages, self._groups = messages, [slice(*ends) for ends in pairwise(accumulate([0, *sizes]))]
        if placeholder is not None:
            self.messages = with_placeholder(messages, placeholder, "" if any(ends[-1:]) else "\n", len(sizes))

    def render(self, texts: Sequence[str]) -> str:
        """Returns the prompt's text with these texts as documents."""
        if parses_nothing(self.tokenizer):  # mistral-common's own text is not what it reads
            return self.encode.decode(self.ids(texts))
        return self._apply(texts, tokenize=False)

    def ids(self, texts: Sequence[str]) -> list[int]:
        """Returns the ids that the template gives to `render(texts)`."""
        return self._apply(texts, tokenize=True, return_dict=False)

    def _apply(self, texts: Sequence[str], **options: Any) -> Any:
        if self.placeholder is None:
            documents = [_with_text(document, text) for document, text in zip(self.documents, texts)]
            return self.tokenizer.apply_chat_template(self.messages, documents=documents, **self.options, **options)
        placeholder, groups = re.escape(self.placeholder), (woven(texts[one], self.ends[one]) for one in self._groups)
        messages = _with_each_text(self.messages, lambda text: re.sub(placeholder, lambda _: next(groups), text))
        return self.tokenizer.apply_chat_template(messages, **self.options, **options)


def require_template(tokenizer: Any, template: str | None) -> None:
    """Raises `ValueError` if neither the tokenizer nor the call has a chat template."""
    if template is None and getattr(tokenizer, "chat_template", "") is None:
        raise ValueError(
            "from_chat needs a chat template, and this tokenizer has none: make the prompt of a base model with "
            "Prompt.from_texts, or give chat_template=…."
        )


def ends_of(texts: Sequence[str], document_end: str) -> list[str]:
    """Returns what follows each document: `document_end`, or nothing after one that ends with white space."""
    return [document_end if text and not text[-1].isspace() else "" for text in texts]


def with_placeholder(messages: Messages, placeholder: str, end: str, times: int = 1) -> Messages:
    """Returns messages that hold the placeholder so many times; where it is to be one and none is there, it opens the
    last user message, `end` after it."""
    count = sum(text.count(placeholder) for text in texts_within(messages))
    if times != 1 and count != times:
        raise ValueError(
            f"The placeholder {placeholder!r} must stand in the messages once for each list of documents, got {count} "
            f"for {times} lists."
        )
    if count > times:
        raise ValueError(
            f"The placeholder {placeholder!r} must stand in the messages once, at most; for documents in several "
            "messages, pass a list of documents for each."
        )
    if count:
        return messages
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    content = None if last is None else messages[last].get("content")
    if last is None or not isinstance(content, (str, Sequence)):
        raise ValueError("from_chat needs a user message with text, or the placeholder in some message; got neither.")
    opened = {**messages[last], "content": _opened(content, placeholder + end)}
    return [*messages[:last], opened, *messages[last + 1 :]]


def cut(
    render: Render, documents: Sequence[str], readable: Callable[[str], str] = str, if_none: str = ""
) -> tuple[list[str], list[str]]:
    """Cuts the rendered prompt at the documents' borders: `gaps[0] + chunks[0] + gaps[1] + … + gaps[-1]` is its text.

    Chunks are the documents as the template writes them: trimmed or escaped, if it trims or escapes text.

    Raises `ValueError` if the template drops, repeats or moves documents (`if_none` opens the error if it writes none),
    or changes the text around them (`readable` makes that fit for a message).
    """
    text = render(documents)
    letters = [uuid.uuid4().hex[: max(12, min(len(document), 32))] for document in documents]  # that no text contains
    # Marks as long as the documents, for a template that looks at lengths; then letters, for one that escapes others.
    gaps = None
    for marks in (_as_long(documents, letters), letters):
        gaps = _split(render(marks), marks) or gaps
        if gaps is not None and woven(gaps, documents) == text:
            return gaps, list(documents)
    if gaps is None:
        raise ValueError(
            f"{if_none}The chat template must write each document once and in order; got another text. "
            "Build the prompt with Prompt.from_texts instead."
        )
    # Marks between the documents only: at the outer ends the template has to see the documents' first and last letters.
    pieces = _split(render([f"{d}{m}" for d, m in zip(documents, letters[:-1])] + [*documents[-1:]]), letters[:-1])
    if pieces is None:
        raise ValueError(_CHANGES.format("it drops or moves documents when their neighbours change"))
    pieces[-1] = pieces[-1].removesuffix(gaps[-1])
    chunks = [piece.removeprefix(gap) for piece, gap in zip(pieces, gaps)]
    if woven(gaps, chunks) != text:
        raise ValueError(_CHANGES.format(parting(readable(woven(gaps, documents)), readable(text))))
    return gaps, chunks


def _as_long(documents: Sequence[str], marks: Sequence[str]) -> list[str]:
    """Returns marks as long as the documents: letters; for a short document, one private character, repeated."""
    first = 0xE000
    return [
        mark.ljust(len(document), "x") if len(document) >= len(mark) else chr(first + i % 6400) * len(document)
        for i, (document, mark) in enumerate(zip(documents, marks))
    ]


def woven(gaps: Sequence[str], chunks: Sequence[str]) -> str:
    """Returns the text of gaps with chunks between them."""
    return "".join(gap + chunk for gap, chunk in zip_longest(gaps, chunks, fillvalue=""))


def parting(ours: str, theirs: str, names: tuple[str, str] = ("the documents as given", "the template")) -> str:
    """Returns the place where two texts differ, as a message."""
    at = next((i for i, (one, other) in enumerate(zip(ours, theirs)) if one != other), min(len(ours), len(theirs)))
    return (
        f"after {ours[max(at - 20, 0) : at]!r} (character {at}), {names[0]} read {ours[at : at + 20]!r}, "
        f"{names[1]} {theirs[at : at + 20]!r}"
    )


def _split(text: str, marks: Sequence[str]) -> list[str] | None:
    """Returns the text cut at the marks; `None` unless it holds each once, in their order."""
    if not marks:
        return [text]
    found = re.findall("|".join(marks), text)
    return re.split("|".join(marks), text) if found == list(marks) else None


def _opened(content: str | Sequence[Any], text: str) -> str | list[Any]:
    """Returns a message's content with `text` in front; in a list of parts, in front of its first text."""
    if isinstance(content, str):
        return text + content
    parts = list(content)
    for i, part in enumerate(parts):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts[i] = {**part, "text": text + part["text"]}
            return parts
    return [{"type": "text", "text": text}, *parts]


def texts_within(value: Any) -> list[str]:
    """Returns the texts in messages, at any depth."""
    found: list[str] = []
    _with_each_text(value, found.append)
    return found


def _with_each_text(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _with_each_text(one, change) for name, one in value.items()}
    return [_with_each_text(one, change) for one in value] if isinstance(value, (list, tuple)) else value


def _with_text(document: Any, text: str) -> dict[str, Any]:
    """Returns a document for a template's `documents`; a dict keeps its other fields."""
    if not isinstance(document, Mapping):
        return {"title": "", "text": text}
    name, _ = field_in(document)
    return {**document, name: text}
