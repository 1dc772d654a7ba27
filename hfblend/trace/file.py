"""Traces in safetensors files: all but the tensors is JSON in the header. A file holds no code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .decision import Decision
from .facts import TENSORS, ChunkTrace, Facts, LayerMaps, Level, Status
from .timeline import Interval, Lane, SavedTimeline

FORMAT = "hfblend.trace.1"
_MOST_TOKENS, _MOST_LAYERS, _LARGEST = 2**24, 2**16, 1e15  # a page of a trace grows with its tokens
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

Check = Callable[[Any], bool]


def _is(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


_is_text, _is_flag = _is(str), _is(bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # false for NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_plain(value: Any, depth: int = 2) -> bool:
    """Whether a value is text, a number, or a list or object of them."""
    if isinstance(value, (list, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(one, depth - 1) for one in inner)
    return value is None or isinstance(value, (str, bool, float)) or _is_number(value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _all(check: Check) -> Check:
    return lambda values: isinstance(values, list) and all(map(check, values))


def _holds(checks: dict[str, Check]) -> Check:
    """Returns a check of an object: each value by its own check, or else for being plain."""
    return lambda found: isinstance(found, dict) and all(checks.get(k, _is_plain)(v) for k, v in found.items())


_SETTINGS: dict[str, Check] = {
    "selection": _is_text, "recompute_ratios": _all(_is_number), "check_layers": _all(_is_number),
    "chunk_prefix": _is_text,
}  # fmt: skip
_PLAIN: dict[str, Check] = {
    "blended": _is_flag, "fallback": _or_none(_is_text), "fallback_reason": _is_text,
    "num_tokens": lambda v: _is_count(v) and v <= _MOST_TOKENS,
    "num_layers": lambda v: _is_count(v) and v <= _MOST_LAYERS, "computed_pairs": _is_count,
    "isolated_pairs": _is_count, "bytes_reused": _is_count, "ttft_ms": _or_none(_is_number),
    "verification": _or_none(lambda v: isinstance(v, dict) and _is_plain(v)), "notes": _all(_is_text),
    "level": lambda v: v in get_args(Level), "settings": _holds(_SETTINGS),
}  # fmt: skip
_CHUNK: dict[str, Check] = {
    "key": _is_text, "status": lambda v: v in get_args(Status), "exact": _is_flag, "cached_start": _or_none(_is_count),
    "quantised": _or_none(_is_text),
}  # fmt: skip
_INTERVAL: dict[str, Check] = {
    "lane": lambda v: v in get_args(Lane), "name": _is_text, "start_ms": _is_number, "stop_ms": _is_number,
    "layer": _or_none(_is_count),
}  # fmt: skip
_DECISION: dict[str, Check] = {
    "ratio": _or_none(_is_number), "reason": _is_text, "full_ms": _is_number, "compute_ms": _is_number,
    "load_ms": _or_none(_is_number), "ttft_ms": _or_none(_is_number),
}  # fmt: skip


def save_trace(trace: Facts, path: str | os.PathLike[str], texts: list[str] | None) -> None:
    """Writes a trace, with its tokens' texts.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: getattr(trace, name) for name in TENSORS}
    if trace.maps is not None:
        tensors |= {f"maps.{name}": values for name, values in trace.maps.items().items()}
    described = {name: getattr(trace, name) for name in _PLAIN} | {
        "prefix": trace.prefix and asdict(trace.prefix),
        "chunks": [asdict(chunk) for chunk in trace.chunks],
        "decision": trace.decision and asdict(trace.decision),
        "timeline": [asdict(interval) for interval in trace.clock.intervals()] if trace.clock else [],
        "texts": texts,
    }
    on_cpu = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
    try:
        save_file(on_cpu, path, {"format": FORMAT, "trace": json.dumps(described)})
    except SafetensorError as error:  # also for a missing folder and a full disk
        raise OSError(f"The trace cannot be written to {os.fspath(path)}: {error}") from error


def load_trace(path: str | os.PathLike[str]) -> Facts:
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
        trace = _facts_of(json.loads(described["trace"]), tensors)
        _check(trace)
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise any
        reason = f"{error or type(error).__name__}"[:300]
        raise ValueError(f"{os.fspath(path)} is no trace of hfblend, or a damaged one: {reason}.") from error
    return trace


def _facts_of(described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Facts:
    maps = {name.removeprefix("maps."): tensors.pop(name) for name in list(tensors) if name.startswith("maps.")}
    described.setdefault("fallback_reason", "")  # files of earlier versions have none
    _require(described, _PLAIN)
    fields: dict[str, Any] = {name: described[name] for name in _PLAIN} | {name: tensors.get(name) for name in TENSORS}
    prefix, decision = described["prefix"], described["decision"]
    return Facts(
        **fields,
        prefix=None if prefix is None else _chunk(prefix),
        chunks=[_chunk(chunk) for chunk in described["chunks"]],
        decision=None if decision is None else Decision(**_require(decision, _DECISION)),
        clock=SavedTimeline(tuple(Interval(**_require(interval, _INTERVAL)) for interval in described["timeline"])),
        maps=LayerMaps(**maps) if maps else None,
        texts=described["texts"],
    )


def _chunk(described: dict[str, Any]) -> ChunkTrace:
    start, stop = described["span"]
    return ChunkTrace(**{**_require(described, _CHUNK), "span": (start, stop)})


def _require(values: dict[str, Any], checks: dict[str, Check]) -> dict[str, Any]:
    """Returns the values, each name's passed by its check.

    Raises:
        TypeError: a value fails its check.
    """
    for name, check in checks.items():
        if not check(values[name]):
            raise TypeError(f"{name} is {type(values[name]).__name__} {str(values[name])[:60]!r}")
    return values


def _check(trace: Facts) -> None:
    """Checks the shapes, so that the display may trust them."""
    length, layers, at = trace.num_tokens, trace.num_layers, 0
    for piece in [trace.prefix, *trace.chunks] if trace.prefix else trace.chunks:
        start, stop = piece.span
        if not (_is_count(start) and _is_count(stop) and at <= start < stop <= length):
            raise ValueError(f"a chunk {piece.span} in {length} tokens, after one up to {at}")
        at = stop
    for name in ("candidate_idx", "selected_idx", "fresh_idx", "input_ids"):
        idx = getattr(trace, name)
        _check_tensor(name, idx, None, _INTEGERS)
        if name != "input_ids" and idx is not None and idx.numel() and not 0 <= idx.min() <= idx.max() < length:
            raise ValueError(f"{name} beyond its {length} tokens")
    if trace.scores is not None:
        if trace.candidate_idx is None:
            raise ValueError("scores without their candidates")
        _check_tensor("scores", trace.scores, trace.candidate_idx.shape, _FLOATS)
    if trace.texts is not None and not _all(_is_text)(trace.texts):
        raise TypeError("a token that is no text")
    for name, values in (("input_ids", trace.input_ids), ("texts", trace.texts)):
        if values is not None and len(values) != length:
            raise ValueError(f"{len(values)} {name} of {length} tokens")
    for name, values in {} if trace.maps is None else trace.maps.items().items():
        _check_tensor(f"a map {name}", values, (layers, length), _FLOATS)


def _check_tensor(
    name: str, values: torch.Tensor | None, shape: Sequence[int] | None, dtypes: set[torch.dtype]
) -> None:
    """Raises `ValueError` where a tensor has another shape (`None`: one dimension) or dtype, or a map is empty."""
    if values is None:
        return
    if shape is None:
        fits = values.dim() == 1
    else:
        fits = tuple(values.shape) == tuple(shape) and (values.dim() == 1 or all(shape))
    if values.dtype not in dtypes or not fits:
        raise ValueError(f"{name} {values.dtype} of {tuple(values.shape)}")
