from __future__ import annotations

import math

import pytest
import torch
from helpers import config, generate, make_llama, make_prompt
from hypothesis import given
from hypothesis import strategies as st

import hfblend
from hfblend.selection import budget, chunk_starts, highest, kv_deviation


def kv(*values):
    """Keys and values (1, 1, N, 1)."""
    return tuple(torch.tensor(v, dtype=torch.float32)[None, None, :, None] for v in values)


def test_deviation_is_squared_l2_in_fp32():
    fresh, reused = kv([1.0, 2.0, 3.0], [0.0, 0.0, 4.0]), kv([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    assert kv_deviation(fresh, reused, "key").tolist() == [[0.0, 4.0, 9.0]]
    assert kv_deviation(fresh, reused, "value").tolist() == [[1.0, 0.0, 16.0]]
    both = kv_deviation(fresh, reused, "key_value")
    assert torch.allclose(
        both, torch.tensor([[0.0, 4.0, 9.0]]) / (13 / 3) + torch.tensor([[1.0, 0.0, 16.0]]) / (17 / 3)
    )
    half = tuple(t.to(torch.bfloat16) for t in fresh)
    assert kv_deviation(half, tuple(t.to(torch.bfloat16) for t in reused)).dtype == torch.float32


@given(ratio=st.floats(0, 1), tokens=st.integers(0, 5000))
def test_budget_is_the_ceiling(ratio, tokens):
    assert 0 <= budget(ratio, tokens) <= tokens
    assert abs(budget(ratio, tokens) - math.ceil(ratio * tokens)) <= 1


def test_budget_is_not_fooled_by_binary_fractions():
    assert budget(0.1, 30) == 3
    assert budget(0.15, 100) == 15
    assert budget(0.15, 101) == 16
    assert (budget(0.0, 9), budget(1.0, 9), budget(0.01, 9)) == (0, 9, 1)


def test_highest_keeps_order_forces_inside_the_budget_and_distrusts_nan():
    scores = torch.tensor([5.0, 1.0, math.nan, 4.0, 3.0])
    assert highest(scores, 3).tolist() == [0, 2, 3]
    assert highest(scores, 0).tolist() == []
    assert highest(scores, 9).tolist() == [0, 1, 2, 3, 4]
    assert highest(scores, 3, torch.tensor([1, 4])).tolist() == [1, 2, 4]
    assert highest(scores, 1, torch.tensor([4, 1])).tolist() == [4]


def test_chunk_starts_go_round_the_chunks():
    candidates = torch.tensor([2, 3, 4, 7, 8, 9])
    assert chunk_starts(candidates, [(2, 5), (7, 10)], 2).tolist() == [0, 3, 1, 4]
    assert chunk_starts(candidates[[0, 2, 4]], [(2, 5), (7, 10)], 2).tolist() == [0, 2]
    assert chunk_starts(candidates, [(2, 5)], 0).tolist() == []
    assert chunk_starts(candidates[:0], [], 3).tolist() == []


PROMPT = make_prompt()


@pytest.mark.parametrize("deviation", ["value", "key", "key_value"])
def test_the_tokens_that_deviate_most_are_selected(deviation):
    trace = hfblend.blend(make_llama(), PROMPT, config=config(0.25, deviation=deviation)).trace
    chosen = torch.isin(trace.candidate_idx, trace.selected_idx)
    assert trace.selected_tokens == math.ceil(0.25 * 44) == chosen.sum()
    assert trace.deviation[chosen].min() >= trace.deviation[~chosen].max()


def test_gradual_filtering_ranks_only_what_was_kept():
    model = make_llama()
    first = hfblend.blend(model, PROMPT, config=config(0.5)).trace.selected_idx
    settings = config(check_layers=(1, 3), recompute_ratios=(0.5, 0.2))
    trace = hfblend.blend(model, PROMPT, config=settings).trace
    assert set(trace.selected_idx.tolist()) < set(first.tolist())
    assert trace.selected_tokens == math.ceil(0.2 * 44)


def test_force_chunk_start_stays_inside_the_budget():
    trace = hfblend.blend(make_llama(), PROMPT, config=config(0.1, force_chunk_start=2)).trace
    starts = [start for start, _ in PROMPT.chunk_spans[1:]]
    assert {s + i for s in starts for i in (0, 1)} <= set(trace.selected_idx.tolist())
    assert trace.selected_tokens == math.ceil(0.1 * 44)


def test_deviation_of_reused_tokens_is_that_of_a_stock_forward():
    """At layer 1, against keys and values computed by stock Transformers."""
    from helpers import full_prefill_kv

    model, store = make_llama(), hfblend.MemoryStore()
    trace = hfblend.blend(model, PROMPT, store=store, config=config(0.2)).trace
    full = full_prefill_kv(model, PROMPT.input_ids)[1][1]
    reused = [store.open(chunk.key).layer(1)[1] for chunk in trace.chunks[1:]]
    fresh = [full[:, :, slice(*chunk.span)] for chunk in trace.chunks[1:]]
    expected = (torch.cat(fresh, 2) - torch.cat(reused, 2)).square().sum((1, 3))[0]
    assert torch.allclose(trace.deviation, expected, rtol=1e-3, atol=1e-6)


def test_trace_reports_in_plain_words_and_json():
    import json

    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        assert str(blender.trace) == "not blended: no call yet"
        generate(model, PROMPT.inputs(), max_new_tokens=3)
        trace = blender.trace
        plain = json.loads(json.dumps(trace.to_dict()))
    assert plain["misses"] == 3
    assert plain["selected_idx"] == trace.selected_idx.tolist()
    assert set(plain["phase_ms"]) == {"look_up", "prefill_chunks", "select", "recompute", "hand_over"}
    assert 0 < sum(plain["phase_ms"].values()) <= plain["ttft_ms"]
    assert plain["bytes_reused"] == (9 + 20 + 31 + 13) * 4 * 2 * 2 * 16 * 4
    assert f"{trace.selected_tokens} of 44 moved tokens recomputed" in str(trace)


def test_trace_notes_pieces_that_join_differently(word_tokenizer):
    model = make_llama()
    prompt = hfblend.Prompt.from_texts(word_tokenizer, prefix="w8", chunks=["w9 w10"], suffix="w13")
    assert "tokenise" in hfblend.blend(model, prompt, config=config(0.2)).trace.notes[0]
