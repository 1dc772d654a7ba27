"""A last look at the forward that prefills: whether the rows of a blend are all that it was asked for.

Shapes: B rows of the batch, k copies of each that beams and returned sequences need, T columns, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..model.hf_model import CACHE_NAMES, cache_given, is_token_input
from ..model.weights import adapters
from ..support.registry import TestedModel
from .fallbacks import Fallback
from .hand_over import is_foreign

_LOGITS = ("logits_to_keep", "num_logits_to_keep")  # the latter in older code of models
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_READ_HERE = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES)


@dataclass
class Asked:
    """A forward over the prompts and its arguments; a blend computes only the last row of each prompt.

    Args:
        hf_model: the model.
        num_tokens: T.
        num_given: of them, those in the cache; the forward has the others.
        lengths: (B,) tokens of each row's prompt, without its padding.
        ids: (B · k, T or more), with the draft tokens that follow the prompts.
        decoder: the other arguments of the decoder's forward.
        model: those of the whole model's forward; `None` if the decoder was called without it.
        by_stock: whether Transformers' own loop calls it, which reads no more rows than it needs.
    """

    hf_model: TestedModel
    num_tokens: int
    num_given: int
    lengths: list[int]
    ids: torch.Tensor
    decoder: dict[str, Any]
    model: dict[str, Any] | None
    by_stock: bool

    @cached_property
    def _modules(self) -> tuple[Any, Any]:
        """The decoder and the model."""
        return self.hf_model.decoder, self.hf_model.model

    def reason_against(self) -> Fallback | None:
        """Returns why the forward, and with it the call, is not blended."""
        if changed := self._changed_meanwhile():
            return changed
        if self.model is None or self._wants_more(self.model) or self._has_output_hooks():
            return Fallback.ALL_ROWS_WANTED
        if not self._setting("use_cache"):
            return Fallback.NO_CACHE
        if is_foreign(cache_given(self.decoder)):
            return Fallback.FOREIGN_CACHE
        if not self._masks_padding_only(self.decoder.get("attention_mask")):
            return Fallback.PADDING
        others = (value for name, value in self.decoder.items() if name not in _READ_HERE)
        if any(is_token_input(value, self.ids[:, self.num_given :]) for value in others):
            return Fallback.EXTRA_INPUTS
        return None if self._counts_from_0(self.decoder.get("position_ids")) else Fallback.POSITIONS

    def _changed_meanwhile(self) -> Fallback | None:
        """Returns what has changed since `generate` began: code that is not Transformers' has run since."""
        if self.hf_model.is_cast:
            return Fallback.AUTOCAST
        if self.by_stock:
            return None
        is_training, as_it_was = self.hf_model.state()
        if is_training:
            return Fallback.TRAINING_MODE
        if not as_it_was:
            return Fallback.MODEL_CHANGED
        return Fallback.ADAPTERS if adapters.reason_against(self.hf_model.model, self.model) else None

    def _wants_more(self, model: dict[str, Any]) -> bool:
        drafted = self.ids.shape[1] - self.num_tokens
        if (drafted and self.ids.shape[0] > 1) or model.get("labels") is not None:
            return True  # each row may have drafts that are not the others'
        if any(self._setting(name) for name in OUTPUTS) or self.decoder.get("return_dict") is False:
            return True
        name = next((name for name in _LOGITS if name in self.hf_model.model_parameters), None)
        kept = model.get(name or _LOGITS[0])
        by_stock = name is None and self.by_stock and kept is None
        return not (by_stock or (type(kept) is int and 1 <= kept <= drafted + 1))

    def _has_output_hooks(self) -> bool:
        """Whether hooks of the user read the output of the model or its decoder."""
        own = (module._forward_hooks.values() for module in self._modules)
        return any(map(_is_of_the_user, chain(_global_forward_hooks.values(), *own)))

    def _setting(self, name: str) -> Any:
        """Returns a setting as a forward finds it: among its arguments, or else in its config."""
        for given in (self.decoder, self.model or {}):
            if given.get(name) is not None:
                return given[name]
        of_decoder, of_model = (getattr(module.config, name, None) for module in self._modules)
        return of_decoder or of_model

    def _starts(self) -> torch.Tensor:
        """Returns (B · k, 1) the padding in front of each prompt."""
        copies = self.ids.shape[0] // len(self.lengths)
        return self.num_tokens - torch.tensor(self.lengths).repeat_interleave(copies)[:, None]

    def _masks_padding_only(self, mask: Any) -> bool:
        if mask is None:
            return not bool(self._starts().any())
        if not torch.is_tensor(mask) or mask.ndim != 2:  # made from the plan's mask, for a cache of fixed size
            return self.by_stock
        expected = torch.arange(self.ids.shape[1]) >= self._starts()
        return mask.shape == expected.shape and torch.equal(mask.cpu() != 0, expected)

    def _counts_from_0(self, positions: torch.Tensor | None) -> bool:
        """Whether each prompt's tokens are at 0, 1, …, where decoding will continue.

        Args:
            positions: (B · k or 1, T or more), or three of them, as models of images have; `None`: the model counts.
        """
        starts = self._starts()
        if positions is None:
            return not bool(starts.any())
        expected = torch.arange(self.num_given, self.ids.shape[1]) - starts
        return bool(((positions.cpu() == expected) | (expected < 0)).all())


def has_inner_hooks(hf_model: TestedModel) -> bool:
    """Whether hooks of the user, on modules inside the model or on all modules, see the passes of a blend."""
    if not (hf_model.has_hooks or _global_forward_pre_hooks):
        return False
    inside = (module for module in hf_model.decoder.modules() if module is not hf_model.decoder)
    places = (hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks))
    return any(_is_of_the_user(hook) for hooks in chain(places, [_global_forward_pre_hooks]) for hook in hooks.values())


def _is_of_the_user(hook: Any) -> bool:
    """Whether a hook is not of these packages: theirs do a module's work, or act where outputs are asked for."""
    home = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return not home.startswith(("accelerate.", "peft.", "torch.", "transformers.", "hfblend."))
