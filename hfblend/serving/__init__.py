"""Serving: blended prompts in Transformers' own continuous batching, which `engine.py` alone knows.

request.py  whether a prompt is blended, and what its blocks are found under
engine.py   continuous batching
"""

from importlib.metadata import version

from packaging.version import Version

if Version(version("transformers")) < Version("5.23"):
    raise ImportError(
        f"Serving needs Transformers 5.23 or later, got {version('transformers')}: run `pip install 'hfblend[serve]'`."
    )
