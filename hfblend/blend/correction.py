"""Correction of the rows that stay reused, by the known errors of those that are recomputed, layer by layer.

    reused     ▨ ▨ ■ ▨ ▨ ▨ ■ ■ ▨ ▨      ■ recomputed: its error, fresh − reused, is known
    corrected  ▤ ▤ ■ ▤ ▤ ▤ ■ ■ ▤ ▤      ▤ reused, plus what the known errors foretell of its error

A correction is a function, as a selection rule is. No row more is computed, and attention is exact: a row sees its past
only. But what corrects a row may come from later rows.
Shapes: Hkv KV heads, N tokens of moved pieces, S of them that are recomputed, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .trust import Queries, trust

BLOCK = 32  # tokens


@dataclass(frozen=True)
class Errors:
    """The known errors of a layer's values, or of its keys with their rotation off.

    Attributes:
        known: (Hkv, S, D) in fp32, of keys (`slot` 0) or values (1).
        known_idx: (S,) which of the N tokens were recomputed, rising.
        piece, place: (N,) the moved piece of each token, and its place there; `longest` of `num_pieces` has so many.
        queries: of the pass, and what they see of the recomputed rows; for keys, where attention is hfblend's own.
    """

    known: torch.Tensor
    slot: int
    known_idx: torch.Tensor
    piece: torch.Tensor
    place: torch.Tensor
    num_pieces: int
    longest: int
    queries: Queries | None = None


Correction = Callable[[Errors], torch.Tensor]  # -> (Hkv, N, D), added to reused rows; recomputed ones stay fresh


def offset(errors: Errors) -> torch.Tensor:
    """Mean errors of the prompt, of a token's piece and of its block of 32 tokens, weighted by what they foretell.

    Each mean foretells a known error, too, when it leaves that one out. A ridge regression of the known errors on what
    is so foretold gives each head its three weights: near 1 where errors agree, near 0 where they are noise.
    Source: measured. AgentKVShift (arXiv 2607.21604) adds the mean of the piece.
    """
    known, count, blocks = errors.known, errors.known.shape[1], errors.longest // BLOCK + 1
    if count < 2:
        return known.new_zeros(known.shape[0], len(errors.piece), known.shape[2])
    block, total = errors.piece * blocks + errors.place // BLOCK, known.sum(1, keepdim=True)
    left_out, means = [(total - known) / (count - 1)], [total / count]
    for groups, of_token in ((errors.num_pieces, errors.piece), (errors.num_pieces * blocks, block)):
        group = of_token[errors.known_idx]
        counts = known.new_zeros(groups, 1).index_add_(0, group, known.new_ones(count, 1))
        sums = known.new_zeros(known.shape[0], groups, known.shape[2]).index_add_(1, group, known)
        left_out.append((sums[:, group] - known) / counts[group])
        means.append((sums / (counts + 1)).repeat_interleave(errors.num_pieces * blocks // groups, 1))
    foretelling = torch.stack(left_out)
    weights = _ridge(foretelling, known, 0.01 + 10 / count)[..., None, None]
    if errors.queries is not None:
        weights = weights * trust(errors.queries, known, (weights * foretelling).sum(0))[:, None, None]
    return sum(map(torch.mul, weights, means))[:, block]  # type: ignore[index]


def _ridge(features: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """(F, Hkv) weights of features (F, Hkv, S, D) for targets (Hkv, S, D); `strength` is a share of the mean square."""
    flat = features.flatten(2).transpose(0, 1)
    gram, right = flat @ flat.mT, flat @ targets.flatten(1)[..., None]  # (Hkv, F, F), (Hkv, F, 1)
    gram.diagonal(dim1=1, dim2=2).add_(strength * gram.diagonal(dim1=1, dim2=2).mean(1, True) + 1e-38)
    return torch.linalg.solve_ex(gram, right).result[..., 0].T  # which does not wait for a GPU, as solve does


CORRECTIONS: dict[str | None, Correction] = {"offset": offset}
