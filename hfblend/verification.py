"""How far blending is from full prefill on prompts of your own, and the settings that keep it within a bound.

Compared is full prefill's own greedy answer: the same tokens are given to both (teacher forcing), and the two
distributions of each next token are held against each other.

    full prefill    prompt ──► a b c d …        greedy; its logits are P(next)
    blended         prompt ──► ? ? ? ?          shown a, b, c …: its logits are Q(next)       KL(P ‖ Q), nats

The end token does not stop the answer: `min_new_tokens` forbids every end-of-sequence id, so that each prompt counts
with the same number of tokens. Everything here is greedy and draws no random numbers.

Shapes: P predicted tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import nn

from .blending import blend
from .config import BlendConfig
from .measures import kl_divergence, teacher_forced_logits, top1_agreement
from .models import host_of
from .prompt import Prompt
from .store import MemoryStore, Store
from .trace import BlendTrace

logger = logging.getLogger(__name__)

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)

Layers = int | Sequence[int] | None


# --- one prompt -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """How close a blended prompt came to its full prefill, over the first tokens of full prefill's greedy answer.

    Attributes:
        kl: KL(full prefill ‖ blended) in nats, mean over the tokens.
        largest_logit_difference: over all tokens and the whole vocabulary.
        top1_agreement: share in [0, 1] of tokens whose most likely token is the same.
        first_difference: index of the first token at which the two greedy answers part; `None` if they are equal.
        full_answer_ids, blended_answer_ids: the greedy answers, each going its own way.
        recomputed_pairs_share: computed (token, layer) pairs over those of a full prefill.
        trace: of the blended prompt.
    """

    kl: float
    largest_logit_difference: float
    top1_agreement: float
    first_difference: int | None
    full_answer_ids: list[int]
    blended_answer_ids: list[int]
    recomputed_pairs_share: float
    trace: BlendTrace = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, for JSON; the trace too."""
        return {**vars(self), "trace": self.trace.to_dict()}

    def __str__(self) -> str:
        count = len(self.full_answer_ids)
        answers = "same answer" if self.first_difference is None else f"answers part at token {self.first_difference}"
        return (
            f"KL {self.kl:.2e} nats over {count} tokens, top-1 agreement {self.top1_agreement:.0%}, {answers}, largest "
            f"logit difference {self.largest_logit_difference:.2e}, {self.recomputed_pairs_share:.1%} of a full "
            "prefill's (token, layer) pairs"
        )


@torch.no_grad()
def verify_prompt(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | None = None,
    config: BlendConfig | None = None,
    num_tokens: int = 16,
) -> Verification:
    """Prefills a prompt in full and blends it, and says how far the two are apart.

    >>> print(verify_prompt(model, prompt, store=store))  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, patched or not; its full prefill is stock in either case.
        prompt, store, config: as in `hfblend.blend`.
        num_tokens: P.

    Raises:
        ValueError: `num_tokens` below 1, or as `hfblend.blend`.
    """
    full = FullAnswer.of(model, prompt, num_tokens)
    result = blend(model, prompt, store=store, config=config)
    logits = teacher_forced_logits(model, prompt.input_ids, full.ids, copy.deepcopy(result.cache)).float()
    blended_ids, _ = _greedy(model, prompt, num_tokens, past_key_values=result.cache)
    return Verification(
        kl=kl_divergence(full.logits, logits).mean().item(),
        largest_logit_difference=(full.logits - logits).abs().max().item(),
        top1_agreement=top1_agreement(full.logits, logits),
        first_difference=next((i for i, (a, b) in enumerate(zip(full.ids, blended_ids)) if a != b), None),
        full_answer_ids=full.ids,
        blended_answer_ids=blended_ids,
        recomputed_pairs_share=result.trace.recomputed_pairs_share,
        trace=result.trace,
    )


@dataclass(frozen=True)
class FullAnswer:
    """Full prefill's greedy answer to a prompt: P ids, and the logits (P, V) in fp32 that each was chosen by."""

    ids: list[int]
    logits: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, prompt: Prompt, num_tokens: int) -> FullAnswer:
        """One full prefill; prefilling and decoding are the model's own."""
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
            raise ValueError(f"num_tokens must be 1 or more tokens, got {num_tokens!r}.")
        return cls(*_greedy(model, prompt, num_tokens))


def _greedy(model: nn.Module, prompt: Prompt, num_tokens: int, **kwargs: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, and the logits (P, V) before any processor changed them, of stock `generate`.

    The class's own `generate` is called, past a wrapper on the instance: it neither blends nor leaves a trace.
    """
    input_ids = prompt.input_ids.to(host_of(model).device)
    kind: Any = type(model)
    output = kind.generate(
        model,
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        do_sample=False,
        **dict.fromkeys(("temperature", "top_p", "top_k")),  # settings of sampling, which warn without it
        num_beams=1,
        num_return_sequences=1,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return output.sequences[0, input_ids.shape[1] :].tolist(), torch.cat(output.logits).float()


# --- every k-th call --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Which blended calls of a patched model are checked against full prefill, once they are done.

    >>> hfblend.patch(model, verify=hfblend.Verify(every=50, max_kl=0.1))  # doctest: +SKIP

    Args:
        every: the k-th, 2k-th, … blended call of the blender is checked.
        max_kl: in nats; a mean KL above it is logged as a warning.
        num_tokens: answer tokens that are compared. A check costs a full prefill, a blended one, and these.

    Raises:
        ValueError: `every` or `num_tokens` below 1, or a negative bound.
    """

    every: int = 50
    max_kl: float = 0.1
    num_tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "num_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}.")
        _require_bound(self.max_kl)


class Verifier:
    """Counts the blended calls of one blender, in all threads together, and checks those that are due.

    Args:
        settings: or k, for `Verify(every=k)`.
    """

    def __init__(self, settings: Verify | int) -> None:
        self.settings = settings if isinstance(settings, Verify) else Verify(every=settings)
        self._lock, self._calls = threading.Lock(), 0

    def after(self, model: nn.Module, prompt: Prompt, store: Store, config: BlendConfig, trace: BlendTrace) -> None:
        """Checks a finished call if its turn has come, and notes the outcome in its trace. Never raises."""
        with self._lock:
            self._calls += 1
            due = self._calls % self.settings.every == 0
        if not due:
            return
        try:
            found = verify_prompt(model, prompt, store=store, config=config, num_tokens=self.settings.num_tokens)
        except Exception as error:  # the user's call has its output already, and keeps it
            self._note(trace, {"error": f"{type(error).__name__}: {error}"}, "Could not be verified", error)
            return
        outcome = {name: value for name, value in vars(found).items() if name != "trace"}
        outcome |= {"max_kl": self.settings.max_kl, "within_bound": found.kl <= self.settings.max_kl}
        if outcome["within_bound"]:
            self._note(trace, outcome, f"Verified: {found}.")
        else:
            cure = "Raise the ratio (Blender.calibrate finds one), or look at what the store holds"
            self._note(
                trace, outcome, f"Verified, and above the bound of {self.settings.max_kl} nats: {found}. {cure}."
            )

    @staticmethod
    def _note(trace: BlendTrace, outcome: dict[str, Any], note: str, error: Exception | None = None) -> None:
        trace.verification = outcome
        trace.notes.append(note if error is None else f"{note}: {outcome['error']}")
        level = logging.INFO if outcome.get("within_bound") else logging.WARNING
        logger.log(level, "%s", trace.notes[-1], exc_info=error)


# --- settings that meet a bound ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationRow:
    """One setting, over all prompts.

    Attributes:
        recompute_ratio: of each check layer.
        layers: the check layers, or for `"suffix_attention"` the score layers (`None`: its own choice).
        kl: in nats, mean over the prompts; `largest_kl`, of the worst prompt.
        top1_agreement, recomputed_pairs_share: mean over the prompts.
    """

    recompute_ratio: float
    layers: tuple[int, ...] | None
    kl: float
    largest_kl: float
    top1_agreement: float
    recomputed_pairs_share: float


@dataclass(frozen=True)
class Calibration:
    """The settings with the smallest ratio that meets the bound, and what was measured on the way there."""

    config: BlendConfig
    max_kl: float
    rows: list[CalibrationRow]

    def __str__(self) -> str:
        lines = [f"{'ratio':>6} {'layers':>12} {'KL, nats':>10} {'largest':>10} {'top-1':>6} {'pairs':>6}"]
        for row in self.rows:
            layers = "default" if row.layers is None else ",".join(map(str, row.layers))
            lines.append(
                f"{row.recompute_ratio:6.2f} {layers:>12} {row.kl:10.2e} {row.largest_kl:10.2e} "
                f"{row.top1_agreement:6.0%} {row.recomputed_pairs_share:6.1%}"
            )
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    max_kl: float,
    store: Store | None = None,
    config: BlendConfig | None = None,
    ratios: Sequence[float] = RATIOS,
    layers: Sequence[Layers] | None = None,
    num_tokens: int = 16,
) -> Calibration:
    """Finds the smallest ratio whose KL from full prefill, mean over the prompts, is at most `max_kl`.

    Ratios are tried from the smallest up, and none above the first that fits. Each prompt is prefilled in full once;
    its chunks are prefilled once, into the store.

    >>> calibration = calibrate(model, prompts, max_kl=0.05)  # doctest: +SKIP
    >>> blender.config = calibration.config  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, patched or not.
        prompts: such as the model will get.
        max_kl: in nats.
        store: default, a new `MemoryStore` for all prompts.
        config: whose ratio is sought. Of several check layers each gets the same ratio.
        ratios: to choose from.
        layers: to choose from too, at each ratio the one with the smallest KL. With `selection="kv_deviation"` they
            are check layers, with `"suffix_attention"` score layers; each is a layer, several, or `None`.
        num_tokens: of each answer that are compared.

    Raises:
        ValueError: no ratio meets the bound (1.0 does, up to the dtype's rounding), no prompts, no ratios, or layers
            for another selection rule.
    """
    _require_bound(max_kl)
    prompts, store = _listed(prompts), MemoryStore() if store is None else store
    candidates = _candidates(BlendConfig() if config is None else config, layers)
    if not ratios:
        raise ValueError("ratios needs one or more ratios to try, got none.")
    full = [FullAnswer.of(model, prompt, num_tokens) for prompt in prompts]
    rows: list[CalibrationRow] = []
    for ratio in sorted(set(ratios)):
        measured = [
            (_measure(model, prompts, full, store, settings), settings)
            for settings in (with_ratio(candidate, ratio) for candidate in candidates)
        ]
        rows += [row for row, _ in measured]
        best, settings = min(measured, key=lambda pair: _no_nan(pair[0].kl))
        if best.kl <= max_kl:
            return Calibration(settings, max_kl, rows)
    best = min(rows, key=lambda row: _no_nan(row.kl))
    raise ValueError(
        f"No ratio of {tuple(sorted(set(ratios)))} meets max_kl={max_kl}: the smallest mean KL is {best.kl:.3g} nats, "
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


def _measure(
    model: nn.Module, prompts: list[Prompt], full: list[FullAnswer], store: Store, config: BlendConfig
) -> CalibrationRow:
    kls, agreements, shares = [], [], []
    for prompt, answer in zip(prompts, full):
        result = blend(model, prompt, store=store, config=config)
        logits = teacher_forced_logits(model, prompt.input_ids, answer.ids, result.cache)
        kls.append(kl_divergence(answer.logits, logits).mean().item())
        agreements.append(top1_agreement(answer.logits, logits))
        shares.append(result.trace.recomputed_pairs_share)
    layers = getattr(config, _layers_field(config) or "check_layers")
    return CalibrationRow(config.recompute_ratios[0], layers, mean(kls), max(kls), mean(agreements), mean(shares))


def _layers_field(config: BlendConfig) -> str | None:
    """The field with the layers that a selection rule looks at, if it has just one."""
    fields = {"kv_deviation": "check_layers", "suffix_attention": "score_layers"}
    return None if callable(config.selection) else fields.get(config.selection)


def _candidates(config: BlendConfig, layers: Sequence[Layers] | None) -> list[BlendConfig]:
    """The settings with each of the given layers; only themselves if none are given."""
    if layers is None:
        return [config]
    name = _layers_field(config)
    if name is None or not layers:
        raise ValueError(
            'layers needs one or more candidates, and selection "kv_deviation" or "suffix_attention", got '
            f"layers={layers!r} with selection={config.selection!r}."
        )
    found = []
    for wanted in layers:
        chosen = (wanted,) if isinstance(wanted, int) else None if wanted is None else tuple(wanted)
        if name == "check_layers":
            if not chosen:
                raise ValueError(f"Each of layers must name check layers for kv_deviation, got {wanted!r}.")
            ratios = (config.recompute_ratios or (1.0,))[:1] * len(chosen)
            found.append(replace(config, check_layers=chosen, recompute_ratios=ratios))
        else:
            found.append(replace(config, score_layers=chosen))
    return found


def _no_nan(kl: float) -> float:
    """A KL to compare by: broken logits (NaN) are the farthest."""
    return math.inf if math.isnan(kl) else kl


def _listed(prompts: Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, Prompt):
        raise TypeError("prompts must be a list of prompts, got one prompt; write [prompt].")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("calibrate needs one or more prompts, got none.")
    return prompts


def _require_bound(max_kl: Any) -> None:
    if isinstance(max_kl, bool) or not isinstance(max_kl, int | float) or not max_kl >= 0:
        raise ValueError(f"max_kl must be 0 or more nats, got {max_kl!r}.")
