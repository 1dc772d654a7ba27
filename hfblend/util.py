"""What every room may use: optional packages, the places of files, the end of a forward."""

from __future__ import annotations

import importlib
import os
import unicodedata
from pathlib import Path
from typing import Any

_SHOWN = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "␛"}
_JOINERS = "\u200c\u200d"  # part of ordinary words and emoji, without effect on the text around them


class StopForward(Exception):
    """Raised in a cache or in attention to end a forward where the rest of it is not needed."""


def figure_class(extra: str) -> Any:
    """`matplotlib.figure.Figure`, which draws without a screen; raises as `require`."""
    return require("matplotlib.figure", "matplotlib", extra, "Pictures need").Figure


def require(module: str, package: str, extra: str, feature: str) -> Any:
    """The module of an optional package.

    Args:
        module: to import.
        package: its name on the package index.
        extra: of hfblend, that installs it.
        feature: what asks for it, as the beginning of the sentence: "Pictures need".

    Raises:
        ImportError: the package is missing.
    """
    try:
        importlib.import_module(module.partition(".")[0])  # a submodule that is loaded would not ask for its package
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{feature} the package {package}: run `pip install 'hfblend[{extra}]'`.") from error


def require_folders_of(*files: Path | None) -> None:
    """Raises `ValueError` for a file without a folder, a folder in its place, or one that is named twice."""
    for i, file in enumerate(files):
        if file is not None and file in files[:i]:
            raise ValueError(f"{file} is named for two outputs; give each its own file.")
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file in it.")
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"The folder of {file} does not exist; create it first.")


def cache_folder() -> Path:
    """Where hfblend keeps what it made once: `$HFBLEND_CACHE`, default `~/.cache/hfblend`."""
    return Path(os.environ.get("HFBLEND_CACHE") or Path.home() / ".cache" / "hfblend")


def visible(text: str) -> str:
    """Writes out controls, escapes and marks of writing direction, so that every character is seen.

    >>> visible("a\\x1b[31mb\\u202ec")
    'a␛[31mb⟨U+202E⟩c'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    acts = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS
    return f"⟨U+{ord(character):04X}⟩" if acts else character
