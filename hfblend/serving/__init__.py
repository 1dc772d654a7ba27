"""Serving: blended prompts in Transformers' own continuous batching, which `engine.py` alone knows.

request.py  whether a prompt is blended, and what its blocks are found under
engine.py   continuous batching
"""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.23"):
    raise ImportError(
        f"Serving needs Transformers 5.23 or later, got {transformers.__version__}: run `pip install 'hfblend[serve]'`."
    )
