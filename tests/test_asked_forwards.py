"""A forward inside `generate` that wants more than the last row of its prompt gets it: the call is stock then."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from helpers import config, make_llama, make_mistral, make_prompt, shared
from transformers import DynamicCache, LogitsProcessorList

import hfblend
from hfblend import Prompt
from hfblend.model.hf_model import CACHE

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
LENGTH = len(PROMPT)
SHORT = make_prompt(sizes=(11, 24), seed=5)


def outputs_of(*wanted, **given):
    """A loop whose first forward is asked for something; returns its outputs, and the next token's logits."""

    def run(model, ids, kwargs):
        cache = DynamicCache()
        output = model(ids, **{"use_cache": True, CACHE: cache, **given})
        output = dict(output) if hasattr(output, "items") else {"0": output[0]}
        step = model(ids[:, -1:], use_cache=True, **{CACHE: cache}).logits
        return [output.get(name) for name in wanted] + [output.get("logits", output.get("0")), step]

    return run


def decoder_alone(model, ids, kwargs):
    cache = DynamicCache()
    hidden = model.model(ids, use_cache=True, **{CACHE: cache})[0]
    return [model.lm_head(hidden), model(ids[:, -1:], **{CACHE: cache}).logits]


def forward_twice(model, ids, kwargs):
    first = model.forward(ids, **{CACHE: DynamicCache()})
    return [first.logits, model.forward(ids, logits_to_keep=1, **{CACHE: DynamicCache()}).logits]


def last_row_first(model, ids, kwargs):
    """The prompt is blended; what is asked later is stock."""
    first = model(ids, logits_to_keep=1, use_cache=True, **{CACHE: DynamicCache()})
    return [first.logits, model(ids, output_hidden_states=True, **{CACHE: DynamicCache()}).hidden_states]


def labels(model, ids, kwargs):
    output = model(ids, labels=ids, **{CACHE: DynamicCache()})
    return [output.loss, output.logits]


def labels_of_the_last(model, ids, kwargs):
    output = model(ids, labels=ids[:, -2:], logits_to_keep=2, **{CACHE: DynamicCache()})
    return [output.loss, output.logits]


def contrastive(model, ids, kwargs):
    output = model(**model.prepare_inputs_for_generation(ids, **kwargs), output_hidden_states=True, return_dict=True)
    return [output.logits, output.hidden_states]


def candidates(model, ids, kwargs):
    """As assisted decoding: drafts after the prompt, and as many logits as there are, and one."""
    ids = torch.cat([ids, torch.tensor([[9, 8, 7]] * len(ids))], 1)
    return [model(ids, logits_to_keep=4, use_cache=True, **{CACHE: DynamicCache()}).logits]


def more_than_candidates(model, ids, kwargs):
    ids = torch.cat([ids, torch.tensor([[9, 8, 7]] * len(ids))], 1)
    return [model(ids, logits_to_keep=5, use_cache=True, **{CACHE: DynamicCache()}).logits]


def stock_sampling(model, ids, kwargs):
    """A custom loop that does as `generate` does."""
    inputs = model.prepare_inputs_for_generation(ids, **kwargs)
    return [model(**inputs).logits, model.forward(**inputs).logits]


def embeddings(model, ids, kwargs):
    return [model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=1).logits]


def with_config(name, value, run):
    def changed(model, ids, kwargs):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        try:
            return run(model, ids, kwargs)
        finally:
            setattr(model.config, name, before)

    return changed


def hooked(run):
    """A hook that reads what the decoder returns."""

    def changed(model, ids, kwargs):
        seen = []
        handle = model.model.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
        try:
            return [*run(model, ids, kwargs), seen[0]]
        finally:
            handle.remove()

    return changed


HIDDEN = torch.ones(1, LENGTH, dtype=torch.long)
HIDDEN[0, 30:40] = 0
ONE = {"logits_to_keep": 1}
WANTS = "all_rows_wanted"

# name -> (the loop, the fallback; `None`: it blends)
LOOPS = {
    "all logits": (outputs_of(), WANTS),
    "logits_to_keep=0": (outputs_of(logits_to_keep=0), WANTS),
    "logits_to_keep=1": (outputs_of(logits_to_keep=1), None),
    "logits_to_keep=1, positional mask": (outputs_of(attention_mask=torch.ones_like(HIDDEN), **ONE), None),
    "logits_to_keep=2": (outputs_of(logits_to_keep=2), WANTS),
    "logits_to_keep=T": (outputs_of(logits_to_keep=LENGTH), WANTS),
    "logits_to_keep, a tensor": (outputs_of(logits_to_keep=torch.tensor([3, LENGTH - 1])), WANTS),
    "hidden states": (outputs_of("hidden_states", output_hidden_states=True, **ONE), WANTS),
    "attentions": (outputs_of("attentions", output_attentions=True, **ONE), WANTS),
    "hidden states, by config": (with_config("output_hidden_states", True, outputs_of("hidden_states", **ONE)), WANTS),
    "hidden states, not by config": (
        with_config("output_hidden_states", True, outputs_of(output_hidden_states=False, **ONE)), None),
    "a tuple": (outputs_of(return_dict=False, **ONE), None),
    "a tuple of all": (outputs_of(return_dict=False), WANTS),
    "no cache": (outputs_of(use_cache=False, **{CACHE: None}, **ONE), "no_cache"),
    "no cache, by config": (with_config("use_cache", False, outputs_of(**ONE, use_cache=None)), "no_cache"),
    "a mask with a gap": (outputs_of(attention_mask=HIDDEN, **ONE), "padding"),
    "a mask of pairs": (outputs_of(attention_mask=torch.ones(LENGTH, LENGTH).tril().bool()[None, None], **ONE),
                        "padding"),
    "positions with a gap": (
        outputs_of(position_ids=(torch.arange(LENGTH) + (torch.arange(LENGTH) > 40))[None], **ONE), "positions"),
    "positions that end right": (
        outputs_of(position_ids=torch.arange(LENGTH).clamp(min=5)[None], **ONE), "positions"),
    "the decoder alone": (decoder_alone, WANTS),
    "forward, twice": (forward_twice, WANTS),
    "the last row first": (last_row_first, None),
    "labels": (labels, WANTS),
    "labels of the last": (labels_of_the_last, WANTS),
    "contrastive": (contrastive, WANTS),
    "candidates": (candidates, None),
    "more than candidates": (more_than_candidates, WANTS),
    "as generate does": (stock_sampling, None),
    "embeddings": (embeddings, "not_reached"),
    "a hook on the decoder": (hooked(outputs_of(**ONE)), WANTS),
}  # fmt: skip


def flat(values):
    if values is None or torch.is_tensor(values):
        return [values]
    return [one for value in values for one in flat(value)]


def answers(model, inputs, loop, by):
    """What the loop finds, run as `custom_generate`, or by a wrapper that steps in when `generate` is asked."""
    found = []

    def run(model, ids, kwargs):
        with torch.no_grad():
            found.extend(loop(model, ids, kwargs))

    def custom(model, input_ids, generation_config=None, **kwargs):
        run(model, input_ids, kwargs)
        return input_ids

    def ask_first(ids, scores):
        return scores

    if by == "custom_generate":
        model.generate(**inputs, custom_generate=custom, max_new_tokens=4)
    else:
        own = type(model)

        class Wrapped(own):
            def generate(self, input_ids, attention_mask=None, **kwargs):
                run(self, input_ids, {"attention_mask": attention_mask, "cache": None, "logits_to_keep": 1})
                return input_ids

        model.__class__ = Wrapped
        try:
            model.generate(**inputs, logits_processor=LogitsProcessorList([ask_first]))
        finally:
            model.__class__ = own
    return flat(found)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_a_loop_gets_what_its_forward_asked_for(make, name):
    loop, fallback = LOOPS[name]
    model = shared(make, attn_implementation="eager") if make is make_llama else shared(make)
    if name == "attentions" and make is make_mistral:
        model = make_mistral()
        model.set_attn_implementation("eager")
    plain = {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)}
    stock = answers(model, plain, loop, "custom_generate")
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = answers(model, PROMPT.inputs(), loop, "custom_generate")
        assert (blender.trace.blended, blender.trace.fallback) == (fallback is None, fallback)
    assert len(found) == len(stock) > 0
    for one, other in zip(found, stock):
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and torch.allclose(one, other, atol=2e-4))


@pytest.mark.parametrize("name", ["all logits", "hidden states", "logits_to_keep=1", "the decoder alone"])
def test_a_subclass_with_a_generate_of_its_own(name):
    loop, fallback = LOOPS[name]
    model = make_llama()
    own = type(model)

    class Wrapped(own):
        def generate(self, input_ids, attention_mask=None, **kwargs):
            with torch.no_grad():
                return flat(loop(self, input_ids, {}))

    model.__class__ = Wrapped
    stock = model.generate(PROMPT.input_ids)
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = model.generate(**PROMPT.inputs())
        assert blender.trace.fallback == fallback
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(found, stock))


def test_a_batch_with_drafts_is_stock():
    model, inputs = shared(), Prompt.batch([PROMPT, PROMPT], pad_token_id=0)
    drafts = torch.tensor([[9, 8], [20, 30]])

    def loop(model, ids, kwargs):
        ids = torch.cat([ids, drafts], 1)
        return [model(ids, logits_to_keep=3, use_cache=True, **{CACHE: DynamicCache()}).logits]

    stock = answers(model, {k: v for k, v in inputs.items() if k != "chunk_spans"}, loop, "custom_generate")
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = answers(model, inputs, loop, "custom_generate")
        assert blender.trace.fallback == WANTS
    assert torch.allclose(found[0], stock[0], atol=2e-4)


@pytest.mark.parametrize("mask", ["given", "none", "of ones"])
def test_padding_is_what_the_call_said(mask):
    model, prompts = shared(), [PROMPT, SHORT]
    inputs = Prompt.batch(prompts, pad_token_id=0)
    given = {"given": inputs["attention_mask"], "none": None, "of ones": torch.ones_like(inputs["attention_mask"])}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def loop(model, ids, kwargs):
        asked = {"attention_mask": given[mask], "position_ids": positions, "logits_to_keep": 1, CACHE: DynamicCache()}
        return [model(ids, use_cache=True, **asked).logits]

    stock = answers(model, {k: v for k, v in inputs.items() if k != "chunk_spans"}, loop, "custom_generate")
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = answers(model, inputs, loop, "custom_generate")
        assert blender.trace.fallback == (None if mask == "given" else "padding")
    assert torch.allclose(found[0], stock[0], atol=2e-4)


@pytest.mark.parametrize("fallback", [None, WANTS])
def test_a_model_that_cannot_be_asked_for_some_logits(fallback):
    """Transformers' own loops read the last row of its logits; any other loop may read all of them."""
    model = make_llama()
    own = type(model)

    class Plain(own):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None, **kwargs):
            output = self.model(input_ids, attention_mask, position_ids, use_cache=use_cache, **{CACHE: cache})
            output["logits"] = self.lm_head(output.last_hidden_state)
            return output

    if CACHE != "cache":
        pytest.skip("the forward is written for Transformers 5.24")
    model.__class__ = Plain
    arguments = {"max_new_tokens": 3, "do_sample": False}

    def loop(model, ids, kwargs):
        return [model(ids, cache=DynamicCache(), use_cache=True).logits]

    def run(inputs):
        if fallback:
            return answers(model, inputs, loop, "custom_generate")[0]
        return model.generate(**inputs, **arguments)

    stock = run({"input_ids": PROMPT.input_ids})
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = run(PROMPT.inputs())
        assert blender.trace.fallback == fallback
    assert torch.allclose(found, stock, atol=2e-4)


def test_what_was_blended_ahead_is_given_up(monkeypatch):
    """As on a GPU, where a loop of a subclass is seen only when its forward comes."""
    monkeypatch.setattr(hfblend.patching.Blender, "_blends_ahead", lambda self: True)
    monkeypatch.setattr(hfblend.generate.call, "_WAIT_FOR", set())
    test_a_loop_gets_what_its_forward_asked_for(make_llama, "hidden states")
    test_a_loop_gets_what_its_forward_asked_for(make_llama, "logits_to_keep=1")


def test_the_log_has_one_line(caplog):
    model = make_llama()
    with hfblend.patch(model, config=config(1.0)), caplog.at_level(logging.INFO, "hfblend"):
        answers(model, PROMPT.inputs(), LOOPS["all logits"][0], "custom_generate")
    assert [r.getMessage() for r in caplog.records if "Not blended" in r.getMessage()] == [
        f"Not blended, stock generate runs: {hfblend.generate.fallbacks.Fallback.ALL_ROWS_WANTED.reason}"
    ]


def test_generate_inside_a_forward_does_not_wait_for_itself():
    """From a hook: the model's forward holds what a pass would need alone."""
    model, found = make_llama(), []
    stock = model.generate(PROMPT.input_ids, max_new_tokens=2, do_sample=False)

    def ask(module, args):
        if not found:
            found.append(None)
            found.append(model.generate(**PROMPT.inputs(), max_new_tokens=2, do_sample=False))

    with hfblend.patch(model, config=config(1.0)) as blender, torch.no_grad():
        handle = model.model.layers[1].register_forward_pre_hook(ask)
        model(PROMPT.input_ids)
        handle.remove()
        assert blender.trace.num_tokens == 0
        with pytest.raises(RuntimeError, match="inside a forward"):
            blender.hf_model.lock.shared(hfblend.blend, model, PROMPT)
    assert torch.equal(found[1], stock)


def attention_of(model):
    return [layer.self_attn for layer in model.model.layers]


def set_all(modules, name, value):
    for module in modules:
        setattr(module, name, value)


def shorten(model):
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers = len(model.model.layers)


# name -> (what the loop does to the model before its forward, the fallback)
CHANGES = {
    "attention to all": (lambda model: set_all(attention_of(model), "is_causal", False), "model_changed"),
    "training mode": (lambda model: model.train(), "training_mode"),
    "a layer in training mode": (lambda model: model.model.layers[1].self_attn.train(), "training_mode"),
    "fewer layers": (shorten, "model_changed"),
    "a layer that does nothing": (
        lambda model: setattr(model.model.layers[1], "forward", lambda hidden, *args, **kwargs: hidden),
        "model_changed"),
    "another module": (lambda model: setattr(model.model.layers[1], "mlp", torch.nn.Identity()), "model_changed"),
    "a setting of the config": (lambda model: setattr(model.config, "rms_norm_eps", 0.5), "model_changed"),
    "another scaling": (lambda model: set_all(attention_of(model), "scaling", 0.01), "model_changed"),
    "weights": (lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(2), None),
}  # fmt: skip


def answer_of_changed(change, patched, by="custom_generate"):
    model = make_llama(attn_implementation="eager", attention_dropout=0.3)

    def loop(model, ids, kwargs):
        change(model)
        torch.manual_seed(0)
        return [model(ids, use_cache=True, **{CACHE: DynamicCache()}, **ONE).logits]

    if not patched:
        return answers(model, {"input_ids": PROMPT.input_ids}, loop, by)[0], None
    with hfblend.patch(model, config=config(1.0)) as blender:
        model.generate(**PROMPT.inputs(), max_new_tokens=2)
        return answers(model, PROMPT.inputs(), loop, by)[0], blender.trace.fallback


@pytest.mark.parametrize("name", CHANGES)
def test_a_loop_that_changes_the_model_before_its_forward(name):
    change, fallback = CHANGES[name]
    (stock, _), (found, why) = (answer_of_changed(change, patched) for patched in (False, True))
    assert why == fallback
    assert torch.allclose(found, stock, atol=2e-4)


def test_autocast_in_the_loop():
    model = make_llama()

    def loop(model, ids, kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return [model(ids, use_cache=True, **{CACHE: DynamicCache()}, **ONE).logits]

    stock = answers(model, {"input_ids": PROMPT.input_ids}, loop, "custom_generate")[0]
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = answers(model, PROMPT.inputs(), loop, "custom_generate")[0]
        assert blender.trace.fallback == "autocast"
    assert torch.equal(found, stock)


def test_autocast_in_a_forward_around_the_models_own():
    """As accelerate prepares a model for mixed precision."""
    model = make_llama()
    own = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return own(*args, **kwargs)

    model.forward = functools.wraps(own)(forward)
    options = {"max_new_tokens": 3, "do_sample": False}
    stock = model.generate(PROMPT.input_ids, **options)
    with hfblend.patch(model, config=config(1.0)) as blender:
        found = model.generate(**PROMPT.inputs(), **options)
        assert not blender.trace.blended
    assert torch.equal(found, stock)


def pooling(model):
    """A class whose head reads the mean of all rows."""
    own = type(model)

    class Pooling(own):
        def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
            kwargs.pop("position_ids", None)
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden = output.last_hidden_state
            output["logits"] = self.lm_head(hidden[:, -1:] + hidden.mean(1, keepdim=True))
            return output

    model.__class__ = Pooling


def adding_the_mean(model):
    """A forward around the model's own that asks for all logits."""
    own = model.forward

    def forward(*args, logits_to_keep=0, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(1, keepdim=True)
        return output

    model.forward = functools.wraps(own)(forward)


def untouched(model):
    own = model.forward
    model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))


def as_of_pytorch(work):
    work.__module__ = "torch.somewhere"
    return work


@pytest.mark.parametrize("when", ["before patch", "between two patches", "between two prompts"])
@pytest.mark.parametrize(("change", "fallback"), [(pooling, WANTS), (adding_the_mean, WANTS), (untouched, None)])
def test_a_model_that_reads_all_rows_of_its_decoder(change, fallback, when):
    model = make_llama()
    arguments = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if when == "between two patches":
        hfblend.patch(model, config=config(1.0)).remove()
    if when != "between two prompts":
        change(model)
    with hfblend.patch(model, config=config(1.0)) as blender:
        if when == "between two prompts":
            model.generate(**PROMPT.inputs(), **arguments)
            assert blender.trace.blended
            change(model)
        found = torch.stack(model.generate(**PROMPT.inputs(), **arguments).logits)
        assert blender.trace.fallback == fallback
        stock = torch.stack(model.generate(PROMPT.input_ids, **arguments).logits)
    assert torch.allclose(found, stock, atol=2e-4)


def hook_all(run):
    """A global hook that reads what the decoder returns."""

    def hooked(model, ids, kwargs):
        seen = []

        def read(module, args, output):
            if module is model.model:
                seen.append(output[0].clone())

        handle = torch.nn.modules.module.register_module_forward_hook(read)
        try:
            return [*run(model, ids, kwargs), seen[0]]
        finally:
            handle.remove()

    return hooked


def test_a_hook_on_all_modules_gets_all_rows(monkeypatch):
    monkeypatch.setitem(LOOPS, "a hook on all modules", (hook_all(outputs_of(**ONE)), WANTS))
    test_a_loop_gets_what_its_forward_asked_for(make_llama, "a hook on all modules")


READERS = {
    "after a layer": lambda model, read: model.model.layers[1].register_forward_hook(read),
    "before a layer": lambda model, read: model.model.layers[1].register_forward_pre_hook(read),
    "on the norm": lambda model, read: model.model.norm.register_forward_hook(read),
    "on embeddings": lambda model, read: model.model.embed_tokens.register_forward_hook(read),
    "before all": lambda model, read: torch.nn.modules.module.register_module_forward_pre_hook(read),
    "of PyTorch": lambda model, read: model.model.norm.register_forward_pre_hook(as_of_pytorch(lambda *args: None)),
    "on the head": lambda model, read: model.lm_head.register_forward_hook(read),
}


@pytest.mark.parametrize("where", READERS)
def test_hooks_inside_the_decoder_are_noted(where, caplog):
    model = make_llama()
    handle = READERS[where](model, functools.partial(lambda *args: None))
    try:
        with hfblend.patch(model, config=config(1.0)) as blender:
            for _ in range(2):
                model.generate(**PROMPT.inputs(), max_new_tokens=2, do_sample=False)
                noted = [note for note in blender.trace.notes if "Forward hooks" in note]
                assert blender.trace.blended
                assert len(noted) == (where not in ("of PyTorch", "on the head"))
    finally:
        handle.remove()
    assert sum("Forward hooks" in r.getMessage() for r in caplog.records) == len(noted)
