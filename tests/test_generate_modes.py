"""Every mode of `generate`: blended at ratio 1, and with true KV from elsewhere at ratio 0.2, equals stock."""

from __future__ import annotations

import functools
import logging

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
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, pipeline, set_seed
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hfblend
from hfblend.generate.fallbacks import Fallback
from hfblend.generate.hand_over import GrowingLayer
from hfblend.model.compiled import run_as_written

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
IDS = PROMPT.input_ids


class Collect(BaseStreamer):
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value.flatten().tolist())

    def end(self):
        self.calls.append("end")


class NotSeven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 7::3] = -1e9
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


def draft_model():
    return make_llama(heads="mqa")


# name -> a function that makes the keyword arguments of one call (fresh each time)
MODES = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": lambda: {"num_beams": 3},
    "beam_sampling": lambda: {"num_beams": 2, "do_sample": True},
    "num_return_sequences": lambda: {"do_sample": True, "num_return_sequences": 3},
    "beams_and_returns": lambda: {"num_beams": 4, "num_return_sequences": 2},
    "streamer": lambda: {"streamer": Collect()},
    "stopping_criteria": lambda: {"stopping_criteria": StoppingCriteriaList([StopAt(len(PROMPT) + 3)])},
    "logits_processor": lambda: {"logits_processor": LogitsProcessorList([NotSeven()])},
    "repetition_penalty": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores": lambda: {"output_scores": True},
    "static_cache": lambda: {"cache_implementation": "static"},
    "own_dynamic_cache": lambda: {"past_key_values": DynamicCache()},
    "draft_model": lambda: {"assistant_model": draft_model()},
    "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "chunked_prefill": lambda: {"prefill_chunk_size": 16},
    "generation_config": lambda: {"generation_config": GenerationConfig(max_new_tokens=8, do_sample=False,
                                  output_logits=True, return_dict_in_generate=True, prefill_chunk_size=16)},
    "guidance": lambda: {"guidance_scale": 1.5},
    "single_token": lambda: {"max_new_tokens": 1},
}  # fmt: skip


def run(model, inputs, make_arguments):
    arguments = make_arguments()
    set_seed(0)
    if "generation_config" in arguments:
        output = model.generate(**inputs, **arguments)
    else:
        output = generate(model, inputs, **arguments)
    return output, getattr(arguments.get("streamer"), "calls", None)


def check(model, mode, settings, store, tolerance, expected_hits):
    stock, stock_stream = run(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, MODES[mode])
    with hfblend.patch(model, config=settings, store=store) as blender:
        blended, stream = run(model, PROMPT.inputs(), MODES[mode])
        trace = blender.trace
        assert trace.blended, trace
        assert trace.hits == expected_hits
        if settings.recomputes_all:  # drafted tokens ride in the prefill, so T may be longer than the prompt
            assert trace.computed_pairs == trace.num_tokens * trace.num_layers
        assert torch.equal(blended.sequences, stock.sequences)
        assert stream == stock_stream
        assert trace.ttft_ms > 0
    if mode not in ("draft_model", "prompt_lookup"):
        assert largest_difference(blended, stock) <= tolerance
    for name in ("scores", "sequences_scores"):
        if getattr(stock, name, None) is not None:
            for one, other in zip(getattr(blended, name), getattr(stock, name)):
                assert torch.allclose(one, other, atol=tolerance)
    assert type(blended.past_key_values) is type(stock.past_key_values)
    assert int(blended.past_key_values.get_seq_length()) == int(stock.past_key_values.get_seq_length())


@pytest.mark.parametrize("mode", MODES)
def test_blended_ahead_of_stock_generate(mode, monkeypatch):
    """As on a GPU, where blending starts before stock `generate` prepares itself; drafts make it start later."""
    monkeypatch.setattr(hfblend.patching.Blender, "_blends_ahead", lambda self: True)
    check(shared(), mode, config(1.0), None, 1e-4, 0)


def test_what_was_blended_ahead_is_dropped_where_it_does_not_fit(monkeypatch):
    """Draft tokens behind the prompt, had they not been foreseen: blended again, and counted once."""
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs())
        expected, _ = run(model, PROMPT.inputs(), MODES["draft_model"])
        trace = blender.trace
        monkeypatch.setattr(hfblend.patching.Blender, "_blends_ahead", lambda self: True)
        monkeypatch.setattr(hfblend.generate.call, "_WAIT_FOR", set())
        output, _ = run(model, PROMPT.inputs(), MODES["draft_model"])
        assert torch.equal(output.sequences, expected.sequences)
        assert blender.trace.num_tokens == trace.num_tokens > len(PROMPT)
        assert (blender.trace.hits, blender.trace.computed_pairs) == (3, trace.computed_pairs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_ratio_1_is_stock(make, mode):
    check(shared(make), mode, config(1.0), hfblend.MemoryStore(), 2e-4, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_true_kv_from_elsewhere_is_stock(make, mode):
    model = shared(make)
    check(model, mode, config(0.2), store_of_true_kv(model, PROMPT), 1e-3, 3)


@pytest.mark.parametrize("mode", ["greedy", "draft_model", "beams"])
def test_a_prompt_that_ends_in_a_chunk(mode):
    """Its last token is computed, and draft tokens behind it ride along."""
    model, prompt = shared(), make_prompt(suffix=0, separator=())
    stock, _ = run(model, {"input_ids": prompt.input_ids}, MODES[mode])
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, prompt)) as blender:
        blended, _ = run(model, prompt.inputs(), MODES[mode])
        assert blender.trace.hits == 3
        assert len(prompt) - 1 in blender.trace.fresh_idx
        assert torch.equal(blended.sequences, stock.sequences)


def test_fp8_quantised_cache():
    model = shared()
    arguments = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    try:
        stock = generate(model, {"input_ids": IDS}, **arguments)
    except (ValueError, KeyError, TypeError) as error:
        pytest.skip(f"this Transformers has no fp8 cache: {error}")
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = generate(model, PROMPT.inputs(), **arguments)
        assert blender.trace.blended
        assert torch.equal(blended.sequences, stock.sequences)


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_second_turn_on_a_returned_cache_is_stock(make):
    model = shared(make)
    turns = []
    for patched in (False, True):
        blender = hfblend.patch(model, config=config(1.0)) if patched else None
        first = generate(model, PROMPT.inputs() if patched else {"input_ids": IDS})
        follow_up = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], 1)
        turns.append(generate(model, {"input_ids": follow_up}, past_key_values=first.past_key_values))
        if blender:
            assert blender.trace.fallback in ("filled_cache", "no_chunks", "too_few_tokens")
            assert isinstance(first.past_key_values.layers[0], GrowingLayer) == (make is make_llama)
            blender.remove()
    assert torch.equal(turns[0].sequences, turns[1].sequences)
    assert largest_difference(*turns) <= 2e-4


def test_what_inference_mode_made_is_continued_outside_it():
    model = shared()
    stock = generate(model, {"input_ids": IDS})
    with hfblend.patch(model, config=config(0.2), store=store_of_true_kv(model, PROMPT)) as blender:
        with torch.inference_mode():
            inside = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        outside = generate(model, PROMPT.inputs())  # entries of one mode serve the other
        assert torch.equal(outside.sequences, stock.sequences)
        follow_up = torch.cat([inside.sequences, torch.tensor([[9, 8, 7]])], 1)
        generate(model, {"input_ids": follow_up}, past_key_values=inside.past_key_values)
        assert blender.trace.fallback is not None
    assert torch.equal(inside.sequences, stock.sequences)


def test_identical_rows_blend_once():
    model = shared()
    seen = []
    with hfblend.patch(model, config=config(0.2)) as blender:
        handle = model.model.layers[2].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]))
        generate(model, PROMPT.inputs(), num_beams=3, max_new_tokens=2)
        handle.remove()
        assert blender.trace.blended
    passes, decoding = seen[:-1], seen[-1]
    assert set(passes) == {1}
    assert decoding == 3


def test_the_wrapper_stays_out_of_a_compiled_graph():
    """A compiled forward is one graph (`fullgraph`), as static-cache decoding on a GPU needs."""
    model = make_llama()
    token = torch.tensor([[9]])
    with torch.no_grad():
        stock = model(input_ids=token).logits
        with hfblend.patch(model, config=config(1.0)):
            forward = torch.compile(model.forward, backend="eager", fullgraph=True)
            assert torch.equal(forward(input_ids=token).logits, stock)


def test_text_generation_pipeline_blends_at_separators(word_tokenizer):
    model = make_llama()
    text = "w9 w10 ## " + " ".join(f"w{i}" for i in range(20, 50)) + " ## w60 w61 w62 w63 ## w70 w71"
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    stock = generator(text, max_new_tokens=5, do_sample=False)
    with hfblend.patch(model, config=config(1.0, separator=" ## "), tokenizer=word_tokenizer) as blender:
        blended = generator(text, max_new_tokens=5, do_sample=False)
        assert blender.trace.blended
        assert len(blender.trace.chunks) == 2
    assert blended == stock


def test_text_generation_pipeline_finds_stored_texts(word_tokenizer):
    model = make_llama()
    document = " ".join(f"w{i}" for i in range(20, 60))
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    stock = generator(f"w9 w10 {document} w70 w71", max_new_tokens=5, do_sample=False)
    with hfblend.patch(model, config=config(1.0), tokenizer=word_tokenizer, find="stored") as blender:
        blender.precompute([document], prefix="w9 w10")
        assert generator(f"w9 w10 {document} w70 w71", max_new_tokens=5, do_sample=False) == stock
        assert (blender.trace.hits, blender.trace.misses) == (1, 0)


# --- the calls that fall back: exactly these, each with one line, each stock


def fallback_calls(model):
    ids, mask = IDS, torch.ones_like(IDS)
    padded = torch.cat([IDS, torch.zeros(1, 3, dtype=torch.long)], 1)
    embeds = model.model.embed_tokens(ids).detach()
    filled = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=ids[:, :-1], past_key_values=filled)
    plain = {"input_ids": ids, "attention_mask": mask}
    spans_of = {"chunk_spans": PROMPT.chunk_spans}
    return {
        "disabled": ({**plain, **spans_of}, {"blend_config": config(enabled=False)}),
        "no_input_ids": ({"inputs_embeds": embeds, "attention_mask": mask, **spans_of}, {}),
        "no_chunks": ({**plain, "chunk_spans": []}, {}),
        "too_few_tokens": ({**plain, **spans_of}, {"blend_config": config(min_reused_tokens=65)}),
        "padding": ({"input_ids": padded, "attention_mask": (padded != 0).long(), **spans_of}, {}),
        "filled_cache": ({**plain, **spans_of}, {"past_key_values": filled}),
        "no_cache": ({**plain, **spans_of}, {"use_cache": False}),
        "all_rows_wanted": ({**plain, **spans_of}, {"output_hidden_states": True}),
        "extra_inputs": ({**plain, **spans_of}, {"position_ids": torch.arange(len(PROMPT))[None]}),
    }


@pytest.mark.parametrize("name", fallback_calls(shared()))
def test_fallbacks_are_stock_and_say_so_in_one_line(name, caplog):
    model = shared()
    inputs, options = fallback_calls(model)[name]
    stock_options = {k: v for k, v in options.items() if k != "blend_config"}
    stock = generate(model, {k: v for k, v in inputs.items() if k != "chunk_spans"}, **stock_options)
    inputs, options = fallback_calls(model)[name]  # fresh caches
    with hfblend.patch(model, config=config(0.2)) as blender, caplog.at_level(logging.INFO, "hfblend"):
        output = generate(model, inputs, **options)
        assert blender.trace.fallback == name
        assert not blender.trace.blended
    lines = [r.getMessage() for r in caplog.records if r.name == "hfblend.patching"]
    assert lines == [f"Not blended, stock generate runs: {blender.trace.fallback_reason}"]
    assert blender.trace.fallback_reason.startswith(Fallback[name.upper()].reason)
    assert torch.equal(output.sequences, stock.sequences)
    assert largest_difference(output, stock) == 0.0


@pytest.mark.parametrize(
    ("settings", "fallback"),
    [({"use_cache": False}, "no_cache"), ({"output_hidden_states": True}, "all_rows_wanted"),
     ({"prefill_chunk_size": 16}, None)],
)  # fmt: skip
def test_a_generation_config_without_a_name_counts(settings, fallback):
    model = shared()
    common = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(IDS, GenerationConfig(**common, **settings))
    with hfblend.patch(model, config=config(1.0)) as blender:
        output = model.generate(IDS, GenerationConfig(**common, **settings), chunk_spans=PROMPT.chunk_spans)
        assert (blender.trace.blended, blender.trace.fallback) == (fallback is None, fallback)
        with pytest.raises(TypeError, match="generation_config"):
            model.generate(IDS, GenerationConfig(), generation_config=GenerationConfig())
    assert torch.equal(output.sequences, stock.sequences)
    assert largest_difference(output, stock) <= 2e-4


def test_training_mode_falls_back():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        model.train()
        generate(model, PROMPT.inputs())
        assert blender.trace.fallback == "training_mode"
        model.eval()
        generate(model, PROMPT.inputs())
        assert blender.trace.blended


def test_autocast_falls_back_and_leaves_the_store_as_it_is(caplog):
    """K/V would be of another dtype; in the model's own dtype it changes nothing of that."""
    bf16 = torch.autocast("cpu", torch.bfloat16)
    for dtype, fallback in ((torch.float32, "autocast"), (torch.bfloat16, None)):
        model = make_llama(dtype=dtype)
        with bf16:
            stock = generate(model, {"input_ids": IDS})
            blender = hfblend.patch(model, config=config(1.0))  # its self-test runs without
        assert blender.hf_model.dtype == dtype
        for hits in (0, 3):
            generate(model, PROMPT.inputs())
            assert (blender.trace.blended, blender.trace.hits) == (True, hits)
            with bf16:
                output = generate(model, PROMPT.inputs())
            assert blender.trace.fallback == fallback
            assert torch.equal(output.sequences, stock.sequences)
        blender.remove()
    model = make_llama()
    for run in (hfblend.blend, lambda *args: next(hfblend.steps(*args))):
        with bf16, pytest.raises(ValueError, match="autocast"):
            run(model, PROMPT)
    with bf16, pytest.raises(ValueError, match="autocast"):
        hfblend.prefill_chunk(model, [8, 9])


def test_early_exit_drafts_are_nested_and_stock():
    model = shared()
    stock = generate(model, {"input_ids": IDS}, assistant_early_exit=2)
    with hfblend.patch(model, config=config(1.0)) as blender:
        output = generate(model, PROMPT.inputs(), assistant_early_exit=2)
        assert torch.equal(output.sequences, stock.sequences)
        assert blender.trace.blended  # the trace is the outer call's
        assert blender.trace.computed_pairs == blender.trace.num_tokens * 4


def test_another_patched_model_blends_inside_a_call():
    """As a draft model, or from a logits processor: nested is what runs inside a call of the same model."""
    model, other = make_llama(), make_llama(heads="mqa")
    stock, stock_of_other = generate(model, {"input_ids": IDS}), generate(other, {"input_ids": IDS})
    found = []

    def ask_other(ids, scores):
        found.append((generate(other, PROMPT.inputs()), other_blender.trace))
        return scores

    with hfblend.patch(model, config=config(1.0)) as blender, hfblend.patch(other, config=config(1.0)) as other_blender:
        output = generate(model, PROMPT.inputs(), logits_processor=LogitsProcessorList([ask_other]), max_new_tokens=2)
        assert blender.trace.blended
        for answer, trace in found:
            assert trace.blended
            assert largest_difference(answer, stock_of_other) <= 2e-4
        assert torch.equal(output.sequences, stock.sequences[:, : len(PROMPT) + 2])
        output = generate(model, PROMPT.inputs(), assistant_model=other)
        assert (blender.trace.blended, blender.trace.hits) == (True, 3)
        assert torch.equal(output.sequences, stock.sequences)


@pytest.mark.thorough  # tracing a layer takes 15 seconds of a core
def test_compiled_layers_blend():
    """Hooks on them might not be looked at, so nothing is resumed or cut; the result is the same."""
    model = make_llama()
    store = store_of_true_kv(model, PROMPT)
    stock = generate(model, {"input_ids": IDS})
    for layer in model.model.layers[-1:]:  # tracing one takes seconds
        layer.compile(backend="eager", dynamic=True)
    settings = config(0.2, selection="kv_deviation")
    with hfblend.patch(model, config=settings, store=store) as blender:
        blended = generate(model, PROMPT.inputs())
        trace = blender.trace
        assert trace.hits == 3
        assert trace.computed_pairs == len(PROMPT) + 4 * (trace.selected_tokens + len(trace.fresh_idx))
        assert torch.equal(blended.sequences, stock.sequences)
        assert largest_difference(blended, stock) <= 1e-3


COMPILED = {
    "model.compile()": lambda model, **how: model.compile(**how),
    "model.forward": lambda model, **how: setattr(model, "forward", torch.compile(model.forward, **how)),
    "decoder.compile()": lambda model, **how: model.model.compile(**how),
    "decoder.forward": lambda model, **how: setattr(model.model, "forward", torch.compile(model.model.forward, **how)),
}


@pytest.mark.slow  # tracing takes seconds
@pytest.mark.parametrize("order", ["compiled, patched", "patched, compiled"])
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_models_blend_and_decode_compiled(what, order):
    torch._dynamo.reset()  # other tests' models count towards its limit
    model, ran = make_llama(), []
    store, stock = store_of_true_kv(model, PROMPT), generate(model, {"input_ids": IDS}, max_new_tokens=3)

    def backend(graph, inputs):
        def run(*args):
            ran.append(1)
            return graph(*args)

        return run

    if order == "compiled, patched":
        COMPILED[what](model, backend=backend, dynamic=True)
    with hfblend.patch(model, config=config(0.2), store=store) as blender:
        if order != "compiled, patched":
            COMPILED[what](model, backend=backend, dynamic=True)
        ran.clear()
        generate(model, PROMPT.inputs(), max_new_tokens=1)
        assert not ran  # the prompt's forward, blended
        output = generate(model, PROMPT.inputs(), max_new_tokens=3)
        assert len(ran) >= 2  # every other one
        assert blender.trace.hits == 3
        assert largest_difference(output, stock) <= 1e-3


@pytest.mark.slow
def test_a_forward_compiled_as_one_graph_blends():
    torch._dynamo.reset()
    model = make_llama()
    stock = generate(model, {"input_ids": IDS}, max_new_tokens=2)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with hfblend.patch(model, config=config(1.0)) as blender:
        output = generate(model, PROMPT.inputs(), max_new_tokens=2)
        assert blender.trace.blended
        assert largest_difference(output, stock) <= 1e-3


def test_compiled_code_is_put_back_by_the_last_and_after_an_error():
    model = make_llama()
    model.compile(backend="eager")
    model.model.forward = forward = torch.compile(model.model.forward, backend="eager")
    compiled = model._compiled_call_impl

    def is_compiled():
        return model._compiled_call_impl is compiled and model.model.forward is forward

    def outer():
        with pytest.raises(ZeroDivisionError):
            run_as_written((model, model.model), lambda: 1 / 0)
        assert model._compiled_call_impl is None
        assert model.model.forward == hfblend.model.compiled.as_written(forward)

    run_as_written((model, model.model), outer)
    assert is_compiled()
    with hfblend.patch(model, config=config(0.2)):
        with pytest.raises(ZeroDivisionError):
            generate(model, PROMPT.inputs(), logits_processor=[lambda ids, scores: 1 / 0])
        assert model._compiled_call_impl is compiled
    assert is_compiled()


def test_a_forward_that_never_meets_the_prompts_ids_falls_back():
    model = make_llama()
    stock = generate(model, {"input_ids": IDS})
    own = model.forward

    @functools.wraps(own)
    def forward(input_ids=None, **kwargs):
        return own(inputs_embeds=model.get_input_embeddings()(input_ids), **kwargs)

    with hfblend.patch(model, config=config(0.2)) as blender:
        model.forward = forward
        output = generate(model, PROMPT.inputs())
        del model.forward
        assert blender.trace.fallback == "not_reached"
        assert torch.equal(output.sequences, stock.sequences)


def test_every_fallback_has_a_test():
    tested = {*fallback_calls(shared()), "training_mode", "autocast", "nested", "not_reached"}
    tested |= {"adapters"}  # tests/test_adapters.py
    tested |= {"rope_regimes", "positions"}  # tests/test_batches.py
    tested |= {"model_changed", "continuous_batching"}  # tests/test_changed_models.py
    tested |= {"foreign_cache"}  # tests/test_caches.py
    assert tested == {fallback.name.lower() for fallback in Fallback}
