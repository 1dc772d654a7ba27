"""The processes that hold one model together, each a part of every layer (tensor parallel).

Each rank has the K/V of its heads, and its store, but a forward is one step of all of them. So the ranks agree here on
everything that decides which forwards run, and over which tokens.

Shapes: H heads of one rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """One process alone, or all that share a tensor-parallel model.

    Args:
        group: their process group; `None`: one process.
        device: on which the group exchanges tensors.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group, self.device = group, device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.are_several = self.size > 1

    def require_one(self, setting: str = 'recompute_ratios="auto"', instead: str = "Give a ratio.") -> None:
        """Raises:
        ValueError: several ranks, of which each would settle by itself what is recomputed or reused.
        """
        if self.are_several:
            raise ValueError(
                f"{setting} rests on what one process measures or has; this model is tensor-parallel over {self.size} "
                f"ranks, which must recompute the same tokens. {instead}"
            )

    def all_agree(self, here: list[bool]) -> list[bool]:
        """Returns of each whether it is so on every rank."""
        if not self.are_several:
            return here
        agreed = torch.tensor(here, dtype=torch.int32, device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.group)
        return agreed.bool().tolist()

    def gathered(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns the heads of all ranks, in order, of states that have H of them in dimension `dim`."""
        if not self.are_several:
            return states
        parts = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, states.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def as_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the first rank's tensor: a last bit that differs would choose other tokens."""
        if not self.are_several:
            return tensor
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor
