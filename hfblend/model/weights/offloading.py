"""What accelerate has moved away: where a module computes, and its weights that are not in memory.

Between forwards, an offloaded parameter is on `meta`. A hook on the module that owns it, or on one around it, brings it
for a forward, to the module's device, and knows where it lies: in RAM or in a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where its hooks bring them. Asked often: one is looked at."""
    first = next(module.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    tensors = chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))


class OffloadedWeights:
    """A model's weights that are on `meta`, each read when it is asked for.

    >>> weight = OffloadedWeights(model).read("model.layers.0.mlp.up_proj.weight")  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self._maps = {
            path: hook.weights_map for path, module in model.named_modules() for hook in _hooks(module) if hook.offload
        }

    def read(self, name: str) -> torch.Tensor | None:
        """The weight, from RAM or from its file; `None` if no hook knows it."""
        found = self._find(name)
        return None if found is None else found[0][found[1]]

    def in_ram(self, name: str) -> torch.Tensor | None:
        """The weight, if it is in RAM; files are taken not to change while they are used."""
        found = self._find(name)
        return None if found is None else in_ram(*found)

    def _find(self, name: str) -> tuple[Mapping[str, torch.Tensor], str] | None:
        """The innermost map that has the weight, and what it is called there."""
        parts = name.split(".")
        for depth in reversed(range(len(parts))):
            weights, key = self._maps.get(".".join(parts[:depth])), ".".join(parts[depth:])
            while weights is not None and hasattr(weights, "prefix"):  # a view of a larger map
                weights, key = weights.dataset, weights.prefix + key
            if weights is not None and key in weights:
                return weights, key
        return None


def in_ram(weights: Any, key: str) -> torch.Tensor | None:
    """The weight, if the map has it in memory: no file is read."""
    return getattr(weights, "state_dict", weights).get(key)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks on a module that move it or its inputs."""
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device"):
            yield one
