"""K/V as rows, one a token: all heads' keys, then all heads' values.

Callers see views of the usual shapes; a store, or a copy between devices, moves one block per chunk and layer.

    row of token t    k₀ k₁ … v₀ v₁ …        keys = rows[:, :Hkv·D], values = rows[:, Hkv·D:]

Shapes: B batch, Hkv KV heads, n tokens, D head_dim, W width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

KV = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (B, Hkv, T, D)

ROOM = 256  # spare rows of a blended buffer, for the tokens that will be decoded


@dataclass(frozen=True)
class RowLayout:
    """The layout of a layer's K/V of one token in a row: `key_heads` keys of `key_dim`, then `value_heads` values."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @classmethod
    def of(cls, kv: KV) -> RowLayout:
        """The layout of keys and values (B, Hkv, n, D)."""
        keys, values = kv
        return cls.shared(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def shared(cls, *numbers: int) -> RowLayout:
        """The layout of these four numbers: one object for all, so that comparing many costs nothing."""
        return cls(*numbers)

    @property
    def value_offset(self) -> int:
        """Elements of a row before its values."""
        return self.key_heads * self.key_dim

    @property
    def width(self) -> int:
        """W, elements of a row."""
        return self.value_offset + self.value_heads * self.value_dim

    def strides(self, slot: Literal["key", "value"]) -> tuple[int, int, int, int]:
        """The strides of keys or values (1, Hkv, n, D) seen in packed rows."""
        return (0, self.key_dim if slot == "key" else self.value_dim, self.width, 1)

    def views(self, rows: torch.Tensor) -> KV:
        """Keys and values (B, Hkv, n, D) seen in rows (B, n, W)."""
        keys, values = rows.split((self.value_offset, self.width - self.value_offset), -1)
        return (
            keys.unflatten(-1, (self.key_heads, self.key_dim)).transpose(1, 2),
            values.unflatten(-1, (self.value_heads, self.value_dim)).transpose(1, 2),
        )


def empty_kv(like: KV, length: int) -> KV:
    """Uninitialised buffers (B, Hkv, length, D) of the kind of `like`, packed in rows."""
    layout, keys = RowLayout.of(like), like[0]
    return layout.views(keys.new_empty(keys.shape[0], length, layout.width))


def rows_at(kv: KV, idx: torch.Tensor) -> KV:
    """K/V (B, Hkv, S, D) of some tokens, wherever a layer lies. Rows are copied as they are packed, if they are:
    `index_select` on a CPU copies all of other states first."""
    rows, idx = rows_behind(kv), idx.to(kv[0].device)
    if rows is not None:
        return RowLayout.of(kv).views(rows.index_select(0, idx)[None])
    return kv[0].index_select(2, idx), kv[1].index_select(2, idx)


def first_rows(kv: KV, length: int) -> KV:
    """Views of the first `length` tokens."""
    return kv[0][:, :, :length], kv[1][:, :, :length]


def packed(kv: KV, device: torch.device | str | None = None) -> KV:
    """A copy of K/V (1, Hkv, n, D), packed in rows, on `device`.

    In RAM, where there is a GPU, it is pinned: copies of it overlap with computing.
    """
    keys, layout = kv[0], RowLayout.of(kv)
    device = keys.device if device is None else torch.device(device)
    pinned = device.type == "cpu" and pins_memory()
    shape = (1, keys.shape[2], layout.width)
    views = layout.views(torch.empty(shape, dtype=keys.dtype, device=device, pin_memory=pinned))
    for view, states in zip(views, kv):
        view.copy_(states)
    return views


def pins_memory() -> bool:
    """Whether new memory in RAM should be pinned: with a GPU, but not in a fork of a process that uses one."""
    return torch.cuda.is_available() and not torch.cuda._is_in_bad_fork()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on `device`. To a GPU it goes through pinned memory: other copies wait for all work there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_behind(kv: KV) -> torch.Tensor | None:
    """The rows (n, W) that K/V (1, Hkv, n, D) are views of; `None` if they are not packed that way."""
    keys, values = kv
    layout = RowLayout.of(kv)
    adjacent = values.data_ptr() - keys.data_ptr() == layout.value_offset * keys.element_size()
    dims = slice(1, None) if keys.shape[2] > 1 else slice(1, None, 2)  # from one token to the next, if there is one
    expected = layout.strides("key")[dims], layout.strides("value")[dims]
    strided = (keys.stride()[dims], values.stride()[dims]) == expected
    same = keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    if not (adjacent and strided and same and keys.shape[0] == 1 and keys.dtype == values.dtype):
        return None
    return keys.as_strided((keys.shape[2], layout.width), (layout.width, 1))


def full_length_cache(kv: Iterable[KV]) -> DynamicCache:
    """A `DynamicCache` of plain full-length layers around K/V (B, Hkv, n, D), without a copy (sliding models too)."""
    cache = DynamicCache()
    for keys, values in kv:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
