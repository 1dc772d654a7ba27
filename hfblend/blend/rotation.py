"""Moving cached keys to new positions: K_new = R(new) · R(old)⁻¹ · K_old, one rotation in fp32.

The tables come from the model's own rotary module, so linear, dynamic, yarn, longrope, llama3 or partial RoPE need no
extra code. How a layer's cached state depends on position is found by a self-test (`hfblend/support/rotations.py`).

Shapes: B batch, Hkv KV heads, N tokens, D head_dim, R rotated pairs (2R ≤ D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..kv.rows import KV

Pairing = Literal["half", "interleaved"]
Layout = Literal["duplicated", "repeated", "single"]
Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (N, R), fp32


@dataclass(frozen=True)
class KeyRotation:
    """How one layer's cached state depends on position.

    Args:
        slot: 0 if the cached keys are rotated, 1 if the values slot holds the rotated part (latent attention).
        pairing: dimension i turns with i + R (`"half"`) or 2i with 2i + 1 (`"interleaved"`).
        layout: how R angles fill a table: `"duplicated"` [a b a b], `"repeated"` [a a b b], `"single"` [a b].
        source: index into `HFModel.rotary_sources`.
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
    """Turns the first 2R dimensions of `states` (B, Hkv, N, D) by tables (N, R), in fp32, rounded once at the end,
    into `out` or a new tensor."""
    out = torch.empty_like(states) if out is None else out
    turned_dims = 2 * cos.shape[-1]
    (x, y), (to_x, to_y) = (pairs_of(t[..., :turned_dims], pairing) for t in (states, out))
    x, y = x.float(), y.float()
    to_x.copy_((x * cos).addcmul_(y, sin, value=-1))
    to_y.copy_((x * sin).addcmul_(y, cos))
    out[..., turned_dims:] = states[..., turned_dims:]
    return out


def pairs_of(states: torch.Tensor, pairing: Pairing) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two dimensions that turn with each other, each (…, R)."""
    if pairing == "interleaved":
        return states[..., 0::2], states[..., 1::2]
    first, second = states.chunk(2, -1)
    return first, second


class Realigner:
    """Moves cached K/V of any layer from cached to new positions; tables are made once per layer kind, when first used.

    Args:
        tables_of: returns cos and sin, each (N, 2R or R) in fp32, of a rotary source for several (positions, regime).
        rotations: per layer, from `find_rotations`; `None` where nothing depends on position.
        moves: per moved piece, its cached positions (n,), its new positions (n,) and the regime it was cached in
            (`HFModel.regime`). Together the pieces have N tokens.
        regime: of the prompt.
    """

    def __init__(
        self,
        tables_of: Callable[[int, list[tuple[torch.Tensor, int]]], Tables],
        rotations: list[KeyRotation | None],
        moves: list[tuple[torch.Tensor, torch.Tensor, int]],
        regime: int,
    ) -> None:
        self.rotations, self._tables_of, self._moves, self._regime = rotations, tables_of, moves, regime
        self._tables: dict[tuple[int, Layout], Tables] = {}

    def move(self, layer_idx: int, pieces: Sequence[tuple[KV, KV]]) -> None:
        """Writes the K/V (B, Hkv, n, D) of each piece to their places, turned; together they are the N tokens."""
        rotation, done = self.rotations[layer_idx], 0
        for kv, places in pieces:
            tables = self.tables(layer_idx, places[0].device)
            tokens = slice(done, done := done + kv[0].shape[2])
            for slot, (states, place) in enumerate(zip(kv, places)):
                if rotation is not None and tables is not None and slot == rotation.slot:
                    cos, sin = (table[tokens] for table in tables)
                    rotate(states.to(place.device), cos, sin, rotation.pairing, place)
                else:
                    place.copy_(states)

    def tables(self, layer_idx: int, device: torch.device) -> Tables | None:
        """cos and sin (N, R) that turn a layer's cached state; `None` where nothing depends on position or moves."""
        rotation = self.rotations[layer_idx]
        if rotation is None or not self._moves:
            return None
        cos, sin = (t.to(device).contiguous() for t in self._between(rotation.source, rotation.layout))
        return cos, sin if rotation.sign == 1 else -sin

    def _between(self, source: int, layout: Layout) -> Tables:
        if (source, layout) not in self._tables:
            places = [move[::2] for move in self._moves] + [(move[1], self._regime) for move in self._moves]
            (cos, to_cos), (sin, to_sin) = (t.chunk(2) for t in pair_tables(self._tables_of(source, places), layout))
            self._tables[source, layout] = rotation_between((cos, sin), (to_cos, to_sin))
        return self._tables[source, layout]
