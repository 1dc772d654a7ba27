"""Rotary embedding, and gates, in one kernel: equal to the model's own, only in our passes, and gone afterwards."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import MODELS
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

pytest.importorskip("triton")
from hfblend.gpu import fused
from hfblend.gpu.fused import NAME, find_gates, find_rotary, run_fused
from hfblend.kernels.small import rotary
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
    decoder = MODELS["llama-gqa"](torch.bfloat16).model.to(DEVICE)
    assert list(find_rotary(decoder)) == [layer.self_attn for layer in decoder.layers]
    usual = fused._is_usual
    assert not usual(getattr(modeling_glm, NAME), torch.device(DEVICE), torch.bfloat16)  # pairs 2i with 2i + 1


@pytest.fixture
def decoder():
    return MODELS["llama-gqa"](torch.bfloat16).model.to(DEVICE)


@pytest.fixture
def answered(monkeypatch):
    """Shapes of the queries that the kernel turned."""
    shapes, own = [], fused.kernels.rotary
    monkeypatch.setattr(fused.kernels, "rotary", lambda *given: shapes.append(given[0].shape) or own(*given))
    return shapes


@torch.no_grad()
def forward(decoder):
    return decoder(input_ids=torch.arange(5, device=DEVICE)[None] + 3).last_hidden_state


def in_a_pass(decoder, work):
    lock, found = ForwardLock(), find_rotary(decoder)

    def run():
        run_fused(lock, found)
        return work()

    return lock.exclusive(run)


def test_it_answers_in_a_pass_and_is_gone_afterwards(decoder, answered):
    own, eager, elsewhere = LLAMA[NAME], forward(decoder), []
    answered.clear()

    def work():
        answered.clear()  # of the search
        inside = forward(decoder)
        assert len(answered) == len(decoder.layers)
        assert LLAMA[NAME] is own  # Transformers' module is never written to
        thread = threading.Thread(target=lambda: elsewhere.append(forward(decoder)))
        thread.start()
        thread.join()
        assert len(answered) == len(decoder.layers)  # other threads' calls are the function's
        return inside

    inside = in_a_pass(decoder, work)
    calls = len(answered)
    assert torch.equal(forward(decoder), eager)
    assert torch.equal(elsewhere[0], eager)
    assert len(answered) == calls
    assert not any("forward" in vars(module) for module in decoder.modules())
    assert (inside - eager).float().norm() <= 3e-2 * eager.float().norm()  # over four layers


def test_names_of_the_module_are_looked_up_when_they_are_used(decoder, answered, monkeypatch):
    """Another library may replace the function, or any other name, after ours was made."""
    found, lock, called = find_rotary(decoder), ForwardLock(), []
    answered.clear()
    own = LLAMA[NAME]
    monkeypatch.setitem(LLAMA, NAME, lambda *given, **options: called.append(1) or own(*given, **options))

    def run():
        run_fused(lock, found)
        return forward(decoder)

    lock.exclusive(run)
    assert (len(called), answered) == (len(decoder.layers), [])


def test_a_forward_that_stands_before_the_class_s_is_kept(decoder, answered):
    attention, calls = decoder.layers[0].self_attn, []
    own = attention.forward
    attention.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    found = find_rotary(decoder)
    answered.clear()
    lock = ForwardLock()

    def run():
        run_fused(lock, found)
        return forward(decoder)

    lock.exclusive(run)
    assert (len(calls), len(answered)) == (1, len(decoder.layers) - 1)


@pytest.mark.parametrize("why", ["fp32", "unsqueeze_dim", "partial", "gradient"])
def test_other_calls_are_left_to_the_function(why, answered):
    query, key, cos, sin = states(dtype=torch.float32 if why == "fp32" else torch.bfloat16)
    options = {}
    if why == "unsqueeze_dim":
        query, key, options = query.transpose(1, 2), key.transpose(1, 2), {"unsqueeze_dim": 2}
    if why == "partial":
        cos, sin = cos[..., :1], sin[..., :1]
    if why == "gradient":
        query = query.clone().requires_grad_()
    eager = LLAMA[NAME](query, key, cos, sin, **options)
    inside = fused._Names(LLAMA)[NAME](query, key, cos, sin, **options)
    assert all(torch.equal(a, b) for a, b in zip(inside, eager))
    assert (inside[0].requires_grad, answered) == (why == "gradient", [])


def test_a_pass_that_fails_leaves_the_modules(decoder):
    with pytest.raises(ZeroDivisionError):
        in_a_pass(decoder, lambda: 1 / 0)
    assert not any("forward" in vars(module) for module in decoder.modules())


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gate_in_one_kernel_equals_the_formula(dtype):
    gate, up = (torch.randn(3, 700, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype) for i in (0, 1))
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (fused.kernels.gated(gate, up).double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.gpu
@torch.no_grad()
def test_gated_mlps_run_one_kernel_in_a_pass_unless_their_activation_is_watched(decoder, monkeypatch):
    shapes, own = [], fused.kernels.gated
    found = find_gates(decoder)
    assert list(found) == [layer.mlp for layer in decoder.layers]
    monkeypatch.setattr(fused.kernels, "gated", lambda gate, up: shapes.append(gate.shape) or own(gate, up))
    mlp = decoder.layers[0].mlp
    x = torch.randn(2, 5, mlp.gate_proj.in_features, device=DEVICE, dtype=torch.bfloat16)
    inside = found[mlp](mlp.forward, x)
    assert (inside - mlp(x)).float().norm() <= 4e-3 * mlp(x).float().norm()
    assert shapes == [(2, 5, mlp.gate_proj.out_features)]
    seen = []
    mlp.act_fn.register_forward_hook(lambda *given: seen.append(1))
    found[mlp](mlp.forward, x)
    assert (len(shapes), seen) == (1, [1])
