"""Batches: prompts with different chunks, lengths and hits, left-padded, equal to the rows run alone and to stock."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import (
    config,
    generate,
    largest_difference,
    make_llama,
    make_mistral,
    make_prompt,
    shared,
    store_of_true_kv,
)
from test_generate_modes import MODES
from transformers import DynamicCache, set_seed

import hfblend
from hfblend import Prompt
from hfblend.generate.hand_over import GrowingLayer

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PAD = 0
SHARED = make_prompt()  # its chunks stand in SHUFFLED too, in another order
SHUFFLED = make_prompt(order=(2, 0, 1))
LONG = make_prompt((40, 25), prefix=7, suffix=30, seed=2)
PROMPTS = [SHARED, LONG, SHUFFLED]


def stock_inputs(prompts):
    """What a user without hfblend would pass."""
    return {name: value for name, value in Prompt.batch(prompts, pad_token_id=PAD).items() if name != "chunk_spans"}


def together(model, prompts, **kwargs):
    return generate(model, Prompt.batch(prompts, pad_token_id=PAD), **kwargs)


def row_of(output, row):
    """The logits (1, V) of every step of a row."""
    return [step[row : row + 1] for step in output.logits]


def far_apart(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other))


@pytest.mark.parametrize("make", [make_llama, make_mistral])
@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_rows_equal_the_rows_run_alone(make, selection, ratio):
    model = shared(make)
    with hfblend.patch(model, config=config(ratio, selection=selection)) as blender:
        alone = []
        for prompt in PROMPTS:
            output = generate(model, prompt.inputs())
            alone.append((output, blender.trace))
        blender.store.clear()
        batch = together(model, PROMPTS)
        assert [trace.hits for trace in blender.traces] == [trace.hits for _, trace in alone]
        for row, (output, trace) in enumerate(alone):
            assert trace.blended
            assert blender.traces[row].blended
            assert torch.equal(blender.traces[row].selected_idx, trace.selected_idx)
            assert blender.traces[row].computed_pairs == trace.computed_pairs
            length, padding = len(PROMPTS[row]), len(LONG) - len(PROMPTS[row])
            for many, one in zip(batch.past_key_values.layers, output.past_key_values.layers):
                if isinstance(many, GrowingLayer):  # the prompt's own K/V, bit by bit
                    assert torch.equal(many.keys[row, :, padding : padding + length], one.keys[0, :, :length])
                    assert not many.keys[row, :, :padding].any()
            assert far_apart(row_of(batch, row), row_of(output, 0)) <= 1e-4
            new = slice(-len(output.logits), None)
            assert torch.equal(batch.sequences[row, new], output.sequences[0, new])


@pytest.mark.parametrize("make", [make_llama, make_mistral])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_true_kv_and_ratio_1_are_stock(make, ratio):
    model = shared(make)
    prompts, store = [SHARED, LONG], hfblend.MemoryStore()
    for prompt in prompts:
        store_of_true_kv(model, prompt, store=store)
    stock = generate(model, stock_inputs(prompts))
    with hfblend.patch(model, config=config(ratio), store=store) as blender:
        blended = together(model, prompts)
        assert [trace.hits for trace in blender.traces] == [3, 2]
    assert torch.equal(blended.sequences, stock.sequences)
    assert largest_difference(blended, stock) <= 1e-3


ONE_PROMPT_ONLY = {"draft_model", "prompt_lookup", "streamer"}  # stock `generate` takes them for one prompt


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ONE_PROMPT_ONLY])
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_every_mode_of_generate(make, mode):
    model, outputs = shared(make), []
    for patched in (False, True):
        inputs = Prompt.batch(PROMPTS, pad_token_id=PAD) if patched else stock_inputs(PROMPTS)
        arguments = MODES[mode]()
        blender = hfblend.patch(model, config=config(1.0)) if patched else None
        set_seed(0)
        own = "generation_config" in arguments
        outputs.append(model.generate(**inputs, **arguments) if own else generate(model, inputs, **arguments))
        if blender:
            assert all(trace.blended for trace in blender.traces)
            assert len(blender.traces) == len(PROMPTS)
            blender.remove()
    stock, blended = outputs
    assert torch.equal(blended.sequences, stock.sequences)
    assert largest_difference(blended, stock) <= 2e-4
    assert type(blended.past_key_values) is type(stock.past_key_values)


def test_one_padded_prompt():
    model = shared()
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), SHARED.input_ids], 1)
    spans = SHARED.chunk_spans.moved(3)
    stock = generate(model, {"input_ids": ids})
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": (ids != PAD).long()}):
        with hfblend.patch(model, config=config(0.2), store=store_of_true_kv(model, SHARED)) as blender:
            output = generate(model, {**inputs, "chunk_spans": spans})
            assert blender.trace.hits == 3
            assert blender.trace.num_tokens == len(SHARED)
        assert torch.equal(output.sequences, stock.sequences)
        assert largest_difference(output, stock) <= 1e-3


def test_a_second_turn_of_a_batch_is_stock():
    model, turns = shared(), []
    for patched in (False, True):
        blender = hfblend.patch(model, config=config(1.0)) if patched else None
        first = together(model, PROMPTS) if patched else generate(model, stock_inputs(PROMPTS))
        more = torch.tensor([[9, 8, 7]]).repeat(3, 1)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([stock_inputs(PROMPTS)["attention_mask"], torch.ones(3, ids.shape[1] - len(LONG))], 1)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        turns.append(generate(model, inputs, past_key_values=first.past_key_values))
        if blender:
            blender.remove()
    assert torch.equal(turns[0].sequences, turns[1].sequences)
    assert largest_difference(*turns) <= 2e-4


def test_equal_rows_are_blended_once():
    model, seen = shared(), []
    with hfblend.patch(model, config=config(0.2)) as blender:
        handle = model.model.layers[2].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
        output = together(model, [SHARED, LONG, SHARED], num_beams=2, max_new_tokens=2)
        handle.remove()
        assert blender.traces[0] is blender.traces[2] is not blender.traces[1]
    assert set(seen[:-1]) == {1}
    assert seen[-1] == 6
    assert torch.equal(output.sequences[0], output.sequences[2])


def test_a_prompt_without_chunks_is_prefilled_beside_the_others():
    model = shared()
    plain = Prompt(make_prompt(seed=5).input_ids, ())
    short = make_prompt((4,), seed=6)
    prompts = [plain, SHARED, short]
    stock = generate(model, stock_inputs(prompts))
    store = store_of_true_kv(model, SHARED)
    with hfblend.patch(model, config=config(0.2, min_reused_tokens=10), store=store) as blender:
        output = together(model, prompts)
        first, second, third = blender.traces
        assert (len(first.chunks), second.hits, len(third.chunks)) == (0, 3, 0)
        assert "no chunks" in first.notes[0]
        assert "min_reused_tokens" in third.notes[0]
        together(model, [plain, short])
        assert blender.trace.fallback == "no_chunks"
    assert torch.equal(output.sequences, stock.sequences)
    assert largest_difference(output, stock) <= 1e-3


def test_each_row_is_split_at_separators():
    model = shared()
    inputs = stock_inputs(PROMPTS)
    stock = generate(model, inputs)
    with hfblend.patch(model, config=config(1.0, separator=(5, 6))) as blender:
        output = generate(model, inputs)
        assert [len(trace.chunks) for trace in blender.traces] == [3, 2, 3]
    assert torch.equal(output.sequences, stock.sequences)


@pytest.mark.parametrize("masked", ["right", "hole", "whole row"])
def test_other_padding_falls_back(masked):
    model = shared()
    inputs = Prompt.batch(PROMPTS, pad_token_id=PAD)
    mask = inputs["attention_mask"]
    if masked == "right":
        mask[1, -2:] = 0
    elif masked == "hole":
        mask[1, 3] = 0
    else:
        mask[1] = 0
    stock = generate(model, {k: v for k, v in inputs.items() if k != "chunk_spans"})
    with hfblend.patch(model, config=config(0.2)) as blender:
        output = generate(model, inputs)
        assert blender.trace.fallback == "padding"
        assert len(blender.traces) == 1
    assert torch.equal(output.sequences, stock.sequences)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_prompts_of_different_rope_regimes_fall_back(rope):
    """Alone, the short one has other frequencies than stock gives it beside the long one."""
    model, short = make_llama(rope), make_prompt((12, 10), suffix=4, seed=2)
    stock = generate(model, stock_inputs([SHARED, short]))
    model = make_llama(rope)  # its rotary module remembers the longest prompt
    with hfblend.patch(model, config=config(0.2)) as blender:
        output = together(model, [SHARED, short])
        assert blender.trace.fallback == "rope_regimes"
        assert torch.equal(output.sequences, stock.sequences)
        together(model, [short, make_prompt((8, 9), suffix=4, seed=3)])
        assert blender.trace.blended or rope == "dynamic"  # which stays grown


def test_a_model_that_counts_padding_falls_back():
    """It is given no positions, so its decoding would go on from others than blended KV has."""
    model = make_llama()
    own = model.forward

    @functools.wraps(own)
    def forward(*args, position_ids=None, **kwargs):
        return own(*args, **kwargs)

    model.forward = forward
    stock = generate(model, stock_inputs(PROMPTS))
    with hfblend.patch(model, config=config(0.2)) as blender:
        output = together(model, PROMPTS)
        assert blender.trace.fallback == "positions"
        assert torch.equal(output.sequences, stock.sequences)
        together(model, [SHARED, SHUFFLED])  # of one length
        assert blender.trace.blended


def test_spans_that_do_not_fit_the_batch_are_refused():
    model, inputs = shared(), Prompt.batch(PROMPTS, pad_token_id=PAD)
    with hfblend.patch(model, config=config(0.2)):
        for spans, words in [
            (SHARED.chunk_spans, "one prompt for a batch of 3"),
            (list(SHARED.chunk_spans), "one prompt for a batch of 3"),
            ([SHARED.chunk_spans] * 2, "of 2 prompts for a batch of 3"),
            ([p.chunk_spans for p in (make_prompt((9,), prefix=0, separator=()), LONG, SHUFFLED)], "in the padding"),
            ([[(1, 2, 3)], [], []], "start, stop"),
        ]:
            with pytest.raises(ValueError, match=words):
                generate(model, {**inputs, "chunk_spans": spans})
    with pytest.raises(ValueError, match="pad_token_id"):
        Prompt.batch(PROMPTS, pad_token_id=None)
    with pytest.raises(ValueError, match="at least one prompt"):
        Prompt.batch([], pad_token_id=0)


def test_a_cache_of_ones_own_takes_a_batch():
    model = shared(make_mistral)
    stock = generate(model, stock_inputs(PROMPTS), past_key_values=DynamicCache(config=model.config))
    with hfblend.patch(model, config=config(1.0)):
        blended = together(model, PROMPTS, past_key_values=DynamicCache(config=model.config))
    assert torch.equal(blended.sequences, stock.sequences)
    for one, other in zip(blended.past_key_values.layers, stock.past_key_values.layers):
        assert type(one) is type(other)
        assert one.keys.shape == other.keys.shape


def test_verification_checks_every_prompt_of_a_batch():
    model = shared()
    with hfblend.patch(model, config=config(1.0), verify=1) as blender:
        together(model, [SHARED, LONG])
        assert all(trace.verification["kl"] < 1e-6 for trace in blender.traces)
