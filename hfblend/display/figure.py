"""The matplotlib figure that hfblend's plots return; imported where one is drawn, so that matplotlib stays optional."""

from __future__ import annotations

from io import BytesIO

import matplotlib.figure


class Figure(matplotlib.figure.Figure):
    """A figure that draws itself as the last line of a cell, with or without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
