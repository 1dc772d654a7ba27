"""The rotary modules of a decoder, and the tables of angles that they hold."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RotarySource:
    """One table of rotary angles: a rotary module, and the layer type it is asked for (`None`: it has only one)."""

    module: nn.Module
    layer_type: str | None

    @property
    def rope_type(self) -> str:
        """Transformers' name of this RoPE's scaling."""
        rope_type = getattr(self.module, "rope_type", "default")
        return rope_type.get(self.layer_type, "default") if isinstance(rope_type, dict) else rope_type

    @property
    def may_depend_on_length(self) -> bool:
        """Whether its frequencies may change with the prompt's length."""
        return self.rope_type not in ("default", "linear", "llama3", "yarn")

    @property
    def length_in_force(self) -> int:
        """The prompt length that dynamic NTK scaling has grown its frequencies to; 0 for every other RoPE."""
        if "dynamic" not in self.rope_type:
            return 0
        own = f"{self.layer_type}_max_seq_len_cached"
        return int(getattr(self.module, own, getattr(self.module, "max_seq_len_cached", 0)))

    def at_rest(self) -> dict[str, torch.Tensor]:
        """By name, the buffers that forwards rewrite, as a model has them that has seen no long prompt."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        has_grown = self.length_in_force > getattr(self.module, "original_max_seq_len", self.length_in_force)
        if not has_grown and self.rope_type != "longrope":  # the latter's are overwritten in every forward
            return {}
        return {f"{prefix}inv_freq": getattr(self.module, f"{prefix}original_inv_freq")}

    @torch.no_grad()
    def back_to_rest(self) -> None:
        """Lets dynamic NTK forget what it has grown to, as it does itself for a short prompt."""
        device = next((b.device for b in self.module.buffers()), torch.device("cpu"))
        extra = () if self.layer_type is None else (self.layer_type,)
        self.module(torch.zeros((), device=device), torch.zeros(1, 1, dtype=torch.long, device=device), *extra)


def find_rotary_sources(decoder: nn.Module) -> list[RotarySource]:
    """The tables of all rotary modules in a decoder."""
    sources: list[RotarySource] = []
    for module in decoder.modules():
        if "rotary" not in type(module).__name__.lower():
            continue
        rope_type = getattr(module, "rope_type", None)
        takes_type = "layer_type" in inspect.signature(module.forward).parameters
        kinds = sorted(rope_type) if takes_type and isinstance(rope_type, dict) else [None]
        sources += [RotarySource(module, kind) for kind in kinds]
    return sources
