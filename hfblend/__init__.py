"""CacheBlend inside Hugging Face Transformers: reuse the KV cache of text chunks wherever they stand.

    blender = hfblend.patch(model, tokenizer=tokenizer)
    prompt = hfblend.Prompt.from_texts(tokenizer, prefix=system, chunks=documents, suffix=question)
    output = model.generate(**prompt.inputs(), max_new_tokens=64)
    blender.remove()

Importing has no effect, and loads Transformers and PyTorch at the first use of a name; `patch` touches one model
instance, never a class.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import BlendConfig
    from .display import plot_scores, plot_timeline, show
    from .generate.blending import BlendResult, blend
    from .generate.precompute import prefill_chunk
    from .generate.steps import steps
    from .kv.chunk import ChunkKV
    from .measure.results import Blame, Calibration, Verification
    from .measure.verify import Verify
    from .model.hf_model import UnsupportedModel
    from .patching import Blender, patch
    from .prompts.filler import filler_ids
    from .prompts.prompt import Prompt
    from .store import MemoryStore
    from .trace.trace import BlendTrace

__version__ = "0.2.0"

__all__ = [
    "Blame",
    "BlendConfig",
    "BlendResult",
    "BlendTrace",
    "Blender",
    "Calibration",
    "ChunkKV",
    "MemoryStore",
    "Prompt",
    "UnsupportedModel",
    "Verification",
    "Verify",
    "blend",
    "filler_ids",
    "patch",
    "plot_scores",
    "plot_timeline",
    "prefill_chunk",
    "show",
    "steps",
]

# The module of each public name; a test holds it against the imports above.
_MODULES = {
    "BlendConfig": "config",
    **dict.fromkeys(("plot_scores", "plot_timeline", "show"), "display"),
    **dict.fromkeys(("BlendResult", "blend"), "generate.blending"),
    "steps": "generate.steps",
    "ChunkKV": "kv.chunk",
    "prefill_chunk": "generate.precompute",
    **dict.fromkeys(("Blame", "Calibration", "Verification"), "measure.results"),
    "Verify": "measure.verify",
    "UnsupportedModel": "model.hf_model",
    **dict.fromkeys(("Blender", "patch"), "patching"),
    "filler_ids": "prompts.filler",
    "Prompt": "prompts.prompt",
    "MemoryStore": "store",
    "BlendTrace": "trace.trace",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        for public, module in _MODULES.items():  # all at once, and so what they import: `hfblend.generate.fallbacks`
            globals().setdefault(public, getattr(import_module(f".{module}", __name__), public))
        return globals()[name]
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)  # `hfblend.store.DiskStore` needs no import but `import hfblend`


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


class _Package(ModuleType):
    """Keeps `hfblend.blend` the function: importing the folder `blend` would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
