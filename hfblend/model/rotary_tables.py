"""The rotary modules of a decoder, and the tables of angles that they hold."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blend.rotation import KeyRotation, Layout, Tables
from ..kv.rows import sent

TableKind = tuple[int, Layout, int]  # source, layout and sign of a `KeyRotation`


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
        """The buffers that forwards rewrite, by name, with the values of a model that has seen no long prompt."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        has_grown = self.length_in_force > getattr(self.module, "original_max_seq_len", self.length_in_force)
        if not has_grown and self.rope_type != "longrope":  # the latter's are overwritten in every forward
            return {}
        return {f"{prefix}inv_freq": getattr(self.module, f"{prefix}original_inv_freq")}

    @torch.no_grad()
    def back_to_rest(self) -> None:
        """Lets dynamic NTK forget what it has grown to, as it does itself for a short prompt."""
        device = next((b.device for b in self.module.buffers()), torch.device("cpu"))
        self._ask(self.module, torch.zeros(1, 1, dtype=torch.long, device=device))

    @torch.no_grad()
    def tables(self, positions: torch.Tensor, regime: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (N, 2R or R) in fp32 at `positions` (N,), in the regime of a prompt of that length.

        A shallow replica answers, so that the model's own rotary state (dynamic, longrope) stays unchanged.
        """
        replica = copy.copy(self.module)
        replica._buffers = {name: None if b is None else b.clone() for name, b in self.module._buffers.items()}
        device = next((b.device for b in replica._buffers.values() if b is not None), positions.device)
        last = torch.full((1,), max(regime - 1, 0), dtype=positions.dtype, device=positions.device)
        forcing = sent(torch.cat([positions, last]), device)[None]
        if self.may_depend_on_length:
            self._ask(replica, torch.zeros_like(forcing[:, :1]))  # back to the short regime, then grow to `regime`
        try:
            tables = self._ask(replica, forcing)
        except IndexError:  # it wants a position in time, height and width; text has the same in all three
            tables = self._ask(replica, forcing.expand(3, 1, -1))
        cos, sin = (tables.real, tables.imag) if torch.is_tensor(tables) else tables
        return cos.flatten(0, -3)[0, :-1].float(), sin.flatten(0, -3)[0, :-1].float()

    def has_same_tables(self, one: int, other: int) -> bool:
        """Whether two prompt lengths give the same frequencies."""
        probe = torch.ones(1, dtype=torch.long)
        return all(map(torch.equal, self.tables(probe, one), self.tables(probe, other)))

    def _ask(self, module: nn.Module, positions: torch.Tensor) -> Any:
        extra = () if self.layer_type is None else (self.layer_type,)
        return module(torch.zeros((), dtype=torch.float32, device=positions.device), positions, *extra)


def kind_of(rotation: KeyRotation) -> TableKind:
    """The tables that a rotation turns by."""
    return rotation.source, rotation.layout, rotation.sign


class KeptTables:
    """Rotary tables of positions 0, 1, … that never change, of which prompts take rows.

    A rotary module takes Python half a millisecond, which the first token of each prompt would wait for.

    Args:
        make: returns the tables of a kind at positions (N,).
        limit: more positions are not kept.
    """

    def __init__(self, make: Callable[[TableKind, torch.Tensor], Tables], limit: int) -> None:
        self._make, self._limit, self._generation = make, limit, -1
        self._tables: dict[Any, Tables] = {}

    def of(self, kind: TableKind, length: int, generation: int) -> Tables | None:
        """The tables of `length` positions or more, on the current stream; `None` beyond the limit.

        Args:
            generation: of the model's weights, of which rotary modules have some, too.
        """
        if length > self._limit:
            return None
        if generation != self._generation:
            self._tables, self._generation = {}, generation
        key = kind, torch.backends.cuda.matmul.fp32_precision  # they are made by a product
        if key not in self._tables or len(self._tables[key][0]) < length:
            positions = torch.arange(min(1 << (length - 1).bit_length(), self._limit))
            with torch.inference_mode(False), torch.no_grad():  # they outlive the mode of this call
                self._tables[key] = self._make(kind, positions)
            if self._tables[key][0].is_cuda:  # other streams may be next to read them
                torch.cuda.current_stream(self._tables[key][0].device).synchronize()
        for table in self._tables[key]:
            if table.is_cuda:
                table.record_stream(torch.cuda.current_stream(table.device))
        return self._tables[key]


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


def state_of(sources: Iterable[RotarySource]) -> Callable[[], None]:
    """Notes the state of rotary modules, and returns a function that restores it."""
    modules = {source.module for source in sources}
    attributes = [(m, {k: v for k, v in vars(m).items() if not k.startswith("_")}) for m in modules]
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    return functools.partial(_restore, attributes, buffers)


def _restore(attributes: list[tuple[nn.Module, dict[str, Any]]], buffers: list[Any]) -> None:
    for module, values in attributes:
        module.__dict__.update(values)
    for module, name, buffer, content in buffers:
        module._buffers[name] = buffer
        if not torch.equal(buffer, content):
            buffer.copy_(content)
