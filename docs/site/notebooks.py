"""The site's pages of `examples/notebooks/*.ipynb`, with what their cells show; nothing is run."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

_SHOWN = re.compile(r'<div class="shown" data-cell="(\d+)" data-output="(\d+)"></div>')


def page_of(notebook: Path) -> str:
    """The notebook as Markdown; outputs are empty elements that `with_outputs` fills."""
    return "\n\n".join(_cell(i, cell) for i, cell in enumerate(_cells(notebook)))


def with_outputs(page_html: str, notebook: Path) -> str:
    """Fills in what the cells show, unread by Markdown and by the search."""
    cells = _cells(notebook)

    def filled(place: re.Match[str]) -> str:
        views = cells[int(place[1])]["outputs"][int(place[2])]
        return f'<div class="shown" data-search-exclude>{_view(views)}</div>'

    return _SHOWN.sub(filled, page_html)


def _cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def _cell(i: int, cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source.replace("<details><summary>", '<details markdown="1"><summary>')
    places = [f'<div class="shown" data-cell="{i}" data-output="{j}"></div>' for j in range(len(cell["outputs"]))]
    return "\n\n".join([f"```python\n{source}\n```", *places])


def _view(output: dict[str, Any]) -> str:
    """The richest view of an output."""
    views = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in views:
        return f'<img alt="" src="data:image/png;base64,{"".join(views["image/png"]).strip()}">'
    if "text/html" in views:
        return "".join(views["text/html"]).replace('<table border="1" class="dataframe">', "<table>")
    return f"<pre><code>{html.escape(''.join(views['text/plain']))}</code></pre>"
