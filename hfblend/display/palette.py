"""The colours of every picture: Okabe and Ito's, distinct with any colour vision. No picture relies on them alone."""

from __future__ import annotations

BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
GREY = "#7f7f7f"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
VERMILION = "#D55E00"

LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # one after the other, for lines of a plot
STROKES = ("-", "--", "-.", ":")
ORIGINS = {
    "exact": BLUE, "hit": GREEN, "miss": VERMILION, "fresh": GREY, "unused": PURPLE, "computed": "#8b949e",
}  # fmt: skip
