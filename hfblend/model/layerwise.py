"""Forwards of the self-test in which each layer starts from known input, and how much rounding alone changes a layer.

    first run    x₀ ─ layer 0 ─ x₁ ─ layer 1 ─ x₂ …     what enters each layer is kept
    a later one  x₀ ─ layer 0 ─ x₁'                     each layer starts from what entered it in the first run, so
                           x₁ ─ layer 1 ─ x₂' …         rounding does not add up, and a fault shows where it is

K/V of a layer then differ from those of the first run by rounding them once. What comes out of a layer (x₁', x₂' …)
differs by what the layer makes of rounding inside it. That is measured: the layers run once more, from input that
differs by as much as one product of this model on its device is rounded (bf16, fp16, TF32 where it is on).

Shapes: T tokens, S of them in a pass, C hidden size, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..blend.model import Watched
from ..kv.rows import KV
from .compiled import run_as_written
from .hf_model import HFModel, UnsupportedModel
from .layers import hidden_of, hook_before, watch, with_hidden

T = TypeVar("T")

LENGTH = 16  # T
STARTS_AT = 1  # the layer at which a shortened pass starts
HARMLESS = 1e-3  # a change of a layer's output, of its norm: below it nothing is asked
_TIMES, _MOST = 8, 0.2  # how much more than the measured rounding is still taken for rounding, and how much at most
_FEW_BITS = 2**-8  # how quantised layers may round their input
_FULL_PRECISION = 1e-5

# What enters the layers, (…, T, C), in the order in which they run, which may be more than once; last, what comes out.
Hidden = list[torch.Tensor]


@dataclass
class Steps:
    """A forward, seen layer by layer."""

    kv: dict[int, KV]
    hidden: Hidden


@dataclass
class Stock(Steps):
    """A stock forward over `LENGTH` tokens, and how far stock is from itself.

    Attributes:
        entered: what entered the layer `STARTS_AT`; `None` where that cannot be seen.
        roundoff: relative error of one product, as this model computes it.
        again: forwards that differ from it by rounding only, each layer from (nearly) the same input.
    """

    entered: Watched | None
    roundoff: float
    again: list[Steps]

    @property
    def rounds_little(self) -> bool:
        return self.roundoff < _FULL_PRECISION

    @property
    def kv_tolerance(self) -> float:
        """The largest relative difference of keys or values that are computed from equal input by equal kernels."""
        dtype = next(iter(self.kv.values()))[0].dtype
        return max(4 * torch.finfo(dtype).eps, 1e-4)

    def kv_row_tolerance(self, layer: int) -> float:
        """The same where other rows run with these."""
        pairs = [pair for steps in self.again for pair in zip(steps.kv[layer], self.kv[layer])]
        return max(self.kv_tolerance, allowed(max(apart(*pair) for pair in pairs)))

    def tolerance(self, step: int) -> float:
        """The largest relative difference of `hidden[step]`, where the layer before had equal input."""
        furthest = max(apart(steps.hidden[step], self.hidden[step]) for steps in self.again)
        return allowed(max(self.roundoff, furthest))


def allowed(rounding: float) -> float:
    """The largest relative difference that is still taken for rounding, where that much was measured."""
    return min(max(HARMLESS, _TIMES * rounding), _MOST)


def stock_steps(hf_model: HFModel) -> Stock:
    """Runs the model twice: the second time, each layer's input is rounded otherwise."""
    positions, entered = torch.arange(LENGTH, device=hf_model.device), None

    def run() -> Steps:
        nonlocal entered
        if hf_model.may_skip_layers and hf_model.num_layers > STARTS_AT:
            entered = watch(hf_model.lock, hf_model.layers, STARTS_AT, positions)
        return run_steps(hf_model, lambda: hf_model.run_stock(positions))

    first = hf_model.lock.exclusive(run)
    roundoff = _roundoff(hf_model, next(iter(first.kv.values()))[0].dtype)
    noisy = [_with_noise(hidden, roundoff, seed) for seed, hidden in enumerate(first.hidden)]
    again = run_steps(hf_model, lambda: hf_model.run_stock(positions), noisy)
    entered = entered if entered is not None and entered.hidden is not None else None
    return Stock(first.kv, first.hidden, entered, roundoff, [again])


def run_steps(
    hf_model: HFModel, run: Callable[[], tuple[dict[int, KV], Any]], given: Sequence[torch.Tensor | None] = ()
) -> Steps:
    """Runs a forward, and keeps what enters each layer.

    Args:
        run: returns K/V and the output of the forward.
        given: enters instead; `None` leaves what there is. The last is not used.

    Raises:
        UnsupportedModel: other layers ran than before.
    """
    hidden: Hidden = []

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entering = hidden_of(args, kwargs)
        if entering is None:
            return None
        hidden.append(entering.clone())  # a layer may add to it in place
        other = given[len(hidden) - 1] if len(hidden) <= len(given) else None
        return None if other is None else with_hidden(args, kwargs, other.clone())

    kv, output = _before_layers(hf_model, keep, run)
    if given and len(given) != len(hidden) + 1:
        raise UnsupportedModel(
            f"{type(hf_model.model).__name__} runs {len(hidden)} layers, and before, {len(given) - 1}."
        )
    return Steps(kv, [*hidden, output[0]])


def noisy(hf_model: HFModel, work: Callable[[], T]) -> T:
    """Runs some work in which what enters each layer differs by as much as one product is rounded."""
    roundoff = _roundoff(hf_model, hf_model.dtype)

    def perturb(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_of(args, kwargs)
        return None if hidden is None else with_hidden(args, kwargs, _with_noise(hidden, roundoff, seed=0))

    return _before_layers(hf_model, perturb, work)


def _before_layers(hf_model: HFModel, before: Callable[..., Any], work: Callable[[], T]) -> T:
    """Runs some work in which `before(args, kwargs)` says with what each layer goes on."""

    def run() -> T:
        for layer in hf_model.layers:
            hook_before(hf_model.lock, layer, before)
        return work()

    return run_as_written(tuple(hf_model.layers), functools.partial(hf_model.lock.exclusive, run))


def _roundoff(hf_model: HFModel, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 512, generator=generator).to(hf_model.device, dtype) for n in (LENGTH, 512))
    exact = x.cpu().double() @ weight.cpu().double().T
    error = float((nn.functional.linear(x, weight).cpu().double() - exact).norm() / exact.norm())
    return max(error, _FEW_BITS) if hf_model.is_quantised else error


def _with_noise(hidden: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    generator = torch.Generator(hidden.device).manual_seed(seed)
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
    return (hidden.float() * (1 + size * noise)).to(hidden.dtype)


# --- how far apart ------------------------------------------------------------------------------------------------


def row_errors(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(T,) relative difference of each row, of hidden states (…, T, C) or of keys or values (1, Hkv, T, D)."""
    a, b = (states.cpu().float().movedim(-2, 0).flatten(1) for states in (found, truth))
    return (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-20)


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative difference of two tensors."""
    return float((found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-20))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The median of the rows' differences; a row that goes to other experts does not count."""
    count = min(one.shape[-2], other.shape[-2])
    return float(row_errors(one[..., :count, :], other[..., :count, :]).median())
