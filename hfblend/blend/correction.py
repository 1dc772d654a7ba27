"""Correction of the rows that stay reused, by the known errors of those that are recomputed, layer by layer.

    reused     ▨ ▨ ■ ▨ ▨ ▨ ■ ■ ▨ ▨      ■ recomputed: its error, fresh − reused, is known
    corrected  ▤ ▤ ■ ▤ ▤ ▤ ■ ■ ▤ ▤      ▤ reused, plus what the known errors foretell of its error

A correction is a function, as a selection rule is: `BlendConfig(correction=...)` takes one, or a name below. No row
more is computed, and attention is exact: a row sees its past only. But what corrects a row may come from later rows.

Shapes: Hkv KV heads, N tokens of moved pieces, S of them that are recomputed, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK = 32  # tokens


@dataclass(frozen=True)
class Errors:
    """The known errors of a layer's values, or of its keys with their rotation off.

    Attributes:
        known: (Hkv, S, D) in fp32.
        slot: 0 for keys, 1 for values.
        known_idx: (S,) which of the N tokens were recomputed, rising.
        piece, place: (N,) the moved piece of each token, and its place there, both from 0 on.
        num_pieces, longest: of the moved pieces, the latter in tokens.
    """

    known: torch.Tensor
    slot: int
    known_idx: torch.Tensor
    piece: torch.Tensor
    place: torch.Tensor
    num_pieces: int
    longest: int


Correction = Callable[[Errors], torch.Tensor]  # -> (Hkv, N, D), added to reused rows; recomputed ones stay fresh


def offset(errors: Errors) -> torch.Tensor:
    """Mean errors of the prompt, of a token's piece and of its block of 32 tokens, weighted by what they foretell.

    Each mean foretells a known error, too, when it leaves that one out. A ridge regression of the known errors on what
    is so foretold gives each head its three weights: near 1 where errors agree, near 0 where they are noise. The mean
    of n errors of a piece or a block counts n / (n + 1).

    Source: measured. AgentKVShift (arXiv 2607.21604) adds the mean of the piece.
    """
    known, count, blocks = errors.known, errors.known.shape[1], errors.longest // BLOCK + 1
    if count < 2:
        return known.new_zeros(1, 1, 1).expand(known.shape[0], len(errors.piece), known.shape[2])
    block = errors.piece * blocks + errors.place // BLOCK
    total = known.sum(1, keepdim=True)
    left_out, means = [(total - known) / (count - 1)], [total / count]
    for groups, of_token in ((errors.num_pieces, errors.piece), (errors.num_pieces * blocks, block)):
        group = of_token[errors.known_idx]
        counts = torch.bincount(group, minlength=groups)[:, None]
        sums = known.new_zeros(known.shape[0], groups, known.shape[2]).index_add_(1, group, known)
        left_out.append((sums[:, group] - known) / counts[group])
        means.append((sums / (counts + 1)).repeat_interleave(errors.num_pieces * blocks // groups, 1))
    foretold = torch.stack([one.flatten(1) for one in left_out], -1)  # (Hkv, S·D, 3)
    weights = _ridge(foretold, known.flatten(1), 0.01 + 10 / count)
    of_block = sum(weight[:, None, None] * mean for weight, mean in zip(weights.unbind(-1), means))
    return of_block[:, block]  # type: ignore[index]


def _ridge(features: torch.Tensor, targets: torch.Tensor, strength: float) -> torch.Tensor:
    """(Hkv, F) weights of features (Hkv, N, F) for targets (Hkv, N); `strength` is a share of the mean square."""
    gram, right = features.mT @ features, features.mT @ targets[..., None]
    held = strength * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
    return torch.linalg.solve(gram + torch.diag_embed(held.expand(gram.shape[:2])), right)[..., 0]


CORRECTIONS: dict[str | None, Correction] = {"offset": offset}
