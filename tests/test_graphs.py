"""What runs inside a CUDA graph, run here without one: the same forwards, cache and kernels, found through a state."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from helpers import MODELS, config, make_prompt, shared

import hfblend
from hfblend.attention.record import AttentionRecord
from hfblend.blend.caches import BlendingCache
from hfblend.blend.model import Pass
from hfblend.generate.blending import Blending
from hfblend.gpu.correction import Offsets, in_graph
from hfblend.gpu.graphs import PassGraphs, _rounded
from hfblend.gpu.recording import GraphCache
from hfblend.kernels.reference import mask_of
from hfblend.kv.rows import RowLayout, rows_behind
from hfblend.locks import ForwardLock
from hfblend.model.passes import run_rows
from hfblend.support.registry import model_of
from hfblend.trace.observer import Observer
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


def state_of(hf_model, buffers, live, received=0, mask=0, plan=()):
    rows = [rows_behind(buffers[i]) for i in range(hf_model.num_layers)]
    numbers = torch.tensor([len(PROMPT), live, received, mask, *(r.data_ptr() for r in rows), *plan])
    return State(numbers, hf_model.layouts)


@pytest.fixture
def one_split(monkeypatch):
    """Keys are not split among programs, as other tests show they may be: a third of the interpreter's work less."""
    monkeypatch.setattr("hfblend.kernels.by_position._PROGRAMS", 1)


def padded(hf_model, one):
    return PassGraphs(hf_model)._padded(one), len(one.rows)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
@torch.no_grad()
def test_a_recompute_pass_through_a_state(name):
    model = MODELS[name]()
    hf_model, done, output, reused, _ = blending(model, ratio=0.3, selection="chunk_start", correction=None)
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


def offsets_of(hf_model, reuse, observer=None):
    """The kernels' correction of the prompt."""
    return Offsets(hf_model).of_prompt(reuse, len(PROMPT), observer or Observer())


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{"ratio": 0.3}, {"ratio": 0.2, "selection": "kv_deviation"}])
@torch.no_grad()
def test_a_corrected_pass_through_a_state(settings, one_split):
    """Layers with stale rows are corrected once, though the pass comes to the last one again where it is cut."""
    hf_model, done, output, reused, reuse = blending(shared(), correction="offset", **settings)
    above, resumed = -1, {}
    rows = torch.cat([done.trace.selected_idx, done.trace.fresh_idx]).sort().values
    if "selection" in settings:
        above, resumed = 1, {"resume_at": 1, "resume_with": done.blend.entered.of_rows(rows)}
    one, live = padded(hf_model, Pass(PROMPT.input_ids[:, rows], rows, rows.int(), len(PROMPT), num_read=1, **resumed))
    buffers = {i: done.buffers[i] if i <= above else reused.layer(i) for i in range(hf_model.num_layers)}
    corrector = offsets_of(hf_model, reuse)
    state = state_of(hf_model, buffers, live, plan=corrector.numbers_for(rows))
    plan, asked = state.numbers[4 + hf_model.num_layers :], []

    def correct(layer_idx, all_rows, fresh, args):
        asked.append((layer_idx, args is not None))
        corrector.kernels.correct(layer_idx, fresh, all_rows, state, plan, args)

    _, layers = in_graph(partial(corrector, above))
    cache = GraphCache(hf_model.num_layers, one.rows, state, None, correct=correct, corrected=layers)
    got, _ = hf_model.lock.exclusive(run_rows, hf_model, hf_model.decoder_forward, one, cache, state)
    assert layers == list(range(above + 1, hf_model.num_layers))
    assert asked == [(layer, layer < hf_model.num_layers - 1) for layer in layers]  # where it is cut, nothing is asked
    assert torch.allclose(got.last_hidden_state[:, -1], output.last_hidden_state[:, -1], atol=1e-5)
    for layer, kv in buffers.items():
        for ours, theirs in zip(kv, done.buffers[layer]):
            assert torch.allclose(ours[:, :, : len(PROMPT)], theirs[:, :, : len(PROMPT)], atol=1e-5)


@pytest.mark.thorough
@torch.no_grad()
def test_a_pass_in_python_is_corrected_by_kernels(monkeypatch, one_split):
    """As where it has too many rows for a graph."""
    hf_model, done, _, reused, reuse = blending(shared(), correction="offset", ratio=0.3)
    rows, heard = torch.cat([done.trace.selected_idx, done.trace.fresh_idx]).sort().values, []
    observer = Observer()
    monkeypatch.setattr(observer, "corrected", lambda layer, sizes: heard.append((layer, sizes())))
    reused.corrector = offsets_of(hf_model, reuse, observer)
    one = Pass(PROMPT.input_ids[:, rows], rows, rows, len(PROMPT), num_read=1)
    cache = BlendingCache(
        hf_model.num_layers, {}, rows, len(PROMPT), reused=reused, correct=reused.correcting(above=-1)
    )  # fmt: skip
    hf_model.lock.exclusive(run_rows, hf_model, hf_model.decoder_forward, one, cache)
    for layer, kv in cache.buffers.items():
        for ours, theirs in zip(kv, done.buffers[layer]):
            assert torch.allclose(ours[:, :, : len(PROMPT)], theirs[:, :, : len(PROMPT)], atol=1e-5)
    assert [layer for layer, _ in heard] == list(range(hf_model.num_layers))
    assert all(sizes.shape == (2, len(reuse.moved)) for _, sizes in heard)
    assert all(sizes.gt(0).all() for _, sizes in heard[1:])  # in the first layer nothing has seen other tokens
    assert in_graph(reused.correcting(above=-1)) == (None, [])  # a graph would correct them again


def test_prompts_share_rotary_tables():
    """Up to the length that the model was trained for; made in a call's inference mode, they serve other calls."""
    hf_model, kind = model_of(shared()), (0, "duplicated", 1)
    with torch.inference_mode():
        first = hf_model.unit_tables(kind, 100)
    again, longer, longest = (hf_model.unit_tables(kind, length) for length in (120, 2000, 3000))
    assert [len(cos) for (cos, _) in (first, longer, longest)] == [128, 2048, 3000]
    assert first[0] is again[0]
    assert not first[0].is_inference()
    assert hf_model.unit_tables(kind, 100)[0] is longer[0]
    hf_model.fingerprint._forget()
    with torch.no_grad():
        hf_model.fingerprint.current(hf_model.model)  # as where weights were written
    assert len(hf_model.unit_tables(kind, 100)[0]) == 128  # made anew


def test_a_correction_in_python_is_never_recorded(monkeypatch):
    hf_model = model_of(shared())
    rows, graphs = torch.arange(3), PassGraphs(hf_model)
    one = Pass(rows[None], rows, rows, 9, num_read=1)
    assert in_graph(None) == in_graph(lambda *_: None) == (None, [])
    monkeypatch.setattr("hfblend.gpu.graphs.can_record", lambda hf_model: True)
    monkeypatch.setattr(graphs, "_padded", lambda one: pytest.fail("a pass is prepared for a graph"))
    for _ in range(3):
        assert graphs.run(hf_model.last_logits, one, {}, lambda layers: None, lambda *_: None) == (False, None)
    assert graphs._form(hf_model.last_logits, one, [2, 3]) != graphs._form(hf_model.last_logits, one)


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


def test_a_pass_resumed_behind_the_check_layer_through_a_state(one_split):
    model = MODELS["llama-gqa"]()
    with torch.no_grad():
        hf_model, done, output, reused, _ = blending(
            model, ratio=0.3, selection="kv_deviation", check_layers=(2,), correction=None
        )
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
