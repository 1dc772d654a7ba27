"""Tests that take a self-test from memory get what it finds, and any model that differs is proved."""

from __future__ import annotations

import pytest
import torch
from helpers import MODELS, make_llama
from remembered_proofs import remembered

import hfblend
from hfblend.support.registry import TestedModel


def with_weight():
    model = make_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    return model


def with_setting():
    model = make_llama()
    model.model.layers[1].self_attn.scaling *= 2
    return model


def with_hook():
    model = make_llama()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)
    return model


def with_forward():
    model = make_llama()
    own = model.model.norm.forward
    model.model.norm.forward = lambda states: own(states)
    return model


def with_normed_keys():
    """What the self-test refuses."""
    model = make_llama()
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: output.cumsum(1))
    return model


OTHERS = {
    "heads": lambda: make_llama(heads="mha"),
    "dtype": lambda: make_llama(dtype=torch.bfloat16),
    "attention": lambda: make_llama(attn_implementation="eager"),
    "config": lambda: make_llama("linear"),
    "weight": with_weight,
    "setting": with_setting,
    "hook": with_hook,
    "forward": with_forward,
}
FACTS = (
    "rotations",
    "layouts",
    "dtype",
    "attends_by_position",
    "windows",
    "attends_to_cache",
    "layers_stand_alone",
    "reads_last_row_only",
)


@pytest.fixture
def proved(monkeypatch):
    """The models whose self-test ran."""
    prove, models = TestedModel._self_test, []

    def count(hf_model):
        models.append(hf_model.model)
        prove(hf_model)

    monkeypatch.setattr("remembered_proofs._found", {})
    monkeypatch.setattr(TestedModel, "_self_test", remembered(count))
    return models


def test_a_model_made_again_is_not_proved_again(proved):
    TestedModel(first := make_llama())
    TestedModel(make_llama())
    assert proved == [first]


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_differs_is_proved(name, proved):
    TestedModel(first := make_llama())
    TestedModel(other := OTHERS[name]())
    assert proved == [first, other]


def test_a_refused_model_is_refused_again(proved):
    for _ in range(2):
        with pytest.raises(hfblend.UnsupportedModel):
            TestedModel(with_normed_keys())
    assert len(proved) == 2


@pytest.mark.parametrize("name", MODELS)
def test_what_is_remembered_is_what_the_self_test_finds(name, proved):
    first, again = TestedModel(model := MODELS[name]()), TestedModel(MODELS[name]())
    assert proved == [model]
    assert all(getattr(first, fact) == getattr(again, fact) for fact in FACTS)
    assert vars(first).keys() == vars(again).keys()


@pytest.mark.usefixtures("remembered_proofs")
def test_a_test_that_replaces_code_has_models_proved(monkeypatch):
    assert TestedModel._self_test.__module__ == TestedModel.__module__
