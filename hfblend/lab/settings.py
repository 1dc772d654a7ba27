"""The settings of benchmark and evaluation, and the cases that they ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import torch

from ..arguments import one_of, whole
from ..config import Correction
from ..store.quantise import require_kv_dtype
from .baselines import METHODS, Case, Method
from .synthetic import Layout, Stream

GPU_LENGTHS = (4096, 8192, 16384, 32768, 65536)
CPU_LENGTHS = (2000,)
PLACES = {
    "gpu": "where they were computed",
    "ram": "pinned, next to a GPU",
    "disk": "in files, read a layer at a time",
    "disk_whole": "in the same files, all layers read first",
}
DEFAULT_BASELINE = "kv_deviation"


def _require_least(values: Any, **least: int) -> None:
    for name, bound in least.items():
        whole(name, getattr(values, name), bound)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Methods, ratios and seed, validated.

    Args:
        methods: names of `hfblend.lab.baselines.METHODS`.
        ratios: recompute ratios in [0, 1].
        seed: of everything drawn.
        correction: `"offset"` or `"none"`, for the methods that take one; `None`: each as it is in `METHODS`.

    Raises:
        ValueError: a value outside its bounds.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    seed: int = 0
    correction: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"Unknown methods: {', '.join(unknown)}. The methods are {', '.join(METHODS)}.")
        outside = [ratio for ratio in self.ratios if not 0 <= ratio <= 1]
        if outside or not self.ratios:
            raise ValueError(f"Ratios are shares in [0, 1], got {outside or 'none'}.")
        if self.correction is not None:
            one_of("correction", self.correction, (*get_args(Correction), "none"))
            if not any(METHODS[name].takes_correction for name in self.methods):
                able = ", ".join(method.name for method in METHODS.values() if method.takes_correction)
                raise ValueError(f"None of {', '.join(self.methods)} takes a correction. Those that do: {able}.")

    def cases(self) -> list[Case]:
        """A case per method and ratio, each once; a method that knows only one ratio has one."""
        return [
            Case(method, ratio)
            for method in map(self._method, dict.fromkeys(self.methods))
            for ratio in (dict.fromkeys(self.ratios) if method.fixed_ratio is None else (method.fixed_ratio,))
        ]

    def _method(self, name: str) -> Method:
        if self.correction is None:
            return METHODS[name]
        return METHODS[name].corrected(None if self.correction == "none" else self.correction)


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Settings of a benchmark. Full prefill is always measured; a ratio of 0 is full reuse.

    Args:
        lengths: tokens of all chunks together, per prompt; `()`: `GPU_LENGTHS`, or `CPU_LENGTHS` without a GPU.
        repeats: turns that count.
        chunks_in: names of `PLACES`: every method that reuses chunks is measured with its chunk KV in each; `()`:
            `"gpu"` if there is one, else `"ram"`.
        attention: by Transformers' name, of one more full prefill; `None`: only the model's own.
        decoded_tokens: per answer, 2 or more, to measure whole answers and the speed of decoding; 0 measures none.
        decode_at, batch_at: the lengths at which answers and batches are measured; `()`: all.
        static_cache: whether stock answers with a static cache, which Transformers compiles on a GPU, are measured too.
        throughput_prompts: of a stream whose documents come and go, at a store smaller than all; 0 measures none.
        stream: how it draws them.
        batch_prompts: of one batch, compared with the same prompts one by one; 0 measures none.
    """

    methods: tuple[str, ...] = ("prefix_reuse", "suffix_attention", "kv_deviation")
    ratios: tuple[float, ...] = (0.0, 0.05, 0.15, 0.30)
    lengths: tuple[int, ...] = ()
    repeats: int = 7
    layout: Layout = field(default_factory=Layout)
    chunks_in: tuple[str, ...] = ()
    attention: str | None = None
    decoded_tokens: int = 64
    decode_at: tuple[int, ...] = ()
    static_cache: bool = False
    throughput_prompts: int = 0
    stream: Stream = field(default_factory=Stream)
    batch_prompts: int = 0
    batch_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(METHODS[name].no_context for name in self.methods):
            raise ValueError("no_context leaves the chunks out, so there is no time to compare; hfblend eval takes it.")
        _require_least(self, repeats=1, decoded_tokens=0, throughput_prompts=0, batch_prompts=0)
        if self.decoded_tokens == 1:
            raise ValueError("decoded_tokens must be 0, or 2 or more, got 1: there is no time between tokens of one.")
        if nowhere := [place for place in self.chunks_in if place not in PLACES]:
            raise ValueError(f"Chunks are in some of {', '.join(PLACES)}, got {', '.join(nowhere)}.")
        for length in self.lengths:
            whole("A length", length, 1)

    def on(self, device: torch.device) -> BenchSettings:
        """These settings with lengths and places filled in for a device.

        Raises:
            ValueError: chunks on a GPU that the model is not on; answers or batches at a length that is not measured.
        """
        on_gpu = device.type == "cuda"
        if "gpu" in self.chunks_in and not on_gpu:
            raise ValueError(f'Chunks in "gpu" need a model on a GPU, this one is on "{device}".')
        lengths = self.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS)
        if more := [length for length in (*self.decode_at, *self.batch_at) if length not in lengths]:
            raise ValueError(f"Answers and batches are measured at some of the lengths {lengths}, got {more}.")
        return replace(self, lengths=lengths, chunks_in=self.chunks_in or ("gpu" if on_gpu else "ram",))

    def cases(self) -> list[Case]:
        """Full prefill, the methods with one ratio only, then the others by ratio; in every place if they reuse."""
        names = ("full_prefill", *self.methods, *(("full_reuse",) if 0 in self.ratios else ()))
        cases = Settings(methods=names, ratios=self.ratios, correction=self.correction).cases()
        wanted = [case for case in cases if case.ratio > 0 or not case.method.takes_ratio]
        wanted.sort(key=lambda case: case.method.takes_ratio)
        stock, *others = (one for case in wanted for one in self._in_places(case))
        more = [] if self.attention is None else [replace(stock, attention=self.attention)]
        return [stock, *more, *others]

    def _in_places(self, case: Case) -> list[Case]:
        if case.ratio == case.method.fixed_ratio == 1:
            return [case]
        places = dict.fromkeys(self.chunks_in or ("gpu",))
        return [replace(case, chunks_in=place) for place in places if case.through_generate or place != "disk_whole"]


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Settings):
    """Settings of an evaluation.

    Args:
        seed: of methods that draw, and of the bootstrap.
        max_context: tokens of the longest prompt.
        answer_tokens: of the greedy answers; 0 measures none.
        forced_tokens: P, of full prefill's own answer.
        kv_dtype: `"int8"` or `"fp8"`: chunk KV is read as a store gives it back that keeps it in this type.
        baseline: the method that KL is divided by; `None`: `DEFAULT_BASELINE` if it is measured, else none.
    """

    methods: tuple[str, ...] = ("full_prefill", "full_reuse", "kv_deviation", "hfblend")
    ratios: tuple[float, ...] = (0.05, 0.15, 0.3)
    max_context: int = 6500
    answer_tokens: int = 32
    forced_tokens: int = 16
    kv_dtype: str | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_least(self, max_context=1, answer_tokens=0, forced_tokens=1)
        require_kv_dtype(self.kv_dtype)
        if not self.methods:
            raise ValueError("Name at least one method, got none.")
        if self.baseline is None and DEFAULT_BASELINE in self.methods:
            object.__setattr__(self, "baseline", DEFAULT_BASELINE)
        if self.baseline not in (None, *self.methods):
            names = ", ".join(self.methods)
            raise ValueError(f"The baseline {self.baseline!r} is not among the methods to evaluate: {names}.")

    def of_a_record(self) -> dict[str, Any]:
        """The settings that a single measurement depends on."""
        return {name: v for name, v in asdict(self).items() if name not in ("methods", "ratios", "baseline")}
