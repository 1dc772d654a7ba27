"""Where chunk KV is kept, and under which key."""

from ..chunks import Reader
from .base import Store
from .keys import chunk_key
from .memory import MemoryStore

__all__ = ["MemoryStore", "Reader", "Store", "chunk_key"]
