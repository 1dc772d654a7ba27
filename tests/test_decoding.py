"""Decoding by a graph, run here without one: each replay runs what was recorded, through the state and the kernels."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from helpers import MODELS, config, generate, largest_difference, make_llama, make_prompt

import hfblend
from hfblend.generate.hand_over import GrowingLayer, growing_layers
from hfblend.gpu import decoding
from hfblend.model.hf_model import CACHE, HFModel
from hfblend.support.registry import model_of

pytest.importorskip("triton")

PROMPT = make_prompt(sizes=(20, 31, 13), prefix=9, suffix=11)
SHORTER = make_prompt(sizes=(20, 17), prefix=9, suffix=5, seed=2)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests/test_gpu.py records real graphs")


class Graphs:
    """Stands in for CUDA graphs: a replay runs the forward again and writes its output to the recorded one's place."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def record(self, hf_model, pool, run):
        self.recorded += 1
        output = run(lambda layer_idx: None)

        def replay():
            self.replayed += 1
            output.last_hidden_state.copy_(run(lambda layer_idx: None).last_hidden_state)

        return output, [(mock.Mock(replay=replay), [])]


@pytest.fixture
def graphs(monkeypatch):
    """A machine on which decoding can be recorded."""
    graphs = Graphs()
    monkeypatch.setattr(decoding, "recorded", graphs.record)
    monkeypatch.setattr(decoding, "can_record", lambda hf_model: not hf_model.has_hooks)
    monkeypatch.setattr(HFModel, "takes_kernels", True)
    monkeypatch.setattr("hfblend.support.registry.loaders_of", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    return graphs


def settings(**changed):
    return config(0.3, correction=None, **changed)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_plain_decoding(name, graphs):
    """Every step but the first is replayed, for prompts of other lengths too; the cache is the one of plain steps."""
    model, store = MODELS[name](), hfblend.MemoryStore()
    for prompt in (PROMPT, SHORTER, PROMPT):
        with hfblend.patch(model, config=settings(cuda_graphs=False), store=store):
            plain = generate(model, prompt.inputs())
        with hfblend.patch(model, config=settings(), store=store):
            before = graphs.replayed
            graphed = generate(model, prompt.inputs())
        expected = 0 if name == "mistral-window" else 6  # its cache is of another kind
        assert graphs.replayed - before == expected
        assert torch.equal(graphed.sequences, plain.sequences)
        assert largest_difference(graphed, plain) <= 1e-4
        for ours, theirs in zip(graphed[CACHE].layers, plain[CACHE].layers):
            assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
            assert torch.allclose(ours.values, theirs.values, atol=1e-5)
