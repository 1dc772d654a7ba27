"""Correction of the rows that stay reused, by the known errors of those that are recomputed, layer by layer.

    reused     ▨ ▨ ■ ▨ ▨ ▨ ■ ■ ▨ ▨      ■ recomputed: its error, fresh − reused, is known
    corrected  ▤ ▤ ■ ▤ ▤ ▤ ■ ■ ▤ ▤      ▤ reused, plus what the known errors foretell of its error

A correction is a function, as a selection rule is. No row more is computed, and attention is exact: a row sees its past
only. But what corrects a row may come from later rows.
Shapes: Hkv KV heads, N tokens of moved pieces, S of them that are recomputed, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
        kept: what a correction makes of the numbers of tokens; those of other layers of the pass find it there.
    """

    known: torch.Tensor
    slot: int
    known_idx: torch.Tensor
    piece: torch.Tensor
    place: torch.Tensor
    num_pieces: int
    longest: int
    queries: Queries | None = None
    kept: dict[str, Any] = field(default_factory=dict)


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
    if errors.kept.get("known_idx") is not errors.known_idx:
        block = errors.piece * blocks + errors.place // BLOCK
        groups = [_group(errors, errors.piece, 1), _group(errors, block, blocks)]
        errors.kept.update(known_idx=errors.known_idx, block=block, groups=groups)
    block, groups = errors.kept["block"], errors.kept["groups"]
    total, shape = known.sum(1, keepdim=True), (known.shape[0], errors.num_pieces * blocks, known.shape[2])
    of_blocks = known.new_zeros(shape).index_add_(1, groups[1][0], known)
    of_pieces = of_blocks.unflatten(1, (-1, blocks)).sum(2)
    features = torch.stack([(total - known) / (count - 1), known, known, known], 1)  # (Hkv, F + 1, S, D); `known` last
    means = [total / count]
    for nth, (sums, (group, others, counts)) in enumerate(zip((of_pieces, of_blocks), groups)):
        torch.sub(sums.index_select(1, group), known, out=features[:, nth + 1]).div_(others)
        means.append((sums / counts).repeat_interleave(shape[1] // len(counts), 1))
    weights = _ridge(features.flatten(2), 0.01 + 10 / count)[..., None, None]
    if errors.queries is not None:
        foretold = (weights * features[:, :-1]).sum(1)
        weights = weights * trust(errors.queries, known, foretold)[:, None, None, None]
    added = sum(map(torch.mul, weights.unbind(1), means))  # (Hkv, blocks of all pieces, D)
    return added.index_select(1, block)  # type: ignore[union-attr]


def _group(errors: Errors, of_token: torch.Tensor, per_piece: int) -> tuple[torch.Tensor, ...]:
    """The group (S,) of each known error, by that of each token (N,); (S, 1) the number of known errors in it; and that
    of each group, and one."""
    group = of_token[errors.known_idx]
    counts = errors.known.new_zeros(errors.num_pieces * per_piece).index_add_(0, group, torch.ones_like(group).float())
    return group, counts[group, None], counts[:, None] + 1


def _ridge(features: torch.Tensor, strength: float) -> torch.Tensor:
    """(Hkv, F) weights of features for a target, the last of (Hkv, F + 1, S·D); `strength` is of the mean square."""
    products = features @ features.mT
    gram, right = products[:, :-1, :-1], products[:, :-1, -1:]  # (Hkv, F, F), (Hkv, F, 1)
    gram.diagonal(dim1=1, dim2=2).add_(strength * gram.diagonal(dim1=1, dim2=2).mean(1, True) + 1e-38)
    return torch.linalg.solve_ex(gram, right).result[..., 0]  # which does not wait for a GPU, as solve does


CORRECTIONS: dict[str | None, Correction] = {"offset": offset}
