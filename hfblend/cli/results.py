"""The files that measuring commands write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..lab.plots import plot_quality, plot_ttft
from ..lab.report import Results, markdown, title
from ..util import figure_class, require_folders_of


@dataclass(frozen=True)
class Outputs:
    """Files to write; those that are `None` are not written."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    records: Path | None = None

    def check(self) -> None:
        """Raises `ValueError` for a folder that does not exist, `ImportError` for a missing package."""
        require_folders_of(self.json, self.markdown, self.plot, self.records)
        if self.plot is not None:
            figure_class("plots")

    def write(self, results: Results) -> None:
        """Writes all but the records anew.

        Raises:
            ValueError: the plot's ending is none that matplotlib knows.
        """
        if self.json is not None:
            self.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if self.markdown is not None:
            self.markdown.write_text(markdown(results), encoding="utf-8")
        if self.plot is not None:
            is_bench = "peaks" in results
            figure = plot_ttft(results) if is_bench else plot_quality(results["rows"], title(results))
            figure.savefig(self.plot)
