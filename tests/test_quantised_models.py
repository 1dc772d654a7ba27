"""Models whose weights are quantised: blended as others are, and never served another model's chunks.

On a CPU, of what these libraries offer there. `docs/models.md` says what was run, and what could not be.
"""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_prompt, store_of_true_kv
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hfblend
from hfblend.support.registry import model_of

PROMPT = make_prompt()
STOCK = {"input_ids": PROMPT.input_ids}
pytestmark = pytest.mark.slow

EXACT, ROUNDED = 3e-4, 0.5  # on logits of |10|; activations in 8 bits round otherwise as soon as a last bit differs


def torchao(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)())


def quanto(bits):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantoConfig

    return QuantoConfig(weights=bits)


def bitsandbytes(**settings):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings)


# name -> settings, largest difference of logits at ratio 1 and with true KV
KINDS = {
    "torchao int8 weights": (lambda: torchao("Int8WeightOnlyConfig"), EXACT),
    "torchao int8 weights and activations": (lambda: torchao("Int8DynamicActivationInt8WeightConfig"), ROUNDED),
    "torchao intx weights, int8 activations": (lambda: torchao("Int8DynamicActivationIntxWeightConfig"), ROUNDED),
    "torchao fp8 weights": (lambda: torchao("Float8WeightOnlyConfig"), EXACT),
    "quanto int8": (lambda: quanto("int8"), EXACT),
    "quanto int4": (lambda: quanto("int4"), EXACT),
    "bitsandbytes 8-bit": (lambda: bitsandbytes(load_in_8bit=True), ROUNDED),
    "bitsandbytes 4-bit": (
        lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        ROUNDED,  # computes in bfloat16 on a CPU
    ),
}


def make_wide():
    """Wide enough for every library's block sizes."""
    settings = make_llama().config.to_dict() | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def load(model, kind, folder):
    settings = KINDS[kind][0]()
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    return loaded.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_blends(kind, tmp_path):
    model, bound = load(make_wide(), kind, tmp_path), KINDS[kind][1]
    stock = generate(model, STOCK, max_new_tokens=1)
    for settings, store in ((config(1.0), None), (config(0.15), store_of_true_kv(model, PROMPT))):
        with hfblend.patch(model, config=settings, store=store) as blender:
            output = generate(model, PROMPT.inputs(), max_new_tokens=1)
            assert blender.trace.blended
            assert blender.trace.hits == (3 if store else 0)
            assert torch.equal(output.sequences, stock.sequences)
            assert largest_difference(output, stock) <= bound
            assert blender.hf_model.dtype == torch.float32
            generate(model, PROMPT.inputs(), max_new_tokens=1)
            assert blender.trace.hits == 3


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_a_quantised_model(kind, tmp_path):
    def digest(model):
        return model_of(model).fingerprint.digest

    one, again = (load(make_wide(), kind, tmp_path / f"{i}") for i in range(2))
    assert digest(one) == digest(again)
    tuned, scaled = make_wide(), make_wide()
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight[3, 5] += 0.5
        scaled.model.layers[2].mlp.up_proj.weight.mul_(2)  # the same integers, other scales
    others = [load(model, kind, tmp_path / f"{i}") for i, model in enumerate((tuned, scaled), 2)]
    assert len({digest(model) for model in (one, make_wide(), *others)}) == 4
    hf_model, before = model_of(one), digest(one)
    generate(one, STOCK)
    assert hf_model.fingerprint.current(one) == before
    with torch.no_grad():
        one.model.layers[1].input_layernorm.weight[3] += 1
    assert hf_model.fingerprint.current(one) != before


def test_a_weight_inside_a_tensor_subclass_that_changes_is_seen(tmp_path):
    model = load(make_wide(), "torchao int8 weights", tmp_path)
    taken = model_of(model).fingerprint
    before = taken.current(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.scale.mul_(2)
    assert taken.current(model) != before


def test_hqq_layers_put_in_by_hand():
    """Transformers 5.24 does not load hqq itself."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")

    def quantised(scale=1.0):
        model = make_wide()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(scale)
        settings = quantize.BaseQuantizeConfig(nbits=4, group_size=32)
        for layer in model.model.layers:
            for parent, name in ((layer.self_attn, "k_proj"), (layer.mlp, "up_proj")):
                linear = quantize.HQQLinear(getattr(parent, name), settings, compute_dtype=torch.float32, device="cpu")
                setattr(parent, name, linear)
        return model

    model = quantised()
    stock = generate(model, STOCK)
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        output = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        assert largest_difference(output, stock) <= EXACT
        digest = blender.hf_model.fingerprint.digest
    assert model_of(quantised()).fingerprint.digest == digest
    assert model_of(quantised(2.0)).fingerprint.digest != digest
