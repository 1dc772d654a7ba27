"""Realigned keys equal keys computed at the new positions, for every RoPE type; unfit models are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    ROPE,
    config,
    full_prefill_kv,
    generate,
    largest_difference,
    make_llama,
    make_prompt,
    moved_kv,
    store_of_true_kv,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfblend
from hfblend.blend.caches import RecordingCache
from hfblend.blend.rotation import pair_tables, rotate, rotation_between
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()


def from_config(kind, **kwargs):
    settings = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **kwargs})).eval()


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
def test_realigned_keys_equal_keys_computed_there(rope, dtype, tolerance):
    """Layer 0: its keys depend on ids and positions alone, so the truth at any position is one forward away."""
    model = make_llama(rope, dtype=dtype)
    hf_model = model_of(model)
    ids = PROMPT.input_ids[:, :30]

    def keys_at(positions):
        cache = RecordingCache(hf_model.num_layers)
        with torch.no_grad():
            hf_model.decoder_forward(input_ids=ids, position_ids=positions[None], past_key_values=cache, use_cache=True)
        return cache.recorded[0], hf_model.regime(int(positions[-1]) + 1)

    old, new = torch.arange(30), torch.arange(90, 120)  # across the short context of dynamic and longrope
    for cached_positions, positions in ((old, new), (new, old), (old, old + 17)):
        (cached, then), (truth, now) = keys_at(cached_positions), keys_at(positions)
        moved = moved_kv(hf_model, {0: cached}, (cached_positions, positions, then), now)[0]
        assert (moved[0].float() - truth[0].float()).norm() <= tolerance * truth[0].float().norm()
        assert torch.equal(moved[1], cached[1])
        assert (cached[0].float() - truth[0].float()).norm() > 0.1 * truth[0].float().norm()


def test_bf16_is_moved_no_worse_than_the_model_itself_rounds():
    model = make_llama(dtype=torch.bfloat16)
    exact = make_llama().to(torch.bfloat16).to(torch.float32)  # the same rounded weights, computed in fp32
    hf_model = model_of(model)
    keys = {}
    for name, m in (("bf16", model), ("fp32", exact)):
        for start in (0, 400):
            cache = RecordingCache(4, stop_at=None)
            positions = torch.arange(start, start + 64)[None]
            ids = torch.arange(64)[None] % 90 + 3
            with torch.no_grad():
                m.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
            keys[name, start] = cache.recorded[0]
    moved = moved_kv(hf_model, {0: keys["bf16", 0]}, (torch.arange(64), torch.arange(400, 464), 64), 464)[0]
    truth = keys["fp32", 400][0]
    own_error = (keys["bf16", 400][0].float() - truth).norm()
    assert (moved[0].float() - truth).norm() <= 1.25 * own_error


@pytest.mark.parametrize("rope", ROPE)
def test_true_kv_moved_and_blended_is_exact_for_every_rope(rope):
    model = make_llama(rope)
    fresh = copy.deepcopy(model)  # dynamic NTK remembers longer prompts: exactness starts from a fresh rotary state
    stock = generate(fresh, {"input_ids": PROMPT.input_ids}, max_new_tokens=4)
    shift = 100 if rope != "longrope" else 60
    store = store_of_true_kv(model, PROMPT, shift)
    with hfblend.patch(model, config=config(0.15), store=store) as blender:
        blended = generate(model, PROMPT.inputs(), max_new_tokens=4)
        assert blender.trace.blended
        assert blender.trace.hits == 3
        assert torch.equal(blended.sequences, stock.sequences)
        assert largest_difference(blended, stock) <= 5e-4


@pytest.mark.parametrize("rope", ROPE)
def test_ratio_1_is_stock_for_every_rope(rope):
    model = make_llama(rope)
    stock = generate(copy.deepcopy(model), {"input_ids": PROMPT.input_ids}, max_new_tokens=4)
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = generate(model, PROMPT.inputs(), max_new_tokens=4)
        assert blender.trace.computed_pairs == len(PROMPT) * 4
        assert torch.equal(blended.sequences, stock.sequences)
        assert largest_difference(blended, stock) <= 2e-4


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_prefix_from_another_regime_is_not_called_exact(rope):
    """Frequencies of the long prompt differ from those the 9-token prefix was computed with."""
    model = make_llama(rope)
    trace = hfblend.blend(model, PROMPT, config=config(0.15)).trace
    assert not trace.prefix.exact
    assert not trace.chunks[0].exact
    assert set(range(len(PROMPT.prefix_ids))) <= set(trace.candidate_idx.tolist())
    assert model_of(model).length_dependent
    assert not model_of(make_llama("yarn")).length_dependent


def test_dynamic_frequencies_grown_by_a_longer_prompt_hold_for_the_next_one():
    """Prefilling short chunks does not take them back: cold is as warm, and as an unpatched model in that state."""
    longer, stock, outputs = make_prompt((60, 60, 60), seed=3), make_llama("dynamic"), {}
    generate(stock, {"input_ids": longer.input_ids})
    expected = generate(stock, {"input_ids": PROMPT.input_ids})
    for ratio in (0.2, 1.0):
        model = make_llama("dynamic")
        with hfblend.patch(model, config=config(ratio)) as blender:
            for hits in (0, 3):
                generate(model, longer.inputs())
                outputs[ratio, hits] = generate(model, PROMPT.inputs())
                assert (blender.trace.blended, blender.trace.hits) == (True, hits)
        assert largest_difference(outputs[ratio, 0], outputs[ratio, 3]) == 0
    assert largest_difference(outputs[1.0, 0], expected) <= 2e-4


def test_kv_of_a_prompt_of_the_same_length_is_exact_in_its_regime_only():
    """Between the two, decoding or a longer prompt let dynamic NTK grow."""
    model, stock = make_llama("dynamic"), make_llama("dynamic")
    with hfblend.patch(model, config=config(0.2, on_miss="in_context")) as blender:
        for exact in (False, True):
            blended = generate(model, PROMPT.inputs(), max_new_tokens=1)
            assert [chunk.exact for chunk in blender.trace.chunks] == [exact] * 3
            assert (
                largest_difference(blended, generate(stock, {"input_ids": PROMPT.input_ids}, max_new_tokens=1)) < 1e-4
            )
        generate(model, {"input_ids": make_prompt((60, 60, 60)).input_ids, "chunk_spans": []})
        generate(model, PROMPT.inputs())
        assert (blender.trace.hits, [chunk.exact for chunk in blender.trace.chunks]) == (3, [False] * 3)


def test_tables_are_read_without_changing_the_models_rotary_state():
    """Neither the self-test at patch nor a table for another length moves what dynamic NTK has grown to."""
    model = make_llama("dynamic")
    generate(model, {"input_ids": PROMPT.input_ids}, max_new_tokens=1)
    module = model.model.rotary_emb
    before = module.inv_freq.clone(), int(module.max_seq_len_cached)
    with hfblend.patch(model) as blender:
        blender.hf_model.rotary_tables(0, torch.arange(5), 500)
    assert before[1] > 64
    assert torch.equal(module.inv_freq, before[0])
    assert int(module.max_seq_len_cached) == before[1]


@pytest.mark.parametrize(
    ("kind", "settings", "pairing", "layout"),
    [
        ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}, "interleaved", "duplicated"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "half",
         "duplicated"),
        ("cohere", {}, "interleaved", "repeated"),
        ("qwen3", {"head_dim": 16}, "half", "duplicated"),
    ],
)  # fmt: skip
def test_other_layouts_are_found_and_exact(kind, settings, pairing, layout):
    model = from_config(kind, **settings)
    hf_model = model_of(model)
    assert {(r.pairing, r.layout) for r in hf_model.rotations} == {(pairing, layout)}
    stock = generate(model, {"input_ids": PROMPT.input_ids}, max_new_tokens=3)
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        blended = generate(model, PROMPT.inputs(), max_new_tokens=3)
        assert blender.trace.hits == 3
        assert largest_difference(blended, stock) <= 3e-4


def test_layers_without_rope_are_left_alone():
    model = from_config("smollm3", no_rope_layers=[1, 0, 1])
    assert [rotation is None for rotation in model_of(model).rotations] == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("gpt2", {"n_layer": 2, "n_head": 4, "n_embd": 64}, "positions"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2}, "positions"),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "conv"),
    ],
)
def test_models_whose_kv_cannot_be_moved_are_refused_with_the_reason(kind, settings, words):
    with pytest.raises(hfblend.UnsupportedModel, match=words):
        hfblend.patch(from_config(kind, **settings))


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2)).eval()
    with pytest.raises(hfblend.UnsupportedModel, match="encoder-decoder"):
        hfblend.patch(model)


# --- the maths alone


@given(
    old=st.integers(0, 5000), new=st.integers(0, 5000), pairing=st.sampled_from(["half", "interleaved"]),
    extra=st.integers(0, 3), scale=st.floats(0.5, 2.0),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_rotation_between_moves_and_keeps_scaling_once(old, new, pairing, extra, scale):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 3, 8 + extra, generator=generator, dtype=torch.float32)
    angles = torch.tensor([[0.3, 0.01, 0.2, 0.05]])
    at = {p: (scale * torch.cos(angles * p), scale * torch.sin(angles * p)) for p in (old, new)}
    cached = rotate(states, *at[old], pairing)
    moved = rotate(cached, *rotation_between(at[old], at[new]), pairing)
    assert torch.allclose(moved, rotate(states, *at[new], pairing), atol=1e-4)
    assert torch.equal(moved[..., 8:], states[..., 8:])


def test_pair_tables_reads_every_layout():
    cos = torch.tensor([[1.0, 2.0]])
    for layout, table in (("single", cos), ("duplicated", cos.repeat(1, 2)), ("repeated", cos.repeat_interleave(2, 1))):
        assert torch.equal(pair_tables((table, table), layout)[0], cos)


def test_values_do_not_move():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=4)).eval()  # fmt: skip
    full = full_prefill_kv(model, PROMPT.input_ids)
    hf_model = model_of(model)
    positions = torch.arange(len(PROMPT))
    moved = moved_kv(hf_model, {1: full[1]}, (positions, positions + 5, 0), 0)
    assert torch.equal(moved[1][1], full[1][1])


def test_pieces_of_a_length_dependent_rope_are_asked_for_in_runs():
    hf_model = model_of(make_llama("dynamic"))
    pieces = [(torch.arange(3, 9), 200), (torch.arange(4), 200), (torch.arange(50, 60), 90), (torch.arange(2), 200)]
    together = hf_model.rotary_tables_of_pieces(0, pieces)
    alone = zip(*(hf_model.rotary_tables(0, *piece) for piece in pieces))
    assert all(torch.equal(one, torch.cat(parts)) for one, parts in zip(together, alone))
    at_200, at_90 = (hf_model.rotary_tables(0, torch.arange(50, 60), regime)[0] for regime in (200, 90))
    assert not torch.equal(at_200, at_90)
