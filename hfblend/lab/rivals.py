"""Rivals: what others have published since CacheBlend, each as far as its paper or its code could be read.

    method          recomputes                                            chunk KV, other rows
    prophetkv       what the question attends to, all layers              –
    infoflow_kv     the same, as a norm over the question's rows          –
    qcfuse          the same, three layers, seen through anchors          –
    fusionrag       the same, last layer, question without its context    computed after neighbours
    relaxkv         the same, over a sparse context                       –
    cachetune       what stays large in the lower half of frequencies     –
    agentkvshift    what deviates most in each chunk                      corrected
    link0, psr      nothing; the keys that deviate most                   computed after four BOS

The first four are in `probes.py`. All count their budget as hfblend does, `ceil(ratio * N)` of the reused tokens, and
start from chunk KV after the prompt's prefix where the table names no other. A chunk at its own place is exact and not
ranked. The rows of a pass are the same in every layer.

Shapes: Hkv KV heads, N candidate tokens, n tokens of a chunk, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from ..blend.algorithm import Blend
from ..blend.correction import Errors
from ..blend.reuse import Reuse, merged
from ..blend.rotation import Realigner
from ..blend.selection import Evidence, Rule, kv_deviation
from ..config import Deviation
from ..kv.rows import KV
from .probes import load_reused

_SLOTS: tuple[Deviation, Deviation] = ("key", "value")

# --- rules ------------------------------------------------------------------------------------------------------------


def by_attention_at(layers: Callable[[int], Iterable[int]]) -> Rule:
    """A rule: the tokens that received the most from the suffix, mean over heads and over `layers(L)`."""

    def by_attention(evidence: Evidence) -> torch.Tensor:
        return evidence.suffix_attention(tuple(layers(evidence.num_layers))).mean((0, 1))

    return by_attention


def last(num_layers: int) -> range:
    """The last layer."""
    return range(num_layers - 1, num_layers)


def last_two(num_layers: int) -> range:
    """The last two layers."""
    return range(max(num_layers - 2, 0), num_layers)


def middle_three(num_layers: int) -> range:
    """The three layers around 0.53 of the depth."""
    middle = min(max(round(0.53 * num_layers), 1), num_layers - 2)
    return range(middle - 1, middle + 2)


def by_low_frequencies(evidence: Evidence) -> torch.Tensor:
    """CacheTune's rule: the tokens of each chunk whose stored K and V are large in the lower half of the frequencies.

    score(t) = mean over layers of (‖low(K)ₜ‖ + ‖low(V)ₜ‖) ÷ its sum over the chunk; `low` filters along the tokens.
    """
    scores = torch.zeros(len(evidence.candidate_idx), device=evidence.candidate_idx.device)
    chunks = [(inside, _low_pass(len(inside)).to(scores.device)) for inside in _of_each_chunk(evidence)]
    for layer in range(evidence.num_layers):
        _, stored = evidence.kv(layer)
        for inside, low in chunks:
            states = (slot[0, :, inside.to(slot.device)].float().to(scores.device) for slot in stored)
            norms = sum((low @ slot).norm(dim=(0, 2)) for slot in states)
            scores[inside] += norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
    return share_of_chunk(scores, evidence)


def by_divergence(evidence: Evidence) -> torch.Tensor:
    """AgentKVShift's probes: in each chunk, the tokens whose K, and as many whose V, lie farthest from the reused."""
    fresh, reused = evidence.kv(evidence.check_layer)
    distances = [kv_deviation(fresh, reused, "key")[0], kv_deviation(fresh, reused, "value")[0]]
    return torch.stack([share_of_chunk(distance, evidence) for distance in distances]).amax(0)


def share_of_chunk(scores: torch.Tensor, evidence: Evidence) -> torch.Tensor:
    """(N,) scores by which the k highest are the same share of every chunk, the best of each: − rank ÷ length."""
    scores = scores.to(evidence.candidate_idx.device)  # from the layer's, which may be another
    shares = torch.zeros_like(scores)
    for inside in _of_each_chunk(evidence):
        order = inside[scores[inside].argsort(descending=True, stable=True)]
        shares[order] = -(torch.arange(len(order), device=shares.device, dtype=shares.dtype) + 0.5) / len(order)
    return shares


def _of_each_chunk(evidence: Evidence) -> Iterator[torch.Tensor]:
    """Places in `candidate_idx` of each chunk's tokens."""
    for start, stop in evidence.spans:
        yield ((evidence.candidate_idx >= start) & (evidence.candidate_idx < stop)).nonzero().flatten()


def _low_pass(n: int) -> torch.Tensor:
    """(n, n) in fp32: what leaves the lower half of the frequencies of n rows. Made on the CPU, once for all layers.

    cuFFT, called for each layer and chunk, ended in internal errors where processes shared a GPU.
    """
    spectrum = torch.fft.rfft(torch.eye(n), dim=0)
    spectrum[len(spectrum) // 2 :] = 0
    return torch.fft.irfft(spectrum, n=n, dim=0)


# --- others -----------------------------------------------------------------------------------------------------------


class RelaxKV(Blend):
    """Not reproduced: the tokens that the question attends to, recomputed over a context that it chooses, too.

    Built is the abstract: targets by suffix attention, recomputed over each other, what is exact and what is new. The
    suffix then sees everything. The paper's targets differ from layer to layer, which the rows of a pass cannot; how
    many tokens its context has, and how targets and context are scored, is not known.

    Source: RelaxKV (arXiv 2609.33503), abstract only; its code is not public.
    """

    def recompute(self) -> Any:
        candidates, selected = self.reuse.candidate_idx, self.selected_idx
        if self.config.recomputes_all or not len(selected):
            return super().recompute()
        load_reused(self, self.reuse.unread_idx)
        rows = merged(selected, self.reuse.unread_idx)
        outside = candidates[~torch.isin(candidates, selected)]
        self.rows_pass("targets", rows, self.model.num_layers - 1, outside)
        self.entered = None  # the suffix was no row of that pass
        fresh = self.reuse.fresh_idx
        return self.rows_pass("suffix", fresh[~torch.isin(fresh, rows)])


class CacheTune(Blend):
    """The tokens that matter by the spectrum of their stored KV, without question or fresh KV: `by_low_frequencies`,
    the same share of every chunk.

    Not reproduced: farther from a full prefill than CacheBlend's rule on all sets of docs/quality.md.
    Left out: the ratio that balances loading and computing, and the transfer. Scores are computed in the call; the
    paper computes them offline.

    Source: CacheTune (arXiv 2605.24022), its abstract, and its repository (LfLab-AI/CacheTune: `paper_algorithms`,
    `low_band_squared_norm`; keys before their rotation, each chunk's real FFT cut at half of its bins).
    """

    def evidence_at(self, check_layer: int) -> Evidence:
        return replace(super().evidence_at(check_layer), kv=self.stored)

    def stored(self, layer: int) -> tuple[KV, KV]:
        """K/V (1, Hkv, N, D) as stored, keys with their rotation off, in the places of both fresh and reused."""
        stored = [piece.entry.layer(layer) for piece in self.reuse.moved]
        turned = [(torch.empty_like(keys), torch.empty_like(values)) for keys, values in stored]
        self._to_position_0.move(layer, list(zip(stored, turned)))
        keys, values = (torch.cat(states, 2)[:, :, : len(self.reuse.candidate_idx)] for states in zip(*turned))
        return (keys, values), (keys, values)

    @cached_property
    def _to_position_0(self) -> Realigner:
        model, moved = self.model, self.reuse.moved
        cached = [piece.entry.cached_positions for piece in moved]
        moves = [(then, torch.zeros_like(then), piece.entry.regime) for then, piece in zip(cached, moved)]
        return Realigner(model.rotary_tables_of_pieces, model.rotations, moves, model.regime(self.length))


class AgentKVShift(Blend):
    """Probes are recomputed, by `by_divergence`; every other row of their chunk is moved by the mean error of the
    probes, times min(d, 1) of the row's own distance d at the check layer; K and V separately.

    Left out: K's mean is over V's probes, too, and V's over K's; the budget counts both. Errors of keys are averaged
    with their rotation off, on which the paper is silent.

    Source: AgentKVShift (arXiv 2607.21604), its abstract, and Algorithm 1 as a public reimplementation has it; the
    authors' code is not public.
    """

    def find(self) -> Reuse:
        self.shift = ProbeShift()
        self.config = replace(self.config, correction=self.shift)
        return super().find()

    def evidence_at(self, check_layer: int) -> Evidence:
        evidence = super().evidence_at(check_layer)
        kv = evidence.kv(check_layer)
        self.shift.weights = [kv_deviation(*kv, slot)[0].sqrt().clamp(max=1) for slot in _SLOTS]
        return replace(evidence, kv=lambda layer: kv)


class ProbeShift:
    """AgentKVShift's correction.

    Attributes:
        weights: of keys and of values, each (N,), how much of its chunk's mean a token takes.
    """

    weights: Sequence[torch.Tensor] = ()

    def __call__(self, errors: Errors) -> torch.Tensor:
        known, probes = errors.known, errors.piece[errors.known_idx]
        sums = known.new_zeros(known.shape[0], errors.num_pieces, known.shape[2]).index_add_(1, probes, known)
        means = sums / torch.bincount(probes, minlength=errors.num_pieces).clamp_min(1)[:, None]
        weights = self.weights[errors.slot].to(known.device)
        # the prompt's last token may be in a chunk, and is no candidate
        weights = F.pad(weights, (0, len(errors.piece) - len(weights)), value=1.0)
        return weights[:, None] * means[:, errors.piece]
