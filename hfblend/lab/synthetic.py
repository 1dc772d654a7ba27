"""Models of a known shape with random weights, prompts of random ids (time depends on neither), and unpatched twins."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..arguments import whole
from ..demo.model import device_named
from ..prompts.prompt import Prompt

_FIRST_ID = 3  # many vocabularies have special tokens below it

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {  # Llama-3.1-8B's
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}


# --- models -----------------------------------------------------------------------------------------------------------


def random_model(shape: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A Llama of that shape in eval mode, with `attn_implementation="sdpa"`.

    Args:
        shape: a name of `SHAPES`.
        device: by default the GPU if there is one, else the CPU.
        dtype: by default float32 on a CPU, bfloat16 elsewhere.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"There is no shape {shape!r}; the shapes are {', '.join(SHAPES)}.")
    device = device_named(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    config = LlamaConfig(**SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with device:  # weights and rotary tables are made where they stay
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def twin_of(model: Any) -> Any:
    """Another instance over the same weights: patching one leaves the other stock, so that both can take turns."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The tokens of each part of a prompt.

    Raises:
        ValueError: a chunk or a suffix without tokens.
    """

    prefix: int = 32
    chunk: int = 512
    suffix: int = 32

    def __post_init__(self) -> None:
        for name, least in (("prefix", 0), ("chunk", 1), ("suffix", 1)):
            whole(name, getattr(self, name), least)


@dataclass(frozen=True)
class Stream:
    """How a stream draws its chunks, how many of them a store holds, and how often full prefill is measured.

    Attributes:
        zipf: exponent; the pool's n-th chunk is drawn with a weight of 1 / n ** zipf.
        pool: chunks in the pool, for each chunk of a prompt.
        churn: share of the pool that is replaced by new chunks, per prompt; each takes the rank of the one that goes.
        store: a store's budget, as a share of the K/V of all chunks in the pool.
        full_prefill_every: prompts, of which the first is prefilled in full, too.
    """

    zipf: float = 1.0
    pool: int = 16
    churn: float = 0.0005
    store: float = 0.5
    full_prefill_every: int = 5


class PromptMaker:
    """Makes prompts of one layout; the same seed gives the same ones."""

    def __init__(self, vocabulary: int, layout: Layout | None = None, seed: int = 0) -> None:
        self._vocabulary, self._layout, self._random = vocabulary, layout or Layout(), random.Random(seed)

    def ids(self, count: int) -> list[int]:
        """Random token ids."""
        return [self._random.randrange(_FIRST_ID, self._vocabulary) for _ in range(count)]

    def prompt(self, chunk_tokens: int) -> Prompt:
        """A prompt whose chunks have that many tokens together; the last may be shorter than the others."""
        size = self._layout.chunk
        chunks = [self.ids(min(size, chunk_tokens - start)) for start in range(0, chunk_tokens, size)]
        return Prompt.from_ids(self.ids(self._layout.prefix), chunks, self.ids(self._layout.suffix))

    def batch(self, chunk_tokens: int, count: int) -> tuple[list[Prompt], list[Prompt]]:
        """Prompts that share a prefix and a pool of chunks, twice as many as a prompt holds.

        Returns:
            Two prompts that together hold the pool, and `count` prompts with chunks drawn from it in random order, each
            with a new suffix.
        """
        each, prefix = self.chunks_in(chunk_tokens), self.ids(self._layout.prefix)
        pool = self._chunks(2 * each)
        halves = [self._holding(prefix, pool[:each]), self._holding(prefix, pool[each:])]
        return halves, [self._holding(prefix, self._random.sample(pool, each)) for _ in range(count)]

    def stream(self, chunk_tokens: int, stream: Stream) -> Iterator[Prompt]:
        """Prompts without end that share a prefix; their chunks, in the order drawn, are of a pool that changes."""
        each, prefix = self.chunks_in(chunk_tokens), self.ids(self._layout.prefix)
        pool = self._chunks(each * stream.pool)
        due = 0.0
        while True:
            # the first of several exponential clocks to ring are a draw by weight, without replacement
            clocks = [self._random.expovariate(rank**-stream.zipf) for rank in range(1, len(pool) + 1)]
            drawn = nsmallest(each, range(len(pool)), key=clocks.__getitem__)
            yield self._holding(prefix, [pool[i] for i in drawn])
            due += stream.churn * len(pool)
            for _ in range(int(due)):
                pool[self._random.randrange(len(pool))] = self.ids(self._layout.chunk)
            due %= 1

    def chunks_in(self, chunk_tokens: int) -> int:
        """Chunks of a prompt whose chunks are all of the same size."""
        return max(1, chunk_tokens // self._layout.chunk)

    def _chunks(self, count: int) -> list[list[int]]:
        return [self.ids(self._layout.chunk) for _ in range(count)]

    def _holding(self, prefix: list[int], chunks: list[list[int]]) -> Prompt:
        return Prompt.from_ids(prefix, chunks, self.ids(self._layout.suffix))
