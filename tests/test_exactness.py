"""Blended against stock Transformers, in the same test: exact where it must be."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    MODELS,
    config,
    full_prefill_kv,
    generate,
    largest_difference,
    make_llama,
    make_mistral,
    make_prompt,
    shared,
    store_of_true_kv,
)

import hfblend
from hfblend.blend.rules import mixed
from hfblend.blend.selection import budget, by_kv_deviation, by_suffix_attention
from hfblend.generate.blending import Blending
from hfblend.kv.rows import full_length_cache
from hfblend.model.hf_model import HFModel
from hfblend.store import MemoryStore
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()


def stock_inputs(prompt):
    return {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)}


# --- ratio 1 (invariant 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.1)], ids=["fp32", "bf16"])
def test_ratio_1_equals_full_prefill(name, dtype, tolerance):
    model = shared(MODELS[name], dtype=dtype)
    stock = generate(model, stock_inputs(PROMPT))
    with hfblend.patch(model, config=config(1.0)) as blender:
        for hits in (0, 3):  # cold, then warm
            blended = generate(model, PROMPT.inputs())
            trace = blender.trace
            assert trace.blended
            assert (trace.hits, trace.misses) == (hits, 3 - hits)
            assert trace.computed_pairs == len(PROMPT) * 4  # every token went through every layer, once
            assert torch.equal(blended.sequences, stock.sequences)
            assert largest_difference(blended, stock) <= tolerance


# --- true KV from elsewhere (realign, scatter, mask, independence of the selection)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_true_kv_moved_and_blended_is_exact(name, ratio):
    model = shared(MODELS[name])
    stock = generate(model, stock_inputs(PROMPT))
    with hfblend.patch(model, config=config(ratio), store=store_of_true_kv(model, PROMPT)) as blender:
        blended = generate(model, PROMPT.inputs())
        trace = blender.trace
        assert trace.blended
        assert trace.hits == 3
        assert not any(chunk.exact for chunk in trace.chunks)
        assert trace.prefix.status == "hit"
        assert trace.selected_tokens == budget(ratio, len(trace.candidate_idx))
        assert torch.equal(blended.sequences, stock.sequences)
        assert largest_difference(blended, stock) <= 3e-4


@pytest.mark.parametrize("check_layers", [(1, 2, 3), ()])
def test_true_kv_is_exact_under_gradual_filtering_and_full_reuse(check_layers):
    model = shared()
    stock = generate(model, stock_inputs(PROMPT))
    ratios = (0.5, 0.3, 0.1)[: len(check_layers)]
    settings = config(selection="kv_deviation", check_layers=check_layers, recompute_ratios=ratios)
    with hfblend.patch(model, config=settings, store=store_of_true_kv(model, PROMPT)) as blender:
        blended = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert blender.trace.hits == 3
        assert largest_difference(blended, stock) <= 3e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_rows_of_the_hosts_own_masks_are_exact_too(monkeypatch, attention, make):
    """Models whose attention cannot be replaced get the selected rows of the masks that Transformers builds."""
    model = make()
    model.set_attn_implementation(attention)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    stock = generate(model, stock_inputs(PROMPT))
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        assert not blender.hf_model.attends_by_position
        blended = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert blender.trace.hits == 3
        assert largest_difference(blended, stock) <= 3e-4


def test_eager_models_blend_through_our_attention():
    model = make_llama()
    model.set_attn_implementation("eager")
    stock = generate(model, stock_inputs(PROMPT))
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        assert blender.hf_model.attends_by_position
        assert largest_difference(generate(model, PROMPT.inputs()), stock) <= 3e-4
        assert blender.trace.hits == 3


# --- what is reused, and what it costs (invariants 2, 4, 6, 7)


def deviation_first(evidence):
    """Two rules whose passes follow each other in the other order than in "mixed"."""
    return mixed({by_kv_deviation: 1, by_suffix_attention: 1})(evidence)


@pytest.mark.parametrize("selection", ["kv_deviation", "suffix_attention", "mixed", deviation_first])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_every_layer_holds_reused_or_fresh_rows(ratio, selection):
    """Unselected rows above the check layer are the realigned entries; nothing is zero, stale or uninitialised."""
    model, store = shared(), MemoryStore()
    check_layer = 3 if selection is deviation_first else 1
    settings = config(ratio, selection=selection, check_layers=(check_layer,), correction=None)
    hfblend.blend(model, PROMPT, store=store, config=settings)
    hf_model = model_of(model)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with torch.no_grad():
            state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, settings)
            state.run(hf_model.last_logits)
            again = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, settings)
            again = again.stopped_at("realigned", hf_model.last_logits)
            reuse, reused = again.reuse, again.reused
    finally:
        torch.use_deterministic_algorithms(False)
    full = full_prefill_kv(model, PROMPT.input_ids)
    assert set(state.buffers) == set(range(4))
    kept = ~torch.isin(reuse.candidate_idx, state.trace.selected_idx)
    assert kept.sum() == len(reuse.candidate_idx) - state.trace.selected_tokens
    for layer, kv in state.buffers.items():
        keys, values = (t[:, :, : len(PROMPT)] for t in kv)
        assert torch.isfinite(keys).all()
        assert torch.isfinite(values).all()
        assert (keys.abs().sum((0, 1, 3)) > 0).all()
        if (
            layer <= check_layer and selection != "suffix_attention"
        ):  # the check layer's pass computed them for every token
            assert torch.allclose(values, full[layer][1], atol=1e-5)
        else:
            moved_keys, moved_values = reused.moved_kv(layer, kv)
            idx = reuse.candidate_idx[kept]
            assert torch.equal(values[:, :, idx], moved_values[:, :, kept])
            assert torch.equal(keys[:, :, idx], moved_keys[:, :, kept])


def test_gaps_suffix_and_only_they_are_always_fresh():
    model = shared()
    trace = hfblend.blend(model, PROMPT, config=config(0.15)).trace
    reused = {i for start, stop in [(0, PROMPT.chunk_spans[0][0]), *PROMPT.chunk_spans] for i in range(start, stop)}
    assert trace.fresh_idx.tolist() == [i for i in range(len(PROMPT)) if i not in reused]


@pytest.mark.parametrize(
    ("layers", "ratios"),
    [((1,), (0.15,)), ((2,), (0.0,)), ((1, 2), (0.5, 0.2)), ((1, 2, 3), (0.6, 0.4, 0.1)), ((), ())],
)
def test_computed_pairs_are_counted(layers, ratios):
    model = shared()
    seen = []

    def count(module, args, kwargs):
        seen.append(kwargs.get("hidden_states", args[0] if args else None).shape[1])

    store = MemoryStore()
    settings = config(selection="kv_deviation", check_layers=layers, recompute_ratios=ratios)
    # an MLP runs exactly when a token goes through a whole layer; the last one is spared all rows but the one read
    handles = [layer.mlp.register_forward_pre_hook(count, with_kwargs=True) for layer in model.model.layers]
    hfblend.blend(model, PROMPT, store=store, config=settings)  # hooks are part of the keys
    seen.clear()
    trace = hfblend.blend(model, PROMPT, store=store, config=settings).trace
    for handle in handles:
        handle.remove()
    assert trace.hits == 3
    fresh, n = len(trace.fresh_idx), len(trace.candidate_idx)
    assert seen[-1] == 1
    assert trace.computed_pairs == sum(seen) - 1 + trace.selected_tokens + fresh
    expected = len(PROMPT) * layers[0] if layers else 0
    for before, layer, ratio in zip(layers, layers[1:], ratios):
        expected += (budget(ratio, n) + fresh) * (layer - before)
    expected += (trace.selected_tokens + fresh) * (4 - (layers[-1] if layers else 0))
    assert trace.computed_pairs == expected
    assert trace.recomputed_pairs_share == pytest.approx(expected / (4 * len(PROMPT)))
    assert trace.isolated_pairs == 0


def test_isolated_prefills_are_counted_apart():
    model = shared()
    trace = hfblend.blend(model, PROMPT, config=config(0.15)).trace
    assert trace.misses == 3
    assert trace.isolated_pairs == 4 * (9 + 20 + 31 + 13)


def test_chunk_where_it_was_computed_is_exact_and_never_a_candidate():
    model = shared()
    prompt = make_prompt(sizes=(30,))
    stock = generate(model, stock_inputs(prompt))
    with hfblend.patch(model, config=config(0.0)) as blender:
        for _ in range(2):
            blended = generate(model, prompt.inputs())
            assert blender.trace.blended
            assert [chunk.exact for chunk in blender.trace.chunks] == [True]
            assert len(blender.trace.candidate_idx) == 0
            assert torch.equal(blended.sequences, stock.sequences)
            assert largest_difference(blended, stock) <= 2e-4


def test_reused_elsewhere_is_not_exact_and_deviates_less_the_more_is_recomputed():
    model = shared()
    stock = generate(model, stock_inputs(PROMPT), max_new_tokens=1)
    differences = []
    with hfblend.patch(model) as blender:
        for ratio in (0.0, 0.5, 1.0):
            blended = generate(model, PROMPT.inputs(), max_new_tokens=1, blend_config=config(ratio))
            assert [chunk.exact for chunk in blender.trace.chunks] == [True, False, False]
            differences.append(largest_difference(blended, stock))
    assert differences[0] > 1e-2 > differences[2]


# --- cold equals warm, reuse across misses (invariant 3)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_cold_equals_warm_bit_for_bit(name):
    model = shared(MODELS[name])
    with hfblend.patch(model, config=config(0.2)) as blender:
        cold = generate(model, PROMPT.inputs())
        assert blender.trace.misses == 3
        warm = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        assert torch.equal(cold.sequences, warm.sequences)
        assert largest_difference(cold, warm) == 0.0


def test_missing_chunks_are_prefilled_together_where_that_is_quicker(monkeypatch):
    """As on a GPU; a chunk that stands twice is prefilled once."""
    model, outputs = shared(), []
    prompt = make_prompt((20, 31, 13, 20, 25), seed=8)
    start, stop = prompt.chunk_spans[0]
    again = prompt.input_ids.clone()
    again[:, slice(*prompt.chunk_spans[3])] = again[:, start:stop]
    prompt = hfblend.Prompt(again, prompt.chunk_spans)
    sizes = []
    prefill_batch = hfblend.model.prefill.prefill_batch
    for at_once in (1, 8):
        monkeypatch.setattr(HFModel, "chunks_at_once", at_once)
        with monkeypatch.context() as patched, hfblend.patch(model, config=config(0.2)) as blender:
            patched.setattr(
                hfblend.model.prefill,
                "prefill_batch",
                lambda hf_model, chunks, *rest: sizes.append(len(chunks)) or prefill_batch(hf_model, chunks, *rest),
            )
            outputs.append(generate(model, prompt.inputs()))
            assert [chunk.status for chunk in blender.trace.chunks] == ["miss", "miss", "miss", "hit", "miss"]
            assert blender.trace.isolated_pairs == (7 + 2 + 20 + 31 + 13 + 25) * 4
            assert len(blender.store) == 5
            generate(model, prompt.inputs())
            assert blender.trace.hits == 5
    assert [size for size in sizes if size > 1] == [4]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert largest_difference(*outputs) <= 1e-4


def test_a_miss_in_the_middle_costs_only_that_chunk():
    model = shared()
    with hfblend.patch(model, config=config(0.2)) as blender:
        for chunk in (0, 2):
            generate(model, make_prompt(order=[chunk]).inputs())
        partly = generate(model, PROMPT.inputs())
        assert [chunk.status for chunk in blender.trace.chunks] == ["hit", "miss", "hit"]
        assert blender.trace.isolated_pairs == 4 * 31
        assert largest_difference(partly, generate(model, PROMPT.inputs())) == 0.0


def test_chunks_are_reused_in_any_order():
    model = shared()
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs())
        reordered = make_prompt(order=[2, 0, 1])
        generate(model, reordered.inputs())
        trace = blender.trace
        assert trace.hits == 3
        assert all(chunk.cached_start == len(PROMPT.prefix_ids) for chunk in trace.chunks)
        assert [chunk.span for chunk in trace.chunks] == list(reordered.chunk_spans)


# --- in-context misses


def test_in_context_misses_are_fresh_exact_and_captured():
    model = shared()
    stock = generate(model, stock_inputs(PROMPT))
    with hfblend.patch(model, config=config(0.2, on_miss="in_context")) as blender:
        first = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert [chunk.status for chunk in blender.trace.chunks] == ["fresh"] * 3
        assert largest_difference(first, stock) <= 2e-5  # nothing was reused: a stock forward over all tokens
        assert blender.trace.isolated_pairs == 0
        assert blender.trace.computed_pairs == blender.trace.total_pairs
        again = generate(model, PROMPT.inputs())
        pieces = [blender.trace.prefix, *blender.trace.chunks]
        assert [(piece.status, piece.exact) for piece in pieces] == [("hit", True)] * 4
        assert largest_difference(again, stock) <= 2e-4


def test_in_context_misses_behind_reused_chunks_are_not_captured():
    model = shared()
    with hfblend.patch(model, config=config(0.2, on_miss="in_context")) as blender:
        generate(model, make_prompt(order=[1]).inputs())
        entries = len(blender.store)
        generate(model, make_prompt(order=[2, 1, 0]).inputs())  # fresh, reused from elsewhere, fresh
        assert [chunk.status for chunk in blender.trace.chunks] == ["fresh", "hit", "fresh"]
        assert len(blender.store) == entries + 1
        generate(model, make_prompt(order=[0]).inputs())
        assert blender.trace.chunks[0].status == "fresh"


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_nothing_is_captured_behind_a_prefix_of_another_rope_regime(rope):
    model = make_llama(rope)
    with hfblend.patch(model, config=config(0.2, on_miss="in_context")) as blender:
        short = make_prompt(sizes=(5,))  # stores the prefix alone, of its own regime
        generate(model, short.inputs(), blend_config=config(0.2), max_new_tokens=1)
        for _ in range(2):
            generate(model, PROMPT.inputs(), max_new_tokens=1)
            assert not blender.trace.prefix.exact
            assert [chunk.status for chunk in blender.trace.chunks] == ["fresh"] * 3


def test_little_that_is_exact_is_computed_again_rather_than_attended_by_position():
    """A prefix of 9 tokens before 125 that are fresh: a stock forward over all of them is quicker, and the same."""
    model, prompt = shared(), make_prompt(sizes=(40, 41, 33))
    with hfblend.patch(model, config=config(0.2, on_miss="in_context")) as blender:
        generate(model, make_prompt(sizes=(5,)).inputs())
        output = generate(model, prompt.inputs())
        assert blender.trace.prefix.exact
        assert blender.trace.computed_pairs == blender.trace.total_pairs
        assert largest_difference(output, generate(model, stock_inputs(prompt))) <= 2e-5
        generate(model, prompt.inputs())
        assert blender.trace.computed_pairs < blender.trace.total_pairs


# --- no future (invariant 5)


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_no_selected_token_sees_a_later_position(make):
    """Rows of a pass do not change when everything reused behind them does."""
    model = shared(make)
    hf_model = model_of(model)
    first_poisoned = 41

    def keys_of_rows(poison):
        store = store_of_true_kv(model, PROMPT)
        for key, entry in list(store._entries.items()):
            kv = []
            for i in range(4):
                keys, values = (t.clone() for t in entry.layer(i))
                late = entry.cached_positions - 100 >= first_poisoned
                keys[:, :, late], values[:, :, late] = keys[:, :, late] + poison, values[:, :, late] - poison
                kv.append((keys, values))
            cache = full_length_cache(kv)
            store.put(key, hfblend.ChunkKV(cache, entry.cached_positions, entry.behind_ids, "isolated", entry.regime))
        with torch.no_grad():
            state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(0.0, correction=None))
            blend = state.stopped_at("realigned", hf_model.decoder_forward)
            rows = torch.cat([blend.reuse.candidate_idx[::5], blend.reuse.fresh_idx]).sort().values
            blend.rows_pass("recompute", rows)
        return rows, state.buffers[3][0][:, :, rows]

    (rows, clean), (_, poisoned) = keys_of_rows(0.0), keys_of_rows(50.0)
    early = rows < first_poisoned
    assert 5 < early.sum() < len(rows)
    assert torch.equal(clean[:, :, early], poisoned[:, :, early])
    assert not torch.allclose(clean[:, :, -1], poisoned[:, :, -1])  # the last row does see them


# --- blend() in notebooks


@pytest.mark.parametrize("make", [make_llama, make_mistral])
@pytest.mark.parametrize("patched", [False, True])
def test_blend_returns_logits_and_a_cache_that_stock_generate_continues(make, patched):
    model = shared(make)
    stock = generate(model, stock_inputs(PROMPT))
    store = store_of_true_kv(model, PROMPT)
    blender = hfblend.patch(model) if patched else None
    result = hfblend.blend(model, PROMPT, store=store, config=config(0.15))
    if blender:
        blender.remove()
    assert result.trace.hits == 3
    assert (result.logits - stock.logits[0]).abs().max() <= 3e-4
    assert result.cache.get_seq_length() == len(PROMPT) - 1
    continued = generate(model, stock_inputs(PROMPT), past_key_values=result.cache)
    assert torch.equal(continued.sequences, stock.sequences)
    assert largest_difference(continued, stock) <= 3e-4


def test_prompt_without_suffix_or_prefix():
    model = shared()
    for prompt in (make_prompt(prefix=0, separator=()), make_prompt(suffix=0, separator=())):
        full = generate(model, stock_inputs(prompt), max_new_tokens=1)
        result = hfblend.blend(model, prompt, store=store_of_true_kv(model, prompt), config=config(0.0))
        assert result.trace.hits == 3
        assert (result.logits - full.logits[0]).abs().max() <= 3e-4


def test_prompt_without_chunks_is_a_full_prefill():
    model = shared()
    prompt = hfblend.Prompt.from_ids([1, 2, 3, 4], [], [5, 6, 7])
    stock = generate(model, stock_inputs(prompt), max_new_tokens=1)
    result = hfblend.blend(model, prompt)
    assert (result.logits - stock.logits[0]).abs().max() <= 1e-4
    assert result.trace.recomputed_pairs_share == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_prefill_chunk_equals_stock_rows(name):
    """Also for sliding models, and continued from the prefix's own KV."""
    model = shared(MODELS[name])
    ids, behind = PROMPT.ids[40:80], PROMPT.ids[:35]
    full = full_prefill_kv(model, torch.tensor([behind + ids]))
    prefix = hfblend.prefill_chunk(model, behind)
    for entry in (hfblend.prefill_chunk(model, ids, behind), hfblend.prefill_chunk(model, ids, behind, behind=prefix)):
        assert entry.cached_positions.tolist() == list(range(35, 75))
        for i in range(4):
            for cached, true in zip(entry.layer(i), full[i]):
                assert torch.allclose(cached, true[:, :, 35:], atol=2e-5)


def test_a_prefix_kept_at_other_positions_is_not_continued_from():
    model = shared()
    behind = PROMPT.prefix_ids
    away = store_of_true_kv(model, PROMPT).open(hfblend.blend(model, PROMPT).trace.prefix.key)
    assert away.cached_positions[0] == 100
    chunk = hfblend.prefill_chunk(model, PROMPT.chunk_ids[0], behind, behind=away)
    expected = hfblend.prefill_chunk(model, PROMPT.chunk_ids[0], behind)
    assert all(torch.equal(a, b) for i in range(4) for a, b in zip(chunk.layer(i), expected.layer(i)))


def test_layerwise_and_all_at_once_are_the_same():
    model = shared()
    with hfblend.patch(model) as blender:
        outputs = [generate(model, PROMPT.inputs(), blend_config=config(0.2, layerwise=lw)) for lw in (True, False)]
        assert blender.trace.hits == 3
        assert largest_difference(*outputs) == 0.0


@pytest.mark.parametrize("chunk_prefix", ["prompt", "bos", "none"])
def test_chunk_prefix_says_what_chunks_are_computed_behind(chunk_prefix):
    model = shared()
    trace = hfblend.blend(model, PROMPT, config=config(0.2, chunk_prefix=chunk_prefix)).trace
    start = {"prompt": len(PROMPT.prefix_ids), "bos": 1, "none": 0}[chunk_prefix]
    assert [chunk.cached_start for chunk in trace.chunks] == [start] * 3
    assert trace.chunks[0].exact == (chunk_prefix == "prompt")
