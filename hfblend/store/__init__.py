"""Stores of chunk KV, and their keys."""

from ..kv.chunk import Reader
from .base import ReadsAhead, Store
from .disk import DiskStore
from .keys import chunk_key
from .memory import MemoryStore
from .remote import RemoteStore
from .tiers import TieredStore, file_stores_of, flush, holds, left_by, store_at, tiers_of

__all__ = [
    "DiskStore", "MemoryStore", "Reader", "ReadsAhead", "RemoteStore", "Store", "TieredStore", "chunk_key",
    "file_stores_of", "flush", "holds", "left_by", "store_at", "tiers_of",
]  # fmt: skip
