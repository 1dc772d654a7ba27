"""Text of answers, token by token: with all kinds of decoders, and tokens that are no text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)

from hfblend.serving import text as module
from hfblend.serving.text import Text

LETTERS = "ab é世🙂ह\u0301\n"


def of_bytes():
    """A token a byte, as in GPT-2, Llama 3 and Qwen, but without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>"])
    return inner


def with_bytes_for_the_rest():
    """Tokens of letters, and of the bytes of others, as in Llama 2, Mistral and Gemma."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "é"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(["<s>"])
    return inner


KINDS = {"bytes": of_bytes, "byte-fallback": with_bytes_for_the_rest}


def ids_of(inner, text):
    return [i for letter in text.replace(" ", "▁" if inner.token_to_id("▁") else " ") for i in inner.encode(letter).ids]


def pieces_of(inner, ids, skips_special=True):
    text = Text(inner, skips_special)
    return [*(text.add(i) for i in ids), text.rest()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skips_special", [True, False])
def test_text_in_pieces_is_the_whole_text(kind, skips_special):
    inner, draw = KINDS[kind](), random.Random(0)
    for _ in range(50):
        letters = draw.choices(LETTERS, k=20)
        parts = [ids_of(inner, letter) for letter in letters]
        parts.insert(draw.randrange(20), [inner.token_to_id("<s>")])
        ids = [i for part in parts for i in part]
        pieces = pieces_of(inner, ids, skips_special)
        assert "".join(pieces) == inner.decode(ids, skip_special_tokens=skips_special)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_is_cut_short_does_not_stop_the_text(kind):
    """`tokenizers.DecodeStream` raises an error here if a byte is a token."""
    inner = KINDS[kind]()
    for cut in (1, 2, 3):
        ids = [*ids_of(inner, "a"), *ids_of(inner, "🙂")[:cut], *ids_of(inner, "ba")]
        assert "".join(pieces_of(inner, ids)) == inner.decode(ids)
        assert "".join(pieces_of(inner, ids[: 1 + cut])) == inner.decode(ids[: 1 + cut])  # at the end


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_have_a_text(kind):
    inner, draw = KINDS[kind](), random.Random(0)
    for _ in range(100):
        ids = [draw.randrange(inner.get_vocab_size()) for _ in range(60)]
        pieces = pieces_of(inner, [*ids, *ids_of(inner, "aba")])
        assert "".join(pieces).endswith("aba")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_no_character_are_not_held_for_ever(kind):
    inner = KINDS[kind]()
    (first, *_) = ids_of(inner, "🙂")
    pieces = pieces_of(inner, [first] * 100)
    assert max(map(len, pieces)) <= module._MOST_HELD
    assert "".join(pieces) == inner.decode([first] * 100)
