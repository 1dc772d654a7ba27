"""`patch(model)`: plain `model.generate(...)` blends from then on; `remove()` leaves the model as it was.

Two attributes of this one instance are set: `generate`, which scopes a call and takes its options, and the decoder's
`forward`, which inside such a call runs the phases of `blending.py` for the one forward that prefills the whole prompt.
Every other forward, decoding included, goes straight to the original.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MethodType, TracebackType
from typing import Any, overload

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .blending import Blending
from .caches import hand_over
from .calibration import Calibration, calibrate
from .config import BlendConfig
from .controller import Controller, Profile
from .fallbacks import Fallback, generate_option, plan
from .filler import filler_ids, require_filler
from .host import CACHE, CACHE_NAMES, cache_given
from .models import forget, host_of
from .precomputing import Precomputed, precompute
from .profiling import profile_of
from .prompt import ChunkSpans, Prompt
from .separator import Separator
from .store import Store, TieredStore, store_at
from .trace import BlendTrace, Level, as_level
from .verification import Verification, Verifier, Verify, verify_prompt

logger = logging.getLogger(__name__)


@dataclass
class _Call:
    """One running `generate` of a patched model."""

    blender: Blender
    trace: BlendTrace
    started: float
    config: BlendConfig
    input_ids: torch.Tensor | None  # (1, T) to be blended; None: this call is stock
    spans: ChunkSpans
    num_tokens: int
    controller: Controller | None = None
    tokens_seen: int = 0
    ahead: tuple[Blending, Any] | None = None  # what was blended before the forward was reached, and its output

    def note_forward(self, num_tokens: int) -> None:
        """Called as a forward begins: the first one after the whole prompt was seen brings the first new token."""
        if self.trace.ttft_ms is None and self.tokens_seen >= self.num_tokens:
            self.trace.ttft_ms = 1000 * (time.perf_counter() - self.started)
        self.tokens_seen += num_tokens


_WAIT = {"assistant_model", "custom_generate", "inputs_embeds"}  # calls of generate that are not blended ahead

# Per thread and task, so that many may generate on one patched model at once.
_call: ContextVar[_Call | None] = ContextVar("hfblend_call", default=None)


def patch(
    model: nn.Module,
    config: BlendConfig | None = None,
    tokenizer: Any = None,
    store: Store | str | os.PathLike[str] | None = None,
    verify: Verify | int | None = None,
    trace: Level = "summary",
) -> Blender:
    """Lets `model.generate` reuse and blend chunk KV. Only this instance changes, until `remove()`.

    >>> with hfblend.patch(model, tokenizer=tokenizer) as blender:  # doctest: +SKIP
    ...     model.generate(**prompt.inputs(), max_new_tokens=64)
    ...     print(blender.trace)

    Args:
        model: a causal LM in eval mode, on one device.
        config: default `BlendConfig()`; `model.generate(..., blend_config=…)` overrides it for one call.
        tokenizer: needed to split plain `input_ids` at a separator given as text, and for `chunk_prefix="filler"`.
        store: where chunk KV is kept; a folder keeps it on disk too, for later and for other processes
            (`hfblend.store.DiskStore`), a URL such as `"s3://bucket/prefix"` for other machines too
            (`hfblend.store.RemoteStore`). Default, a `MemoryStore` of its own.
        verify: after every k-th blended call, compares it with a full prefill of its prompt, and warns (logging, and
            `trace.verification`) above a bound: `hfblend.Verify(every=50, max_kl=0.1)`, or k alone.
        trace: how much `blender.trace` tells: `"summary"`, which costs nothing, `"tokens"`, or `"full"`, which costs
            time and memory (`hfblend.BlendTrace`). Never changes what is computed.

    Returns:
        The handle: `trace`, `store`, `config`, `remove()`; also a context manager.

    Raises:
        UnsupportedModel: the model's cached KV cannot be moved (the message says why).
        ValueError: a model in training mode, or already patched; check layers beyond the model.
    """
    config = BlendConfig() if config is None else config
    return Blender(model, config, tokenizer, store_at(store), verify, trace)


class Blender:
    """The handle of a patched model.

    Attributes:
        model: the patched instance.
        store: where its chunk KV is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BlendConfig,
        tokenizer: Any,
        store: Store,
        verify: Verify | int | None = None,
        trace: Level = "summary",
    ) -> None:
        self.model: Any = model
        self.store, self.tokenizer = store, tokenizer
        self._level = as_level(trace)
        self._verifier = None if verify is None else Verifier(verify)
        self.host = host_of(model)
        if self.host.unwrapped_forward is not None:
            raise ValueError("This model is already patched. Use its blender, or call blender.remove() first.")
        self._controllers: dict[tuple[Any, ...], Controller] = {}
        self.config = config
        self._traces = threading.local()
        self._wrap()

    # --- settings and results -------------------------------------------------------------------------------------

    @property
    def config(self) -> BlendConfig:
        """The settings of calls that bring none of their own; may be replaced at any time."""
        return self._config

    @config.setter
    def config(self, config: BlendConfig) -> None:
        self._config = self._settled(config)
        self._separator = self._separator_of(config)

    @property
    def trace(self) -> BlendTrace:
        """What the last call of `generate` in this thread did."""
        return getattr(self._traces, "last", None) or BlendTrace()

    def _settled(self, config: BlendConfig) -> BlendConfig:
        """The settings, checked against the model, with the filler's ids filled in."""
        if not isinstance(config, BlendConfig):
            raise TypeError(f"config must be a hfblend.BlendConfig, got {type(config).__name__}.")
        config.require_layers(self.host.num_layers)
        self._controller_of(config)
        if config.chunk_prefix != "filler" or config.filler_ids:
            return config
        ids = () if self.tokenizer is None else filler_ids(self.tokenizer)
        return replace(config, filler_ids=require_filler(ids))

    def _separator_of(self, config: BlendConfig) -> Separator | None:
        if config.separator is None or (isinstance(config.separator, str) and self.tokenizer is None):
            return None
        return Separator(config.separator, self.tokenizer)

    # --- against full prefill -------------------------------------------------------------------------------------

    @overload
    def verify(self, prompts: Prompt, **options: Any) -> Verification: ...

    @overload
    def verify(self, prompts: Iterable[Prompt], **options: Any) -> list[Verification]: ...

    def verify(self, prompts: Prompt | Iterable[Prompt], **options: Any) -> Verification | list[Verification]:
        """How far blending a prompt, with this blender's store and settings, is from its full prefill.

        >>> print(blender.verify(prompt))  # doctest: +SKIP

        Args:
            prompts: one, or several.
            options: of `hfblend.verification.verify_prompt`.

        Returns:
            A `hfblend.Verification`; a list of them for several prompts.
        """
        if isinstance(prompts, Prompt):
            return verify_prompt(self.model, prompts, **{"store": self.store, "config": self.config, **options})
        return [self.verify(prompt, **options) for prompt in prompts]

    def calibrate(self, prompts: Iterable[Prompt], *, max_kl: float, **options: Any) -> Calibration:
        """The settings with the smallest ratio that keeps the KL from full prefill below `max_kl`; nothing is set.

        >>> blender.config = blender.calibrate(prompts, max_kl=0.05).config  # doctest: +SKIP

        Args:
            options: of `hfblend.calibration.calibrate`.
        """
        options = {"store": self.store, "config": self.config, **options}
        return calibrate(self.model, prompts, max_kl=max_kl, **options)

    def profile(self, *, refresh: bool = False) -> Profile:
        """What this machine takes to prefill, to blend and to load from the store; measured once, and kept.

        Args:
            refresh: measure again, after the machine or the store has changed.
        """
        profile = profile_of(self.model, self.store, self.config, refresh=refresh)
        self._controllers.clear()
        return profile

    def _controller_of(self, config: BlendConfig) -> Controller | None:
        """What settles `"auto"`; the first time, the machine is measured, or what was measured before is read."""
        if not config.is_auto:
            return None
        key = (id(self.store), config.selection, config.check_layers, config.score_layers, config.least_ratio)
        if key not in self._controllers:
            self._controllers[key] = Controller(profile_of(self.model, self.store, config), config.least_ratio)
        return self._controllers[key]

    # --- ahead of time --------------------------------------------------------------------------------------------

    def precompute(
        self, chunks: Iterable[str | Sequence[int]], *, prefix: str | Sequence[int] = (), **options: Any
    ) -> Precomputed:
        """Stores the KV of many chunks before the first prompt with them comes; what is there already is skipped.

        >>> print(blender.precompute(texts, prefix=system))  # doctest: +SKIP

        Args:
            chunks: texts or token ids; a generator is never held whole.
            prefix: text or ids of all that will stand before the first chunk: `prompt.prefix_ids`.
            options: of `hfblend.precomputing.precompute`: `batch_size`, `progress`, `separator`, ….

        Returns:
            A `hfblend.precomputing.Precomputed`: how many chunks, tokens, bytes, seconds.
        """
        options = {"store": self.store, "config": self.config, "tokenizer": self.tokenizer, **options}
        return precompute(self.model, chunks, prefix=prefix, **options)

    # --- in and out -----------------------------------------------------------------------------------------------

    def _wrap(self) -> None:
        decoder = self.host.decoder
        self._before = [(m, name, m.__dict__.get(name)) for m, name in ((self.model, "generate"), (decoder, "forward"))]
        self._stock_generate, self._stock_forward = self.model.generate, decoder.forward
        self.host.unwrapped_forward = self._stock_forward
        # Bound methods, so that a deep copy of the model is not this instance, and functools.wraps of the class's
        # function, because `generate` reads the signature of `forward`.
        self._wrappers = [
            self._bind(self.model, "generate", self._generate),
            self._bind(decoder, "forward", self._forward),
        ]

    @staticmethod
    def _bind(module: nn.Module, name: str, run: Any) -> MethodType:
        own = getattr(type(module), name)

        @functools.wraps(own)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs) if self is module else own(self, *args, **kwargs)

        method = MethodType(wrapper, module)
        setattr(module, name, method)
        return method

    def remove(self) -> None:
        """Takes hfblend off the model again, and waits until its chunk KV is stored. Twice does nothing."""
        if self.host.unwrapped_forward is None:
            return
        for (module, name, before), wrapper in zip(self._before, self._wrappers):
            if module.__dict__.get(name) is not wrapper:
                logger.warning("%s.%s was wrapped again after patch; hfblend stays inside, inactive.", module, name)
            elif before is None:
                del module.__dict__[name]
            else:
                setattr(module, name, before)
        self.host.unwrapped_forward = None
        self.host.graphs = None  # and their memory
        forget(self.model)
        if isinstance(self.store, TieredStore):
            self.store.flush()

    def __enter__(self) -> Blender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    # --- generate -------------------------------------------------------------------------------------------------

    def _generate(
        self,
        *args: Any,
        chunk_spans: Iterable[Sequence[int]] | None = None,
        blend_config: BlendConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decides whether this call is blended, and runs stock `generate` in that scope."""
        config = self.config if blend_config is None else self._settled(blend_config)
        controller = self._controller_of(config)
        started = time.perf_counter()
        separator = self._separator if config.separator == self.config.separator else self._separator_of(config)
        if chunk_spans is not None:
            chunk_spans = chunk_spans if isinstance(chunk_spans, ChunkSpans) else ChunkSpans(chunk_spans)
            args, kwargs = self._on_device(args), self._on_device(kwargs)
        planned = plan(self.model, args, kwargs, chunk_spans, config, separator, nested=_call.get() is not None)
        trace = BlendTrace(
            num_tokens=planned.num_tokens, num_layers=self.host.num_layers, level=self._level, tokenizer=self.tokenizer
        )
        if planned.fallback is not Fallback.NESTED:  # the trace is that of the call which the user made
            self._traces.last = trace
        call = _Call(self, trace, started, config, planned.input_ids, planned.spans, planned.num_tokens, controller)
        if planned.fallback:
            self._fall_back(call, planned.fallback)
        elif generate_option(self.model, kwargs, "prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None  # the blended prefill is one forward; pieces would hide the prompt
        self._blend_ahead(call, kwargs)
        token = _call.set(None if planned.fallback is Fallback.NESTED else call)
        try:
            output = self._stock_generate(*args, **kwargs)
        finally:
            _call.reset(token)
            self._give_up_ahead(call)
        if call.input_ids is not None:
            self._fall_back(call, Fallback.NOT_REACHED)
        self._note_end(call, output)
        if self._verifier is not None and trace.blended and planned.input_ids is not None:
            prompt = Prompt(planned.input_ids, planned.spans)
            self._verifier.after(self.model, prompt, self.store, config.settled(trace.decision), trace)
        return output

    def _on_device(self, values: Any) -> Any:
        def move(value: Any) -> Any:
            return value.to(self.host.device) if torch.is_tensor(value) else value

        if isinstance(values, dict):
            return {name: move(value) for name, value in values.items()}
        return tuple(move(value) for value in values)

    def _fall_back(self, call: _Call, fallback: Fallback) -> None:
        call.input_ids = None
        call.trace.blended, call.trace.fallback = False, fallback.name.lower()
        logger.log(fallback.level, "Not blended, stock generate runs: %s", fallback.reason)

    @staticmethod
    def _note_end(call: _Call, output: Any) -> None:
        """With a single new token there is no second forward that would have marked its arrival."""
        sequences = output if torch.is_tensor(output) else getattr(output, "sequences", None)
        if call.trace.ttft_ms is None and sequences is not None and sequences.shape[1] == call.num_tokens + 1:
            call.trace.ttft_ms = 1000 * (time.perf_counter() - call.started)

    # --- the decoder's forward ------------------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._stock_forward(*args, **kwargs)
        call = _call.get()
        if call is not None and call.blender is self:
            kwargs.update(zip(self.host.decoder_parameters, args))
            args = ()
            ids = kwargs.get("input_ids")
            call.note_forward(0 if ids is None else ids.shape[1])
            if ids is not None and self._is_whole_prompt(call, ids, kwargs):
                return self._blended_forward(call, kwargs)
        with self.host.lock.shared():
            return self._stock_forward(*args, **kwargs)

    def _is_whole_prompt(self, call: _Call, ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether this forward prefills the call's prompt (perhaps with draft tokens behind it) into an empty cache."""
        if call.input_ids is None or torch.is_grad_enabled() or ids.shape[1] < call.num_tokens:
            return False
        cache = cache_given(kwargs)
        is_empty = cache is None or int(cache.get_seq_length()) == 0
        return is_empty and bool((ids[:, : call.num_tokens] == call.input_ids).all())

    @torch.compiler.disable
    def _blended_forward(self, call: _Call, kwargs: dict[str, Any]) -> Any:
        """The decoder's output for the whole prompt, with the rows of the last pass only, and the cache filled."""
        ids, cache = kwargs.pop("input_ids"), cache_given(kwargs)
        cache = DynamicCache(config=self.host.config) if cache is None else cache
        # There is no padding, and positions are 0 … T − 1.
        for name in ("attention_mask", "position_ids", "use_cache", *CACHE_NAMES):
            kwargs.pop(name, None)
        call.input_ids = None
        plain = all(value is None or value is False for value in kwargs.values())
        if call.ahead is not None and ids.shape[1] == call.num_tokens and plain:
            state, output = call.ahead
        else:
            self._give_up_ahead(call)
            call.trace.restart()
            state, output = self._blend(call, ids, kwargs)
        call.ahead = None
        state.join(output)
        hand_over(state.buffers, ids.shape[1], ids.shape[0], cache)
        state.clock.end_of("hand_over")
        output.last_hidden_state = output.last_hidden_state.expand(ids.shape[0], -1, -1)  # (B, S, C)
        output[CACHE] = cache
        return output

    def _blend_ahead(self, call: _Call, kwargs: dict[str, Any]) -> None:
        """Starts a GPU on the prompt before stock `generate` prepares itself, which takes Python some milliseconds.

        Only what is sure to be asked for: calls with drafts, or with options that reach the decoder, wait for it.
        """
        options = ("output_attentions", "output_hidden_states", "prompt_lookup_num_tokens", "assistant_early_exit")
        waits = any(generate_option(self.model, kwargs, name) for name in options) or bool(_WAIT & kwargs.keys())
        if call.input_ids is None or not self._runs_beside_python() or waits:
            return
        with torch.no_grad():
            call.ahead = self._blend(call, call.input_ids.to(self.host.device), {})

    @staticmethod
    def _give_up_ahead(call: _Call) -> None:
        """What was blended ahead and is not used ends before anything takes its memory."""
        if call.ahead is not None:
            state, output = call.ahead
            state.join(output)
            call.ahead = None

    def _runs_beside_python(self) -> bool:
        return self.host.device.type == "cuda"

    def _blend(self, call: _Call, ids: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Blending, Any]:
        """Blends the call's prompt; `kwargs` go to the decoder's forward."""
        token = _call.set(None)
        try:
            state = Blending(
                self.host, ids[:1], call.spans, self.store, call.config, call.trace, call.num_tokens,
                call.controller,
            )  # fmt: skip
            return state, state.start(functools.partial(self.host.decoder_forward, **kwargs))
        finally:
            _call.reset(token)
