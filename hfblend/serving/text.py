"""Text of an answer, token by token."""

from __future__ import annotations

from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character, or not yet one
_MOST_HELD = 32  # tokens: an answer of nothing but such bytes must not be decoded from its beginning each time


class Text:
    """Decodes tokens one by one, and holds those whose last character is not whole yet.

    `tokenizers.DecodeStream` does so, too, but raises an error at a token after bytes that are no character, which
    models with a token for each byte do write, and keeps such bytes at the end.

    Args:
        tokenizer: of `tokenizers`.
        skips_special: leaves out special tokens.
    """

    def __init__(self, tokenizer: Any, skips_special: bool) -> None:
        self._tokenizer, self._skips = tokenizer, skips_special
        self._ids: list[int] = []  # those of the last text that was given, and after them those that are held
        self._num_given, self._given = 0, ""  # tokens of that text, and itself

    def add(self, token: int) -> str:
        """Returns the text that is whole with this token."""
        self._ids.append(token)
        text = self._decoded(self._ids)
        is_open = text.endswith(_UNKNOWN) and len(self._ids) - self._num_given < _MOST_HELD
        return "" if is_open else self._give(text)

    def rest(self) -> str:
        """Returns the text that is held, at the end of the answer."""
        return self._give(self._decoded(self._ids))

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        if new:  # else the text before stays: it tells the decoder whether this is the first word
            self._ids = self._ids[self._num_given :]
            self._num_given, self._given = len(self._ids), self._decoded(self._ids)
        return new

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skips))
