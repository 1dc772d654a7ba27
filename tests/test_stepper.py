"""`hfblend.steps`: the same result as `blend` when nothing is replaced, and what is replaced is what goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import config, make_llama, make_mistral, make_prompt, store_of_true_kv

import hfblend
from hfblend.blend import selection
from hfblend.generate.stops import Step

pytestmark = pytest.mark.usefixtures("remembered_proofs")

NAMES = ["looked_up", "realigned", "scored", "selected", "recomputed", "generated"]


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def prompt():
    return make_prompt()


@pytest.fixture
def store(model, prompt):
    store = hfblend.MemoryStore()
    hfblend.blend(model, prompt, store=store, config=config())
    return store


def stepped(model, prompt, store=None, settings=None, **changes):
    """All steps of a prompt; `changes` are functions by the name of the step that they are given."""
    found = []
    for step in hfblend.steps(model, prompt, store=store, config=settings or config()):
        if step.name in changes:
            changes[step.name](step)
        found.append(step)
    return found


def last(*args, **kwargs):
    return stepped(*args, **kwargs)[-1]


def assert_same(result, expected):
    assert torch.equal(result.logits, expected.logits)
    for one, other in zip(result.cache.layers, expected.cache.layers):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    plain, expected_plain = result.trace.to_dict(), expected.trace.to_dict()
    plain.pop("phase_ms"), expected_plain.pop("phase_ms")
    assert plain == expected_plain


GRADUAL = {"selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.5, 0.25)}
FORMS = {
    "suffix_attention": config(),
    "kv_deviation": config(selection="kv_deviation"),
    "gradual": config(**GRADUAL),
    "mixed": config(selection="mixed", force_chunk_start=1),
    "full_reuse": config(check_layers=(), recompute_ratios=()),
    "ratio_0": config(0.0),
    "ratio_1": config(1.0),
    "in_context": config(on_miss="in_context"),
    "at_once": config(layerwise=False),
    "no_prefix": config(chunk_prefix="none"),
    "uncorrected": config(correction=None),
    "corrected": config(correction="offset"),
    "corrected_kv_deviation": config(correction="offset", selection="kv_deviation"),
    "corrected_gradual": config(correction="offset", **GRADUAL),
}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_replaced_equals_blend(model, prompt, form):
    expected = hfblend.blend(model, prompt, config=FORMS[form])
    steps = stepped(model, prompt, settings=FORMS[form])
    rounds = len(FORMS[form].check_layers) or 1
    assert [step.name for step in steps] == NAMES[:2] + ["scored"] * rounds + NAMES[3:]
    assert_same(steps[-1].result, expected)
    assert expected.trace.blended


@pytest.mark.parametrize("ask", [make_llama, make_mistral], ids=["llama", "mistral"])
def test_warm_store_and_answer(ask, prompt):
    model, store = ask(), hfblend.MemoryStore()
    expected = hfblend.blend(model, prompt, store=store, config=config())
    *_, generated = hfblend.steps(model, prompt, store=store, config=config(), max_new_tokens=8)
    assert torch.equal(generated.result.logits, expected.logits)
    assert generated.trace.hits == len(prompt.chunk_spans)
    output = model.generate(prompt.input_ids, past_key_values=expected.cache, max_new_tokens=8, do_sample=False)
    assert generated.answer_ids == output[0, len(prompt) :].tolist()
    again = model.generate(prompt.input_ids, past_key_values=generated.result.cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(again, output)


def test_without_chunks_and_on_a_patched_model(model):
    whole = hfblend.Prompt(make_prompt().input_ids, ())
    assert_same(last(model, whole).result, hfblend.blend(model, whole, config=config()))
    with hfblend.patch(model, config=config()) as blender:
        generated = last(model, make_prompt())
        assert len(generated.answer_ids) == 32
        assert not blender.trace.blended


def test_caller_keeps_its_gradient_mode(model, prompt):
    for step in hfblend.steps(model, prompt, config=config()):
        assert torch.is_grad_enabled()
        if step.name == "scored":
            assert not step.evidence.kv(1)[0][0].requires_grad
        assert not step.trace.scores.requires_grad if step.trace.scores is not None else True


def test_each_step_says_what_it_is(model, prompt, word_tokenizer):
    for step in hfblend.steps(model, prompt, config=config(), tokenizer=word_tokenizer, max_new_tokens=3):
        assert isinstance(step, Step)
        assert str(step).startswith(f"{step.name}: ")
        assert step.explanation.count(".") == 1
        assert len(repr(step)) < 1500
    assert step.text == word_tokenizer.decode(step.answer_ids, skip_special_tokens=True)


# --- what is replaced is used ---------------------------------------------------------------------------------------


def test_other_tokens(model, prompt, store):
    chosen = torch.tensor([45, 31, 70])

    def choose(step):
        step.selected_idx = chosen

    generated = last(model, prompt, store, selected=choose)
    assert generated.trace.selected_idx.tolist() == [31, 45, 70]

    def rule(evidence):
        return torch.isin(evidence.candidate_idx, chosen).float()

    ratio = 3 / len(generated.trace.candidate_idx)
    expected = hfblend.blend(model, prompt, store=store, config=config(ratio, selection=rule))
    assert expected.trace.selected_idx.tolist() == [31, 45, 70]
    assert torch.equal(generated.result.logits, expected.logits)


def test_other_tokens_correct_the_rest(model, prompt, store):
    """In every rule: those chosen by hand say what is added, as those of a rule that chooses them do."""
    chosen, settings = torch.tensor([31, 36, 45, 52, 70]), config(correction="offset")

    def rule(evidence):
        return torch.isin(evidence.candidate_idx, chosen).float()

    by_hand = last(model, prompt, store, settings, selected=set_to("selected_idx", lambda step: chosen))
    ratio = len(chosen) / len(by_hand.trace.candidate_idx)
    by_rule = hfblend.blend(model, prompt, store=store, config=config(ratio, selection=rule, correction="offset"))
    assert torch.equal(by_hand.result.logits, by_rule.logits)
    uncorrected = hfblend.blend(model, prompt, store=store, config=config(ratio, selection=rule, correction=None))
    assert not torch.allclose(by_hand.result.logits, uncorrected.logits, atol=1e-3)


@pytest.mark.parametrize("form", ["corrected", "corrected_kv_deviation", "corrected_gradual"])
def test_with_no_token_left_to_say_it_nothing_is_added(model, prompt, store, form):
    none = set_to("selected_idx", lambda step: step.candidate_idx[:0])
    corrected, plain = (
        last(model, prompt, store, settings, selected=none)
        for settings in (FORMS[form], replace(FORMS[form], correction=None))
    )
    if form == "corrected_gradual":  # its first ranking was corrected by the tokens that it kept
        assert not torch.equal(corrected.result.logits, plain.result.logits)
    else:
        assert torch.equal(corrected.result.logits, plain.result.logits)


def test_kv_shown_before_the_pass_are_not_corrected_yet(model, prompt, store):
    kept = {}

    def keep(step):
        kept[step.name] = {layer: values.clone() for layer, (_, values) in step.kv.items()}

    reused = {}
    for form in ("corrected", "uncorrected"):
        stepped(model, prompt, store, FORMS[form], realigned=keep, recomputed=keep)
        reused[form] = {name: dict(kv) for name, kv in kept.items()}
    corrected, plain = reused["corrected"], reused["uncorrected"]
    assert all(torch.equal(corrected["realigned"][i], plain["realigned"][i]) for i in range(4))
    assert torch.allclose(corrected["recomputed"][0], plain["recomputed"][0], atol=1e-5)  # no context, no error
    assert not torch.allclose(corrected["recomputed"][2], plain["recomputed"][2], atol=1e-2)


def test_what_is_put_in_place_of_reused_kv_is_corrected(model, prompt, store):
    """An error that is the same in all rows is foretold by the few whose error is known."""
    errors = {}

    def raise_by_one(step):
        step.kv[0][1][:, :, step.moved_idx] += 1
        errors["moved"] = step.moved_idx

    def look(step):
        errors[form] = (step.kv[0][1] - true)[:, :, errors["moved"]].abs().mean()

    true = hfblend.blend(model, prompt, store=store, config=config(0.0)).cache.layers[0].values
    true = torch.cat([true, true[:, :, -1:]], 2)  # the last token is not of a chunk
    for form in ("corrected", "uncorrected"):
        stepped(model, prompt, store, FORMS[form], realigned=raise_by_one, recomputed=look)
    assert errors["uncorrected"] > 0.8
    assert errors["corrected"] < 0.35


def test_tokens_that_gradual_filtering_had_left_out(model, prompt):
    """They did not go as far as the others, and are computed from the first layer on."""
    true_kv, chosen = store_of_true_kv(model, prompt), []

    def choose_the_rest(step):
        left_out = ~torch.isin(step.candidate_idx, step.selected_idx)
        step.selected_idx = step.candidate_idx[left_out]
        chosen.extend(step.selected_idx.tolist())

    generated = last(model, prompt, true_kv, config(**GRADUAL), selected=choose_the_rest)
    assert generated.trace.hits == 3
    assert generated.trace.selected_idx.tolist() == chosen
    with torch.no_grad():
        full = model(input_ids=prompt.input_ids).logits[:, -1]
    assert (generated.result.logits - full).abs().max() < 1e-3


def test_none_and_all_tokens(model, prompt, store):
    def none(step):
        step.selected_idx = step.candidate_idx[:0]

    expected = hfblend.blend(model, prompt, store=store, config=config(0.0))
    assert torch.equal(last(model, prompt, store, selected=none).result.logits, expected.logits)

    def every(step):
        step.selected_idx = step.candidate_idx

    full = hfblend.blend(model, prompt, store=store, config=config(1.0))
    torch.testing.assert_close(last(model, prompt, store, selected=every).result.logits, full.logits)


def test_fewer_tokens_than_ratio_1(model, prompt, store):
    def none(step):
        assert torch.equal(step.selected_idx, step.candidate_idx)
        step.selected_idx = step.candidate_idx[:0]

    generated = last(model, prompt, store, config(1.0), selected=none)
    expected = hfblend.blend(model, prompt, store=store, config=FORMS["full_reuse"])
    assert torch.equal(generated.result.logits, expected.logits)


def test_scores_changed_in_place(model, prompt, store):
    def favour(step):
        step.scores[...] = 0
        step.scores[[2, 5]] = 1

    *_, selected, _, generated = stepped(model, prompt, store, config(0.03), scored=favour)
    assert selected.selected_idx.tolist() == selected.candidate_idx[[2, 5]].tolist()
    assert generated.trace.scores.sum() == 2


def test_another_deviation(model, prompt, store):
    def by_key_at_layer_2(step):
        step.scores = selection.kv_deviation(*step.evidence.kv(2), "key")[0]

    settings = config(selection="kv_deviation")
    generated = last(model, prompt, store, settings, scored=by_key_at_layer_2)
    other = replace(settings, check_layers=(2,), deviation="key")
    expected = hfblend.blend(model, prompt, store=store, config=other)
    assert generated.trace.selected_idx.tolist() == expected.trace.selected_idx.tolist()
    torch.testing.assert_close(generated.result.logits, expected.logits)


def test_true_kv_put_in_place_of_reused_kv_gives_full_prefill(model, prompt, store):
    full = hfblend.blend(model, prompt, config=config(1.0))

    def mend(step):
        for layer, (keys, values) in step.kv.items():
            true = full.cache.layers[layer]
            keys[:, :, step.moved_idx] = true.keys[:, :, step.moved_idx]
            step.kv[layer] = keys, values.index_copy(2, step.moved_idx, true.values[:, :, step.moved_idx])

    nothing = FORMS["full_reuse"]
    mended = last(model, prompt, store, nothing, realigned=mend).result.logits
    torch.testing.assert_close(mended, full.logits)
    stale = last(model, prompt, store, nothing).result.logits
    assert (stale - full.logits).abs().max() > 0.01


def test_realigned_keys_are_used_by_the_rule_too(model, prompt, store):
    def spoil(step):
        step.kv[1][1][:, :, 40] += 100  # a value of the check layer

    generated = last(model, prompt, store, config(0.01, selection="kv_deviation"), realigned=spoil)
    assert generated.trace.selected_idx.tolist() == [40]


def test_stored_kv_edited_at_look_up_stays_out_of_the_store(model, prompt, store):
    expected = hfblend.blend(model, prompt, store=store, config=config())

    def spoil(step):
        step.pieces[2].entry.layer(3)[1].zero_()

    assert not torch.equal(last(model, prompt, store, looked_up=spoil).result.logits, expected.logits)
    assert torch.equal(last(model, prompt, store).result.logits, expected.logits)


def test_a_piece_left_out_is_computed(model, prompt, store):
    def leave_out(step):
        step.pieces = [piece for piece in step.pieces if piece.span != prompt.chunk_spans[1]]

    generated = last(model, prompt, store, looked_up=leave_out)
    assert [chunk.status for chunk in generated.trace.chunks] == ["hit", "unused", "hit"]
    assert set(range(*prompt.chunk_spans[1])) <= set(generated.trace.fresh_idx.tolist())

    def leave_all_out(step):
        step.pieces = []

    full = hfblend.blend(model, prompt, config=config(1.0))
    torch.testing.assert_close(last(model, prompt, store, looked_up=leave_all_out).result.logits, full.logits)


def test_blended_kv_and_logits_are_used_by_decoding(model, prompt, store):
    def answer_seven(step):
        step.logits[0, 7] = 1e9

    generated = last(model, prompt, store, recomputed=answer_seven)
    assert generated.answer_ids[0] == 7

    def forget(step):
        for _, values in step.kv.values():
            values.zero_()

    assert last(model, prompt, store, recomputed=forget).answer_ids != last(model, prompt, store).answer_ids


# --- what does not fit is refused ------------------------------------------------------------------------------------


def set_to(name, value):
    return lambda step: setattr(step, name, value(step))


@pytest.mark.parametrize(
    ("step", "change", "error"),
    [
        ("selected", set_to("selected_idx", lambda s: torch.tensor([0, 40, 999])), r"the tokens \[0, 999\] are none"),
        ("selected", set_to("selected_idx", lambda s: torch.tensor([[40]])), r"tensor \(S,\) of whole token indices"),
        ("selected", set_to("selected_idx", lambda s: torch.tensor([40.0])), "whole token indices, got float32"),
        ("selected", set_to("selected_idx", lambda s: [40]), r"got \[40\]"),
        ("scored", set_to("scores", lambda s: s.scores[:-1]), r"scores must have shape \(\d+,\), got"),
        ("scored", set_to("scores", lambda s: None), "scores must be a tensor"),
        ("realigned", lambda s: s.kv.pop(2), r"must have the layers \[0, 1, 2, 3\], got \[0, 1, 3\]"),
        ("realigned", lambda s: s.kv.update({2: (s.kv[2][0][:, :1], s.kv[2][1])}), "keys of layer 2 must have shape"),
        ("recomputed", set_to("logits", lambda s: s.logits[0]), "logits must have shape"),
        ("looked_up", set_to("pieces", lambda s: s.pieces + s.pieces[:1]), "each once"),
        ("looked_up", lambda s: setattr(s.pieces[1], "entry", s.pieces[2].entry), "needs KV of 20 tokens and 4 layers"),
    ],
)
def test_replacements_that_do_not_fit(model, prompt, store, step, change, error):
    with pytest.raises((ValueError, TypeError), match=error):
        stepped(model, prompt, store, **{step: change})


def test_scores_where_no_rule_runs(model, prompt, store):
    settings = FORMS["full_reuse"]
    with pytest.raises(ValueError, match="replace selected_idx instead"):
        stepped(model, prompt, store, settings, scored=set_to("scores", lambda s: torch.zeros(3)))


def test_arguments(model, prompt):
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        hfblend.steps(model, prompt, max_new_tokens=0)
    with pytest.raises(ValueError, match="needs a controller"):
        hfblend.steps(model, prompt, config=config(recompute_ratios="auto"))


def test_computed_pairs_of_a_step_by_step_run_are_those_of_blend(model, prompt, store):
    generated = last(model, prompt, store)
    expected = hfblend.blend(model, prompt, store=store, config=config())
    assert generated.trace.computed_pairs == expected.trace.computed_pairs
    assert set(generated.trace.phase_ms) == {"look_up", "select", "recompute", "stopped"}
