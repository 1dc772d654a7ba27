"""Caches that make a stock forward do one phase of blending: record, stop, or mix fresh rows into reused KV.

K/V made here lie as rows, one a token: all heads' keys, then all heads' values. What callers see are views of the usual
shapes; what is moved, from a store or between devices, is one block per chunk and layer.

    row of token t    k₀ k₁ … v₀ v₁ …        keys = rows[:, :Hkv·D], values = rows[:, Hkv·D:]

Shapes: B batch, Hkv KV heads, T all tokens, S selected rows, D head_dim, L layers, W width of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

KV = tuple[torch.Tensor, torch.Tensor]  # keys and values, each (B, Hkv, T, D)

ROOM = 256  # spare rows of a blended buffer, for the tokens that will be decoded


@dataclass(frozen=True)
class RowLayout:
    """How a layer's K/V of one token lie in a row: `key_heads` keys of `key_dim`, then `value_heads` values."""

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
        """Of keys or values (1, Hkv, n, D) seen in packed rows."""
        return (0, self.key_dim if slot == "key" else self.value_dim, self.width, 1)

    def views(self, rows: torch.Tensor) -> KV:
        """Keys and values (B, Hkv, n, D) seen in rows (B, n, W)."""
        keys, values = rows.split((self.value_offset, self.width - self.value_offset), -1)
        return (
            keys.unflatten(-1, (self.key_heads, self.key_dim)).transpose(1, 2),
            values.unflatten(-1, (self.value_heads, self.value_dim)).transpose(1, 2),
        )


class StopForward(Exception):
    """Raised by a cache's `update` to end a forward right after the K/V of its last wanted layer."""


class PassCache(Cache):
    """Empty full-length layers: every model then builds its ordinary masks, sliding models too."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])


class RecordingCache(PassCache):
    """Keeps the fresh K/V of all tokens and ends the forward at layer `stop_at`, before that layer's attention.

    Args:
        num_layers: L of the model.
        stop_at: 0-based layer to stop at; `None` runs all layers.
        room: spare rows to keep behind each recorded buffer.
    """

    def __init__(self, num_layers: int, stop_at: int | None = None, room: int = 0) -> None:
        super().__init__(num_layers)
        self.stop_at, self.room = stop_at, room
        self.recorded: dict[int, KV] = {}  # buffers (B, Hkv, T + room, D)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KV:
        length = key_states.shape[2]
        self.recorded[layer_idx] = kv = empty_kv((key_states, value_states), length + self.room)
        for buffer, states in zip(kv, (key_states, value_states)):
            buffer[:, :, :length] = states
        if layer_idx == self.stop_at:
            raise StopForward
        return key_states, value_states


class RowsCache(PassCache):
    """Of a pass over some rows.

    Args:
        num_layers: L of the model.
        rows: (S,) token indices, rising.
        stop_at: end the forward after this layer's K/V.
    """

    def __init__(self, num_layers: int, rows: torch.Tensor, stop_at: int | None = None) -> None:
        super().__init__(num_layers)
        self.rows, self.stop_at = rows, stop_at

    def take_last(self, count: int) -> None:
        """From here on the pass has its last `count` rows, and runs to its end."""
        self.rows, self.stop_at = self.rows[-count:], None

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """0; asked by a layer, how far each row (S,) stands behind its place in the pass.

        Layers that count positions themselves, `arange(S) + cache.get_seq_length(layer_idx)`, then count right.
        """
        return 0 if layer_idx is None else self.rows - torch.arange(len(self.rows), device=self.rows.device)


class BlendingCache(RowsCache):
    """Mixes the fresh K/V of a pass over some rows into full-length buffers, and hands the whole layer to attention.

    A layer's reused KV is asked of `load` when the pass first reaches that layer, so loading runs a layer at a time.

    Args:
        num_layers: L of the model.
        buffers: layer -> buffers (B, Hkv, T + room, D); filled as layers are reached, and read by the caller later.
        load: layer, fresh K/V of the rows -> the layer's buffers, every reused row in place.
        rows: (S,) token indices of the pass, rising.
        length: T.
        stop_at: end the forward after this layer's K/V.
    """

    def __init__(
        self,
        num_layers: int,
        buffers: dict[int, KV],
        load: Callable[[int, KV], KV],
        rows: torch.Tensor,
        length: int,
        stop_at: int | None = None,
    ) -> None:
        super().__init__(num_layers, rows, stop_at)
        self.buffers, self.load, self.length = buffers, load, length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KV:
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = self.load(layer_idx, (key_states, value_states))
        keys, values = (buffer[:, :, : self.length] for buffer in self.buffers[layer_idx])
        rows = self.rows.to(keys.device)
        keys.index_copy_(2, rows, key_states)
        values.index_copy_(2, rows, value_states)
        if layer_idx == self.stop_at:
            raise StopForward
        return keys, values


class _SpareRows:
    """Buffers (B, Hkv, capacity, D) of keys and values, written and shown with few calls: decoding does so every layer.

    `as_strided` costs half of `narrow`, and where keys and values lie side by side, one `cat` writes both.

    Attributes:
        shown: the views of keys and values that were shown last. Only a layer that has these very tensors may write the
            rows after them, so no row that a caller has seen is ever written again.
    """

    def __init__(self, kv: KV) -> None:
        keys, values = kv
        self.shown: KV | None = None
        self._batch_size, self._capacity = keys.shape[0], keys.shape[2]
        self._kind = _kind_of(kv)
        self._views = [(t, t.shape[1], t.shape[3], t.stride(), t.storage_offset()) for t in kv]
        # Written through aliases that count versions apart: a graph of gradients may keep the rows before, as they are.
        self._written = [(t.data, *rest) for t, *rest in self._views]
        self._needs_inference_mode = keys.is_inference()  # made under inference_mode, where alone it may be written
        layout = RowLayout.of(kv)
        adjacent = values.data_ptr() - keys.data_ptr() == layout.value_offset * keys.element_size()
        alike = layout.key_dim == layout.value_dim == keys.stride(1) and keys.stride() == values.stride()
        heads = layout.key_heads + layout.value_heads
        self._both = (self._written[0][0], heads, *self._views[0][2:]) if adjacent and alike else None

    def may_continue(self, keys: torch.Tensor | None, values: torch.Tensor | None, added: KV) -> bool:
        """Whether `added` may be written after the K/V of a layer."""
        if self.shown is None or keys is not self.shown[0] or values is not self.shown[1]:
            return False
        is_open = not self._needs_inference_mode or torch.is_inference_mode_enabled()
        has_room = self.shown[0].shape[2] + added[0].shape[2] <= self._capacity
        return is_open and has_room and _kind_of(added) == self._kind

    def write(self, start: int, added: KV) -> None:
        """Writes K/V (B, Hkv, n, D) from row `start` on."""
        count = added[0].shape[2]
        if self._both is not None:
            torch.cat(added, 1, out=self._rows(self._both, start, count))
        else:
            for view, states in zip(self._written, added):
                self._rows(view, start, count).copy_(states)

    def show(self, length: int) -> KV:
        """The first `length` rows of both."""
        keys, values = self._views
        self.shown = self._rows(keys, 0, length), self._rows(values, 0, length)
        return self.shown

    def _rows(self, view: Any, start: int, count: int) -> torch.Tensor:
        tensor, heads, dim, strides, offset = view
        return tensor.as_strided((self._batch_size, heads, count, dim), strides, offset + start * strides[2])


def _kind_of(kv: Iterable[torch.Tensor]) -> list[tuple[Any, ...]]:
    """All that K/V (B, Hkv, n, D) must share with others to be joined with them unchanged."""
    return [(t.shape[0], t.shape[1], t.shape[3], t.dtype, t.device) for t in kv]


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with spare rows: decoding writes in place instead of copying the whole cache each step.

    `keys` and `values` are the exact views that callers expect. Only a layer that has the tensors shown last writes in
    place; cropping, reordering and batch operations of the parent class put others there, and the next update moves
    them to a new buffer. Copies and pickles have no spare rows. With gradients on, and for K/V that cannot be joined
    unchanged (another dtype, device or batch size), the parent class does the update.
    """

    def __init__(self, room: int = ROOM) -> None:
        super().__init__()
        self.room = room
        self._spare: _SpareRows | None = None

    @classmethod
    def adopt(cls, buffers: KV, length: int, room: int = ROOM) -> GrowingLayer:
        """Takes over buffers (B, Hkv, capacity, D) whose first `length` rows hold K/V, without a copy."""
        layer = cls(room)
        # What lazy_initialization sets, without its empty tensors: making one on a GPU waits for all work there.
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

    def reset(self) -> None:
        super().reset()
        self._spare = None

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: two layers have these tensors then, and neither writes after them."""
        self._spare = None
        return self.__dict__

    def _has_room_for(self, added: KV) -> bool:
        """Makes sure of spare rows, in a larger buffer where needed; `False` if the K/V cannot be joined unchanged."""
        if self._spare is not None and self._spare.may_continue(self.keys, self.values, added):
            return True
        length = self.get_seq_length()
        if length and _kind_of(added) != _kind_of(self._held()):
            return False
        if not self.is_initialized:
            self.lazy_initialization(*added)
        needed = length + added[0].shape[2]
        buffers = empty_kv(added, needed + max(self.room, needed // 8))
        if length:
            for buffer, states in zip(buffers, self._held()):
                buffer[:, :, :length] = states
        self._spare = _SpareRows(buffers)
        return True

    def _held(self) -> KV:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


def empty_kv(like: KV, length: int) -> KV:
    """Uninitialised buffers (B, Hkv, length, D) of the kind of `like`, packed in rows."""
    layout, keys = RowLayout.of(like), like[0]
    return layout.views(keys.new_empty(keys.shape[0], length, layout.width))


def packed(kv: KV, device: torch.device | str | None = None) -> KV:
    """A copy of K/V (1, Hkv, n, D), packed in rows, on `device`; in RAM beside a GPU the memory is pinned.

    Copies from pinned memory run beside computing.
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
    """Whether what is made in RAM should be pinned: beside a GPU.

    Not in a process forked from one that uses a GPU: pinned memory does not go with it.
    """
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


def is_foreign(cache: Any) -> bool:
    """Whether a cache, or a layer of it, runs other code than Transformers', which may return other K/V than it keeps.

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
    return any("update" in vars(one) for one in parts) or not all(home.startswith(_KNOWN_HOMES) for home in homes)


_KNOWN_HOMES = ("transformers.", f"{__package__}.")


def full_length_cache(kv: Iterable[KV]) -> DynamicCache:
    """A `DynamicCache` of plain full-length layers around K/V (B, Hkv, n, D), without a copy (sliding models too)."""
    cache = DynamicCache()
    for keys, values in kv:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


class SideBySide:
    """K/V of the rows of a batch, each prompt ending in the last column, zeros in front of it.

    Attributes:
        buffers: layer -> buffers (B, Hkv, T + room, D), once a row is there.
    """

    def __init__(self, batch_size: int, length: int) -> None:
        self.batch_size, self.length = batch_size, length
        self.buffers: dict[int, KV] = {}

    def put(self, rows: Iterable[int], kv: dict[int, KV], count: int) -> None:
        """Copies a prompt of `count` tokens, layer -> K/V (1, Hkv, `count` or more, D), to its rows."""
        for i, states_of_layer in sorted(kv.items()):
            if i not in self.buffers:
                self.buffers[i] = self._empty(states_of_layer)
            for buffer, states in zip(self.buffers[i], states_of_layer):
                for row in rows:
                    buffer[row, :, : self.length - count] = 0  # masked, and yet 0 · NaN is NaN
                    buffer[row, :, self.length - count : self.length] = states[0, :, :count]

    def _empty(self, like: KV) -> KV:
        """Not packed in rows: where there are several rows of a batch, some models take `keys.view(B · Hkv, …)`."""
        keys, values = (t.new_empty(self.batch_size, t.shape[1], self.length + ROOM, t.shape[3]) for t in like)
        return keys, values


def hand_over(buffers: dict[int, KV], length: int, batch_size: int, cache: Cache) -> None:
    """Puts blended K/V into the user's own (empty) cache, as a stock prefill would have left it.

    Plain dynamic layers adopt the buffers and keep their spare room; any other kind (sliding, static, quantised,
    offloaded) takes the rows through its own `update`. Rows are repeated for a batch of identical prompts.
    """
    adopts = type(cache) is DynamicCache and not cache.offloading
    for i, kv in sorted(buffers.items()):
        keys, values = (t.repeat(batch_size, 1, 1, 1) if batch_size > 1 else t for t in kv)
        if adopts and cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) == i:
            cache.layers.append(DynamicLayer())
        if adopts and i < len(cache.layers) and type(cache.layers[i]) is DynamicLayer:
            cache.layers[i] = GrowingLayer.adopt((keys, values), length)
        else:
            cache.update(keys[:, :, :length], values[:, :, :length], i)
