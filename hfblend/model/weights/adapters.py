"""peft's adapters: which of them act in a forward, and which weights they bring.

The fingerprint leaves out adapters that do not act: a model whose adapters are disabled has the keys it had without
them, and an adapter's entries are found again when it is switched back on, even if others came or went meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

_WRAPPED = (".base_layer", ".original_module")  # between a module's path and its own weights, once it has adapters
_CONFIG_NOISE = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")


class Adapters:
    """A model's adapted layers."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [(path, module) for path, module in model.named_modules() if _is_adapted(module)]
        self._configs: dict[str, Any] = getattr(model, "peft_config", None) or {}

    def state(self) -> tuple[Any, ...]:
        """Returns the adapters that act in each layer, and their strengths."""
        found = ((plain_name(path), acting(layer), _strengths(layer), _unmerges(layer)) for path, layer in self._layers)
        return tuple(of_layer for of_layer in found if of_layer[1] or of_layer[3])

    def merged(self) -> list[tuple[str, ...]]:
        """Returns each layer's adapters that are merged into its base weights; peft writes past version counters."""
        return [tuple(getattr(layer, "merged_adapters", ())) for _, layer in self._layers]

    def configs(self) -> str:
        """The settings of those that act: some change a forward and no weight."""
        names = sorted({name for _, layer in self._layers for name in acting(layer)} & self._configs.keys())
        told = [
            (name, {key: value for key, value in self._configs[name].to_dict().items() if key not in _CONFIG_NOISE})
            for name in names
        ]
        return json.dumps(told, sort_keys=True, default=lambda v: sorted(map(str, v)) if isinstance(v, set) else str(v))

    def unread(self) -> tuple[str, ...]:
        """Returns prefixes of the names of weights that no forward reads: those of adapters that do not act."""
        return tuple(
            f"{path}.{container}.{name}."
            for path, layer in self._layers
            for container, names in _held(layer).items()
            for name in names
            if name not in acting(layer)
        )


def plain_name(name: str) -> str:
    """The name that a weight has without adapters."""
    for wrapped in _WRAPPED:
        name = name.replace(wrapped, "")
    return name


def is_part_of_peft(module: nn.Module) -> bool:
    """Whether an adapter brought it; the model's own modules inside it are not part of peft."""
    return type(module).__module__.partition(".")[0] == "peft"


def acting(layer: nn.Module) -> list[str]:
    """The adapters whose own weights a layer's forward reads; merged ones are part of the base weights."""
    if layer.disable_adapters or getattr(layer, "merged", False):
        return []
    active: Any = layer.active_adapters
    held = set().union(*_held(layer).values())
    return [name for name in active if name in held]


def _held(layer: nn.Module) -> dict[str, Collection[str]]:
    """Container -> the adapters that it has weights of."""
    containers: Any = layer.adapter_layer_names
    return {one: getattr(layer, one).keys() for one in containers if hasattr(getattr(layer, one, None), "keys")}


def reason_against(model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Returns why a chunk of this model, with its adapters, cannot be computed alone; `None` if it can.

    Args:
        kwargs: of a call of `generate`.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return (
            "The adapter puts virtual tokens, or its own K/V, before every prompt (prompt, prefix or p-tuning): a "
            "chunk computed alone does not see them. Adapters of layers (LoRA, DoRA, IA3, …) are blended."
        )
    configs = getattr(model, "peft_config", None) or {}
    if not configs:
        return None
    layers = [module for module in model.modules() if _is_adapted(module)]
    if any(getattr(configs.get(name), "alora_invocation_tokens", None) for layer in layers for name in acting(layer)):
        return (
            "The adapter acts from its invocation tokens on (aLoRA): a chunk alone does not tell whether it acts. "
            "Switch to an adapter without alora_invocation_tokens."
        )
    hooks = (hook for layer in layers for hook in layer._forward_pre_hooks.values())
    if "adapter_names" in (kwargs or {}) or any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks):
        return "The call chooses an adapter for each row (adapter_names). Switch with set_adapter, one call an adapter."
    return None


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is a tuner's layer, or a whole module that each adapter has a copy of; not the model around them."""
    return hasattr(module, "adapter_layer_names") and isinstance(getattr(module, "disable_adapters", None), bool)


def _strengths(layer: nn.Module) -> str:
    scaling = getattr(layer, "scaling", None)
    return str({name: scaling.get(name) for name in acting(layer)} if isinstance(scaling, dict) else scaling)


def _unmerges(layer: nn.Module) -> bool:
    """Whether the next forward takes merged adapters out of the weights, which then change."""
    return bool(layer.disable_adapters and getattr(layer, "merged", False))
