"""A model's RMS normalisations, found by what they compute, and done in one kernel while a pass runs on a GPU.

Eager code takes six kernels for one; over few rows that is a good part of a pass. No name is looked up: a module with
one weight vector is of one of these forms if it gives what the form gives for random input, else it stays unchanged.

    x / √(mean(x²) + ε)  · weight           rounded before the weight comes to it (Llama), or after
                         · (1 + weight)     (Gemma)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..attention.by_position import HALF
from ..kernels.device import HAS_TRITON
from ..locks import ForwardLock
from ..model.layers import wrap_forward

if HAS_TRITON:
    from ..kernels.norm import rms_norm

_FORMS = tuple((offset, late) for offset in (0.0, 1.0) for late in (True, False))
_TOLERANCE = 4e-3  # of a row's norm: bfloat16 rounds by half of it, and another form or ε is further away


Norms = dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]


@torch.no_grad()
def find_norms(decoder: nn.Module) -> Norms:
    """Module -> the same in one kernel, for every one that is of a known form."""
    found: Norms = {}
    for module in decoder.modules():
        name, epsilon = _weight_name(module), _epsilon(module)
        if name is None or epsilon is None:
            continue
        weight = module._parameters[name]
        assert weight is not None
        generator = torch.Generator(weight.device).manual_seed(0)
        x = torch.randn(4, len(weight), device=weight.device, dtype=weight.dtype, generator=generator) + 0.5
        x[2], x[3] = x[2] * getattr(module, epsilon) ** 0.5, x[3] * 30  # where ε counts, and large ones
        expected = module(x).float()
        for offset, late in _FORMS:
            run = functools.partial(_run, module, name, epsilon, offset, late)
            if bool(((run(x).float() - expected).norm(dim=-1) <= _TOLERANCE * expected.norm(dim=-1)).all()):
                found[module] = run
                break
    return found


def norms_in_one_kernel(lock: ForwardLock, norms: Norms) -> None:
    """Lets these modules run their kernel in exclusive work of `lock`; one that has a separate forward now keeps it."""
    for module, run in norms.items():
        if "forward" not in vars(module):
            wrap_forward(lock, module, functools.partial(_instead, run))


def _instead(run: Callable[..., Any], own: Callable[..., Any], *args: Any) -> Any:
    return run(*args)


def _run(
    module: nn.Module, name: str, epsilon: str, offset: float, late: bool, hidden_states: torch.Tensor
) -> torch.Tensor:
    return rms_norm(hidden_states, getattr(module, name), getattr(module, epsilon), offset, late)


def _weight_name(module: nn.Module) -> str | None:
    """The name of the module's only parameter, if that is a vector in half precision on a GPU."""
    takes_one = len(inspect.signature(type(module).forward).parameters) == 2
    if len(module._parameters) != 1 or module._modules or not takes_one or "forward" in module.__dict__:
        return None
    name, weight = next(iter(module._parameters.items()))
    fits = weight is not None and weight.ndim == 1 and weight.is_cuda and weight.dtype in HALF
    return name if fits else None


def _epsilon(module: nn.Module) -> str | None:
    """The name of its only number of that kind."""
    names = [name for name, value in vars(module).items() if "eps" in name and isinstance(value, float)]
    return names[0] if len(names) == 1 else None
