"""The options that commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from typer import BadParameter, Option

from .completion import CORRECTIONS, DEVICES, DTYPES, KV_DTYPES, METHODS, RULES, values

EXIT_CODES = "Exit codes: 0 success; 1 failure or missing dependency; 2 invalid option, file or model."

Model = Annotated[str | None, Option(help="Hub id or folder of a causal LM.", show_default="SmolLM2-135M-Instruct")]
Device = Annotated[
    str | None, Option(help="As torch names it.", show_default="GPU if any, else CPU", autocompletion=values(DEVICES))
]
KVDType = Annotated[
    str | None,
    Option(help="Keep chunk KV in 8 bits: int8 or fp8.", show_default="as computed", autocompletion=values(KV_DTYPES)),
]
DType = Annotated[
    str | None,
    Option(help="As torch names it.", show_default="float32 on a CPU, else bfloat16", autocompletion=values(DTYPES)),
]
JsonFile = Annotated[Path | None, Option("--json", help="Write the figures to this file.")]
Json = Annotated[
    Path | None, Option("--json", metavar="FILE", help="Write the figures to this file; - prints them instead.")
]
Markdown = Annotated[Path | None, Option(help="Write the table to this file.")]
Ratio = Annotated[float, Option(help="Share of the reused tokens to recompute.", min=0, max=1)]
Rule = Annotated[
    str | None,
    Option(help="The rule that selects them.", show_default="BlendConfig's", autocompletion=values(RULES)),
]
Correction = Annotated[
    str | None, Option(metavar="offset|none", help="How rows that stay reused are corrected.",
                       show_default="BlendConfig's", autocompletion=values(CORRECTIONS))
]  # fmt: skip
Methods = Annotated[str, Option(help="Names, separated by commas.", autocompletion=values(METHODS))]
KeptIn = Annotated[
    str | None, Option("--store", help="Folder or URL that keeps the chunk KV.", show_default="in memory")
]
NewTokens = Annotated[int, Option(help="Longest answer.", min=1)]


def _finite(number: float | None) -> float | None:
    if number is not None and not 0 <= number < math.inf:
        raise BadParameter(f"{number} is no number of seconds, 0 or more.")
    return number


Blame = Annotated[
    float | None, Option(metavar="SECONDS", callback=_finite, show_default="not searched",
                         help="Search so long for the chunks and tokens that changed the answer.")
]  # fmt: skip
PrintJson = Annotated[bool, Option("--json", help="Print JSON instead.")]


def existing(help: str) -> Any:
    """An option that takes a file which is there."""
    return Option(help=help, exists=True, dir_okay=False)
