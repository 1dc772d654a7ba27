"""How a model is put together, beside its weights: what its self-test holds for, and whether it is still so.

Asked before every prompt, so everything is compared in lists that are made once. Weights are the fingerprint's.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .weights.description import ATTENTION, OURS, PLAIN, attention_of, is_of, settings_of

_GONE = object()
_CONFIG_VALUES = (*PLAIN, list, tuple, dict)
_CONFIG_NOISE = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "name_or_path")
# What peft adds to a model in eval mode is in training mode.
_ALWAYS_ALIKE = {nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
_CONTAINERS = (list, tuple, dict, set)


class Structure:
    """A model's modules, the code they run, their plain settings, and those of their configs, as they were.

    Args:
        model: the Transformers model.
        wrapped: modules whose own `forward` is not looked at, since `patch` replaces it.

    Attributes:
        with_mode: the modules below the model that may compute otherwise in training mode.
    """

    def __init__(self, model: nn.Module, wrapped: tuple[nn.Module, ...]) -> None:
        modules = list(model.modules())
        self._held = modules[1:]  # so that no id is given twice; not the model, which lives as long as its user wants
        self.with_mode = with_mode(modules[1:])
        self._children = [m._modules for m in modules]
        self._filled = [children for children in self._children if children]
        self._own = [vars(m) for m in modules if m not in wrapped]
        self._types = list({type(m) for m in modules})
        self._attributes = [vars(m) for m in modules]
        self._hooks = [
            hooks for own in self._attributes for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"])
        ]
        self._owners, self._names = _places(modules[1:])
        self._values = self._settings()
        self._plain_values = list(map(_plain, self._values))
        self._containers = [(one, _plain(one)) for one in self._values if isinstance(one, _CONTAINERS)]
        named = [(vars(m), name) for m in modules for name, one in vars(m).items() if isinstance(one, PreTrainedConfig)]
        self._with_config = named
        self._configs = list({id(own[name]): vars(own[name]) for own, name in named}.values())
        self._seen = copy.deepcopy([_config_values(config) for config in self._configs]), self._look()

    def is_as_it_was(self) -> bool:
        """Whether all of it is unchanged."""
        configs, rest = self._seen
        return self._look() == rest and self._has_settings() and all(map(_still_has, self._configs, configs))

    def _has_settings(self) -> bool:
        """Whether all settings are the same objects, or at least equal, and so is what lists and dicts hold."""
        if any(_plain(one) != then for one, then in self._containers):
            return False
        now = self._settings()
        return all(map(operator.is_, now, self._values)) or list(map(_plain, now)) == self._plain_values

    def _settings(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def has_hooks(self) -> bool:
        """Whether somebody watches or steers these modules from outside: hooks, offloading."""
        return any(self._hooks) or any(map(operator.contains, self._attributes, repeat("_hf_hook")))

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(len, self._children)),
            list(chain.from_iterable(self._filled)),
            list(map(id, chain.from_iterable(map(dict.values, self._filled)))),
            [own["forward"] for own in self._own if "forward" in own and not is_of(own["forward"], OURS)],
            [kind.forward for kind in self._types],
            list(map(type, self._held)),
            [id(own.get(name)) for own, name in self._with_config],
            [str(config.get(ATTENTION)).removeprefix("hfblend_") for config in self._configs],
            list(chain.from_iterable(map(attention_of, self._configs))),
        )


def with_mode(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of them that may compute otherwise in training mode."""
    return [module for module in modules if type(module) not in _ALWAYS_ALIKE]


def any_training(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is in training mode."""
    return any(module.training for module in modules)


def _places(modules: list[nn.Module]) -> tuple[list[dict[str, Any]], list[str]]:
    """Where settings stand, as two lists; those of PyTorch's plainest modules cannot change, or do not matter."""
    telling = [(vars(m), name) for m in modules if type(m) not in _ALWAYS_ALIKE for name in settings_of(m)]
    return [own for own, _ in telling], [name for _, name in telling]


def _plain(value: Any) -> Any:
    """A value that can be compared: of tensors and functions, who they are."""
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, set):
        return set(value)
    return value if isinstance(value, (*PLAIN, torch.dtype)) else id(value)


def _config_values(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, _CONFIG_VALUES) and name[0] != "_" and name not in _CONFIG_NOISE
    }


def _still_has(config: dict[str, Any], values: dict[str, Any]) -> bool:
    return all(config.get(name, _GONE) == value for name, value in values.items())
