"""How far a head's keys are corrected: as far as what a correction foretells of logits turns out true.

    query rows of the pass        ● ● ● ●         64 of them, each with its attention to the recomputed rows
    recomputed rows            ■  ■  ■  ■  ■      their errors are known: how each moved a logit, and how far it was
                                                  foretold from the errors of the others

An error of keys counts where attention is. In a sharp head most rows carry none, and agree on a shift that the few rows
which are attended to do not share: squared errors of keys look well there, while the attention of such a head is lost.

Shapes: H heads, Hkv KV heads, S recomputed rows of moved pieces, R rows of a pass, Q queries of a KV head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..kernels.reference import AttentionArgs

NUM_QUERIES = 64  # rows of a pass that are asked
# The share of what is foretold that turns out true: up to the one nothing is corrected, from the other on all.
DOUBTED, TRUSTED = 0.25, 0.5


@dataclass(frozen=True)
class Queries:
    """What some queries of a pass see of its recomputed rows.

    Attributes:
        states: (Hkv, Q, D) in fp32, rotated and scaled: those of all heads that share a KV head.
        attention: (Hkv, Q, S) that they pay to the recomputed rows, among all rows whose keys are exact.
        turned: gives states (Hkv, S, D) of those rows their rotation.
    """

    states: torch.Tensor
    attention: torch.Tensor
    turned: Callable[[torch.Tensor], torch.Tensor]

    def shifts(self, errors: torch.Tensor) -> torch.Tensor:
        """(Hkv, Q, S) by how much errors (Hkv, S, D) of keys with their rotation off move the logits of their rows."""
        return self.states @ self.turned(errors).mT


def asked(
    args: AttentionArgs, rows: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries of a pass, spread evenly, and their attention to keys. Softcap and sinks are left out.

    Args:
        args: of the layer's attention; its query has the rows of the pass.
        rows: (R,) positions of the pass.
        keys: (Hkv, K, D) rotated, at `positions` (K,).

    Returns:
        (Hkv, Q, D) scaled, and (Hkv, Q, K).
    """
    picked = (torch.arange(NUM_QUERIES, device=rows.device) * (len(rows) - 1) + NUM_QUERIES // 2) // (NUM_QUERIES - 1)
    states = args.scaling * args.query[0][:, picked].float()
    states = states.unflatten(0, (len(keys), -1)).flatten(1, 2)
    at = rows[picked][:, None]
    hidden = positions > at
    if args.sliding_window is not None:
        hidden |= positions <= at - args.sliding_window
    mask = torch.zeros_like(hidden, dtype=states.dtype).masked_fill_(hidden, -torch.inf)
    logits = states @ keys.float().mT
    logits.unflatten(1, (-1, NUM_QUERIES)).add_(mask)  # much quicker on a CPU than `masked_fill_`
    return states, logits.softmax(-1)


def trust(queries: Queries, known: torch.Tensor, foretold: torch.Tensor) -> torch.Tensor:
    """(Hkv,) from 0, keys stay as they are, to 1.

    The regression of true shifts of logits on foretold ones, weighted by attention, says how much of what is foretold
    is true. A ramp leads from heads where nothing is to those where half is.

    Args:
        known: (Hkv, S, D) errors of the recomputed rows, rotation off.
        foretold: (Hkv, S, D) of each from those of the others.

    Source: measured.
    """
    true, told = queries.shifts(known), queries.shifts(foretold)
    weighted = queries.attention * told
    along, square = (shifts.mul_(weighted).sum((1, 2)) for shifts in (true, told))
    share = along / (square.clamp_min(torch.finfo(told.dtype).tiny) * (1 + 10 / known.shape[1]))
    return ((share - DOUBTED) / (TRUSTED - DOUBTED)).clamp(0, 1)
