"""Packages that only some features need: imported when they are used, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def figure_class(extra: str) -> Any:
    """`matplotlib.figure.Figure`, which draws without a screen.

    Args:
        extra: of hfblend, that installs it.

    Raises:
        ImportError: the package is missing (the message says what to install).
    """
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
