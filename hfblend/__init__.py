"""CacheBlend inside Hugging Face Transformers: reuse the KV cache of text chunks wherever they stand.

    blender = hfblend.patch(model, tokenizer=tokenizer)
    prompt = hfblend.Prompt.from_texts(tokenizer, prefix=system, chunks=documents, suffix=question)
    output = model.generate(**prompt.inputs(), max_new_tokens=64)
    blender.remove()

Importing has no effect; `patch` touches one model instance, never a class.
"""

from .config import BlendConfig
from .display import plot_scores, plot_timeline, show
from .generate.blend_one import BlendResult, blend
from .generate.precompute import prefill_chunk
from .generate.steps import steps
from .kv.chunk import ChunkKV
from .measure.calibrate import Calibration
from .measure.verify import Verification, Verify
from .model.hf_model import UnsupportedModel
from .patching import Blender, patch
from .prompts.filler import filler_ids
from .prompts.prompt import Prompt
from .store import MemoryStore
from .trace.trace import BlendTrace

__version__ = "0.1.0"

__all__ = [
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
