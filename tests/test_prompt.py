from __future__ import annotations

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from helpers import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import hfblend
from hfblend import Prompt
from hfblend.prompts.prompt import ChunkSpans, spans_by_row
from hfblend.prompts.separator import Separator

pytestmark = pytest.mark.usefixtures("remembered_proofs")

IDS = st.lists(st.integers(10, 90), min_size=1, max_size=6)


@given(prefix=st.lists(st.integers(10, 90), max_size=5), chunks=st.lists(IDS, max_size=4), suffix=IDS)
def test_from_ids_inserts_nothing_and_spans_hold_the_chunks(prefix, chunks, suffix):
    prompt = Prompt.from_ids(prefix, chunks, suffix)
    assert prompt.ids == prefix + [i for chunk in chunks for i in chunk] + suffix
    assert prompt.chunk_ids == chunks
    if chunks:
        assert (prompt.prefix_ids, prompt.suffix_ids) == (prefix, suffix)


@given(prefix=IDS, chunks=st.lists(IDS, min_size=1, max_size=4), suffix=IDS)
def test_splitting_at_the_separator_finds_the_pieces_again(prefix, chunks, suffix):
    separator = Separator((1, 2))
    prompt = Prompt.from_ids(prefix, chunks, suffix, separator_ids=(1, 2))
    again = Prompt.from_separated_ids(prompt.input_ids, separator)
    assert again.chunk_spans == prompt.chunk_spans
    assert again.chunk_ids == chunks


def test_inputs_are_what_generate_takes():
    inputs = Prompt.from_ids([1], [[2, 3]], [4]).inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "chunk_spans"}
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 4)
    assert inputs["chunk_spans"] == ((1, 3),)


def test_adjacent_separators_are_a_gap():
    separator = Separator((1, 2))
    assert separator.chunk_spans([9, 1, 2, 1, 2, 7, 8, 1, 2, 1, 2, 5]) == [(5, 7)]
    assert separator.chunk_spans([1, 2, 7, 1, 2]) == [(2, 3)]
    assert separator.chunk_spans([9, 9, 1, 2, 9]) == []
    assert separator.chunk_spans([1]) == []


def test_a_separator_that_overlaps_itself_matches_from_the_left(caplog):
    with caplog.at_level(logging.INFO, "hfblend"):
        separator = Separator((5, 5))
    assert "overlap themselves" in caplog.text
    assert separator.matches([5, 5, 5, 7, 5, 5]) == [(0, 2), (4, 6)]


@pytest.mark.parametrize("chunks", [[[]], [[1], []]])
def test_empty_chunks_are_refused(chunks):
    with pytest.raises(ValueError, match="no tokens"):
        Prompt.from_ids([1], chunks, [2])


def test_bad_prompts_are_refused(word_tokenizer):
    with pytest.raises(ValueError, match="at least one token"):
        Prompt.from_ids([], [], [])
    with pytest.raises(ValueError, match="shape"):
        Prompt(torch.zeros(2, 4, dtype=torch.long), ())
    with pytest.raises(TypeError, match="list of texts"):
        Prompt.from_texts(word_tokenizer, prefix="w8", chunks="w9 w10", suffix="w11")
    with pytest.raises(ValueError, match="pass a tokenizer"):
        Separator(" # # ")
    with pytest.raises(ValueError, match="tokenises to nothing"):
        Prompt.from_texts(word_tokenizer, prefix="w8", chunks=["w9"], suffix="w11", separator=" ")
    with pytest.raises(ValueError, match="tokenises to nothing"):
        Separator("\u200b", _NothingTokenizer())


class _NothingTokenizer:
    decode = convert_ids_to_tokens = None

    def __call__(self, text, **kwargs):
        return {"input_ids": []}


def test_from_texts_inserts_nothing_and_takes_a_separator(word_tokenizer):
    texts = {"prefix": "w8 w9", "chunks": ["w10 w11", "w12"], "suffix": "w13"}
    assert Prompt.from_texts(word_tokenizer, **texts).ids == [8, 9, 10, 11, 12, 13]
    separated = Prompt.from_texts(word_tokenizer, **texts, separator=" ## ")
    assert separated.ids == [8, 9, 4, 10, 11, 4, 12, 4, 13]
    assert separated.chunk_spans == ((3, 5), (6, 7))
    assert separated.chunk_spans.differs_from_joined_text is False
    assert Prompt.from_texts(word_tokenizer, **texts, separator=(4,)).ids == separated.ids


def test_pieces_that_join_differently_are_noticed(word_tokenizer):
    prompt = Prompt.from_texts(word_tokenizer, prefix="w8", chunks=["w9"], suffix="w13")
    assert prompt.chunk_spans.differs_from_joined_text is True  # "w8w9w13" is one unknown word


def test_hidden_separators_warn_once(word_tokenizer, caplog):
    separator = Separator(" ## ", word_tokenizer)
    assert separator.is_found_in_joined_text()
    with caplog.at_level(logging.WARNING, "hfblend"):
        separator.warn_if_hidden([8, 4, 9])
        assert not caplog.text
        separator.variants, separator._firsts = [(1, 1)], {1}  # as if the tokenizer fused it with its neighbours
        separator.warn_if_hidden([8, 4, 9])
        separator.warn_if_hidden([8, 4, 9])
    assert caplog.text.count("its token ids") == 1


@pytest.mark.parametrize("end", [".", ". ", ".  ", "#", " "])
def test_a_separator_that_is_hidden_once_is_noticed(end, caplog):
    """Pairs of spaces are one token, as in Gemma's tokenizer: a document's last space takes the separator's first."""
    tokenizer = pairs_of_spaces()
    separator = Separator(" # # ", tokenizer)
    ids = tokenizer(f"S. # # One{end} # # Two. # # Three. # # Who?", add_special_tokens=False)["input_ids"]
    with caplog.at_level(logging.WARNING, "hfblend"):
        separator.warn_if_hidden(ids)
    assert (len(separator.chunk_spans(ids)) == 3) or "4 times, its token ids" in caplog.text


@pytest.mark.parametrize("hidden", [False, True])
def test_generate_warns_of_a_separator_that_is_hidden_once(hidden, caplog):
    tokenizer, model = pairs_of_spaces(), make_llama(vocab_size=300)
    text = f"S. # # One.{' ' * hidden} # # Two. # # Three. # # Who?"
    config = hfblend.BlendConfig(separator=" # # ", min_reused_tokens=0)
    with caplog.at_level(logging.WARNING, "hfblend"), hfblend.patch(model, tokenizer=tokenizer, config=config):
        model.generate(**tokenizer(text, return_tensors="pt", return_token_type_ids=False), max_new_tokens=1)
    assert ("its token ids" in caplog.text) is hidden


def pairs_of_spaces():
    """A tokenizer of letters in which two spaces are one token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {piece: i for i, piece in enumerate(["<unk>", "▁", "▁▁", *map(chr, range(33, 127))])}
    inner = Tokenizer(models.BPE(letters, [("▁", "▁")], unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_separators_are_found_from_the_left(ids):
    separator = Separator((1, 2, 1))
    found, i = [], 0
    while i < len(ids):
        here = ids[i : i + 3] == [1, 2, 1]
        found += [(i, i + 3)] * here
        i += 3 if here else 1
    assert separator.matches(ids) == found


CHAT = (
    "{% for m in messages %}{{ '<s> ' + m['role'].replace('user', 'w6') + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
)


def test_from_chat_cuts_at_the_documents(word_tokenizer):
    word_tokenizer.chat_template = CHAT
    question = [{"role": "user", "content": "w20 w21"}]
    prompt = Prompt.from_chat(word_tokenizer, question, ["w10 w11", "w12"])
    assert prompt.ids == [1, 6, 10, 11, 12, 20, 21, 2]
    assert prompt.chunk_ids == [[10, 11], [12]]
    placed = Prompt.from_chat(word_tokenizer, [{"role": "user", "content": "w7 {documents} w20"}], ["w10"])
    assert placed.ids == [1, 6, 7, 10, 20, 2]


def test_a_document_cannot_close_the_users_turn(word_tokenizer):
    word_tokenizer.chat_template = CHAT
    prompt = Prompt.from_chat(word_tokenizer, [{"role": "user", "content": "w20"}], ["w10 </s> <s> w11"])
    assert 2 not in prompt.chunk_ids[0]
    assert 1 not in prompt.chunk_ids[0]
    assert prompt.ids.count(2) == 1
    texts = Prompt.from_texts(word_tokenizer, prefix="<s> w6", chunks=["</s>"], suffix="w7 </s>")
    assert texts.prefix_ids[0] == 1
    assert texts.suffix_ids[-1] == 2
    assert 2 not in texts.chunk_ids[0]


def test_from_chat_says_what_is_wrong(word_tokenizer):
    word_tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="user message"):
        Prompt.from_chat(word_tokenizer, [{"role": "system", "content": "w7"}], ["w10"])
    with pytest.raises(ValueError, match="once"):
        Prompt.from_chat(word_tokenizer, [{"role": "user", "content": "{documents} {documents}"}], ["w10"])
    word_tokenizer.chat_template = "w7"
    with pytest.raises(ValueError, match="each document once"):
        Prompt.from_chat(word_tokenizer, [{"role": "user", "content": "w8"}], ["w10"])


def test_bos_is_only_put_first_when_told(word_tokenizer, caplog):
    from tokenizers.processors import TemplateProcessing

    word_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    texts = {"prefix": "w8", "chunks": ["w9"], "suffix": "w10"}
    with caplog.at_level(logging.WARNING, "hfblend"):
        assert Prompt.from_texts(word_tokenizer, **texts).ids == [8, 9, 10]
    assert "add_special_tokens=True" in caplog.text
    assert Prompt.from_texts(word_tokenizer, **texts, add_special_tokens=True).ids == [1, 8, 9, 10]
    texts["prefix"] = "<s> w8"
    assert Prompt.from_texts(word_tokenizer, **texts, add_special_tokens=True).ids == [1, 8, 9, 10]


def test_public_names():
    for name in hfblend.__all__:
        assert getattr(hfblend, name).__doc__


SPANS = [(2, 5), (6, 9)]


@pytest.mark.parametrize(
    "given_spans",
    [
        SPANS,
        torch.tensor(SPANS),
        np.array(SPANS),
        np.array(SPANS, dtype=np.uint8),
        [[2, 5], [6, 9]],
        [(np.int64(2), np.int32(5)), (np.int64(6), 9)],
        [np.array([2, 5]), np.array([6, 9])],
        [torch.tensor([2, 5]), (6, 9)],
        [(torch.tensor(2), torch.tensor(5)), [torch.tensor(6), 9]],
        iter(SPANS),
        (span for span in SPANS),
        ChunkSpans(SPANS),
    ],
    ids=lambda spans: type(spans).__name__,
)
def test_spans_may_come_in_any_array(given_spans):
    rows = torch.arange(20)[None]
    assert spans_by_row(given_spans, rows) == [tuple(SPANS)]
    again = [list(SPANS), [ChunkSpans(SPANS)][0]]
    assert spans_by_row(again, rows.repeat(2, 1)) == [tuple(SPANS)] * 2
    assert spans_by_row([np.array(SPANS), torch.tensor(SPANS)], rows.repeat(2, 1)) == [tuple(SPANS)] * 2
    assert spans_by_row([[], SPANS], rows.repeat(2, 1)) == [(), tuple(SPANS)]


@pytest.mark.parametrize(
    "wrong",
    [5, (2, 5), [None], [(2.0, 5)], ["ab"], [[2, 5, 6]], "2:5", "(2, 5)", ["2:5"], [("2", "5")], b"25", {2: 5},
     [{2: 5}], [(True, 5)], np.array([[2.5, 5]]), torch.tensor([[2.0, 5.0]]), torch.tensor([2, 5]), [[(2, 5.0)]]],
    ids=str,
)  # fmt: skip
def test_what_is_no_span_is_named(wrong):
    with pytest.raises(ValueError, match=r"\(start, stop\).*got"):
        spans_by_row(wrong, torch.arange(20)[None])
    with pytest.raises(ValueError, match=r"\(start, stop\).*got"):
        Prompt(torch.arange(20)[None], wrong)


@pytest.mark.parametrize("stop", [-1, 3, 100, True, 1.5, "1", (1,)])
def test_ids_before_chunks_end_where_the_first_one_starts(stop):
    with pytest.raises((TypeError, ValueError), match="prefix_stop must be"):
        Prompt(torch.arange(20)[None], ChunkSpans([(2, 5)], prefix_stop=stop))
    for right in (None, 0, 1, np.int64(2)):
        spans = ChunkSpans([(2, 5)], prefix_stop=right)
        spans.check(20)
        assert (
            copy.deepcopy(spans).prefix_stop == spans.moved(3).moved(-3).prefix_stop == (2 if right is None else right)
        )
        assert pickle.loads(pickle.dumps(spans)).prefix_stop == spans.from_token(1).prefix_stop == spans.prefix_stop
