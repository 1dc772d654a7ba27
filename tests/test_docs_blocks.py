"""Every Python block of README and docs runs, in order, in one namespace a page, on a tiny model of random weights.

A block that cannot run here has the line `<!-- not run: why -->` before its fence, and is counted in `NOT_RUN`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hfblend
from hfblend.demo import model as demo_model
from hfblend.demo.demo import demo_data

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = Counter(
    {"generate.md": 4, "models.md": 1, "performance.md": 1, "serving.md": 2, "store.md": 1, "troubleshooting.md": 2}
)
CALLS = {"quality.md": "pictures(model, prompt)"}  # where a page only defines a function
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Block:
    line: int
    code: str
    why_not: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, m.start("code")) + 1, m["code"], m["why"]) for m in BLOCK.finditer(text)]


PAGES = {page: blocks_of(page) for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [passage["text"] + "\n\n" for passage in demo_data()["passages"]]


@pytest.fixture(scope="module")
def tokenizer(texts) -> PreTrainedTokenizerFast:
    """Byte pairs learnt from the demo's passages, with SmolLM2's chat markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[:2]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.15,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks], ids=lambda page: page.name)
def test_python_blocks_run(page, tokenizer, texts, tmp_path, monkeypatch):
    model, data = tiny_model(tokenizer), demo_data()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HFBLEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "load", lambda *_, **__: (model, tokenizer))
    suffix = "Where was the builder of Gannet Light born?"
    namespace = {
        "hfblend": hfblend,
        "model": model,
        "tokenizer": tokenizer,
        "system": data["system"] + "\n",
        "documents": texts,
        "prompt": hfblend.Prompt.from_texts(tokenizer, prefix=data["system"], chunks=texts[:4], suffix=suffix),
        "store": hfblend.MemoryStore(),
        "torch": torch,
    }
    for block in PAGES[page]:
        if block.why_not is None:
            code = block.code.replace('"/data/', f'"{tmp_path}/')
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)
    exec(CALLS.get(page.name, ""), namespace)


def test_blocks_that_are_not_run_are_counted():
    found = Counter({page.name: sum(b.why_not is not None for b in blocks) for page, blocks in PAGES.items()})
    assert +found == NOT_RUN
