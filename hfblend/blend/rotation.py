"""Moving cached keys to new positions: K_new = R(new) · R(old)⁻¹ · K_old, one rotation in fp32.

The tables come from the model's own rotary module, so linear, dynamic, yarn, longrope, llama3 or partial RoPE need no
code of their own. How a layer's cached state depends on position is not looked up by name but found by a numeric
self-test (`find_rotations`): stock forwards over the same ids at positions p and p + Δ.

Shapes: B batch, Hkv KV heads, N tokens, D head_dim, R rotated pairs (2R ≤ D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..model.hf_model import Host, RotarySource, UnsupportedModel
from ..support.layerwise import LENGTH, Steps, Stock, apart, run_steps
from .caches import KV, RowLayout

Pairing = Literal["half", "interleaved"]
Layout = Literal["duplicated", "repeated", "single"]
Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (N, R), fp32

# (pairing of dimensions, layout of the module's tables), most common first
_FORMS: tuple[tuple[Pairing, Layout], ...] = (
    ("half", "duplicated"),
    ("interleaved", "repeated"),
    ("interleaved", "duplicated"),
    ("half", "single"),
    ("interleaved", "single"),
)
_SIGNS: tuple[Literal[1, -1], ...] = (1, -1)


@dataclass(frozen=True)
class KeyRotation:
    """How one layer's cached state depends on position.

    Args:
        slot: 0 if the cached keys are rotated, 1 if the values slot holds the rotated part (latent attention).
        pairing: dimension i turns with i + R (`"half"`) or 2i with 2i + 1 (`"interleaved"`).
        layout: how R angles fill a table: `"duplicated"` [a b a b], `"repeated"` [a a b b], `"single"` [a b].
        source: index into `Host.rotary_sources`.
        sign: −1 where the model turns the other way than x·cos − y·sin.
    """

    slot: int
    pairing: Pairing
    layout: Layout
    source: int
    sign: Literal[1, -1] = 1


def pair_tables(tables: Tables, layout: Layout) -> Tables:
    """A rotary module's tables (N, R or 2R) as one cos and sin per rotated pair, (N, R)."""
    if layout == "single":
        return tables
    width = tables[0].shape[-1]
    take = slice(0, width // 2) if layout == "duplicated" else slice(0, width, 2)
    return tables[0][..., take], tables[1][..., take]


def rotation_between(old: Tables, new: Tables) -> Tables:
    """cos and sin of R(new) · R(old)⁻¹, each (N, R).

    A table may carry an attention scaling s (yarn, longrope). Dividing by |old|² = s² keeps it on the key exactly once.
    """
    (cos_old, sin_old), (cos_new, sin_new) = old, new
    square = (cos_old * cos_old + sin_old * sin_old).clamp_min(1e-20)
    return (cos_new * cos_old + sin_new * sin_old) / square, (sin_new * cos_old - cos_new * sin_old) / square


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: Pairing, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Turns the first 2R dimensions of `states` (B, Hkv, N, D) by tables (N, R), in fp32, rounded once at the end.

    Args:
        out: where to write it; default, a new tensor.
    """
    out = torch.empty_like(states) if out is None else out
    turned_dims = 2 * cos.shape[-1]
    (x, y), (to_x, to_y) = (_pairs(t[..., :turned_dims], pairing) for t in (states, out))
    x, y = x.float(), y.float()
    to_x.copy_(x * cos - y * sin)
    to_y.copy_(x * sin + y * cos)
    out[..., turned_dims:] = states[..., turned_dims:]
    return out


def _pairs(states: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two dimensions that turn with each other, each (…, R)."""
    if pairing == "interleaved":
        return states[..., 0::2], states[..., 1::2]
    first, second = states.chunk(2, -1)
    return first, second


class Realigner:
    """Moves cached K/V of any layer from cached to new positions; tables are made once per layer kind.

    Args:
        host: the model.
        rotations: per layer, from `find_rotations`; `None` where nothing depends on position.
        moves: per moved piece, its cached positions (n,), its new positions (n,) and the regime it was cached in
            (`Host.regime`). Together the pieces have N tokens.
        regime: of the prompt.
    """

    def __init__(
        self,
        host: Host,
        rotations: list[KeyRotation | None],
        moves: list[tuple[torch.Tensor, torch.Tensor, int]],
        regime: int,
    ) -> None:
        self.rotations = rotations
        self._tables: dict[tuple[int, Layout], Tables] = {}
        for kind in {(r.source, r.layout) for r in rotations if r is not None and moves}:
            source, layout = kind
            old = [(cached, then) for cached, _, then in moves]
            new = [(positions, regime) for _, positions, _ in moves]
            both = pair_tables(host.rotary_tables_of_pieces(source, old + new), layout)
            (cos_old, cos_new), (sin_old, sin_new) = (table.chunk(2) for table in both)
            self._tables[kind] = rotation_between((cos_old, sin_old), (cos_new, sin_new))

    def __call__(self, layer_idx: int, kv: KV) -> KV:
        """The layer's K/V (B, Hkv, N, D) at the new positions; untouched where nothing depends on position."""
        rotation, tables = self.rotations[layer_idx], self.tables(layer_idx, kv[0].device)
        if rotation is None or tables is None:
            return kv
        turned = rotate(kv[rotation.slot], *tables, rotation.pairing)
        return (turned, kv[1]) if rotation.slot == 0 else (kv[0], turned)

    def move(self, layer_idx: int, kv: KV, tokens: slice, places: KV) -> None:
        """Writes the K/V (B, Hkv, n, D) of some of the N tokens to their places, turned."""
        rotation, tables = self.rotations[layer_idx], self.tables(layer_idx, places[0].device)
        for slot, (states, place) in enumerate(zip(kv, places)):
            if rotation is not None and tables is not None and slot == rotation.slot:
                cos, sin = (table[tokens] for table in tables)
                rotate(states.to(place.device), cos, sin, rotation.pairing, place)
            else:
                place.copy_(states)

    def tables(self, layer_idx: int, device: torch.device) -> Tables | None:
        """cos and sin (N, R) that turn a layer's cached state; `None` where nothing depends on position or moves."""
        rotation = self.rotations[layer_idx]
        found = None if rotation is None else self._tables.get((rotation.source, rotation.layout))
        if rotation is None or found is None:
            return None
        cos, sin = (t.to(device).contiguous() for t in found)
        return cos, sin if rotation.sign == 1 else -sin


# --- the self-test ------------------------------------------------------------------------------------------------


def find_rotations(host: Host, stock: Stock) -> tuple[list[KeyRotation | None], dict[int, RowLayout], torch.dtype]:
    """Finds, per layer, the one rotation that maps cached state at p to cached state at p + Δ; shapes and dtype.

    The same ids run through a second forward at shifted positions, each layer from the same input. In a model whose
    attention sees only relative positions, everything cached is equal but for one rotated slot, and so is what comes
    out of each layer. Learned positions change the values already in layer 0, and so fail by behaviour.

    Raises:
        UnsupportedModel: naming the layer and what did not fit.
    """
    if sorted(stock.kv) != list(range(len(stock.kv))):
        raise UnsupportedModel(f"Only layers {sorted(stock.kv)} keep K/V; expected the first ones, without a gap.")
    first, shifted = host.self_test_positions(LENGTH)
    moved = run_steps(host, lambda: host.run_stock(shifted), [None, *stock.hidden[1:]])
    old, new = ((positions, host.regime(int(positions[-1]) + 1)) for positions in (first, shifted))
    tables = [(host.rotary_tables(i, *old), host.rotary_tables(i, *new)) for i in range(len(host.rotary_sources))]
    rotations = [
        _find_rotation(i, stock.kv[i], moved.kv[i], host.rotary_sources, tables, stock.kv_tolerance)
        for i in sorted(stock.kv)
    ]
    _require_relative(stock, moved)
    return rotations, {i: RowLayout.of(kv) for i, kv in stock.kv.items()}, _one_dtype(stock.kv)


def _require_relative(stock: Stock, moved: Steps) -> None:
    """What comes out of a layer may not depend on where the text stands.

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
        turning = sum(_pairs(squares[: 2 * num_pairs], pairing))
        parts.append(torch.cat([torch.as_tensor(turning), squares[2 * num_pairs :]]))
    errors, sizes = parts
    return float((errors / sizes.clamp_min(1e-30)).max().sqrt())
