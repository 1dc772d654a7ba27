"""Where files go: those that a command writes at its end, asked for before the work, and those that hfblend keeps."""

from __future__ import annotations

import os
from pathlib import Path


def require_folders_of(*files: Path | None) -> None:
    """Raises `ValueError` for a file whose folder does not exist, or that is a folder itself; `None` is no file."""
    for file in files:
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file in it.")
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"The folder of {file} does not exist; create it first.")


def cache_folder() -> Path:
    """Where hfblend keeps what it made once: `$HFBLEND_CACHE`, default `~/.cache/hfblend`."""
    return Path(os.environ.get("HFBLEND_CACHE") or Path.home() / ".cache" / "hfblend")
