"""The driver of `examples/leaderboard` in the calls of KVShareArena's harness: a tiny model, made-up questions."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import make_llama

DRIVER = Path(__file__).parents[1] / "examples" / "leaderboard" / "driver.py"
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role == 'user' and 'w60' or 'w61' }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w62 {% if enable_thinking is false %}w63 {% endif %}{% endif %}"
)
EXAM = {"system_prompt": "w70 w71", "pre_ctx": "w72 w73 ", "mid_q": " w74 ", "tail": " w75", "max_new_tokens": 6}
QUESTIONS = [  # as in its files: `_id`, `input`, `answers` and `chunks`
    {"_id": "a", "input": "w50 w51", "answers": ["w9"], "chunks": ["w10 w11 w12 " * 9, "w20 w21 " * 12, "w30 " * 15]},
    {"_id": "b", "input": "w52", "answers": ["w9"], "chunks": ["w13 w14 " * 11, "w31 w32 " * 8]},
]


@dataclass
class AnswerResult:
    """The fields that the contract names."""

    text: str
    recomputed_layer_tokens: int = 0
    dense_payload_layer_tokens: int = 0
    kv_bytes: int = 0
    ttft_ms: float | None = None
    aux: dict = field(default_factory=dict)


@pytest.fixture
def methods(monkeypatch, tmp_path, word_tokenizer):
    """Name -> class of the methods that the driver registers; `model` is the folder of a tiny model."""
    registered = {}

    def register(name):
        return lambda cls: (registered.setdefault(name, cls) and setattr(cls, "name", name)) or cls

    contract = ModuleType("kvsharearena.contract")
    vars(contract).update(AnswerResult=AnswerResult, BaseRepairMethod=object, register=register)
    monkeypatch.setitem(sys.modules, "kvsharearena", ModuleType("kvsharearena"))
    monkeypatch.setitem(sys.modules, contract.__name__, contract)
    word_tokenizer.chat_template = TEMPLATE
    word_tokenizer.save_pretrained(tmp_path)
    make_llama().save_pretrained(tmp_path)
    runpy.run_path(str(DRIVER))
    return SimpleNamespace(registered=registered, model=str(tmp_path), tokenizer=word_tokenizer)


def answers_of(methods, name, **settings):
    """The calls of the harness, in its order."""
    method, config = methods.registered[name](), {"exam": EXAM, "device": "cpu", **settings}
    method.setup(methods.model, config)
    found = []
    for row in QUESTIONS:
        caches = [method.build_cache(chunk) for chunk in row["chunks"]]
        found.append(method.answer(row["input"], caches, config))
    method.teardown()
    return found


def full_prefills(methods):
    """The answers of the model to the prompts as the arena's own methods write them."""
    model = make_llama()
    for row in QUESTIONS:
        before = "<s> w61 w70 w71 </s> <s> w60 w72 w73 "
        parts = [before, *row["chunks"], f" w74 {row['input']} w75 </s> w62 w63 "]
        ids = [i for part in parts for i in methods.tokenizer(part, add_special_tokens=False)["input_ids"]]
        output = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        yield methods.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_at_ratio_1_the_answers_are_full_prefills_of_the_arenas_prompts(methods):
    found = answers_of(methods, "hfblend_suffix_attention", ratio=1)
    assert [one.text for one in found] == [*full_prefills(methods)]
    prefix_pairs = 9 * 4  # tokens, layers: at ratio 1 the prefix is computed, too
    assert [one.recomputed_layer_tokens - one.dense_payload_layer_tokens for one in found] == [prefix_pairs] * 2


@pytest.mark.parametrize("name", ["hfblend", "hfblend_filler", "hfblend_kv_deviation"])
def test_costs_are_measured(methods, name):
    layers, bytes_a_token = 4, 4 * 2 * 2 * 16 * 4  # of layers, K and V, heads, dimensions, fp32
    for one, row in zip(answers_of(methods, name, ratio=0.2), QUESTIONS):
        tokens = sum(len(chunk.split()) for chunk in row["chunks"])
        assert one.dense_payload_layer_tokens == tokens * layers
        assert one.kv_bytes == tokens * bytes_a_token
        assert 0.1 * tokens * layers < one.recomputed_layer_tokens < tokens * layers
        assert one.ttft_ms > 0
        assert one.aux["hits"] == len(row["chunks"])
        json.dumps(one.aux)  # the harness writes it
