"""Runs a notebook's cells in IPython, its folded solutions unless `HFBLEND_SHORT` is 1, and claims on its names.

    python tests/notebook_cells.py examples/notebooks/3_rope_and_positions.py

The last line of the output is JSON: for each value that a cell shows, the text and the MIME types of its views.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import notebook_claims

SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n.*?\n</details>", re.DOTALL)


def cells_of(notebook: Path) -> list[tuple[str, str]]:
    """(kind, source) of each cell of a percent script; kinds are `code` and `markdown`."""
    _, *parts = re.split(r"^# %%(.*)\n", notebook.read_text(encoding="utf-8"), flags=re.MULTILINE)
    cells = []
    for mark, source in zip(parts[::2], parts[1::2]):
        kind = "markdown" if "[markdown]" in mark else "code"
        text = re.sub(r"^# ?", "", source, flags=re.MULTILINE) if kind == "markdown" else source
        cells.append((kind, text.strip()))
    return cells


def solutions_in(markdown: str) -> list[str]:
    """The code of the folded solutions."""
    return SOLUTION.findall(markdown)


def shown_by(shell: Any, source: str) -> list[dict[str, str]]:
    """Runs a cell; returns each shown value's text by MIME type, empty for pictures."""
    from IPython.core.displaypub import CapturingDisplayPublisher

    shell.display_pub = CapturingDisplayPublisher()
    outcome = shell.run_cell(source, store_history=False)
    outcome.raise_error()
    values = [one["data"] for one in shell.display_pub.outputs]
    if outcome.result is not None:
        values.append(shell.display_formatter.format(outcome.result)[0])
    return [{kind: text if kind == "text/plain" else "" for kind, text in views.items()} for views in values]


def main(notebook: Path) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shown, with_solutions = [], os.environ.get("HFBLEND_SHORT") != "1"
    for kind, source in cells_of(notebook):
        for code in [source] if kind == "code" else solutions_in(source) if with_solutions else []:
            shown += shown_by(shell, code)
    getattr(notebook_claims, f"claims_{notebook.stem[0]}")(shell.user_ns)
    sys.stdout.write(json.dumps(shown))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
