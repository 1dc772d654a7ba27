"""Tokenises text, one piece at a time."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any
from weakref import WeakKeyDictionary

from ..arguments import described, require_text

FIELDS = ("page_content", "text", "content")  # of LangChain, LlamaIndex, Haystack


def text_in(document: Any) -> str | None:
    """Returns a document's text: a string, or what `field_in` finds in an object or dict."""
    return document if isinstance(document, str) else field_in(document)[1]


def field_in(document: Any) -> tuple[str, str | None]:
    """Returns the name and the text of a document's `page_content`, `text` or `content`, or of what its `get_content()`
    returns (LlamaIndex's nodes); the text is `None` if there is none of them."""
    get = document.get if isinstance(document, Mapping) else lambda name: getattr(document, name, None)
    for name in FIELDS:
        if isinstance(text := get(name), str):
            return name, text
    method = None if isinstance(document, type) else getattr(document, "get_content", None)
    text = method() if callable(method) else None
    return "get_content()", text if isinstance(text, str) else None


def texts_in(documents: Any, name: str) -> list[str]:
    """Returns the texts of several documents; raises `TypeError` for a single one, or one without text."""
    if isinstance(documents, Mapping | Set) or text_in(documents) is not None or not isinstance(documents, Iterable):
        one = f"; write [{name[:-1]}]" if text_in(documents) is not None else ""
        raise TypeError(f"{name} must be a list of texts, got {described(documents)}{one}.")
    expected, listed = "a text, or hold one as page_content, text, content or get_content()", list(documents)
    texts = [document if (text := text_in(document)) is None else text for document in listed]
    return [require_text(f"{name}[{i}]", text, expected) for i, text in enumerate(texts)]


class Encoder:
    """Turns text into ids: adds no special tokens, and in a document parses no control tokens.

    Args:
        marked: for a tokenizer that parses nothing, writes and reads control tokens as marks that no text contains, so
            that their names in a message stay text.
        template: see `control_tokens`.
    """

    def __init__(self, tokenizer: Any, marked: bool = False, template: str | None = None) -> None:
        self.template = template
        self.tokenizer, self._mark = tokenizer, uuid.uuid4().hex if marked and parses_nothing(tokenizer) else ""

    def __call__(self, text: str) -> list[int]:
        """Returns the ids of text at the beginning of a prompt; parses control tokens."""
        return self._parsed(text, self._encode)

    def after(self, text: str) -> list[int]:
        """Returns the ids of text that follows other text; parses control tokens."""
        return self._parsed(text, self._after)

    def plain(self, text: str) -> list[int]:
        """Returns the ids of a document; control tokens written in it are plain text, or refused if they cannot be."""
        ids = self._after(text, plain=True)
        if self.controls.ids.isdisjoint(ids):
            return ids
        cuts = [0, *self.controls.insides(text), len(text)]  # this tokenizer parses them anyway
        ids = [i for start, stop in pairwise(cuts) for i in self._halved(text[start:stop])]
        if found := self.controls.never.intersection(ids):
            names = self.tokenizer.convert_ids_to_tokens(sorted(found))
            raise ValueError(f"A chunk's text holds the control tokens {names}, which cannot be split: {text[:60]!r}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, complete and not cleaned up; `__call__` would parse control tokens in it."""
        if not parses_nothing(self.tokenizer):
            return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        names = {i: name for name, i in self._written.names.items()}
        runs = [(control, list(run)) for control, run in groupby(ids, names.__contains__)]
        decoded = self.tokenizer.decode  # over control tokens, it would write the inner form of pieces
        return "".join(
            "".join(names[i] for i in run) if control else decoded(run, skip_special_tokens=True)
            for control, run in runs
        )

    @cached_property
    def controls(self) -> Controls:
        """The tokenizer's control tokens."""
        tokenizer = self.tokenizer
        own_template = str(getattr(tokenizer, "chat_template", None))
        state = (len(tokenizer), tuple(tokenizer.all_special_ids), own_template, self.template)
        known = _known.setdefault(tokenizer, {})
        if state not in known:
            unknown = tokenizer.unk_token_id
            only_unknown = unknown not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
            known[state] = Controls(control_tokens(tokenizer, self.template), unknown if only_unknown else None)
        return known[state]

    def count_as_control(self, ids: Sequence[int], text: str) -> None:
        """Counts more added tokens as control tokens in this prompt: those that are more frequent in `ids`, written by
        a template, than in `text`, written by the caller."""
        if parses_nothing(self.tokenizer):
            return
        added, found = getattr(self.tokenizer, "added_tokens_decoder", {}), Counter(ids)
        names = {i: added[i].content for i in found.keys() & added.keys() - self.controls.ids}
        more = {
            name: i
            for i, name in names.items()
            if not _WORDS.fullmatch(name) and len(name) > 1 and found[i] > text.count(name)
        }
        if more:
            self.controls = Controls({**self.controls.names, **more}, self.controls.unknown)

    @cached_property
    def _written(self) -> Controls:
        """The control tokens as a tokenizer that parses nothing writes them in text."""
        if not self._mark:
            return self.controls
        return Controls({f"<{self._mark}:{name}>": i for name, i in self.controls.names.items()}, None)

    def readable(self, text: str) -> str:
        """Returns text with control tokens by name, for messages."""
        return re.sub(f"<{self._mark}:(.*?)>", r"\1", text, flags=re.DOTALL) if self._mark else text

    @property
    def leading_special_tokens(self) -> list[int]:
        text = "a"
        with_special, without = self.tokenizer(text)["input_ids"], self(text)
        starts = (i for i in range(len(with_special)) if with_special[i : i + len(without)] == without)
        return with_special[: next(starts, 0)]

    def _parsed(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Returns the ids of text, its first part by `encode`; parses for a tokenizer that does not."""
        if not parses_nothing(self.tokenizer):
            return encode(text)
        first, *others = self._written.split(text)
        pairs = zip(others[::2], others[1::2])
        return encode(first) + [i for name, part in pairs for i in (self._written.names[name], *self._encode(part))]

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        # Slow tokenizers would split every added token, ordinary ones too; mistral-common's refuse the option.
        options = {"split_special_tokens": True} if plain and getattr(self.tokenizer, "is_fast", False) else {}
        return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"] if text else []

    def _after(self, text: str, plain: bool = False) -> list[int]:
        """Encodes text after a line break, then drops that: some tokenizers put a space in front of any text."""
        if text and (opening := self._line_break):
            ids = self._encode(f"\n{text}", plain)
            if ids[: len(opening)] == opening:
                return ids[len(opening) :]
        return self._encode(text, plain)

    def _halved(self, text: str) -> list[int]:
        """Returns the ids of text halved until no control token is left."""
        ids, half = self._after(text, plain=True), len(text) // 2
        if not half or self.controls.never.isdisjoint(ids):
            return ids
        return self._halved(text[:half]) + self._halved(text[half:])

    @cached_property
    def _line_break(self) -> list[int]:
        """The ids of a line break, if the tokenizer puts a space in front of text; else none."""
        opening, alone, after = map(self._encode, ("\n", "a", "\na"))
        return opening if after == opening + after[len(opening) :] != opening + alone else []


class Controls:
    """Control tokens by name, and the places of their names in a text.

    `never`: ids that no document may give; an unknown letter may give `unknown`, though its name may not.
    """

    def __init__(self, names: Mapping[str, int], unknown: int | None) -> None:
        self.names, self.unknown = names, unknown
        self.ids = frozenset(names.values())
        self.never = self.ids - {unknown}
        self._any = "|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or r"(?!)"

    def split(self, text: str) -> list[str]:
        """Cuts text at control tokens: text, token, text, …, text."""
        return re.split(f"({self._any})", text)

    def insides(self, text: str) -> list[int]:
        """Returns the place after the first letter of every control token's name, overlapping ones too."""
        return [match.start() + 1 for match in re.finditer(f"(?=(?:{self._any}))", text)]


# tokenizer -> its control tokens, by its state and the template used
_known: WeakKeyDictionary[Any, dict[Any, Controls]] = WeakKeyDictionary()

# An added token that is a control token by its shape.
_MARKER = re.compile(r"<[|｜].+>|<.+[|｜]>|</?(?:think|tool)\w*>|\[/?[A-Z_]+\]", re.DOTALL)
_MARKUP = re.compile(r"</?[^<>\s'\"]+>|\[/?[A-Z_]+\]")  # perhaps one, if a template writes it
_WORDS = re.compile(r"[\w\s.,'’&+/-]+")  # ordinary, unless a template writes it as a literal
_NAMES = re.compile(r"[a-z_]+|[\d\s]+")  # ordinary always: roles, fields and functions stand in templates as well


def control_tokens(tokenizer: Any, template: str | None = None) -> dict[str, int]:
    """Returns the control tokens by text: special ones, those shaped as such, and those that the tokenizer's templates
    write. Other added tokens, such as words, runs of spaces or HTML tags, are ordinary. A `template` (or its name)
    replaces the tokenizer's."""
    controls = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
    if parses_nothing(tokenizer):
        return controls
    literals = [*_literals(tokenizer, template), *_samples(tokenizer, template)]
    whole, written = {text.strip() for text in literals}, "\n".join(literals)
    for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        name = token.content.strip()
        by_template = name in whole if _WORDS.fullmatch(name) else len(name) > 1 and _either(name, written)
        if token.special or _MARKER.fullmatch(token.content) or (by_template and not _NAMES.fullmatch(name)):
            controls[token.content] = i
    for name in set(_MARKUP.findall(written)) - controls.keys():  # in the vocabulary, without being an added token
        i = tokenizer.convert_tokens_to_ids(name)
        if i is not None and i != tokenizer.unk_token_id:
            controls[name] = i
    return controls


def _either(name: str, written: str) -> bool:
    """Whether templates write a token, or its closing or opening partner."""
    partner = name[0] + name[2:] if name[1:2] == "/" else f"{name[:1]}/{name[1:]}"
    return name in written or (len(partner) > 3 and partner in written)


def _literals(tokenizer: Any, template: str | None) -> list[str]:
    """Returns the literal texts of the tokenizer's templates: no names, comments or keywords."""
    options = getattr(tokenizer, "init_kwargs", {})
    texts = [str(value) for name, value in options.items() if re.search(r"schema|(?<!added)_tokens?$", name)]
    own = [value for name, value in options.items() if "template" in name]
    for source in filter(None, [template, getattr(tokenizer, "chat_template", None), *own]):
        for one in source.values() if isinstance(source, Mapping) else [source]:
            texts += _pieces(str(one))
    return texts


def _pieces(source: str) -> list[str]:
    """Returns a Jinja template's raw text and string literals; all of it, if it cannot be read."""
    try:
        from jinja2 import Environment, TemplateError
    except ImportError:
        return [source]
    try:
        tokens = list(Environment().lexer.tokenize(source))
    except TemplateError:
        return [source]
    return [token.value for token in tokens if token.type in ("data", "string")]


_CALL = {"id": "callid000", "type": "function", "function": {"name": "a", "arguments": {"b": "c"}}}
_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "a", "tool_call_id": "callid000", "content": "a"},
    *[{"role": role, "content": "a"} for role in ("assistant", "user") * 4],
]
_TOOL = {"type": "function", "function": {"name": "a", "description": "a", "parameters": {"type": "object"}}}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "ipython", "model", "critic")


def _samples(tokenizer: Any, template: str | None) -> list[str]:
    """Renders a chat template with each role, tool calls and several turns: some templates compose markers of names."""
    texts, options = [], {} if template is None else {"chat_template": template}
    alone: list[list[dict[str, Any]]] = [[{"role": role, "content": "a"}] for role in _ROLES]
    with_calls = {"tools": [_TOOL], "documents": [{"title": "a", "text": "a"}]}
    for messages, more in [*((one, {}) for one in alone), (_TURNS, {}), (_TURNS[3:], {}), (_TURNS, with_calls)]:
        options_here = {**options, **more, "tokenize": False, "add_generation_prompt": True}
        try:
            texts.append(tokenizer.apply_chat_template(messages, **options_here))
        except Exception:  # the template has no such role, or not alone; or there is no template
            continue
    return texts


def parses_nothing(tokenizer: Any) -> bool:
    """Whether a tokenizer takes control tokens in text for plain text, as mistral-common's do."""
    return type(tokenizer).__name__.startswith("MistralCommon")
