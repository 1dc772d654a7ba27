"""A model's RMS normalisations, rotary embedding and gates, in one kernel each while a pass runs on a GPU.

Eager code takes six kernels for a normalisation and a dozen for a rotary embedding; over few rows that is a good part
of a pass. Nothing outside a module instance is changed.

A normalisation is found by what it computes: a module with one weight vector is of one of these forms if it gives what
the form gives for random input, else it stays unchanged.

    x / √(mean(x²) + ε)  · weight           rounded before the weight comes to it (Llama), or after
                         · (1 + weight)     (Gemma)

In Transformers the rotary embedding is a function that attention modules call by a global name. Where that function
gives, for random input, the usual form,

    x · cos + rotate_half(x) · sin

the module's own forward runs in a pass with one global name replaced: the function's, which then means the kernel.

A gated MLP is found by the names in its forward, and by what it gives for random input:

    down(silu(gate(x)) · up(x))              the projections stay modules of the model
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..attention.by_position import HALF
from ..kernels.device import HAS_TRITON
from ..locks import ForwardLock
from ..model.hf_model import CACHE_NAMES
from ..model.layers import wrap_forward

if HAS_TRITON:
    from ..kernels import small as kernels

NAME = "apply_rotary_pos_emb"
_DEPRECATION = "transformers.utils.deprecation"  # its wrappers give arguments their new names
_SILU = ("SiLU", "SiLUActivation")  # PyTorch's, and Transformers' module of the same
_GATED = {"down_proj", "act_fn", "gate_proj", "up_proj"}
_FORMS = tuple((offset, late) for offset in (0.0, 1.0) for late in (True, False))
_TOLERANCE = 4e-3  # of a row's norm: bfloat16 rounds by half of it, and another form or ε is further away

Fused = dict[nn.Module, Callable[..., Any]]  # module -> what is called as `around(forward, …)`, with the kernel


def run_fused(lock: ForwardLock, found: Fused) -> None:
    """Runs the kernels in these modules in exclusive work of `lock`; one that has a separate forward keeps it."""
    for module, around in found.items():
        if "forward" not in vars(module):
            wrap_forward(lock, module, around)


# --- normalisation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_norms(decoder: nn.Module) -> Fused:
    """Finds the normalisations of a known form."""
    found: Fused = {}
    for module in decoder.modules():
        if (names := _weight_and_epsilon(module)) is None:
            continue
        name, epsilon = names
        weight = module._parameters[name]
        assert weight is not None
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(4, len(weight), device=weight.device, dtype=weight.dtype, generator=generator) + 0.5
        x[2], x[3] = x[2] * getattr(module, epsilon) ** 0.5, x[3] * 30  # where ε counts, and large ones
        expected = module(x).float()
        for offset, late in _FORMS:
            around = functools.partial(_norm, module, name, epsilon, offset, late)
            difference = around(module.forward, x).float() - expected
            if bool((difference.norm(dim=-1) <= _TOLERANCE * expected.norm(dim=-1)).all()):
                found[module] = around
                break
    return found


def _norm(
    module: nn.Module, name: str, epsilon: str, offset: float, late: bool, own: Any, hidden_states: torch.Tensor
) -> torch.Tensor:
    return kernels.rms_norm(hidden_states, getattr(module, name), getattr(module, epsilon), offset, late)


def _weight_and_epsilon(module: nn.Module) -> tuple[str, str] | None:
    """The names of its only parameter, if that is a vector in half precision on a GPU, and of its only ε."""
    takes_one = len(inspect.signature(type(module).forward).parameters) == 2
    epsilons = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    if len(module._parameters) != 1 or module._modules or not takes_one or "forward" in vars(module):
        return None
    name, weight = next(iter(module._parameters.items()))
    fits = weight is not None and weight.ndim == 1 and weight.is_cuda and weight.dtype in HALF
    return (name, epsilons[0]) if fits and len(epsilons) == 1 else None


# --- rotary embedding -------------------------------------------------------------------------------------------------


def find_rotary(decoder: nn.Module) -> Fused:
    """Finds the modules whose forward calls a function of the usual form: others pair or order things otherwise."""
    parameter, kinds = next(decoder.parameters()), set(map(type, decoder.modules()))
    fused = {kind: _with_kernel(kind, parameter.device, parameter.dtype) for kind in kinds}
    found = ((module, fused[type(module)]) for module in decoder.modules())
    return {module: functools.partial(_rotary, module, forward) for module, forward in found if forward is not None}


def _rotary(module: nn.Module, forward: FunctionType, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    renamed = [name for name in CACHE_NAMES if name in kwargs and name not in forward.__code__.co_varnames]
    return own(*args, **kwargs) if renamed else forward(module, *args, **kwargs)


def _with_kernel(kind: type[nn.Module], device: torch.device, dtype: torch.dtype) -> FunctionType | None:
    """Returns the forward of a class of modules, with the kernel in it; `None` where it does not call the function."""
    forward: Any = kind.forward
    while getattr(forward, "__globals__", {}).get("__name__") == _DEPRECATION and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    names = forward.__globals__
    if not _is_usual(names.get(NAME), device, dtype):
        return None
    fused = FunctionType(forward.__code__, _Names(names), forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


class _Names(dict[str, Any]):
    """The global names of a module of Transformers, looked up when they are used, but for one."""

    def __init__(self, names: dict[str, Any]) -> None:
        tested = names[NAME]

        def rotary(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            function = names[NAME]
            if function is tested and not args and not kwargs and _fits(q, k, cos, sin):
                return kernels.rotary(q, k, cos, sin)
            return function(q, k, cos, sin, *args, **kwargs)

        super().__init__({NAME: rotary, "__builtins__": names["__builtins__"]})
        self._names = names

    def __missing__(self, name: str) -> Any:
        return self._names[name]


@torch.no_grad()
def _is_usual(function: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is about as close to what the function gives in fp64 as the function itself."""
    if not isinstance(function, FunctionType):
        return False
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    given = random(1, 4, 3, 32), random(1, 2, 3, 32), *(random(1, 3, 16).repeat(1, 1, 2) for _ in range(2))
    try:
        own, exact = function(*given), function(*(states.double() for states in given))
    except (RuntimeError, TypeError, ValueError, IndexError):  # of another form
        return False
    return all(
        ours.shape == truth.shape and bool((ours - truth).norm() <= 2 * (theirs - truth).norm())
        for ours, theirs, truth in zip(kernels.rotary(*given), own, exact)
    )


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the kernel takes what it is given: whole heads turn, tables alike, nothing to differentiate."""
    rows, dim = q.shape[-2:]
    return (
        q.ndim == k.ndim == 4
        and q.dtype == k.dtype
        and q.dtype in HALF
        and k.shape[-2:] == (rows, dim)
        and q.shape[0] == k.shape[0]
        and cos.shape == sin.shape == (cos.shape[0], rows, dim)
        and cos.shape[0] in (1, q.shape[0])
        and cos.stride() == sin.stride()
        and q.stride(-1) == k.stride(-1) == cos.stride(-1) == 1
        and dim % 2 == 0
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))
    )


# --- gates ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_gates(decoder: nn.Module) -> Fused:
    """Finds the gated MLPs."""
    found: Fused = {}
    for module in decoder.modules():
        weight = _weight_of_gate(module)
        if weight is None:
            continue
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(4, weight.shape[1], device=weight.device, dtype=weight.dtype, generator=generator)
        around, expected = functools.partial(_gated, module), module(x).float()
        if bool((around(module.forward, x).float() - expected).norm() <= _TOLERANCE * expected.norm()):
            found[module] = around
    return found


def _weight_of_gate(module: nn.Module) -> torch.Tensor | None:
    """The weight (…, C) of its gate, in half precision on a GPU, if its forward names what a gated MLP has, no more."""
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    if {*names} != _GATED or "forward" in vars(module) or type(module.act_fn).__name__ not in _SILU:
        return None
    weight: Any = getattr(module.gate_proj, "weight", None)
    return weight if torch.is_tensor(weight) and weight.is_cuda and weight.dtype in HALF else None


def _gated(module: Any, own: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    act_fn = module.act_fn
    if type(act_fn).__name__ not in _SILU or act_fn._forward_hooks or act_fn._forward_pre_hooks:
        return own(x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    fits = gate.shape == up.shape and gate.dtype == up.dtype and gate.is_contiguous() and up.is_contiguous()
    return module.down_proj(kernels.gated(gate, up) if fits else act_fn(gate) * up)
