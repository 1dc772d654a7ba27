"""The values that a shell completes. Names of `hfblend.lab` are written out here: importing it takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from ..config import ChunkPrefix, Correction, Selection

METHODS = (
    "hfblend", "full_prefill", "no_context", "prefix_reuse", "full_reuse", "full_reuse_filler", "suffix_attention",
    "chunk_start", "mixed", "random", "last", "suffix_attention_filler", "kv_deviation", "suffix_attention_offset",
    "kv_deviation_offset", "cacheblend_paper", "research_repo", "lmcache_v1", "epic", "kv_deviation_leaky",
    "kv_deviation_stale", "kv_deviation_key", "kv_deviation_bos", "kv_deviation_none", "kv_deviation_in_context",
    "kv_deviation_filler", "prophetkv", "infoflow_kv", "qcfuse", "fusionrag", "relaxkv", "cachetune", "agentkvshift",
    "link0", "psr",
)  # fmt: skip
QUESTIONS = (
    "musique", "2wikimqa", "hotpotqa", "samsum", "multi_news", "needles_multikey", "needles_multivalue",
    "needles_multiquery", "variable_tracking",
)  # fmt: skip
SHAPES, PLACES = ("llama-8b", "tiny"), ("gpu", "ram", "disk", "disk_whole")
KV_DTYPES, DTYPES, DEVICES = ("int8", "fp8"), ("float32", "bfloat16", "float16"), ("cpu", "cuda", "mps")
RULES, CHUNK_PREFIXES, CORRECTIONS = get_args(Selection), get_args(ChunkPrefix), (*get_args(Correction), "none")


def values(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes a name, or the last of names that are separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in known if name.startswith(last) and name not in before.split(",")]

    return complete
