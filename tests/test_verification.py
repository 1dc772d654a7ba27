"""Against full prefill: one prompt, every k-th call, the smallest ratio within a bound, and the command."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading

import pytest
import torch
from helpers import config, generate, make_llama, make_mistral, make_prompt, store_of_true_kv
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import hfblend
from hfblend import patching
from hfblend.cli import app
from hfblend.demo import model as demo_model
from hfblend.kv.rows import full_length_cache
from hfblend.measure import calibrate as calibration
from hfblend.measure import verify as verification
from hfblend.measure.calibrate import calibrate
from hfblend.measure.divergence import kl_divergence, teacher_forced_logits
from hfblend.measure.verify import Verifier, verify_prompt

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT, OTHER = make_prompt(), make_prompt(seed=2)


def filled_store(model, prompt=PROMPT, poison: float = 0.0) -> hfblend.MemoryStore:
    """A store with the prompt's chunks; with `poison`, noise of that size on the values of the last one."""
    store = hfblend.MemoryStore()
    result = hfblend.blend(model, prompt, store=store, config=config(0.0))
    if poison:
        key = result.trace.chunks[-1].key
        entry = store.open(key)
        noise = torch.Generator().manual_seed(0)
        kv = [(k, v + poison * torch.randn(v.shape, generator=noise)) for k, v in (entry.layer(i) for i in range(4))]
        cache = full_length_cache(kv)
        store.put(key, hfblend.ChunkKV(cache, entry.cached_positions, entry.behind_ids, regime=entry.regime))
    return store


# --- one prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_at_ratio_1_nothing_is_apart(make):
    found = verify_prompt(make(), PROMPT, config=config(1.0))
    assert found.kl < 1e-6
    assert found.largest_logit_difference < 1e-3
    assert found.first_difference is None
    assert found.full_answer_ids == found.blended_answer_ids
    assert found.top1_agreement == 1.0
    assert len(found.full_answer_ids) == 16


def test_true_kv_blends_to_full_prefill_at_any_ratio():
    model = make_llama()
    found = verify_prompt(model, PROMPT, store=store_of_true_kv(model, PROMPT), config=config(0.1))
    assert found.kl < 1e-6
    assert found.first_difference is None
    assert found.trace.hits == 3


def test_the_figures_are_those_of_blend_and_a_full_prefill():
    model, store = make_llama(), hfblend.MemoryStore()
    found = verify_prompt(model, PROMPT, store=store, config=config(0.1), num_tokens=6)
    answer = model.generate(PROMPT.input_ids, max_new_tokens=6, do_sample=False)[0, len(PROMPT) :].tolist()
    result = hfblend.blend(model, PROMPT, store=store, config=config(0.1))
    full = teacher_forced_logits(model, PROMPT.input_ids, answer)
    other = teacher_forced_logits(model, PROMPT.input_ids, answer, result.cache)
    assert found.full_answer_ids == answer
    assert found.kl == pytest.approx(kl_divergence(full, other).mean().item(), rel=1e-3)
    assert found.kl > 1e-3
    assert found.recomputed_pairs_share == result.trace.recomputed_pairs_share
    again = hfblend.blend(model, PROMPT, store=store, config=config(0.1))
    blended = model.generate(PROMPT.input_ids, past_key_values=again.cache, max_new_tokens=6, do_sample=False)
    assert found.blended_answer_ids == blended[0, len(PROMPT) :].tolist()


def test_a_poisoned_entry_shows():
    model = make_llama()
    clean = verify_prompt(model, PROMPT, store=filled_store(model), config=config(0.1))
    poisoned = verify_prompt(model, PROMPT, store=filled_store(model, poison=5.0), config=config(0.1))
    assert poisoned.kl > 3 * clean.kl
    assert poisoned.kl > 0.5
    at = poisoned.first_difference
    assert poisoned.full_answer_ids[:at] == poisoned.blended_answer_ids[:at]
    assert poisoned.full_answer_ids[at] != poisoned.blended_answer_ids[at]


def test_no_end_token_stops_the_answer():
    model = make_llama()
    first, second = model.generate(PROMPT.input_ids, max_new_tokens=2, do_sample=False)[0, len(PROMPT) :].tolist()
    model.generation_config.eos_token_id = [first, second]
    found = verify_prompt(model, PROMPT, config=config(0.1), num_tokens=5)
    assert len(found.full_answer_ids) == len(found.blended_answer_ids) == 5
    assert not {first, second} & {*found.full_answer_ids, *found.blended_answer_ids}


def test_full_prefill_is_stock_on_a_patched_model():
    """Also where a separator would let plain ids be blended; and the blender's trace stays that of the user's call."""
    model = make_llama()
    free = verify_prompt(model, PROMPT, config=config(0.0))
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, {"input_ids": PROMPT.input_ids})
        trace = blender.trace
        assert trace.blended
        found = blender.verify(PROMPT)
        assert blender.trace is trace
        assert [one.kl for one in blender.verify([PROMPT, PROMPT], num_tokens=16)] == [found.kl] * 2
        assert len(blender.verify([OTHER], num_tokens=3)[0].full_answer_ids) == 3
    assert found.kl == pytest.approx(free.kl, rel=1e-4)
    assert found.full_answer_ids == free.full_answer_ids


def test_it_reads_well_and_goes_into_json():
    found = verify_prompt(make_llama(), PROMPT, config=config(0.1), num_tokens=4)
    assert "\n" not in str(found)
    assert "over 4 tokens" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["trace"]["num_tokens"] == len(PROMPT)
    with pytest.raises(ValueError, match="num_tokens"):
        verify_prompt(make_llama(), PROMPT, num_tokens=0)


# --- every k-th call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5}])
def test_a_check_changes_neither_the_output_nor_the_random_state(sampling):
    outputs, states, traces = [], [], []
    for verify in (None, 1):
        model = make_llama()
        with hfblend.patch(model, config=config(0.1), verify=verify) as blender:
            torch.manual_seed(5)
            outputs.append([generate(model, prompt.inputs(), **sampling) for prompt in (PROMPT, OTHER)])
            states.append(torch.get_rng_state())
            traces.append(blender.trace)
    for one, other in zip(*outputs):
        assert torch.equal(one.sequences, other.sequences)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits))
    assert torch.equal(*states)
    assert traces[0].verification is None
    assert traces[1].verification["kl"] > 0


def test_a_poisoned_entry_warns(caplog):
    model = make_llama()
    settings = hfblend.Verify(every=1, max_kl=0.5)
    with (
        hfblend.patch(model, config=config(0.1), store=filled_store(model, poison=5.0), verify=settings) as blender,
        caplog.at_level(logging.WARNING, "hfblend.measure.verify"),
    ):
        generate(model, PROMPT.inputs())
        assert "above the bound of 0.5" in caplog.text
        assert blender.trace.verification["kl"] > 0.5
        assert blender.trace.verification["within_bound"] is False
        assert blender.trace.notes[-1].startswith("Verified, and above")
        assert json.loads(json.dumps(blender.trace.to_dict()))["verification"]["max_kl"] == 0.5


def test_a_call_within_the_bound_does_not_warn(caplog):
    model = make_llama()
    with (
        hfblend.patch(model, config=config(1.0), verify=1) as blender,
        caplog.at_level(logging.WARNING, "hfblend.measure.verify"),
    ):
        generate(model, PROMPT.inputs())
        assert blender.trace.verification["within_bound"] is True
        assert len(blender.trace.verification["full_answer_ids"]) == 4
    assert caplog.text == ""


def test_only_every_kth_blended_call_is_checked():
    model = make_llama()
    checked = []
    with hfblend.patch(model, config=config(0.1), verify=3) as blender:
        for _ in range(6):
            generate(model, {"input_ids": PROMPT.input_ids, "chunk_spans": []})  # not blended, not counted
            assert blender.trace.verification is None
            generate(model, PROMPT.inputs())
            checked.append(blender.trace.verification is not None)
    assert checked == [False, False, True] * 2


def test_the_check_uses_the_calls_own_settings():
    model = make_llama()
    with hfblend.patch(model, config=config(0.0), verify=1) as blender:
        generate(model, PROMPT.inputs(), blend_config=config(1.0))
        assert blender.trace.verification["kl"] < 1e-6
        generate(model, PROMPT.inputs())
        assert blender.trace.verification["kl"] > 1e-3


def test_a_check_that_fails_is_logged_and_not_raised(caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("as if")

    model = make_llama()
    with hfblend.patch(model, config=config(0.1), verify=1) as blender, caplog.at_level(logging.WARNING, "hfblend"):
        right = generate(model, PROMPT.inputs())
        monkeypatch.setattr(verification, "blend", fail)
        output = generate(model, PROMPT.inputs())
        assert torch.equal(output.sequences, right.sequences)
        assert blender.trace.verification == {"error": "OutOfMemoryError: as if"}
        assert "Could not be verified" in caplog.text


def test_calls_of_all_threads_are_counted_together(monkeypatch):
    checks = []
    monkeypatch.setattr(verification, "verify_prompt", lambda *args, **kwargs: checks.append(1) or 1 / 0)
    verifier = Verifier(5)

    def work():
        for _ in range(100):
            verifier.after(None, PROMPT, None, None, hfblend.BlendTrace())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 80


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": True}, {"num_tokens": 0}, {"max_kl": -1.0}, {"max_kl": "x"}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        hfblend.Verify(**wrong)
    with pytest.raises(TypeError, match="Did you mean 'max_kl'"):
        hfblend.Verify(max_k=0.1)
    with pytest.raises(ValueError, match="every"):
        hfblend.patch(make_llama(), verify=0)


# --- settings that meet a bound ---------------------------------------------------------------------------------------


def test_calibrate_finds_the_smallest_ratio_within_the_bound():
    model, ratios = make_llama(), (1.0, 0.1, 0.5, 0.3)
    kls = {
        (ratio, correction): sum(
            verify_prompt(model, prompt, config=config(ratio, correction=correction)).kl for prompt in (PROMPT, OTHER)
        )
        / 2
        for ratio in ratios
        for correction in (None, "offset")
    }
    bound = min(kls[0.5, None], kls[0.5, "offset"])
    fits = min(ratio for (ratio, _), kl in kls.items() if kl <= bound)
    assert fits > 0.1  # else nothing is sought
    found = calibrate(model, [PROMPT, OTHER], max_kl=bound * 1.001, config=config(0.05), ratios=ratios)
    best = min((None, "offset"), key=lambda correction: kls[fits, correction])
    assert found.config == config(fits, correction=best)
    tried = [(row.recompute_ratio, row.correction) for row in found.rows]
    assert set(tried) == {of for of in kls if of[0] <= fits}
    assert len(tried) == len(set(tried))
    assert [row.kl for row in found.rows] == pytest.approx([kls[of] for of in tried], rel=1e-3)
    assert all(row.largest_kl >= row.kl for row in found.rows)
    assert len(str(found).splitlines()) == 1 + len(found.rows)


def test_calibrate_prefills_each_prompt_in_full_once_and_each_chunk_once(monkeypatch):
    fulls = []
    own = verification.FullAnswer.of.__func__
    monkeypatch.setattr(
        verification.FullAnswer, "of", classmethod(lambda cls, *args: fulls.append(1) or own(cls, *args))
    )
    model, store, traces = make_llama(), hfblend.MemoryStore(), []
    own_blend = calibration.blend
    monkeypatch.setattr(calibration, "blend", lambda *a, **k: traces.append(result := own_blend(*a, **k)) or result)
    calibrate(model, [PROMPT, OTHER], max_kl=1e-5, store=store, config=config(), ratios=(0.1, 0.3, 1.0))
    assert len(fulls) == 2
    assert [result.trace.misses for result in traces] == [3, 3, *[0] * 8]  # at 1.0 nothing stays reused, to correct


@pytest.mark.parametrize(
    ("rule", "name", "layers"),
    [
        ("kv_deviation", "check_layers", [1, (2,), (1, 3)]),
        ("suffix_attention", "score_layers", [None, 0, (2, 3)]),
    ],
)
def test_calibrate_chooses_among_check_layers_and_score_layers(rule, name, layers):
    model = make_llama()
    settings = config(selection=rule)
    found = calibrate(model, [PROMPT], max_kl=9.0, config=settings, ratios=(0.2,), layers=layers)
    as_tuples = [layer if layer is None or isinstance(layer, tuple) else (layer,) for layer in layers]
    assert [row.layers for row in found.rows] == [layer for layer in as_tuples for _ in range(2)]
    assert [row.correction for row in found.rows] == ["offset", None] * 3
    best = min(found.rows, key=lambda row: row.kl)
    assert getattr(found.config, name) == best.layers
    assert len({row.kl for row in found.rows}) > 1
    assert verify_prompt(model, PROMPT, config=found.config).kl == pytest.approx(best.kl, rel=1e-3)


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_verify_and_calibrate_measure_with_the_correction(make):
    model, settings = make(), config(0.3, correction="offset")
    plain, corrected = (verify_prompt(model, PROMPT, config=config(0.3, correction=one)) for one in (None, "offset"))
    assert corrected.kl != pytest.approx(plain.kl, rel=1e-2)
    assert corrected.recomputed_pairs_share == plain.recomputed_pairs_share  # no row more
    found = calibrate(model, [PROMPT], max_kl=9.0, config=settings, ratios=(0.3, 1.0))
    assert [row.correction for row in found.rows] == ["offset", None]
    assert [row.kl for row in found.rows] == pytest.approx([corrected.kl, plain.kl], rel=1e-3)
    assert found.config.correction == min((corrected.kl, "offset"), (plain.kl, None))[1]
    with hfblend.patch(model, config=settings, verify=1) as blender:
        assert blender.verify(PROMPT).kl == pytest.approx(corrected.kl, rel=1e-3)
        assert blender.verify(PROMPT).trace.settings["correction"] == "offset"
        for _ in range(2):
            generate(model, PROMPT.inputs())
        of_four = verify_prompt(model, PROMPT, config=settings, num_tokens=4).kl
        assert blender.trace.verification["kl"] == pytest.approx(of_four, rel=1e-3)


def test_calibrate_says_the_best_that_was_reached():
    with pytest.raises(ValueError, match=r"smallest mean KL is [\d.e-]+ nats, at ratio 0\.\d") as error:
        calibrate(make_llama(), [PROMPT], max_kl=1e-9, config=config(), ratios=(0.1, 0.3))
    assert "max_kl=1e-09" in str(error.value)


def test_a_kl_that_is_no_number_never_fits(monkeypatch):
    monkeypatch.setattr(calibration, "kl_divergence", lambda *logits: torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="nan"):
        calibrate(make_llama(), [PROMPT], max_kl=9.0, config=config(), ratios=(1.0,))


@pytest.mark.parametrize(
    ("error", "match", "wrong"),
    [
        (ValueError, "prompts, got none", {"prompts": []}),
        (TypeError, r"write \[prompt\]", {"prompts": PROMPT}),
        (ValueError, "max_kl", {"max_kl": -1}),
        (ValueError, "ratios", {"ratios": ()}),
        (ValueError, "layers", {"layers": [1], "config": config(selection="random")}),
        (ValueError, "layers", {"layers": [None], "config": config(selection="kv_deviation")}),
        (ValueError, "selects nothing", {"config": config(check_layers=(), recompute_ratios=())}),
    ],
)
def test_calibrate_refuses_what_it_cannot_do(error, match, wrong):
    with pytest.raises(error, match=match):
        calibrate(make_llama(), **{"prompts": [PROMPT], "max_kl": 0.1, **wrong})


def test_the_blenders_calibrate_uses_its_store_and_sets_nothing():
    model = make_llama()
    with hfblend.patch(model, config=config(0.05)) as blender:
        found = blender.calibrate([PROMPT], max_kl=1e-5, ratios=(0.05, 1.0))
        assert isinstance(found, hfblend.Calibration)
        assert blender.config == config(0.05)
        assert found.config == dataclasses.replace(blender.config, recompute_ratios=(1.0,))
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
    assert patching.calibrate is calibrate


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path, word_tokenizer):
    """`hfblend verify` of a tiny model on given rows: (exit code, output, JSON file)."""
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), word_tokenizer))
    monkeypatch.setenv("COLUMNS", "200")

    def verify(rows, *options):
        file, out = tmp_path / "prompts.json", tmp_path / "out.json"
        file.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
        command = ["verify", str(file), "--json", str(out), "--num-tokens", "5", *options]
        result = CliRunner().invoke(app, command)
        return result.exit_code, result.output, out

    return verify


def words(start: int, count: int) -> str:
    return " ".join(f"w{6 + (start * 7 + i * i) % 80}" for i in range(count))


PIECES = {"prefix": words(1, 7), "chunks": [words(2, 20), words(3, 25)], "suffix": words(4, 6)}
PASSAGES = {"question": words(5, 4), "ctxs": [{"title": "w9", "text": words(6, 20)}, {"text": words(7, 22)}]}


def test_the_command_prints_a_row_per_prompt_and_writes_json(run):
    code, output, out = run([PIECES, PASSAGES], "--ratio", "1.0", "--max-kl", "1e-5")
    assert code == 0, output
    figures = json.loads(out.read_text())
    assert [len(one["trace"]["chunks"]) for one in figures["prompts"]] == [2, 2]
    assert max(one["kl"] for one in figures["prompts"]) < 1e-5
    assert figures["recompute_ratio"] == 1.0
    for one in figures["prompts"]:
        assert f"{one['trace']['num_tokens']} " in output


def test_a_kl_above_the_bound_is_exit_code_1(run):
    code, output, out = run([PIECES], "--ratio", "0.0", "--max-kl", "1e-9")
    assert code == 1
    assert "✗" in output
    assert json.loads(out.read_text())["prompts"][0]["kl"] > 1e-9
    assert run([PIECES], "--ratio", "0.0", "--selection", "kv_deviation")[0] == 0  # without a bound


def test_the_command_blames_where_answers_part(run):
    """Not at ratio 1, where they do not."""
    code, output, out = run([PIECES, PASSAGES], "--ratio", "0.0", "--blame", "60")
    assert code == 0, output
    for i, one in enumerate(json.loads(out.read_text())["prompts"]):
        assert ("blame" in one) == (one["first_difference"] is not None)
        assert (f"Prompt {i}" in output.splitlines()) == ("blame" in one)
    assert "Why did the answer change?" in output
    code, output, out = run([PIECES], "--ratio", "1.0", "--blame", "60")
    assert "Why" not in output
    assert "blame" not in json.loads(out.read_text())["prompts"][0]


def test_the_command_takes_a_correction(run):
    kls = {}
    for name in ("offset", "none"):
        code, output, out = run([PIECES], "--ratio", "0.3", "--correction", name)
        assert code == 0, output
        figures = json.loads(out.read_text())
        kls[name] = figures["prompts"][0]["kl"]
        assert figures["correction"] == figures["prompts"][0]["trace"]["settings"]["correction"]
        assert figures["correction"] == (None if name == "none" else name)
    assert kls["offset"] != pytest.approx(kls["none"], rel=1e-2)


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ("{", (), "cannot be read as JSON"),
        ([], (), "holds no prompt"),
        ([PIECES, {"question": "w7"}], (), "prompt 1 needs"),
        ([{**PIECES, "chunks": "w7"}], (), "lists of texts"),
        ([{**PIECES, "chunks": ["w7", ""]}], (), "prompt 0: Chunk 1 of 2"),
        ([PIECES], ("--ratio", "2"), "--ratio"),
        ([PIECES], ("--selection", "wrong"), "selection must be one of"),
        ([PIECES], ("--correction", "wrong"), "correction must be one of"),
    ],
)
def test_bad_input_is_explained_without_a_stack_trace(run, rows, options, says):
    code, output, out = run(rows, *options)
    assert code == 2
    assert says in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
    assert not out.exists()


def test_files_and_models_that_will_not_do_are_explained(run, monkeypatch, tmp_path, word_tokenizer):
    missing = CliRunner().invoke(app, ["verify", str(tmp_path / "none.json")])
    assert missing.exit_code == 2
    assert "cannot be read" in " ".join(missing.output.split())
    assert run([PIECES], "--json", str(tmp_path / "none" / "out.json"))[0] == 2

    def wrong_device(model, device, dtype):
        return make_llama().to(device), word_tokenizer

    monkeypatch.setattr(demo_model, "load", wrong_device)
    code, output, _ = run([PIECES], "--device", "toaster")
    assert code == 1
    assert "toaster" in output
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2)).eval()
    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (gpt2, word_tokenizer))
    code, output, _ = run([PIECES])
    assert code == 2
    assert "UnsupportedModel" in output
