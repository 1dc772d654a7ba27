"""A chunk's KV, prefilled alone after the ids that it will find before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from ..arguments import require
from .ids import Ids
from .origin import Origin
from .rows import KV, RowLayout, full_length_cache, packed, rows_behind

Provenance = Literal["isolated", "in_context"]

_OBJECTS_BYTES = 3072  # of Python and torch around a layer's two tensors, measured; and around its other fields


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """The K/V of one chunk, as computed, never moved: realigning always starts from this copy.

    Args:
        cache: full-length keys and values of every layer, each (B, Hkv, n, D), also for sliding models.
        cached_positions: (n,) int64, where the tokens stood when this was computed.
        behind_ids: the ids that stood before them then; kept as `Ids`, 8 bytes each, equal ones once.
        provenance: `"isolated"` (chunk alone after those ids) or `"in_context"` (inside some prompt).
        regime: prompt length that set length-dependent RoPE frequencies then; default, last position + 1.
        quantised: `"int8"` or `"fp8"`, where a store kept it in that; it is then near what was computed, never exact.
        origin: which model computed it of what, for people and tools; `None` where that is not known.
        ids: its own token ids, 8 bytes each, by which it is found in plain prompts; none where they are not known.
        scope: of those prompts (`hfblend.store.keys.scope_of`).
    """

    cache: DynamicCache
    cached_positions: torch.Tensor
    behind_ids: Sequence[int] = ()
    provenance: Provenance = "isolated"
    regime: int = 0
    quantised: str | None = None
    origin: Origin | None = None
    ids: Sequence[int] = ()
    scope: str = ""

    def __post_init__(self) -> None:
        layers: list[Any] = require("cache", self.cache, DynamicCache, "a transformers.DynamicCache").layers
        require("cached_positions", self.cached_positions, torch.Tensor, "a tensor (n,) of positions")
        if not layers or not all(getattr(layer, "is_initialized", False) for layer in layers):
            raise ValueError("A ChunkKV needs keys and values of every layer; this cache holds none.")
        lengths = {layer.keys.shape[2] for layer in layers}
        if lengths != {len(self.cached_positions)}:
            raise ValueError(
                f"Every layer must hold K/V of the chunk's {len(self.cached_positions)} positions, got lengths "
                f"{sorted(lengths)}. Sliding-window layers must be kept at full length."
            )
        object.__setattr__(self, "behind_ids", Ids(self.behind_ids))
        object.__setattr__(self, "ids", Ids(self.ids))
        object.__setattr__(self, "regime", max(self.regime, int(self.cached_positions.max()) + 1))

    def __len__(self) -> int:
        return self.cached_positions.shape[0]  # quicker than the `len` of a tensor

    @cached_property
    def num_behind(self) -> int:
        return len(self.behind_ids)

    def layer(self, layer_idx: int) -> KV:
        """Keys and values (B, Hkv, n, D) of one layer, as cached."""
        layer: Any = self.cache.layers[layer_idx]
        return layer.keys, layer.values

    def prefetch(self, layer_idx: int) -> None:
        """Nothing to do: every layer is in memory."""

    @cached_property
    def num_layers(self) -> int:
        return len(self.cache.layers)

    @cached_property
    def first_position(self) -> int | None:
        """As the function of that name."""
        return first_position(self.cached_positions)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.layer(0)[0].dtype

    @cached_property
    def layouts(self) -> tuple[RowLayout, ...]:
        """The layout of each layer's state of one token."""
        return tuple(RowLayout.of(self.layer(i)) for i in range(self.num_layers))

    def tier_beside(self, device: torch.device) -> str:
        """`"memory"` on that device, `"ram"` on another."""
        return "memory" if self.layer(0)[0].device == device else "ram"

    def addresses_in(self, device: torch.device, layers: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """The addresses of these layers' rows in a device's memory; `None` if one is elsewhere, or not packed."""
        if not self._layers_packed_in.get(device, frozenset()).issuperset(layers):
            return None
        return self._addresses if len(layers) == self.num_layers else self._addresses[list(layers)]

    def rows(self, layer_idx: int) -> torch.Tensor | None:
        """The rows (n, W) that a layer is views of; `None` if it is not packed."""
        return self._rows[layer_idx]

    @cached_property
    def _rows(self) -> list[torch.Tensor | None]:
        return [rows_behind(self.layer(i)) for i in range(self.num_layers)]

    @cached_property
    def _addresses(self) -> np.ndarray[Any, Any]:
        return np.array([0 if rows is None else rows.data_ptr() for rows in self._rows])

    @cached_property
    def _layers_packed_in(self) -> dict[torch.device, frozenset[int]]:
        found: dict[torch.device, set[int]] = {}
        for i, rows in enumerate(self._rows):
            if rows is not None:
                found.setdefault(rows.device, set()).add(i)
        return {device: frozenset(layers) for device, layers in found.items()}

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of keys and values, all layers."""
        return sum(t.numel() * t.element_size() for i in range(self.num_layers) for t in self.layer(i))

    @cached_property
    def held_bytes(self) -> int:
        """All bytes that it holds: tensors (whole, where they are views of larger ones), ids, origin, Python's objects.

        Budgets count these. `behind_ids` are counted in full, though other chunks may share them.
        """
        tensors = [self.cached_positions, *(t for i in range(self.num_layers) for t in self.layer(i))]
        storages = [t.untyped_storage() for t in tensors]
        num_bytes = {(one.device, one.data_ptr()): one.nbytes() for one in storages}
        said = 0 if self.origin is None else sum(map(len, vars(self.origin).values()))
        num_ids = self.num_behind + len(self.ids)
        return sum(num_bytes.values()) + 8 * num_ids + said + _OBJECTS_BYTES * (1 + self.num_layers)

    def to(self, device: torch.device | str) -> ChunkKV:
        """The same chunk with its tensors on another device; this one, if they are there already.

        In RAM, where there is a GPU, they are pinned, so that copies overlap with computing.
        """
        if all(t.device == torch.device(device) for i in range(self.num_layers) for t in self.layer(i)):
            return self
        cache = full_length_cache(packed(self.layer(i), device) for i in range(self.num_layers))
        return replace(self, cache=cache)


def first_position(positions: torch.Tensor) -> int | None:
    """The first of positions (n,) on the CPU, if the others follow it one by one; else `None`."""
    found = positions.numpy()
    return int(found[0]) if (np.diff(found) == 1).all() else None


class ChunkLost(Exception):
    """A chunk's KV that a store had offered cannot be read after all. It is treated as missing from then on."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"Chunk KV {key[:12]}… cannot be read: {reason}")
        self.key, self.reason = key, reason


class Reader(Protocol):
    """One chunk's KV, read a layer at a time. `ChunkKV` is one.

    `len`, `num_behind`, `layouts`, `dtype` and `num_bytes` read nothing, so that they can be compared with what was
    asked for first. Reading the others may raise `ChunkLost`.
    """

    def __len__(self) -> int: ...  # n

    @property
    def num_behind(self) -> int: ...  # of `behind_ids`

    @property
    def cached_positions(self) -> torch.Tensor: ...  # (n,)

    @property
    def behind_ids(self) -> Sequence[int]: ...

    @property
    def provenance(self) -> Provenance: ...

    @property
    def regime(self) -> int: ...

    @property
    def quantised(self) -> str | None: ...

    @property
    def origin(self) -> Origin | None: ...

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def scope(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def layouts(self) -> tuple[RowLayout, ...]: ...  # of each layer

    @property
    def num_layers(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...

    def tier_beside(self, device: torch.device) -> str:
        """The place that it is loaded from, of `hfblend.controller.TIERS`."""
        ...

    def prefetch(self, layer_idx: int) -> None:
        """This layer will be asked for soon."""
        ...

    def layer(self, layer_idx: int) -> KV:
        """Keys and values (B, Hkv, n, D) of one layer, as cached, on any device.

        Raises:
            ChunkLost: they cannot be read.
        """
        ...

    def rows(self, layer_idx: int) -> torch.Tensor | None:
        """The rows (n, W) that `layer` is views of; `None` if it is not packed. Errors as there."""
        ...


def layer_of_each(entries: Iterable[Reader], layer_idx: int) -> list[KV]:
    """Keys and values of one layer of several entries. Errors as of `Reader.layer`."""
    return [entry.layer(layer_idx) for entry in entries]


def in_memory(entry: Reader) -> ChunkKV:
    """An entry with all its layers read.

    Raises:
        ChunkLost: they cannot be.
    """
    if isinstance(entry, ChunkKV):
        return entry
    cache = full_length_cache(entry.layer(i) for i in range(entry.num_layers))
    said = (entry.cached_positions, entry.behind_ids, entry.provenance, entry.regime, entry.quantised, entry.origin)
    return ChunkKV(cache, *said, entry.ids, entry.scope)
