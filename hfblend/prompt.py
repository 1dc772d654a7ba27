"""A prompt as token ids and the spans of its chunks: prefix | chunk | gap | chunk | … | suffix.

Text exists only here. Each piece is tokenised alone and never decoded again, so a chunk has the same ids wherever it
stands; after this module a prompt is ids and spans.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .encoding import Encoder
from .separator import Separator, Span

logger = logging.getLogger(__name__)


class ChunkSpans(tuple[Span, ...]):
    """The `[start, stop)` spans of a prompt's chunks, as they travel through `generate(chunk_spans=...)`.

    `differs_from_joined_text`: whether the joined text would tokenise to other ids (`None`: not known).
    """

    differs_from_joined_text: bool | None

    def __new__(cls, spans: Iterable[Sequence[int]], differs_from_joined_text: bool | None = None) -> ChunkSpans:
        self = super().__new__(cls, (_as_span(span) for span in spans))
        self.differs_from_joined_text = differs_from_joined_text
        return self

    def check(self, length: int) -> None:
        """Raises `ValueError` unless the spans are non-empty, ascending, disjoint and inside `length` tokens."""
        stop_before = 0
        for start, stop in self:
            if start == stop:
                raise ValueError(f"Chunk span ({start}, {stop}) is empty; leave empty chunks out.")
            if not 0 <= start < stop <= length:
                raise ValueError(f"Chunk span ({start}, {stop}) does not lie in a prompt of {length} tokens.")
            if start < stop_before:
                raise ValueError(f"Chunk spans must ascend and not overlap, got {tuple(self)}.")
            stop_before = stop

    def moved(self, by: int) -> ChunkSpans:
        """The same spans `by` tokens later.

        Raises:
            ValueError: a span would begin before the prompt does.
        """
        if self and self[0][0] + by < 0:
            raise ValueError(f"Chunk span {self[0]} begins in the padding, the first {-by} tokens of its row.")
        return ChunkSpans(((start + by, stop + by) for start, stop in self), self.differs_from_joined_text)


def spans_by_row(chunk_spans: Iterable[Any], rows: torch.Tensor) -> list[ChunkSpans]:
    """The spans of each row of a batch.

    Args:
        chunk_spans: of one prompt, which all rows are; or a list of them, one a row.
        rows: (B, T) ids.

    Raises:
        ValueError: neither.
    """
    given = _plain(chunk_spans)
    if isinstance(chunk_spans, ChunkSpans) or not given or not isinstance(next(iter(given[0]), ()), Iterable):
        if given and len(rows) > 1 and bool((rows != rows[:1]).any()):
            raise ValueError(
                f"Got chunk_spans of one prompt for a batch of {len(rows)} different ones. Pass a list with the spans "
                "of each row, or make all inputs with hfblend.Prompt.batch."
            )
        return [chunk_spans if isinstance(chunk_spans, ChunkSpans) else ChunkSpans(given)] * len(rows)
    if len(given) != len(rows):
        raise ValueError(f"Got chunk_spans of {len(given)} prompts for a batch of {len(rows)}; pass one list a row.")
    return [one if isinstance(one, ChunkSpans) else ChunkSpans(one) for one in given]


def _plain(chunk_spans: Any) -> list[Any]:
    """Spans, or lists of them, of whatever holds them, arrays and tensors too."""
    given = chunk_spans.tolist() if hasattr(chunk_spans, "tolist") else chunk_spans
    given = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(one, Iterable) for one in given):
        raise ValueError(f"chunk_spans are a list of (start, stop), or such a list for each row, got {chunk_spans!r}.")
    return given


def _as_span(span: Sequence[int]) -> Span:
    if (
        not isinstance(span, Sequence)
        or len(span) != 2
        or any(isinstance(end, bool) or not isinstance(end, int) for end in span)
    ):
        raise ValueError(f"A chunk span is (start, stop) in whole token indices, got {span!r}.")
    return span[0], span[1]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids (1, T) with the spans of their chunks. What stands before the first chunk is the prefix, what stands
    between chunks is a gap, what stands after the last one is the suffix.

    >>> prompt = Prompt.from_ids([1, 2], [[3, 4, 5], [6, 7]], [8, 9])
    >>> prompt.chunk_spans
    ((2, 5), (5, 7))
    """

    input_ids: torch.Tensor  # (1, T), int64
    chunk_spans: ChunkSpans

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape[0] != 1:
            raise ValueError(f"A prompt's input_ids must be (1, T), got shape {tuple(self.input_ids.shape)}.")
        if not isinstance(self.chunk_spans, ChunkSpans):
            object.__setattr__(self, "chunk_spans", ChunkSpans(self.chunk_spans))
        self.chunk_spans.check(self.input_ids.shape[1])

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    @cached_property
    def ids(self) -> list[int]:
        """The ids as plain numbers."""
        return self.input_ids[0].tolist()

    @property
    def prefix_ids(self) -> list[int]:
        """Ids of all that stands before the first chunk (all ids, if there is no chunk)."""
        return self.ids[: self.chunk_spans[0][0]] if self.chunk_spans else self.ids

    @property
    def chunk_ids(self) -> list[list[int]]:
        """Ids of each chunk."""
        return [self.ids[start:stop] for start, stop in self.chunk_spans]

    @property
    def suffix_ids(self) -> list[int]:
        """Ids of all that stands after the last chunk."""
        return self.ids[self.chunk_spans[-1][1] :] if self.chunk_spans else []

    def inputs(self, device: torch.device | str | None = None) -> dict[str, Any]:
        """Arguments for `model.generate(**prompt.inputs())` on a patched model.

        Returns:
            `input_ids` (1, T), `attention_mask` (1, T) of ones, `chunk_spans`, which the wrapped `generate` takes off.
        """
        input_ids = self.input_ids.to(device)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "chunk_spans": self.chunk_spans,
        }

    @staticmethod
    def batch(
        prompts: Sequence[Prompt], *, pad_token_id: int | None, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """Arguments for `model.generate(**...)` of several prompts at once, each padded on its left.

        >>> inputs = Prompt.batch([prompt, other], pad_token_id=tokenizer.pad_token_id)  # doctest: +SKIP

        Args:
            pad_token_id: any id will do where a tokenizer has none; the mask tells padding from text.

        Returns:
            `input_ids` (B, T), `attention_mask` (B, T), `chunk_spans`, those of each row.

        Raises:
            ValueError: no prompt, or no id.
        """
        if not prompts or pad_token_id is None:
            raise ValueError(
                f"A batch needs at least one prompt and a pad_token_id, got {len(prompts)} prompts and {pad_token_id}. "
                "Where the tokenizer has no padding token, pass its eos_token_id."
            )
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = prompt.input_ids[0]
            attention_mask[row, longest - len(prompt) :] = 1
        return {
            "input_ids": input_ids.to(device),
            "attention_mask": attention_mask.to(device),
            "chunk_spans": [prompt.chunk_spans.moved(longest - len(prompt)) for prompt in prompts],
        }

    # --- ways to make one -----------------------------------------------------------------------------------------

    @classmethod
    def from_ids(
        cls,
        prefix_ids: Sequence[int],
        chunks: Sequence[Sequence[int]],
        suffix_ids: Sequence[int],
        separator_ids: Sequence[int] = (),
    ) -> Prompt:
        """Joins pieces of token ids: `prefix chunk … chunk suffix`, with `separator_ids` between them if given.

        Raises:
            ValueError: an empty chunk, or nothing at all.
        """
        return cls._join(list(prefix_ids), [list(c) for c in chunks], list(suffix_ids), list(separator_ids))

    @classmethod
    def _join(
        cls,
        prefix: list[int],
        chunks: list[list[int]],
        suffix: list[int],
        separator: list[int],
        joined_ids: list[int] | None = None,
    ) -> Prompt:
        ids, spans = list(prefix), []
        for i, chunk in enumerate(chunks):
            if not chunk:
                raise ValueError(f"Chunk {i} of {len(chunks)} has no tokens; leave empty chunks out.")
            ids += separator
            spans.append((len(ids), len(ids) + len(chunk)))
            ids += chunk
        ids += (separator if chunks else []) + suffix
        if not ids:
            raise ValueError("A prompt needs at least one token, got empty prefix, chunks and suffix.")
        differs = None if joined_ids is None else joined_ids != ids
        return cls(torch.tensor([ids], dtype=torch.long), ChunkSpans(spans, differs))

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        *,
        prefix: str,
        chunks: Sequence[str],
        suffix: str,
        separator: str | Sequence[int] | None = None,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """Tokenises each piece alone and joins the ids. Nothing is inserted unless told.

        >>> Prompt.from_texts(tok, prefix=system, chunks=[doc1, doc2], suffix=question)  # doctest: +SKIP

        Special tokens written in `prefix` and `suffix` are parsed; those written in a chunk are plain text, so that a
        document cannot close the user's turn.

        Args:
            separator: text or ids put between prefix, chunks and suffix.
            add_special_tokens: put the tokenizer's own leading special tokens (BOS) first, unless `prefix` has them.

        Raises:
            ValueError: a chunk, or the separator, that tokenises to nothing.
        """
        if isinstance(chunks, str):
            raise TypeError("chunks must be a list of texts, got one text; write [text].")
        encode = Encoder(tokenizer)
        prefix_ids, leading = encode(prefix), encode.leading_special_tokens
        if leading and prefix_ids[: len(leading)] != leading:
            if add_special_tokens:
                prefix_ids = leading + prefix_ids
            else:
                logger.warning(
                    "This tokenizer puts %s first, the prompt does not begin with it, and nothing was inserted. "
                    "Write it in the prefix or pass add_special_tokens=True.",
                    tokenizer.convert_ids_to_tokens(leading),
                )
        separator_ids = encode(separator) if isinstance(separator, str) else list(separator or ())
        if separator is not None and not separator_ids:
            raise ValueError(f"The separator {separator!r} tokenises to nothing; choose another, or None.")
        between = separator if isinstance(separator, str) else None if separator_ids else ""
        joined_ids = None
        if between is not None:
            joined = between.join([prefix, *chunks, suffix]) if chunks else prefix + suffix
            joined_ids = encode(joined)
            if joined_ids[: len(leading)] != prefix_ids[: len(leading)]:
                joined_ids = leading + joined_ids
        return cls._join(prefix_ids, [encode.plain(c) for c in chunks], encode(suffix), separator_ids, joined_ids)

    @classmethod
    def from_chat(
        cls,
        tokenizer: Any,
        messages: Sequence[dict[str, Any]],
        documents: Sequence[str],
        *,
        placeholder: str = "{documents}",
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> Prompt:
        """Renders a chat template with `documents` as chunks.

        The documents stand where a message's text says `{documents}`; if none does, they open the last user message.
        The template is rendered once with a unique marker in their place and cut there, so that chunk borders hold
        for any template.

        >>> Prompt.from_chat(tok, [{"role": "user", "content": "{documents}\\nWho?"}], docs)  # doctest: +SKIP

        Raises:
            ValueError: no user message, several placeholders, or a template that drops or repeats message text.
        """
        marker = f"hfblend{uuid.uuid4().hex}"
        marked = _mark_documents(messages, placeholder, marker)
        text = tokenizer.apply_chat_template(
            marked, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
        parts = text.split(marker)
        if len(parts) != 2:
            raise ValueError(
                f"The chat template rendered the documents' place {len(parts) - 1} times, expected once. "
                "Build the prompt with Prompt.from_texts instead."
            )
        return cls.from_texts(tokenizer, prefix=parts[0], chunks=documents, suffix=parts[1])

    @classmethod
    def from_separated_ids(cls, input_ids: torch.Tensor, separator: Separator) -> Prompt:
        """Splits ids (1, T) at a separator: prefix before the first, suffix after the last, chunks between.

        Fewer than two separators leave no chunk. Adjacent separators are one gap.
        """
        return cls(input_ids, ChunkSpans(separator.chunk_spans(input_ids[0].tolist())))


def _mark_documents(messages: Sequence[dict[str, Any]], placeholder: str, marker: str) -> list[dict[str, Any]]:
    """The messages with `marker` where the documents go."""
    marked = [dict(message) for message in messages]
    holders = [m for m in marked if isinstance(m.get("content"), str) and placeholder in m["content"]]
    if holders:
        if sum(m["content"].count(placeholder) for m in holders) != 1:
            raise ValueError(f"The placeholder {placeholder!r} must stand in the messages once, at most.")
        holders[0]["content"] = holders[0]["content"].replace(placeholder, marker)
        return marked
    users = [m for m in marked if m.get("role") == "user" and isinstance(m.get("content"), str)]
    if not users:
        raise ValueError("from_chat needs a user message with text, or the placeholder in some message; got neither.")
    users[-1]["content"] = f"{marker}\n{users[-1]['content']}"
    return marked
