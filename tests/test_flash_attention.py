"""Models loaded with flash attention, which takes no mask: a stand-in on a CPU, the real one on a GPU that has it."""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_prompt, store_of_true_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils

import hfblend
from hfblend.support.registry import model_of

NAME = "flash_attention_4"
PROMPT = make_prompt()


def attend_without_mask(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """As Transformers calls flash attention: the last rows of a causal triangle, padding in a mask (B, T) if any."""
    assert module.config._attn_implementation == NAME  # the real one finds its kernels by it
    rows, length = query.shape[2], key.shape[2]
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None].bool()
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_llama(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, attend_without_mask)
    model = make_llama()
    model.config._attn_implementation_internal = NAME
    return model


@pytest.mark.parametrize("ratio", [1.0, 0.3, 0.0])
def test_true_kv_gives_stocks_answer(flash_llama, ratio):
    stock = generate(flash_llama, {"input_ids": PROMPT.input_ids}, max_new_tokens=8)
    store = store_of_true_kv(flash_llama, PROMPT)
    with hfblend.patch(flash_llama, config=config(ratio), store=store) as blender:
        blended = generate(flash_llama, PROMPT.inputs(), max_new_tokens=8)
        assert blender.trace.blended
    assert torch.equal(blended.sequences, stock.sequences)
    assert largest_difference(blended, stock) <= 1e-3


def test_prompts_blend_as_they_do_with_sdpa(flash_llama):
    """Chunks are prefilled, rows selected and a batch is padded."""
    inputs = hfblend.Prompt.batch([PROMPT, make_prompt(sizes=(40, 12), seed=2)], pad_token_id=0)
    answers = []
    for model in (flash_llama, make_llama()):
        with hfblend.patch(model, config=config(0.3)) as blender:
            answers.append(generate(model, dict(inputs)))
            assert blender.trace.blended
    assert largest_difference(*answers) <= 1e-3


def of_this_machine():
    """The versions that are installed and run here."""
    found = (n for n in (2, 3, 4) if getattr(import_utils, f"is_flash_attn_{n}_available")())
    return [f"flash_attention_{n}" for n in found] if torch.cuda.is_available() else []


@pytest.mark.gpu
@pytest.mark.parametrize("name", of_this_machine() or [pytest.param(None, marks=pytest.mark.skip("no flash-attn"))])
def test_the_real_one_on_a_gpu(name):
    """Errors against fp32 are stock's, of the first token by rows and of the others by a graph."""
    prompt = make_prompt(sizes=(200, 311, 133), prefix=37, suffix=21)
    model, exact = make_llama(head_dim=64, dtype=torch.bfloat16).cuda(), make_llama(head_dim=64).cuda()
    exact.load_state_dict(model.state_dict())
    model.set_attn_implementation(name)
    stock = generate(model, {"input_ids": prompt.input_ids.cuda()}, max_new_tokens=24)
    runs = []
    for ratio in (1.0, 0.15):
        with hfblend.patch(model, config=config(ratio), store=store_of_true_kv(model, prompt)) as blender:
            for _ in range(2):
                runs.append(generate(model, prompt.inputs(), max_new_tokens=24))
            assert blender.trace.blended
            assert model_of(model).decoding._graph is not None
    own = error(stock, exact, len(prompt))
    assert all(error(run, exact, len(prompt)) <= max(2 * own, 0.02) for run in runs)


@torch.no_grad()
def error(run, exact, length):
    truth = exact(run.sequences).logits[0, length - 1 : -1]
    return float((torch.cat(run.logits).float() - truth).norm() / truth.norm())
