"""Serving: blended prompts in Transformers' own continuous batching, after the app of `transformers serve`.

request.py    whether a prompt is blended, and what its blocks are found under
sampling.py   temperature, top-p, top-k and seed of each request
attention.py  attention over blocks on a GPU without flash-attn
engine.py     continuous batching, which no other file knows
schema.py     bodies of requests, checked, and OpenAI's form of errors
prompts.py    prompts of bodies, with their chunks
text.py       text of answers, token by token
app.py        the server, which alone knows `transformers.cli.serving`
gate.py       the layer around it: keys, limits, deadlines, cancellation, metrics
caller.py     who asks, told by the gate to the app

With several replicas, on Ray:

routing.py    which replica a prompt goes to
relay.py      answers of replicas, which outlive a replica
cluster.py    replicas and workers, which alone knows Ray
"""

from importlib.metadata import version

from packaging.version import Version

if Version(version("transformers")) < Version("5.23"):
    raise ImportError(
        f"Serving needs Transformers 5.23 or later, got {version('transformers')}: run `pip install 'hfblend[serve]'`."
    )
