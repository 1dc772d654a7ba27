"""The settings with the smallest ratio that keeps blending within a bound of full prefill, for your prompts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import get_args

import torch
from torch import nn

from ..arguments import described, number_in
from ..config import BlendConfig, Correction, as_config
from ..generate.blending import blend, require_prompts
from ..prompts.prompt import Prompt
from ..store import Store, store_at
from ..trace.progress import told
from .divergence import RATIOS, FullAnswer, kl_divergence, require_bound, teacher_forced_logits, top1_agreement
from .results import Calibration, CalibrationRow

Layers = int | Sequence[int] | None


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    max_kl: float,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[Layers] | None = None,
    num_tokens: int = 16,
) -> Calibration:
    """Finds the smallest ratio whose KL from full prefill, mean over the prompts, is at most `max_kl`.

    Ratios are tried from the smallest up, and none above the first that fits. Each is tried with and without the
    correction of rows that stay reused: which is closer depends on model and text. Each prompt is prefilled in full
    once; its chunks are prefilled once, into the store.

    >>> calibration = calibrate(model, prompts, max_kl=0.05)  # doctest: +SKIP
    >>> blender.config = calibration.config  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, patched or not.
        prompts: such as the model will get.
        max_kl: in nats.
        store: default, a new `MemoryStore` for all prompts.
        config: whose ratio and correction are sought. Of several check layers each gets the same ratio.
        ratios: to choose from.
        layers: to choose from too, at each ratio the one with the smallest KL. With `selection="kv_deviation"` they
            are check layers, with `"suffix_attention"` score layers; each is a layer, several, or `None`.
        num_tokens: of each answer that are compared.

    Raises:
        ValueError: no ratio meets the bound (1.0 does, up to the dtype's rounding), no prompts, no ratios, or layers
            for another selection rule.
        TypeError: an argument of another type.
    """
    require_bound(max_kl)
    prompts, store = require_prompts(prompts, "calibrate"), store_at(store)
    candidates, ratios = _candidates(as_config(config), layers), _ratios(ratios)
    with told("Prefilling in full", total=len(prompts)) as line:
        answers = []
        for prompt in prompts:
            answers.append((prompt, FullAnswer.of(model, prompt, num_tokens)))
            line.advance()
    rows: list[CalibrationRow] = []
    for ratio in ratios:
        settings = [with_ratio(one, ratio) for one in (_with_corrections(candidates) if 0 < ratio < 1 else candidates)]
        rows += [_verified(model, answers, store, one) for one in settings]
        of_ratio = rows[-len(settings) :]
        best = min(of_ratio, key=_distance)
        if best.kl <= max_kl:
            return Calibration(settings[of_ratio.index(best)], max_kl, rows)
    best = min(rows, key=_distance)
    raise ValueError(
        f"No ratio of {tuple(ratios)} meets max_kl={max_kl}: the smallest mean KL is {best.kl:.3g} nats, "
        f"at ratio {best.recompute_ratio}. Ratio 1.0 is a full prefill up to the dtype's rounding; raise max_kl or add "
        "higher ratios."
    )


def with_ratio(config: BlendConfig, ratio: float) -> BlendConfig:
    """The same settings with another ratio, at each check layer if there are several.

    Raises:
        ValueError: settings that select nothing.
    """
    if not config.check_layers:
        raise ValueError("These settings have check_layers=(), which selects nothing at any ratio; name a check layer.")
    return replace(config, recompute_ratios=(ratio,) * len(config.check_layers))


def _verified(
    model: nn.Module, answers: list[tuple[Prompt, FullAnswer]], store: Store, config: BlendConfig
) -> CalibrationRow:
    kls, agreements, shares = [], [], []
    with told(f"Trying ratio {config.fixed_ratios[0]:g}", total=len(answers)) as line:
        for prompt, answer in answers:
            result = blend(model, prompt, store=store, config=config)
            logits = teacher_forced_logits(model, prompt.input_ids, answer.ids, result.cache)
            kls.append(kl_divergence(answer.logits, logits).mean().item())
            agreements.append(top1_agreement(answer.logits, logits))
            shares.append(result.trace.recomputed_pairs_share)
            line.advance()
    layers = getattr(config, _layers_field(config) or "check_layers")
    return CalibrationRow(
        config.fixed_ratios[0], layers, config.correction, mean(kls), max(kls), mean(agreements), mean(shares)
    )


def _layers_field(config: BlendConfig) -> str | None:
    """The field with the layers that a selection rule looks at; `None` if it has none, or several."""
    fields = {"kv_deviation": "check_layers", "suffix_attention": "score_layers"}
    return None if callable(config.selection) else fields.get(config.selection)


def _candidates(config: BlendConfig, layers: Sequence[Layers] | None) -> list[BlendConfig]:
    """The settings with each of the given layers; unchanged if none are given."""
    if layers is None:
        return [config]
    name = _layers_field(config)
    if isinstance(layers, str | bytes | Mapping) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a list of candidates, got {described(layers)}; write [{described(layers)}].")
    if name is None or not layers:
        raise ValueError(
            'layers needs one or more candidates, and selection "kv_deviation" or "suffix_attention", got '
            f"layers={layers!r} with selection={config.selection!r}."
        )
    return [_with_layers(config, name, wanted) for wanted in layers]


def _with_corrections(candidates: list[BlendConfig]) -> list[BlendConfig]:
    """Each of the settings with its own correction, with the built-in ones, and with none."""
    return [
        replace(one, correction=correction)
        for one in candidates
        for correction in dict.fromkeys((one.correction, None, *get_args(Correction)))
    ]


def _with_layers(config: BlendConfig, name: str, wanted: Layers) -> BlendConfig:
    chosen = (wanted,) if isinstance(wanted, int) else None if wanted is None else tuple(wanted)
    if name == "score_layers":
        return replace(config, score_layers=chosen)
    if not chosen:
        raise ValueError(f"Each of layers must name check layers for kv_deviation, got {wanted!r}.")
    return replace(config, check_layers=chosen, recompute_ratios=(config.fixed_ratios or (1.0,))[:1] * len(chosen))


def _distance(row: CalibrationRow) -> float:
    """Its KL; broken logits (NaN) are the farthest."""
    return math.inf if math.isnan(row.kl) else row.kl


def _ratios(ratios: Sequence[float]) -> list[float]:
    """The ratios to try, the smallest first."""
    if isinstance(ratios, str | bytes | Mapping) or not isinstance(ratios, Iterable):
        raise TypeError(f"ratios must be a list of ratios to try, got {described(ratios)}.")
    found = sorted({number_in("Each of ratios", ratio, 0, 1) for ratio in ratios})
    if not found:
        raise ValueError("ratios needs one or more ratios to try, got none.")
    return found
