"""Slips of a first-time user: each public entry point, given each of a list of wrong things, says what it got."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
import traceback
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import config, entry, make_llama, make_prompt
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM
from typer.testing import CliRunner

import hfblend
import hfblend.cli as cli
from hfblend.arguments import described
from hfblend.cli import app
from hfblend.controller import Controller
from hfblend.demo import model as demo_model
from hfblend.generate.blending import Blending
from hfblend.generate.fallbacks import Fallback
from hfblend.lab import plots
from hfblend.prompts.prompt import ChunkSpans, spans_by_row
from hfblend.prompts.separator import Separator
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore, store_at

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
CHAT = "{% for m in messages %}<s> w6 {{ m.content }} </s> {% endfor %}"
PACKAGE = str(Path(hfblend.__file__).parent)


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def blender():
    with hfblend.patch(make_llama(), config=config(0.1)) as patched:
        yield patched


def inputs_of(word_tokenizer) -> dict:
    """Name -> what is passed in the place of something else."""
    return {
        "None": None,
        "text": "text",
        "name": "org/model-7b",
        "3": 3,
        "2.5": 2.5,
        "nan": float("nan"),
        "-1": -1,
        "True": True,
        "[]": [],
        "[[1]]": [[1]],
        "{}": {},
        "dict": {"input_ids": 1},
        "bytes": b"text",
        "object": object(),
        "class": dict,
        "tokenizer": word_tokenizer,
        "model": nn.Linear(2, 2),
        "prompt": PROMPT,
        "config": hfblend.BlendConfig(),
        "store": MemoryStore(),
        "array": np.arange(3),
        "tensor": torch.arange(3),
        "floats": torch.rand(1, 3),
        "ids": torch.arange(4)[None],
    }


# Entry point -> what it is called with, and the inputs that mean something there.
PATCH = {
    "model": "",
    "config": "None config",
    "tokenizer": "None tokenizer",
    "store": "None text name store",
    "verify": "None 3",
    "trace": "",
    "find": "None",
}
BLEND = {
    "prompt": "prompt",
    "store": "None text name store",
    "config": "None config",
    "algorithm": "None",
    "controller": "None",
    "trace": "",
}
STEPS = {
    "prompt": "prompt",
    "store": "None text name store",
    "config": "None config",
    "tokenizer": "None tokenizer",
    "max_new_tokens": "3",
}
OF_BLENDER = {
    ("verify", "prompts"): "prompt",
    ("blame", "prompt"): "prompt",
    ("blame", "num_tokens"): "3",
    ("blame", "seconds"): "3 2.5",
    ("blame", "progress"): "None",
    ("calibrate", "prompts"): "",
    ("calibrate", "max_kl"): "3 2.5",
    ("calibrate", "ratios"): "",
    ("calibrate", "layers"): "None [[1]]",
    ("calibrate", "num_tokens"): "3",
    ("reordered", "prompt"): "prompt",
    ("reordered", "order"): "",
    ("precompute", "chunks"): "[] [[1]] ids",
    ("precompute", "prefix"): "[] array tensor",
    ("precompute", "batch_size"): "None 3",
    ("precompute", "progress"): "None",
    ("precompute", "store"): "text name store",
    ("precompute", "config"): "None config",
    ("precompute", "tokenizer"): "None tokenizer",
}
FIELDS = {
    "enabled": "True",
    "separator": "None text name array tensor",
    "selection": "",
    "recompute_ratios": "",
    "least_ratio": "",
    "check_layers": "",
    "score_layers": "None array tensor",
    "deviation": "",
    "correction": "None",
    "find": "None",
    "min_reused_tokens": "3",
    "force_chunk_start": "3",
    "chunk_prefix": "",
    "filler_ids": "[] array tensor",
    "on_miss": "",
    "layerwise": "True",
    "cuda_graphs": "True",
    "namespace": "text name",
}


PROMPTS = {  # constructor -> how it is called where it is right, argument -> the inputs that mean something there
    "Prompt": ({"input_ids": torch.arange(20)[None], "chunk_spans": [(1, 3)]}, {"input_ids": "", "chunk_spans": "[]"}),
    "from_ids": (
        {"prefix_ids": [1], "chunks": [[3, 4]], "suffix_ids": [5], "separator_ids": ()},
        {
            "prefix_ids": "[] array tensor NumPy",
            "chunks": "[] [[1]] ids",
            "suffix_ids": "[] array tensor NumPy",
            "separator_ids": "[] array tensor NumPy",
        },
    ),
    "from_texts": (
        {"prefix": "w8", "chunks": ["w9"], "suffix": "w10"},
        {
            "tokenizer": "tokenizer",
            "prefix": "text name",
            "chunks": "[] texts digits generator",
            "suffix": "text name",
            "separator": "None text name array tensor NumPy",
            "add_special_tokens": "True",
        },
    ),
    "from_chat": (
        {"messages": "w8", "documents": ["w9 "]},
        {
            "tokenizer": "tokenizer",
            "messages": "text name",
            "documents": "[] texts digits generator",
            "placeholder": "text name",  # and None, of a template with documents of its own
            "document_end": "text name",
            "add_generation_prompt": "True",
            "chat_template": "None",
        }
        | dict.fromkeys(("tokenize", "return_dict", "truncation", "return_tensors", "padding", "max_length"), ""),
    ),
    "from_separated_ids": (
        {"input_ids": torch.arange(4)[None], "separator": Separator([1])},
        {"input_ids": "", "separator": ""},
    ),
    "batch": ({"prompts": [PROMPT], "pad_token_id": 0}, {"prompts": "prompts", "pad_token_id": "3"}),
    "Separator": (
        {"separator": "##"},
        {"separator": "text name array tensor NumPy", "tokenizer": "tokenizer"},
    ),
}
PROMPTS["Prompt"][1]["input_ids"] = PROMPTS["from_separated_ids"][1]["input_ids"] = "ids"


def made(how, arguments, tokenizer):
    """Calls a constructor; tokenizers are given where they are not what is swept."""
    if how in ("from_texts", "from_chat", "Separator"):
        arguments = {"tokenizer": tokenizer, **arguments}
    make = {"Prompt": hfblend.Prompt, "Separator": Separator}.get(how) or getattr(hfblend.Prompt, how)
    return make(**arguments)


def more_inputs() -> dict:
    """What may be passed to a constructor of prompts by mistake, besides."""
    return {
        "texts": ["w9", "w10"],
        "floats in a list": [1.5, 2.0],
        "negative": [-1, 2],
        "bools": [True, False],
        "nested": [[1, 2, 3], "text"],
        "digits": ["1", "2"],
        "set": {"w9"},
        "dict of texts": {"a": "b"},
        "bool tensor": torch.ones(1, 3, dtype=torch.bool),
        "negative tensor": torch.tensor([[-1, 2]]),
        "surrogate": "a \ud800 b",
        "surrogates": ["a", "b \udfff"],
        "NumPy": [np.int64(3), np.int32(4)],
        "prompts": [PROMPT, PROMPT],
        "inputs": [PROMPT.inputs()],
        "generator": (text for text in ("w9", "w10")),
        "none inside": [None],
        "messages": [{"role": "user", "content": 5}],
    }


def entry_points() -> dict:
    """Name -> (function of the input, model and blender; names of the inputs that mean something)."""
    found = {}
    for name, meant in PATCH.items():
        found[f"patch({name})"] = (lambda v, m, b, n=name: patched({"model": m, n: v}), meant)
    for name, meant in BLEND.items():
        found[f"blend({name})"] = (lambda v, m, b, n=name: hfblend.blend(m, **{"prompt": PROMPT, n: v}), meant)
    for name, meant in STEPS.items():
        found[f"steps({name})"] = (lambda v, m, b, n=name: hfblend.steps(m, **{"prompt": PROMPT, n: v}), meant)
    defaults = {
        "verify": {},
        "blame": {"prompt": make_prompt(sizes=(9, 12), prefix=4, suffix=5)},
        "calibrate": {"prompts": [PROMPT], "max_kl": 99.0},
        "reordered": {"prompt": PROMPT, "order": "prefix"},
        "precompute": {"chunks": [[1, 2]]},
    }
    for (method, name), meant in OF_BLENDER.items():
        given = defaults[method]
        found[f"Blender.{method}({name})"] = (
            lambda v, m, b, how=method, n=name, given=given: getattr(b, how)(**{**given, n: v}),
            meant,
        )
    for name, meant in FIELDS.items():
        found[f"BlendConfig({name})"] = (lambda v, m, b, n=name: hfblend.BlendConfig(**{n: v}), meant)
    for how, (given, meanings) in PROMPTS.items():
        for name, meant in meanings.items():
            found[f"{'' if how in ('Prompt', 'Separator') else 'Prompt.'}{how}({name})"] = (
                lambda v, m, b, how=how, n=name, given=given: made(how, {**given, n: v}, m.tokenizer),
                meant,
            )
    for name, meant in {"every": "3", "max_kl": "3 2.5", "num_tokens": "3"}.items():
        found[f"Verify({name})"] = (lambda v, m, b, n=name: hfblend.Verify(**{n: v}), meant)
    return found | {
        "Blender.config": (lambda v, m, b: setattr(b, "config", v), "None config"),
        "Blender.store": (lambda v, m, b: setattr(b, "store", v), "None text name store"),
        "generate": (lambda v, m, b: b.model.generate(v, max_new_tokens=1), "None ids"),
        "generate(blend_config)": (
            lambda v, m, b: b.model.generate(**PROMPT.inputs(), blend_config=v, max_new_tokens=1),
            "None config",
        ),
        "Prompt.crop(cache)": (lambda v, m, b: PROMPT.crop(v, PROMPT.input_ids), ""),
        "Prompt.crop(held_ids)": (lambda v, m, b: PROMPT.crop(DynamicCache(), v), "ids"),
        "ChunkSpans(prefix_stop)": (lambda v, m, b: ChunkSpans([(2, 5)], prefix_stop=v).check(9), "None"),
        "generate(find)": (lambda v, m, b: b.model.generate(PROMPT.input_ids, max_new_tokens=1, find=v), "None"),
        "filler_ids": (lambda v, m, b: hfblend.filler_ids(v), "tokenizer"),
        "prefill_chunk(model)": (lambda v, m, b: hfblend.prefill_chunk(v, [1]), ""),
        "prefill_chunk(ids)": (lambda v, m, b: hfblend.prefill_chunk(m, v), "array tensor"),
        "prefill_chunk(behind_ids)": (lambda v, m, b: hfblend.prefill_chunk(m, [1], v), "[] array tensor"),
        "prefill_chunk(behind)": (lambda v, m, b: hfblend.prefill_chunk(m, [1], behind=v), "None"),
        "ChunkKV(cache)": (lambda v, m, b: hfblend.ChunkKV(v, torch.arange(4)), ""),
        "ChunkKV(cached_positions)": (lambda v, m, b: hfblend.ChunkKV(entry().cache, v), ""),
        "show": (lambda v, m, b: hfblend.show(v), ""),
        "plot_scores": (lambda v, m, b: hfblend.plot_scores(v), ""),
        "plot_timeline": (lambda v, m, b: hfblend.plot_timeline(v), ""),
        "plot_quality": (lambda v, m, b: plots.plot_quality(v), "[]"),
        "plot_ttft": (lambda v, m, b: plots.plot_ttft(v), ""),
        "BlendTrace.load": (lambda v, m, b: hfblend.BlendTrace.load(v), "text name"),  # not there: OSError
        "BlendTrace.save": (lambda v, m, b: hfblend.BlendTrace().save(v), "text name"),
        "MemoryStore(max_bytes)": (lambda v, m, b: MemoryStore(v), "3"),
        "MemoryStore(device)": (lambda v, m, b: MemoryStore(device=v), "None"),
        "DiskStore(path)": (lambda v, m, b: DiskStore(v), "text name"),
        "DiskStore(max_bytes)": (lambda v, m, b: DiskStore("folder", v), "None 3"),
        "DiskStore(kv_dtype)": (lambda v, m, b: DiskStore("folder", kv_dtype=v), "None"),
        "RemoteStore(url)": (lambda v, m, b: RemoteStore(v), ""),
        "RemoteStore(timeout_s)": (lambda v, m, b: RemoteStore("memory://chunks", timeout_s=v), "3 2.5"),
        "TieredStore(stores)": (lambda v, m, b: TieredStore(v), ""),
        "TieredStore(max_waiting_bytes)": (lambda v, m, b: TieredStore([MemoryStore()], v), "3"),
        "store_at": (lambda v, m, b: store_at(v), "None text name store"),
        "from_env": (lambda v, m, b: hfblend.BlendConfig.from_env(v), "None {}"),
    }


def patched(arguments):
    arguments = {
        **arguments,
        "model": make_llama() if isinstance(arguments["model"], LlamaForCausalLM) else arguments["model"],
    }
    hfblend.patch(**arguments).remove()


def slip(run, value, model, blender) -> str:
    """What is wrong with how an input is answered; empty if nothing is."""
    try:
        run(value, model, blender)
    except (TypeError, ValueError) as error:
        raised_in, message = traceback.extract_tb(error.__traceback__)[-1].filename, str(error)
        if not raised_in.startswith(PACKAGE):
            return f"raised in {raised_in}: {message}"
        said = re.search(r"got |must |need", message)
        return "" if said and len(message) < 600 else f"says too little, or too much: {message}"
    except OSError:
        return "OSError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize("name", entry_points())
def test_each_wrong_input_is_answered_with_what_was_got_and_what_is_expected(
    name, model, blender, word_tokenizer, tmp_path, monkeypatch, capsys
):
    if name == "plot_quality":
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    run, meaningful = entry_points()[name]
    word_tokenizer.chat_template = CHAT
    monkeypatch.setattr(model, "tokenizer", word_tokenizer, raising=False)
    of_prompts = more_inputs() if re.match(r"Prompt|Separator", name) else {}
    settings, store = blender.config, blender.store
    found = {}
    for label, value in {**inputs_of(word_tokenizer), **of_prompts}.items():
        found[label] = slip(run, value, model, blender)
        blender.config, blender.store = settings, store
    expected = {label: "accepted" if label in meaningful.split() else "" for label in found}
    if name == "BlendTrace.load":
        expected |= {"text": "OSError", "name": "OSError"}
    assert found == expected


def test_the_sweep_knows_every_public_name():
    """Results, which users read and do not make, are left out."""
    swept = {re.split(r"\W", name)[0] for name in entry_points()}
    results = {"Blame", "BlendResult", "BlendTrace", "Calibration", "UnsupportedModel", "Verification"}
    assert set(hfblend.__all__) <= swept | results
    methods = {name for name, _ in inspect.getmembers(hfblend.Blender, inspect.isfunction) if name[0] != "_"}
    assert methods == {"verify", "blame", "calibrate", "precompute", "reordered"} | {
        "remove",
        "profile",
        "refresh",
    }  # these take nothing
    assert set(FIELDS) == {field.name for field in dataclasses.fields(hfblend.BlendConfig)}
    assert set(PATCH) == set(inspect.signature(hfblend.patch).parameters)
    assert set(BLEND) == set(inspect.signature(hfblend.blend).parameters) - {"model"}
    ways = {name for name in vars(hfblend.Prompt) if name.startswith("from_")}
    assert {"Prompt", "Separator", "batch"} | ways == set(PROMPTS)
    for how in ways:
        assert set(PROMPTS[how][1]) >= set(inspect.signature(getattr(hfblend.Prompt, how)).parameters) - {
            "template_kwargs"
        }
    assert set(STEPS) == set(inspect.signature(hfblend.steps).parameters) - {"model"}


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda m, t: hfblend.patch("org/model-7b"), r"load one with AutoModelForCausalLM"),
        (lambda m, t: hfblend.patch(LlamaForCausalLM), "got the class LlamaForCausalLM"),
        (lambda m, t: hfblend.patch(t), "got a tokenizer"),
        (lambda m, t: hfblend.patch(m.model), "has no generate"),
        (lambda m, t: pytest.importorskip("pandas") and hfblend.BlendTrace().to_frame("name"), "tokenizer must be"),
        (lambda m, t: hfblend.patch(m, t), "config must be .* got a tokenizer .*write tokenizer="),
        (lambda m, t: hfblend.patch(m, "folder"), "config must be .* got 'folder': write store="),
        (lambda m, t: hfblend.patch(m, MemoryStore()), "write store="),
        (lambda m, t: hfblend.patch(m, {"namespace": "a"}), r"write BlendConfig\(\*\*"),
        (lambda m, t: hfblend.patch(m, tokenizer="org/model-7b"), r"AutoTokenizer.from_pretrained\('org/model-7b'\)"),
        (lambda m, t: hfblend.patch(m, store=MemoryStore), "got the class MemoryStore"),
        (lambda m, t: hfblend.patch(m, store=t), "store must be .* got a tokenizer"),
        (lambda m, t: hfblend.patch(m, trace="ful"), "Did you mean 'full'"),
        (lambda m, t: hfblend.blend(m, PROMPT.inputs()), "pass the prompt itself"),
        (lambda m, t: hfblend.blend(m, PROMPT, algorithm=Controller), "got the class Controller"),
        (lambda m, t: MemoryStore("8 gigs"), "max_bytes .* such as \"8GB\", got '8 gigs'"),
        (lambda m, t: DiskStore("s3://bucket/chunks"), "RemoteStore"),
        (lambda m, t: DiskStore(""), "must have a name"),
        (lambda m, t: store_at("s3:/bucket/chunks"), "write s3://"),
        (lambda m, t: store_at("memry://chunks"), "Did you mean memory://"),
        (lambda m, t: RemoteStore("chunks"), r"DiskStore\(path\)"),
        (lambda m, t: hfblend.prefill_chunk(m, "abc"), "ids must be a list of token ids, got 'abc'"),
        (lambda m, t: hfblend.Prompt(torch.arange(9)[None], (1, 5)), r"got \(1, 5\)"),
        (lambda m, t: hfblend.Prompt(torch.arange(9)[None], np.array([1, 5])), r"got a ndarray of shape \(2,\)"),
        (lambda m, t: hfblend.Prompt(torch.arange(9)[None], PROMPT), "got .*Prompt: write prompt.chunk_spans"),
        (lambda m, t: spans_by_row((1, 5), torch.arange(9)[None]), r"got \(1, 5\)"),
        (lambda m, t: spans_by_row(np.array([1, 5]), torch.arange(9)[None]), r"got a ndarray of shape \(2,\)"),
        (lambda m, t: spans_by_row(PROMPT, torch.arange(9)[None]), "got .*Prompt: write prompt.chunk_spans"),
        (lambda m, t: hfblend.Prompt([[1, 2, 3]], []), r"input_ids must be a tensor \(1, T\).* got \[\[1, 2, 3\]\]"),
        (lambda m, t: hfblend.Prompt.from_ids([1], [3, 4], [5]), r"chunks\[0\] must be a list of token ids, got 3"),
        (lambda m, t: hfblend.Prompt.from_ids([1], [[3]], [5], " # # "), "separator_ids must be a list of token ids"),
        (lambda m, t: hfblend.Prompt.from_ids([-1], [[3]], [5]), "prefix_ids has ids from -1"),
        (lambda m, t: hfblend.Prompt.from_separated_ids(torch.arange(9)[None], "##"), r"write Separator\(text, token"),
        (lambda m, t: hfblend.Prompt.batch(PROMPT, pad_token_id=0), r"write \[prompt\]"),
        (lambda m, t: Separator("##", "org/m"), r"AutoTokenizer.from_pretrained\('org/m'\)"),
        (lambda m, t: hfblend.Prompt.from_chat(t, "w8 \ud800", ["w9"]), "half of a surrogate pair.*character 3"),
        (lambda m, t: hfblend.Prompt.from_chat(t, "w8", ["w9"], return_dict=True), "got return_dict=; leave it out"),
        (lambda m, t: hfblend.BlendConfig(selection="kv_devation"), "Did you mean 'kv_deviation'"),
        (lambda m, t: hfblend.BlendConfig(correction="ofset"), "Did you mean 'offset'"),
    ],
)  # fmt: skip
def test_slips_are_answered_with_what_to_do(run, says, model, word_tokenizer):
    with pytest.raises((TypeError, ValueError), match=says):
        run(model, word_tokenizer)


def test_slips_with_a_patched_model(blender, tmp_path):
    with pytest.raises(TypeError, match=r"model.generate\(\*\*prompt.inputs\(\)\)"):
        blender.model.generate(PROMPT)
    with pytest.raises(TypeError, match=r"model.generate\(\*\*inputs\)"):
        blender.model.generate(PROMPT.inputs())
    with pytest.raises(TypeError, match=r"tokenizer\(text, return_tensors='pt'\)"):
        blender.model.generate("Who?")
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        blender.model.generate(torch.arange(4))
    with pytest.raises(TypeError, match="blend_config must be"):
        blender.model.generate(**PROMPT.inputs(), blend_config="fast")
    with pytest.raises(TypeError, match=r"prompts\[1\] must be a hfblend.Prompt, got 'text'"):
        blender.verify([PROMPT, "text"])
    with pytest.raises(ValueError, match="verify needs one or more prompts"):
        blender.verify([])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; a store is a folder"):
        blender.store = tmp_path / "file"


def test_a_removed_blender(caplog):
    """`remove` twice does nothing, what only reads still works, and a `with` says that nothing would be blended."""
    model = make_llama()
    blender = hfblend.patch(model, config=config(0.1))
    blender.remove()
    blender.remove()
    assert "generate" not in vars(model)
    assert blender.verify(PROMPT, num_tokens=2).trace.blended
    with pytest.raises(ValueError, match="was removed"), blender:
        pass


def test_the_named_fields_of_other_projects_lead_to_ours():
    for given, field in {
        "recompute_ratio": "recompute_ratios", "recomp_ratio": "recompute_ratios", "ratio": "recompute_ratios",
        "blend_recompute_ratios": "recompute_ratios", "check_layer": "check_layers",
        "blend_check_layers": "check_layers", "chunk_separator": "separator", "blend_special_str": "separator",
        "LMCACHE_BLEND_MIN_TOKENS": "min_reused_tokens", "seperator": "separator", "onmiss": "on_miss",
        "cuda_graph": "cuda_graphs",
    }.items():  # fmt: skip
        with pytest.raises(TypeError, match=f"no field '{given}'. Did you mean '{field}'"):
            hfblend.BlendConfig(**{given: 1})
    with pytest.raises(TypeError, match=r"argument of hfblend\.patch"):
        hfblend.BlendConfig(store="folder")
    with pytest.raises(TypeError, match="It has enabled, separator"):
        hfblend.BlendConfig(zzz=1)
    with pytest.raises(TypeError, match="keywords only"):
        hfblend.BlendConfig(0.15)


def test_every_misspelling_of_a_field_by_one_letter_is_understood():
    for field in FIELDS:
        for i in range(len(field)):
            with pytest.raises(TypeError, match=f"Did you mean '{field}'"):
                hfblend.BlendConfig(**{f"{field[:i]}{field[i + 1 :]}": 1})


@pytest.mark.parametrize("name", ["max_bytes", "timeout_s", "pause_s", "max_failures", "kv_dtype"])
def test_every_misspelling_of_a_stores_option_by_one_letter_is_understood(name):
    """fsspec takes any option: a budget that is misspelt would be none."""
    pytest.importorskip("fsspec")
    slips = {name[:i] + name[i + 1 :] for i in range(len(name))} | {name[:i] + "x" + name[i:] for i in range(len(name))}
    for slip in slips | {name.upper(), name.removesuffix("_s"), name.replace("_", "")} - {name}:
        with pytest.raises(TypeError, match=f"has no option '{slip}'. Did you mean '{name}'?"):
            RemoteStore("memory://x", **{slip: "5GB"})


def test_options_of_filesystems_are_passed_on(monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    options = dict.fromkeys(
        ["anon", "endpoint_url", "key", "secret", "token", "profile", "client_kwargs", "config_kwargs", "use_ssl",
         "read_timeout", "connect_timeout", "max_concurrency", "max_paths", "retries", "skip_instance_cache", "model",
         "port", "username", "password", "account_name", "connection_string", "auto_mkdir", "use_listings_cache"]
    )  # fmt: skip
    found, opened = {}, fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **given: found.update(given) or opened(url))
    RemoteStore("memory://x", **options)
    assert found == options


@pytest.mark.parametrize("url", ["s3://", "s3:///", "gs://", "file://", "file:///", "memory://", "sftp:// "])
def test_a_url_without_a_place_is_refused(url):
    pytest.importorskip("fsspec")
    for run in (lambda: RemoteStore(url), lambda: store_at(url)):
        with pytest.raises(ValueError, match="must name a folder"):
            run()


@pytest.mark.parametrize(
    ("limit", "kind"), [(1.5, TypeError), ("3", TypeError), (True, TypeError), (0, ValueError), (-1, ValueError)]
)
def test_failures_are_counted_in_whole_numbers(limit, kind):
    pytest.importorskip("fsspec")
    with pytest.raises(kind, match="max_failures must be"):
        RemoteStore("memory://x", max_failures=limit)


def test_variables_that_are_misspelt_are_refused_and_others_logged(caplog):
    for given in ("HFBLEND_RECOMPUTE_RATIO", "HFBLEND_RATIO", "LMCACHE_BLEND_RECOMPUTE_RATIO"):
        with pytest.raises(ValueError, match=f"{given}. Did you mean HFBLEND_RECOMPUTE_RATIOS"):
            hfblend.BlendConfig.from_env({given: "0.3"})
    with pytest.raises(ValueError, match="Read from HFBLEND_SELECTION='kv_devation'"):
        hfblend.BlendConfig.from_env({"HFBLEND_SELECTION": "kv_devation"})
    with caplog.at_level(logging.WARNING, "hfblend"):
        known = {"HFBLEND_CACHE": "/tmp", "LMCACHE_CHUNK_SIZE": "256", "PATH": "/bin"}
        assert hfblend.BlendConfig.from_env(known) == hfblend.BlendConfig()
        assert caplog.text == ""
        assert hfblend.BlendConfig.from_env({"HFBLEND_SERVICE_HOST": "10.0.0.1"}) == hfblend.BlendConfig()
        assert "HFBLEND_SERVICE_HOST is no setting" in caplog.text


def said(run) -> str:
    """The message of the error that a function raises."""
    with pytest.raises((TypeError, ValueError)) as caught:
        run()
    return str(caught.value)


def test_the_messages_in_the_documentation_are_those_of_the_code(blender, word_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chunks.bin").write_text("")
    training, model = make_llama().train(), make_llama()
    messages = [
        said(lambda: hfblend.patch("org/model-7b")),
        said(lambda: hfblend.patch(model, word_tokenizer)),
        said(lambda: hfblend.patch(model, tokenizer="org/model-7b")),
        said(lambda: hfblend.patch(blender.model)),
        said(lambda: hfblend.patch(training)),
        said(lambda: blender.model.generate(PROMPT)),
        said(lambda: model.generate(**PROMPT.inputs())).replace("`", "'"),
        said(lambda: hfblend.blend(model, PROMPT.inputs())),
        said(lambda: blender.verify("text")),
        said(lambda: hfblend.BlendConfig(recompute_ratio=0.1)),
        said(lambda: hfblend.BlendConfig(recompute_ratios=0.15)),
        said(lambda: hfblend.BlendConfig.from_env({"HFBLEND_RATIO": "0.1"})),
        said(lambda: MemoryStore("8 gigs")),
        said(lambda: hfblend.patch(model, store="s3:/bucket/chunks")),
        said(lambda: hfblend.patch(model, store="chunks.bin")),
    ]
    page = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = page.split("## What an error says")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    assert len(quoted) == len(messages)
    for documented, message in zip(quoted, messages):
        pattern = ".*".join(map(re.escape, documented.split("…")))
        assert re.fullmatch(pattern, message, re.DOTALL) or message.startswith(documented), (documented, message)


# --- fallbacks --------------------------------------------------------------------------------------------------------


def test_each_fallback_says_what_to_do():
    """A reason, and after a semicolon a remedy."""
    for fallback in Fallback:
        assert re.fullmatch(r"[^;]+; [^;]+\.", fallback.reason), fallback


def test_too_few_tokens_has_both_numbers_and_the_remedy(caplog):
    model = make_llama()
    with hfblend.patch(model) as blender, caplog.at_level(logging.INFO, "hfblend.patching"):
        model.generate(**PROMPT.inputs(), max_new_tokens=1)
        shown = [
            caplog.text,
            str(blender.trace),
            blender.trace.fallback_reason,
            blender.trace.to_dict()["fallback_reason"],
        ]
        shown += [hfblend.show(blender.trace)._repr_html_()]
    for text in shown:
        for part in (
            "64 reusable tokens in 3 chunks",
            "min_reused_tokens is 256",
            "lower BlendConfig(min_reused_tokens=",
        ):
            assert part in text
    page = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    assert blender.trace.fallback_reason in " ".join(page.split())


def test_a_batch_says_of_each_prompt_that_is_prefilled_why(caplog):
    model, short = make_llama(), make_prompt(sizes=(3, 2))
    with hfblend.patch(model, config=config(0.1, min_reused_tokens=20)) as blender:
        model.generate(**hfblend.Prompt.batch([PROMPT, short], pad_token_id=0), max_new_tokens=1)
        assert blender.traces[0].blended
        assert "5 reusable tokens in 2 chunks; min_reused_tokens is 20" in blender.traces[1].notes[0]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ({"input_ids": PROMPT.input_ids}, "The separator ' # # ' is text, and patch() had no tokenizer"),
        ({**PROMPT.inputs(), "output_hidden_states": True}, "Got output_hidden_states."),
        ({**PROMPT.inputs(), "position_ids": torch.arange(len(PROMPT))[None]}, "Got position_ids."),
        ({"inputs_embeds": torch.rand(1, 4, 64)}, "Got inputs_embeds."),
        (
            {**PROMPT.inputs(), "attention_mask": torch.tensor([[1, 1, 0, *[1] * (len(PROMPT) - 3)]])},
            f"Got a mask of shape (1, {len(PROMPT)})",
        ),
    ],
)
def test_a_fallback_names_what_was_found(call, found):
    model = make_llama()
    with hfblend.patch(model, config=config(0.1, separator=" # # ")) as blender:
        model.generate(**call, max_new_tokens=1)
        assert found in blender.trace.fallback_reason
        assert found.rstrip(".") in str(blender.trace)


def test_the_reason_outlives_saving(tmp_path):
    model = make_llama()
    with hfblend.patch(model) as blender:
        model.generate(**PROMPT.inputs(), max_new_tokens=1)
        blender.trace.save(tmp_path / "trace")
        assert hfblend.BlendTrace.load(tmp_path / "trace").fallback_reason == blender.trace.fallback_reason != ""


# --- commands ---------------------------------------------------------------------------------------------------------

FILES = {
    "missing": None, "empty": b"", "binary": b"\x80\x81\xff\x00", "brace": b"{", "number": b"3", "null": b"null",
    "text": b'"text"', "list of numbers": b"[3]", "no chunks": b'{"prefix": "w7"}',
    "chunks no list": b'{"chunks": 3, "question": "w8"}', "a nested chunk": b'{"chunks": [["w7"]], "question": "w8"}',
    "no text of a question": b'{"chunks": ["w7"], "question": 3}',
}  # fmt: skip
COMMANDS = {
    "explain": ["explain", "FILE"],
    "run": ["run", "FILE"],
    "verify": ["verify", "FILE"],
    "precompute": ["precompute", "--corpus", "FILE", "--store", "chunks"],
    "eval": ["eval", "--data", "FILE", "--n", "1"],
    "store ls": ["store", "ls", "FILE"],
    "store stat": ["store", "stat", "FILE"],
    "store verify": ["store", "verify", "FILE"],
    "run with a file as store": ["run", "PROMPT", "--store", "FILE"],
    "explain with a folder as page": ["explain", "PROMPT", "--html", "FOLDER"],
    "run with a folder as prompt": ["run", "FOLDER"],
    "run with no such rule": ["run", "PROMPT", "--selection", "kv_devation"],
    "run with no such correction": ["run", "PROMPT", "--correction", "ofset"],
    "run with no such type": ["run", "PROMPT", "--dtype", "float99"],
    "run with a URL's typo": ["run", "PROMPT", "--store", "s3:/bucket"],
    "bench with no such method": ["bench", "--shape", "tiny", "--methods", "fast"],
    "bench with no number": ["bench", "--shape", "tiny", "--tokens", "many"],
    "profile with no number": ["profile", "--tokens", "many"],
}
MEANT = {("precompute", "text"), ("run with a file as store", "missing")}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_wrong_files_and_options(command, tmp_path, monkeypatch, word_tokenizer):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_model, "load", lambda *args, **kwargs: (make_llama(), word_tokenizer))
    (tmp_path / "prompt.json").write_text('{"chunks": ["w7 w8"], "question": "w9"}')
    (tmp_path / "folder").mkdir()
    places = {"PROMPT": "prompt.json", "FOLDER": "folder", "FILE": "wrong"}
    for name, content in FILES.items() if "FILE" in COMMANDS[command] else [("", None)]:
        Path("wrong").unlink(missing_ok=True)
        if content is not None:
            Path("wrong").write_bytes(content)
        if (command, name) in MEANT:
            continue
        result = CliRunner().invoke(app, [places.get(part, part) for part in COMMANDS[command]])
        assert isinstance(result.exception, SystemExit), (name, result.exception)
        assert result.exit_code in (1, 2), name
        assert result.output.strip(), name


def _options_with_fractions():
    """Commands, and their options that take a number with a fraction, or several."""
    for name, (place, _) in cli._COMMANDS.items():
        module, function = place.split(".")
        command = getattr(importlib.import_module(f"hfblend.cli.{module}"), function)
        if inspect.isfunction(command):
            kinds = typing.get_type_hints(command).items()
            yield from ((name, option) for option, kind in kinds if option == "ratios" or kind in (float, float | None))


@pytest.mark.parametrize(("command", "option"), _options_with_fractions())
def test_commands_refuse_numbers_that_are_none(command, option, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "load", lambda *args, **kwargs: pytest.fail("read before the options"))
    file = tmp_path / "prompt.json"
    file.write_text('{"chunks": ["w7 w8"], "question": "w9"}')
    needed = {"run": [file], "explain": [file], "verify": [file], "ask": [file, "w9"], "eval": ["--data", file]}
    words, flag = [command, *map(str, needed.get(command, ()))], f"--{option.replace('_', '-')}"
    for number in ("nan", "inf", "-inf", "-1"):
        result = CliRunner().invoke(app, [*words, f"{flag}={number}"])
        assert result.exit_code == 2, (number, result.output)
        assert number in result.output or f"Invalid value for '{flag}'" in result.output, result.output


def test_values_are_described_in_a_line():
    assert described("x" * 999).count("x") < 80
    assert described(torch.zeros(2, 3)) == "a Tensor of shape (2, 3) and dtype torch.float32"
    assert described(make_llama()) == "a model (LlamaForCausalLM)"
    assert described(PROMPT) == "an object of type Prompt"
    assert described(Blending) == "the class Blending"
    assert all("\n" not in described(value) for value in ([torch.zeros(9, 1)], {"a": "\n"}, object()))
    assert described(PROMPT.inputs()) == "a dict of 'input_ids', 'attention_mask', 'chunk_spans'"
    assert described({}) == "{}"
