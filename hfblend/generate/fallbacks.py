"""Which calls of `generate` are blended, and why the others are not. `docs/fallbacks.md` lists the same reasons.

Shapes: B rows of the batch, T columns, padding included.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.cache_utils import Cache

from ..arguments import described
from ..blend.caches import is_foreign
from ..config import BlendConfig
from ..model.hf_model import CACHE_NAMES, cache_given
from ..model.weights import adapters
from ..prompts.prompt import ChunkSpans, Prompt, spans_by_row
from ..prompts.separator import Separator
from ..support.registry import BlendableModel


class Fallback(enum.Enum):
    """A reason for which a call goes through stock `generate`: what it says, with a remedy, and how loudly."""

    DISABLED = ("the config has enabled=False; set enabled=True, or pass blend_config= for this call.", logging.INFO)
    TRAINING_MODE = ("the model, or a module inside it, is in training mode; call model.eval().", logging.WARNING)
    MODEL_CHANGED = (
        "the model was changed inside the call, or since patch, and is refused by the self-test as it is now; undo the "
        "change, or remove() and patch again.",
        logging.WARNING,
    )
    CONTINUOUS_BATCHING = (
        "continuous batching (generate_batch, its manager, cache_implementation='paged') prefills prompts in full; "
        "call generate, with a batch.",
        logging.WARNING,
    )
    AUTOCAST = (
        "torch.autocast computes in another dtype than the model; load the model in that dtype, or leave autocast.",
        logging.WARNING,
    )
    NO_INPUT_IDS = (
        "there are no input_ids to find chunks in; pass them as a tensor (B, T) of integers, without inputs_embeds.",
        logging.WARNING,
    )
    PADDING = (
        "tokens are masked elsewhere than in front of a prompt; pad on the left (hfblend.Prompt.batch), with a mask of "
        "the shape of input_ids.",
        logging.WARNING,
    )
    NO_CHUNKS = (
        "the prompt has no chunks: no chunk_spans, and fewer than two separators in its ids; build it with "
        "hfblend.Prompt, and pass all of **prompt.inputs().",
        logging.INFO,
    )
    TOO_FEW_TOKENS = (
        "the chunks have fewer tokens than min_reused_tokens, where blending would not pay; lower "
        "BlendConfig(min_reused_tokens=…), 0 blends every prompt.",
        logging.INFO,
    )
    FILLED_CACHE = (
        "past_key_values is not empty: a second turn continues it; leave it out for a new prompt.",
        logging.INFO,
    )
    FOREIGN_CACHE = (
        "the cache, or a layer of it, has code that is not Transformers', and attention may read other K/V than it "
        "keeps; pass a cache of transformers, or none.",
        logging.WARNING,
    )
    NO_CACHE = ("use_cache=False leaves nothing to put KV into; leave use_cache on.", logging.WARNING)
    ALL_ROWS_WANTED = (
        "more than the last row is asked for (logits, hidden states or attentions of all tokens, or a loss), and "
        "reused tokens have none; leave it off, and pass logits_to_keep=1 to the model.",
        logging.WARNING,
    )
    EXTRA_INPUTS = (
        "inputs beside input_ids say something of each token, or are images or sound; leave them out.",
        logging.WARNING,
    )
    ADAPTERS = (
        "adapters are chosen for each row (adapter_names), or act in part of the prompt only (aLoRA); use set_adapter, "
        "one call an adapter.",
        logging.WARNING,
    )
    ROPE_REGIMES = (
        "prompts of the batch have different RoPE frequencies alone, and stock gives all of them the longest's; "
        "generate prompts of one regime together.",
        logging.WARNING,
    )
    POSITIONS = (
        "a prompt does not begin at position 0: the model counts its padding, or has more before it; generate prompts "
        "of one length together, or unwrap the model.",
        logging.WARNING,
    )
    NESTED = (
        "this generate runs inside another one of the same model (early-exit drafts); nothing is to be done.",
        logging.INFO,
    )
    NOT_REACHED = (
        "no forward over the whole prompt reached the decoder (ids became embeddings before, or the whole model is "
        "compiled); patch the model itself, and compile with model.compile().",
        logging.WARNING,
    )

    @property
    def reason(self) -> str:
        return self.value[0]

    @property
    def level(self) -> int:
        return self.value[1]


@dataclass
class Plan:
    """What a call is to be: blended, each different prompt of its batch once; or stock, with the reason.

    Attributes:
        num_tokens: T.
        input_ids: (B, T) of a call that is blended.
        prompts: the different prompts, without their padding, on the CPU.
        prompt_of_row: (B,) which of them each row is.
        prefilled: those that are prefilled in full beside the others, and why.
        fallback: why the call is stock; `None` if it is blended.
        found: of that reason, what was found in this call, as a sentence; may be empty.
    """

    num_tokens: int
    input_ids: torch.Tensor | None = None
    prompts: list[Prompt] = field(default_factory=list)
    prompt_of_row: list[int] = field(default_factory=list)
    prefilled: dict[int, Fallback] = field(default_factory=dict)
    fallback: Fallback | None = None
    found: str = ""

    @property
    def is_one_prompt(self) -> bool:
        """Whether all rows are one prompt, without padding."""
        return len(self.prompts) == 1 and len(self.prompts[0]) == self.num_tokens


def plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chunk_spans: Iterable[Any] | None,
    config: BlendConfig,
    separator: Separator | None,
    nested: bool,
    host: BlendableModel,
) -> Plan:
    """Decides about one call of `generate(*args, **kwargs)`, before anything runs.

    Args:
        chunk_spans: of one prompt, or of each row; they count the padding, as the columns of `input_ids` do.
        nested: whether it runs inside another one of this model.
        host: of the model.

    Raises:
        ValueError: chunk spans that do not fit the prompt, or the batch.
    """
    planned = _plan(model, args, kwargs, chunk_spans, config, separator, nested, host)
    if planned.fallback is not None:
        planned.found = _found(planned, model, args, kwargs, chunk_spans, config, separator, host)
    return planned


def _plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chunk_spans: Iterable[Any] | None,
    config: BlendConfig,
    separator: Separator | None,
    nested: bool,
    host: BlendableModel,
) -> Plan:
    ids = _input_ids(args, kwargs)
    if ids is None:
        return Plan(0, fallback=_before_splitting(model, ids, kwargs, config, nested, host))
    spans = None if chunk_spans is None else spans_by_row(chunk_spans, ids)
    for of_row in spans or ():
        of_row.check(ids.shape[1])
    if fallback := _before_splitting(model, ids, kwargs, config, nested, host):
        return Plan(ids.shape[1], fallback=fallback)
    padding = _left_padding(model, ids, kwargs)
    if padding is None:
        return Plan(ids.shape[1], fallback=Fallback.PADDING)
    rows, planned = ids.cpu(), Plan(ids.shape[1], ids)  # the one time that Python waits for the ids
    for i, start in enumerate(padding):
        row = rows[i : i + 1, start:]
        own = _split(row[0].tolist(), separator, config) if spans is None else spans[i].moved(-start)
        known = (
            p for p, one in enumerate(planned.prompts) if one.chunk_spans == own and torch.equal(one.input_ids, row)
        )
        place = next(known, len(planned.prompts))
        planned.prompt_of_row.append(place)
        if place == len(planned.prompts):
            planned.prompts.append(Prompt(row, own))
    reasons = [_nothing_reused(prompt.chunk_spans, config) for prompt in planned.prompts]
    planned.prefilled = {place: reason for place, reason in enumerate(reasons) if reason}
    planned.fallback = reasons[0] if all(reasons) else _after_splitting(model, ids, kwargs, host)
    longest = ids.shape[1] - min(padding)
    if not planned.fallback and not all(host.same_regime(len(prompt), longest) for prompt in planned.prompts):
        planned.fallback = Fallback.ROPE_REGIMES
    return planned


def _before_splitting(
    model: nn.Module,
    ids: torch.Tensor | None,
    kwargs: dict[str, Any],
    config: BlendConfig,
    nested: bool,
    host: BlendableModel,
) -> Fallback | None:
    if not config.enabled:
        return Fallback.DISABLED
    if nested:
        return Fallback.NESTED
    is_training, refusal = host.look()
    if is_training:
        return Fallback.TRAINING_MODE
    if refusal:
        return Fallback.MODEL_CHANGED
    if generate_option(model, kwargs, "cache_implementation") == "paged":
        return Fallback.CONTINUOUS_BATCHING
    if host.is_cast:
        return Fallback.AUTOCAST
    if adapters.reason_against(model, kwargs):
        return Fallback.ADAPTERS
    return Fallback.NO_INPUT_IDS if ids is None or kwargs.get("inputs_embeds") is not None else None


def _nothing_reused(spans: ChunkSpans, config: BlendConfig) -> Fallback | None:
    """Why nothing of a prompt is reused."""
    if not spans:
        return Fallback.NO_CHUNKS
    too_few = sum(stop - start for start, stop in spans) < config.min_reused_tokens
    return Fallback.TOO_FEW_TOKENS if too_few else None


def _after_splitting(
    model: nn.Module, ids: torch.Tensor, kwargs: dict[str, Any], host: BlendableModel
) -> Fallback | None:
    cache = cache_given(kwargs)
    if isinstance(cache, Cache) and int(cache.get_seq_length()) > 0:
        return Fallback.FILLED_CACHE
    if is_foreign(cache):
        return Fallback.FOREIGN_CACHE
    if generate_option(model, kwargs, "use_cache") is False:
        return Fallback.NO_CACHE
    if not host.reads_last_row_only or any(generate_option(model, kwargs, name) for name in _ALL_ROWS):
        return Fallback.ALL_ROWS_WANTED
    if any(_is_input(value, ids) for name, value in kwargs.items() if name not in _TOKEN_INPUTS):
        return Fallback.EXTRA_INPUTS
    return None


_LOGITS = ("logits_to_keep", "num_logits_to_keep")  # the latter in older code of models
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class Asked:
    """What a forward over the prompts was asked for, where only the last row of each is computed.

    Args:
        plan: of the call.
        host: the model.
        ids: (B · k, T or more), draft tokens after the prompts included.
        decoder: the other arguments of the decoder's forward.
        model: those of the whole model's forward; `None` if the decoder was called without it.
        by_stock: whether Transformers' own loop asks, which reads no more than the rows it needs.
    """

    plan: Plan
    host: BlendableModel
    ids: torch.Tensor
    decoder: dict[str, Any]
    model: dict[str, Any] | None
    by_stock: bool

    def reason_against(self) -> Fallback | None:
        """Why the forward, and with it the call, is not blended."""
        if changed := self._changed_meanwhile():
            return changed
        if self.model is None or self._wants_more(self.model) or has_output_hooks(self.host.model, self.host.decoder):
            return Fallback.ALL_ROWS_WANTED
        if not self._setting("use_cache"):
            return Fallback.NO_CACHE
        if is_foreign(cache_given(self.decoder)):
            return Fallback.FOREIGN_CACHE
        if not self._masks_padding_only(self.decoder.get("attention_mask")):
            return Fallback.PADDING
        others = (value for name, value in self.decoder.items() if name not in _READ_HERE)
        if any(_is_input(value, self.ids) for value in others):
            return Fallback.EXTRA_INPUTS
        return None if self._counts_from_0(self.decoder.get("position_ids")) else Fallback.POSITIONS

    def _changed_meanwhile(self) -> Fallback | None:
        """What of the model is no longer as it was when `generate` began: other code than Transformers' ran since."""
        if self.host.is_cast:
            return Fallback.AUTOCAST
        if self.by_stock:
            return None
        is_training, as_it_was = self.host.state()
        if is_training:
            return Fallback.TRAINING_MODE
        if not as_it_was:
            return Fallback.MODEL_CHANGED
        return Fallback.ADAPTERS if adapters.reason_against(self.host.model, self.model) else None

    def _wants_more(self, model: dict[str, Any]) -> bool:
        drafted = self.ids.shape[1] - self.plan.num_tokens
        if (drafted and self.ids.shape[0] > 1) or model.get("labels") is not None:
            return True  # each row may have drafts that are not the others'
        if any(self._setting(name) for name in _OUTPUTS) or self.decoder.get("return_dict") is False:
            return True
        name = next((name for name in _LOGITS if name in self.host.model_parameters), None)
        kept = model.get(name or _LOGITS[0])
        by_stock = name is None and self.by_stock and kept is None
        return not (by_stock or (type(kept) is int and 1 <= kept <= drafted + 1))

    def _setting(self, name: str) -> Any:
        """As a forward finds it: among its arguments, or else in its config."""
        for given in (self.decoder, self.model or {}):
            if given.get(name) is not None:
                return given[name]
        return getattr(self.host.decoder.config, name, None) or getattr(self.host.model.config, name, None)

    def _starts(self) -> torch.Tensor:
        """(B · k, 1) the padding in front of each prompt."""
        copies = self.ids.shape[0] // len(self.plan.prompt_of_row)
        lengths = [len(self.plan.prompts[place]) for place in self.plan.prompt_of_row]
        return self.plan.num_tokens - torch.tensor(lengths).repeat_interleave(copies)[:, None]

    def _masks_padding_only(self, mask: Any) -> bool:
        if mask is None:
            return not bool(self._starts().any())
        if not torch.is_tensor(mask) or mask.ndim != 2:  # made of the plan's mask, for a cache of fixed size
            return self.by_stock
        expected = torch.arange(self.ids.shape[1]) >= self._starts()
        return mask.shape == expected.shape and torch.equal(mask.cpu() != 0, expected)

    def _counts_from_0(self, positions: torch.Tensor | None) -> bool:
        """Whether each prompt's tokens are at 0, 1, …, from where decoding will go on.

        Args:
            positions: (B · k or 1, T or more), or three of them, as models of images have; `None`: the model counts.
        """
        starts = self._starts()
        if positions is None:
            return not bool(starts.any())
        expected = torch.arange(self.ids.shape[1]) - starts
        return bool(((positions.cpu() == expected) | (expected < 0)).all())


def has_output_hooks(*modules: nn.Module) -> bool:
    """Whether hooks meet what these modules return. Those of Transformers act only where outputs are asked for."""
    own = (hook for module in modules for hook in module._forward_hooks.values())
    return any(map(_reads, chain(_global_forward_hooks.values(), own)))


def has_inner_hooks(host: BlendableModel) -> bool:
    """Whether hooks of the user meet the modules inside the model, or all there are: they see the passes of a blend."""
    if not (host.has_hooks or _global_forward_pre_hooks):
        return False
    inside = (module for module in host.decoder.modules() if module is not host.decoder)
    places = (hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks))
    return any(_reads(hook) for hooks in chain(places, [_global_forward_pre_hooks]) for hook in hooks.values())


def _reads(hook: Any) -> bool:
    """Whether a hook is the user's. Those of these packages do a module's work, or act where outputs are asked for."""
    home = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return not home.startswith(("accelerate.", "peft.", "torch.", "transformers.", f"{__package__}."))


_READ_HERE = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES)


def _found(
    planned: Plan,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    chunk_spans: Iterable[Any] | None,
    config: BlendConfig,
    separator: Separator | None,
    host: BlendableModel,
) -> str:
    """What of a call gave the reason: figures and names, as a sentence."""
    ids, mask, cache = _input_ids(args, kwargs), kwargs.get("attention_mask"), cache_given(kwargs)
    match planned.fallback:
        case Fallback.MODEL_CHANGED:
            return f"It says: {host.refusal}"
        case Fallback.ALL_ROWS_WANTED if not host.reads_last_row_only:
            return (
                f"The forward of {type(host.model).__name__} reads more of its decoder's output, whatever is asked for."
            )
        case Fallback.AUTOCAST:
            return f"Got autocast to {torch.get_autocast_dtype(host.device.type)}, the model's dtype is {host.dtype}."
        case Fallback.NO_INPUT_IDS:
            given = next((v for v in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs")) if v is not None), None)
            return "Got inputs_embeds." if kwargs.get("inputs_embeds") is not None else f"Got {described(given)}."
        case Fallback.PADDING if mask is not None and ids is not None:
            return f"Got a mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}."
        case Fallback.PADDING:
            return "Got no mask, so that the padding token counts as masked; pass a mask of ones if it is meant."
        case Fallback.NO_CHUNKS if chunk_spans is not None:
            return "Got chunk_spans without a span."
        case Fallback.NO_CHUNKS | Fallback.TOO_FEW_TOKENS:
            return found_chunks([prompt.chunk_spans for prompt in planned.prompts], config, separator)
        case Fallback.FILLED_CACHE:
            return f"Got a cache of {int(cache.get_seq_length())} tokens."
        case Fallback.ALL_ROWS_WANTED | Fallback.EXTRA_INPUTS if ids is not None:
            names = [name for name, value in kwargs.items() if name not in _TOKEN_INPUTS and _is_input(value, ids)]
            asked = [name for name in _ALL_ROWS if generate_option(model, kwargs, name)]
            return f"Got {', '.join(names if planned.fallback is Fallback.EXTRA_INPUTS else asked)}."
        case Fallback.ADAPTERS:
            return adapters.reason_against(model, kwargs) or ""
        case Fallback.ROPE_REGIMES:
            return f"Got prompts of {', '.join(str(len(prompt)) for prompt in planned.prompts)} tokens."
    return ""


def found_chunks(spans: Sequence[ChunkSpans], config: BlendConfig, separator: Separator | None) -> str:
    """The figures of `NO_CHUNKS` and `TOO_FEW_TOKENS`, for the prompts of one or the other.

    Args:
        spans: of each prompt.
    """
    if any(spans):
        most = max(sum(stop - start for start, stop in one) for one in spans)
        count = max(map(len, spans))
        prompts = "" if len(spans) == 1 else f" at most, in {len(spans)} prompts"
        return (
            f"Got {most} reusable tokens in {count} chunks{prompts}; min_reused_tokens is {config.min_reused_tokens}."
        )
    if separator is not None:
        return f"The separator is {config.separator!r}."
    if isinstance(config.separator, str):
        return f"The separator {config.separator!r} is text, and patch() had no tokenizer to look for it."
    return "The config has separator=None."


_ALL_ROWS = ("output_hidden_states", "output_attentions")


def require_token_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Looks at what a caller gave to `generate` in the place of token ids, which stock would fail at deep inside.

    Raises:
        TypeError: no tensor: a `Prompt`, text, the dict of a tokenizer.
        ValueError: a tensor that holds no ids (B, T), of a model whose main input they are.
    """
    takes_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    ids = next((v for v in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs")) if v is not None), None)
    if ids is None or kwargs.get("custom_generate") is not None:
        return
    if torch.is_tensor(ids):
        if takes_text and (ids.ndim != 2 or ids.is_floating_point()):
            how = ": write ids[None] for one prompt" if ids.ndim == 1 else ""
            raise ValueError(f"generate takes input_ids, integers (B, T), got {described(ids)}{how}.")
        return
    how = "make it with tokenizer(text, return_tensors='pt')"
    if isinstance(ids, Prompt):
        how = "write model.generate(**prompt.inputs())"
    elif isinstance(ids, Mapping):
        how = "write model.generate(**inputs)"
    raise TypeError(f"generate takes input_ids, a tensor (B, T) of token ids, got {described(ids)}: {how}.")


_TOKEN_INPUTS = ("input_ids", "inputs", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask")


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    ids = next((v for v in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]) if v is not None), None)
    is_ids = torch.is_tensor(ids) and ids.ndim == 2 and not ids.is_floating_point() and ids.numel() > 0
    return ids if is_ids else None


def _split(ids: list[int], separator: Separator | None, config: BlendConfig) -> ChunkSpans:
    if separator is None:
        return ChunkSpans(())
    spans = ChunkSpans(separator.chunk_spans(ids))
    if len(ids) >= config.min_reused_tokens:
        separator.warn_if_hidden(ids)
    return spans


def _left_padding(model: nn.Module, ids: torch.Tensor, kwargs: dict[str, Any]) -> Sequence[int] | None:
    """(B,) tokens that `generate` masks in front of each prompt; `None` if it masks others, or whole rows.

    It masks what the given mask says, or else the padding token, unless that ends texts too.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        pad, eos = (generate_option(model, kwargs, f"{kind}_token_id") for kind in ("pad", "eos"))
        if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
            return [0] * ids.shape[0]
        mask = ids != pad
    if mask.shape != ids.shape:
        return None
    seen = mask != 0
    if bool(seen.all()):
        return [0] * ids.shape[0]
    padding = (~seen).sum(1)
    on_the_left = seen == (torch.arange(ids.shape[1], device=seen.device) >= padding[:, None])
    whole_rows = padding == ids.shape[1]
    return padding.tolist() if bool((on_the_left.all(1) & ~whole_rows).all()) else None


def _is_input(value: Any, ids: torch.Tensor) -> bool:
    """Whether a tensor says something of the tokens: an entry each, or pixels and sound that stand for some."""
    return torch.is_tensor(value) and value.ndim >= 2 and (value.shape[1] == ids.shape[1] or value.is_floating_point())


def generate_option(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` would resolve it: the call's, its `generation_config`'s, the model's."""
    if name in kwargs:
        return kwargs[name]
    for config in (kwargs.get("generation_config"), getattr(model, "generation_config", None)):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None
