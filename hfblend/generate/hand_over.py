"""Phase 5: blended K/V become the user's cache, as a stock prefill would have left it, with room for the answer.

Shapes: B batch, Hkv KV heads, T all tokens, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..kv.chunk import ChunkKV
from ..kv.rows import KV, ROOM, RowLayout, empty_kv, full_length_cache, rows_behind


class _SpareRows:
    """Buffers (B, Hkv, capacity, D) of keys and values, written and shown with few calls: decoding does both per layer.

    `as_strided` costs half of `narrow`, and one `cat` writes keys and values that are adjacent in memory.

    Attributes:
        shown: the last views of keys and values. Only a layer that has these very tensors may write the rows after
            them, so no row that a caller has seen is ever written again.
    """

    def __init__(self, kv: KV) -> None:
        keys, values = kv
        self.shown: KV | None = None
        self._batch_size, self._capacity = keys.shape[0], keys.shape[2]
        self._kind = _kind_of(kv)
        self._views = [(t, t.shape[1], t.shape[3], t.stride(), t.storage_offset()) for t in kv]
        # Written through aliases with separate version counts: a graph of gradients may keep the earlier rows.
        self._written = [(t.data, *rest) for t, *rest in self._views]
        self._needs_inference_mode = keys.is_inference()  # made, and so writable, only under inference_mode
        key_bytes = keys.shape[1] * keys.shape[3] * keys.element_size()  # of one token
        adjacent = values.data_ptr() - keys.data_ptr() == key_bytes
        alike = keys.shape[3] == values.shape[3] == keys.stride(1) and keys.stride() == values.stride()
        heads = keys.shape[1] + values.shape[1]
        self._both = (self._written[0][0], heads, *self._views[0][2:]) if adjacent and alike else None

    @functools.cached_property
    def address(self) -> int | None:
        """The address of the rows (capacity, W), `None` if these are not packed rows of one prompt."""
        rows = rows_behind((self._views[0][0], self._views[1][0]))
        return None if rows is None else rows.data_ptr()

    def may_continue(self, keys: torch.Tensor | None, values: torch.Tensor | None, added: KV) -> bool:
        """Whether `added` may be written after the K/V of a layer."""
        return self.has_room(keys, values, added[0].shape[2]) and _kind_of(added) == self._kind

    def has_room(self, keys: torch.Tensor | None, values: torch.Tensor | None, count: int) -> bool:
        """Whether `count` rows may be written after the K/V of a layer."""
        if self.shown is None or keys is not self.shown[0] or values is not self.shown[1]:
            return False
        is_open = not self._needs_inference_mode or torch.is_inference_mode_enabled()
        return is_open and self.shown[0].shape[2] + count <= self._capacity

    def write(self, start: int, added: KV) -> None:
        """Writes K/V (B, Hkv, n, D), beginning at row `start`."""
        count = added[0].shape[2]
        if self._both is not None:
            torch.cat(added, 1, out=self._rows(self._both, start, count))
        else:
            for view, states in zip(self._written, added):
                self._rows(view, start, count).copy_(states)

    def show(self, length: int) -> KV:
        """Returns the first `length` rows of both."""
        keys, values = self._views
        self.shown = self._rows(keys, 0, length), self._rows(values, 0, length)
        return self.shown

    def _rows(self, view: Any, start: int, count: int) -> torch.Tensor:
        tensor, heads, dim, strides, offset = view
        return tensor.as_strided((self._batch_size, heads, count, dim), strides, offset + start * strides[2])


def _kind_of(kv: Iterable[torch.Tensor]) -> list[tuple[Any, ...]]:
    """Returns the properties that K/V (B, Hkv, n, D) must share to be joined unchanged."""
    return [(t.shape[0], t.shape[1], t.shape[3], t.dtype, t.device) for t in kv]


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with spare rows: decoding writes in place instead of copying the whole cache each step.

    `keys` and `values` are the exact views that callers expect. After cropping, reordering or batch operations of the
    parent class, the next update moves them to a new buffer. Copies and pickles have no spare rows. With gradients on,
    and for K/V that cannot be joined unchanged (another dtype, device or batch size), the parent class updates.
    """

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        self.room = room
        self._spare: _SpareRows | None = None

    @classmethod
    def adopt(cls, buffers: KV, length: int, room: int = ROOM) -> GrowingLayer:
        """Takes over buffers (B, Hkv, capacity, D) whose first `length` rows hold K/V, without a copy."""
        layer = cls(room)
        # As lazy_initialization does, without its empty tensors: making one on a GPU waits for all work there.
        layer.dtype, layer.device = buffers[0].dtype, buffers[0].device  # type: ignore[attr-defined]
        layer.is_initialized = True
        layer._spare = _SpareRows(buffers)
        layer.keys, layer.values = layer._spare.show(length)
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        added = key_states, value_states
        if torch.is_grad_enabled() or not self._has_room_for(added):
            self._spare = None  # a graph of gradients may keep what was shown
            return super().update(key_states, value_states, *args, **kwargs)
        assert self._spare is not None
        length = self.get_seq_length()
        self._spare.write(length, added)
        self.keys, self.values = shown = self._spare.show(length + key_states.shape[2])
        return shown

    @property
    def kv(self) -> KV:
        """Keys and values (B, Hkv, T, D)."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    @property
    def address(self) -> int | None:
        """The address of its packed rows, if a kernel may write the next one there; `None` if not."""
        spare = self._spare
        return spare.address if spare is not None and spare.has_room(self.keys, self.values, 1) else None

    def show_next_row(self) -> None:
        """Counts the next row, which a kernel has written."""
        assert self._spare is not None
        self.keys, self.values = self._spare.show(self.get_seq_length() + 1)

    def reset(self) -> None:
        super().reset()
        self._spare = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy or a pickle: two layers then hold these tensors; neither writes after them."""
        self._spare = None
        return self.__dict__

    def _has_room_for(self, added: KV) -> bool:
        """Provides spare rows, in a larger buffer if needed; `False` if the K/V cannot be joined unchanged."""
        if self._spare is not None and self._spare.may_continue(self.keys, self.values, added):
            return True
        length = self.get_seq_length()
        if length and _kind_of(added) != _kind_of(self.kv):
            return False
        if not self.is_initialized:
            self.lazy_initialization(*added)
        needed = length + added[0].shape[2]
        buffers = empty_kv(added, needed + max(self.room, needed // 8))
        if length:
            for buffer, states in zip(buffers, self.kv):
                buffer[:, :, :length] = states
        self._spare = _SpareRows(buffers)
        return True


class SideBySide:
    """K/V of the rows of a batch, each prompt ending in the last column, zeros in front of it.

    Attributes:
        buffers: layer -> buffers (B, Hkv, T + room, D), after the first `put`.
    """

    def __init__(self, batch_size: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self.buffers: dict[int, KV] = {}

    def put(self, rows: Iterable[int], kv: dict[int, KV], count: int) -> None:
        """Copies a prompt of `count` tokens, layer -> K/V (1, Hkv, `count` or more, D), to its rows."""
        for i, states_of_layer in sorted(kv.items()):
            if i not in self.buffers:
                # Not packed in rows: with several rows of a batch, some models take `keys.view(B · Hkv, …)`.
                keys, values = (
                    t.new_empty(self.batch_size, t.shape[1], self.length + ROOM, t.shape[3]) for t in states_of_layer
                )
                self.buffers[i] = keys, values
            for buffer, states in zip(self.buffers[i], states_of_layer):
                for row in rows:
                    buffer[row, :, : self.length - count] = 0  # masked, but 0 · NaN is NaN
                    buffer[row, :, self.length - count : self.length] = states[0, :, :count]


def hand_over(buffers: dict[int, KV], length: int, batch_size: int, cache: Cache) -> None:
    """Puts blended K/V into the user's cache, as a stock prefill would have left it. The cache is empty, or the K/V
    begin with a copy of what it holds.

    Plain dynamic layers adopt the buffers and keep their spare rows; other kinds (sliding, static, quantised,
    offloaded) take the rows through their `update`. Rows are repeated for a batch of identical prompts.
    """
    adopts = type(cache) is DynamicCache and not cache.offloading
    for i, kv in sorted(buffers.items()):
        keys, values = (t.repeat(batch_size, 1, 1, 1) if batch_size > 1 else t for t in kv)
        if adopts and cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) == i:
            cache.layers.append(DynamicLayer())
        if adopts and i < len(cache.layers) and type(cache.layers[i]) in _PLAIN:
            cache.layers[i] = GrowingLayer.adopt((keys, values), length)
        else:
            cache.update(keys[:, :, :length], values[:, :, :length], i)


_PLAIN = (DynamicLayer, GrowingLayer)


def held_by(cache: Cache, layouts: Mapping[int, RowLayout], dtype: torch.dtype) -> ChunkKV | None:
    """The KV that a plain dynamic cache of one prompt holds, in place; `None` for other caches."""
    if type(cache) is not DynamicCache or cache.offloading or not all(type(one) in _PLAIN for one in cache.layers):
        return None
    layers: list[Any] = cache.layers
    kv = [(one.keys, one.values) for one in layers if one.is_initialized]
    if [RowLayout.of(one) for one in kv] != list(layouts.values()) or {t.dtype for one in kv for t in one} != {dtype}:
        return None
    sizes = {(t.shape[0], t.shape[2]) for one in kv for t in one}
    length = cache.get_seq_length()
    return ChunkKV(full_length_cache(kv), torch.arange(length), (), "in_context") if sizes == {(1, length)} else None


def growing_layers(cache: Any) -> list[GrowingLayer]:
    """The layers of a plain dynamic cache that has no others than these; else none."""
    is_plain = type(cache) is DynamicCache and not cache.offloading
    return cache.layers if is_plain and all(type(layer) is GrowingLayer for layer in cache.layers) else []


def is_foreign(cache: Any) -> bool:
    """Whether a cache, or a layer of it, has code that is not Transformers' and may return other K/V than it keeps.

    Args:
        cache: `None`: Transformers will make one.
    """
    if cache is None:
        return False
    parts = [cache, *getattr(cache, "layers", ())]
    kinds = {*map(type, parts), getattr(cache, "layer_class_to_replicate", None) or DynamicLayer}
    homes = (
        home for kind in kinds for home in (kind.__module__, getattr(getattr(kind, "update", None), "__module__", ""))
    )
    return any("update" in getattr(one, "__dict__", ()) for one in parts) or not all(
        home.startswith(_KNOWN_HOMES) for home in homes
    )


_KNOWN_HOMES = ("transformers.", "hfblend.")
