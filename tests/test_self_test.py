"""The self-test passes wherever rounding is all that differs, in every precision, and refuses every wrong hypothesis.

TF32 is emulated on a CPU; `test_gpu.py` has the real one.
"""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from families import as_trained
from helpers import MODELS, make_llama, make_mistral
from made_up_families import MadeUpConfig, MadeUpForCausalLM
from rounding import PRECISIONS
from test_real_models import load_smollm
from transformers import AutoConfig, AutoModelForCausalLM

import hfblend
from hfblend.attention import switch as switching
from hfblend.model import layerwise
from hfblend.model import prefill as batched_prefill
from hfblend.model.hf_model import HFModel
from hfblend.support import rotations
from hfblend.support import self_test as proof
from hfblend.support.registry import TestedModel


def make(kind, **kwargs):
    settings = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    settings |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.15,
        **kwargs,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings, pad_token_id=0, eos_token_id=None)
    return as_trained(AutoModelForCausalLM.from_config(config)).eval()


def made_up(peculiarity):
    torch.manual_seed(0)
    return MadeUpForCausalLM(MadeUpConfig(peculiarity=peculiarity)).eval()


BOTH = ["sliding_attention", "full_attention"] * 3
CAPPED = {"sliding_window": 5, "attn_logit_softcapping": 0.5, "layer_types": BOTH}
SOUND = {
    **MODELS,
    "deep": lambda: make("llama", num_hidden_layers=20),
    "gemma2": lambda: make("gemma2", **CAPPED),  # in older Transformers with sdpa, which leaves the softcap out
    "gemma2, eager": lambda: make("gemma2", **CAPPED, attn_implementation="eager"),
    "gpt_oss": lambda: make("gpt_oss", sliding_window=5, num_local_experts=4, num_experts_per_tok=2, layer_types=BOTH),
    "qwen2": lambda: make("qwen2"),
    "qwen3_moe": lambda: make("qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
    "cohere2": lambda: make("cohere2", sliding_window=5, layer_types=BOTH),
    "yarn": lambda: make_llama("yarn"),
    "made up": lambda: made_up(None),
}


each_precision = pytest.mark.parametrize(
    "precision",
    [pytest.param(one, marks=() if one in ("fp32", "bf16") else pytest.mark.thorough) for one in PRECISIONS],
)


def self_tested(model, precision):
    """The self-test of a model in a precision, and what it found."""
    dtype, mode = PRECISIONS[precision]
    with mode():
        return TestedModel(model.to(dtype))


@functools.cache
def found_in_fp32(name):
    return self_tested(SOUND[name](), "fp32")


@each_precision
@pytest.mark.parametrize("name", SOUND)
def test_every_precision_finds_what_fp32_finds(name, precision):
    hf_model, exact = self_tested(SOUND[name](), precision), found_in_fp32(name)
    assert hf_model.rotations == exact.rotations
    assert hf_model.windows == exact.windows
    assert hf_model.attends_by_position
    assert hf_model.layers_stand_alone == exact.layers_stand_alone


@pytest.mark.smollm
@pytest.mark.parametrize(
    "precision",
    [pytest.param(one, marks=() if one in ("fp32", "bf16") else pytest.mark.slow) for one in PRECISIONS],
)
def test_real_weights_pass_in_every_precision(precision):
    hf_model = self_tested(load_smollm()[0], precision)
    assert {(r.slot, r.pairing, r.sign) for r in hf_model.rotations} == {(0, "half", 1)}
    assert hf_model.attends_by_position
    assert hf_model.layers_stand_alone


@each_precision
def test_what_is_allowed_is_a_few_times_what_stock_differs_from_itself(precision):
    """Moved to other positions, layers of a sound model change about as much as by the noise that was measured."""
    dtype, mode = PRECISIONS[precision]
    model = SOUND["deep"]().to(dtype)
    hf_model = HFModel(model)
    with mode():
        stock = layerwise.stock_steps(hf_model)
        _, shifted = hf_model.self_test_positions(layerwise.LENGTH)
        moved = layerwise.run_steps(hf_model, lambda: hf_model.run_stock(shifted), [None, *stock.hidden[1:]])
    assert all(torch.equal(moved.kv[i][1], stock.kv[i][1]) for i in stock.kv)
    for step in range(1, len(stock.hidden)):
        change = layerwise.apart(moved.hidden[step], stock.hidden[step])
        assert change <= max(4 * layerwise.apart(stock.again[0].hidden[step], stock.hidden[step]), 1e-5)
        assert stock.tolerance(step) <= 0.1


# --- what does not fit is refused in every precision


NO_ROTATION = "no rotation from the model's 1 rotary table"
PECULIAR = {
    "stretched": NO_ROTATION,  # keys grow with their position
    "scaled": NO_ROTATION,  # weights on turned keys
    "absolute": "keys and values both change",
    "absolute, late": "what comes out of it changes",  # learned positions added between layers
    "tempered": "what comes out of it changes",  # queries grow with their position
    "alibi": "what comes out of it changes",  # attention leans to keys by their absolute position
    "ordinal": "differ from a forward over all tokens",  # positions are counted, whatever position_ids says
    "bidirectional": "forwards over 13 and 16 tokens differ",
}


@each_precision
@pytest.mark.parametrize("peculiarity", PECULIAR)
def test_a_peculiar_model_is_refused(peculiarity, precision):
    with pytest.raises(hfblend.UnsupportedModel, match=PECULIAR[peculiarity]):
        self_tested(made_up(peculiarity), precision)


class Mixing(torch.nn.Module):
    """An MLP in which rows leak into each other, a little of their mean."""

    def __init__(self, inner, share):
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, x):
        return self.inner(x) + self.share * x.mean(1, keepdim=True)


def mixing_rows(share):
    model = make_llama()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp, share).eval()
    return model


def attention_of_an_eager_model():
    """In a model of SDPA, it gets no mask."""
    model, other = make_llama(), make_llama(attn_implementation="eager")
    model.model.layers[0].self_attn = other.model.layers[0].self_attn
    return model


LEAKING = {"eager": attention_of_an_eager_model, **{f"mean {a}": functools.partial(mixing_rows, a) for a in (0.3, 2.0)}}


@pytest.mark.parametrize("name", LEAKING)
def test_a_layer_in_which_a_token_sees_those_after_it_is_refused(name):
    with pytest.raises(hfblend.UnsupportedModel, match="forwards over 13 and 16 tokens differ"):
        self_tested(LEAKING[name](), "fp32")


def other_base(own):
    def tables(self, source, positions, regime):
        return own(self, source, (positions.float() * 1.1), regime)

    return tables


WRONG_ROTATIONS = {
    "pairing": lambda patch: patch.setattr(
        rotations, "_FORMS", tuple(f for f in rotations._FORMS if f[0] == "interleaved")
    ),
    "layout": lambda patch: patch.setattr(rotations, "_FORMS", (("half", "repeated"), ("half", "single"))),
    "sign": lambda patch: patch.setattr(rotations, "_SIGNS", (-1,)),
    "tables": lambda patch: patch.setattr(HFModel, "rotary_tables", other_base(HFModel.rotary_tables)),
    "one position off": lambda patch: patch.setattr(
        HFModel, "self_test_positions", one_off(HFModel.self_test_positions)
    ),
}


def one_off(own):
    def positions(self, count):
        first, shifted = own(self, count)
        return first + 1, shifted  # where the first forward did not run

    return positions


@each_precision
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "deep"])
@pytest.mark.parametrize("wrong", WRONG_ROTATIONS)
def test_a_wrong_rotation_is_refused(wrong, name, precision, monkeypatch):
    WRONG_ROTATIONS[wrong](monkeypatch)
    with pytest.raises(hfblend.UnsupportedModel, match="no rotation from the model's"):
        self_tested(SOUND[name](), precision)


@each_precision
def test_dimensions_that_turn_are_seen_where_biases_dwarf_them(precision):
    """In real models key biases of a hundred stand on dimensions that hardly turn."""
    model = make("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.view(2, 16)[:, [7, 15]] = 300.0
            layer.self_attn.q_proj.weight.view(4, 16, 64)[:, [7, 15]] *= 1e-3
            layer.self_attn.q_proj.bias.view(4, 16)[:, [7, 15]] *= 1e-3
    hf_model = self_tested(model, precision)
    assert all(rotation is not None for rotation in hf_model.rotations)


def without(function, name):
    """The function, its argument `name` always the default."""
    signature = inspect.signature(function)

    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.arguments.pop(name, None)
        return function(*given.args, **given.kwargs)

    return call


class PassOff(proof.Pass):
    """Rows that see one key too few."""

    def __init__(self, ids, rows, seen_from, length):
        super().__init__(ids, rows, seen_from - 1, length)


def blind_to(monkeypatch, name):
    monkeypatch.setattr(switching, "AttentionArgs", without(switching.AttentionArgs, name))


WRONG_ATTENTION = {
    "softcap": ("gemma2, eager", lambda patch: blind_to(patch, "softcap")),
    "sinks": ("gpt_oss", lambda patch: blind_to(patch, "sinks")),
    "window": ("gpt_oss", lambda patch: blind_to(patch, "sliding_window")),
    "window, of every layer": ("mistral-window", lambda patch: patch.setattr(proof, "_learn_windows", narrow)),
    "positions seen": ("llama-gqa", lambda patch: patch.setattr(proof, "Pass", PassOff)),
}


def narrow(hf_model):
    return dict.fromkeys(range(hf_model.num_layers), 3)


@each_precision
@pytest.mark.parametrize("wrong", WRONG_ATTENTION)
def test_wrong_attention_by_position_is_not_taken(wrong, precision, monkeypatch):
    name, mutate = WRONG_ATTENTION[wrong]
    model = SOUND[name]()
    assert self_tested(model, precision).attends_by_position
    mutate(monkeypatch)
    if wrong == "positions seen":  # of the model's own masks, too
        with pytest.raises(hfblend.UnsupportedModel, match="differ from a forward over all tokens"):
            self_tested(model, precision)
    else:
        assert not self_tested(model, precision).attends_by_position


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("step", "passes", "is_rounding"), [(3, 1, True), (-1, 1, True), (-1, 2, False)])
def test_layers_stand_alone_also_where_rounding_sends_a_row_to_other_experts(
    step, passes, is_rounding, precision, monkeypatch
):
    """The last row of the first passes that are shortened comes out of a layer as another one; not so in fp32."""
    own, shortened = proof._run_rows, []

    def run_rows(hf_model, stock, kv, of=proof.ROWS, entered=None):
        steps = own(hf_model, stock, kv, of, entered)
        if entered is not None and len(shortened) < passes:
            shortened.append(of)
            steps.hidden[step] = steps.hidden[step].clone()
            steps.hidden[step][..., -1, :] *= -1
        return steps

    monkeypatch.setattr(proof, "_run_rows", run_rows)
    hf_model = self_tested(SOUND["gpt_oss"](), precision)
    assert hf_model.attends_by_position
    assert hf_model.layers_stand_alone == (is_rounding and precision == "bf16")
    assert shortened


@each_precision
@pytest.mark.parametrize("by", [1, 40])
def test_rows_at_other_positions_are_refused(by, precision, monkeypatch):
    from hfblend.model import passes

    own = passes.until_stopped
    monkeypatch.setattr(passes, "until_stopped", lambda forward, ids, rows, *rest: own(forward, ids, rows + by, *rest))
    with pytest.raises(hfblend.UnsupportedModel, match="differ from a forward over all tokens"):
        self_tested(make_mistral(None), precision)


# --- chunks prefilled in one forward


@each_precision
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "deep"])
def test_a_batch_of_chunks_is_taken_where_only_rounding_differs(name, precision, monkeypatch):
    model = SOUND[name]()
    hf_model = self_tested(model, precision)
    chunks = [list(range(3, 3 + count)) for count in (9, 14)]
    with PRECISIONS[precision][1]():
        batched_prefill.prefill_together(hf_model, chunks, (), None)
        assert hf_model.prefills_in_batches
        own, hf_model.prefills_in_batches = batched_prefill.prefill_batch, None
        wrong = lambda hf_model, ids, *rest: own(hf_model, other_ids(ids) if len(ids) > 1 else ids, *rest)  # noqa: E731
        monkeypatch.setattr(batched_prefill, "prefill_batch", wrong)
        batched_prefill.prefill_together(hf_model, chunks, (), None)
        assert hf_model.prefills_in_batches is False


def other_ids(chunks):
    """A fault in one token."""
    return [[*ids[:3], ids[3] + 1, *ids[4:]] for ids in chunks]


def test_what_is_allowed_is_capped():
    assert layerwise.allowed(0.0) == 1e-3
    assert layerwise.allowed(2e-3) == pytest.approx(16e-3)
    assert layerwise.allowed(1.0) == 0.2
