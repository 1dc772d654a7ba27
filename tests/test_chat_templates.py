"""Chat prompts over many templates: the text is the one that the template writes, and documents stay documents."""

from __future__ import annotations

import json
from collections import namedtuple
from functools import cache
from types import SimpleNamespace

import pytest
from chat_templates import FORMS, byte_level, sentencepiece, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from hfblend import Prompt
from hfblend.prompts.chat import ends_of, woven
from hfblend.prompts.tokenize import Encoder

tokenizer_for = cache(lambda name: tokenizer_of(FORMS[name]))

CONTROL = sorted({token for form in FORMS.values() for token in (*form.special, *form.plain)})
ORDINARY = [
    "Doc one.",
    "\n\n",
    "\n",
    " ",
    "  lead",
    "trail  ",
    "    ",
    "\t",
    '"q"',
    "it's",
    "\\",
    "\\n",
    "\0",
    "\u2028",
]
ORDINARY += ["{{ x }}", "{% if a %}", "{# c #}", "{documents}", "<table>", "</h1>", "é", "e\u0301", "漢字", "🎉"]
ORDINARY += ["<", "|>", "<|im", "_start|>", "[", "/INST]"]
DOCUMENTS = st.lists(
    st.lists(st.sampled_from(ORDINARY + CONTROL), min_size=1, max_size=6).map("".join), min_size=1, max_size=4
)


def placements(form):
    """Messages, as a function of the documents' text, with the documents in different places."""
    yield lambda text: [{"role": "user", "content": f"{text}Who?"}]
    yield lambda text: [{"role": "user", "content": f"Passages:\n\n{text}"}]
    yield lambda text: [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": f"P: {text}\n\nWho?"},
    ]
    for role in form.roles:
        one, question = (lambda text, role=role: {"role": role, "content": text}), {"role": "user", "content": "Who?"}
        if role in ("system", "developer"):
            yield lambda text, one=one, question=question: [one(f"Use:\n\n{text}"), question]
        else:
            yield lambda text, one=one, question=question: [question, one(text)]
    if form.parts:
        yield lambda text: [
            {"role": "user", "content": [{"type": "text", "text": f"P:\n{text}"}, {"type": "text", "text": "Who?"}]}
        ]


def check_against_the_template(tokenizer, make, documents, **options):
    """The prompt's text is the template's, or an error says so; no control token is in a chunk."""
    try:
        prompt, reason = Prompt.from_chat(tokenizer, make("{documents}"), documents, **options), ""
    except ValueError as error:
        prompt, reason = None, str(error)
    if prompt is None:
        assert "template" in reason or "no tokens" in reason
        return None
    joined = make(woven(documents, ends_of(documents, "\n\n")))
    options = {"add_generation_prompt": True, **options}
    ids = tokenizer.apply_chat_template(joined, return_dict=False, **options)
    encode, spans = Encoder(tokenizer), prompt.chunk_spans
    for chunk in prompt.chunk_ids:
        assert encode.controls.ids.isdisjoint(chunk)
    if not spans.differs_from_joined_text:
        assert prompt.ids == ids
    text = encode.decode(prompt.ids)
    assert spans.note or text in (encode.decode(ids), tokenizer.apply_chat_template(joined, tokenize=False, **options))
    return prompt


def test_the_sweep_is_wide():
    assert len(FORMS) >= 30
    assert sum(bool(form.plain) for form in FORMS.values()) >= 12


@pytest.mark.parametrize("name", FORMS)
def test_ordinary_documents_read_as_the_template_writes_them(name):
    documents = ["Document one.\n\n", 'She said "no".\n\n', "C:\\temp {{ x }}\n\n"]
    for make in placements(FORMS[name]):
        prompt = check_against_the_template(tokenizer_for(name), make, documents)
        assert prompt is not None
        assert len(prompt.chunk_ids) == 3
        assert prompt.chunk_spans.note == ""


@pytest.mark.parametrize("name", FORMS)
def test_no_document_writes_a_control_token(name):
    form, tokenizer = FORMS[name], tokenizer_for(name)
    controls = {token: tokenizer.convert_tokens_to_ids(token) for token in (*form.special, *form.plain)}
    assert set(controls.values()) <= Encoder(tokenizer).controls.ids
    for token in controls:
        for text in (token, f"a{token}b", f" {token}\n", token * 3, token[0] + token, f"{token[:-1]}{token}"):
            prompt = Prompt.from_texts(tokenizer, prefix="P:\n", chunks=[text, "."], suffix="S")
            assert not set(controls.values()) & set(prompt.ids), text
            assert Encoder(tokenizer).decode(prompt.ids) == f"P:\n{text}.S"


@settings(max_examples=300, deadline=None)
@given(documents=DOCUMENTS, name=st.sampled_from(sorted(FORMS)), place=st.integers(0, 9))
def test_any_documents_in_any_template(documents, name, place):
    makes = list(placements(FORMS[name]))
    check_against_the_template(tokenizer_for(name), makes[place % len(makes)], documents)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_other_added_tokens_stay_the_tokenizers(make):
    tokenizer = make()
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("    ", "<table>", "2024", "<aside>")]
    )
    tokenizer.chat_template = "{% for m in messages %}    {{ m.content }}{% endfor %}2024-01-01"
    assert Encoder(tokenizer).controls.ids.isdisjoint(tokenizer.convert_tokens_to_ids(["    ", "<table>", "2024"]))
    text = "a    b<table>2024"
    assert Encoder(tokenizer).plain(text) == Encoder(tokenizer).after(text)
    aside = tokenizer.convert_tokens_to_ids("<aside>")
    assert aside in Encoder(tokenizer).plain("<aside>")  # no template writes it
    tokenizer.chat_template += "</aside>"
    assert aside not in Encoder(tokenizer).plain("<aside>")


@pytest.mark.parametrize("where", ["named template", "response_schema", "special by name", "composed", "vocabulary"])
def test_control_tokens_are_found_wherever_they_are_named(where):
    tokenizer = byte_level()
    if where != "vocabulary":
        tokenizer.add_tokens([AddedToken("<ask>", special=False)])
    if where == "named template":
        tokenizer.chat_template = {"default": "a", "tool_use": "{% if tools %}<ask>{% endif %}"}
    elif where == "response_schema":
        tokenizer.init_kwargs["response_schema"] = {"x-regex": "<ask>(.*)"}
    elif where == "special by name":
        tokenizer.eos_token = "<ask>"
    elif where == "composed":
        tokenizer.chat_template = "{% for m in messages %}{{ '<' + {'user': 'ask'}[m.role] + '>' }}{% endfor %}"
    else:
        tokenizer = in_vocabulary("<ask>")
        tokenizer.chat_template = "<ask>{{ messages[0].content }}"
    asks = tokenizer.convert_tokens_to_ids("<ask>")
    assert asks is not None
    ids = Encoder(tokenizer).plain("a<ask>b")
    assert asks not in ids
    assert tokenizer.decode(ids) == "a<ask>b"


LOOP = "{% for m in messages %}OPEN{{ m.content }}{% endfor %}"
COMPOSED = {
    "literal": ("<ask>{{ messages[-1].content }}", "<ask>", {}),
    "a role": (LOOP.replace("OPEN", "{{ '<' + m.role + '>' }}"), "<critics>", {"message": {"role": "critics"}}),
    "a kwarg": (LOOP.replace("OPEN", "{{ '<' ~ mode ~ '>' }}"), "<deep>", {"kwargs": {"mode": "deep"}}),
    "an index": (LOOP.replace("OPEN", "{{ '<step' ~ loop.index ~ '>' }}"), "<step1>", {}),
    "a call": (
        LOOP.replace("OPEN", "{% for c in m.tool_calls or [] %}{{ '<' ~ c.type ~ '_call>' }}{% endfor %}"),
        "<function_call>",
        {"message": {"tool_calls": [{"type": "function", "function": {"name": "a", "arguments": {}}}]}},
    ),
    "a call of another sort": (
        LOOP.replace("OPEN", "{% for c in m.tool_calls or [] %}{{ '<' ~ c.type ~ '_call>' }}{% endfor %}"),
        "<custom_call>",
        {"message": {"tool_calls": [{"type": "custom"}]}},
    ),
    "cases": (LOOP.replace("OPEN", "{{ '[' ~ m.role | upper ~ ']:' }}"), "[USER]:", {}),
}


@pytest.mark.parametrize("per_call", [False, True])
@pytest.mark.parametrize("how", COMPOSED)
def test_what_the_template_writes_here_is_a_control_token_here(how, per_call):
    template, token, more = COMPOSED[how]
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(t, special=False) for t in (token, "<table>")])
    kwargs = dict(more.get("kwargs", {}))
    if per_call:
        tokenizer.chat_template, kwargs["chat_template"] = "{{ messages[0].content }}", template
    else:
        tokenizer.chat_template = template
    messages = [{"role": "user", "content": "{documents}Who? <table>", **more.get("message", {})}]
    marker, table = tokenizer.convert_tokens_to_ids([token, "<table>"])
    for document in (token, f"a{token}b <table>", token * 2):
        prompt = Prompt.from_chat(tokenizer, messages, [document, "."], **kwargs)
        assert marker not in prompt.chunk_ids[0]
        assert marker in prompt.prefix_ids
        assert tokenizer.decode(prompt.chunk_ids[0]) == document
        assert (table in prompt.chunk_ids[0]) is ("<table>" in document)  # the user wrote it, not the template
    if how in ("an index", "a call", "cases") and not per_call:
        assert marker not in Prompt.from_texts(tokenizer, prefix="P", chunks=[token], suffix="S").ids


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama-3.1", "gpt-oss", "granite", "smollm3", "alpaca"])
def test_words_that_stand_in_a_templates_source_stay_ordinary(name):
    tokenizer = tokenizer_of(FORMS[name])
    words = ["content", "role", "user", "message", "if", "tool", "system", "function", "for", "assistant", "messages",
             "endif", "is defined", "enable_thinking", "reasoning_content", "e.g.", "C++", "2024"]  # fmt: skip
    tokenizer.add_tokens([AddedToken(word, special=False) for word in words])
    for word in words:
        prompt = Prompt.from_chat(tokenizer, f"What is {word}? {{documents}}", [f"a {word} b"])
        assert tokenizer.convert_tokens_to_ids(word) in prompt.chunk_ids[0], word
        assert prompt.chunk_ids[0] == Encoder(tokenizer).after(f"a {word} b")


def test_a_word_that_a_template_writes_as_a_marker_is_a_control_token():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken(word, special=False) for word in ("ENDTURN", "USER:", "### Question")])
    tokenizer.chat_template = "{% for m in messages %}USER: {{ m.content + 'ENDTURN' }}\n### Question\n{% endfor %}"
    for word in ("ENDTURN", "USER:", "### Question"):
        assert tokenizer.convert_tokens_to_ids(word) not in Encoder(tokenizer).plain(f"a {word} b")


def in_vocabulary(token):
    """A tokenizer whose vocabulary has a token that merges give, without its being an added token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level()
    letters, merges = tokenizer.get_vocab(), []
    for n in range(1, len(token)):
        merges.append((token[:n], token[n]))
        letters.setdefault(token[: n + 1], len(letters))
    inner = Tokenizer(models.BPE(letters, merges))
    inner.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    inner.decoder = tokenizer.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"single_word": True}])
def test_added_tokens_that_take_spaces_or_other_spellings_with_them(options):
    from tokenizers import normalizers

    tokenizer = byte_level()
    if "normalized" in options:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    for token in ("<|end|>", "<think>"):
        tokenizer.add_tokens([AddedToken(token, special=token == "<|end|>", **options)])
    tokenizer.chat_template = "<think>{{ messages[0].content }}"
    text = "a  <|end|>  b <think>\n<|END|> <THINK> c"
    ids = Encoder(tokenizer).plain(text)
    assert Encoder(tokenizer).controls.ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == (text.lower() if "normalized" in options else text)


def test_slow_tokenizers_too():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False, rstrip=True) for token in ("<ask>", "<table>")])
    tokenizer.chat_template = "<ask>{% for m in messages %}{{ m.content }}{% endfor %}"
    text = "a</s>b <extra_id_3> <ask>  c <<ask>"
    ids = Encoder(tokenizer).plain(text)
    assert Encoder(tokenizer).controls.ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    table = tokenizer.convert_tokens_to_ids("<table>")
    assert table in Encoder(tokenizer).plain("<table>")
    assert table not in Encoder(tokenizer).controls.ids


def test_unknown_letters_cut_nothing(word_tokenizer):
    assert Encoder(word_tokenizer).plain("w10 漢 w11 w12") == [10, 3, 11, 12]
    assert 3 not in Encoder(sentencepiece()).plain("<unk>")


def test_a_control_token_that_cannot_be_split_is_named():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "#"})
    tokenizer.backend_tokenizer.encode_special_tokens = False
    assert "#" in tokenizer.get_vocab()
    with pytest.raises(ValueError, match="control tokens"):
        Encoder(tokenizer).plain("a # b")


# --- messages and documents in other forms ---------------------------------------------------------------------------


def test_one_text_is_one_user_message():
    tokenizer = tokenizer_for("chatml")
    one = Prompt.from_chat(tokenizer, "Who?", ["Doc one.\n"])
    assert one.ids == Prompt.from_chat(tokenizer, [{"role": "user", "content": "Who?"}], ["Doc one.\n"]).ids
    for wrong in (None, 5, ["Who?"], {"role": "user", "content": "Who?"}, [SimpleNamespace(content="Who?")]):
        with pytest.raises(TypeError, match="list of dicts"):
            Prompt.from_chat(tokenizer, wrong, ["Doc one."])


def test_documents_may_be_objects_with_text():
    tokenizer, named = tokenizer_for("chatml"), namedtuple("named", "text")
    right = Prompt.from_chat(tokenizer, "Who?", ["Doc."] * 4)
    given = [{"page_content": "Doc.", "metadata": {}}, {"text": "Doc."}, SimpleNamespace(content="Doc."), named("Doc.")]
    assert Prompt.from_chat(tokenizer, "Who?", given).ids == right.ids
    assert Prompt.from_chat(tokenizer, "Who?", iter(given)).ids == right.ids
    texts = Prompt.from_texts(tokenizer, prefix="P", chunks=given, suffix="S")
    assert texts.chunk_ids == right.chunk_ids
    for wrong in ("Doc.", given[0], given[2], None, 5):
        with pytest.raises(TypeError, match="must be a list of texts, got"):
            Prompt.from_chat(tokenizer, "Who?", wrong)
    for wrong in (None, 5, {"body": "Doc."}, {"text": None}, b"Doc."):
        with pytest.raises(TypeError, match=r"documents\[1\] must be a text, or hold one as page_content"):
            Prompt.from_chat(tokenizer, "Who?", ["Doc.", wrong])


class Node:
    """As LlamaIndex's retrieved nodes: the text is a method's."""

    def get_content(self):
        return "Doc four."


def test_documents_do_not_run_together_and_the_note_says_so():
    tokenizer = tokenizer_for("chatml")
    documents = ["Doc one.", {"title": "T", "text": "Doc two.\n"}, SimpleNamespace(page_content="Doc three."), Node()]
    prompt = Prompt.from_chat(tokenizer, "Who?", documents)
    joined = "Doc one.\n\nDoc two.\nDoc three.\n\nDoc four.\n\nWho?"
    assert joined in tokenizer.decode(prompt.ids)
    assert list(map(tokenizer.decode, prompt.chunk_ids)) == ["Doc one.", "Doc two.\n", "Doc three.", "Doc four."]
    assert prompt.note == (
        "4 documents at the beginning of the last user message, '\\n\\n' after 3 of them; "
        "text read from text (1), page_content (1), get_content() (1)."
    )
    placed = Prompt.from_chat(tokenizer, "P:\n{documents}Who?", ["Doc one.\n"])
    assert placed.note == "1 document at '{documents}'."
    as_given = Prompt.from_chat(tokenizer, "{documents}", ["a", "b"], document_end="")
    assert "ab" in tokenizer.decode(as_given.ids)
    with pytest.raises(TypeError, match="document_end must be a text"):
        Prompt.from_chat(tokenizer, "Who?", ["a"], document_end=None)


@pytest.mark.parametrize("name", ["gemma", "llama-3.1"])
def test_a_document_at_the_end_of_a_trimmed_message_is_the_same_chunk(name):
    tokenizer, documents = tokenizer_for(name), ["One.", "Two."]
    one, other = (Prompt.from_chat(tokenizer, "Who?\n{documents}", docs) for docs in (documents, documents[::-1]))
    assert one.chunk_ids == other.chunk_ids[::-1]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "Who?"}],
        [{"type": "image"}, {"type": "text", "text": "Who?"}, {"type": "text", "text": "When?"}],
        [{"type": "text", "text": "{documents}\nWho?"}],
        [{"type": "image"}],
    ],
)
def test_documents_stay_in_the_turn_that_says_so_or_the_last(content):
    tokenizer = tokenizer_for("llama-3.1, of parts")
    tokenizer.chat_template = tokenizer.chat_template.replace("join('')", "select('defined') | join('')")
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    prompt = Prompt.from_chat(tokenizer, [*before, {"role": "user", "content": content}], ["DOC."])
    text = tokenizer.decode(prompt.ids)
    turn = text.split("user<|end_header_id|>")[2]
    assert text.count("DOC.") == turn.count("DOC.") == 1
    assert "{documents}" not in text
    assert content[-1].get("text", "").removeprefix("{documents}") in turn


def test_documents_in_a_tool_message_are_escaped_as_the_template_does():
    tokenizer = tokenizer_for("llama-3.1")
    documents = ['She said "no".\n', "C:\\temp\n"]
    messages = [{"role": "user", "content": "Who?"}, {"role": "tool", "content": "{documents}"}]
    prompt = Prompt.from_chat(tokenizer, messages, documents)
    body = tokenizer.decode(prompt.ids).split("ipython<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
    assert json.loads(body) == "".join(documents)
    assert [json.loads(f'"{tokenizer.decode(ids)}"') for ids in prompt.chunk_ids] == documents


def test_a_template_that_trims_trims_the_chunk():
    tokenizer = tokenizer_for("gemma")
    messages = [{"role": "user", "content": "Who?\n{documents}"}]
    prompt = Prompt.from_chat(tokenizer, messages, ["One.\n\n", "Two.\n\n"])
    assert list(map(tokenizer.decode, prompt.chunk_ids)) == ["One.\n\n", "Two."]


@pytest.mark.parametrize(
    "content",
    ["m.content[:12]", "m.content | upper", "m.content.split('.')[-1]", "m.content + m.content", "m.content | reverse"],
)
def test_a_template_that_changes_documents_as_a_whole_is_refused(content):
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ " + content + " }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template"):
        Prompt.from_chat(tokenizer, "{documents}Who?", ["Document one.", "Document two."])


def test_the_place_where_texts_part_is_told():
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.replace('e.Doc', 'e Doc') }}{% endfor %}"
    with pytest.raises(ValueError, match=r"after 'Document one' \(character 12\).*'\.Document"):
        Prompt.from_chat(tokenizer, "{documents}Who?", ["Document one.", "Document two."], document_end="")


@pytest.mark.parametrize("field", ["page_content", "text", "content"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_title_that_says_the_same_as_the_text_stays(field, order):
    tokenizer = byte_level()
    tokenizer.chat_template = f"{{% for d in documents %}}{{{{ d.title }}}}: {{{{ d.{field} }}}};{{% endfor %}}W"
    given = [dict([("title", "Rome"), (field, "Rome"), ("note", "Rome")][::order]), {field: "Oslo", "title": "Rome"}]
    prompt = Prompt.from_chat(tokenizer, "Who?", given, placeholder=None)
    assert tokenizer.decode(prompt.ids) == "Rome: Rome;Rome: Oslo;W"
    assert prompt.chunk_spans == ((6, 10), (17, 21))


@pytest.mark.parametrize("limit", [1, 4, 12, 13, 20, 33, 39, 40, 41, 100])
@pytest.mark.parametrize("size", [1, 3, 11, 12, 30, 39, 60])
def test_a_template_that_looks_at_lengths(limit, size):
    tokenizer, documents = byte_level(), ["ab" * 60, "c d"]
    documents = [document[:size] for document in documents]
    for content in ("{{ m.content }}", "{{ m.content | tojson }}"):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.content | length < " + str(limit) + " %}Short: {% else %}Long: {% endif %}"
            + content + "{% endfor %}"
        )  # fmt: skip
        prompt = Prompt.from_chat(tokenizer, "{documents}", documents, document_end="")
        right = tokenizer.apply_chat_template([{"role": "user", "content": "".join(documents)}], tokenize=False)
        assert tokenizer.decode(prompt.ids) == right
        assert list(map(tokenizer.decode, prompt.chunk_ids)) == documents


@pytest.mark.parametrize("name", ["granite", "command-r"])
def test_the_templates_own_documents_are_chunks_too(name):
    tokenizer, messages = tokenizer_for(name), [{"role": "user", "content": "Who?"}]
    given = [{"title": "One", "text": "Doc one.\n"}, {"title": "Two", "text": "Doc two.</h1> <|end_of_text|>"}]
    prompt = Prompt.from_chat(tokenizer, messages, given, placeholder=None)
    right = tokenizer.apply_chat_template(messages, documents=given, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt.ids) == right
    assert list(map(tokenizer.decode, prompt.chunk_ids)) == ["Doc one.\n", "Doc two.</h1> <|end_of_text|>"]
    texts = Prompt.from_chat(tokenizer, messages, ["Doc one.\n", SimpleNamespace(content="Doc two.")], placeholder=None)
    assert list(map(tokenizer.decode, texts.chunk_ids)) == ["Doc one.\n", "Doc two."]


def test_a_template_without_documents_of_its_own_says_so():
    with pytest.raises(ValueError, match=r"needs a template that has `documents`.*leave placeholder out"):
        Prompt.from_chat(tokenizer_for("chatml"), "Who?", ["Doc."], placeholder=None)


def test_pieces_of_sentencepiece_bring_no_space_of_their_own():
    tokenizer = sentencepiece()
    prompt = Prompt.from_texts(tokenizer, prefix="A. ", chunks=["One. ", "Two.\n"], suffix="Who?")
    assert tokenizer.decode(prompt.ids) == "A. One. Two.\nWho?"
    assert prompt.chunk_spans.note == ""


# --- mistral-common ---------------------------------------------------------------------------------------------------


class MistralCommonLike:
    """A tokenizer that takes control tokens in text for plain text, as mistral-common's do; of letters."""

    all_special_tokens = ("<s>", "</s>", "[INST]", "[/INST]")
    all_special_ids = (0, 1, 2, 3)
    unk_token_id, bos_token_id, eos_token_id = None, 0, 1

    def __len__(self):
        return 200

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [4 + ord(c) for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i - 4) for i in ids if i > 3)

    def convert_tokens_to_ids(self, token):
        return self.all_special_tokens.index(token)

    def convert_ids_to_tokens(self, ids):
        return [self.all_special_tokens[i] for i in ids]

    def apply_chat_template(self, messages, tokenize=True, return_dict=True, add_generation_prompt=False):
        assert tokenize, "its text is not what it reads"
        ids = [0]
        for message in messages:
            ids += [2, *self(message["content"], add_special_tokens=False)["input_ids"], 3]
        return ids


def test_a_tokenizer_that_parses_nothing():
    tokenizer, messages = MistralCommonLike(), [{"role": "user", "content": "P: {documents}Who?"}]
    documents = ["Doc [INST] one. ", "Doc two.</s> "]
    prompt = Prompt.from_chat(tokenizer, messages, documents)
    messages[0]["content"] = f"P: {''.join(documents)}Who?"
    assert prompt.ids == tokenizer.apply_chat_template(messages)
    assert prompt.chunk_spans.differs_from_joined_text is False
    assert [tokenizer.decode(ids) for ids in prompt.chunk_ids] == documents
    texts = Prompt.from_texts(tokenizer, prefix="<s>[INST]P: ", chunks=documents, suffix="Who?[/INST]")
    assert texts.ids == prompt.ids


@pytest.mark.parametrize("place", ["before", "after", "around", "system", "assistant", "across"])
def test_control_words_in_messages_stay_text_where_the_tokenizer_parses_none(place):
    tokenizer, documents = MistralCommonLike(), ["A doc </s>.\n\n", "[INST]"]
    for words in ("[INST]", "</s>", "a <s> b [/INST] c", "</s></s>[INST"):
        messages = {
            "before": [("user", f"{words}{{documents}}Who?")],
            "after": [("user", f"{{documents}}What does {words} do?")],
            "around": [("user", f"{words}{{documents}}{words}")],
            "system": [("system", words), ("user", "{documents}Who?")],
            "assistant": [("user", "Hi"), ("assistant", words), ("user", "{documents}Who?")],
            "across": [("user", "[IN{documents}ST]")],
        }[place]
        made = [{"role": role, "content": text} for role, text in messages]
        prompt = Prompt.from_chat(tokenizer, made, documents, document_end="")
        joined = [{**m, "content": m["content"].replace("{documents}", "".join(documents))} for m in made]
        assert prompt.ids == tokenizer.apply_chat_template(joined)
        assert prompt.chunk_spans.differs_from_joined_text is False
        assert sum(i in tokenizer.all_special_ids for i in prompt.ids) == 1 + 2 * len(made)


def test_a_note_names_control_tokens_as_the_tokenizer_does():
    encode = Encoder(MistralCommonLike(), marked=True)
    ids = [0, 2, *map(ord, "efg"), 3]
    assert encode.readable(encode.decode(ids)) == "<s>[INST]abc[/INST]"
    assert encode(encode.decode(ids)) == ids
    assert encode("[INST]") == Encoder(encode.tokenizer).after("[INS") + [4 + ord("T"), 4 + ord("]")]


@pytest.mark.parametrize("kind", ["spm", "tekken"])
def test_mistral_commons_own_tokenizers(kind):
    from pathlib import Path

    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    from transformers.tokenization_mistral_common import MistralCommonBackend

    names = {"spm": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240911.json"}
    tokenizer = MistralCommonBackend(tokenizer_path=str(data / names[kind]))
    documents = ["Document [INST] one.\n", "The second.\n"]
    prompt = Prompt.from_chat(tokenizer, "Passages:\n{documents}Who?", documents)
    message = {"role": "user", "content": f"Passages:\n{''.join(documents)}Who?"}
    assert prompt.ids == tokenizer.apply_chat_template([message], return_dict=False)
    assert len(prompt.chunk_ids) == 2
    asked = Prompt.from_chat(tokenizer, "{documents}What does [INST] do, and </s>?", documents)
    assert sum(i in tokenizer.all_special_ids for i in asked.ids) == 3
    assert asked.chunk_spans.note == ""
