"""A prompt as token ids and the spans of its chunks: prefix | chunk | gap | chunk | … | suffix.

Text exists only here. Each piece is tokenised alone and never decoded again, so that a chunk has the same ids at every
position; after this module a prompt is ids and spans.
"""

from __future__ import annotations

import logging
import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..arguments import described, require, require_text, require_tokenizer, token_ids, whole
from .chat import Chat, as_messages, cut, ends_of, parting, require_template, texts_within, woven
from .separator import Separator, Span, require_a_token
from .tokenize import Encoder, field_in, texts_in

logger = logging.getLogger(__name__)


class ChunkSpans(tuple[Span, ...]):
    """The `[start, stop)` spans of a prompt's chunks, as `generate(chunk_spans=...)` takes them.

    Attributes:
        differs_from_joined_text: whether the joined text would tokenise to other ids (`None`: not known). It nearly
            always would, as tokens merge across the chunks' borders; that is harmless.
        note: for the trace: the place where the prompt reads differently from the joined text, if it does, and the
            order that its documents were brought into, if they were.
        prefix_stop: the end of the ids that chunks are computed after; default, the first chunk's start.
    """

    differs_from_joined_text: bool | None
    note: str
    prefix_stop: int

    def __new__(
        cls,
        spans: Iterable[Any],
        differs_from_joined_text: bool | None = None,
        note: str = "",
        prefix_stop: int | None = None,
    ) -> ChunkSpans:
        self = super().__new__(cls, [_as_span(span, spans) for span in _listed(spans)])
        self.differs_from_joined_text, self.note = differs_from_joined_text, note
        first = self[0][0] if self else 0
        self.prefix_stop = first if prefix_stop is None else whole("prefix_stop", prefix_stop)
        return self

    def check(self, length: int) -> None:
        """Raises `ValueError` unless the spans are non-empty, ascending, disjoint and inside `length` tokens."""
        stop_before = 0
        for start, stop in self:
            if start == stop:
                raise ValueError(f"Chunk span ({start}, {stop}) is empty; leave empty chunks out.")
            if not 0 <= start < stop <= length:
                raise ValueError(f"Chunk spans must lie in the prompt of {length} tokens, got ({start}, {stop}).")
            if start < stop_before:
                raise ValueError(f"Chunk spans must ascend and not overlap, got {tuple(self)}.")
            stop_before = stop
        if not 0 <= self.prefix_stop <= (last := self[0][0] if self else length):
            raise ValueError(f"prefix_stop must be 0 … {last}, where the first chunk starts, got {self.prefix_stop}.")

    def from_token(self, start: int) -> ChunkSpans:
        """Returns the spans that begin at a token or after it."""
        later = (span for span in self if span[0] >= start)
        return ChunkSpans(later, self.differs_from_joined_text, self.note, self.prefix_stop)

    def moved(self, by: int) -> ChunkSpans:
        """Returns the spans `by` tokens later; raises `ValueError` if one would begin before the prompt does."""
        if self and self[0][0] + by < 0:
            raise ValueError(f"Chunk span {self[0]} begins in the padding, the first {-by} tokens of its row.")
        moved = [(start + by, stop + by) for start, stop in self]
        return ChunkSpans(moved, self.differs_from_joined_text, self.note, self.prefix_stop + by if self else None)


def spans_by_row(chunk_spans: Iterable[Any], rows: torch.Tensor) -> list[ChunkSpans]:
    """Returns the spans of each row of a batch.

    Args:
        chunk_spans: of one prompt, if all rows are that prompt; or a list of them, one a row.
        rows: (B, T) ids.
    """
    if not isinstance(chunk_spans, ChunkSpans):
        given = [one if isinstance(one, ChunkSpans) else _listed(one, chunk_spans) for one in _listed(chunk_spans)]
        if given and not (given[0] and isinstance(given[0][0], numbers.Number)):
            if len(given) == len(rows):
                return [one if isinstance(one, ChunkSpans) else ChunkSpans(one) for one in given]
            raise ValueError(
                f"Got chunk_spans of {len(given)} prompts for a batch of {len(rows)}; pass one list a row."
            )
        chunk_spans = ChunkSpans(given)
    if chunk_spans and len(rows) > 1 and bool((rows != rows[:1]).any()):
        raise ValueError(
            f"Got chunk_spans of one prompt for a batch of {len(rows)} different ones. Pass a list with the spans "
            "of each row, or make all inputs with hfblend.Prompt.batch."
        )
    return [chunk_spans] * len(rows)


def _listed(values: Any, given: Any = None) -> list[Any]:
    """Returns spans, lists of them, or one span's ends, as a list; arrays and tensors too. An error says what was
    `given`."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable):
        given = values if given is None else given
        hint = ": write prompt.chunk_spans" if isinstance(given, Prompt) else ""
        raise ValueError(
            "chunk_spans must be a list of (start, stop) in whole token indices, or such a list for each row, "
            f"got {described(given)}{hint}."
        )
    return [value.tolist() if hasattr(value, "tolist") else value for value in plain]


def _as_span(span: Any, given: Any) -> Span:
    if type(span) is tuple and len(span) == 2 and type(span[0]) is type(span[1]) is int:
        return span  # the fast path: each chunk of each prompt
    ends = _listed(span, given)
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int) for end in ends):
        raise ValueError(f"A chunk span is (start, stop) in whole token indices, got {described(span)}.")
    return ends[0], ends[1]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids (1, T) with the spans of their chunks. The ids before the first chunk are the prefix, those between
    chunks are gaps, those after the last one are the suffix.

    >>> prompt = Prompt.from_ids([1, 2], [[3, 4, 5], [6, 7]], [8, 9])
    >>> prompt.chunk_spans
    ((2, 5), (5, 7))

    Attributes:
        note: what `from_chat` did with the documents.
        num_earlier: the chunks that stand in earlier turns of a conversation.
    """

    input_ids: torch.Tensor  # (1, T), int64
    chunk_spans: ChunkSpans
    note: str = ""
    num_earlier: int = 0

    def __post_init__(self) -> None:
        _require_prompt_ids(self.input_ids)
        if not isinstance(self.chunk_spans, ChunkSpans):
            object.__setattr__(self, "chunk_spans", ChunkSpans(self.chunk_spans))
        self.chunk_spans.check(self.input_ids.shape[1])

    def __len__(self) -> int:
        return self.input_ids.shape[1]

    def __repr__(self) -> str:
        sizes = f"prefix {len(self.prefix_ids)}, {len(self.chunk_spans)} chunks, suffix {len(self.suffix_ids)}"
        return f"<Prompt of {len(self)} tokens: {sizes if self.chunk_spans else 'no chunks'}>"

    @cached_property
    def ids(self) -> list[int]:
        """The ids as plain numbers."""
        return self.input_ids[0].tolist()

    @property
    def prefix_ids(self) -> list[int]:
        """Ids before the first chunk (all ids, if there is no chunk)."""
        return self.ids[: self.chunk_spans[0][0]] if self.chunk_spans else self.ids

    @property
    def chunk_ids(self) -> list[list[int]]:
        """Ids of each chunk."""
        return [self.ids[start:stop] for start, stop in self.chunk_spans]

    @property
    def gap_ids(self) -> list[list[int]]:
        """Ids of the prefix, of each gap between chunks, which may be none, and of the suffix."""
        edges = [0, *(edge for span in self.chunk_spans for edge in span), len(self)]
        return [self.ids[start:stop] for start, stop in zip(edges[::2], edges[1::2])]

    @property
    def suffix_ids(self) -> list[int]:
        """Ids after the last chunk."""
        return self.ids[self.chunk_spans[-1][1] :] if self.chunk_spans else []

    def inputs(self, device: torch.device | str | None = None) -> dict[str, Any]:
        """Returns the arguments for `model.generate(**prompt.inputs())` on a patched model.

        Returns:
            `input_ids` (1, T), `attention_mask` (1, T) of ones, `chunk_spans`, which the wrapped `generate` takes off.
        """
        ids = self.input_ids.to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "chunk_spans": self.chunk_spans}

    def crop(self, cache: Any, held_ids: torch.Tensor) -> int:
        """Cuts the cache of a conversation where this prompt stops to begin with what it holds, so that `generate` may
        continue it: an answer's text may tokenise to other ids than were generated.

        >>> ids = model.generate(**prompt.inputs(), past_key_values=cache)  # doctest: +SKIP
        >>> next_prompt.crop(cache, ids)  # doctest: +SKIP

        Args:
            cache: of Transformers, without sliding layers.
            held_ids: (1, n) the ids in it, or more: the sequence that was generated with it.

        Returns:
            The tokens that are left in it.

        Raises:
            TypeError: no cache, or no tensor of ids.
            ValueError: fewer ids than the cache holds.
        """
        if not (hasattr(cache, "crop") and hasattr(cache, "get_seq_length")):
            raise TypeError(f"cache must be a Cache of transformers, got {described(cache)}.")
        _require_prompt_ids(held_ids, "held_ids")
        held, given = int(cache.get_seq_length()), held_ids[0].tolist()
        if len(given) < held:
            raise ValueError(f"held_ids must be the {held} ids that the cache holds, or more, got {len(given)}.")
        pairs = zip(self.ids[:-1], given[:held])  # the last token is always computed
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(self) - 1, held))
        if same < held:
            cache.crop(same - held)
        return same

    @staticmethod
    def batch(
        prompts: Iterable[Prompt], *, pad_token_id: int | None, device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """Returns the arguments for `model.generate(**...)` of several prompts at once, each padded on its left.

        >>> inputs = Prompt.batch([prompt, other], pad_token_id=tokenizer.pad_token_id)  # doctest: +SKIP

        Args:
            pad_token_id: any id, if the tokenizer has none; the mask tells padding from text.

        Returns:
            `input_ids` (B, T), `attention_mask` (B, T), `chunk_spans`, those of each row.

        Raises:
            TypeError: no list of prompts, or no whole number.
            ValueError: an empty list, or no id.
        """
        if isinstance(prompts, Prompt | Mapping | str) or not isinstance(prompts, Iterable):
            hint = "; write [prompt]" if isinstance(prompts, Prompt) else ""
            raise TypeError(f"prompts must be a list of prompts, got {described(prompts)}{hint}.")
        prompts = [require(f"prompts[{i}]", one, Prompt, "a hfblend.Prompt") for i, one in enumerate(prompts)]
        if not prompts or pad_token_id is None:
            raise ValueError(
                f"A batch needs at least one prompt and a pad_token_id, got {len(prompts)} prompts and {pad_token_id}. "
                "If the tokenizer has no padding token, pass its eos_token_id."
            )
        pad_token_id = whole("pad_token_id", pad_token_id)
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
            TypeError: no ids, but text or something else.
            ValueError: an empty chunk, or no ids at all.
        """
        if isinstance(chunks, str | bytes | Mapping | Set) or not isinstance(chunks, Iterable):
            raise TypeError(f"chunks must be a list of lists of token ids, got {described(chunks)}.")
        listed = [token_ids(f"chunks[{i}]", chunk) for i, chunk in enumerate(chunks)]
        prefix, suffix = token_ids("prefix_ids", prefix_ids), token_ids("suffix_ids", suffix_ids)
        return cls.of_pieces(_gaps(prefix, len(listed), suffix, token_ids("separator_ids", separator_ids)), listed)

    @classmethod
    def of_pieces(cls, gaps: list[list[int]], chunks: list[list[int]]) -> Prompt:
        """Joins prefix, chunks, gaps between them and suffix: `gaps[0] chunks[0] gaps[1] … gaps[-1]`."""
        ids, spans = _joined(gaps, chunks)
        return cls(torch.tensor([ids], dtype=torch.long), ChunkSpans(spans))

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        *,
        prefix: str,
        chunks: Sequence[Any],
        suffix: str,
        separator: str | Sequence[int] | None = None,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """Tokenises each piece alone and joins the ids. Nothing is inserted unless told.

        >>> Prompt.from_texts(tok, prefix=system, chunks=[doc1, doc2], suffix=question)  # doctest: +SKIP

        Control tokens written in `prefix` and `suffix` are parsed; those written in a chunk are plain text, so that a
        document cannot close the user's turn.

        Args:
            chunks: texts, or documents with one as `page_content`, `text` or `content`; other fields are not read.
            separator: text or ids put between prefix, chunks and suffix.
            add_special_tokens: put the tokenizer's own leading special tokens (BOS) first, unless `prefix` has them.

        Raises:
            TypeError: an argument of another type, such as chunks that are no texts.
            ValueError: a chunk, or the separator, that tokenises to nothing.
        """
        texts, encode = texts_in(chunks, "chunks"), Encoder(require_tokenizer(tokenizer))
        prefix, suffix = require_text("prefix", prefix), require_text("suffix", suffix)
        require("add_special_tokens", add_special_tokens, bool, "True or False")
        between = "" if separator is None else separator
        if isinstance(between, str):
            separator_ids = encode.after(require_text("separator", between))
        else:
            separator_ids = token_ids("separator", between, expected="a text, a list of token ids or None")
        if separator is not None:
            require_a_token(separator, separator_ids)
        begin = _begin(encode, prefix, add_special_tokens)
        gaps = _gaps(begin + encode(prefix), len(texts), encode.after(suffix), separator_ids)
        if not isinstance(between, str):
            return cls.of_pieces(gaps, [encode.plain(text) for text in texts])
        joined = between.join([prefix, *texts, suffix]) if texts else prefix + suffix
        return cls._of_texts(encode, gaps, texts, joined, begin + encode(joined))

    @classmethod
    def from_chat(
        cls,
        tokenizer: Any,
        messages: str | Sequence[Mapping[str, Any]],
        documents: Sequence[Any],
        *,
        placeholder: str | None = "{documents}",
        document_end: str = "\n\n",
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> Prompt:
        """Renders a chat template with `documents` as chunks.

        The documents replace `{documents}` in the messages; without it, they open the last user message. In a
        conversation, each message that says `{documents}` has a list of them. The prompt's
        text is the template's for messages with the joined documents: if it trims or escapes them, the chunks are
        trimmed or escaped. The prompt's `note` says what was done.

        >>> prompt = Prompt.from_chat(tok, [{"role": "user", "content": "{documents}Who?"}], docs)  # doctest: +SKIP
        >>> prompt.note  # doctest: +SKIP
        "3 documents at '{documents}', '\\n\\n' after 3 of them; text read from page_content (3)."

        Args:
            messages: as for `apply_chat_template`; one text is one user message.
            documents: texts, or dicts and objects (LangChain's, LlamaIndex's, Haystack's) with one as `page_content`,
                `text`, `content` or `get_content()`; other fields, such as a title, are not read. Lists of documents:
                one for each placeholder, in order.
            placeholder: the text that the documents replace; `None` hands them to the template's own `documents`.
            document_end: comes after each document that does not end with white space, as part of the gap, not of the
                chunk; not in the template's own `documents`.
            template_kwargs: for `apply_chat_template`.

        Raises:
            TypeError: messages or documents of another form, or an argument that `from_chat` itself sets.
            ValueError: no user message, other placeholders than lists, or a template that drops, repeats or moves
                documents.
        """
        listed = list(documents) if isinstance(documents, Iterator) else documents
        listed, sizes = _flat(listed)
        texts = texts_in(listed, "documents")
        _check_template_arguments(placeholder, add_generation_prompt, template_kwargs)
        ends = ends_of(texts, "" if placeholder is None else require_text("document_end", document_end))
        encode = Encoder(require_tokenizer(tokenizer), marked=True, template=template_kwargs.get("chat_template"))
        options = {"add_generation_prompt": add_generation_prompt, **template_kwargs}
        given = as_messages(messages)
        require_template(tokenizer, template_kwargs.get("chat_template"))
        chat = Chat(encode, given, listed, placeholder, ends, sizes, **options)
        gaps, chunks = cut(chat.render, texts, encode.readable, _DOCUMENTS_OF_TEMPLATE if placeholder is None else "")
        _begin(encode, gaps[0], False)
        gap_ids = [encode(gaps[0]), *map(encode.after, gaps[1:])]
        encode.count_as_control([i for ids in gap_ids for i in ids], "\n".join(texts_within(chat.messages)))
        prompt = cls._of_texts(encode, gap_ids, chunks, woven(gaps, chunks), chat.ids(texts))
        note = _what_was_done(listed, chat, is_placed=chat.messages is given)
        return replace(prompt, note=note, num_earlier=sum(sizes[:-1]))

    @classmethod
    def _of_texts(
        cls, encode: Encoder, gaps: list[list[int]], chunks: list[str], joined: str, joined_ids: list[int]
    ) -> Prompt:
        """Builds a prompt of encoded gaps and the texts of chunks, compared with the joined text and its ids."""
        ids, spans = _joined(gaps, [encode.plain(chunk) for chunk in chunks])
        note = "" if ids == joined_ids else _note(encode, ids, joined, joined_ids)
        return cls(torch.tensor([ids], dtype=torch.long), ChunkSpans(spans, ids != joined_ids, note))

    @classmethod
    def from_separated_ids(cls, input_ids: torch.Tensor, separator: Separator) -> Prompt:
        """Splits ids (1, T) at a separator: prefix before the first, suffix after the last, chunks between.

        Fewer than two separators leave no chunk. Adjacent separators are one gap.

        Raises:
            TypeError: no tensor of ids, or no `Separator`.
            ValueError: ids of another shape.
        """
        _require_prompt_ids(input_ids)
        how = "a Separator: write Separator(text, tokenizer) or Separator(ids)"
        require("separator", separator, Separator, how)
        return cls(input_ids, ChunkSpans(separator.chunk_spans(input_ids[0].tolist())))


def _require_prompt_ids(input_ids: Any, name: str = "input_ids") -> None:
    how = "a tensor (1, T) of token ids, as of tokenizer(text, return_tensors='pt').input_ids"
    require(name, input_ids, torch.Tensor, how)
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise TypeError(f"{name} must be whole numbers, got {described(input_ids)}.")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"{name} must be (1, T), of one prompt, got shape {tuple(input_ids.shape)}.")
    if input_ids.device.type == "cpu" and bool((input_ids < 0).any()):  # on a GPU, looking would wait for it
        raise ValueError(f"{name} must be 0 or more, got {int(input_ids.min())}.")


_DOCUMENTS_OF_TEMPLATE = (
    "placeholder=None needs a template that has `documents`, and this one writes none of them: leave placeholder out, "
    "so that they stand in a message. "
)
_OURS = {"tokenize", "return_dict", "return_tensors", "truncation", "padding", "max_length", "tokenizer_kwargs",
         "return_assistant_tokens_mask", "conversation"}  # fmt: skip


def _check_template_arguments(placeholder: Any, add_generation_prompt: Any, more: Mapping[str, Any]) -> None:
    if placeholder is not None:
        require_text("placeholder", placeholder, "a text or None")
    require("add_generation_prompt", add_generation_prompt, bool, "True or False")
    require("chat_template", more.get("chat_template"), (str, type(None)), "a template or the name of one")
    if placeholder == "":
        raise ValueError("placeholder must be a text of a letter or more, or None, got ''.")
    if ours := sorted(_OURS & more.keys()):
        raise TypeError(f"from_chat sets tokenize, truncation and the like itself, got {ours[0]}=; leave it out.")


def _flat(documents: Any) -> tuple[Any, list[int]]:
    """Returns documents as one list, and the sizes of the lists that they were given in."""
    if isinstance(documents, list | tuple) and documents and all(isinstance(one, list | tuple) for one in documents):
        return [document for one in documents for document in one], [*map(len, documents)]
    return documents, [len(documents) if isinstance(documents, Sized) else 0]


def _what_was_done(documents: Iterable[Any], chat: Chat, is_placed: bool) -> str:
    """Returns the note of `from_chat`."""
    where = "at the beginning of the last user message"
    if is_placed:
        where = "as the template's own documents" if chat.placeholder is None else f"at {chat.placeholder!r}"
    ended = [end for end in chat.ends if end]
    joined = f", {ended[0]!r} after {len(ended)} of them" if ended else ""
    names = Counter(field_in(document)[0] for document in documents if not isinstance(document, str))
    read = "; text read from " + ", ".join(f"{name} ({count})" for name, count in names.items()) if names else ""
    return f"{len(chat.ends)} document{'s' * (len(chat.ends) != 1)} {where}{joined}{read}."


def _gaps(prefix: list[int], num_chunks: int, suffix: list[int], separator: list[int]) -> list[list[int]]:
    if not num_chunks:
        return [prefix + suffix]
    return [prefix + separator, *[separator] * (num_chunks - 1), separator + suffix]


def _joined(gaps: list[list[int]], chunks: list[list[int]]) -> tuple[list[int], list[Span]]:
    """Returns the ids `gaps[0] chunks[0] gaps[1] … gaps[-1]`, and the chunks' spans in them."""
    ids, spans = list(gaps[0]), []
    for i, (chunk, gap) in enumerate(zip(chunks, gaps[1:])):
        if not chunk:
            raise ValueError(f"Chunk {i} of {len(chunks)} has no tokens; leave empty chunks out.")
        spans.append((len(ids), len(ids) + len(chunk)))
        ids += chunk + gap
    if not ids:
        raise ValueError("A prompt needs at least one token, got empty prefix, chunks and suffix.")
    return ids, spans


def _begin(encode: Encoder, prefix: str, add_special_tokens: bool) -> list[int]:
    """Returns the special tokens to put before the prefix; logs a tokenizer that puts some and gets none."""
    leading = encode.leading_special_tokens
    if not leading or encode(prefix)[: len(leading)] == leading:
        return []
    if add_special_tokens:
        return leading
    logger.warning(
        "This tokenizer puts %s first, the prompt does not begin with it, and nothing was inserted. "
        "Write it in the prefix or pass add_special_tokens=True.",
        encode.tokenizer.convert_ids_to_tokens(leading),
    )
    return []


def _note(encode: Encoder, ids: list[int], joined: str, joined_ids: list[int]) -> str:
    """Returns the place where the prompt's text and the joined text differ; empty if only their tokens do."""
    ours = encode.decode(ids)
    if ours == joined or ours == (theirs := encode.decode(joined_ids)):
        return ""
    place = parting(encode.readable(ours), encode.readable(theirs), ("the prompt", "the joined text"))
    return f"The pieces make another text than the joined text: {place}."
