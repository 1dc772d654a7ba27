"""peft: adapters are part of what KV is keyed by, and never serve each other."""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_prompt, store_of_true_kv

import hfblend
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

peft = pytest.importorskip("peft", reason="peft is not installed")

PROMPT = make_prompt()
STOCK = {"input_ids": PROMPT.input_ids}
QKV = ["q_proj", "k_proj", "v_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules=QKV),
    "dora": peft.LoraConfig(r=4, target_modules=QKV, use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "embeddings": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[8, 9]),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def randomise(model, name, seed):
    """Adapters begin without effect; these are far from that."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f".{name}." in f"{path}.":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def with_adapters(*names, kind="lora", **settings):
    """A `PeftModel` with such adapters, the first one active."""
    settings = CONFIGS[kind] if not settings else peft.LoraConfig(**settings)
    model = peft.get_peft_model(make_llama(), settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    for seed, name in enumerate(names):
        randomise(model, name, seed)
    return model.eval()


def key_of(model):
    hf_model = model_of(model)
    return hf_model.fingerprint.current(hf_model.model)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("patched", ["PeftModel", "base model"])
def test_a_model_with_an_adapter_blends(kind, patched):
    model = with_adapters("a", kind=kind)
    stock = generate(model, STOCK)
    assert largest_difference(stock, generate(make_llama(), STOCK)) > 0.1
    target = model if patched == "PeftModel" else model.get_base_model()
    with hfblend.patch(target, config=config(1.0)) as blender:
        output = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert largest_difference(output, stock) <= 2e-4
    with hfblend.patch(target, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        output = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        assert blender.trace.notes == []  # attention was recorded: the rule is the one asked for
        assert torch.equal(output.sequences, stock.sequences)
        assert largest_difference(output, stock) <= 3e-4


def test_each_adapter_has_its_own_chunks_and_finds_them_again():
    model = with_adapters("a", "b")
    base = generate(make_llama(), STOCK)
    with hfblend.patch(model, config=config(1.0)) as blender:

        def hits():
            output = generate(model, PROMPT.inputs())
            assert blender.trace.blended
            return blender.trace.hits, output

        seen = {}
        for turn in (0, 3):
            for name in "ab":
                model.set_adapter(name)
                found, seen[name] = hits()
                assert found == turn
            with model.disable_adapter():
                found, seen["none"] = hits()
                assert found == turn
    assert largest_difference(seen["none"], base) <= 2e-4
    assert largest_difference(seen["a"], seen["b"]) > 0.1


def test_no_adapter_is_served_what_another_made():
    """At ratio 0 nothing is recomputed: KV of "a" under "b" would show in the first logits."""
    settings = config(check_layers=(), recompute_ratios=())
    model, store = with_adapters("a", "b"), hfblend.MemoryStore()
    with hfblend.patch(model, config=settings, store=store):
        generate(model, PROMPT.inputs())
        model.set_adapter("b")
        shared = generate(model, PROMPT.inputs())
    with hfblend.patch(model, config=settings):  # a store in which "a" has never been
        alone = generate(model, PROMPT.inputs())
    assert largest_difference(shared, alone) == 0.0
    model.set_adapter("a")
    keys_of_a = {key for key in store._entries if key in keys_with(model, settings)}
    model.set_adapter("b")
    keys_of_b = {key for key in store._entries if key in keys_with(model, settings)}
    assert len(keys_of_a) == len(keys_of_b) == 4  # prefix and three chunks
    assert not keys_of_a & keys_of_b


def keys_with(model, settings):
    store = hfblend.MemoryStore()
    hfblend.blend(model, PROMPT, store=store, config=settings)
    return set(store._entries)


def test_keys_follow_what_acts_and_nothing_else():
    base, model = key_of(make_llama()), with_adapters("a")
    alone = key_of(model)
    assert alone != base
    model.add_adapter("b", CONFIGS["lora"])
    randomise(model, "b", 1)
    assert key_of(model) == alone  # loaded, not acting
    model.set_adapter("b")
    of_b = key_of(model)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mixed", combination_type="linear")
    model.set_adapter("mixed")
    mixed = key_of(model)
    model.base_model.set_adapter(["a", "b"])
    both = key_of(model)
    assert len({base, alone, of_b, mixed, both}) == 5
    model.delete_adapter("b")
    model.set_adapter("a")
    assert key_of(model) == alone
    with model.disable_adapter():
        assert key_of(model) == base
    assert key_of(model) == alone
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("a", 0.5)
    assert key_of(model) != alone


def test_a_merged_adapter_is_a_model_of_its_own():
    model = with_adapters("a")
    alone, stock = key_of(model), generate(model, STOCK)
    with hfblend.patch(model, config=config(1.0)) as blender:
        generate(model, PROMPT.inputs())
        model.merge_adapter()
        merged = key_of(model)
        output = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert blender.trace.misses == 3
        assert largest_difference(output, stock) <= 1e-3
    assert merged not in (alone, key_of(make_llama()))
    unloaded = model.merge_and_unload()
    assert key_of(unloaded) == merged
    again = with_adapters("a")
    again.merge_adapter()
    with again.disable_adapter():  # the next forward takes them out of the weights first
        assert key_of(again) not in (merged, alone, key_of(make_llama()))


def test_weights_of_an_adapter_are_part_of_the_key():
    model = with_adapters("a")
    before = key_of(model)
    with torch.no_grad():
        model.get_base_model().model.layers[2].self_attn.k_proj.lora_B["a"].weight[1, 1] += 0.1
    assert key_of(model) != before


def test_adapters_with_names_that_begin_alike_are_told_apart():
    model = with_adapters("a", "a2")
    model.set_adapter("a2")
    before = key_of(model)
    randomise(model, "a2", 9)
    assert key_of(model) != before


def test_settings_that_no_weight_shows_are_part_of_the_key():
    one, other = (with_adapters("a", r=4, target_modules=QKV, use_rslora=use) for use in (False, True))
    assert largest_difference(generate(one, STOCK), generate(other, STOCK)) > 0.1
    assert key_of(one) != key_of(other)


def test_transformers_own_adapters(tmp_path):
    with_adapters("a", "b").save_pretrained(tmp_path)
    model = make_llama()
    base = key_of(model)
    with hfblend.patch(model, config=config(1.0)) as blender:
        for name in "ab":
            model.load_adapter(str(tmp_path / name), adapter_name=name)
        model.eval()
        for turn in (0, 3):
            for name in "ab":
                inject_set_adapter(model, name)
                output = generate(model, PROMPT.inputs())
                assert blender.trace.hits == turn
                assert largest_difference(output, generate(model, STOCK | {"chunk_spans": []})) <= 2e-4
        for layer in tuner_layers(model):
            layer.enable_adapters(False)
        assert key_of(model) == base


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


def inject_set_adapter(model, name):
    """What `model.set_adapter` does; Transformers 5.24 asks there for a peft that is not released yet."""
    for layer in tuner_layers(model):
        layer.set_adapter(name)


def test_a_saved_adapter_finds_its_chunks(tmp_path):
    model = with_adapters("a")
    model.save_pretrained(tmp_path)
    loaded = make_llama()
    loaded.load_adapter(str(tmp_path / "a"), adapter_name="a")
    loaded.eval()
    assert largest_difference(generate(model, STOCK), generate(loaded, STOCK)) <= 2e-4
    assert key_of(loaded) == key_of(model)


# --- refused


@pytest.mark.parametrize(
    "settings",
    [
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    ],
    ids=lambda settings: settings.peft_type.value,
)
def test_virtual_tokens_are_refused_and_never_lost(settings):
    base = make_llama()
    with hfblend.patch(base, config=config(1.0)):
        model = peft.get_peft_model(base, settings, adapter_name="a").eval()
        randomise(model, "a", 0)
        with pytest.raises(hfblend.UnsupportedModel, match="virtual tokens"):
            hfblend.patch(model)
        inside = generate(model, PROMPT.inputs())  # reaches the patched model
    assert largest_difference(inside, generate(model, STOCK)) <= 2e-4


def test_an_adapter_that_acts_in_part_of_a_prompt_is_refused():
    settings = {"r": 4, "target_modules": QKV, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    with pytest.raises(hfblend.UnsupportedModel, match="aLoRA"):
        hfblend.patch(with_adapters("a", **settings))
    model = with_adapters("b", r=4, target_modules=QKV, task_type="CAUSAL_LM")
    model.add_adapter("a", peft.LoraConfig(**settings))
    with hfblend.patch(model, config=config(0.2)) as blender:
        model.set_adapter("a")
        generate(model, PROMPT.inputs())
        assert blender.trace.fallback == "adapters"
        model.set_adapter("b")
        generate(model, PROMPT.inputs())
        assert blender.trace.blended


@pytest.mark.parametrize("patched", ["PeftModel", "base model"])
def test_adapters_chosen_for_each_row_are_left_to_stock_generate(patched):
    model = with_adapters("a", "b")
    target = model if patched == "PeftModel" else model.get_base_model()
    stock = generate(model, STOCK, adapter_names=["b"])
    with hfblend.patch(target, config=config(0.2)) as blender:
        output = generate(model, PROMPT.inputs(), adapter_names=["b"])
        assert blender.trace.fallback == "adapters"
        assert largest_difference(output, stock) == 0.0
