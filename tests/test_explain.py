"""`hfblend explain` and `hfblend run`: prompts from files and standard input, the report, what users get wrong."""

from __future__ import annotations

import io
import json
import re

import pytest
from helpers import make_llama
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.cli.prompts import read_prompts
from hfblend.demo import model as demo_model

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PIECES = {
    "prefix": "w10 w11 w12 ",
    "chunks": [
        "w20 w21 <script>alert(1)</script> w22 " * 4,
        "w30 w31 \x1b[31m w32 " * 5,
        {"title": "w40", "text": "w41 " * 9},
    ],
    "question": "w50 w51 w52",
}  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path, word_tokenizer):
    """Runs a command on a prompt file, with a tiny model."""
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), word_tokenizer))
    monkeypatch.setenv("COLUMNS", "120")

    def run(command, *options, prompt=PIECES, stdin=None):
        file = tmp_path / "prompt.json"
        file.write_text(prompt if isinstance(prompt, str) else json.dumps(prompt), encoding="utf-8")
        source = "-" if stdin is not None else str(file)
        return CliRunner().invoke(app, [command, source, "--max-new-tokens", "5", *map(str, options)], input=stdin)

    return run


def test_explain_shows_and_writes_the_report(run, tmp_path):
    result = run("explain", "--html", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert "3 hits, 0 misses, 1 exact" in result.stdout
    assert "full prefill" in result.stdout
    assert "how far apart: KL" in result.stdout.replace("\n", " ")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Layer × token" in page
    assert "<script" not in page
    assert "blended</span>" in page
    assert "Wrote" in result.stderr


def test_explain_as_json(run):
    result = run("explain", "--json", "-", "--ratio", 0.5)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["trace"]["level"] == "full"
    assert found["trace"]["hits"] == 3
    assert found["chunks_prefilled_before"] is True
    assert any("stored just before this call" in note for note in found["trace"]["notes"])
    assert found["verification"]["kl"] >= 0
    assert isinstance(found["answer"], str)
    assert isinstance(found["full_prefill_answer"], str)


def test_explain_says_what_changed_the_answer(run, tmp_path):
    result = run("explain", "--blame", 60, "--ratio", 0.05, "--html", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "Why did the answer change?" in said
    assert re.search(r"The answers part at word \d", said)
    assert re.search(r"chunk 1 (✓ yes|no) ", said)
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.index("Why did the answer change?") < page.index("Layer × token")
    assert "<script" not in page
    found = json.loads(run("explain", "--blame", 60, "--ratio", 0.05, "--json", "-").stdout)["blame"]
    assert found["num_blends"] > 4
    assert {one["part"] for one in found["chunks"]} == {"chunk 1", "chunk 2"}
    assert run("explain", "--blame", -1).exit_code == 2


def test_explain_at_ratio_1_gives_full_prefills_answer(run):
    found = json.loads(run("explain", "--json", "-", "--ratio", 1).stdout)
    assert found["answer"] == found["full_prefill_answer"]
    assert found["verification"]["kl"] < 1e-6


def test_explain_of_a_store_shows_what_it_held(run, tmp_path):
    first, second = (json.loads(run("explain", "--json", "-", "--store", tmp_path / "kv").stdout) for _ in range(2))
    assert first["trace"]["misses"] == 3
    assert second["trace"]["hits"] == 3
    assert second["chunks_prefilled_before"] is False
    assert first["trace"]["notes"] == second["trace"]["notes"] == []
    assert first["answer"] == second["answer"]


@pytest.mark.parametrize(("command", "show"), [("explain", ()), ("run", ("--trace",))])
def test_the_correction_is_an_option(run, command, show):
    def trace(*options):
        found = json.loads(run(command, "--json", "-", "--ratio", 0.5, *options).stdout)
        return (found[0] if isinstance(found, list) else found)["trace"]

    offset, none, default = trace("--correction", "offset"), trace("--correction", "none"), trace()
    assert offset["settings"]["correction"] == "offset"
    assert none["settings"]["correction"] is none["offsets"] is None
    assert default["settings"]["correction"] == hfblend.BlendConfig().correction
    shown = {name: run(command, *show, "--correction", name, "--ratio", 0.5).stdout for name in ("offset", "none")}
    assert "added to K · V" in shown["offset"]
    assert "added to K · V" not in shown["none"]
    if command == "explain":  # the others keep a summary
        assert offset["offsets"][2][0][3] > 0
        assert offset["offsets"][2][0][:2] == [None, None]  # prefix and first chunk are exact


def test_prompts_from_standard_input(run):
    found = json.loads(run("explain", "--json", "-", stdin=json.dumps(PIECES)).stdout)
    assert found["trace"]["num_tokens"] == json.loads(run("explain", "--json", "-").stdout)["trace"]["num_tokens"]


def test_run_answers_every_prompt(run):
    result = run("run", "--json", "-", prompt=[PIECES, {**PIECES, "chunks": PIECES["chunks"][::-1]}])
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["trace"]["misses"] == 3
    assert second["trace"]["hits"] == 3
    assert first["trace"]["level"] == "summary"
    plain = run("run")
    assert plain.exit_code == 0
    assert plain.stdout.strip() == first["answer"].strip()


def test_run_shows_the_trace_if_asked(run):
    result = run("run", "--trace")
    assert "chunk 2" in result.stdout
    assert "highest scores first" in result.stdout
    assert "\x1b" not in re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
    assert "chunk 2" not in run("run").stdout


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no prompt"),
        ('{"chunks": ["w1"]}', "needs"),
        ('{"chunks": "w1", "question": "w2"}', "lists of texts"),
        ("[3]", "needs"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "run"])
def test_prompts_that_will_not_do_are_explained(run, command, prompt, said):
    result = run(command, prompt=prompt)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_other_mistakes_are_explained(run, tmp_path, monkeypatch):
    for options, said in (
        (("--html", tmp_path / "none" / "out.html"), "does not exist"),
        (("--html", tmp_path), "is a folder"),
        (("--store", __file__), "a store is a folder"),
        (("--selection", "best"), "selection must be one of"),
        (("--correction", "ofset"), "correction must be one of ('offset',), None"),
        (("--ratio", 3), "--ratio"),
        (("--dtype", "int7"), "--dtype"),
    ):
        result = run("explain", *options)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
    assert "takes one prompt" in run("explain", prompt=[PIECES, PIECES]).stderr
    missing = CliRunner().invoke(app, ["explain", str(tmp_path / "none.json")])
    assert missing.exit_code == 2
    assert "cannot be read" in " ".join(missing.stderr.split())

    def fail(*args):
        raise OSError("no such model [bold]")

    monkeypatch.setattr(demo_model, "load", fail)
    result = run("run")
    assert result.exit_code == 1
    assert "no such model [bold]" in result.stderr


def test_a_question_about_passages(monkeypatch, word_tokenizer):
    row = {"question": "w1 w2", "ctxs": [{"title": "w3", "text": "w4 w5"}, {"title": "w6", "text": "w7"}]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps([row])))
    (prompt,) = read_prompts("-", word_tokenizer)
    assert len(prompt.chunk_spans) == 2
