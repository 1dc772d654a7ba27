"""The distance of blending from full prefill on your prompts: verified on request, or at every k-th prompt in use.

Both are given the tokens of full prefill's greedy answer (teacher forcing), and the two distributions of each next
token are compared.

    full prefill    prompt ──► a b c d …        greedy; its logits are P(next)
    blended         prompt ──► ? ? ? ?          shown a, b, c …: its logits are Q(next)       KL(P ‖ Q), nats

The end token does not stop the answer: `min_new_tokens` forbids every end-of-sequence id, so that each prompt counts
with the same number of tokens. Everything here is greedy and draws no random numbers.

Shapes: P predicted tokens, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from ..arguments import described, known_fields, whole
from ..config import BlendConfig, as_config
from ..generate.blending import blend, require_prompt
from ..locks import Mutex
from ..prompts.prompt import Prompt
from ..store import Store
from ..trace.trace import BlendTrace
from .divergence import FullAnswer, greedy, kl_divergence, require_bound, teacher_forced_logits, top1_agreement
from .results import Verification, first_difference

logger = logging.getLogger(__name__)

# --- one prompt -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def verify_prompt(
    model: nn.Module,
    prompt: Prompt,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    config: BlendConfig | None = None,
    num_tokens: int = 16,
) -> Verification:
    """Prefills a prompt in full and blends it, and returns how far the two are apart.

    >>> print(verify_prompt(model, prompt, store=store))  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode, patched or not; its full prefill is stock in either case.
        prompt, store, config: as in `hfblend.blend`; `recompute_ratios="auto"` counts as `least_ratio`.
        num_tokens: P.

    Raises:
        ValueError, TypeError: `num_tokens` below 1, or as `hfblend.blend`.
    """
    prompt, config = require_prompt(prompt), as_config(config).settled()
    full = FullAnswer.of(model, prompt, num_tokens)
    result = blend(model, prompt, store=store, config=config)
    logits = teacher_forced_logits(model, prompt.input_ids, full.ids, copy.deepcopy(result.cache)).float()
    blended_ids, _ = greedy(model, prompt, num_tokens, cache=result.cache)
    return Verification(
        kl=kl_divergence(full.logits, logits).mean().item(),
        largest_logit_difference=(full.logits - logits).abs().max().item(),
        top1_agreement=top1_agreement(full.logits, logits),
        first_difference=first_difference(full.ids, blended_ids),
        full_answer_ids=full.ids,
        blended_answer_ids=blended_ids,
        recomputed_pairs_share=result.trace.recomputed_pairs_share,
        trace=result.trace,
    )


# --- every k-th prompt ------------------------------------------------------------------------------------------------


@known_fields({"k": "every", "bound": "max_kl", "kl": "max_kl", "tokens": "num_tokens"})
@dataclass(frozen=True, kw_only=True)
class Verify:
    """Settings of verifying: every how many blended prompts of a patched model are compared with full prefill.

    >>> hfblend.patch(model, verify=hfblend.Verify(every=50, max_kl=0.1))  # doctest: +SKIP

    Args:
        every: the k-th, 2k-th, … blended prompt is verified when its call is done; a batch has several prompts. Turns
            that continue a cache are not counted.
        max_kl: in nats; a mean KL above it is logged as a warning.
        num_tokens: answer tokens that are compared. Verifying costs a full prefill, a blended one, and these.

    Raises:
        ValueError, TypeError: `every` or `num_tokens` below 1, a negative bound, or no numbers.
    """

    every: int = 50
    max_kl: float = 0.1
    num_tokens: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "num_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        require_bound(self.max_kl)


class Verifier:
    """Counts the blended prompts of one blender, in all threads together, and verifies those that are due.

    Args:
        settings: or k, for `Verify(every=k)`.
    """

    def __init__(self, settings: Verify | int) -> None:
        if isinstance(settings, bool) or not isinstance(settings, Verify | Integral):
            raise TypeError(f"verify must be a hfblend.Verify, or every how many prompts, got {described(settings)}.")
        self.settings = settings if isinstance(settings, Verify) else Verify(every=settings)
        self._lock, self._calls = Mutex(), 0

    def after(self, model: nn.Module, prompt: Prompt, store: Store, config: BlendConfig, trace: BlendTrace) -> None:
        """Verifies a finished call if its turn has come, and notes the outcome in its trace. Never raises."""
        with self._lock:
            self._calls += 1
            due = self._calls % self.settings.every == 0
        if not due:
            return
        try:
            found = verify_prompt(model, prompt, store=store, config=config, num_tokens=self.settings.num_tokens)
        except Exception as error:  # the user's call has its output already, and keeps it
            trace.verification = {"error": f"{type(error).__name__}: {error}"}
            _note(trace, logging.WARNING, f"Could not be verified: {trace.verification['error']}", error)
            return
        max_kl = self.settings.max_kl
        outcome = {name: value for name, value in vars(found).items() if name != "trace"}
        trace.verification = {**outcome, "max_kl": max_kl, "within_bound": found.kl <= max_kl}
        if found.kl <= max_kl:
            _note(trace, logging.INFO, f"Verified: {found}.")
        else:
            cure = "Blender.blame says which chunks make it so; Blender.calibrate finds a ratio within the bound"
            _note(trace, logging.WARNING, f"Verified, and above the bound of {max_kl} nats: {found}. {cure}.")


def _note(trace: BlendTrace, level: int, note: str, error: Exception | None = None) -> None:
    trace.notes.append(note)
    logger.log(level, "%s", note, exc_info=error)
