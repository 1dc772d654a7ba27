"""Which calls of `generate` are blended, and why the others are not. `docs/generate.md` lists the same reasons.

Shapes: B rows of the batch, T columns, padding included.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.cache_utils import Cache

from ..arguments import described
from ..config import BlendConfig
from ..model.hf_model import CACHE_NAMES, cache_given
from ..model.weights import adapters
from ..prompts.prompt import ChunkSpans, Prompt, spans_by_row
from ..prompts.separator import Separator
from ..support.registry import TestedModel
from .hand_over import is_foreign


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

    def add_row(self, row: torch.Tensor, spans: ChunkSpans) -> None:
        """Adds a row of the batch: (1, n) ids without padding."""
        for place, prompt in enumerate(self.prompts):
            if prompt.chunk_spans == spans and torch.equal(prompt.input_ids, row):
                self.prompt_of_row.append(place)
                return
        self.prompt_of_row.append(len(self.prompts))
        self.prompts.append(Prompt(row, spans))

    @property
    def is_one_prompt(self) -> bool:
        """Whether all rows are one prompt, without padding."""
        return len(self.prompts) == 1 and len(self.prompts[0]) == self.num_tokens


@dataclass
class Request:
    """One call of `generate(*args, **kwargs)`, looked at before anything runs.

    Args:
        hf_model: the model, past its self-test.
        model: the module whose `generate` it is: the model, or what peft makes of one.
        chunk_spans: of one prompt, or of each row; they count the padding, as the columns of `input_ids` do.
        separator: splits ids without spans; `None` does not.
        nested: whether the call runs inside another one of this model.
    """

    hf_model: TestedModel
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    chunk_spans: Iterable[Any] | None
    config: BlendConfig
    separator: Separator | None
    nested: bool

    def plan(self) -> Plan:
        """Decides whether the call is blended.

        Raises:
            ValueError: chunk spans that do not fit the prompt, or the batch.
        """
        planned = self._planned()
        if planned.fallback is not None:
            planned.found = self._found(planned)
        return planned

    def option(self, name: str) -> Any:
        """Returns a generation setting as `generate` would resolve it."""
        return generate_option(self.model, self.kwargs, name)

    @cached_property
    def ids(self) -> torch.Tensor | None:
        """(B, T); `None` where the call has none that chunks could be found in."""
        ids = self._given_ids()
        is_ids = torch.is_tensor(ids) and ids.ndim == 2 and not ids.is_floating_point() and ids.numel() > 0
        return ids if is_ids else None

    def _given_ids(self) -> Any:
        given = (self.kwargs.get("input_ids"), self.kwargs.get("inputs"), *self.args[:1])
        return next((value for value in given if value is not None), None)

    def _planned(self) -> Plan:
        ids, spans = self.ids, None
        if ids is None:
            return Plan(0, fallback=self._before_splitting() or Fallback.NO_INPUT_IDS)
        if self.chunk_spans is not None:
            spans = spans_by_row(self.chunk_spans, ids)
            for of_row in spans:
                of_row.check(ids.shape[1])
        if fallback := self._before_splitting():
            return Plan(ids.shape[1], fallback=fallback)
        padding = self._left_padding(ids)
        if padding is None:
            return Plan(ids.shape[1], fallback=Fallback.PADDING)
        rows, planned = ids.cpu(), Plan(ids.shape[1], ids)  # the one time that Python waits for the ids
        for i, start in enumerate(padding):
            row = rows[i : i + 1, start:]
            planned.add_row(row, self._split(row[0].tolist()) if spans is None else spans[i].moved(-start))
        reasons = [self._nothing_reused(prompt.chunk_spans) for prompt in planned.prompts]
        planned.prefilled = {place: reason for place, reason in enumerate(reasons) if reason}
        planned.fallback = reasons[0] if all(reasons) else self._after_splitting(ids)
        longest = ids.shape[1] - min(padding)
        if not planned.fallback and not all(
            self.hf_model.same_regime(len(prompt), longest) for prompt in planned.prompts
        ):
            planned.fallback = Fallback.ROPE_REGIMES
        return planned

    def _before_splitting(self) -> Fallback | None:
        if not self.config.enabled:
            return Fallback.DISABLED
        if self.nested:
            return Fallback.NESTED
        is_training, refusal = self.hf_model.look()
        if is_training:
            return Fallback.TRAINING_MODE
        if refusal:
            return Fallback.MODEL_CHANGED
        if self.option("cache_implementation") == "paged":
            return Fallback.CONTINUOUS_BATCHING
        if self.hf_model.is_cast:
            return Fallback.AUTOCAST
        if adapters.reason_against(self.model, self.kwargs):
            return Fallback.ADAPTERS
        return None if self.kwargs.get("inputs_embeds") is None else Fallback.NO_INPUT_IDS

    def _nothing_reused(self, spans: ChunkSpans) -> Fallback | None:
        """Returns why nothing of a prompt is reused."""
        if not spans:
            return Fallback.NO_CHUNKS
        too_few = sum(stop - start for start, stop in spans) < self.config.min_reused_tokens
        return Fallback.TOO_FEW_TOKENS if too_few else None

    def _after_splitting(self, ids: torch.Tensor) -> Fallback | None:
        cache = cache_given(self.kwargs)
        if isinstance(cache, Cache) and int(cache.get_seq_length()) > 0:
            return Fallback.FILLED_CACHE
        if is_foreign(cache):
            return Fallback.FOREIGN_CACHE
        if self.option("use_cache") is False:
            return Fallback.NO_CACHE
        if not self.hf_model.reads_last_row_only or any(map(self.option, _ALL_ROWS)):
            return Fallback.ALL_ROWS_WANTED
        return Fallback.EXTRA_INPUTS if self._extra_inputs(ids) else None

    def _extra_inputs(self, ids: torch.Tensor) -> list[str]:
        return [name for name, value in self.kwargs.items() if name not in _TOKEN_INPUTS and _is_input(value, ids)]

    def _split(self, ids: list[int]) -> ChunkSpans:
        if self.separator is None:
            return ChunkSpans(())
        if len(ids) >= self.config.min_reused_tokens:
            self.separator.warn_if_hidden(ids)
        return ChunkSpans(self.separator.chunk_spans(ids))

    def _left_padding(self, ids: torch.Tensor) -> Sequence[int] | None:
        """Returns the (B,) tokens that `generate` masks at each prompt's start; `None` if it masks others, or all.

        It masks as the given mask says, or else the padding token, unless that ends texts too.
        """
        mask = self.kwargs.get("attention_mask")
        if mask is None:
            pad, eos = self.option("pad_token_id"), self.option("eos_token_id")
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

    def _found(self, planned: Plan) -> str:
        """Returns, as a sentence, the figures and names in the call that gave the reason."""
        hf_model, ids, mask = self.hf_model, self.ids, self.kwargs.get("attention_mask")
        match planned.fallback:
            case Fallback.MODEL_CHANGED:
                return f"It says: {hf_model.refusal}"
            case Fallback.ALL_ROWS_WANTED if not hf_model.reads_last_row_only:
                return (
                    f"The forward of {type(hf_model.model).__name__} reads more of its decoder's output, whatever is "
                    "asked for."
                )
            case Fallback.ALL_ROWS_WANTED:
                return f"Got {', '.join(filter(self.option, _ALL_ROWS))}."
            case Fallback.AUTOCAST:
                dtype = torch.get_autocast_dtype(hf_model.device.type)
                return f"Got autocast to {dtype}, the model's dtype is {hf_model.dtype}."
            case Fallback.NO_INPUT_IDS if self.kwargs.get("inputs_embeds") is not None:
                return "Got inputs_embeds."
            case Fallback.NO_INPUT_IDS:
                return f"Got {described(self._given_ids())}."
            case Fallback.PADDING if mask is not None and ids is not None:
                return f"Got a mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}."
            case Fallback.PADDING:
                return "Got no mask, so that the padding token counts as masked; pass a mask of ones if it is meant."
            case Fallback.NO_CHUNKS if self.chunk_spans is not None:
                return "Got chunk_spans without a span."
            case Fallback.NO_CHUNKS | Fallback.TOO_FEW_TOKENS:
                return found_chunks([prompt.chunk_spans for prompt in planned.prompts], self.config, self.separator)
            case Fallback.FILLED_CACHE:
                return f"Got a cache of {int(cache_given(self.kwargs).get_seq_length())} tokens."
            case Fallback.EXTRA_INPUTS if ids is not None:
                return f"Got {', '.join(self._extra_inputs(ids))}."
            case Fallback.ADAPTERS:
                return adapters.reason_against(self.model, self.kwargs) or ""
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


_LOGITS = ("logits_to_keep", "num_logits_to_keep")  # the latter in older code of models
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class Asked:
    """What a forward over the prompts was asked for, where only the last row of each is computed.

    Args:
        plan: of the call.
        hf_model: the model.
        ids: (B · k, T or more), draft tokens after the prompts included.
        decoder: the other arguments of the decoder's forward.
        model: those of the whole model's forward; `None` if the decoder was called without it.
        by_stock: whether Transformers' own loop asks, which reads no more than the rows it needs.
    """

    plan: Plan
    hf_model: TestedModel
    ids: torch.Tensor
    decoder: dict[str, Any]
    model: dict[str, Any] | None
    by_stock: bool

    def reason_against(self) -> Fallback | None:
        """Why the forward, and with it the call, is not blended."""
        if changed := self._changed_meanwhile():
            return changed
        if (
            self.model is None
            or self._wants_more(self.model)
            or has_output_hooks(self.hf_model.model, self.hf_model.decoder)
        ):
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
        drafted = self.ids.shape[1] - self.plan.num_tokens
        if (drafted and self.ids.shape[0] > 1) or model.get("labels") is not None:
            return True  # each row may have drafts that are not the others'
        if any(self._setting(name) for name in _OUTPUTS) or self.decoder.get("return_dict") is False:
            return True
        name = next((name for name in _LOGITS if name in self.hf_model.model_parameters), None)
        kept = model.get(name or _LOGITS[0])
        by_stock = name is None and self.by_stock and kept is None
        return not (by_stock or (type(kept) is int and 1 <= kept <= drafted + 1))

    def _setting(self, name: str) -> Any:
        """As a forward finds it: among its arguments, or else in its config."""
        for given in (self.decoder, self.model or {}):
            if given.get(name) is not None:
                return given[name]
        return getattr(self.hf_model.decoder.config, name, None) or getattr(self.hf_model.model.config, name, None)

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


def has_inner_hooks(hf_model: TestedModel) -> bool:
    """Whether hooks of the user meet the modules inside the model, or all there are: they see the passes of a blend."""
    if not (hf_model.has_hooks or _global_forward_pre_hooks):
        return False
    inside = (module for module in hf_model.decoder.modules() if module is not hf_model.decoder)
    places = (hooks for module in inside for hooks in (module._forward_hooks, module._forward_pre_hooks))
    return any(_reads(hook) for hooks in chain(places, [_global_forward_pre_hooks]) for hook in hooks.values())


def _reads(hook: Any) -> bool:
    """Whether a hook is the user's. Those of these packages do a module's work, or act where outputs are asked for."""
    home = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return not home.startswith(("accelerate.", "peft.", "torch.", "transformers.", "hfblend."))


_READ_HERE = ("input_ids", "attention_mask", "position_ids", *CACHE_NAMES)


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
