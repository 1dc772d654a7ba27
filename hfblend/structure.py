"""How a model is put together, beside its weights: what its self-test holds for, and whether it is still so.

Asked before every prompt, so everything is compared in lists that are made once. Weights are the fingerprint's.
"""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

from torch import nn

_GONE = object()
_PLAIN = (bool, int, float, str, type(None))
_CONFIG_VALUES = (*_PLAIN, list, tuple, dict)
_CONFIG_NOISE = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "name_or_path")
_NOISE = ("training", "name_or_path", "gradient_checkpointing", "loss_type", "kernel_config", "attention_dropout",
          "rope_deltas")  # fmt: skip
# What peft adds to a model in eval mode is in training mode.
_ALWAYS_ALIKE = {nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
_OURS = (f"{__package__}.",)
_WRAPPERS = (*_OURS, "accelerate.", "torch.", "transformers.")  # they run the module's own code
_ATTENTION = "_attn_implementation_internal"  # of a config; a pass puts "hfblend_" before it while it runs


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
        self._places = [(vars(m), name) for m in modules[1:] for name in _settings_of(m)]
        self._with_config = [vars(m) for m in modules if hasattr(vars(m).get("config"), "to_dict")]
        self._configs = list({id(one["config"]): vars(one["config"]) for one in self._with_config}.values())
        self._seen = copy.deepcopy([_config_values(config) for config in self._configs]), self._look()

    def is_as_it_was(self) -> bool:
        """Whether all of it is unchanged."""
        configs, rest = self._seen
        return self._look() == rest and all(map(_still_has, self._configs, configs))

    def has_hooks(self) -> bool:
        """Whether somebody watches or steers these modules from outside: hooks, offloading."""
        return any(self._hooks) or any(map(operator.contains, self._attributes, repeat("_hf_hook")))

    def _look(self) -> tuple[list[Any], ...]:
        return (
            list(map(len, self._children)),
            list(chain.from_iterable(self._filled)),
            list(map(id, chain.from_iterable(map(dict.values, self._filled)))),
            [own["forward"] for own in self._own if "forward" in own and not _is_of(own["forward"], _OURS)],
            [kind.forward for kind in self._types],
            [_plain(own.get(name, _GONE)) for own, name in self._places],
            [id(one.get("config")) for one in self._with_config],
            [str(config.get(_ATTENTION)).removeprefix("hfblend_") for config in self._configs],
        )


def replaced_code(model: nn.Module) -> str:
    """What names the code that was put in the place of the modules' own: K/V depend on it, and no weight says so."""
    forwards = ((path, vars(module).get("forward")) for path, module in model.named_modules())
    found = [f"{path}: {_code(own)}" for path, own in forwards if own is not None and not _is_of(own, _WRAPPERS)]
    kinds: set[Any] = {type(module) for module in model.modules()}
    found += sorted(f"{kind.__qualname__}: {_code(kind.forward)}" for kind in kinds if _is_replaced(kind))
    return "\n".join(found)


def _is_replaced(kind: Any) -> bool:
    """Whether a class has another `forward` than it was written with."""
    names = {f"{one.__qualname__}.forward" for one in kind.__mro__} | {"_forward_unimplemented"}
    homes = (*_WRAPPERS, *(one.__module__ for one in kind.__mro__))
    return getattr(kind.forward, "__qualname__", "") not in names or not _is_of(kind.forward, homes)


def _code(function: Any) -> str:
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    content = "" if code is None else hashlib.sha256(code.co_code + str(code.co_names).encode()).hexdigest()
    return f"{_home(function)}.{getattr(function, '__qualname__', type(function))} {content}"


def with_mode(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of them that may compute otherwise in training mode."""
    return [module for module in modules if type(module) not in _ALWAYS_ALIKE]


def any_training(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is in training mode."""
    return any(module.training for module in modules)


def _settings_of(module: nn.Module) -> list[str]:
    """The attributes that say how it computes; those of PyTorch's own modules cannot change, or do not matter."""
    if type(module).__module__.startswith("torch.nn."):
        return []
    values = vars(module).items()
    return [name for name, value in values if isinstance(value, _PLAIN) and not _is_noise(name)]


def _plain(value: Any) -> Any:
    """A value that can be compared: tensors cannot."""
    return value if isinstance(value, _PLAIN) else id(value)


def _is_noise(name: str) -> bool:
    return name[0] == "_" or name in _NOISE or name.endswith("_cached")  # by a rotary module, of the longest prompt


def _is_of(forward: Any, packages: tuple[str, ...]) -> bool:
    """Whether code of one of these packages stands there: hfblend's, say, while a pass of another thread runs."""
    return _home(forward).startswith(packages)


def _home(function: Any) -> str:
    """The module in which a function was written, whatever it says of itself."""
    function = getattr(function, "func", function)
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def _config_values(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, _CONFIG_VALUES) and name[0] != "_" and name not in _CONFIG_NOISE
    }


def _still_has(config: dict[str, Any], values: dict[str, Any]) -> bool:
    return all(config.get(name, _GONE) == value for name, value in values.items())
