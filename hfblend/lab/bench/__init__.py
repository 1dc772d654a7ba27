"""`hfblend bench`: the speed of blending, compared with the operations that it needs at least.

    from hfblend.lab.bench import BenchSettings, markdown, random_model, run

    results = run(random_model("tiny"), "tiny", BenchSettings(lengths=(2000,)))
    print(markdown(results))

docs/performance.md explains each figure.
"""

from ..report import markdown
from ..settings import BenchSettings
from ..synthetic import random_model
from .runner import run

__all__ = ["BenchSettings", "markdown", "random_model", "run"]
