"""Files that a command writes at its end: whether it will be able to, asked before the work."""

from __future__ import annotations

from pathlib import Path


def require_folders_of(*files: Path | None) -> None:
    """Raises `ValueError` for a file whose folder does not exist; `None` is no file."""
    for file in files:
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"The folder of {file} does not exist; create it first.")
