"""What a benchmark is asked to measure, validated once, and the lines of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...blend.algorithm import Blend
from ..baselines import METHODS, Method
from .prompts import Layout

GPU_LENGTHS = (4096, 8192, 16384, 32768, 65536)
CPU_LENGTHS = (2000,)
PLACES = {
    "gpu": "where they were computed",
    "ram": "pinned beside a GPU",
    "disk": "in files, read a layer at a time",
    "disk_whole": "in the same files, all layers read first",
}


@dataclass(frozen=True)
class Case:
    """A line of the table: a method at a ratio, with its chunk KV somewhere.

    Attributes:
        chunks_in: a place from `PLACES`; `None`: nothing of chunks is reused.
    """

    method: Method
    ratio: float
    chunks_in: str | None

    @property
    def through_generate(self) -> bool:
        """Whether `generate` of a patched model does it; what no setting expresses goes through `hfblend.blend`."""
        return self.method.algorithm is Blend and not self.method.in_context


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Args:
        lengths: tokens of all chunks together, per prompt; `()`: `GPU_LENGTHS`, or `CPU_LENGTHS` without a GPU.
        ratios: recompute ratios in [0, 1]; 0 is full reuse.
        methods: names from `hfblend.lab.baselines.METHODS`; full prefill is always measured.
        repeats: turns that count.
        chunks_in: where chunk KV is kept, names from `PLACES`: every method that reuses chunks is measured with each;
            `()`: `"gpu"` if there is one, else `"ram"`.
        decoded_tokens: per answer, whose speed is measured; 0: decoding is not measured.
        throughput_prompts: of a stream of prompts that share chunks; 0: not measured.
        batch_prompts: of one batch, which is compared with the same prompts one by one; 0: not measured.
        seed: of the ids.

    Raises:
        ValueError: for any value outside these bounds.
    """

    lengths: tuple[int, ...] = ()
    ratios: tuple[float, ...] = (0.0, 0.05, 0.15, 0.30)
    methods: tuple[str, ...] = ("prefix_reuse", "suffix_attention", "kv_deviation")
    repeats: int = 7
    layout: Layout = field(default_factory=Layout)
    chunks_in: tuple[str, ...] = ()
    decoded_tokens: int = 64
    throughput_prompts: int = 0
    batch_prompts: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"Unknown methods: {', '.join(unknown)}. The methods are {', '.join(METHODS)}.")
        outside = [ratio for ratio in self.ratios if not 0 <= ratio <= 1]
        if outside or not self.ratios:
            raise ValueError(f"Ratios are shares in [0, 1], got {outside or 'none'}.")
        nowhere = [place for place in self.chunks_in if place not in PLACES]
        if nowhere:
            raise ValueError(f"Chunks are in some of {', '.join(PLACES)}, got {', '.join(nowhere)}.")
        least: dict[str, tuple[Any, int]] = {
            "A length": (min(self.lengths, default=1), 1),
            "repeats": (self.repeats, 1),
            "The prefix": (self.layout.prefix, 0),
            "A chunk": (self.layout.chunk, 1),
            "The suffix": (self.layout.suffix, 1),
            "decoded_tokens": (self.decoded_tokens, 0),
            "throughput_prompts": (self.throughput_prompts, 0),
            "batch_prompts": (self.batch_prompts, 0),
        }
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{name} must be {bound} or more, got {value}.")

    def on(self, device: torch.device) -> Settings:
        """These settings with what depends on the device filled in.

        Raises:
            ValueError: chunks on a GPU that the model is not on.
        """
        on_gpu = device.type == "cuda"
        if "gpu" in self.chunks_in and not on_gpu:
            raise ValueError(f'Chunks in "gpu" need a model on a GPU, this one is on "{device}".')
        lengths = self.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS)
        return replace(self, lengths=lengths, chunks_in=self.chunks_in or ("gpu" if on_gpu else "ram",))

    def cases(self) -> list[Case]:
        """The lines of the table: full prefill first, then what knows one ratio only, then the others by ratio."""
        names = ["full_prefill", *self.methods, *(["full_reuse"] if 0 in self.ratios else [])]
        methods = [METHODS[name] for name in dict.fromkeys(names)]
        pairs = [(method, method.fixed_ratio) for method in methods if method.fixed_ratio is not None]
        pairs += [(method, r) for method in methods if method.takes_ratio for r in dict.fromkeys(self.ratios) if r > 0]
        return [case for method, ratio in pairs for case in self._in_places(method, ratio)]

    def _in_places(self, method: Method, ratio: float) -> Sequence[Case]:
        cases = [Case(method, ratio, place) for place in dict.fromkeys(self.chunks_in or ("gpu",))]
        if ratio == method.fixed_ratio == 1:
            return [Case(method, ratio, None)]
        return [case for case in cases if case.through_generate or case.chunks_in != "disk_whole"]
