"""Every command says what it does before it does it, in a terminal; elsewhere, and afterwards, nothing is left."""

from __future__ import annotations

import io
import json
import os
import re
import select
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from helpers import config, make_llama, make_prompt
from transformers.utils import logging as transformers_logging

import hfblend
from hfblend.cli import app
from hfblend.demo import model as demo_model
from hfblend.lab.settings import EvalSettings
from hfblend.support import registry
from hfblend.trace import progress
from hfblend.trace.progress import Line, heard, told

if not hasattr(os, "openpty"):
    pytest.skip("needs pseudo terminals", allow_module_level=True)


class Terminal:
    """A pseudo terminal in place of stderr."""

    def __init__(self) -> None:
        self.end, other = os.openpty()
        self.file = os.fdopen(other, "w", encoding="utf-8")
        self._shown = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while self.end is not None:
            if select.select([self.end], [], [], 0.1)[0]:
                self._shown += os.read(self.end, 65536).decode("utf-8", "replace")

    def shown(self, wanted: str) -> bool:
        """Whether the terminal has got a text; what was written is there at once, or never."""
        for _ in range(100):
            if wanted in self.text():
                return True
            threading.Event().wait(0.02)
        return False

    def text(self) -> str:
        """All that was written, without what moves the cursor or colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._shown)


@pytest.fixture
def terminal(monkeypatch):
    there = Terminal()
    # pytest replaces `sys.stderr` again as a test begins, so tests take it.
    there.take = lambda: monkeypatch.setattr(sys, "stderr", there.file)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    yield there
    there.end = None


# --- commands ---------------------------------------------------------------------------------------------------------

PIECES = {"passages": ["w20 w21 w22 " * 4, "w30 w31 " * 5], "question": "w50 w51"}
QUESTION = {"question": "w50", "answers": ["w22"], "ctxs": [{"title": "w1", "text": one} for one in PIECES["passages"]]}
COMMANDS = {
    "demo": ["demo"],
    "ask": ["ask", "notes", "w50 w51", "--max-new-tokens", "3"],
    "run": ["run", "prompt.json", "--max-new-tokens", "3", "--json", "-"],
    "explain": ["explain", "prompt.json", "--max-new-tokens", "3", "--json", "-"],
    "verify": ["verify", "prompt.json", "--num-tokens", "3", "--json", "-"],
    "precompute": ["precompute", "--corpus", "corpus.jsonl", "--store", "chunks", "--json"],
    "profile": ["profile", "--tokens", "600", "--json"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files of the commands, where they run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFBLEND_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "one.md").write_text("# w10\n\n" + "w11 w12 w13 " * 9)
    (tmp_path / "prompt.json").write_text(json.dumps(PIECES))
    (tmp_path / "corpus.jsonl").write_text('"w7 w8 w9 w10"\n"w11 w12 w13"\n')
    return tmp_path


def watch(monkeypatch, module, name, terminal, wanted, found, result=None):
    """Notes, when a function is called, whether the terminal shows a text."""
    own = getattr(module, name)

    def watched(*args, **kwargs):
        found[name] = found.get(name, True) and terminal.shown(wanted)
        return own(*args, **kwargs) if result is None else result(*args, **kwargs)

    monkeypatch.setattr(module, name, watched)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_speaks_before_it_works(command, folder, terminal, monkeypatch, word_tokenizer, capsys):
    terminal.take()
    if command == "ask":
        pytest.importorskip("bm25s")
    found: dict[str, bool] = {}
    texts = {"import_module": "Starting PyTorch", "stock_steps": "Testing once whether LlamaForCausalLM"}
    from hfblend.cli import common

    watch(monkeypatch, common, "import_module", terminal, texts["import_module"], found)
    watch(monkeypatch, registry, "stock_steps", terminal, texts["stock_steps"], found)
    if command != "profile":  # its chunks are made up
        watch(monkeypatch, registry, "prefill_together", terminal, "Computing the KV of", found)
    monkeypatch.setattr(demo_model, "load", lambda *_: (make_llama(), word_tokenizer))
    app(COMMANDS[command], standalone_mode=False)
    assert all(found.values()), (found, terminal.text())
    assert set(found) >= set(texts)
    said = capsys.readouterr().out
    assert "Testing once" not in said
    if "--json" in COMMANDS[command]:
        assert json.loads(said)
    assert progress._rows is None


def test_measuring_says_how_far_it_is(folder, terminal, monkeypatch, word_tokenizer):
    terminal.take()
    from hfblend.lab.bench import runner as bench
    from hfblend.lab.eval import runner as evaluation

    found: dict[str, bool] = {}
    (folder / "questions.json").write_text(json.dumps([QUESTION]))
    count = len(EvalSettings(methods=("full_reuse",), ratios=(0.1,)).cases())
    monkeypatch.setattr(demo_model, "load", lambda *_: (make_llama(), word_tokenizer))
    stop = lambda *_, **__: (_ for _ in ()).throw(ValueError("enough"))  # noqa: E731
    for module, wanted, command in (
        (evaluation, f"0/{count}", ["eval", "--data", "questions.json", "--methods", "full_reuse", "--ratios", "0.1"]),
        (bench, "Measuring …", ["bench", "--shape", "tiny", "--device", "cpu", "--tokens", "64"]),
    ):
        watch(monkeypatch, module, "run", terminal, wanted, found, stop)
        assert app(command, standalone_mode=False) == 2
        assert found.pop("run"), terminal.text()
        assert progress._rows is None  # an error leaves no line either


def test_the_first_answer_of_the_demo_comes_before_passages_are_stored(monkeypatch, word_tokenizer, capsys):
    """Full prefill's answer needs no stored passage; the others follow, then tables."""
    happened = []
    monkeypatch.setattr(demo_model, "load", lambda *_: (make_llama(), word_tokenizer))
    own = registry.prefill_together

    def prefilled(*args):
        happened.append(capsys.readouterr().out)
        return own(*args)

    monkeypatch.setattr(registry, "prefill_together", prefilled)
    app(["demo"], standalone_mode=False)
    assert "full prefill" in happened[0]
    assert "full reuse" not in happened[0]
    rest = capsys.readouterr().out
    assert rest.index("blend 0.05") < rest.index("TTFT")


# --- the library ------------------------------------------------------------------------------------------------------


def test_a_first_call_says_which_chunks_it_computes_and_a_second_nothing():
    model, prompt, said = make_llama(), make_prompt(), []
    with heard(lambda line: said.append(str(line))), hfblend.patch(model, config()) as blender:
        assert said[0].startswith("Testing once whether LlamaForCausalLM can be blended: 0 of 4")
        assert said[-1].endswith("3 of 4 …")
        for is_first in (True, False):
            said.clear()
            model.generate(**prompt.inputs(), max_new_tokens=1)
            assert ("Computing chunks that are not stored: 3 of 3 …" in said) == is_first
            assert bool(said) == is_first
        assert blender.trace.hits == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_no_line(terminal, monkeypatch, error):
    terminal.take()
    model, prompt = make_llama(), make_prompt()
    with hfblend.patch(model, config()):
        expected = model.generate(**prompt.inputs(), max_new_tokens=3, blend_config=hfblend.BlendConfig(enabled=False))

        def fail(*_):
            raise error("enough")

        monkeypatch.setattr(registry, "prefill_together", fail)
        with pytest.raises(error) as kept:
            model.generate(**prompt.inputs(), max_new_tokens=3)
        assert kept.traceback  # as `sys.last_traceback` holds it at a prompt of Python
        assert progress._rows is None
        again = model.generate(**prompt.inputs(), max_new_tokens=3, blend_config=hfblend.BlendConfig(enabled=False))
        assert again.tolist() == expected.tolist()


# --- lines ------------------------------------------------------------------------------------------------------------


def test_lines_stand_below_each_other_and_are_erased(terminal):
    terminal.take()
    with told("Outer [bold]", total=2) as outer:
        with told("Inner \x1b[31m"):
            assert len(progress._rows.tasks) == 2
        outer.advance()
        outer.say("Other")
        assert [(task.description, task.completed) for task in progress._rows.tasks] == [("Other", 1)]
        outer.stop()
        assert progress._rows is None
        outer.advance()
    assert terminal.shown("Outer [bold] …")
    assert terminal.shown("Inner ␛[31m …")
    assert terminal.shown("0/2")


def test_nothing_is_shown_elsewhere_or_where_bars_are_turned_off(terminal, monkeypatch):
    terminal.take()
    transformers_logging.disable_progress_bar()
    try:
        with told("Hidden") as line:
            assert type(line) is Line
    finally:
        transformers_logging.enable_progress_bar()
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with told("Hidden") as line:
            assert type(line) is Line
            line.advance()
    assert stream is None
    assert "Hidden" not in terminal.text()


@pytest.fixture
def notebook(monkeypatch):
    """IPython in a notebook; what its outputs show, in order."""
    outputs, is_shown = [], threading.Event()

    def display(bundle, *, raw, display_id):
        outputs.append(bundle["text/plain"])
        is_shown.set()
        return SimpleNamespace(update=lambda bundle, raw: outputs.append(bundle["text/plain"]))

    shell, displaying = ModuleType("IPython"), ModuleType("IPython.display")
    shell.get_ipython, displaying.display = lambda: SimpleNamespace(kernel=object()), display
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", displaying)
    return outputs, is_shown


def test_a_notebook_shows_what_takes_long_and_empties_it(notebook, monkeypatch, capsys):
    outputs, is_shown = notebook
    with told("Short", total=1) as line:
        line.advance()
    assert outputs == []
    monkeypatch.setattr(progress, "NOTEBOOK_S", 0)
    with told("Long", total=2) as line:
        assert is_shown.wait(30)
        line.advance()
    assert outputs == ["Long: 0 of 2 …", "Long: 1 of 2 …", ""]
    assert capsys.readouterr() == ("", "")
