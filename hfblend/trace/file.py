"""Traces in safetensors files: all but the tensors is JSON in the header. A file holds no code."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..arguments import fields_of, from_json
from .facts import TENSORS, Facts, LayerMaps
from .timeline import Interval

FORMAT = "hfblend.trace.1"
_MOST_TOKENS, _MOST_LAYERS = 2**24, 2**16  # a page of a trace grows with its tokens
_INTEGERS = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_IN_JSON = [field.name for field in fields(Facts) if field.name not in {*TENSORS, "maps", "intervals", "tokenizer"}]
_SETTINGS = {
    "selection": str, "recompute_ratios": list[float], "check_layers": list[float], "chunk_prefix": str,
    "correction": str | None,
}  # fmt: skip


def save_trace(trace: Facts, path: str | os.PathLike[str], texts: list[str] | None) -> None:
    """Writes a trace, with its tokens' texts."""
    tensors = {name: getattr(trace, name) for name in TENSORS}
    if trace.maps is not None:
        tensors |= {f"maps.{name}": values for name, values in trace.maps.items().items()}
    described = {name: getattr(trace, name) for name in _IN_JSON} | {"texts": texts}
    described["timeline"] = trace.intervals()
    on_cpu = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if t is not None}
    try:
        save_file(on_cpu, path, {"format": FORMAT, "trace": json.dumps(described, default=asdict)})
    except SafetensorError as error:  # also for a missing folder and a full disk
        raise OSError(f"The trace cannot be written to {os.fspath(path)}: {error}") from error


def load_trace(path: str | os.PathLike[str]) -> Facts:
    """Reads a trace; raises `ValueError` for any other file."""
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
    kinds = fields_of(Facts)
    facts = Facts(**{name: from_json(kinds[name], described[name], name) for name in _IN_JSON})
    facts.intervals = from_json(list[Interval], described["timeline"], "timeline").copy
    facts.maps = LayerMaps(**maps) if maps else None
    vars(facts).update({name: tensors.get(name) for name in TENSORS})
    return facts


def _check(trace: Facts) -> None:
    """Checks sizes and shapes, so that the display may trust them."""
    length, layers, at = trace.num_tokens, trace.num_layers, 0
    if length > _MOST_TOKENS or layers > _MOST_LAYERS:
        raise ValueError(f"{length} tokens, {layers} layers")
    for name in _SETTINGS.keys() & trace.settings.keys():
        from_json(_SETTINGS[name], trace.settings[name], name)
    for piece in trace.pieces:
        start, stop = piece.span
        if not at <= start < stop <= length:
            raise ValueError(f"a chunk {piece.span} in {length} tokens, after one up to {at}")
        at = stop
    for name in ("candidate_idx", "selected_idx", "fresh_idx", "input_ids"):
        if (idx := getattr(trace, name)) is not None:
            _check_tensor(name, idx, [idx.numel()], _INTEGERS)
            if name != "input_ids" and idx.numel() and not 0 <= idx.min() <= idx.max() < length:
                raise ValueError(f"{name} beyond its {length} tokens")
    if trace.scores is not None:
        if trace.candidate_idx is None:
            raise ValueError("scores without their candidates")
        _check_tensor("scores", trace.scores, trace.candidate_idx.shape, _FLOATS)
    if trace.offsets is not None:
        _check_tensor("offsets", trace.offsets, [layers, 2, len(trace.pieces)], _FLOATS)
    for name, values in (("input_ids", trace.input_ids), ("texts", trace.texts)):
        if values is not None and len(values) != length:
            raise ValueError(f"{len(values)} {name} of {length} tokens")
    for name, values in {} if trace.maps is None else trace.maps.items().items():
        _check_tensor(f"a map {name}", values, [max(1, layers), max(1, length)], _FLOATS)


def _check_tensor(name: str, values: torch.Tensor, shape: Sequence[int], dtypes: set[torch.dtype]) -> None:
    if values.dtype not in dtypes or list(values.shape) != list(shape):
        raise ValueError(f"{name} {values.dtype} of {tuple(values.shape)}, where {list(shape)} is expected")
