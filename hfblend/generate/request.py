"""A call of `generate`, looked at before anything runs: which prompts it blends, or why none.

Shapes: B rows of the batch, T columns, padding included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..arguments import described
from ..config import BlendConfig
from ..kv.chunk import ChunkKV
from ..kv.ids import ids_in
from ..model.hf_model import cache_given, is_token_input
from ..model.weights import adapters
from ..prompts.prompt import ChunkSpans, Prompt, spans_by_row
from ..prompts.separator import Separator
from ..support.registry import TestedModel
from .fallbacks import Fallback
from .hand_over import held_by, is_foreign

_ALL_ROWS = ("output_hidden_states", "output_attentions")
_TOKEN_INPUTS = ("input_ids", "inputs", "attention_mask", "negative_prompt_ids", "negative_prompt_attention_mask")


@dataclass
class Plan:
    """The way of a call: blended, each different prompt of its batch once; or stock, with the reason.

    Attributes:
        num_tokens: T.
        input_ids: (B, T) of a call that is blended.
        prompts: the different prompts, without their padding, on the CPU.
        lengths: the number of tokens of each.
        prompt_of_row: (B,) the index of each row's prompt.
        prefilled: index -> reason of the prompts that are prefilled in full while others are blended.
        num_given: tokens that the user's cache holds.
        given: their KV, which a blended prompt continues; `None` if there are none.
        fallback: why the call is stock; `None` if it is blended.
        found: a sentence with the figures of this call that gave the reason; may be empty.
    """

    num_tokens: int
    input_ids: torch.Tensor | None = None
    prompts: list[Prompt] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompt_of_row: list[int] = field(default_factory=list)
    prefilled: dict[int, Fallback] = field(default_factory=dict)
    num_given: int = 0
    given: ChunkKV | None = None
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
        self.lengths.append(row.shape[1])

    @property
    def is_one_prompt(self) -> bool:
        """Whether all rows are one prompt, without padding."""
        return self.lengths == [self.num_tokens]


@dataclass
class Request:
    """One call of `generate(*args, **kwargs)`, before anything runs.

    Args:
        hf_model: the model, past its self-test.
        model: the module whose `generate` is called: the model, or the wrapper that peft puts around one.
        chunk_spans: of one prompt, or of each row; they count the padding, as the columns of `input_ids` do.
        separator: splits ids without spans; `None` does not.
        find: finds chunks in ids that a separator does not split; `None` does not.
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
    find: Callable[[Sequence[int]], ChunkSpans] | None = None

    def plan(self) -> Plan:
        """Decides whether the call is blended.

        Raises:
            ValueError: chunk spans that do not fit the prompt, or the batch.
        """
        planned = self._planned()
        planned.num_given = self._num_given
        if planned.fallback is not None:
            planned.found = self._found(planned)
        return planned

    def option(self, name: str) -> Any:
        return generate_option(self.model, self.kwargs, name)

    @cached_property
    def ids(self) -> torch.Tensor | None:
        """(B, T); `None` where the call has no ids to find chunks in."""
        ids = _given_ids(self.args, self.kwargs)
        is_ids = torch.is_tensor(ids) and ids.ndim == 2 and not ids.is_floating_point() and ids.numel() > 0
        return ids if is_ids else None

    @cached_property
    def _num_given(self) -> int:
        """The tokens of the ids that the user's cache holds. With a mask that is longer, the ids are new ones only."""
        cache, mask = cache_given(self.kwargs), self.kwargs.get("attention_mask")
        is_whole = not torch.is_tensor(mask) or self.ids is None or mask.shape == self.ids.shape
        return int(cache.get_seq_length()) if isinstance(cache, Cache) and is_whole else 0

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
        rows, planned = ids.cpu(), Plan(ids.shape[1], ids)  # the only wait for the ids
        for i, start in enumerate(padding):
            row = rows[i : i + 1, start:]
            planned.add_row(row, self._split(row[0]) if spans is None else spans[i].moved(-start))
        reasons = [self._nothing_reused(prompt.chunk_spans) for prompt in planned.prompts]
        planned.prefilled = {place: reason for place, reason in enumerate(reasons) if reason}
        planned.fallback = reasons[0] if all(reasons) else self._after_splitting(ids, planned)
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
        new = spans.from_token(self._num_given)
        if not new:
            return Fallback.FILLED_CACHE
        too_few = sum(stop - start for start, stop in new) < self.config.min_reused_tokens
        return Fallback.TOO_FEW_TOKENS if too_few else None

    def _after_splitting(self, ids: torch.Tensor, planned: Plan) -> Fallback | None:
        cache, lengths = cache_given(self.kwargs), planned.lengths
        if self._num_given:
            planned.given = self._given(cache, ids.shape[1])
            if planned.given is None or len(ids) > 1 or not planned.is_one_prompt:
                return Fallback.FILLED_CACHE
        if is_foreign(cache):
            return Fallback.FOREIGN_CACHE
        if self.option("use_cache") is False:
            return Fallback.NO_CACHE
        if not self.hf_model.reads_last_row_only or any(map(self.option, _ALL_ROWS)):
            return Fallback.ALL_ROWS_WANTED
        if self._extra_inputs(ids):
            return Fallback.EXTRA_INPUTS
        same_regime = all(self.hf_model.same_regime(length, max(lengths)) for length in set(lengths))
        return None if same_regime else Fallback.ROPE_REGIMES

    def _given(self, cache: Cache, length: int) -> ChunkKV | None:
        """Returns the KV in the user's cache; `None` where chunks cannot be blended after it."""
        hf_model, count = self.hf_model, self._num_given
        in_regime = hf_model.same_regime(hf_model.regime(count), hf_model.regime(length))
        return held_by(cache, hf_model.layouts, hf_model.dtype) if count < length and in_regime else None

    def _extra_inputs(self, ids: torch.Tensor) -> list[str]:
        return [name for name, value in self.kwargs.items() if name not in _TOKEN_INPUTS and is_token_input(value, ids)]

    def _split(self, row: torch.Tensor) -> ChunkSpans:
        spans = ChunkSpans(())
        if self.separator is not None:
            ids = row.tolist()
            if len(ids) >= self.config.min_reused_tokens:
                self.separator.warn_if_hidden(ids)
            spans = ChunkSpans(self.separator.chunk_spans(ids))
        return spans if spans or self.find is None else self.find(ids_in(row))

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
        """Returns the figures and names in the call that gave the reason, as a sentence."""
        hf_model, ids, mask = self.hf_model, self.ids, self.kwargs.get("attention_mask")
        match planned.fallback:
            case Fallback.MODEL_CHANGED:
                return f"It says: {hf_model.refusal}"
            case Fallback.ALL_ROWS_WANTED if not hf_model.reads_last_row_only:
                return f"The forward of {type(hf_model.model).__name__} always reads more of its decoder's output."
            case Fallback.ALL_ROWS_WANTED:
                return f"Got {', '.join(filter(self.option, _ALL_ROWS))}."
            case Fallback.AUTOCAST:
                dtype = torch.get_autocast_dtype(hf_model.device.type)
                return f"Got autocast to {dtype}, the model's dtype is {hf_model.dtype}."
            case Fallback.NO_INPUT_IDS if self.kwargs.get("inputs_embeds") is not None:
                return "Got inputs_embeds."
            case Fallback.NO_INPUT_IDS:
                return f"Got {described(_given_ids(self.args, self.kwargs))}."
            case Fallback.PADDING if mask is not None and ids is not None:
                return f"Got a mask of shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}."
            case Fallback.PADDING:
                return "Got no mask, so that the padding token counts as masked; pass a mask of ones if it is meant."
            case Fallback.NO_CHUNKS if self.chunk_spans is not None:
                return "Got chunk_spans without a span."
            case Fallback.NO_CHUNKS | Fallback.TOO_FEW_TOKENS:
                spans = [prompt.chunk_spans.from_token(self._num_given) for prompt in planned.prompts]
                notes = dict.fromkeys(one.note for one in spans) if self.find is not None else ()
                return " ".join(filter(None, (found_chunks(spans, self.config, self.separator), *notes)))
            case Fallback.FILLED_CACHE:
                kind = type(cache_given(self.kwargs)).__name__
                return f"Got a {kind} of {self._num_given} tokens and {described(ids)}."
            case Fallback.EXTRA_INPUTS if ids is not None:
                return f"Got {', '.join(self._extra_inputs(ids))}."
            case Fallback.ADAPTERS:
                return adapters.reason_against(self.model, self.kwargs) or ""
            case Fallback.ROPE_REGIMES:
                return f"Got prompts of {', '.join(map(str, planned.lengths))} tokens."
        return ""


def found_chunks(spans: Sequence[ChunkSpans], config: BlendConfig, separator: Separator | None) -> str:
    """Returns the figures of `NO_CHUNKS` and `TOO_FEW_TOKENS`, for prompts of either.

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


def require_token_ids(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Checks the token ids given to `generate`: stock would fail at others deep inside.

    Raises:
        TypeError: no tensor: a `Prompt`, text, the dict of a tokenizer.
        ValueError: a tensor that holds no ids (B, T), of a model whose main input they are.
    """
    ids = _given_ids(args, kwargs)
    if ids is None or kwargs.get("custom_generate") is not None:
        return
    if torch.is_tensor(ids):
        takes_text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        if takes_text and (ids.ndim != 2 or ids.is_floating_point()):
            how = ": write ids[None] for one prompt" if ids.ndim == 1 else ""
            raise ValueError(f"generate takes input_ids, integers (B, T), got {described(ids)}{how}.")
        if ids.is_meta:
            raise ValueError("generate takes input_ids with values, got ids on the device meta, which holds none.")
        return
    how = "make it with tokenizer(text, return_tensors='pt')"
    if isinstance(ids, Prompt):
        how = "write model.generate(**prompt.inputs())"
    elif isinstance(ids, Mapping):
        how = "write model.generate(**inputs)"
    raise TypeError(f"generate takes input_ids, a tensor (B, T) of token ids, got {described(ids)}: {how}.")


def _given_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the argument of `generate` that stands in the place of token ids; `None` if there is none."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"))
    return next((value for value in given if value is not None), None)


def generate_option(model: nn.Module, kwargs: dict[str, Any], name: str) -> Any:
    """Returns a generation setting as `generate` would: the call's, its `generation_config`'s, or the model's."""
    if name in kwargs:
        return kwargs[name]
    configs = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
