"""Text of prompts, which may come from anybody, made harmless to show: nothing in it is hidden, nothing in it acts."""

from __future__ import annotations

import unicodedata

LONGEST = 60  # characters of a token

_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "␛"}
_JOINERS = "\u200c\u200d"  # part of ordinary words and emoji, without effect on the text around them


def visible(text: str) -> str:
    """Writes out controls, escapes and marks of writing direction, so that every character is seen.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a␛[31mb⟨U+202E⟩c'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return f"⟨U+{ord(character):04X}⟩" if acts else character


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, shortened to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
