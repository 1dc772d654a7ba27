from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import config, generate, make_llama, make_mistral, make_prompt, shared, store_of_true_kv
from hypothesis import given
from hypothesis import strategies as st

import hfblend
from hfblend.attention.record import AttentionRecord
from hfblend.blend.rules import at_random, by_chunk_start, by_position, chunk_starts, interleaved, mixed
from hfblend.blend.selection import Evidence, budget, by_suffix_attention, highest, kv_deviation
from hfblend.generate.blending import Blending
from hfblend.prompts.prompt import ChunkSpans
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")


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
    assert chunk_starts(candidates, [(2, 5), (7, 10)], 2**62).tolist() == [0, 3, 1, 4, 2, 5]  # at once


PROMPT = make_prompt()


@pytest.mark.parametrize("deviation", ["value", "key", "key_value"])
def test_the_tokens_that_deviate_most_are_selected(deviation):
    trace = hfblend.blend(shared(), PROMPT, config=config(0.25, selection="kv_deviation", deviation=deviation)).trace
    chosen = torch.isin(trace.candidate_idx, trace.selected_idx)
    assert trace.selected_tokens == math.ceil(0.25 * 44) == chosen.sum()
    assert trace.scores[chosen].min() >= trace.scores[~chosen].max()


def test_gradual_filtering_ranks_only_what_was_kept():
    model = shared()
    first = hfblend.blend(model, PROMPT, config=config(0.5, selection="kv_deviation")).trace.selected_idx
    settings = config(selection="kv_deviation", check_layers=(1, 3), recompute_ratios=(0.5, 0.2))
    trace = hfblend.blend(model, PROMPT, config=settings).trace
    assert set(trace.selected_idx.tolist()) < set(first.tolist())
    assert trace.selected_tokens == math.ceil(0.2 * 44)


def test_force_chunk_start_stays_inside_the_budget():
    trace = hfblend.blend(shared(), PROMPT, config=config(0.1, force_chunk_start=2)).trace
    starts = [start for start, _ in PROMPT.chunk_spans[1:]]
    assert {s + i for s in starts for i in (0, 1)} <= set(trace.selected_idx.tolist())
    assert trace.selected_tokens == math.ceil(0.1 * 44)


def test_deviation_of_reused_tokens_is_that_of_a_stock_forward():
    """At layer 1, against keys and values computed by stock Transformers."""
    from helpers import full_prefill_kv

    model, store = shared(), hfblend.MemoryStore()
    trace = hfblend.blend(model, PROMPT, store=store, config=config(0.2, selection="kv_deviation")).trace
    full = full_prefill_kv(model, PROMPT.input_ids)[1][1]
    reused = [store.open(chunk.key).layer(1)[1] for chunk in trace.chunks[1:]]
    fresh = [full[:, :, slice(*chunk.span)] for chunk in trace.chunks[1:]]
    expected = (torch.cat(fresh, 2) - torch.cat(reused, 2)).square().sum((1, 3))[0]
    assert torch.allclose(trace.scores, expected, rtol=1e-3, atol=1e-6)


def test_trace_reports_in_plain_words_and_json():
    import json

    model = shared()
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
    model = shared()
    prompt = hfblend.Prompt.from_texts(word_tokenizer, prefix="w8", chunks=["w9 w10"], suffix="w13")
    assert "'w8 w9 w10 w13'" in hfblend.blend(model, prompt, config=config(0.2)).trace.notes[0]
    other_tokens = ChunkSpans(prompt.chunk_spans, differs_from_joined_text=True)  # the text is the same
    prompt = hfblend.Prompt(prompt.input_ids, other_tokens)
    assert not hfblend.blend(model, prompt, config=config(0.2)).trace.notes


# --- rules ---------------------------------------------------------------------------------------------------------


def evidence(candidates, spans=(), **given):
    return Evidence(torch.tensor(candidates), list(spans), 1, 6, given.pop("config", config()), *given.values())


def test_positional_rules_score_by_hand():
    one = evidence([2, 3, 4, 7, 8, 9], [(2, 5), (7, 10)], kv=None, attention=None)
    assert by_chunk_start(one).tolist() == [0, -1, -2, 0, -1, -2]
    assert by_position(one).tolist() == [2, 3, 4, 7, 8, 9]
    assert torch.equal(at_random(one), at_random(one))
    assert len(set(at_random(one).tolist())) == 6


def test_suffix_attention_averages_heads_over_the_layers_from_a_third_up():
    asked = []

    def attention(layers):
        asked.append(layers)
        return torch.tensor([[[1.0, 0.0], [0.0, 0.0]]] * len(layers))  # (layers, H, N)

    scores = by_suffix_attention(evidence([3, 4], kv=None, attention=attention))
    assert (asked, scores.tolist()) == ([(2, 3, 4, 5)], [0.5, 0.0])
    by_suffix_attention(evidence([3, 4], config=config(score_layers=(1, 4)), kv=None, attention=attention))
    assert asked[-1] == (1, 4)


def test_mixed_gives_each_rule_its_share():
    n = 30
    front, back = torch.arange(n, 0, -1).float(), torch.arange(n).float()
    scores = interleaved([front, back], [2, 1])
    chosen = highest(scores, 9).tolist()
    assert chosen == [0, 1, 2, 3, 4, 5, 27, 28, 29]
    assert interleaved([front, torch.full((n,), math.nan)], [1, 1]).isfinite().all()
    with pytest.raises(ValueError, match="above 0"):
        mixed({by_position: 0})


def true_attention(model, prompt, rows):
    """(L, H, T): mean attention of `rows` in a stock forward, from Transformers' own eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights = eager(prompt.input_ids, output_attentions=True).attentions
    return torch.stack([w[0, :, rows].mean(1) for w in weights])


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_suffix_attention_over_true_kv_is_the_stock_models(make):
    model = shared(make)
    prompt = make_prompt(separator=())  # no gaps: nothing is hidden
    store = store_of_true_kv(model, prompt)
    seen = {}

    def rule(evidence):
        seen["got"] = evidence.suffix_attention(range(4))
        return by_suffix_attention(evidence)

    trace = hfblend.blend(model, prompt, store=store, config=config(0.2, selection=rule)).trace
    suffix = list(range(prompt.chunk_spans[-1][1], len(prompt)))
    expected = true_attention(model, prompt, suffix)[:, :, trace.candidate_idx]
    assert seen["got"].shape == (4, 4, len(trace.candidate_idx))
    assert torch.allclose(seen["got"], expected, atol=1e-5)
    assert torch.allclose(trace.scores, expected[1:].mean((0, 1)), atol=1e-5)


def test_gaps_and_chunks_not_yet_computed_are_hidden_from_the_suffix():
    """With them masked out, what the suffix gives to all other keys sums to one."""
    model = shared()
    hf_model, store = model_of(model), hfblend.MemoryStore()
    hfblend.blend(model, make_prompt(order=(1, 0)), store=store, config=config(on_miss="in_context"))
    state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(0.2, on_miss="in_context"))
    with torch.no_grad():
        blend = state.stopped_at("realigned", hf_model.last_logits)
        reuse, received = blend.reuse, blend.suffix_attention((1, 3))
    assert sum(chunk.status == "fresh" for chunk in state.trace.chunks) >= 1
    suffix_start = PROMPT.chunk_spans[-1][1]
    hidden = reuse.fresh_idx[reuse.fresh_idx < suffix_start]
    assert len(hidden) > 10
    for attention in received.values():
        assert (attention[:, hidden] == 0).all()
        assert torch.allclose(attention.sum(-1), torch.ones(4), atol=1e-5)
    assert state.trace.computed_pairs == 3 * (len(PROMPT) - suffix_start)


def test_recording_in_blocks_is_recording_at_once(monkeypatch):
    model, prompt = shared(), make_prompt(suffix=150)
    store = hfblend.MemoryStore()
    whole = hfblend.blend(model, prompt, store=store, config=config(0.2)).trace.scores
    monkeypatch.setattr(AttentionRecord, "ROWS_AT_ONCE", 7)
    blocks = hfblend.blend(model, prompt, store=store, config=config(0.2)).trace.scores
    assert torch.allclose(whole, blocks, atol=1e-7)


def test_score_pass_is_counted_and_needs_no_pass_over_all_tokens():
    model, store = shared(), hfblend.MemoryStore()
    for _ in range(2):
        trace = hfblend.blend(model, PROMPT, store=store, config=config(0.2)).trace
    suffix = len(PROMPT) - PROMPT.chunk_spans[-1][1]
    rows = trace.selected_tokens + len(trace.fresh_idx)
    assert trace.computed_pairs == 3 * suffix + 4 * rows  # the score pass ends at the last layer's attention weights


def test_models_whose_attention_cannot_be_recorded_are_ranked_by_deviation(monkeypatch, caplog):
    model, store = shared(), hfblend.MemoryStore()
    monkeypatch.setattr(model_of(model), "attends_by_position", False)
    trace = hfblend.blend(model, PROMPT, store=store, config=config(0.2)).trace
    expected = hfblend.blend(model, PROMPT, store=store, config=config(0.2, selection="kv_deviation")).trace
    assert torch.equal(trace.selected_idx, expected.selected_idx)
    assert "cannot be recorded" in trace.notes[0]
    assert "cannot be recorded" in caplog.text


def test_a_rule_of_ones_own():
    """The block of docs/selection.md: one function, one line of config."""
    page = (Path(__file__).parent.parent / "docs" / "selection.md").read_text(encoding="utf-8")
    block = page.split("## A rule of your own")[1].split("```python\n")[1].split("```")[0]
    names = {}
    exec(block, names)
    settings = replace(names["config"], recompute_ratios=(0.2,))
    trace = hfblend.blend(shared(), PROMPT, config=settings).trace
    chosen = torch.isin(trace.candidate_idx, trace.selected_idx)
    assert trace.selected_tokens == math.ceil(0.2 * 44)
    assert trace.scores[chosen].min() >= trace.scores[~chosen].max()


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float16])
def test_a_rule_may_score_in_whole_numbers_and_flags(kind):
    def rule(evidence):
        return (evidence.candidate_idx >= 50).to(kind)

    trace = hfblend.blend(shared(), PROMPT, config=config(0.2, selection=rule, force_chunk_start=1)).trace
    starts = [start for start, _ in PROMPT.chunk_spans[1:]]
    assert trace.selected_tokens == math.ceil(0.2 * 44)
    assert set(starts) <= set(trace.selected_idx.tolist())
    assert all(i >= 50 for i in trace.selected_idx.tolist() if i not in starts)


def test_a_layer_that_gives_no_attention_is_noticed(monkeypatch):
    model = shared()
    monkeypatch.setattr(AttentionRecord, "add", lambda *args: None)
    trace = hfblend.blend(model, PROMPT, config=config(0.2)).trace
    assert "cannot be recorded" in trace.notes[0]
    assert trace.selected_tokens == math.ceil(0.2 * 44)


@pytest.mark.parametrize("layers", [(), (4,), (-1, 2)])
def test_a_rule_that_asks_for_layers_beyond_the_model_is_told(layers):
    def rule(evidence):
        return evidence.suffix_attention(layers).mean((0, 1))

    with pytest.raises(ValueError, match="one or more of 0 … 3"):
        hfblend.blend(shared(), PROMPT, config=config(0.2, selection=rule))


@pytest.mark.parametrize("scores", [lambda n: torch.zeros(1), lambda n: [1.0] * n, lambda n: None])
def test_a_rule_must_score_every_candidate(scores):
    with pytest.raises(ValueError, match="one score per candidate"):
        hfblend.blend(
            shared(), PROMPT, config=config(0.2, selection=lambda evidence: scores(len(evidence.candidate_idx)))
        )
