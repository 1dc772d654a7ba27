"""Where chunk KV is kept, and under which key."""

from .base import Reader, Store
from .keys import chunk_key
from .memory import MemoryStore

__all__ = ["MemoryStore", "Reader", "Store", "chunk_key"]
