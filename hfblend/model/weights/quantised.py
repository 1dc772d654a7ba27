"""Scales and zero points that quantised layers compute with and keep outside parameters and buffers.

| library | where |
| --- | --- |
| torchao, optimum-quanto | inside the parameter, a tensor subclass made of plain tensors |
| bitsandbytes, 4-bit | the parameter's `quant_state` |
| bitsandbytes, 8-bit | the parameter's `SCB`, after the first forward the module's `state.SCB` |
| hqq | the module's `meta` |

GPTQ, AWQ and fp8 keep theirs in buffers and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are held, or activations rounded, in fewer bits than the model computes with."""
    if getattr(model, "hf_quantizer", None) is not None:
        return True
    return any(
        any(True for _ in scales(module)) or any(_is_quantised_tensor(p) for p in module._parameters.values())
        for module in model.modules()
    )


def plain_parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor is made of, each with a note that tells it from others of equal numbers.

    For a plain tensor: itself. For a shard of a tensor-parallel model: this process's part, and its place in the whole.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield "", tensor
        return
    if _is_shard(tensor):
        mesh = tensor.device_mesh  # type: ignore[attr-defined]
        note = f"{tensor.placements} of {tuple(mesh.shape)} at {mesh.get_coordinate()}"  # type: ignore[attr-defined]
        yield note, tensor.to_local().detach()  # type: ignore[attr-defined]
        return
    names, context = tensor.__tensor_flatten__()
    for name in names:
        for inner_note, part in plain_parts(getattr(tensor, name)):
            yield f"{type(tensor).__qualname__}.{name} {context} {inner_note}", part


def scales(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Tensors, and numbers and names, that a quantised layer keeps outside its parameters and buffers."""
    for name, parameter in module._parameters.items():
        for attribute in ("quant_state", "SCB"):
            yield from _inside(f"{name}.{attribute}", getattr(parameter, attribute, None))
    yield from _inside("state.SCB", getattr(module.__dict__.get("state"), "SCB", None))
    yield from _inside("meta", module.__dict__.get("meta"))


def holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The dicts that hold them: if one holds another object, the layer has changed."""
    for parameter in module._parameters.values():
        if _is_quantised_tensor(parameter) or hasattr(parameter, "quant_state"):
            yield from _dicts_in(parameter)
    if isinstance(meta := module.__dict__.get("meta"), dict):
        yield meta


def _dicts_in(holder: Any) -> Iterator[dict[str, Any]]:
    own = getattr(holder, "__dict__", {})
    yield own
    inner = [own[name] for name in ("quant_state", "state2") if own.get(name) is not None]
    for part in (*inner, *filter(_is_quantised_tensor, own.values())):
        yield from _dicts_in(part)


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values in nested dicts and objects."""
    if isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.Size)):
        yield name, value
        return
    members = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    for key, member in members.items():
        yield from _inside(f"{name}.{key}", member)


def _is_quantised_tensor(tensor: torch.Tensor | None) -> bool:
    return hasattr(tensor, "__tensor_flatten__") and not _is_shard(tensor)


def _is_shard(tensor: torch.Tensor | None) -> bool:
    """Whether it is a DTensor, which not every build of PyTorch has."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")
