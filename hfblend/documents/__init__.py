"""One's own files as passages of text: read, cut at paragraphs, found by a question."""

from .passages import Passage, nearest, passages_of
from .read import Document, Unreadable, files_of, read

__all__ = ["Document", "Passage", "Unreadable", "files_of", "nearest", "passages_of", "read"]
