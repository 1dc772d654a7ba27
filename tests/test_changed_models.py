"""A model that is changed after `patch` is tested again, or falls back; what it answers is always its own."""

from __future__ import annotations

import copy
import functools
import logging
import types

import pytest
import torch
from families import FAMILIES
from helpers import config, generate, largest_difference, make_llama, make_mistral, make_prompt
from torch import nn
from transformers import LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig

import hfblend
from hfblend.support.registry import model_of

PROMPT = make_prompt()
STOCK = {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)}


def other():
    torch.manual_seed(7)
    return type(make_llama())(make_llama().config).eval()


def twin():
    """The same weights in other modules, with a config of their own."""
    return make_llama()


class Doubled(nn.Module):
    """Twice what another module gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner.eval()
        self.eval()

    def forward(self, *args, **kwargs):
        return 2 * self.inner(*args, **kwargs)


class Sees(nn.Module):
    """A layer whose output depends on tokens after a row: no chunk alone says what it does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, hidden_states, **kwargs):
        out = self.inner(hidden_states, **kwargs)
        return out + out.mean(1, keepdim=True)


def own_forward(module, change):
    before = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: change(before(*args, **kwargs)), module)


def swap_list(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1]).eval()
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i


# name -> a change of a Llama or a Mistral, in place
CHANGES = {
    "attention of another model": lambda m: setattr(m.model.layers[0], "self_attn", other().model.layers[0].self_attn),
    "attention of a twin": lambda m: setattr(m.model.layers[1], "self_attn", twin().model.layers[1].self_attn),
    "a layer": lambda m: m.model.layers.__setitem__(2, other().model.layers[2]),
    "layers in another order": swap_list,
    "mlp": lambda m: setattr(m.model.layers[1], "mlp", other().model.layers[1].mlp),
    "a wrapped mlp": lambda m: setattr(m.model.layers[1], "mlp", Doubled(m.model.layers[1].mlp)),
    "norm": lambda m: setattr(m.model.layers[1], "input_layernorm", Doubled(m.model.layers[1].input_layernorm)),
    "lm_head": lambda m: setattr(m, "lm_head", Doubled(m.lm_head)),
    "embeddings": lambda m: setattr(m.model, "embed_tokens", Doubled(m.model.embed_tokens)),
    "rotary": lambda m: setattr(m.model, "rotary_emb", make_llama("linear").model.rotary_emb),
    "rotary scaling": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.5),
    "layer sees all": lambda m: m.model.layers.__setitem__(1, Sees(m.model.layers[1])),
    "decoder": lambda m: setattr(m, "model", other().model),
    "forward of a layer's mlp": lambda m: own_forward(m.model.layers[2].mlp, lambda out: 2 * out),
    "forward of all norms": lambda m: [own_forward(one.post_attention_layernorm, lambda out: out.flip(-1))
                                       for one in m.model.layers],
    "scaling": lambda m: [setattr(one.self_attn, "scaling", 0.5) for one in m.model.layers],
    "scaling, a tensor": lambda m: [setattr(one.self_attn, "scaling", torch.tensor(0.5)) for one in m.model.layers],
    "epsilon": lambda m: [setattr(one.input_layernorm, "variance_epsilon", 0.5) for one in m.model.layers],
    "eager": lambda m: m.set_attn_implementation("eager"),
    "window": lambda m: setattr(m.config, "sliding_window", 8),
    "config": lambda m: [setattr(one, "config", copy.deepcopy(m.config)) for one in m.modules()
                         if hasattr(one, "config")],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_changed_after_patch(name):
    """One chunk behind its prefix is exact at every ratio, whether it was stored before or not."""
    make = make_mistral if name == "window" else make_llama
    prompt, answers = make_prompt(sizes=(40,), seed=3), []
    configs = [config(ratio, namespace=str(ratio)) for ratio in (0.0, 0.3, 1.0)]
    model = make()
    with hfblend.patch(model, config=configs[0]) as blender:
        for one in configs:
            generate(model, prompt.inputs(), blend_config=one)
            assert (blender.trace.blended, blender.trace.misses) == (True, 1)
        CHANGES[name](model)
        for one in configs:
            found = generate(model, prompt.inputs(), blend_config=one)
            answers.append(found)
            trace = blender.trace
            assert trace.blended or trace.fallback in ("model_changed", "not_reached")
            if name == "layer sees all":
                assert trace.fallback == "model_changed"
            elif name == "decoder":
                assert not trace.blended
            else:
                assert trace.blended
                again = generate(model, prompt.inputs(), blend_config=one)
                assert largest_difference(again, found) <= 1e-4
    stock = generate(model, {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)})
    for found in answers:
        assert largest_difference(found, stock) <= 1e-3
        assert torch.equal(found.sequences, stock.sequences)


def test_a_change_taken_back_finds_what_was_stored(caplog):
    model = make_llama()
    own, mlp = model.model.layers[0].self_attn, model.model.layers[1]
    with hfblend.patch(model, config=config(0.2)) as blender, caplog.at_level(logging.WARNING, "hfblend"):
        right = generate(model, PROMPT.inputs())
        model.model.layers[0].self_attn = other().model.layers[0].self_attn
        generate(model, PROMPT.inputs())
        assert (blender.trace.hits, blender.trace.misses) == (0, 3)
        model.model.layers[1] = Sees(mlp)
        for _ in range(2):
            generate(model, PROMPT.inputs())
            assert blender.trace.fallback == "model_changed"
            with pytest.raises(hfblend.UnsupportedModel):
                hfblend.blend(model, PROMPT)
        assert caplog.text.count("cannot be blended as it is now") == 1
        model.model.layers[0].self_attn, model.model.layers[1] = own, mlp
        found = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
    assert largest_difference(found, right) <= 2  # one is cold, with chunks in context; both are blends
    assert "forward" not in model.model.__dict__


@pytest.mark.parametrize("method", ["forward of the class", "generate of the class"])
def test_a_method_of_the_class_replaced_after_patch(method, monkeypatch):
    model = make_llama()
    stock = generate(model, STOCK)
    with hfblend.patch(model, config=config(1.0)) as blender:
        generate(model, PROMPT.inputs())
        if method == "forward of the class":
            kind = type(model.model.layers[0].mlp)
            own = kind.forward
            monkeypatch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
            found = generate(model, PROMPT.inputs())
            assert (blender.trace.blended, blender.trace.hits) == (True, 0)
            assert largest_difference(found, generate(model, {**STOCK, "chunk_spans": []})) <= 2e-4
            assert largest_difference(found, stock) > 0.1
        else:
            monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, *args, **kwargs: "mine")
            assert generate(model, PROMPT.inputs()) == "mine"
            assert blender.trace.fallback == "not_reached"


@pytest.mark.parametrize("fallback", [None, "model_changed"])
def test_the_decoders_class_is_replaced_after_patch(monkeypatch, fallback):
    """A forward that does not say what it takes is no decoder's."""
    model = make_llama()
    kind = type(model.model)
    with hfblend.patch(model, config=config(1.0)) as blender:
        generate(model, PROMPT.inputs())
        own = kind.forward

        def forward(self, *args, **kwargs):
            output = own(self, *args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * 0.5
            return output

        monkeypatch.setattr(kind, "forward", forward if fallback else functools.wraps(own)(forward))
        found = generate(model, PROMPT.inputs())
        assert blender.trace.fallback == fallback
    assert largest_difference(found, generate(model, STOCK)) <= 2e-4


def test_what_passes_do_to_a_model_is_no_change(monkeypatch):
    """Other threads' passes switch attention and replace forwards for a moment: the self-test does not run again."""
    model, tests = make_llama(), []
    with hfblend.patch(model, config=config(0.2, selection="kv_deviation")) as blender:
        monkeypatch.setattr(hfblend.support.registry, "_proved", lambda model: tests.append(1))
        hf_model = blender.hf_model
        seen = []
        handle = model.model.layers[3].register_forward_pre_hook(lambda m, a: seen.append(hf_model.look()[1]))
        for _ in range(2):
            generate(model, PROMPT.inputs())
        handle.remove()
        model.config.use_cache = False
        generate(model, PROMPT.inputs())
    assert len(seen) > 8
    assert not tests


STATEFUL = ["qwen2_vl", "gemma3_text", "gemma3n_text", "mixtral", "phi3", "deepseek_v3", "gpt_oss", "llama4_text"]


@pytest.mark.parametrize("family", [one for one in FAMILIES if one in STATEFUL])
def test_what_generate_leaves_in_a_model_is_no_change(monkeypatch, family):
    """Some models keep numbers of a prompt in their modules; the self-test does not run again for those."""
    model, tests = FAMILIES[family].make(), []
    with hfblend.patch(model, config=config(0.3)) as blender:
        monkeypatch.setattr(hfblend.support.registry, "_proved", lambda model: tests.append(1))
        for _ in range(2):
            generate(model, PROMPT.inputs(), max_new_tokens=2)
            assert blender.trace.blended
    assert not tests


# --- training mode


class Dropped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.inner(x))


TRAINED = {
    "model": lambda m: m,
    "decoder": lambda m: m.model,
    "layers": lambda m: m.model.layers,
    "a layer": lambda m: m.model.layers[2],
    "attention": lambda m: m.model.layers[0].self_attn,
    "mlp": lambda m: m.model.layers[3].mlp,
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_submodule_in_training_mode_falls_back(name):
    model = make_llama(attention_dropout=0.5)
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs())
        TRAINED[name](model).train()
        torch.manual_seed(0)
        found = generate(model, PROMPT.inputs())
        assert blender.trace.fallback == "training_mode"
        with pytest.raises(ValueError, match="eval"):
            hfblend.blend(model, PROMPT)
        torch.manual_seed(0)
        stock = generate(model, {**STOCK, "chunk_spans": []})
        assert largest_difference(found, stock) == 0
        model.eval()
        generate(model, PROMPT.inputs())
        assert (blender.trace.blended, blender.trace.hits) == (True, 3)


def test_one_dropout_in_training_mode():
    model = make_llama()
    model.model.layers[1].mlp = Dropped(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match="eval"):
        hfblend.patch(model)
    model.eval()
    with hfblend.patch(model, config=config(0.2)) as blender:
        model.model.layers[1].mlp.dropout.train()
        generate(model, PROMPT.inputs())
        assert blender.trace.fallback == "training_mode"
        model.model.layers[2].mlp = Dropped(model.model.layers[2].mlp)  # a new module is in training mode
        model.model.layers[1].eval()
        generate(model, PROMPT.inputs())
        assert blender.trace.fallback == "training_mode"
        model.eval()
        generate(model, PROMPT.inputs())
        assert blender.trace.blended


# --- two models around one decoder


def sharing(one):
    model = LlamaForCausalLM(one.config).eval()
    model.model = one.model
    return model


def sharing_layers(one):
    model = LlamaForCausalLM(one.config).eval()
    model.model.layers = one.model.layers
    return model


def sharing_a_layer(one):
    model = LlamaForCausalLM(one.config).eval()
    model.model.layers[2] = one.model.layers[2]
    return model


def with_peft(one):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(sharing(one), peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).eval()


def picture_model(one):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                              image_size=16, patch_size=8)  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=one.config)).eval()
    model.model.language_model = one.model
    return model


@pytest.mark.parametrize("make", [sharing, sharing_layers, sharing_a_layer, with_peft, picture_model])
@pytest.mark.parametrize("order", ["first", "second"])
def test_models_around_the_same_layers_are_refused(make, order):
    one = make_llama()
    two = make(one)
    first, second = (one, two) if order == "first" else (two, one)
    stock = generate(second, STOCK)
    blender = hfblend.patch(first, config=config(1.0))
    with pytest.raises(ValueError, match=r"decoder layers of another model|already patched"):
        hfblend.patch(second, config=config(1.0))
    generate(first, PROMPT.inputs())
    assert blender.trace.blended
    assert largest_difference(generate(second, STOCK), stock) == 0
    blender.remove()
    with hfblend.patch(second, config=config(1.0)) as blender:
        assert largest_difference(generate(second, PROMPT.inputs()), stock) <= 2e-4
        assert blender.trace.blended


def test_a_model_and_what_peft_makes_of_it_are_one():
    peft = pytest.importorskip("peft")
    model = make_llama()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    for one, two in ((model, wrapped), (wrapped, model)):
        blender = hfblend.patch(one, config=config(1.0))
        with pytest.raises(ValueError, match="already patched"):
            hfblend.patch(two)
        blender.remove()


# --- continuous batching


def test_continuous_batching_says_so_once(caplog):
    model = make_llama()
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=96, pad_token_id=0)
    ids = PROMPT.input_ids[0].tolist()

    small = {"continuous_batching_config": ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=128)}  # or all RAM

    def generated():
        return [one.generated_tokens for one in model.generate_batch([ids, ids[:20]], **small).values()]

    stock = generated()
    with hfblend.patch(model, config=config(0.2)) as blender, caplog.at_level(logging.WARNING, "hfblend"):
        generate(model, PROMPT.inputs())
        assert blender.trace.blended
        for _ in range(2):
            assert sorted(generated()) == sorted(stock)
            assert blender.trace.fallback == "continuous_batching"
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        with model.continuous_batching_context_manager(**small):
            assert blender.trace.fallback == "continuous_batching"
        assert caplog.text.count("continuous batching") == 1
        model.generation_config.continuous_batching_config = small["continuous_batching_config"]
        output = model.generate(PROMPT.input_ids, cache_implementation="paged", chunk_spans=PROMPT.chunk_spans)
        assert blender.trace.fallback == "continuous_batching"
        assert output.flatten()[: len(PROMPT)].tolist() == ids
    caplog.clear()
    assert sorted(generated()) == sorted(stock)
    assert "init_continuous_batching" not in model.__dict__
    assert "hfblend" not in caplog.text


def test_a_manager_from_before_patch_is_noticed(caplog):
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender, caplog.at_level(logging.WARNING, "hfblend"):
        for _ in range(2):
            with torch.no_grad(), pytest.raises(AttributeError):  # a cache that holds nothing
                model(PROMPT.input_ids, **{hfblend.model.hf_model.CACHE: cache})
        assert blender.trace.fallback == "continuous_batching"
    assert caplog.text.count("continuous batching") == 1


def test_hosts_notice_a_change_without_patch():
    model = make_llama()
    hfblend.blend(model, PROMPT)
    hf_model = model_of(model)
    digest = hf_model.fingerprint.digest
    model.model.layers[0].self_attn = other().model.layers[0].self_attn
    assert model_of(model) is hf_model
    assert hf_model.fingerprint.current(model) != digest
    assert not hf_model.attends_by_position
