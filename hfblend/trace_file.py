"""A trace in a file: safetensors, everything that is no tensor as JSON in its header. No code is in it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .controller import Decision
from .timeline import Interval, Lane, SavedTimeline
from .trace import TENSORS, BlendTrace, ChunkTrace, LayerMaps, Status, as_level

FORMAT = "hfblend.trace.1"
_NUMBER, _NOTHING = (int, float), type(None)
_PLAIN: dict[str, Any] = {
    "blended": bool, "fallback": (str, _NOTHING), "fallback_reason": str, "num_tokens": int, "num_layers": int,
    "computed_pairs": int, "isolated_pairs": int, "bytes_reused": int, "ttft_ms": (*_NUMBER, _NOTHING),
    "verification": (dict, _NOTHING), "notes": list, "level": str, "settings": dict,
}  # fmt: skip
_CHUNK: dict[str, Any] = {
    "key": str, "status": str, "exact": bool, "cached_start": (int, _NOTHING), "quantised": (str, _NOTHING),
}  # fmt: skip
_INTERVAL: dict[str, Any] = {
    "lane": str, "name": str, "start_ms": _NUMBER, "stop_ms": _NUMBER, "layer": (int, _NOTHING)
}  # fmt: skip


def save_trace(trace: BlendTrace, path: str | os.PathLike[str]) -> None:
    """Writes a trace."""
    tensors = {name: value for name in TENSORS if (value := getattr(trace, name)) is not None}
    if trace.maps is not None:
        tensors |= {f"maps.{name}": values for name, values in trace.maps.items().items()}
    described = {name: getattr(trace, name) for name in _PLAIN} | {
        "prefix": trace.prefix and asdict(trace.prefix),
        "chunks": [asdict(chunk) for chunk in trace.chunks],
        "decision": None if trace.decision is None else asdict(trace.decision),
        "timeline": [asdict(interval) for interval in trace.timeline],
        "texts": trace.token_texts(),
    }
    on_cpu = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(on_cpu, path, {"format": FORMAT, "trace": json.dumps(described)})


def load_trace(path: str | os.PathLike[str]) -> BlendTrace:
    """Reads a trace.

    Raises:
        ValueError: a file that is no trace, or a damaged one.
        OSError: no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if described.get("format") != FORMAT:
            raise ValueError(f"it says it is {described.get('format', 'of no format')!r}, not {FORMAT!r}")
        trace = _trace_of(json.loads(described["trace"]), tensors)
        _check(trace)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)} is no trace of hfblend, or a damaged one: {error}.") from error
    return trace


def _trace_of(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> BlendTrace:
    maps = {name.removeprefix("maps."): tensors.pop(name) for name in list(tensors) if name.startswith("maps.")}
    timeline = tuple(Interval(**_typed(interval, _INTERVAL)) for interval in described["timeline"])
    described.setdefault("fallback_reason", "")  # files of earlier versions have none
    _typed(described, _PLAIN)
    fields: dict[str, Any] = {name: described[name] for name in _PLAIN} | {name: tensors.get(name) for name in TENSORS}
    return BlendTrace(
        **fields,
        prefix=None if described["prefix"] is None else _chunk(described["prefix"]),
        chunks=[_chunk(chunk) for chunk in described["chunks"]],
        decision=None if described["decision"] is None else Decision(**described["decision"]),
        clock=SavedTimeline(timeline),
        maps=LayerMaps(**maps) if maps else None,
        texts=described["texts"],
    )


def _chunk(described: dict[str, Any]) -> ChunkTrace:
    start, stop = described["span"]
    return ChunkTrace(**{**_typed(described, _CHUNK), "span": (int(start), int(stop))})


def _typed(values: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """The values, if each is of its type."""
    for name, kind in types.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")
    return values


def _check(trace: BlendTrace) -> None:
    """Whatever shows a trace may trust its shapes."""
    as_level(trace.level)
    length, layers = trace.num_tokens, trace.num_layers
    if not all(isinstance(text, str) for text in [*trace.notes, *(trace.texts or ())]):
        raise TypeError("a note or a token that is no text")
    ratios = trace.settings.get("recompute_ratios", [])
    if not isinstance(ratios, list) or not all(isinstance(ratio, _NUMBER) for ratio in ratios):
        raise TypeError(f"recompute_ratios are {ratios!r}")
    for piece in [trace.prefix, *trace.chunks] if trace.prefix else trace.chunks:
        if not 0 <= piece.span[0] < piece.span[1] <= length or piece.status not in get_args(Status):
            raise ValueError(f"a chunk {piece.span}, {piece.status!r}, in {length} tokens")
    for name in ("candidate_idx", "selected_idx", "fresh_idx"):
        idx = getattr(trace, name)
        if idx is not None and idx.numel() and not 0 <= int(idx.min()) <= int(idx.max()) < length:
            raise ValueError(f"{name} beyond its {length} tokens")
    if trace.scores is not None and (trace.candidate_idx is None or trace.scores.shape != trace.candidate_idx.shape):
        raise ValueError("scores without their candidates")
    for name, values in (("input_ids", trace.input_ids), ("texts", trace.texts)):
        if values is not None and len(values) != length:
            raise ValueError(f"{len(values)} {name} of {length} tokens")
    for name, values in {} if trace.maps is None else trace.maps.items().items():
        if tuple(values.shape) != (layers, length):
            raise ValueError(f"a map {name} of {tuple(values.shape)}")
    if any(interval.lane not in get_args(Lane) for interval in trace.timeline):
        raise ValueError("an unknown lane of its timeline")
