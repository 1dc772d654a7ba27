"""`hfblend bench`: how fast blending is, against what it must compute at least.

    from hfblend.lab.bench import Settings, markdown, random_model, run

    results = run(random_model("tiny"), "tiny", Settings(lengths=(2000,)))
    print(markdown(results))

`docs/benchmarking.md` says what each figure is.
"""

from .report import markdown
from .runner import run
from .settings import Settings
from .shapes import random_model

__all__ = ["Settings", "markdown", "random_model", "run"]
