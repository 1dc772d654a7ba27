"""A fixed text that chunks may be computed after: `BlendConfig(chunk_prefix="filler")`.

A chunk that is computed right after the prefix takes itself for the beginning of the text. Its first tokens draw the
attention that beginnings draw, and all its keys and values carry that; in the prompt it stands in the middle. After a
text, any text, it is computed as one passage among others. The filler is the same for every chunk and every user, so
that nothing of one request reaches another, and its rows are dropped like the prefix's. It holds entries of an
encyclopaedia on unrelated subjects, some invented, written for this package.
"""

from __future__ import annotations

from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

from ..arguments import require_tokenizer, whole
from .tokenize import Encoder

_known: WeakKeyDictionary[Any, dict[int, tuple[int, ...]]] = WeakKeyDictionary()  # tokenizer -> repeats -> ids


def filler_ids(tokenizer: Any, repeats: int = 2) -> tuple[int, ...]:
    """Returns the filler's token ids, for `BlendConfig(chunk_prefix="filler", filler_ids=...)`.

    Its length matters more than its content: `docs/quality.md` has the numbers for other texts and lengths.

    >>> config = BlendConfig(chunk_prefix="filler", filler_ids=filler_ids(tokenizer))  # doctest: +SKIP

    Args:
        tokenizer: the model's; no special tokens are added.
        repeats: of the text, which is about 1,900 tokens.
    """
    known, repeats = _known.setdefault(require_tokenizer(tokenizer), {}), whole("repeats", repeats, 1)
    if repeats not in known:
        text = (resources.files("hfblend") / "data" / "filler.txt").read_text(encoding="utf-8")
        known[repeats] = tuple(Encoder(tokenizer)(text * repeats))
    return known[repeats]


def require_filler(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns `ids`; without any, raises a `ValueError` that says how to get them."""
    if not ids:
        raise ValueError(
            'chunk_prefix="filler" needs the filler\'s token ids, got none. Give patch() a tokenizer, or write '
            'BlendConfig(chunk_prefix="filler", filler_ids=hfblend.filler_ids(tokenizer)).'
        )
    return ids
