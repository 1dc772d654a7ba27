"""Applies a correction to the reused rows of one prompt, a layer at a time as a pass reaches it.

Shapes: Hkv KV heads, T all tokens, N tokens of moved pieces, S' rows of a pass, D head_dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ..arguments import described
from ..kernels.reference import AttentionArgs
from ..kv.rows import KV, rows_at, sent
from ..trace.observer import Observer
from .correction import Correction, Errors
from .reuse import Reuse, ReusingModel, tokens_of
from .rotation import Pairing, Realigner, Tables, pairs_of, rotate
from .trust import Queries, asked


def corrector_of(
    correction: Correction | None, model: ReusingModel, reuse: Reuse, length: int, observer: Observer
) -> Corrector | None:
    """What corrects a prompt; `None` without a correction, or where nothing has moved."""
    return Corrector(correction, model, reuse, length, observer) if correction is not None and reuse.moved else None


class Corrector:
    """Corrects the rows of moved pieces that stay reused, each layer once.

    Args:
        length: T.
        observer: is told how much was added.
    """

    def __init__(
        self, correction: Correction, model: ReusingModel, reuse: Reuse, length: int, observer: Observer
    ) -> None:
        self.correction, self.observer, self._rotations = correction, observer, model.rotations
        self._spans, self._done = [piece.span for piece in reuse.moved], set[int]()
        self._exact = reuse.exact_from_start
        sizes = [stop - start for start, stop in self._spans]
        self._longest, tokens = max(sizes), tokens_of(self._spans)
        nth = np.full(length, -1)  # of a token among the N
        nth[tokens] = np.arange(len(tokens))
        numbers = np.repeat(np.arange(len(sizes)), sizes), tokens_of((0, size) for size in sizes), nth
        on_device = sent(torch.from_numpy(np.concatenate(numbers)), model.device)
        self._piece, self._place, self._nth = on_device.split(list(map(len, numbers)))
        regime, tables_of, now = model.regime(length), model.rotary_tables_of_pieces, torch.from_numpy(tokens)
        off, on = (now, torch.zeros_like(now), regime), (torch.zeros_like(now), now, regime)
        self._off, self._on = (Realigner(tables_of, model.rotations, [move], regime) for move in (off, on))
        self._rows: torch.Tensor | None = None
        self._found: tuple[torch.Tensor, ...] = ()
        self._tables: dict[Any, Tables] = {}  # of the rows that are known
        self._kept: dict[str, Any] = {}

    def __call__(
        self, above: int, layer_idx: int, rows: torch.Tensor, fresh: KV, kv: KV, args: AttentionArgs | None = None
    ) -> None:
        """Corrects a layer before the fresh rows of a pass take their places.

        Args:
            above: K/V of layers up to this one are fresh for every token.
            rows: (S',) of the pass, rising, in moved pieces and elsewhere.
            fresh: their K/V (1, Hkv, S', D).
            kv: reused K/V (1, Hkv, T, D), changed in place.
            args: with which the layer will attend, if that is known: keys are corrected as far as it bears them out.
        """
        if layer_idx <= above or layer_idx in self._done:  # a pass comes again to the layer where it was cut
            return
        self._done.add(layer_idx)
        piece, place, known, idx, others, _ = self._in_moved(rows)
        if not 0 < len(known) < len(piece):
            return
        added, stale = [], rows_at(kv, rows[known])
        for slot, (new, states) in enumerate(zip(fresh, kv)):
            exact = new[0].index_select(1, known)
            errors = exact.float() - stale[slot][0].float()
            errors = self._turned(self._off, errors, layer_idx, slot, idx)
            queries = None
            if slot == 0 and args is not None and args.query.shape[2:] == new.shape[2:]:
                keys = torch.cat([states[0][:, : self._exact], new[0].index_select(1, others), exact], 1)
                queries = self._queries(args, layer_idx, rows, keys)
            tokens = slot, idx, piece, place, len(self._spans), self._longest
            found = self.correction(Errors(errors, *tokens, queries, self._kept))
            expected = (errors.shape[0], len(piece), errors.shape[2])
            if not torch.is_tensor(found) or found.shape != expected:
                got = tuple(found.shape) if torch.is_tensor(found) else described(found)
                raise ValueError(
                    f"A correction must return one vector per head and token of moved pieces, {expected}, got {got}."
                )
            added.append(found)
            self._add(found.float(), states[0], layer_idx, slot)
        self.observer.corrected(layer_idx, partial(_sizes, added, piece, len(self._spans)))

    def _add(self, added: torch.Tensor, states: torch.Tensor, layer_idx: int, slot: int) -> None:
        """Adds (Hkv, N, D) in fp32 to states (Hkv, T, D), turned where the slot is rotated; a piece at a time, which
        stays in a CPU's cache."""
        rotation, tables, done = self._rotations[layer_idx], self._on.tables(layer_idx, states.device), 0
        for start, stop in self._spans:
            part, of_piece = states[:, start:stop], slice(done, done := done + stop - start)
            if rotation is None or tables is None or rotation.slot != slot:
                part += added[:, of_piece]
            else:
                _add_turned(part, added[:, of_piece], (tables[0][of_piece], tables[1][of_piece]), rotation.pairing)

    def _in_moved(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Piece and place (N,) of each token; which rows of a pass are among the N, and which of them; the other rows;
        positions of the exact tokens that come first, of the other rows and of those among the N. Found once a pass."""
        if rows is not self._rows:
            piece, place, nth = (t.to(rows.device) for t in (self._piece, self._place, self._nth))
            in_moved = nth[rows] >= 0
            known, others = in_moved.nonzero()[:, 0], (~in_moved).nonzero()[:, 0]
            positions = torch.cat([torch.arange(self._exact, device=rows.device), rows[others], rows[known]])
            self._rows, self._found = rows, (piece, place, known, nth[rows[known]], others, positions)
            self._tables, self._kept = {}, {}
        return self._found

    def _queries(self, args: AttentionArgs, layer_idx: int, rows: torch.Tensor, keys: torch.Tensor) -> Queries:
        """Their attention is to exact keys (Hkv, K, D): from the prompt's start on, and fresh ones, known last."""
        _, _, known, idx, _, positions = self._in_moved(rows)
        query, attention = asked(args, rows, keys, positions)
        turned = partial(self._turned, self._on, layer_idx=layer_idx, slot=0, idx=idx)
        return Queries(query, attention[..., -len(known) :], turned)

    def _turned(
        self, way: Realigner, states: torch.Tensor, layer_idx: int, slot: int, idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (Hkv, n, D) in fp32 of all N tokens, or of some (n,), turned where the slot is rotated."""
        rotation, tables = self._rotations[layer_idx], way.tables(layer_idx, states.device)
        if rotation is None or tables is None or rotation.slot != slot:
            return states
        if idx is not None:
            key = way, rotation.source, rotation.layout, rotation.sign
            if key not in self._tables:
                self._tables[key] = tables[0][idx], tables[1][idx]
            tables = self._tables[key]
        return rotate(states[None], *tables, rotation.pairing)[0]


def _add_turned(states: torch.Tensor, added: torch.Tensor, tables: Tables, pairing: Pairing) -> None:
    """Adds vectors (Hkv, N, D) in fp32, turned as `rotate` does it, to `states` in place, rounded once at the end."""
    cos, sin = tables
    turned_dims, sums = 2 * cos.shape[-1], states.float()  # the states themselves, if they are fp32
    (x, y), (to_x, to_y) = (pairs_of(t[..., :turned_dims], pairing) for t in (added, sums))
    to_x.addcmul_(x, cos).addcmul_(y, sin, value=-1)
    to_y.addcmul_(x, sin).addcmul_(y, cos)
    if turned_dims < states.shape[-1]:
        sums[..., turned_dims:] += added[..., turned_dims:]
    if sums is not states:
        states.copy_(sums)


def _sizes(added: list[torch.Tensor], piece: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """(2, P) root mean squares of what was added (Hkv, N, D) to keys and values of tokens of pieces (N,)."""
    squares = torch.stack([one.float().square().mean((0, 2)) for one in added])
    sums = squares.new_zeros(2, num_pieces).index_add_(1, piece, squares)
    return (sums / torch.bincount(piece, minlength=num_pieces)).sqrt()
