"""Weights that accelerate has moved out of memory, and the devices where modules compute.

Between forwards, an offloaded parameter is on `meta`. A hook on the module that owns it, or on one around it, brings it
to the module's device for a forward, and knows its place in RAM or in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device where a module computes: that of its weights, or where its hooks bring them. Looks at one weight."""
    first = next(module.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    tensors = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


def has_no_values(module: nn.Module) -> bool:
    """Whether the weights are on `meta`, and no hooks bring them from elsewhere."""
    weights = [*module.parameters()]
    hooked = any(hook for part in module.modules() for hook in _hooks(part))
    return bool(weights) and all(one.is_meta for one in weights) and not hooked


class OffloadedWeights:
    """A model's weights that are on `meta`, each read on request.

    >>> weight = OffloadedWeights(model).read("model.layers.0.mlp.up_proj.weight")  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self._maps = {
            path: hook.weights_map for path, module in model.named_modules() for hook in _hooks(module) if hook.offload
        }

    def read(self, name: str) -> torch.Tensor | None:
        """Returns the weight, from RAM or from its file; `None` if no hook knows it."""
        weights, key = self._find(name)
        return weights[key] if weights else None

    def in_ram(self, name: str) -> torch.Tensor | None:
        """Returns the weight, if it is in RAM; files are taken not to change while they are used."""
        weights, key = self._find(name)
        return getattr(weights, "state_dict", weights).get(key)

    def _find(self, name: str) -> tuple[Mapping[str, torch.Tensor], str]:
        """The innermost map that has the weight, and its name there; an empty map if there is none."""
        parts = name.split(".")
        for depth in reversed(range(len(parts))):
            weights, key = self._maps.get(".".join(parts[:depth])), ".".join(parts[depth:])
            while weights is not None and hasattr(weights, "prefix"):  # a view of a larger map
                weights, key = weights.dataset, weights.prefix + key
            if weights is not None and key in weights:
                return weights, key
        return {}, name


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on a module that move it or its inputs."""
    hook = module.__dict__.get("_hf_hook")
    yield from (one for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "execution_device"))
