"""The rotary embedding in one kernel: equal to the model's own, only in our passes, and gone afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import MODELS
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

pytest.importorskip("hfblend.kernels", reason="needs triton")
from hfblend.gpu.fused_rotary import NAME, find_rotary, rotary_in_one_kernel
from hfblend.kernels import rotary
from hfblend.locks import ForwardLock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = vars(modeling_llama)


def states(batch=1, heads=4, kv_heads=2, rows=5, dim=16, dtype=torch.bfloat16, tables=1):
    """Queries and keys as projections leave them, heads behind rows, and tables whose halves differ."""
    torch.manual_seed(0)
    query, key = (
        torch.randn(batch, rows, h, dim, device=DEVICE, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads)
    )
    cos, sin = (torch.randn(tables, rows, dim, device=DEVICE, dtype=dtype) for _ in range(2))
    return query, key, cos, sin


@pytest.mark.parametrize(
    "shape", [{}, {"dim": 80, "rows": 33}, {"batch": 2, "tables": 2}, {"batch": 2}, {"kv_heads": 1}]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_equals_the_formula(shape, dtype):
    given = states(dtype=dtype, **shape)
    expected = modeling_llama.apply_rotary_pos_emb(*(t.double() for t in given))
    for ours, exact in zip(rotary(*given), expected):
        assert ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype] * exact.norm()


def test_only_functions_of_the_usual_form_are_found():
    assert find_rotary(MODELS["llama-gqa"](torch.bfloat16).model.to(DEVICE)) == [LLAMA]
    assert not _finds(modeling_glm)  # pairs 2i with 2i + 1


def _finds(module):
    from hfblend.gpu.fused_rotary import _is_usual

    return _is_usual(getattr(module, NAME), torch.device(DEVICE), torch.bfloat16)


def in_a_pass(work):
    lock = ForwardLock()

    def run():
        rotary_in_one_kernel(lock, [LLAMA])
        return work()

    return lock.exclusive(run)


def answered(*given, **options):
    return in_a_pass(lambda: LLAMA[NAME](*given, **options))


def test_it_answers_in_a_pass_and_is_gone_afterwards():
    own, given = LLAMA[NAME], states()
    eager = own(*given)
    elsewhere = []

    def outer():
        inside = answered(*given)
        assert LLAMA[NAME] is not own
        thread = threading.Thread(target=lambda: elsewhere.extend(LLAMA[NAME](*given)))
        thread.start()
        thread.join()
        return inside

    inside = in_a_pass(outer)
    assert LLAMA[NAME] is own
    assert all(torch.equal(a, b) for a, b in zip(elsewhere, eager))  # other threads' calls are the function's
    assert not all(torch.equal(a, b) for a, b in zip(inside, eager))  # rounded once
    assert all((a - b).float().norm() <= 1e-2 * b.float().norm() for a, b in zip(inside, eager))


@pytest.mark.parametrize("why", ["fp32", "unsqueeze_dim", "partial", "gradient"])
def test_other_calls_are_left_to_the_function(why):
    query, key, cos, sin = states(dtype=torch.float32 if why == "fp32" else torch.bfloat16)
    options = {}
    if why == "unsqueeze_dim":
        query, key, options = query.transpose(1, 2), key.transpose(1, 2), {"unsqueeze_dim": 2}
    if why == "partial":
        cos, sin = cos[..., :1], sin[..., :1]
    if why == "gradient":
        query = query.clone().requires_grad_()
    eager = LLAMA[NAME](query, key, cos, sin, **options)
    inside = answered(query, key, cos, sin, **options)
    assert all(torch.equal(a, b) for a, b in zip(inside, eager))
    assert inside[0].requires_grad == (why == "gradient")


def test_a_pass_that_fails_leaves_the_function():
    own = LLAMA[NAME]
    with pytest.raises(ZeroDivisionError):
        in_a_pass(lambda: 1 / 0)
    assert LLAMA[NAME] is own
