"""A chunk as one file: a safetensors file whose every byte is covered by a checksum. No pickle.

    8 bytes   length of the header
    header    JSON: tensors and their places; metadata, with checksums of the tensors and a digest of the header itself
    data      behind_ids, cached_positions, layer 0000, 0001, …: a layer's rows (n, W) are one contiguous block

A layer in 8 bits (`hfblend/store/quantise.py`) is one block too: key scales, value scales, rows.
The checksums find faults of disks and networks, not forgeries: who can write the file can write its checksums.

Shapes: n tokens of the chunk, W width of a row, L layers.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from ..kv.chunk import ChunkKV
from ..kv.ids import Ids, plain_ids
from ..kv.origin import Origin
from ..kv.rows import KV, RowLayout, full_length_cache, packed, rows_behind
from .quantise import KV_DTYPES, QuantisedRows, can_be_quantised, dequantise, quantise, takes

FORMAT = "hfblend-chunk-1"
QUANTISED_FORMAT = "hfblend-chunk-2"  # another name, so that versions that cannot read it pass it by
HEAD_BYTES = 64 * 2**10  # of a file, read first: the header, positions and ids of most
_BLANK = "0" * 32  # stands in the header for its own digest while that is taken
MOST_UNASKED = 2**20  # bytes of a file that are read before its claims were compared with what was asked for
_LONGEST_HEADER = MOST_UNASKED  # 500 bytes a layer
_MOST_FINDABLE = 2**16  # ids of a chunk that its header holds
_MOST = 2**31  # tokens, or elements of a row
_KV = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_DTYPES = {**_KV, "I64": torch.int64, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CorruptEntry(ValueError):
    """A stored chunk is not what was written; `came` is a digest of the bytes that do not fit, if enough came."""

    def __init__(self, reason: str, came: str = "") -> None:
        super().__init__(reason)
        self.came = came


class OtherVersion(ValueError):
    """A stored chunk is of another version of the format, or its KV is in a form that the store does not serve."""


# --- writing ------------------------------------------------------------------------------------------------------


def dump(key: str, chunk_kv: ChunkKV, kv_dtype: str | None = None) -> bytes:
    """Returns the file of a chunk. Under another key than this one it is refused.

    With a `kv_dtype`, KV is in 8 bits, if all of it is finite and of one dtype. Quantised KV is kept in no other form.
    """
    layers = [rows_of(chunk_kv.layer(i)).cpu().contiguous() for i in range(chunk_kv.num_layers)]
    if kv_dtype is not None and not (len({rows.dtype for rows in layers}) == 1 and all(map(can_be_quantised, layers))):
        kv_dtype = None
    if not takes(kv_dtype, chunk_kv.quantised):
        raise ValueError(f"KV that was quantised to {chunk_kv.quantised} cannot be kept as {kv_dtype or 'computed'}.")
    tensors = {
        "behind_ids": torch.tensor(list(chunk_kv.behind_ids), dtype=torch.int64),
        "cached_positions": chunk_kv.cached_positions.to("cpu", torch.int64).contiguous(),
    }
    for i, (rows, layout) in enumerate(zip(layers, chunk_kv.layouts)):
        parts = (rows,) if kv_dtype is None else quantise(rows, layout, kv_dtype)
        tensors |= zip(_names_of(i, kv_dtype), parts)
    metadata = {"format": FORMAT}
    if kv_dtype is not None:
        metadata = {"format": QUANTISED_FORMAT, "kv_dtype": kv_dtype, "dtype": _NAMES[layers[0].dtype]}
    metadata |= {
        "key": key,
        "provenance": chunk_kv.provenance,
        "regime": str(chunk_kv.regime),
        "layouts": json.dumps([list(vars(layout).values()) for layout in chunk_kv.layouts]),
        "checksums": json.dumps({name: _checksum(t.dtype, t.shape, memory_of(t)) for name, t in tensors.items()}),
        "header": _BLANK,
    }
    if 0 < len(chunk_kv.ids) <= _MOST_FINDABLE:
        own = np.frombuffer(plain_ids(chunk_kv.ids), np.int64).astype("<u4")
        metadata |= {"ids": base64.b64encode(own.data).decode(), "scope": chunk_kv.scope}
    if chunk_kv.origin is not None:
        metadata["origin"] = json.dumps(asdict(chunk_kv.origin))
    return b"".join([_header(metadata, tensors), *map(memory_of, tensors.values())])


def _header(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> bytearray:
    """Returns the bytes before the tensors. safetensors' `save` would sort those by dtype, and tear layers apart."""
    places, stop = {}, 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps({"__metadata__": metadata, **places}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = bytearray(len(text).to_bytes(8, "little") + text)
    start, stop = _digest_place(header)
    header[start:stop] = xxhash.xxh3_128_hexdigest(header).encode()
    return header


def rows_of(kv: KV) -> torch.Tensor:
    """Returns the rows (n, W) of K/V (1, Hkv, n, D), on their device."""
    rows = rows_behind(kv)
    rows = rows_behind(packed(kv)) if rows is None else rows
    assert rows is not None
    return rows


# --- places of tensors --------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A tensor's bytes in a file, [start, stop), and its form."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    checksum: str

    def require_whole(self, memory: memoryview) -> None:
        """Raises `CorruptEntry` unless these bytes (stop − start) are what was written."""
        came = _checksum(self.dtype, self.shape, memory)
        if came != self.checksum:
            reason = f"a checksum does not fit (bytes {self.start} to {self.stop})"
            raise CorruptEntry(reason, f"{self.start} {came}")

    def tensor(self, data: torch.Tensor) -> torch.Tensor:
        """Returns the tensor in these bytes (stop − start,), which have been checked."""
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class QuantisedPlace:
    """A layer in 8 bits: a `Place` of its rows (n, W) in their `dtype`, made of key scales, value scales and rows."""

    parts: tuple[Place, ...]
    layout: RowLayout
    dtype: torch.dtype
    start: int = field(init=False)
    stop: int = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        start, stop, shape = self.parts[0].start, self.parts[-1].stop, self.parts[-1].shape
        vars(self).update(start=start, stop=stop, shape=shape)

    def require_whole(self, memory: memoryview) -> None:
        for part in self.parts:
            part.require_whole(memory[part.start - self.start : part.stop - self.start])

    def tensor(self, data: torch.Tensor) -> torch.Tensor:
        quantised = (part.tensor(data[part.start - self.start : part.stop - self.start]) for part in self.parts)
        rows = dequantise(QuantisedRows(*quantised), self.layout, self.dtype)
        return rows.pin_memory() if data.is_pinned() else rows


def views_of(places: Sequence[Place | QuantisedPlace], data: torch.Tensor) -> list[torch.Tensor] | None:
    """Returns adjacent tensors of one form in `data`, filled or not; `None` if they are larger than their bytes."""
    first, *others = places
    if isinstance(first, QuantisedPlace) or any(not isinstance(p, Place) or p[:2] != first[:2] for p in others):
        return None
    return list(data.view(first.dtype).view(len(places), *first.shape).unbind())


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Returns a contiguous tensor's bytes."""
    return tensor.flatten().view(torch.uint8).numpy().data


def _checksum(dtype: torch.dtype, shape: Sequence[int], memory: memoryview) -> str:
    state = xxhash.xxh3_128(f"{dtype} {tuple(shape)}".encode())
    state.update(memory)
    return state.hexdigest()


@functools.cache
def _names_of(layer_idx: int, quantised: str | None) -> tuple[str, ...]:
    slots = ("layer",) if quantised is None else ("key_scales", "value_scales", "layer")
    return tuple(f"{slot}_{layer_idx:04}" for slot in slots)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """A file's contents, by its header.

    Attributes:
        origin: who computed it, of which ids; `None` in files of earlier versions.
        ids: of the chunk, 4 bytes each; empty in files of earlier versions.
        scope: of the prompts that it may be found in.
        quantised: `"int8"` or `"fp8"`, if KV is in 8 bits.
        dtype: of such KV, when it was computed.
    """

    key: str
    provenance: Any
    regime: int
    layouts: tuple[RowLayout, ...]
    places: dict[str, Place]
    origin: Origin | None = None
    ids: bytes = b""
    scope: str = ""
    quantised: str | None = None
    dtype: torch.dtype | None = None

    @property
    def own_ids(self) -> array[int]:
        """The chunk's ids, 8 bytes each; none in files of earlier versions."""
        return array("q", np.frombuffer(self.ids, "<u4").astype(np.int64).tobytes())

    @property
    def first_stop(self) -> int:
        """The end of header, ids and positions."""
        return self.places["cached_positions"].stop

    @cached_property
    def layers(self) -> tuple[Place | QuantisedPlace, ...]:
        """The place of each layer's rows (n, W)."""
        parts = [tuple(map(self.places.__getitem__, _names_of(i, self.quantised))) for i in range(len(self.layouts))]
        if self.dtype is None:
            return tuple(rows for (rows,) in parts)
        return tuple(QuantisedPlace(own, layout, self.dtype) for own, layout in zip(parts, self.layouts))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all rows once they are read."""
        return sum(math.prod(layer.shape) * layer.dtype.itemsize for layer in self.layers)

    def positions_of(self, read: torch.Tensor) -> torch.Tensor:
        """Returns positions (n,) that were read; raises `CorruptEntry` if no KV can have stood there."""
        first, last = map(int, read.aminmax())
        if not 0 <= first <= last < self.regime:
            raise CorruptEntry(f"it has positions {first} to {last}, in a prompt of {self.regime} tokens")
        return read

    def require_served_by(self, kv_dtype: str | None) -> None:
        """Raises `OtherVersion` if a store that keeps `kv_dtype` does not serve this KV."""
        if not takes(kv_dtype, self.quantised):
            raise OtherVersion(f"its KV is in {self.quantised}, this store serves {kv_dtype or 'none in 8 bits'}")


def contents_of(key: str, start: bytes, num_bytes: int | None) -> Contents:
    """Returns the contents of a file of so many bytes (`None`: any), by its beginning, `header_bytes` long or more.

    Raises:
        CorruptEntry: the header is not what `dump` wrote under this key, or does not fit the file's length.
        OtherVersion: it is whole, but of another version.
    """
    try:
        header = bytes(start[: _header_stop(start)])
        read = _contents_of if len(header) > HEAD_BYTES else _known_contents
        return read(key, header, num_bytes)
    except CorruptEntry as error:
        error.came = xxhash.xxh3_128_hexdigest(start[: header_bytes(start[:8])])
        raise


def _contents_of(key: str, start: bytes, num_bytes: int | None) -> Contents:
    header = header_of(start)
    metadata = header.pop("__metadata__")
    form = metadata.get("format")
    if form not in (FORMAT, QUANTISED_FORMAT):
        raise OtherVersion(f"its format is {form!r}, this version reads {FORMAT!r} and {QUANTISED_FORMAT!r}")
    if metadata.get("key") != key:
        raise CorruptEntry(f"it was stored under {metadata.get('key')!r}")
    try:
        rows = json.loads(metadata["layouts"])
        if any(type(number) is not int for numbers in rows for number in numbers):  # 2.0 and `true` equal them
            raise CorruptEntry(f"it has rows of {rows[:2]!r}")
        layouts = tuple(RowLayout.shared(*numbers) for numbers in rows)
        in_8_bits = (metadata["kv_dtype"], _KV[metadata["dtype"]]) if form == QUANTISED_FORMAT else (None, None)
        places = _places_of(header, layouts, in_8_bits[0], json.loads(metadata["checksums"]), len(start))
        regime, provenance, origin = int(metadata["regime"]), metadata["provenance"], origin_of(metadata)
        ids, scope = base64.b64decode(metadata.get("ids", ""), validate=True), str(metadata.get("scope", ""))
    except CorruptEntry:
        raise
    except Exception as error:  # a header that was made to do harm can make anything go wrong
        raise CorruptEntry(f"{type(error).__name__}: {error}") from error
    stop = places[next(reversed(places))].stop
    if num_bytes not in (None, stop):
        raise CorruptEntry(f"its tensors end at byte {stop}, the file at {num_bytes}")
    if provenance not in ("isolated", "in_context") or not 0 < regime <= _MOST:
        raise CorruptEntry(f"its provenance is {provenance!r}, its regime {regime}")
    if len(ids) not in (0, 4 * places["cached_positions"].shape[0]):
        raise CorruptEntry(f"it has {len(ids)} bytes of ids")
    contents = Contents(key, provenance, regime, layouts, places, origin, ids, scope, *in_8_bits)
    if len({place.dtype for place in contents.layers}) > 1:
        raise OtherVersion("its layers are of several dtypes, no model's here")
    return contents


# A chunk in use is opened for every prompt. A header means the same as long as it is the same to the last byte.
_known_contents = functools.lru_cache(maxsize=512)(_contents_of)


def parse(key: str, file: bytes) -> ChunkKV:
    """Returns the chunk in a file, in RAM, every byte checked; raises as `contents_of`."""
    contents = contents_of(key, file, len(file))

    def read(place: Place | QuantisedPlace) -> torch.Tensor:
        place.require_whole(memoryview(file)[place.start : place.stop])
        data = torch.empty(place.stop - place.start, dtype=torch.uint8)  # aligned
        data.numpy().data[:] = file[place.start : place.stop]
        return place.tensor(data)

    positions = contents.positions_of(read(contents.places["cached_positions"]))
    behind_ids = Ids.from_bytes(memory_of(read(contents.places["behind_ids"])))
    kv = (layout.views(read(place)[None]) for layout, place in zip(contents.layouts, contents.layers))
    said = (contents.provenance, contents.regime, contents.quantised, contents.origin)
    own = contents.own_ids, contents.scope
    return ChunkKV(full_length_cache(packed(one) for one in kv), positions, behind_ids, *said, *own)


def _places_of(
    header: dict[str, Any], layouts: tuple[RowLayout, ...], quantised: str | None, checksums: Any, start: int
) -> dict[str, Place]:
    """Returns the places of all tensors that the chunk must have: in order, adjacent, and no others.

    `start` is the first byte of the data.
    """
    (num_behind,), (num_tokens,) = (header[name]["shape"] for name in ("behind_ids", "cached_positions"))
    widths = [number for layout in set(layouts) for number in vars(layout).values()]
    counts = {type(num_behind), type(num_tokens)} == {int} and 0 <= num_behind <= _MOST
    if not counts or not widths or not 0 < min(num_tokens, *widths) <= max(num_tokens, *widths) <= _MOST:
        raise CorruptEntry(f"it has {num_tokens!r} tokens after {num_behind!r}, and rows of {sorted(widths)[:1]}")
    expected: list[tuple[str, str, tuple[int, ...]]] = [
        ("behind_ids", "I64", (num_behind,)),
        ("cached_positions", "I64", (num_tokens,)),
    ]
    for i, layout in enumerate(layouts):
        *scales, rows = _names_of(i, quantised)
        shapes = (layout.key_heads, layout.key_dim), (num_tokens, layout.value_heads)
        expected += [(name, "F32", shape) for name, shape in zip(scales, shapes)]
        dtype = header[rows]["dtype"] if quantised is None else _NAMES[KV_DTYPES[quantised]]
        if quantised is None and dtype not in _KV:
            raise CorruptEntry(f"layer {i} is of dtype {dtype!r}")
        expected.append((rows, dtype, (num_tokens, layout.width)))
    places, stop = {}, 0
    for name, dtype, shape in expected:
        begin, stop = stop, stop + math.prod(shape) * _DTYPES[dtype].itemsize
        if header[name] != {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, stop]}:
            raise CorruptEntry(f"{name} is not a tensor {dtype} of shape {shape} at [{begin}, {stop})")
        places[name] = Place(_DTYPES[dtype], shape, start + begin, start + stop, checksums[name])
    if len(header) != len(places):
        raise CorruptEntry(f"it has {len(header)} tensors, not {len(places)}")
    return places


def header_of(file: bytes) -> dict[str, Any]:
    """Returns the header at the beginning of a file; raises `CorruptEntry` if it is not what `dump` wrote."""
    header_stop = _header_stop(file)
    start, stop = _digest_place(file)
    blanked = bytearray(file[:header_stop])
    blanked[start:stop] = _BLANK.encode()
    if xxhash.xxh3_128_hexdigest(blanked).encode() != file[start:stop]:
        raise CorruptEntry("the digest of its header does not fit")
    try:
        header = json.loads(file[8:header_stop])
        metadata = header["__metadata__"]
    except Exception as error:  # as in `_contents_of`
        raise CorruptEntry(f"its header cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise CorruptEntry("its metadata are not names and texts")
    return header


def origin_of(metadata: dict[str, str]) -> Origin | None:
    """Returns who computed a file's KV, of which ids, by its checked header; `None` in files of earlier versions."""
    if "origin" not in metadata:
        return None
    try:
        said = json.loads(metadata["origin"])
        return Origin(**{one.name: sys.intern(str(said[one.name])) for one in fields(Origin)})  # many say the same
    except Exception as error:  # as in `_contents_of`
        raise CorruptEntry(f"its origin cannot be read: {error}") from error


def header_bytes(start: bytes) -> int:
    """Returns how many bytes of a file `header_of` needs, by its first 8."""
    return 8 + min(int.from_bytes(start, "little"), _LONGEST_HEADER)


def _header_stop(file: bytes | bytearray) -> int:
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or not 0 < length <= min(len(file) - 8, _LONGEST_HEADER):
        raise CorruptEntry(f"it has {len(file)} bytes and names a header of {length}")
    return 8 + length


def _digest_place(file: bytes | bytearray) -> tuple[int, int]:
    name = b'"header":"'
    found = file.find(name, 8, _header_stop(file))
    if found < 0:
        raise CorruptEntry("its header has no digest")
    return found + len(name), found + len(name) + len(_BLANK)
