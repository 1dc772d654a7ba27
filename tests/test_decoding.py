"""Decoding by a graph, run here without one: each replay runs what was recorded, through the state and the kernels."""

from __future__ import annotations

import functools
import logging
import sys
from unittest import mock

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_mistral, make_prompt
from transformers import DynamicCache, LogitsProcessor
from transformers.cache_utils import DynamicLayer

import hfblend
from hfblend.generate.hand_over import GrowingLayer, growing_layers
from hfblend.gpu import decoding
from hfblend.kv.rows import empty_kv
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


PLAIN = config(0.3, cuda_graphs=False)


def answers(model, prompt, **settings):
    """Of plain decoding and of graphs, by a patched model."""
    return [generate(model, prompt.inputs(), **settings, **given) for given in ({"blend_config": PLAIN}, {})]


def same(graphed, plain):
    assert torch.equal(graphed.sequences, plain.sequences)
    assert largest_difference(graphed, plain) <= 1e-4
    for ours, theirs in zip(graphed[CACHE].layers, plain[CACHE].layers):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)


make_short = functools.partial(make_llama, layers=2)  # the interpreter runs kernels of every layer
MORE = {"llama-mqa": lambda: make_short(heads="mqa"), "mistral-full": lambda: make_mistral(None, layers=2)}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_short, id="llama-gqa"),
        *(pytest.param(make, id=name, marks=pytest.mark.thorough) for name, make in MORE.items()),
    ],
)
def test_answers_are_those_of_plain_decoding(make, graphs):
    """Every step but the first is replayed, for a prompt of another length too, and a next turn goes on from there."""
    model = make()
    with hfblend.patch(model, config=config(0.3)):
        for prompt, replayed in ((PROMPT, 2), (SHORTER, 5)):
            plain, graphed = answers(model, prompt, max_new_tokens=4)
            same(graphed, plain)
            assert (graphs.recorded, graphs.replayed) == (1, replayed)
        more = PROMPT.input_ids[:, :5]
        turns = [
            {"inputs": {"input_ids": torch.cat([one.sequences, more], 1)}, CACHE: one[CACHE], "max_new_tokens": 3}
            for one in (graphed, plain)
        ]
        same(generate(model, **turns[0]), generate(model, **turns[1], blend_config=PLAIN))
        assert (graphs.recorded, graphs.replayed) == (1, 7)


def test_a_graph_is_recorded_once_and_given_up_with_the_patch_or_with_other_weights(graphs):
    model = make_short()
    with hfblend.patch(model, config=config(0.3)):
        for _ in range(2):
            generate(model, PROMPT.inputs(), max_new_tokens=3)
        assert (graphs.recorded, graphs.replayed) == (1, 3)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        plain, graphed = answers(model, PROMPT, max_new_tokens=3)
        same(graphed, plain)
        assert graphs.recorded == 2
        held = model_of(model).decoding
        assert held._graph is not None
    assert held._graph is None


def test_a_next_turn_looks_at_the_model_again(graphs):
    """At its weights, which may be others now, and at settings that ask for more than hidden states."""
    model = make_short()
    with hfblend.patch(model, config=config(0.3)):
        answer = generate(model, SHORTER.inputs(), max_new_tokens=3)
        weight = torch.nn.Parameter(model.lm_head.weight * 1, requires_grad=False)
        model.model.embed_tokens.weight = model.lm_head.weight = weight
        for asked, replayed in ((False, 3), (True, 3)):
            model.config.output_hidden_states = asked
            given = {"inputs": {"input_ids": answer.sequences}, CACHE: answer[CACHE]}
            answer = generate(model, **given, max_new_tokens=2)  # one for the last token of the turn before
            assert (graphs.recorded, graphs.replayed) == (2, replayed)


def test_a_full_buffer_is_replaced_by_a_plain_step(graphs, monkeypatch):
    for place in ("algorithm", "reuse"):
        monkeypatch.setattr(sys.modules[f"hfblend.blend.{place}"], "ROOM", 2)
    model = make_short()
    with hfblend.patch(model, config=config(0.3)):
        same(*answers(model, PROMPT, max_new_tokens=6))
    assert (graphs.recorded, graphs.replayed) == (1, 3)  # not the first, nor the third, which moves the rows


class Seen(LogitsProcessor):
    """Puts a hook on a layer after the second token."""

    def __init__(self, model):
        self.model, self.layers = model, []

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == len(PROMPT) + 2:
            self.model.model.layers[1].register_forward_hook(lambda *_: self.layers.append(1))
        return scores


def test_a_hook_that_comes_midway_sees_the_steps_after_it(graphs):
    model = make_short()
    seen = Seen(model)
    with hfblend.patch(model, config=config(0.3)):
        generate(model, PROMPT.inputs(), max_new_tokens=5, logits_processor=[seen])
    assert graphs.replayed == 1
    assert len(seen.layers) == 2


STOCK = {
    "beams": {"num_beams": 2},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "setting": {"blend_config": PLAIN},
    "stock": {"blend_config": config(0.3, enabled=False)},
    "custom": {"custom_generate": lambda model, *args, **kwargs: model._sample(*args, **kwargs)},
}


@pytest.mark.parametrize("name", STOCK)
def test_other_calls_decode_as_stock_does(name, graphs):
    model = make_short()
    with hfblend.patch(model, config=config(0.3)):
        for _ in range(2):
            generate(model, PROMPT.inputs(), max_new_tokens=3, **STOCK[name])
    assert graphs.recorded == 0


def test_batches_and_padding_decode_as_stock_does(graphs):
    model = make_short()
    batch = hfblend.Prompt.batch([PROMPT, SHORTER], pad_token_id=0)
    with hfblend.patch(model, config=config(0.3)) as blender:
        for _ in range(2):
            generate(model, batch, max_new_tokens=3)
            padded = {name: value[1:] for name, value in batch.items()}
            generate(model, padded, max_new_tokens=3)
        assert blender.trace.blended
    assert graphs.recorded == 0


@pytest.mark.parametrize("make", [make_mistral, pytest.param(lambda: compiled(make_short()), id="compiled")])
def test_other_models_decode_as_stock_does(make, graphs):
    """One whose cache keeps a window, and one whose layers the user has compiled."""
    model = make()
    with hfblend.patch(model, config=config(0.3)) as blender:
        for _ in range(2):
            generate(model, PROMPT.inputs(), max_new_tokens=3)
        assert blender.trace.blended
    assert graphs.recorded == 0


def compiled(model):
    for layer in model.model.layers:
        layer._compiled_call_impl = layer._call_impl
    return model


def test_what_cannot_be_recorded_is_said_once(graphs, monkeypatch, caplog):
    def refuse(*args):
        graphs.recorded += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "recorded", refuse)
    model = make_short()
    with caplog.at_level(logging.WARNING), hfblend.patch(model, config=config(0.3)):
        same(*answers(model, PROMPT, max_new_tokens=5))
    assert graphs.recorded == 1
    assert caplog.text.count("cannot be recorded") == 1
    assert "not permitted" in caplog.text


def test_rows_are_a_kernel_s_to_write_only_while_nothing_else_holds_them():
    kv = empty_kv((torch.zeros(1, 2, 1, 4),) * 2, 5)
    layer = GrowingLayer.adopt(kv, 3)
    assert layer.address == kv[0].data_ptr()
    layer.show_next_row()
    assert layer.get_seq_length() == 4
    layer.crop(-1)
    assert layer.address is None  # someone may have seen the row that would be written
    full = GrowingLayer.adopt(kv, 5)
    apart = GrowingLayer.adopt((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)), 3)
    with torch.inference_mode():
        made_inside = GrowingLayer.adopt(empty_kv((torch.zeros(1, 2, 1, 4),) * 2, 5), 3)
        assert made_inside.address is not None
    assert full.address is apart.address is made_inside.address is GrowingLayer().address is None


def test_growing_layers_are_those_of_plain_caches():
    cache = DynamicCache()
    cache.layers.append(GrowingLayer())
    assert growing_layers(cache) == cache.layers
    cache.layers.append(DynamicLayer())
    assert growing_layers(cache) == growing_layers(None) == growing_layers(DynamicCache()) == []
