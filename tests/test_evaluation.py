"""`hfblend eval`: data, metrics by hand, the runner on a tiny model, files that resume, the command."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from helpers import make_llama, make_mistral
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.cli.common import Outputs
from hfblend.demo import model as demo_model
from hfblend.lab import plots, report
from hfblend.lab.baselines import METHODS
from hfblend.lab.eval import data, metrics, runner
from hfblend.lab.eval.records import Record, RecordFile
from hfblend.lab.eval.runner import Runner
from hfblend.lab.eval.summary import summarize
from hfblend.lab.settings import EvalSettings
from hfblend.measure.divergence import FullAnswer, kl_divergence, teacher_forced_logits, top1_agreement

FIRST_KEYS = ["method", "ratio", "n", "kl", "kl_ci95", "top1_agreement", "f1", "ttft_ms", "recomputed_pairs_share"]


def words(seed, count=24):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(6, 97, (count,), generator=generator).tolist())


def question_rows(count=3, passages=4):
    return [
        {
            "question": words(100 + q, 5),
            "answers": [words(200 + q, 3)],
            "ctxs": [{"title": "", "text": words(10 * q + p)} for p in range(passages)],
        }
        for q in range(count)
    ]


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- data -----------------------------------------------------------------------------------------------------------

MUSIQUE_ROW = {"input": "Who?", "answers": ["Ann"], "context": "Passage 1:\nTitle\nText\u2028one.\nPassage 2:\nTwo.\n"}
SAMSUM_ROW = {
    "input": "Dialogue: Al: Hi\nSummary: ",
    "answers": ["Al greets."],
    "context": "Dialogue: Bo: Bye\nSummary: Bo leaves.\nDialogue: Cy: Yes\nSummary: Cy agrees.",
}
NEWS_ROW = {"input": "", "answers": ["All news."], "context": "Passage 1:\nOne.\n\nPassage 2:\nTwo."}


def test_json_of_the_research_repository(tmp_path):
    row = {"question": "Who?", "answers": ["Ann", "A."], "ctxs": [{"title": "T", "text": "x"}, {"text": "y"}]}
    assert data.load(str(write_json(tmp_path / "q.json", [row]))) == [
        data.Example("Who?", ("Ann", "A."), ("T\nx", "y"), data.QA)
    ]


@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_longbench_form_is_split_into_its_passages(tmp_path, write):
    qa, dialogue, news = data.load_json(write(tmp_path / "file", [MUSIQUE_ROW, SAMSUM_ROW, NEWS_ROW]))
    assert qa == data.Example("Who?", ("Ann",), ("Title\nText\u2028one.", "Two."), data.QA)
    assert dialogue.passages == ("Dialogue: Bo: Bye\nSummary: Bo leaves.", "Dialogue: Cy: Yes\nSummary: Cy agrees.")
    assert (dialogue.task, news.task, news.passages) == (data.DIALOGUE, data.NEWS, ("One.", "Two."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1,", "neither JSON nor JSON lines"),
        ("[]", "got an empty list"),
        ("3", "got no list"),
        ("[3]", r"question 0: expected an object with 'ctxs' or 'context', got 3"),
        ('[{"ctxs": [{"text": "x"}], "answers": ["a"]}]', "'question' must be a text, got None"),
        ('[{"question": "q", "ctxs": [{"text": "x"}], "answers": "a"}]', "'answers' must be a list of texts, got 'a'"),
        ('[{"question": "q", "ctxs": [{"title": "x"}], "answers": ["a"]}]', "list of objects with a 'text'"),
        ('[{"question": "q", "ctxs": [{"text": " "}], "answers": ["a"]}]', "no passage has any text"),
        ('[{"input": "q", "context": "plain", "answers": ["a"]}]', "no line 'Passage 1:'"),
        ('[{"input": "q", "context": 3, "answers": ["a"]}]', "'context' must be a text, got 3"),
    ],
)
def test_malformed_data_is_refused_with_its_place(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        data.load_json(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_named_set_comes_from_longbench_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    local, asked = write_jsonl(tmp_path / "rows.jsonl", [SAMSUM_ROW]), []

    def load_local(builder, data_files, split):
        asked.append((builder, data_files, split))
        return original("json", data_files=str(local), split=split, cache_dir=str(tmp_path / "cache"))

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_local)
    assert data.load("samsum") == data.load_json(local)
    ((builder, files, split),) = asked
    assert (builder, split) == ("parquet", "train")
    assert files.startswith("hf://datasets/THUDM/LongBench@")
    assert "/samsum/" in files


def test_missing_datasets_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[eval\]'"):
        data.load("musique")


def test_unknown_source_lists_the_names():
    with pytest.raises(ValueError, match="musique, 2wikimqa, hotpotqa, samsum, multi_news"):
        data.load("nowhere.json")


def test_passages_are_dropped_whole_from_the_end_and_logged(word_tokenizer, caplog):
    example = data.Example("w6 w7", ("w8",), tuple(words(i, 20) for i in range(4)))
    whole = data.to_prompt(word_tokenizer, example, 1000)
    assert len(whole.chunk_spans) == 4
    assert not caplog.records
    shorter = data.to_prompt(word_tokenizer, example, len(whole) - 1)
    assert shorter.chunk_ids == whole.chunk_ids[:3]
    assert shorter.suffix_ids == whole.suffix_ids
    assert "Dropped the last 1 of 4 passages" in caplog.text
    with pytest.raises(ValueError, match=r"with one passage has 3\d tokens, more than the 10 allowed"):
        data.to_prompt(word_tokenizer, example, 10)


def test_a_chat_prompt_reads_as_documented(word_tokenizer):
    word_tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    prompt = data.to_prompt(word_tokenizer, data.Example("w9", ("w8",), ("w6", "w7")), 100)
    expected = "<s>Passages:\nw6\n\nw7\n\nQuestion: w9\nAnswer with a few words.</s>"
    assert prompt.ids == word_tokenizer(expected, add_special_tokens=False)["input_ids"]
    summary = data.to_prompt(word_tokenizer, data.Example("w9", ("w8",), ("w6",), data.DIALOGUE), 100)
    assert word_tokenizer.decode(summary.suffix_ids) == "w9 </s>"


def test_digest_tells_data_apart():
    one, other = data.Example("q", ("a",), ("p",)), data.Example("q", ("a",), ("p.",))
    assert data.digest([one]) == data.digest([data.Example("q", ("a",), ("p",))])
    assert len({data.digest(examples) for examples in ([one], [other], [one, other], [other, one])}) == 4


# --- metrics --------------------------------------------------------------------------------------------------------


def test_normalize_answer():
    assert metrics.normalize_answer("The U.S.  and an Apple!") == "us and apple"


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Exeter College", "the Exeter college.", 1.0),
        ("at Exeter College", "Exeter College", 0.8),  # precision 2/3, recall 1
        ("b b c", "b c c d", 4 / 7),  # each word as often as both have it
        ("Paris", "London", 0.0),
        ("the", "", 1.0),  # both empty once normalised
        ("Paris", "", 0.0),
    ],
)
def test_f1_of_words_by_hand(answer, reference, expected):
    assert metrics.f1_words(answer, reference) == pytest.approx(expected)


def test_f1_of_ids_counts_ids_without_special_tokens(word_tokenizer):
    assert metrics.f1_ids("w6 w7 w8", "W6 w7", word_tokenizer) == pytest.approx(0.8)
    assert metrics.f1_ids("w6", "w9", word_tokenizer) == 0.0
    assert metrics.f1_ids("x", "y", word_tokenizer) == 1.0  # both are [UNK]: the words' F1 is 0


def test_best_takes_the_highest_reference_and_the_first_line_is_scored():
    assert metrics.best(metrics.f1_words, "Ann Lee", ["Bob", "Ann", "Ann Lee"]) == 1.0
    assert metrics.first_line("\n Ann Lee \nQuestion: more") == "Ann Lee"
    assert metrics.first_line("") == ""


@pytest.mark.parametrize(
    ("answer", "references", "found", "all_found"),
    [
        ("It was EXETER College.", ["Exeter College"], 1, 1),
        ("48213, 77001 and more", ["48213", "90125"], 1, 0.5),
        ("first\x0bline", ["first\nline"], 1, 1),  # a control character is a line break
        ("Exeter, a college", ["Exeter College"], 0, 0),  # punctuation counts
        ("", ["48213", "90125", "77001"], 0, 0),
        ("below\nthe first line: 90125", [" 90125 "], 1, 1),
        ("77001 77001", ["77001", "90125", "48213", "10000"], 1, 0.25),
    ],
)
def test_string_match_by_hand(answer, references, found, all_found):
    assert metrics.best(metrics.string_match, answer, references) == found
    assert metrics.share_found(answer, references) == all_found


def test_rouge_l_by_hand():
    pytest.importorskip("rouge_score")
    # longest common subsequence: "one three four"; precision 3/4, recall 3/5
    assert metrics.rouge_l("one three four six", "one two three four five") == pytest.approx(2 / 3)


def test_missing_rouge_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[eval\]'"):
        metrics.rouge_l("a", "b")


def test_bootstrap_is_deterministic_and_near_the_normal_interval():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = metrics.bootstrap_mean_ci(values.tolist(), seed=3)
    assert (low, high) == metrics.bootstrap_mean_ci(values.tolist(), seed=3)
    assert (low, high) != metrics.bootstrap_mean_ci(values.tolist(), seed=4)
    half = 1.96 * (values.std() / math.sqrt(200)).item()
    assert low == pytest.approx(values.mean().item() - half, abs=0.02)
    assert high == pytest.approx(values.mean().item() + half, abs=0.02)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 500)
    samples = torch.rand(200, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    intervals = [metrics.bootstrap_mean_ci(row.tolist(), seed) for seed, row in enumerate(samples)]
    covered = sum(low <= 0.5 <= high for low, high in intervals)
    assert 0.9 <= covered / 200 <= 0.99


def test_ratio_interval_pairs_the_questions():
    baseline = torch.rand(30, generator=torch.Generator().manual_seed(2)).add(0.01).tolist()
    low, high = metrics.bootstrap_ratio_ci([value * 0.25 for value in baseline], baseline)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)  # resampling values instead of questions would spread it
    with pytest.raises(ValueError, match="got 1 and 2 values"):
        metrics.bootstrap_ratio_ci([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one value"):
        metrics.bootstrap_mean_ci([])


def test_recovered_share_by_hand():
    share, (low, high) = metrics.recovered([0.5, 1.0], floor=[0.0, 0.5], full=[1.0, 1.5])
    assert (share, low, high) == (0.5, 0.5, 0.5)  # half of each question's gap
    share, interval = metrics.recovered([3.0, 2.0, 0.0], floor=[0.0, 0.0, 0.0], full=[4.0, 2.0, 3.0])
    assert share == pytest.approx(5 / 9)  # of sums, no mean of shares
    assert interval == (0.0, 1.0)  # resamples of the third alone, and of the second alone


@pytest.mark.parametrize(
    ("floor", "full"),
    [
        ([], []),
        ([0.1, 0.4], [0.1, 0.4]),  # no gap
        ([0.0, 1.0], [1.0, 0.0]),  # none in sum
        ([0.0, 0.5], [1.0, 0.0]),  # none in a quarter of the resamples
        ([0.1, 0.4], [0.0, 0.2]),  # full prefill is worse than the floor
    ],
)
def test_an_uncertain_lead_is_not_divided_by(floor, full):
    assert metrics.recovered([0.3] * len(full), floor, full) is None


def test_recovered_interval_covers_the_true_share_about_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 500)
    generator, covered = torch.Generator().manual_seed(3), 0
    for seed in range(200):
        gaps, noise = (torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(2))
        gains = (0.8 * gaps + 0.4 * (noise - 0.5)).tolist()
        _, (low, high) = metrics.recovered(gains, [0.0] * 40, gaps.tolist(), seed)
        covered += low <= 0.8 <= high
    assert 0.9 <= covered / 200 <= 0.99


# --- runner ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path):
    return data.load_json(write_json(tmp_path / "questions.json", question_rows()))


def run(tokenizer, examples, names, ratios=(0.15,), records=None, model=None, questions=None, **settings):
    records = records or RecordFile(None, {})
    settings = EvalSettings(methods=tuple(names), ratios=tuple(ratios), **settings)
    measured = Runner(model or make_llama(), tokenizer, examples, settings, records)
    return measured.run(range(len(examples)) if questions is None else questions)


def test_every_method_is_measured(word_tokenizer, examples):
    few = {"questions": [1], "forced_tokens": 4, "answer_tokens": 4}
    records = run(word_tokenizer, examples, list(METHODS), **few)
    records += run(word_tokenizer, examples, ["kv_deviation"], (0.5,), **few)
    expected = [(1, m.name, 0.15 if m.takes_ratio else m.fixed_ratio) for m in METHODS.values()]
    assert [record.key for record in records] == [*expected, (1, "kv_deviation", 0.5)]
    assert all(record.ttft_ms > 0 and 0 <= record.top1_agreement <= 1 for record in records)
    by_key = {(record.method, record.ratio): record for record in records}
    full, exact = by_key["full_prefill", 1.0], by_key["prefix_reuse", 1.0]
    assert (full.kl, full.top1_agreement, full.recomputed_pairs_share) == (0.0, 1.0, 1.0)
    assert exact.kl < 1e-6
    assert exact.recomputed_pairs_share < 1
    assert by_key["full_reuse", 0.0].kl > 1e-6
    assert by_key["kv_deviation", 0.15].recomputed_pairs_share < by_key["kv_deviation", 0.5].recomputed_pairs_share


def test_the_floor_answers_from_the_question_alone(word_tokenizer, examples):
    floor, full = run(word_tokenizer, examples, ["no_context", "full_prefill"], questions=[0], answer_tokens=8)
    model, prompt = make_llama(), data.to_prompt(word_tokenizer, examples[0], 6500)
    short = torch.tensor([prompt.prefix_ids + prompt.suffix_ids])
    forced = FullAnswer.of(model, prompt, 16).ids
    logits = [teacher_forced_logits(model, ids, forced) for ids in (prompt.input_ids, short)]
    assert floor.kl == pytest.approx(kl_divergence(*logits).mean().item(), rel=1e-3)
    assert floor.top1_agreement == top1_agreement(*logits)
    assert floor.tokens == full.tokens == len(prompt)
    assert floor.recomputed_pairs_share == pytest.approx(short.shape[1] / len(prompt))
    output = model.generate(short, max_new_tokens=8, do_sample=False)[0, short.shape[1] :]
    assert floor.answer == word_tokenizer.decode(output, skip_special_tokens=True).strip()


def test_figures_equal_those_of_plain_calls(word_tokenizer, examples):
    (record,) = run(word_tokenizer, examples, ["kv_deviation"], questions=[0])
    model, prompt = make_llama(), data.to_prompt(word_tokenizer, examples[0], 6500)
    stock = model.generate(prompt.input_ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    forced = stock[0, len(prompt) :].tolist()
    result = hfblend.blend(model, prompt, config=METHODS["kv_deviation"].config(0.15))
    full = teacher_forced_logits(model, prompt.input_ids, forced)
    blended = teacher_forced_logits(model, prompt.input_ids, forced, result.cache)
    assert record.kl == pytest.approx(kl_divergence(full, blended).mean().item(), rel=1e-3)
    assert record.top1_agreement == top1_agreement(full, blended)
    assert record.tokens == len(prompt)


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_answer_after_teacher_forcing_equals_a_fresh_blend(word_tokenizer, examples, make):
    model = make()
    (record,) = run(word_tokenizer, examples, ["full_reuse"], model=model, questions=[0], answer_tokens=12)
    prompt = data.to_prompt(word_tokenizer, examples[0], 6500)
    config = hfblend.BlendConfig(check_layers=(), recompute_ratios=())
    cache = hfblend.blend(model, prompt, config=config).cache
    output = model.generate(
        prompt.input_ids,
        attention_mask=torch.ones_like(prompt.input_ids),
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
    )
    assert record.answer == word_tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
    assert record.f1 == metrics.f1_words(record.answer, examples[0].answers[0])
    assert record.f1_ids is not None


def test_summaries_are_scored_by_rouge_l(word_tokenizer):
    pytest.importorskip("rouge_score")
    example = data.Example("", (words(3, 4),), (words(1), words(2)), data.NEWS)
    (record,) = run(word_tokenizer, [example], ["full_prefill"], answer_tokens=6)
    assert record.f1 is None
    assert record.rouge_l == pytest.approx(metrics.rouge_l(record.answer, example.answers[0]))


def test_text_from_elsewhere_is_a_passage_of_the_next_question(word_tokenizer, examples, monkeypatch):
    seen = []

    class Spy:
        name, takes_ratio, fixed_ratio, takes = "spy", False, 0.5, None

        def prompt_of(self, prompt):
            return prompt

        def blend(self, model, prompt, ratio, store, *, tokenizer, elsewhere=()):
            seen.append((ratio, elsewhere, store))
            return hfblend.blend(model, prompt, store=store)

    monkeypatch.setitem(METHODS, "spy", Spy())
    run(word_tokenizer, examples, ["spy"], (0.1, 0.2), questions=[1, 2])
    assert [ratio for ratio, _, _ in seen] == [0.5] * 4  # a warming call and a measured one, twice
    expected = [word_tokenizer(f"{examples[i].passages[0]}\n\n")["input_ids"] for i in (2, 2, 0, 0)]
    assert [list(elsewhere) for _, elsewhere, _ in seen] == expected
    assert seen[0][2] is seen[1][2] is not seen[2][2]


def test_a_corpus_is_every_passage_of_the_data_and_goes_to_methods_that_take_one(word_tokenizer, examples, monkeypatch):
    seen = []

    def blend(method, model, prompt, ratio, store, *, tokenizer, elsewhere=(), corpus=None):
        seen.append((method.name, corpus))
        return hfblend.blend(model, prompt, store=store)

    monkeypatch.setattr(type(METHODS["fusionrag"]), "blend", blend)
    run(word_tokenizer, examples, ["fusionrag", "prophetkv"], questions=[1])
    passages = [word_tokenizer(f"{text}\n\n")["input_ids"] for example in examples for text in example.passages]
    assert dict(seen) == {"fusionrag": passages, "prophetkv": None}


def test_unknown_methods_are_refused_with_the_list():
    with pytest.raises(ValueError, match=r"Unknown methods: magic\. The methods are .*full_prefill.*kv_deviation"):
        EvalSettings(methods=("full_reuse", "magic"))
    with pytest.raises(ValueError, match="at least one method, got none"):
        EvalSettings(methods=())


# --- records --------------------------------------------------------------------------------------------------------


def test_a_second_run_blends_nothing(word_tokenizer, examples, tmp_path, monkeypatch):
    file, header = tmp_path / "records.jsonl", {"model": "tiny"}
    first = run(word_tokenizer, examples, ["full_reuse", "epic"], records=RecordFile(file, header))
    assert len(file.read_text().splitlines()) == 1 + 3 * 2

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_Question", refuse)
        assert run(word_tokenizer, examples, ["full_reuse", "epic"], records=RecordFile(file, header)) == first
    more = run(word_tokenizer, examples, ["full_reuse", "epic"], (0.15, 0.5), RecordFile(file, header))
    assert [record for record in more if record.ratio != 0.5] == first
    assert len(file.read_text().splitlines()) == 1 + 3 * 3


def test_a_run_cut_off_while_it_wrote_goes_on(word_tokenizer, examples, tmp_path):
    file = tmp_path / "records.jsonl"
    whole = run(word_tokenizer, examples, ["full_reuse"], records=RecordFile(file, {}))
    file.write_text(file.read_text()[:-20])
    assert len(RecordFile(file, {}).found) == 2
    again = run(word_tokenizer, examples, ["full_reuse"], records=RecordFile(file, {}))
    assert again[:2] == whole[:2]
    assert again[2].kl == pytest.approx(whole[2].kl, rel=1e-4)
    assert len(RecordFile(file, {}).found) == 3


def test_records_of_before_string_match_get_it_from_their_answers(word_tokenizer, examples, tmp_path):
    file, arguments = tmp_path / "records.jsonl", (word_tokenizer, examples, ["full_prefill"])
    now = run(*arguments, records=RecordFile(file, {}), answer_tokens=8)
    header, *lines = file.read_text().splitlines()
    older = [{k: v for k, v in json.loads(line).items() if k != "string_match"} for line in lines]
    older[0]["answer"] = f"so: {examples[0].answers[0].upper()}!"
    write_jsonl(file, [json.loads(header), *older])
    found = run(*arguments, records=RecordFile(file, {}), answer_tokens=8)
    assert [record.string_match for record in found] == [1.0, *(record.string_match for record in now[1:])]
    assert all(record.string_match == 0.0 for record in now)


def test_records_of_another_run_are_refused(tmp_path):
    file = tmp_path / "records.jsonl"
    RecordFile(file, {"model": "one", "data": {"digest": "x"}})
    with pytest.raises(ValueError, match=r"another run \(model: 'one' there, 'two' now\)"):
        RecordFile(file, {"model": "two", "data": {"digest": "x"}})
    file.write_text("no header\n")
    with pytest.raises(ValueError, match="not a file of records"):
        RecordFile(file, {})
    file.write_text('{"header": {}}\n{"question": 1}\n')
    with pytest.raises(ValueError, match="a line that is no record"):
        RecordFile(file, {})


# --- rows, table, picture ---------------------------------------------------------------------------------------------


def record(question, method, ratio, kl, ttft_ms=10.0, **scores):
    return Record(question, method, ratio, 100, kl, 0.75, ttft_ms, 0.5, **scores)


def rows_by_hand():
    full = [record(q, "full_prefill", 1.0, 0.0, ttft_ms=20.0 + q) for q in (0, 1, 2)]
    old = [record(q, "kv_deviation", 0.1, kl) for q, kl in enumerate((0.2, 0.4, 0.6))]
    new = [record(q, "hfblend", 0.1, kl, 10.0, f1=q / 2) for q, kl in enumerate((0.1, 0.2, 0.3))]
    other = [record(q, "hfblend", 0.2, 0.1) for q in (0, 1, 2)]
    return summarize(full + old + new + other, baseline="kv_deviation")


def test_rows_by_hand():
    full, old, new = rows_by_hand()[:3]
    assert list(new)[: len(FIRST_KEYS)] == FIRST_KEYS
    assert (full["kl"], full["kl_ci95"], full["ttft_speedup"]) == (0.0, [0.0, 0.0], 1.0)
    assert (new["n"], new["kl"], new["f1"], new["ttft_ms"]) == (3, pytest.approx(0.2), 0.5, 10.0)
    assert new["kl_ci95"][0] < 0.2 < new["kl_ci95"][1]
    assert new["kl_vs_baseline"] == pytest.approx(0.5)
    assert new["kl_vs_baseline_ci95"] == pytest.approx([0.5, 0.5])
    assert (old["kl_vs_baseline"], old["f1"]) == (1.0, None)
    assert new["ttft_speedup"] == pytest.approx(2.1)  # the median of 2.0, 2.1 and 2.2


def test_a_baseline_is_compared_at_its_own_ratio():
    other = rows_by_hand()[3]  # ratio 0.2, where the baseline has only one row: that one
    assert other["kl_vs_baseline"] == pytest.approx(0.25)
    two = [record(0, "kv_deviation", ratio, 0.2) for ratio in (0.1, 0.3)] + [record(0, "full_reuse", 0.0, 0.4)]
    assert summarize(two, "kv_deviation")[2]["kl_vs_baseline"] is None
    assert summarize(two)[0]["kl_vs_baseline"] is None


def test_recovered_shares_by_hand():
    def rows(method, ratio, kls, matches):
        return [record(q, method, ratio, kl, string_match=m) for q, (kl, m) in enumerate(zip(kls, matches))]

    full, floor = rows("full_prefill", 1.0, [0.0] * 3, [1.0] * 3), rows("no_context", 0.0, [2.0, 4.0, 2.0], [0.0] * 3)
    ours = rows("hfblend", 0.1, [0.5, 1.0, 0.5], [0.5, 1.0, 0.75])
    summary = summarize(full + floor + ours)
    assert [row["string_match_recovered"] for row in summary] == [1.0, 0.0, 0.75]
    assert [row["kl_recovered"] for row in summary] == [1.0, 0.0, 0.75]
    assert summary[2]["kl_recovered_ci95"] == [0.75, 0.75]
    assert summary[2]["string_match_recovered_ci95"] == [0.5, 1.0]
    assert summary[2]["f1_recovered"] is summary[2]["f1_recovered_ci95"] is None  # not measured
    assert summary[2]["top1_agreement_recovered"] is None  # no gap
    lines = report.table({"rows": summary}).splitlines()
    assert "| match | KL recovered [95 %] | match recovered [95 %] |" in lines[0]
    assert "| 0.750 | 75% [75%, 75%] | 75% [50%, 100%] |" in lines[4]
    assert summarize(full + ours)[1]["kl_recovered"] is None  # without a floor
    fewer = summarize(full + floor[:2] + ours)[2]
    assert fewer["string_match"] == 0.75
    assert fewer["string_match_recovered"] == 0.75  # of the two questions that all have
    json.dumps(summary, allow_nan=False)


def test_a_second_picture_shows_what_answers_recover():
    pytest.importorskip("matplotlib")
    rows = [
        record(q, method, ratio, kl, f1=f1)
        for q in range(3)
        for method, ratio, kl, f1 in (("full_prefill", 1, 0, 1), ("no_context", 0, 2, 0), ("hfblend", 0.1, 0.5, 0.75))
    ]
    figure = plots.plot_quality(summarize(rows))
    figure.draw_without_rendering()
    kl, recovered = figure.axes
    assert [line.get_label() for line in recovered.lines if line.get_label()[0] != "_"] == ["no_context", "hfblend"]
    assert [list(line.get_ydata()) for line in recovered.lines] == [[0.0], [0.75]]
    assert [list(line.get_ydata()) for line in kl.lines] == [[2.0], [0.5]]
    assert "F1" in recovered.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no_context", "hfblend"]


def test_markdown_table_leaves_out_empty_columns():
    lines = report.table({"rows": rows_by_hand()}).splitlines()
    assert len(lines) == 2 + 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "F1" in lines[0]
    assert "ROUGE-L" not in lines[0]
    assert "0.2000 [" in lines[4]


def test_every_line_has_a_label_that_no_other_covers():
    pytest.importorskip("matplotlib")
    figure = plots.plot_quality(rows_by_hand())
    figure.draw_without_rendering()
    labels = figure.legends[0].get_texts()
    assert [label.get_text() for label in labels] == ["kv_deviation", "hfblend"]
    boxes = [label.get_window_extent() for label in labels]
    assert not boxes[0].overlaps(boxes[1])


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[plots\]'"):
        Outputs(plot=tmp_path / "quality.png")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(tmp_path, monkeypatch, word_tokenizer):
    """Runs `hfblend eval` on a tiny model; arguments -> outcome."""
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), word_tokenizer))
    source = write_json(tmp_path / "questions.json", question_rows())

    def invoke(*arguments, data=str(source)):
        return CliRunner().invoke(app, ["eval", "--data", data, *arguments])

    return invoke


def test_the_command_writes_every_file(evaluate, tmp_path):
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "md", "png", "jsonl")}
    outcome = evaluate(
        *("--n", "2", "--skip", "1", "--methods", "full_prefill,kv_deviation,hfblend", "--ratios", "0.1,0.3"),
        *("--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])),
        *("--records", str(files["jsonl"]), "--answer-tokens", "4"),
    )
    assert outcome.exit_code == 0, outcome.output
    results = json.loads(files["json"].read_text())
    assert [(row["method"], row["ratio"]) for row in results["rows"]] == [
        ("full_prefill", 1.0), ("kv_deviation", 0.1), ("kv_deviation", 0.3), ("hfblend", 0.1), ("hfblend", 0.3),
    ]  # fmt: skip
    assert all(list(row)[: len(FIRST_KEYS)] == FIRST_KEYS and row["n"] == 2 for row in results["rows"])
    assert (results["dtype"], results["questions"], results["baseline"]) == ("float32", [1, 3], "kv_deviation")
    assert results["rows"][1]["kl_vs_baseline"] == 1.0
    assert results["rows"][0]["f1"] is not None
    assert report.table(results) in files["md"].read_text()
    assert "| full_prefill | 1 | 2 |" in outcome.output
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert len(files["jsonl"].read_text().splitlines()) == 1 + 2 * 5


def test_the_command_refuses_the_records_of_other_settings(evaluate, tmp_path):
    arguments = ("--n", "1", "--methods", "full_reuse", "--records", str(tmp_path / "r.jsonl"))
    assert evaluate(*arguments).exit_code == 0
    outcome = evaluate(*arguments, "--max-context", "6000")
    assert outcome.exit_code == 2
    assert "holds records of another run (settings:" in " ".join(outcome.output.split())


def test_the_command_says_the_correction(evaluate, tmp_path):
    files = {name: (tmp_path / f"{name}.json", tmp_path / f"{name}.md") for name in ("offset", "none")}
    records = tmp_path / "records.jsonl"
    how = ("--n", "1", "--methods", "kv_deviation,hfblend", "--ratios", "0.3", "--answer-tokens", "0")
    for name, (json_file, markdown) in files.items():
        more = ("--records", str(records)) if name == "offset" else ()
        outcome = evaluate(*how, "--correction", name, "--json", str(json_file), "--markdown", str(markdown), *more)
        assert outcome.exit_code == 0, outcome.output
        assert f"correction {name}" in markdown.read_text()
    found = {name: json.loads(json_file.read_text()) for name, (json_file, _) in files.items()}
    assert [results["settings"]["correction"] for results in found.values()] == ["offset", "none"]
    (rule, ours), (rule_without, ours_without) = (results["rows"] for results in found.values())
    assert rule["kl"] == pytest.approx(rule_without["kl"])  # CacheBlend's, as it is
    assert ours["kl"] != pytest.approx(ours_without["kl"], rel=1e-2)
    outcome = evaluate(*how, "--correction", "none", "--records", str(records))
    assert outcome.exit_code == 2
    assert "holds records of another run (settings:" in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--correction", "ofset"), "Did you mean 'offset'"),
        (("--correction", "offset", "--methods", "kv_deviation,epic"), "None of kv_deviation, epic takes a correction"),
        (("--methods", "magic"), "Unknown methods: magic"),
        (("--ratios", "0.1,1.5"), "shares in [0, 1], got [1.5]"),
        (("--ratios", "much"), "'much'"),
        (("--skip", "3"), "No question is left"),
        (("--baseline", "epic"), "'epic' is not among the methods"),
        (("--json", "/missing/out.json"), "does not exist"),
        (("--dtype", "int8"), "got 'int8'"),
        (("--max-context", "9"), "more than the 9 allowed"),
    ],
)
def test_bad_input_is_said_without_a_stack_trace(evaluate, arguments, message):
    outcome = evaluate(*arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output


def test_missing_package_ends_the_command_with_1(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    outcome = evaluate(data="musique")
    assert outcome.exit_code == 1
    assert "hfblend[eval]" in outcome.output
