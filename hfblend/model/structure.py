"""The structure of a model without its weights: modules, the code they run, their settings, hooks and configs.

One walk serves two questions: whether it is still as it was, asked before every prompt and so answered by comparing
lists that are made once; and the text of it that keys of chunk KV contain, the same for every copy of the model.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compiled import as_written
from .weights import adapters
from .weights import description as told
from .weights.description import FUNCTIONS, OURS, PLAIN

Place = tuple[dict[str, Any], str]  # the attributes of a module, and the name of one

_CONTAINERS = (list, tuple, dict, set)
_SETTINGS = (*PLAIN, *FUNCTIONS, *_CONTAINERS, torch.dtype, torch.Tensor)
_CONFIG_VALUES = (*PLAIN, list, tuple, dict)
_CONFIG_NOISE = ("use_cache", "return_dict", "output_hidden_states", "output_attentions", "name_or_path")
# Of modules: changed by forwards themselves, used in training only, or noted by others about the model.
_NOISE = ("training", "forward", "name_or_path", "gradient_checkpointing", "loss_type", "kernel_config", "rope_deltas",
          "attention_dropout", "hf_device_map", "_is_hf_initialized", "_old_forward", "_hf_hook", "meta",
          "all_tied_weights_keys", "_tp_size", "_device_mesh", "_use_kernels", "_weight_conversions",
          "_hf_tp_plan", "_hf_device_mesh", "_hfblend", "_is_hooked", "peft_config")  # fmt: skip
_BOOKKEEPING = frozenset((*vars(nn.Module()), *dir(PreTrainedModel)))
# PyTorch's plainest modules, whose settings cannot change or do not matter. peft leaves them in training mode.
_ALWAYS_ALIKE = {nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
_DEPTH = 4  # lists in lists


class Members:
    """The members of some dicts, by name and identity, as they were when this was made."""

    def __init__(self, dicts: list[dict[str, Any]]) -> None:
        self._filled = [members for members in dicts if members]
        self._empty = [members for members in dicts if not members]
        self._lengths, self._names = self._look()
        self._held = list(self._values())

    def are_as_they_were(self) -> bool:
        same_names = not any(self._empty) and self._look() == (self._lengths, self._names)
        return same_names and all(map(operator.is_, self._values(), self._held))

    def _look(self) -> tuple[list[int], list[str]]:
        return list(map(len, self._filled)), list(chain.from_iterable(self._filled))

    def _values(self) -> Iterator[Any]:
        return chain.from_iterable(map(dict.values, self._filled))


class Structure:
    """A model's modules, the code they run, their plain settings, and those of their configs, as they were.

    It holds the model's attributes but not the model, which lives as long as its user wants.

    Args:
        model: the Transformers model.
        wrapped: modules whose own `forward` is not compared, since `patch` replaces it.

    Attributes:
        with_mode: the modules below the model that may compute otherwise in training mode.
    """

    def __init__(self, model: nn.Module, wrapped: tuple[nn.Module, ...] = ()) -> None:
        named = list(model.named_modules())
        self._named, self._attributes = named[1:], [vars(module) for _, module in named]
        self._inner = [module for _, module in self._named]
        self.with_mode = with_mode(self._inner)
        self._classes = list({type(module) for _, module in named})
        self._children = Members([own["_modules"] for own in self._attributes])
        self._hooks = [(path, hooks) for path, m in named for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._hook_dicts = [hooks for _, hooks in self._hooks]
        self._unwrapped = [vars(module) for module in self._inner if module not in wrapped]
        self._forwards = self._own_forwards()
        places = [(vars(module), name) for module in self.with_mode for name in _settings_of(module)]
        places += [(vars(model), name) for name, value in vars(model).items() if isinstance(value, float)]
        self._owners, self._names = [own for own, _ in places], [name for _, name in places]
        self._values = self._settings()
        self._plain_values = list(map(_plain, self._values))
        self._containers = [(one, _plain(one)) for one in self._values if isinstance(one, _CONTAINERS)]
        self._config_places = list(_places_of_configs(self._attributes))
        self._configs = [vars(config) for config in _configs_in(self._config_places)]
        self._config_values = copy.deepcopy(list(map(_settings_of_config, self._configs)))
        self._seen = self._look()

    def is_as_it_was(self) -> bool:
        """Whether all of it is unchanged."""
        return (
            self._children.are_as_they_were()
            and self._look() == self._seen
            and self._runs_same_forwards()
            and self._has_settings()
            and list(map(_settings_of_config, self._configs)) == self._config_values
        )

    def has_hooks(self) -> bool:
        """Whether hooks watch or steer these modules from outside, or move them (offloading)."""
        return any(self._hook_dicts) or any(map(operator.contains, self._attributes, repeat("_hf_hook")))

    def foreign_hooks(self) -> list[tuple[str, Any]]:
        """The hooks that no library has put there, by the paths of their modules."""
        if not any(self._hook_dicts):
            return []
        held = ((path, hook) for path, hooks in self._hooks if hooks for hook in tuple(hooks.values()))
        return [(path, hook) for path, hook in held if told.is_foreign(hook)]

    def described(self, model: nn.Module) -> list[Any]:
        """The text of everything but hooks: classes, settings, code that no library has, configs."""
        parts = list(_without_adapters([("", model), *self._named]))
        return [
            [(path, told.class_name(type(module)), *_told(module)) for path, module in parts],
            sorted({line for kind in {type(module) for _, module in parts} for line in told.code_of_class(kind)}),
            _other_configs(parts, model),
            sorted({line for config in self._configs for line in _foreign_attention(config)}),
        ]

    def described_hooks(self) -> list[tuple[str, str]]:
        """The text of hooks."""
        return [(adapters.plain_name(path), told.code(hook)) for path, hook in self.foreign_hooks()]

    def _look(self) -> tuple[list[Any], ...]:
        return (
            [kind.forward for kind in self._classes],
            list(map(type, self._inner)),
            [id(own.get(name)) for own, name in self._config_places],
            list(map(_attention_of, self._configs)),
        )

    def _own_forwards(self) -> list[Any]:
        return [as_written(own["forward"]) if "forward" in own else None for own in self._unwrapped]

    def _runs_same_forwards(self) -> bool:
        """Whether modules run the same forwards; hfblend's, of a blender or of another thread's pass, count for any."""
        now = self._own_forwards()
        return now == self._forwards or all(a == b or told.is_of(a, OURS) for a, b in zip(now, self._forwards))

    def _settings(self) -> list[Any]:
        return list(map(dict.get, self._owners, self._names))

    def _has_settings(self) -> bool:
        """Whether all settings are the same objects, or at least equal, and so are the members of lists and dicts."""
        if any(_plain(one) != then for one, then in self._containers):
            return False
        now = self._settings()
        return all(map(operator.is_, now, self._values)) or list(map(_plain, now)) == self._plain_values


def with_mode(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules among these that may compute otherwise in training mode."""
    return [module for module in modules if type(module) not in _ALWAYS_ALIKE]


def any_training(modules: Iterable[nn.Module]) -> bool:
    return any(module.training for module in modules)


# --- settings ---------------------------------------------------------------------------------------------------------


def _settings_of(module: nn.Module) -> list[str]:
    """The attributes that say how a module computes, and those of its class that an attribute may come to hide."""
    own = [name for name, value in vars(module).items() if isinstance(value, _SETTINGS) and not _is_noise(name)]
    return [*own, *(name for name in _members_of(type(module)) if name not in own)]  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _members_of(kind: type) -> tuple[str, ...]:
    """The names in a module's class, PyTorch's and Transformers' own left out."""
    bases = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins", "typing"))]
    return tuple(sorted({name for base in bases for name in vars(base) if name[:2] != "__" and not _is_noise(name)}))


def _is_noise(name: str) -> bool:
    return name in _NOISE or name in _BOOKKEEPING or name.endswith(("_cached", "_cache", "long_inv_freq"))


def _plain(value: Any) -> Any:
    """A value that can be compared; identities stand for tensors and functions."""
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, set):
        return set(value)
    return value if isinstance(value, (*PLAIN, torch.dtype)) else id(value)


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module holds as plain attributes, or in lists and dicts."""
    for name, value in vars(module).items():
        if not _is_noise(name):
            yield from _tensors_in(name, value)


def _tensors_in(name: str, value: Any, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and depth < _DEPTH:
        for key, member in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(f"{name}.{key}", member, depth + 1)


# --- configs ----------------------------------------------------------------------------------------------------------


def _places_of_configs(attributes: Iterable[dict[str, Any]]) -> Iterator[Place]:
    return ((own, name) for own in attributes for name, one in own.items() if isinstance(one, PreTrainedConfig))


def _configs_in(places: Iterable[Place]) -> list[Any]:
    """The configs at these places, and those in configs, each once."""
    found: dict[int, Any] = {}
    waiting = [own[name] for own, name in places]
    while waiting:
        if id(one := waiting.pop(0)) not in found:
            found[id(one)] = one
            waiting += [value for value in vars(one).values() if hasattr(value, "to_dict")]
    return list(found.values())


def _settings_of_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if isinstance(value, _CONFIG_VALUES) and name[0] != "_" and name not in _CONFIG_NOISE
    }


def _attention_of(config: dict[str, Any]) -> list[Any]:
    """The name of a config's attention implementation, and the functions of attention and of its mask."""
    name = str(config.get("_attn_implementation_internal")).removeprefix("hfblend_")  # which a pass puts before it
    return [name, ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)]


# --- text -------------------------------------------------------------------------------------------------------------


def _without_adapters(named: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules without adapters, by their paths."""
    brought = tuple(
        f"{path}.{name}."
        for path, module in named
        if adapters.is_part_of_peft(module)
        for name in module._modules.keys() - {"base_layer", "original_module"}
    )
    for path, module in named:
        if not adapters.is_part_of_peft(module) and not f"{path}.".startswith(brought):
            yield adapters.plain_name(path), module


def _told(module: nn.Module) -> list[tuple[str, str]]:
    """The settings of a module, and a `forward` that no library has put there."""
    own = vars(module)
    values = {name: own[name] for name in _settings_of(module) if name in own and not torch.is_tensor(own[name])}
    forward: Any = as_written(own.get("_old_forward", own.get("forward")))  # type: ignore[arg-type]
    if forward is not None and not told.is_of(forward, told.WRAPPERS):
        values["forward"] = forward
    return sorted((name, told.text(value, strict=False)) for name, value in values.items() if not _is_theirs(value))


def _is_theirs(value: Any) -> bool:
    """Whether accelerate, peft or hfblend has put a function there, which runs the model's own."""
    return isinstance(value, FUNCTIONS) and told.is_of(value, (*OURS, "accelerate.", "peft."))


def _other_configs(parts: list[tuple[str, nn.Module]], model: nn.Module) -> list[tuple[str, str, str]]:
    """The configs of modules that differ from the model's."""
    held = [(path, name, own[name]) for path, module in parts for own, name in _places_of_configs([vars(module)])]
    texts = {key: told.config_text(config) for key, config in {id(config): config for *_, config in held}.items()}
    main = told.config_text(model.config)
    return [(path, name, texts[id(config)]) for path, name, config in held if texts[id(config)] != main]


def _foreign_attention(config: dict[str, Any]) -> list[str]:
    """Foreign functions of attention. Transformers' own differ by rounding."""
    name, *functions = _attention_of(config)
    foreign = [told.code(one) for one in functions if one is not None and told.is_foreign(one)]
    return [name, *foreign] if foreign else []
