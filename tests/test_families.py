"""Every decoder family: exact where it must be, or refused with a reason. `docs/models.md` shows the same numbers."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, IS_OLDEST, LATER, NOT_BUILT, REFUSED
from family_checks import (
    ATTENTION,
    attention,
    batch,
    future_leak,
    ratio_1,
    realign_error,
    true_kv,
    window,
)
from helpers import config, make_llama
from made_up_families import MadeUpConfig, MadeUpForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hfblend
from hfblend.attention.switch import AttentionNotReplaceable, window_of
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

LOGITS, KEYS, LEAK = 5e-4, 2e-5, 2e-6
# beam scales queries by their position, so all that comes after a first layer depends on it a little, beside rotation.
KEYS_OF = {"beam": 1e-3}

# One of each peculiarity; all others are slow.
SAMPLED = (
    "cohere2", "deepseek_v2", "deepseek_v3", "doge", "falcon", "gemma2", "gemma3", "gemma3n_text", "gemma4_text",
    "gemma4_text short", "gpt_neox", "gpt_oss", "llama4_text tuned", "mpt", "nanochat", "phi3 longrope",
    "phi3 partial", "phimoe", "qwen2_moe", "qwen2_vl", "smollm3",
)  # fmt: skip
# Of those: latent attention, ALiBi, shared KV, sinks, two RoPE regimes, three rows of positions. Others are thorough.
QUICK = ("deepseek_v3", "falcon", "gemma3n_text", "gpt_neox", "gpt_oss", "mpt", "phi3 longrope", "qwen2_vl")


def _cases(names):
    marks = {name: () if name in QUICK else pytest.mark.thorough for name in SAMPLED}
    return [pytest.param(name, marks=marks.get(name, pytest.mark.slow)) for name in names]


def _here(*names):
    """Those that the installed Transformers has."""
    return [name for name in names if name in FAMILIES]


GREEN = [name for name in FAMILIES if name not in REFUSED and name not in NOT_BUILT]


def test_the_sample_is_of_families_that_pass():
    assert set(_here(*SAMPLED)) <= set(GREEN)


def test_no_family_is_left_out():
    """What Transformers can load as a causal LM is in the registry; a new family runs with its common settings."""
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(FAMILIES) | (LATER if IS_OLDEST else set())
    assert not REFUSED.keys() & NOT_BUILT.keys()


@pytest.mark.parametrize("name", _cases(GREEN))
def test_ratio_1_is_stock(name):
    assert ratio_1(FAMILIES[name]) <= LOGITS


@pytest.mark.parametrize("name", _cases(GREEN))
def test_true_kv_moved_and_blended_is_stock(name):
    for ratio, rule in ((0.0, "suffix_attention"), (0.3, "suffix_attention"), (0.3, "kv_deviation")):
        assert true_kv(FAMILIES[name], ratio, rule)[0] <= LOGITS


@pytest.mark.parametrize("name", _cases(GREEN))
def test_keys_are_moved_to_where_they_stand(name):
    assert realign_error(FAMILIES[name]) <= KEYS_OF.get(name, KEYS)


@pytest.mark.parametrize("name", _cases(GREEN))
def test_no_row_sees_the_future(name):
    assert future_leak(FAMILIES[name]) <= LEAK


@pytest.mark.slow
@pytest.mark.parametrize("name", GREEN)
@pytest.mark.parametrize("implementation", ATTENTION)
def test_each_attention_implementation_is_its_own_stock(name, implementation):
    difference = attention(FAMILIES[name], implementation)
    assert difference in ("n/a", "refused") or difference <= LOGITS


@pytest.mark.parametrize("implementation", ATTENTION)
def test_every_attention_implementation_blends_where_the_family_has_it(implementation):
    assert attention(FAMILIES["mistral"], implementation) <= LOGITS


# Prompts of two RoPE regimes; models that are given no positions, and so count the padding.
LEFT_TO_STOCK = {"phi3 longrope", "mpt", "moss_transcribe_diarize"}


@pytest.mark.parametrize("name", _cases(GREEN))
def test_a_batch_of_two_prompts_is_stock(name):
    difference = batch(FAMILIES[name])
    assert difference == "stock" if name in LEFT_TO_STOCK else difference <= LOGITS


@pytest.mark.parametrize("name", _here("gemma2", "gpt_oss", "mistral", "qwen2", "llama4_text"))
def test_windows_and_chunks_are_shorter_than_the_prompt(name):
    assert window(FAMILIES[name]) in ("24 of 88", "8 of 88")


def _refused():
    """Four for each reason; more of them are thorough."""
    names = _here(*REFUSED)
    alike = {name: [one for one in names if REFUSED[one] == REFUSED[name]] for name in names}
    return [pytest.param(name, marks=pytest.mark.thorough if alike[name].index(name) >= 4 else ()) for name in names]


@pytest.mark.parametrize("name", _refused())
def test_unfit_families_are_refused_with_the_reason(name):
    model = FAMILIES[name].make()
    with pytest.raises(hfblend.UnsupportedModel, match=re.escape(REFUSED[name])):
        hfblend.patch(model)


# --- what the self-test finds


def test_windows_are_those_of_the_masks_and_not_what_layers_say():
    """phimoe's layers say nothing of a window to their attention; their masks have one."""
    model = FAMILIES["phimoe"].make()
    assert not hasattr(model.model.layers[0].self_attn, "sliding_window")
    assert set(model_of(model).windows.values()) == {24}


def test_a_mask_that_is_no_window_is_left_to_the_model():
    def chunked(batch, head, row, key):
        return (key <= row) & (key // 16 == row // 16)

    def every_other(batch, head, row, key):
        return (key <= row) & ((row - key) % 2 == 0)

    for predicate in (chunked, every_other):
        with pytest.raises(AttentionNotReplaceable, match="neither causal nor a sliding window"):
            window_of(predicate)
    assert window_of(lambda batch, head, row, key: key <= row) is None
    assert window_of(lambda batch, head, row, key: (key <= row) & (key > row - 5)) == 5


@pytest.mark.skipif(IS_OLDEST, reason="the oldest Transformers cannot make masks of chunked attention ahead")
def test_chunks_and_masks_of_a_layers_own_are_left_to_the_model():
    for name in ("llama4_text", "doge"):
        assert not model_of(FAMILIES[name].make()).attends_by_position


def test_layers_that_need_those_before_them_are_not_skipped():
    assert not model_of(FAMILIES["gemma4_text short"].make()).layers_stand_alone
    assert model_of(make_llama()).layers_stand_alone


# --- families that no version of Transformers has


def made_up(**kwargs):
    torch.manual_seed(0)
    return MadeUpForCausalLM(MadeUpConfig(**kwargs)).eval()


class MadeUp:
    """As a `Family`."""

    @staticmethod
    def make():
        return made_up()


def test_a_new_family_needs_no_change():
    rotations = model_of(made_up()).rotations
    assert {(r.slot, r.pairing, r.layout, r.sign) for r in rotations} == {(0, "interleaved", "single", -1)}
    assert ratio_1(MadeUp) <= LOGITS
    assert true_kv(MadeUp, 0.3)[0] <= LOGITS
    assert realign_error(MadeUp) <= KEYS
    assert future_leak(MadeUp) <= LEAK


@pytest.mark.parametrize(
    ("peculiarity", "reason"),
    [
        ("stretched", "no rotation from the model's 1 rotary table"),  # keys grow with their position
        ("absolute", "keys and values both change"),
        ("ordinal", "differ from a forward over all tokens"),  # positions are counted, whatever position_ids says
        ("bidirectional", "forwards over 13 and 16 tokens differ"),
    ],
)
def test_a_new_family_that_does_not_fit_is_refused(peculiarity, reason):
    with pytest.raises(hfblend.UnsupportedModel, match=reason):
        hfblend.patch(made_up(peculiarity=peculiarity), config=config())
