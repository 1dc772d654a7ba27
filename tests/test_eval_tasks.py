"""Generated questions: by seed and length, one needle a passage, answers that follow from the passages alone."""

from __future__ import annotations

import json
import re

import pytest
from helpers import make_llama
from typer.testing import CliRunner

from hfblend.cli import app
from hfblend.demo import model as demo_model
from hfblend.lab.eval import data
from hfblend.lab.eval.records import RecordFile
from hfblend.lab.eval.runner import Runner, answer_scores
from hfblend.lab.eval.tasks import CHAIN_LENGTH, NUM_CHAINS, NUM_NEEDLES, PASSAGE_TOKENS, generate
from hfblend.lab.settings import EvalSettings

LONGEST_FILLER = 9  # words
CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


def codes(example):
    """Passage -> (key, value) of its needle."""
    found = [re.findall(r"One access code of the (\w+ \w+) is (\d{5})\.", text) for text in example.passages]
    assert all(len(one) <= 1 for one in found)
    return {i: one[0] for i, one in enumerate(found) if one}


def definitions(example):
    """Variable -> (what it is defined by, index of its passage), in the order of the passages."""
    found = [re.findall(r"Variable (\w+) = (\w+)\.", text) for text in example.passages]
    assert all(len(one) <= 1 for one in found)
    return {name: (by, i) for i, one in enumerate(found) for name, by in one}


@pytest.mark.parametrize("template", [None, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("tokens", [400, 2000])
@pytest.mark.parametrize("name", data.GENERATED_NAMES)
def test_prompts_are_as_long_as_wanted(word_tokenizer, name, tokens, template):
    word_tokenizer.chat_template = template
    for example in generate(name, 3, word_tokenizer, tokens):
        prompt = data.to_prompt(word_tokenizer, example, tokens)
        count = len(example.passages)
        assert len(prompt.chunk_spans) == count >= (tokens - 100) // PASSAGE_TOKENS
        assert tokens - count * (LONGEST_FILLER + 1) < len(prompt) <= tokens
        assert prompt.ids[-2:] == word_tokenizer(example.opening, add_special_tokens=False)["input_ids"][-2:]


@pytest.mark.parametrize("name", data.GENERATED_NAMES)
def test_question_i_is_the_same_however_many_are_generated(word_tokenizer, name):
    five = generate(name, 5, word_tokenizer, 500)
    assert five[:2] == generate(name, 2, word_tokenizer, 500)
    assert len({example.question for example in five}) == 5
    others = [generate(name, 1, word_tokenizer, 500, seed=1), generate(name, 1, word_tokenizer, 600)]
    assert data.digest(five) == data.digest(five[:1])
    assert len({data.digest(examples) for examples in (five, *others)}) == 3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens", [500, 2000])
def test_needles_stand_alone_and_answer_the_question(word_tokenizer, tokens, seed):
    for name in data.GENERATED_NAMES[:3]:
        (example,) = generate(name, 1, word_tokenizer, tokens, seed)
        found = list(codes(example).values())
        keys, values = {key for key, _ in found}, {value for _, value in found}
        assert len(found) == len(values) == NUM_NEEDLES
        assert len(keys) == (1 if name == "needles_multivalue" else NUM_NEEDLES)
        asked = [key for key in keys if f"the {key}" in example.question]
        assert set(example.answers) == {value for key, value in found if key in asked}
        assert len(example.answers) == (1 if name == "needles_multikey" else NUM_NEEDLES)
        assert not any(answer in example.question + example.opening for answer in example.answers)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens", [500, 2000])
def test_a_variable_is_defined_in_a_later_passage_than_the_one_it_refers_to(word_tokenizer, tokens, seed):
    (example,) = generate("variable_tracking", 1, word_tokenizer, tokens, seed)
    defined = definitions(example)
    assert len(defined) == NUM_CHAINS * CHAIN_LENGTH
    value_of: dict[str, str] = {}
    for name, (by, passage) in defined.items():
        assert by.isdigit() or defined[by][1] < passage
        value_of[name] = by if by.isdigit() else value_of[by]
    (asked,) = re.findall(r"\d{5}", example.question)
    assert set(example.answers) == {name for name, value in value_of.items() if value == asked}
    assert len(set(value_of.values())) == NUM_CHAINS
    assert not any(answer in example.question + example.opening for answer in example.answers)


def test_needles_stand_everywhere(word_tokenizer):
    """Neither the first places nor any passage is preferred."""
    places, passages = [], []
    for example in generate("needles_multikey", 40, word_tokenizer, 900):
        for i in codes(example):
            sentences = example.passages[i].split(". ")
            at = next(j for j, sentence in enumerate(sentences) if "access code" in sentence)
            places.append(at / (len(sentences) - 1))
    assert 0.4 < sum(places) / len(places) < 0.6
    assert sum(place < 0.25 for place in places) / len(places) == pytest.approx(0.25, abs=0.1)
    for example in generate("needles_multikey", 20, word_tokenizer, 2500):
        passages += codes(example)
    assert set(passages) == set(range(len(example.passages)))


def test_too_few_tokens_are_refused(word_tokenizer):
    with pytest.raises(ValueError, match=r"50 tokens are too few for 8 passages and 'Which 4 variables"):
        generate("variable_tracking", 1, word_tokenizer, 50)
    (example,) = generate("needles_multikey", 1, word_tokenizer, 400)
    with pytest.raises(ValueError, match=r"with 4 passages has 3\d\d tokens, more than the 300 allowed"):
        data.to_prompt(word_tokenizer, example, 300)  # dropping a passage could drop the answer


def test_all_answers_are_wanted():
    example = data.Example("q", ("12345", "54321"), ("p",), data.NEEDLES)
    assert answer_scores(": 54321,\n12345", example, None) == {"string_match": 1.0}
    assert answer_scores(" 12345 and 12346", example, None) == {"string_match": 0.5}


def test_generated_questions_are_measured(word_tokenizer):
    examples = generate("needles_multivalue", 3, word_tokenizer, 300)
    settings = EvalSettings(methods=("full_prefill", "no_context", "full_reuse"), forced_tokens=4, answer_tokens=4)
    full, floor, reuse = Runner(make_llama(), word_tokenizer, examples, settings, RecordFile(None, {})).run([1])
    assert (full.f1, full.f1_ids, full.rouge_l) == (None, None, None)
    assert full.string_match == floor.string_match == reuse.string_match == 0.0  # it knows no digits
    assert floor.kl > 0 < reuse.kl
    assert floor.recomputed_pairs_share < 0.2


def test_the_command_generates_and_goes_on_with_more_questions(tmp_path, monkeypatch, word_tokenizer):
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), word_tokenizer))
    files = [f"--{kind}={tmp_path / kind}" for kind in ("records", "json", "markdown")]

    def evaluate(*arguments):
        fixed = ["--methods", "full_prefill,no_context,full_reuse", "--answer-tokens", "4", "--max-context", "300"]
        return CliRunner().invoke(app, ["eval", "--data", "variable_tracking", *fixed, *files, *arguments])

    assert evaluate("--n", "1").exit_code == 0
    first = (tmp_path / "records").read_text()
    outcome = evaluate("--n", "2", "--skip", "0")
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "records").read_text().startswith(first)
    results = json.loads((tmp_path / "json").read_text())
    assert results["data"]["source"] == "variable_tracking"
    assert results["questions"] == [0, 2]
    assert results["tokens"][1] <= 300
    assert [row["string_match"] for row in results["rows"]] == [0.0, 0.0, 0.0]
    assert [row["kl_recovered"] for row in results["rows"][:2]] == [1.0, 0.0]
    assert results["rows"][0]["string_match_recovered"] is None  # the tiny model's answers have no lead
    assert "KL recovered" in (tmp_path / "markdown").read_text()
    other = evaluate("--n", "2", "--seed", "1")
    assert other.exit_code == 2
    assert "another run" in other.output
    short = evaluate("--max-context", "50")
    assert short.exit_code == 2
    assert "50 tokens are too few" in " ".join(short.output.split())
