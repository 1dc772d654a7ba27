"""Writes the tables of `docs/models.md`, every cell measured by `family_checks.py`: `python tests/models_table.py`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from families import FAMILIES, NOT_BUILT, Family
from family_checks import (
    ATTENTION,
    attention,
    batch,
    future_leak,
    keys_turn,
    ratio_1,
    realign_error,
    true_kv,
    window,
)

from hfblend.model.hf_model import UnsupportedModel
from hfblend.support.registry import model_of

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
COLUMNS = (
    "family", "ratio 1", "true KV, ratio 0", "true KV, ratio 0.3", "realign", "future leak", "window", "batch",
    *ATTENTION, "keys turn", "selected by",
)  # fmt: skip


def measured(family: Family) -> list[str]:
    """A family's row."""
    none, rule = true_kv(family, 0.0)
    some, _ = true_kv(family, 0.3)
    cells: list[float | str] = [
        ratio_1(family), none, some, realign_error(family), future_leak(family), window(family),
        batch(family), *(attention(family, name) for name in ATTENTION),
        keys_turn(family), rule,
    ]  # fmt: skip
    return [f"`{family.name}`", *(f"{cell:.0e}" if isinstance(cell, float) else cell for cell in cells)]


def tables(names: list[str], tell: Callable[[str], None]) -> dict[str, str]:
    """Name of a block -> its Markdown."""
    green, refused = [], []
    for name in names:
        tell(name)
        if name in NOT_BUILT:
            continue
        try:
            model_of(FAMILIES[name].make())
        except UnsupportedModel as error:
            refused.append([f"`{name}`", str(error)])
        else:
            green.append(measured(FAMILIES[name]))
    left_out = [[f"`{name}`", reason] for name, reason in NOT_BUILT.items() if name in names]
    versions = f"Transformers {transformers.__version__}, PyTorch {torch.__version__.split('+')[0]}, fp32, on a CPU"
    summary = f"{len(green)} rows pass, {len(refused)} are refused, {len(left_out)} were not built. {versions}."
    return {
        "summary": summary,
        "green": _markdown(COLUMNS, green),
        "refused": _markdown(("family", "what `hfblend.patch` says"), refused),
        "not-built": _markdown(("family", "why"), left_out),
    }


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(lines)


def written(page: str, blocks: dict[str, str]) -> str:
    """The page with each block between its two marks."""
    for name, text in blocks.items():
        mark = f"<!-- {name} -->"
        page = re.sub(f"{mark}.*?{mark}", lambda _: f"{mark}\n\n{text}\n\n{mark}", page, flags=re.DOTALL)  # noqa: B023
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all; some are shown and not written")
    chosen = parser.parse_args().families
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger = logging.getLogger("models_table")
    logger.setLevel(logging.INFO)
    blocks = tables(chosen or list(FAMILIES), logger.info)
    if chosen:
        logger.info("\n\n".join(blocks.values()))
    else:
        PAGE.write_text(written(PAGE.read_text(), blocks))


if __name__ == "__main__":
    main()
