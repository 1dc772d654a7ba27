"""Finds how each layer's cached state turns with position, by two stock forwards over the same ids at positions p and
p + Δ.

Shapes: B batch, Hkv KV heads, N tokens, D head_dim, R rotated pairs (2R ≤ D).
"""

from __future__ import annotations

from typing import Literal

import torch

from ..blend.rotation import KeyRotation, Layout, Pairing, Tables, pair_tables, pairs_of, rotate, rotation_between
from ..kv.rows import KV, RowLayout
from ..model.hf_model import HFModel, UnsupportedModel
from ..model.layerwise import LENGTH, Steps, Stock, apart, run_steps
from ..model.rotary_tables import RotarySource

# (pairing of dimensions, layout of the module's tables), most common first
_FORMS: tuple[tuple[Pairing, Layout], ...] = (
    ("half", "duplicated"),
    ("interleaved", "repeated"),
    ("interleaved", "duplicated"),
    ("half", "single"),
    ("interleaved", "single"),
)
_SIGNS: tuple[Literal[1, -1], ...] = (1, -1)


def find_rotations(
    hf_model: HFModel, stock: Stock
) -> tuple[list[KeyRotation | None], dict[int, RowLayout], torch.dtype]:
    """Finds, per layer, the one rotation that maps cached state at p to cached state at p + Δ; shapes and dtype.

    The same ids run through a second forward at shifted positions, each layer from the same input. In a model whose
    attention sees only relative positions, everything cached is equal but for one rotated slot, and so is what comes
    out of each layer. Learned positions change the values already in layer 0, and so fail by behaviour.

    Raises:
        UnsupportedModel: naming the layer and what did not fit.
    """
    if sorted(stock.kv) != list(range(len(stock.kv))):
        raise UnsupportedModel(f"Only layers {sorted(stock.kv)} keep K/V; expected the first ones, without a gap.")
    first, shifted = hf_model.self_test_positions(LENGTH)
    moved = run_steps(hf_model, lambda: hf_model.run_stock(shifted), [None, *stock.hidden[1:]])
    old, new = ((positions, hf_model.regime(int(positions[-1]) + 1)) for positions in (first, shifted))
    tables = [
        (hf_model.rotary_tables(i, *old), hf_model.rotary_tables(i, *new)) for i in range(len(hf_model.rotary_sources))
    ]
    rotations = [
        _find_rotation(i, stock.kv[i], moved.kv[i], hf_model.rotary_sources, tables, stock.kv_tolerance)
        for i in sorted(stock.kv)
    ]
    _require_relative(stock, moved)
    return rotations, {i: RowLayout.of(kv) for i, kv in stock.kv.items()}, _one_dtype(stock.kv)


def _require_relative(stock: Stock, moved: Steps) -> None:
    """Requires that the output of a layer does not depend on the position of the text.

    Raises:
        UnsupportedModel: naming the first layer where it does.
    """
    for step, pair in enumerate(zip(moved.hidden, stock.hidden, strict=True)):
        if (error := apart(*pair)) > stock.tolerance(step):
            raise UnsupportedModel(
                f"Layer {step - 1}: what comes out of it changes by {error:.2g} when a text moves to other positions, "
                f"where rounding changes it by {stock.tolerance(step):.2g} at most (positions count otherwise than as "
                "a rotation of keys), so cached KV of this model cannot be moved."
            )


def _one_dtype(kv: dict[int, KV]) -> torch.dtype:
    dtypes = {states.dtype for of_layer in kv.values() for states in of_layer}
    if len(dtypes) > 1:
        raise UnsupportedModel(
            f"Cached keys and values are of several dtypes, {sorted(map(str, dtypes))}; expected one."
        )
    return dtypes.pop()


def _find_rotation(
    layer_idx: int,
    kv: KV,
    kv_shifted: KV,
    sources: list[RotarySource],
    tables: list[tuple[Tables, Tables]],
    tolerance: float,
) -> KeyRotation | None:
    equal = [_misfit(a, b) <= tolerance for a, b in zip(kv, kv_shifted)]
    if all(equal):
        return None
    if not any(equal):
        raise UnsupportedModel(
            f"Layer {layer_idx}: keys and values both change when a text moves to other positions (learned positions, "
            "or state that depends on them), so cached KV of this model cannot be moved."
        )
    slot = equal.index(False)
    for source in range(len(sources)):
        for pairing, layout in _FORMS:
            old, new = (pair_tables(_on(kv[slot].device, t), layout) for t in tables[source])
            if 2 * old[0].shape[-1] > kv[slot].shape[-1]:
                continue
            cos, sin = rotation_between(old, new)
            for sign in _SIGNS:
                turned = rotate(kv[slot], cos, sign * sin, pairing)
                if _misfit(turned, kv_shifted[slot], cos.shape[-1], pairing) <= tolerance:
                    return KeyRotation(slot, pairing, layout, source, sign)
    raise UnsupportedModel(
        f"Layer {layer_idx}: cached {'keys' if slot == 0 else 'values'} change with position, but no rotation from the "
        f"model's {len(sources)} rotary table(s) maps them from one position to another (a norm with weights after the "
        "rotation does this), so cached KV of this model cannot be moved."
    )


def _on(device: torch.device, tables: Tables) -> Tables:
    cos, sin = tables
    return cos.to(device), sin.to(device)


def _misfit(found: torch.Tensor, truth: torch.Tensor, num_pairs: int = 0, pairing: Pairing = "half") -> float:
    """Largest relative difference of a dimension, or of two that turn with each other.

    One norm over all would not see a pair that turns where biases make other dimensions a hundred times larger.
    """
    parts = []
    for states in (found.cpu().double() - truth.cpu().double(), truth.cpu().double()):
        squares = states.square().sum((0, 1, 2))  # (D,)
        turning = sum(pairs_of(squares[: 2 * num_pairs], pairing))
        parts.append(torch.cat([torch.as_tensor(turning), squares[2 * num_pairs :]]))
    errors, sizes = parts
    return float((errors / sizes.clamp_min(1e-30)).max().sqrt())
