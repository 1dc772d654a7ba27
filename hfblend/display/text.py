"""Text of prompts, which nobody vouches for, made harmless to show: nothing hides in it, and nothing in it acts."""

from __future__ import annotations

import html
import unicodedata

LONGEST = 60  # characters of a token

_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "␛"}
_JOINERS = "\u200c\u200d"  # part of ordinary words and emoji, and without effect on what stands around them


def visible(text: str) -> str:
    """The text with every character seen: controls, escapes and marks of writing direction are written out.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a␛[31mb⟨U+202E⟩c'
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return f"⟨U+{ord(character):04X}⟩" if acts else character


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, or as much of it as fits."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def escaped(text: object) -> str:
    """For HTML, between tags and inside quotes."""
    return html.escape(visible(str(text)), quote=True)
