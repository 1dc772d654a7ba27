"""Checks of arguments, and of values in JSON files. Each raises a `TypeError` (another type) or a `ValueError` (out of
bounds), which says what was got and what is expected."""

from __future__ import annotations

import difflib
import functools
import numbers
import re
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def described(value: Any) -> str:
    """Returns a value as errors name it, in one line: long ones by type, or shortened.

    >>> described("text"), described(2.5), described([1, 2]), described(dict)
    ("'text'", '2.5', '[1, 2]', 'the class dict')
    """
    kind = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_model(value):
        return f"a model ({kind})"
    if is_tokenizer(value):
        return f"a tokenizer ({kind})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if value and isinstance(value, dict):
        return f"a dict of {_short.repr(list(value))[1:-1]}"
    if value is None or isinstance(value, str | bytes | bool | int | float | list | tuple | dict | set):
        return " ".join(_short.repr(value).split())
    return f"an object of type {kind}"


def is_model(value: Any) -> bool:
    """Whether it is a PyTorch module; told without importing PyTorch, which no command line mistake needs."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].nn.Module)


def is_tokenizer(value: Any) -> bool:
    """Whether it has the methods of Transformers' tokenizers."""
    return not isinstance(value, type) and hasattr(value, "decode") and hasattr(value, "convert_ids_to_tokens")


def is_function(value: Any) -> bool:
    """Whether it is meant to be called: no class, model or tokenizer, which can be called too."""
    return callable(value) and not (isinstance(value, type) or is_model(value) or is_tokenizer(value))


def closest(name: str, known: Iterable[str], least: float = 0.6) -> str:
    """Returns the known name with the nearest spelling; empty if none is close (difflib's ratio below `least`)."""
    return next(iter(difflib.get_close_matches(name.lower(), list(known), 1, least)), "")


def one_of(name: str, value: Any, choices: Collection[str], also: str = "") -> None:
    """Raises `ValueError` unless a text is one of several; `also` says what else may be given."""
    if not isinstance(value, str) or value not in choices:
        guess = closest(value, choices) if isinstance(value, str) else ""
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ValueError(f"{name} must be one of {tuple(choices)}{also}, got {described(value)}.{hint}")


def whole(name: str, value: Any, least: int = 0) -> int:
    """Returns a whole number of at least `least`, NumPy's too, as a Python `int`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, {least} or more, got {described(value)}.")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}.")
    return int(value)


def number_in(name: str, value: Any, least: float, most: float) -> float:
    """Returns a number between bounds, NumPy's too, as a Python `float`; refuses NaN."""
    expected = f"a number in [{least:g}, {most:g}]" if most < float("inf") else f"a number, {least:g} or more"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {described(value)}.")
    if not least <= float(value) <= most:
        is_percent = (least, most) == (0, 1) and 1 < float(value) <= 100
        hint = f"; {value} % is {float(value) / 100:g}" if is_percent else ""
        raise ValueError(f"{name} must be {expected}, got {value}{hint}.")
    return float(value)


def require(name: str, value: Any, kind: Any, expected: str) -> Any:
    """Returns the value if it has this type, or one of several."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, got {described(value)}.")
    return value


def require_tokenizer(tokenizer: Any) -> Any:
    """Returns a tokenizer of Transformers, or an object with its methods; refuses names and processors."""
    if isinstance(tokenizer, type) or not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        hint = f": load it, AutoTokenizer.from_pretrained({tokenizer!r})" if isinstance(tokenizer, str) else ""
        raise TypeError(f"tokenizer must be a Transformers tokenizer, got {described(tokenizer)}{hint}.")
    if not is_tokenizer(tokenizer) and is_tokenizer(getattr(tokenizer, "tokenizer", None)):
        raise TypeError(f"tokenizer must be a tokenizer, got {described(tokenizer)}: pass its .tokenizer.")
    return tokenizer


def require_text(name: str, text: Any, expected: str = "a text") -> str:
    """Returns a text that can be encoded: it holds no half of a surrogate pair."""
    require(name, text, str, expected)
    if not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
        raise ValueError(
            f"{name} must be valid Unicode, got half of a surrogate pair, {half[0]!r}, at character {half.start()}; "
            "take it out, or decode the text with errors='replace'."
        )
    return text


def token_ids(name: str, ids: Any, vocab_size: int | None = None, expected: str = "a list of token ids") -> list[int]:
    """Returns the token ids of a list, an array or a tensor (n,); refuses ids outside the vocabulary."""
    plain = ids.tolist() if hasattr(ids, "tolist") else ids
    is_list = isinstance(plain, Collection) and not isinstance(plain, str | bytes | Mapping | Set)
    if not is_list or any(isinstance(i, bool) or not isinstance(i, numbers.Integral) for i in plain):
        how = ": of texts, Prompt.from_texts makes a prompt" if isinstance(plain, str) else ""
        raise TypeError(f"{name} must be {expected}, got {described(ids)}{how}.")
    if plain and not 0 <= min(plain) <= max(plain) < (vocab_size or max(plain) + 1):
        known = f"the model's are 0 … {vocab_size} − 1" if vocab_size else "they must be 0 or more"
        raise ValueError(f"{name} has ids from {min(plain)} to {max(plain)}; {known}.")
    return list(map(int, plain))


def known_fields(aliases: Mapping[str, str]) -> Any:
    """Decorates a dataclass of keywords: refuses an unknown one, and says which field was probably meant.

    Args:
        aliases: other projects' names and frequent mistakes -> the field, or advice.
    """

    def decorate(cls: type[T]) -> type[T]:
        init, names = cls.__init__, [field.name for field in fields(cls)]  # type: ignore[arg-type]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            if args:
                raise TypeError(f"{cls.__name__} takes keywords only, {names[0]}=… and others, got {described(args)}.")
            for name in given.keys() - set(names):
                guess = field_meant(name, names, aliases)
                hint = f"Did you mean {guess!r}?" if guess in names else guess or f"It has {', '.join(names)}."
                raise TypeError(f"{cls.__name__} has no field {name!r}. {hint}")
            init(self, **given)

        cls.__init__ = checked  # type: ignore[method-assign]
        return cls

    return decorate


def field_meant(name: str, names: Collection[str], aliases: Mapping[str, str]) -> str:
    """Returns the field that an unknown name stands for, or advice instead; empty if none is close."""
    known = name.lower().removeprefix("lmcache_").removeprefix("hfblend_").removeprefix("blend_")
    nearest = closest(known, [*names, *aliases])
    return aliases.get(known) or aliases.get(nearest, nearest)


# --- values in JSON files -----------------------------------------------------------------------------------------

_LARGEST = 1e15  # number
fields_of = functools.cache(get_type_hints)  # name -> annotation, of a dataclass


def _is_plain(value: Any, depth: int = 1) -> bool:
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(one, depth - 1) for one in inner)
    return value is None or isinstance(value, (str, bool, float)) or _FITS[float](value)


_FITS: dict[Any, Callable[[Any], bool]] = {
    int: lambda value: type(value) is int and 0 <= value <= _LARGEST,
    float: lambda value: type(value) in (int, float) and abs(value) <= _LARGEST,  # false for NaN
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    Any: _is_plain,
}


def from_json(kind: Any, value: Any, name: str) -> Any:
    """Returns a value of a JSON file as its annotation says; dataclasses are made of objects with all their fields.

    An `int` is 0 or more. `Any` is a text, a number, or a list or an object of these.

    Raises:
        TypeError, LookupError: a value of another type, or an object with other fields.
    """
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):  # or None
        return None if value is None else from_json(inner[0], value, name)
    if outer is list and isinstance(value, list):
        return [from_json(inner[0], one, name) for one in value]
    if outer is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(from_json(one, part, name) for one, part in zip(inner, value))
    if isinstance(value, dict) and (is_dataclass(kind) or outer is dict):
        kinds = dict.fromkeys(value, inner[1]) if outer is dict else fields_of(kind)
        if odd := sorted(value.keys() ^ kinds.keys()):  # a default would say what the file does not
            raise LookupError(f"{name} {'lacks' if odd[0] in kinds else 'has the unknown'} {odd[0]!r}")
        return (outer or kind)(**{key: from_json(kinds[key], one, key) for key, one in value.items()})
    if not (value in inner if outer is Literal else kind in _FITS and _FITS[kind](value)):
        raise TypeError(f"{name} is {type(value).__name__} {str(value)[:60]!r}")
    return value
