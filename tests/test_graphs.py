"""What runs inside a CUDA graph, run here without one: the same forwards, cache and kernels, found through a state."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import MODELS, config, make_prompt

import hfblend
from hfblend.attention.record import AttentionRecord
from hfblend.blend.model import Pass
from hfblend.generate.blending import Blending
from hfblend.gpu.graphs import GraphCache, PassGraphs, _rounded
from hfblend.kernels.reference import mask_of
from hfblend.kv.rows import RowLayout, rows_behind
from hfblend.locks import ForwardLock
from hfblend.model.passes import run_rows
from hfblend.support.registry import model_of
from hfblend.util import StopForward

pytest.importorskip("triton")
from hfblend.kernels.state import State

PROMPT = make_prompt(sizes=(20, 31, 13), prefix=9, suffix=11)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests/test_gpu.py records real graphs")


def blending(model, **settings):
    """A blended prompt's state, and its reused KV once more."""
    hf_model, store = model_of(model), hfblend.MemoryStore()
    state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(**settings))
    with torch.no_grad():
        output = state.run(hf_model.decoder_forward)
        again = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(**settings))
        blend = again.stopped_at("realigned", hf_model.decoder_forward)
        return hf_model, state, output, blend.reused, blend.reuse


def state_of(hf_model, buffers, live, received=0, mask=0):
    rows = [rows_behind(buffers[i]) for i in range(hf_model.num_layers)]
    numbers = torch.tensor([len(PROMPT), live, received, mask, *(r.data_ptr() for r in rows)])
    return State(numbers, hf_model.layouts)


def padded(hf_model, one):
    return PassGraphs(hf_model)._padded(one), len(one.rows)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
@torch.no_grad()
def test_a_recompute_pass_through_a_state(name):
    model = MODELS[name]()
    hf_model, done, output, reused, _ = blending(model, ratio=0.3, selection="chunk_start")
    rows = torch.cat([done.trace.selected_idx, done.trace.fresh_idx]).sort().values
    one = Pass(PROMPT.input_ids[:, rows], rows, rows.int(), len(PROMPT), num_read=1)
    one, live = padded(hf_model, one)
    assert len(one.rows) == _rounded(live) > live
    buffers = {i: reused.layer(i) for i in range(hf_model.num_layers)}
    state = state_of(hf_model, buffers, live)
    got, _ = hf_model.lock.exclusive(
        run_rows, hf_model, hf_model.decoder_forward, one, GraphCache(hf_model.num_layers, one.rows, state, None), state
    )
    assert got.last_hidden_state.shape[1] == 1
    assert torch.allclose(got.last_hidden_state[:, -1], output.last_hidden_state[:, -1], atol=1e-5)
    for layer, kv in buffers.items():
        for ours, theirs in zip(kv, done.buffers[layer]):
            assert torch.allclose(ours[:, :, : len(PROMPT)], theirs[:, :, : len(PROMPT)], atol=1e-5)


@torch.no_grad()
def test_a_score_pass_through_a_state():
    """Gaps, which have no KV yet, are hidden; what the suffix gives is what the pass without a state found."""
    model = MODELS["llama-gqa"]()
    hf_model, done, _, reused, reuse = blending(model, ratio=0.3, selection="suffix_attention")
    buffers = {i: reused.layer(i) for i in range(hf_model.num_layers)}
    for buffer in (b for kv in buffers.values() for b in kv):
        buffer[:, :, reuse.unread_idx] = 0
    record = AttentionRecord(range(hf_model.num_layers // 3, hf_model.num_layers))
    rows, hidden = reuse.suffix_idx, reuse.unread_idx
    assert len(hidden)
    one = Pass(PROMPT.input_ids[:, rows], rows, rows, len(PROMPT), stop_at=3, hidden=hidden, record=record)
    one, live = padded(hf_model, one)
    received = torch.full((3, hf_model.config.num_attention_heads, len(PROMPT)), torch.nan)
    mask = mask_of(hidden, len(PROMPT))
    state = state_of(hf_model, buffers, live, received.data_ptr(), mask.data_ptr())
    hf_model.lock.exclusive(
        run_rows, hf_model, hf_model.decoder_forward, one, GraphCache(hf_model.num_layers, one.rows, state, None), state
    )
    assert torch.allclose(received.mean((0, 1))[reuse.candidate_idx], done.trace.scores, atol=1e-6)
    assert not received[:, :, hidden].any()


def test_a_pass_resumed_behind_the_check_layer_through_a_state():
    model = MODELS["llama-gqa"]()
    with torch.no_grad():
        hf_model, done, output, reused, _ = blending(model, ratio=0.3, selection="kv_deviation", check_layers=(2,))
        rows = torch.cat([done.trace.selected_idx, done.trace.fresh_idx]).sort().values
        one = Pass(
            PROMPT.input_ids[:, rows], rows, rows.int(), len(PROMPT), num_read=1,
            resume_at=2, resume_with=done.blend.entered.of_rows(rows),
        )  # fmt: skip
        one, live = padded(hf_model, one)
        buffers = {i: done.buffers[i] if i <= 2 else reused.layer(i) for i in range(hf_model.num_layers)}
        state = state_of(hf_model, buffers, live)
        got, _ = hf_model.lock.exclusive(
            run_rows,
            hf_model,
            hf_model.decoder_forward,
            one,
            GraphCache(hf_model.num_layers, one.rows, state, None),
            state,
        )
    assert torch.allclose(got.last_hidden_state[:, -1], output.last_hidden_state[:, -1], atol=1e-5)


def test_only_plain_forwards_are_recorded():
    model = MODELS["llama-gqa"]()
    hf_model = model_of(model)
    graphs, rows = PassGraphs(hf_model), torch.arange(3)
    one = Pass(rows[None], rows, rows, 9, num_read=1)
    plain = functools.partial(hf_model.decoder_forward, use_cache=True, output_attentions=None)
    assert graphs._form(plain, one) == graphs._form(plain, Pass(rows[None, :2], rows[:2], rows[:2], 7, num_read=1))
    assert graphs._form(hf_model.last_logits, one) != graphs._form(plain, one)
    for other in (
        lambda **kwargs: None,
        functools.partial(hf_model.decoder_forward, output_hidden_states=True),
        functools.partial(hf_model.decoder_forward, inputs_embeds=torch.zeros(1)),
    ):
        assert graphs._form(other, one) is None
    many = torch.arange(5000)
    assert graphs._form(plain, Pass(many[None], many, many, 5000)) is None
    assert graphs._form(plain, Pass(rows[None], rows, rows, 9, hidden=rows)) != graphs._form(plain, one)
    assert graphs.run(plain, one, {}, lambda layers: None) == (False, None)  # no GPU


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (16, 16), (130, 160), (826, 832), (2413, 2432)])
def test_sizes_are_rounded_up_a_little(rows, size):
    assert _rounded(rows) == size


def test_who_runs_a_pass_may_run_another_inside_it():
    lock = ForwardLock()
    assert lock.exclusive(lock.exclusive, lock.shared, lambda: 1) == lock.shared(lambda: 1) == 1
    assert lock._claims == []


def test_stop_forward_ends_a_pass_at_its_layer():
    model = MODELS["llama-gqa"]()
    hf_model = model_of(model)
    cache = GraphCache.__new__(GraphCache)
    cache.rows, cache.stop_at = torch.arange(5), 3
    cache.take_last(2)
    assert (cache.rows.tolist(), cache.stop_at) == ([3, 4], None)
    assert issubclass(StopForward, Exception)
    assert hf_model.layouts[0] == RowLayout(2, 16, 2, 16)
