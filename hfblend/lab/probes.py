"""Rivals that ask the question: the suffix's attention, read row by row, or with queries that saw part of the context.

    suffix_attention    ■ ■ ■ ■ ■ ■   sees all chunks on its way through the layers; the mean over its rows is ranked
    prophetkv           ■ ■ ■ ■ ■ ■   each row's weights over the context alone
    infoflow_kv         ■ ■ ■ ■ ■ ■   a norm over its rows
    qcfuse              ■ ⬚ ■ ⬚ ⬚ ■   sees the anchors of each chunk
    fusionrag           ⬚ ⬚ ⬚ ⬚ ⬚ ⬚   sees no chunk

Shapes: H heads, S suffix rows, T all tokens, n tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..attention.by_position import HALF
from ..attention.record import AttentionRecord
from ..blend.algorithm import Blend
from ..blend.caches import BlendingCache
from ..blend.model import Pass
from ..blend.reuse import Piece, merged
from ..blend.selection import highest
from ..kernels.device import has_kernels
from ..kernels.reference import AttentionArgs, attention_weights
from ..kv.chunk import Reader
from ..kv.rows import KV, empty_kv

SINKS = 4  # first tokens of a chunk that are always anchors


class RowRecord(AttentionRecord):
    """Keeps, per wanted layer, what a function makes of all weights of a pass, (H, S, T) -> (H or 1, T).

    Args:
        shown: (K,) keys whose weights are asked for though the rows do not see them; a layer with a window keeps to
            what they see.
    """

    def __init__(
        self,
        layers: Sequence[int],
        over_rows: Callable[[torch.Tensor], torch.Tensor],
        shown: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layers)
        self.over_rows, self.shown = over_rows, shown

    def add(self, layer: int, args: AttentionArgs, seen: torch.Tensor) -> None:
        """Records one layer, whose rows see the keys `seen` (B, S, T). Raises `StopForward` after the last one."""
        if layer in self.layers:
            if self.shown is not None and args.sliding_window is None:
                seen = seen.index_fill(-1, self.shown.to(seen.device), True)
            self.received[layer] = self.over_rows(attention_weights(args, seen)[0])
        self.end_if_complete()


class SuffixProbe(Blend):
    """Shows rules another reading of the suffix's attention than its mean over rows.

    On a GPU in half precision, attention runs in a kernel that keeps that mean alone.
    """

    def over_rows(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns what a rule is shown, (H or 1, T), of a layer's weights (H, S, T)."""
        return weights.mean(1)

    def unseen(self) -> torch.Tensor:
        """Returns (K,) chunk tokens that the suffix does not see on its way, though they are ranked."""
        return self.reuse.candidate_idx[:0]

    def rows_pass(
        self,
        name: str,
        rows: torch.Tensor,
        stop_at: int | None = None,
        hidden: torch.Tensor | None = None,
        record: AttentionRecord | None = None,
    ) -> Any:
        if record is None:
            return super().rows_pass(name, rows, stop_at, hidden, record)
        if has_kernels(self.model.device) and self.model.dtype in HALF:
            raise ValueError(
                f"{type(self).__name__} reads attention row by row; on a GPU in {self.model.dtype} a kernel keeps the "
                "mean over rows alone. Load the model in torch.float32."
            )
        load_reused(self, hidden)
        unseen = self.unseen()
        by_row = RowRecord(record.layers, self.over_rows, unseen)
        output = super().rows_pass(name, rows, stop_at, unseen if hidden is None else merged(unseen, hidden), by_row)
        record.received |= by_row.received
        return output


def load_reused(blend: Blend, hidden: torch.Tensor | None = None) -> None:
    """Puts all reused KV into the buffers, so that a pass may hide rows of it and a later one see them."""
    rows = blend.reuse.suffix_idx
    cache = BlendingCache(blend.model.num_layers, blend.buffers, rows, blend.length, None, blend.reused, hidden)
    cache.load(list(blend.model.layouts))


class ProphetKV(SuffixProbe):
    """The tokens that the question attends to: weights over the context alone, mean over heads, rows and all layers.

    Left out: nothing of the selection that could be read. Whether the paper's softmax covers the prefix, as here, is
    not known: the implementations differ.

    Source: ProphetKV (arXiv 2602.02579), its abstract, and two public implementations of its Algorithm 1 (for vLLM and
    UCM), neither by its authors.
    """

    def over_rows(self, weights: torch.Tensor) -> torch.Tensor:
        context = weights[..., : self.look_up.spans[-1][1]].sum(-1, keepdim=True)
        return (weights / context.clamp_min(torch.finfo(weights.dtype).tiny)).mean(1)


class InfoFlowKV(SuffixProbe):
    """The tokens that the question attends to, as the norm over its rows of the mean weight over heads: one row that
    looks hard counts more than many that glance. Mean over the last two layers.

    Left out: chunks in an order found from their scores, since that changes the prompt. The layers are the code's
    default; its configurations name four in the middle. The suffix scores, where the code takes the bare question.
    Chunks stand at their places in the prompt while they are scored, as the paper asks.

    Source: InfoFlow KV (arXiv 2603.05353), its abstract, and its repository (tx467/InfoFlow-KV: `ImportanceScorer`,
    method "norm").
    """

    def over_rows(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.mean(0, keepdim=True).norm(dim=1)


class FusionRAG(SuffixProbe):
    """The tokens that the question attends to in the last layer, with queries computed without the chunks; over chunk
    KV computed after each chunk's neighbours, as `texts.after_neighbours` has it.

    Left out: the softmax covers the whole prompt; the paper does not say what its own covers. The prefix, and a chunk
    that is exact, are seen.

    Source: FusionRAG (arXiv 2601.12904) sections 3.1, 3.2 and 5.3.2.
    """

    def unseen(self) -> torch.Tensor:
        return self.reuse.candidate_idx


class QCFuse(SuffixProbe):
    """The tokens that the question attends to in three middle layers, with queries that saw only the anchors of each
    chunk: its first four tokens, and those that a second copy of the chunk, read after the first, looks at most
    (KVzip). Anchors are a tenth of a chunk. Mean over rows, heads and the three layers.

    Left out: the layers are profiled for each model, and known for four, at 0.41 to 0.65 of the depth; here they are
    the three around 0.53. Each layer has its own anchors there; here one set serves all. The instruction before the
    second copy is not known. Anchors are found in a chunk's first call; the paper finds them offline.

    Source: QCFuse (arXiv 2606.05875), its abstract, and its research code (leideng/QCFuse: `IndiceSelector`,
    `DigestIndexManager`, `qcfuse_config`).
    """

    def unseen(self) -> torch.Tensor:
        candidates = self.reuse.candidate_idx
        anchors = [piece.span[0] + self._anchors(piece) for piece in self.reuse.moved]
        return candidates[~torch.isin(candidates, torch.cat(anchors))]

    def _anchors(self, piece: Piece) -> torch.Tensor:
        if piece.entry not in _anchors_of:
            _anchors_of[piece.entry] = anchors_of(self, self.ids[0, slice(*piece.span)])
        return _anchors_of[piece.entry]


_anchors_of: WeakKeyDictionary[Reader, torch.Tensor] = WeakKeyDictionary()


def anchors_of(blend: Blend, ids: torch.Tensor) -> torch.Tensor:
    """Returns (ceil(n / 10),) places in a chunk (n,): its first four, and those that a second copy looks at most."""
    length, layers = len(ids), range(blend.model.num_layers)
    record = RowRecord(layers, lambda weights: weights[:, length:, :length].amax((0, 1))[None])
    rows = torch.arange(2 * length, device=ids.device)
    cache = BlendingCache(len(layers), {}, rows, 2 * length, reused=_NothingReused(2 * length))
    one = Pass(ids.repeat(2)[None], rows, rows, 2 * length, record=record)
    blend.model.rows_pass(blend.forward, one, cache, watch=False)
    scores = torch.stack([record.received[layer][0].to(ids.device) for layer in layers]).mean(0)
    return highest(scores, math.ceil(length / 10), rows[: min(SINKS, length)])


@dataclass
class _NothingReused:
    """The buffers of a text that is computed whole."""

    length: int

    def layers(self, layers: Sequence[int], like: KV | None = None) -> dict[int, KV]:
        assert like is not None
        return {layer: empty_kv(like, self.length) for layer in layers}
