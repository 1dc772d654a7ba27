"""CacheBlend's observations, measured on your model and prompts, and their pictures.

    deviation_by_layer     how far each reused token's KV is from full prefill's             paper, figure 7
    rank_correlation       whether tokens that deviate at one layer do so at the next        paper, figure 8
    attention_deviation    how far the suffix's attention is off, by recompute ratio         paper, figure 6

The figures need matplotlib (`pip install "hfblend[plots]"`): `figure.savefig(...)`, or the last line of a cell.

Shapes: H heads, Hkv KV heads, T all tokens, N moved reused tokens, S rows of the suffix, D head_dim, L layers.

Source: CacheBlend (arXiv 2405.16444) section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..attention.record import AttentionRecord
from ..blend.caches import BlendingCache, RecordingCache
from ..blend.model import Pass
from ..blend.selection import kv_deviation
from ..config import BlendConfig
from ..display import palette
from ..display.plots import new_figure
from ..generate.blending import Blending
from ..kernels.reference import AttentionArgs, attention_weights
from ..kv.rows import KV
from ..measure.calibrate import with_ratio
from ..model.hf_model import CACHE
from ..model.passes import run_rows
from ..prompts.prompt import Prompt
from ..store import MemoryStore, Store
from ..support.registry import TestedModel, model_of
from ..util import StopForward

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# --- deviation of KV --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Deviations:
    """Squared L2 distance of each moved token's reused from full prefill's K and V, summed over heads, in fp32.

    Attributes:
        token_idx: (N,) positions of the tokens in the prompt.
        key, value: (L, N). At layer 0 neither depends on context, so there is rounding only.
    """

    token_idx: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@torch.no_grad()
def deviation_by_layer(
    model: nn.Module, prompt: Prompt, *, store: Store | None = None, config: BlendConfig | None = None
) -> Deviations:
    """Measures how far isolated chunk KV, realigned, is from full prefill's at every layer.

    Nothing is recomputed: plain full reuse would leave this KV in the cache.

    >>> deviations = deviation_by_layer(model, prompt)  # doctest: +SKIP
    >>> figure_of_deviation(deviations.value, layers=(1, 8, 16))  # doctest: +SKIP

    Args:
        model, prompt, store: as in `hfblend.blend`.
        config: its `chunk_prefix` counts; chunks are computed in isolation whatever its `on_miss` is.

    Raises:
        ValueError: a prompt in which nothing was moved.
    """
    hf_model, config = model_of(model), replace(config or BlendConfig(), on_miss="isolated")
    state = _blending(hf_model, prompt, MemoryStore() if store is None else store, config)
    blend = state.stopped_at("realigned", hf_model.last_logits)
    reused, token_idx = blend.reused, blend.reuse.candidate_idx
    if token_idx.numel() == 0:
        raise ValueError("No token of this prompt is reused from elsewhere; it needs chunks that do not stand first.")
    key, value = [], []
    for layer, full in sorted(_full_prefill_kv(hf_model, prompt).items()):
        moved_keys, moved_values = reused.moved_kv(layer, full)
        fresh: KV = (full[0].index_select(2, token_idx), full[1].index_select(2, token_idx))  # (1, Hkv, N, D)
        stored: KV = (moved_keys[:, :, : len(token_idx)], moved_values[:, :, : len(token_idx)])
        key.append(kv_deviation(fresh, stored, "key")[0].cpu())
        value.append(kv_deviation(fresh, stored, "value")[0].cpu())
    return Deviations(token_idx.cpu(), torch.stack(key), torch.stack(value))


def share_of_deviation(deviation: torch.Tensor, token_share: float) -> torch.Tensor:
    """The share (L,) of a layer's deviation (L, N) that its most deviating tokens carry; NaN for one without any.

    >>> share_of_deviation(torch.tensor([[6.0, 2.0, 1.0, 1.0]]), 0.25)
    tensor([0.6000])

    Args:
        token_share: of the N tokens, in [0, 1]; rounded to whole tokens.
    """
    count = round(token_share * deviation.shape[-1])
    return deviation.topk(count, dim=-1).values.sum(-1) / deviation.sum(-1)


# --- rank correlation -------------------------------------------------------------------------------------------------


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks (N,) of scores (N,), 1 for the lowest; equal scores share the mean of their ranks.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def rank_correlation_matrix(deviation: torch.Tensor) -> torch.Tensor:
    """Spearman's ρ (L, L) between any two layers' scores (L, N): Pearson's correlation of their ranks; NaN for a layer
    whose scores are all equal."""
    return torch.stack([ranks(scores) for scores in deviation]).corrcoef().float()


def rank_correlation(deviation: torch.Tensor) -> torch.Tensor:
    """Spearman's ρ (L − 1,) between a layer's scores (L, N) and the next's; high if tokens chosen at one layer serve
    the others.

    >>> rank_correlation(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [3.0, 2.0, 1.0]]))
    tensor([ 1., -1.])
    """
    return rank_correlation_matrix(deviation).diagonal(1)


# --- deviation of attention -------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_deviation(
    model: nn.Module,
    prompt: Prompt,
    ratios: Sequence[float],
    *,
    store: Store | None = None,
    config: BlendConfig | None = None,
) -> torch.Tensor:
    r"""Measures how far the suffix's attention over blended KV is from that over full prefill's KV, by recompute ratio.

        Δ = ‖A_blended − A_full‖₂ of each row of the suffix,   A = softmax(QKᵀ · scaling)   (H, S, T)

    averaged over rows and heads. Both matrices come from the model's own forward of the suffix rows over the KV of the
    blend, or of the full prefill; the attention of blending's passes records them, so that the model keeps its kernel.

    Args:
        ratios: each in [0, 1].
        store, config: as in `hfblend.blend`; the ratio of the config is not used.

    Returns:
        (len(ratios), L)

    Raises:
        ValueError: a prompt without chunks, or a model whose attention cannot be replaced by ours for a pass.
    """
    hf_model, config, store = model_of(model), config or BlendConfig(), MemoryStore() if store is None else store
    if not prompt.chunk_spans:
        raise ValueError("attention_deviation needs a prompt with chunks, got none.")
    if not hf_model.attends_by_position:
        raise ValueError(f"The attention of {type(model).__name__} cannot be recorded.")
    full = _attend_again(hf_model, prompt, _full_prefill_kv(hf_model, prompt), lambda layer, weights: weights.cpu())

    def distance(layer: int, weights: torch.Tensor) -> float:
        return (weights - full[layer].to(weights.device)).norm(dim=-1).mean().item()

    rows = []
    for ratio in ratios:
        state = _blending(hf_model, prompt, store, with_ratio(config, ratio))
        state.run(hf_model.last_logits)
        rows.append(_attend_again(hf_model, prompt, state.buffers, distance))
    return torch.tensor(rows)


class _SuffixAttention(AttentionRecord):
    """Keeps what a function makes of every layer's attention weights (H, S, T)."""

    def __init__(self, num_layers: int, keep: Callable[[int, torch.Tensor], Any]) -> None:
        super().__init__(range(num_layers))
        self.keep, self.found = keep, list[Any]()

    def add(self, layer: int, args: AttentionArgs, seen: torch.Tensor) -> None:
        self.found.append(self.keep(layer, attention_weights(args, seen)[0]))
        if layer == max(self.layers):
            raise StopForward


def _attend_again(
    hf_model: TestedModel, prompt: Prompt, buffers: dict[int, KV], keep: Callable[[int, torch.Tensor], Any]
) -> list[Any]:
    """Runs the suffix's rows over a prompt's KV, and returns the records of `_SuffixAttention` by layer."""
    length, record = len(prompt), _SuffixAttention(hf_model.num_layers, keep)
    rows = torch.arange(min(prompt.chunk_spans[-1][1], length - 1), length, device=hf_model.device)
    cache = BlendingCache(hf_model.num_layers, buffers, rows, length)
    one = Pass(prompt.input_ids.to(hf_model.device)[:, rows], rows, rows, length, record=record)
    hf_model.lock.exclusive(run_rows, hf_model, hf_model.decoder_forward, one, cache)
    return record.found


def _blending(hf_model: TestedModel, prompt: Prompt, store: Store, config: BlendConfig) -> Blending:
    return Blending(hf_model, prompt.input_ids.to(hf_model.device), prompt.chunk_spans, store, config)


def _full_prefill_kv(hf_model: TestedModel, prompt: Prompt) -> dict[int, KV]:
    """K/V (1, Hkv, T, D) of every layer, from one stock forward."""
    cache = RecordingCache(hf_model.num_layers)
    ids = prompt.input_ids.to(hf_model.device)
    hf_model.lock.shared(hf_model.decoder_forward, input_ids=ids, use_cache=True, **{CACHE: cache})
    return cache.recorded


# --- figures ----------------------------------------------------------------------------------------------------------


def figure_of_deviation(deviation: torch.Tensor, layers: Sequence[int] | None = None) -> Figure:
    """Left: each token's deviation over the layer's mean, from the highest down. Right: the share they carry together.

    Args:
        deviation: (L, N), say `Deviations.value`.
        layers: to draw; by default four, spread over 1 … L − 1.
    """
    num_layers, num_tokens = deviation.shape
    layers = sorted({round(i) for i in torch.linspace(1, num_layers - 1, 4).tolist()}) if layers is None else layers
    figure, (left, right) = new_figure(9.6, 3.8, 2)
    percent = 100 * torch.arange(1, num_tokens + 1) / num_tokens
    for layer, how in zip(layers, _line_styles()):
        falling = deviation[layer].double().sort(descending=True).values
        left.plot(percent, falling / falling.mean(), label=f"layer {layer}", **how)
        right.plot(percent, 100 * falling.cumsum(0) / falling.sum(), label=f"layer {layer}", **how)
    right.plot([0, 100], [0, 100], color="0.7", linewidth=1, zorder=0)
    right.axvspan(10, 15, color="0.9", zorder=0)
    right.annotate("10–15 % of tokens", (15.5, 3), color="0.35", fontsize=9)
    left.set(xlabel="tokens, most deviating first (%)", ylabel="deviation ÷ mean of the layer", yscale="log")
    right.set(xlabel="tokens, most deviating first (%)", ylabel="share of the layer's deviation (%)", ylim=(0, 102))
    right.legend(frameon=False, loc="lower right")
    return figure


def figure_of_rank_correlation(matrix: torch.Tensor) -> Figure:
    """A heat map of `rank_correlation_matrix` (L, L), both axes layers."""
    figure, (axes,) = new_figure(4.8, 3.8)
    lowest = min(0.0, matrix.nan_to_num(nan=0.0).min().item())
    image = axes.imshow(matrix, cmap="cividis", vmin=lowest, vmax=1, origin="lower")
    axes.set(xlabel="layer", ylabel="layer")
    axes.spines[["top", "right"]].set_visible(True)
    figure.colorbar(image, label="Spearman's ρ of the tokens' deviation")
    return figure


def figure_of_attention_deviation(ratios: Sequence[float], deviations: Mapping[str, torch.Tensor]) -> Figure:
    """Mean over layers of `attention_deviation` against the recompute ratio, a line per setting.

    >>> figure_of_attention_deviation(ratios, {"suffix attention": one, "KV deviation": other})  # doctest: +SKIP

    Args:
        ratios: R of them.
        deviations: label -> (R, L).
    """
    figure, (axes,) = new_figure(4.8, 3.8)
    for (label, deviation), how, marker in zip(deviations.items(), _line_styles(), "osD^vPX"):
        axes.plot([100 * ratio for ratio in ratios], deviation.mean(-1), marker=marker, label=label, **how)
    axes.set(xlabel="recomputed tokens (%)", ylabel="deviation of the suffix's attention, L2", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def _line_styles() -> list[dict[str, str]]:
    return [{"color": colour, "linestyle": stroke} for colour, stroke in zip(palette.LINES, cycle(palette.STROKES))]
