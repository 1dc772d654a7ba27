"""Text of prompts, which may come from anybody, made harmless to show: nothing in it is hidden, nothing in it acts."""

from __future__ import annotations

LONGEST = 60  # characters of a token


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, shortened to `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
