"""A record of how much attention the keys receive in a pass.

Shapes: B batch, H query heads, S query rows, T keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..kernels.reference import AttentionArgs, attention_weights, weighted
from ..util import StopForward


class AttentionRecord:
    """Keeps, per wanted layer, how much attention each key received: the mean over the rows of a pass.

    Args:
        layers: the layers to record; the pass ends in the last one.

    Attributes:
        received: layer -> (H, T) in fp32.
    """

    ROWS_AT_ONCE = 64  # so that memory is linear in T, however many rows a pass has

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers, self.received = tuple(dict.fromkeys(layers)), dict[int, torch.Tensor]()

    def add(self, layer: int, args: AttentionArgs, seen: torch.Tensor) -> torch.Tensor | None:
        """Records one layer, whose rows see the keys `seen` (B, S, T). Raises `StopForward` after the last one.

        Returns:
            (B, H, S, Dv) the attention of a layer that is recorded, found on the way; else `None`.
        """
        if layer not in self.layers:
            return None
        sums, found = [], []
        for query, rows in zip(args.query.split(self.ROWS_AT_ONCE, 2), seen.split(self.ROWS_AT_ONCE, 1)):
            weights = attention_weights(replace(args, query=query), rows)
            sums.append(weights[0].sum(1))
            found.append(weighted(args.value, weights).to(query.dtype))
        self.received[layer] = torch.stack(sums).sum(0) / args.query.shape[2]
        self.end_if_complete()
        return torch.cat(found, 2)

    def end_if_complete(self) -> None:
        """Raises `StopForward` if no layer is left to record."""
        if len(self.received) == len(self.layers):
            raise StopForward
