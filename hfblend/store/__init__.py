"""Where chunk KV is kept, and under which key."""

from ..kv.chunk import Reader
from .base import ReadsAhead, Store
from .disk import DiskStore
from .keys import chunk_key
from .memory import MemoryStore
from .remote import RemoteStore
from .tiers import TieredStore, flush, holds, store_at

__all__ = [
    "DiskStore",
    "MemoryStore",
    "Reader",
    "ReadsAhead",
    "RemoteStore",
    "Store",
    "TieredStore",
    "chunk_key",
    "flush",
    "holds",
    "store_at",
]
