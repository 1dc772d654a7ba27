"""A chunk as one file: a safetensors file whose every byte is covered by a checksum. No pickle.

    8 bytes   length of the header
    header    JSON: tensors and their places; metadata, with checksums of the tensors and a digest of the header itself
    data      cached_positions, behind_ids, layer 0000, 0001, …: a layer's rows (n, W) are one contiguous block

The checksums find faults of disks and networks, not forgeries: whoever can write the file can write its checksums.

Shapes: n tokens of the chunk, W width of a row, L layers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from safetensors.torch import save

from ..caches import KV, RowLayout, full_length_cache, packed, rows_behind
from ..chunks import ChunkKV

FORMAT = "hfblend-chunk-1"
_BLANK = "0" * 32  # stands in the header for its own digest while that is taken
_LONGEST_HEADER = 16 * 2**20
_KV = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = dict(zip(("F16", "BF16", "F32", "F64", "I64"), (*_KV, torch.int64)))


class CorruptEntry(ValueError):
    """A stored chunk is not what was written; the message says what does not fit."""


class OtherVersion(ValueError):
    """A stored chunk is of another version of the format."""


def dump(key: str, chunk_kv: ChunkKV) -> bytes:
    """The file of a chunk.

    Args:
        key: under which it is stored; read back under another one, it is refused.
    """
    kv = [chunk_kv.layer(i) for i in range(chunk_kv.num_layers)]
    tensors = {
        "behind_ids": torch.tensor(chunk_kv.behind_ids, dtype=torch.int64),
        "cached_positions": chunk_kv.cached_positions.to("cpu", torch.int64).contiguous(),
        **{f"layer_{i:04}": _rows(one) for i, one in enumerate(kv)},
    }
    metadata = {
        "format": FORMAT,
        "key": key,
        "provenance": chunk_kv.provenance,
        "regime": str(chunk_kv.regime),
        "layouts": json.dumps([list(vars(RowLayout.of(one)).values()) for one in kv]),
        "checksums": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()}),
        "header": _BLANK,
    }
    file = bytearray(save(tensors, metadata))
    start, stop = _digest_place(file)
    file[start:stop] = xxhash.xxh3_128_hexdigest(file[: _header_stop(file)]).encode()
    return bytes(file)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a file, [start, stop), and what it must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    checksum: str

    def tensor(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor of these bytes (stop − start,).

        Raises:
            CorruptEntry: they are not what was written.
        """
        tensor = data.view(self.dtype).view(self.shape)
        if _checksum(tensor) != self.checksum:
            raise CorruptEntry(f"a checksum does not fit (bytes {self.start} to {self.stop})")
        return tensor


@dataclass(frozen=True)
class Contents:
    """What a file holds, by its header."""

    key: str
    provenance: Any
    regime: int
    layouts: tuple[RowLayout, ...]
    places: dict[str, Place]

    def layer(self, layer_idx: int) -> Place:
        """Where a layer's rows (n, W) stand."""
        return self.places[f"layer_{layer_idx:04}"]


def contents_of(key: str, start: bytes, num_bytes: int) -> Contents:
    """What a file of so many bytes holds, by its beginning, `header_bytes` long or more.

    Raises:
        CorruptEntry: the header is not what `dump` wrote under this key, or does not fit the file's length.
        OtherVersion: it is whole, but of another version.
    """
    metadata = _checked_metadata(start)
    if metadata.get("format") != FORMAT:
        raise OtherVersion(f"its format is {metadata.get('format')!r}, this version reads {FORMAT!r}")
    if metadata.get("key") != key:
        raise CorruptEntry(f"it was stored under {metadata.get('key')!r}")
    try:
        checksums, data = json.loads(metadata["checksums"]), _header_stop(start)
        header = {name: one for name, one in json.loads(start[8:data]).items() if name != "__metadata__"}
        places = {name: _place(one, data, checksums[name]) for name, one in header.items()}
        layouts = tuple(RowLayout.shared(*numbers) for numbers in json.loads(metadata["layouts"]))
        contents = Contents(key, metadata["provenance"], int(metadata["regime"]), layouts, places)
        _require_whole(contents, data, num_bytes)
    except CorruptEntry:
        raise
    except Exception as error:  # whatever a header that was made to do harm makes go wrong
        raise CorruptEntry(f"{type(error).__name__}: {error}") from error
    return contents


def parse(key: str, file: bytes) -> ChunkKV:
    """The chunk in a file, in RAM; every byte has been checked.

    Raises:
        CorruptEntry: the file is not what `dump` wrote under this key.
        OtherVersion: it is whole, but of another version.
    """
    contents = contents_of(key, file, len(file))
    tensors = {name: place.tensor(_bytes(file[place.start : place.stop])) for name, place in contents.places.items()}
    kv = (layout.views(tensors[f"layer_{i:04}"][None]) for i, layout in enumerate(contents.layouts))
    cache, behind_ids = full_length_cache(packed(one) for one in kv), tuple(tensors["behind_ids"].tolist())
    return ChunkKV(cache, tensors["cached_positions"], behind_ids, contents.provenance, contents.regime)


def _place(header: dict[str, Any], data: int, checksum: str) -> Place:
    start, stop = header["data_offsets"]
    dtype, shape = _DTYPES[header["dtype"]], tuple(header["shape"])
    if min((start, *shape)) < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise CorruptEntry(f"a tensor of shape {shape} cannot stand in [{start}, {stop})")
    return Place(dtype, shape, data + start, data + stop, checksum)


def _require_whole(contents: Contents, data: int, num_bytes: int) -> None:
    """Every tensor that a chunk has, of its form, one behind the other, and nothing else."""
    names = ["behind_ids", "cached_positions", *(f"layer_{i:04}" for i in range(len(contents.layouts)))]
    if not contents.layouts or sorted(contents.places) != names:
        raise CorruptEntry("tensors are missing, or too many")
    ends = data
    for place in sorted(contents.places.values(), key=lambda place: (place.start, place.stop)):
        if place.start != ends:
            raise CorruptEntry("its tensors do not stand one behind the other")
        ends = place.stop
    if ends != num_bytes:
        raise CorruptEntry(f"its tensors end at byte {ends}, the file at {num_bytes}")
    positions, behind = contents.places["cached_positions"], contents.places["behind_ids"]
    if any(place.dtype != torch.int64 or len(place.shape) != 1 for place in (positions, behind)):
        raise CorruptEntry("positions and ids are not vectors of integers")
    if not positions.shape[0]:
        raise CorruptEntry("it has no tokens")
    for i, layout in enumerate(contents.layouts):
        place, is_layout = contents.layer(i), min(vars(layout).values()) > 0
        if not is_layout or place.shape != (positions.shape[0], layout.width) or place.dtype not in _KV:
            raise CorruptEntry(f"layer {i} is not of its form")
    if contents.provenance not in ("isolated", "in_context"):
        raise CorruptEntry(f"its provenance is {contents.provenance!r}")


def _bytes(data: bytes) -> torch.Tensor:
    """(N,) uint8, aligned."""
    tensor = torch.empty(len(data), dtype=torch.uint8)
    if data:
        tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return tensor


def header_of(file: bytes) -> dict[str, Any]:
    """The header at the beginning of a file, checked: metadata under `"__metadata__"`, and each tensor's place.

    Raises:
        CorruptEntry: it is not what `dump` wrote.
    """
    _checked_metadata(file)
    return json.loads(file[8 : _header_stop(file)])


def header_bytes(start: bytes) -> int:
    """How many bytes of a file `header_of` needs, by its first 8."""
    return 8 + min(int.from_bytes(start, "little"), _LONGEST_HEADER)


def _checked_metadata(file: bytes) -> dict[str, str]:
    """The header's metadata, once its digest fits."""
    header_stop = _header_stop(file)
    start, stop = _digest_place(file)
    blanked = bytearray(file[:header_stop])
    blanked[start:stop] = _BLANK.encode()
    if xxhash.xxh3_128_hexdigest(blanked).encode() != file[start:stop]:
        raise CorruptEntry("the digest of its header does not fit")
    try:
        metadata = json.loads(file[8:header_stop])["__metadata__"]
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptEntry(f"its header cannot be read: {error}") from error
    if not isinstance(metadata, dict):
        raise CorruptEntry("its metadata are not names and texts")
    return metadata


def _header_stop(file: bytes | bytearray) -> int:
    """Where the data begin."""
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or not 0 < length <= min(len(file) - 8, _LONGEST_HEADER):
        raise CorruptEntry(f"it has {len(file)} bytes and names a header of {length}")
    return 8 + length


def _digest_place(file: bytes | bytearray) -> tuple[int, int]:
    """Where in the file the header's digest stands, [start, stop)."""
    name = b'"header":"'
    found = file.find(name, 8, _header_stop(file))
    if found < 0:
        raise CorruptEntry("its header has no digest")
    return found + len(name), found + len(name) + len(_BLANK)


def _rows(kv: KV) -> torch.Tensor:
    """(n, W) in RAM."""
    rows = rows_behind(kv)
    if rows is None:
        rows = rows_behind(packed(kv, "cpu"))
    assert rows is not None
    return rows.cpu().contiguous()


def _checksum(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes, its dtype and its shape."""
    state = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        state.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()
