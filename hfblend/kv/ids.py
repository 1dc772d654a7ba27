"""Token ids that many chunks have in common, kept once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import xxhash

_shared: WeakValueDictionary[bytes, array[int]] = WeakValueDictionary()  # digest -> ids that are in use


class Ids(Sequence[int]):
    """Token ids of 8 bytes each. Equal ones share their memory; they equal tuples and lists of the same ids.

    >>> Ids([7, 1, 9]) == (7, 1, 9)
    True
    """

    __slots__ = ("_ids",)
    _ids: array[int]

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids = ids._ids if isinstance(ids, Ids) else _one_for_all(array("q", ids))

    @classmethod
    def from_bytes(cls, memory: memoryview) -> Ids:
        """The ids in memory of int64."""
        found, ids = cls.__new__(cls), array("q")
        ids.frombytes(memory)
        found._ids = _one_for_all(ids)
        return found

    @property
    def num_bytes(self) -> int:
        """Bytes of the ids, shared or not."""
        return len(self._ids) * self._ids.itemsize

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: Any) -> Any:
        return tuple(self._ids[place]) if isinstance(place, slice) else self._ids[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids | array):
            return self._ids == plain_ids(other)
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and self._ids.tolist() == list(other)

    def __repr__(self) -> str:
        return f"Ids({self._ids.tolist()})"


def plain_ids(ids: Sequence[int]) -> array[int]:
    """Ids as 8 bytes each, to be hashed and compared without a Python integer for each; a copy only where needed."""
    if type(ids) is array and ids.typecode == "q":  # first: quicker than to ask for an abstract class
        return ids
    return ids._ids if isinstance(ids, Ids) else array("q", ids)


def ids_in(row: torch.Tensor) -> array[int]:
    """The ids of a tensor (T,)."""
    return array("q", row.to("cpu", torch.int64).numpy().tobytes())


def _one_for_all(ids: array[int]) -> array[int]:
    """Returns the array of equal ids that is in use, or this one."""
    found = _shared.setdefault(xxhash.xxh3_128_digest(ids), ids)
    return found if found == ids else ids
