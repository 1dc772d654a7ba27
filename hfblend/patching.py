"""`patch(model)`: from then on, plain `model.generate(...)` blends; `remove()` restores the model.

Two attributes of this one instance are set: `generate`, which scopes a call and takes its options, and the decoder's
`forward`: inside such a call, the one forward that prefills the whole prompt runs the phases of `blending.py`. Every
other forward goes straight to the original; on a GPU, decoding replays a graph of it.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import MethodType, TracebackType
from typing import Any, overload
from weakref import WeakSet

import torch
from torch import nn

from .arguments import described, is_tokenizer, require_tokenizer
from .config import BlendConfig, Find, as_config
from .controller import Controller, Profile
from .generate.asked import has_inner_hooks
from .generate.blending import require_prompts
from .generate.call import Call
from .generate.fallbacks import Fallback
from .generate.find import Finder
from .generate.learn import Traffic
from .generate.order import Order, reordered
from .generate.precompute import Precomputed, precompute
from .generate.request import Request, generate_option, require_token_ids
from .kv.streams import switch_back
from .locks import Running, innermost, keeps_alive, put_back
from .measure.blame import blame_prompt
from .measure.calibrate import Layers, calibrate
from .measure.divergence import RATIOS
from .measure.profile import profile_of
from .measure.results import Blame, Calibration, Verification
from .measure.verify import Verifier, Verify, verify_prompt
from .model.compiled import as_written, give_back, set_aside, tidy
from .model.hf_model import UnsupportedModel, cache_given, is_paged
from .model.weights.offloading import device_of
from .prompts.filler import filler_ids, require_filler
from .prompts.prompt import Prompt
from .prompts.separator import Separator
from .store import Store, flush, store_at
from .support.registry import forget, model_of
from .trace.facts import Level
from .trace.trace import BlendTrace, as_level, name_of

logger = logging.getLogger(__name__)


_patched: WeakSet[nn.Module] = WeakSet()  # decoders, the modules that hold their layers, and the layers
_HOOKS_NOTE = (
    "Forward hooks inside the model see passes over some of a prompt's rows; blend_config=BlendConfig(enabled=False) "
    "gives them the whole prompt."
)
_BATCHING = "init_continuous_batching"  # `generate_batch` and the manager's context call it, too


def patch(
    model: nn.Module,
    config: BlendConfig | None = None,
    tokenizer: Any = None,
    store: Store | str | os.PathLike[str] | None = None,
    verify: Verify | int | None = None,
    trace: Level = "summary",
    find: Find | None = None,
) -> Blender:
    """Lets `model.generate` reuse and blend chunk KV. Only this instance changes, until `remove()`.

    >>> with hfblend.patch(model, tokenizer=tokenizer) as blender:  # doctest: +SKIP
    ...     model.generate(**prompt.inputs(), max_new_tokens=64)
    ...     print(blender.trace)

    Args:
        model: a causal LM in eval mode, or the wrapper that peft puts around one.
        config: default `BlendConfig()`; `model.generate(..., blend_config=…)` overrides it for one call.
        tokenizer: needed to split plain `input_ids` at a separator given as text, and for `chunk_prefix="filler"`.
        store: keeps chunk KV; a folder keeps it on disk too, for later and for other processes
            (`hfblend.store.DiskStore`), a URL such as `"s3://bucket/prefix"` for other machines too
            (`hfblend.store.RemoteStore`). Default, a new `MemoryStore`.
        verify: after every k-th blended prompt, compares it with a full prefill, and warns (logging, and
            `trace.verification`) above a bound: `hfblend.Verify(every=50, max_kl=0.1)`, or k alone.
        trace: level of detail of `blender.trace`: `"summary"`, which costs nothing, `"tokens"`, or `"full"`, which
            costs time and memory (`hfblend.BlendTrace`). Results are the same.
        find: `"stored"` finds the store's texts in plain `input_ids`, without marks; `"learn"` also stores passages
            that come again. As `BlendConfig(find=…)`, and `model.generate(..., find=…)` for one call.

    Returns:
        The handle: `trace`, `store`, `config`, `remove()`; also a context manager.

    Raises:
        UnsupportedModel: the model's cached KV cannot be moved (the message says why).
        ValueError: a model in training mode, or already patched; check layers beyond the model.
        TypeError: an argument of another type, or in another's place.
    """
    if is_tokenizer(config) or isinstance(config, str | os.PathLike) or hasattr(config, "put"):
        place = "tokenizer" if is_tokenizer(config) else "store"
        raise TypeError(f"config must be a hfblend.BlendConfig, got {described(config)}: write {place}=….")
    return Blender(model, _with(as_config(config), find), tokenizer, store, verify, trace)


def _with(config: BlendConfig, find: Find | None) -> BlendConfig:
    return config if find is None else replace(config, find=find)


class Blender:
    """The handle of a patched model.

    Attributes:
        model: the patched instance.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BlendConfig,
        tokenizer: Any = None,
        store: Store | str | os.PathLike[str] | None = None,
        verify: Verify | int | None = None,
        trace: Level = "summary",
    ) -> None:
        self.model: Any = model
        self.store = store
        self.tokenizer: Any = None if tokenizer is None else require_tokenizer(tokenizer)
        self._level = as_level(trace)
        self._verifier = None if verify is None else Verifier(verify)
        self.hf_model = model_of(model)
        if not hasattr(model, "generate"):
            raise UnsupportedModel(f"model must be a causal LM, got {described(model)}, which has no generate.")
        self._require_unpatched()
        self._controllers: dict[tuple[Any, ...], Controller] = {}
        self.config = as_config(config)
        self._traces = threading.local()
        self._has_noted_batching = self._has_noted_hooks = False
        self._heard: dict[str, Traffic] = {}  # by scope
        self._before: dict[tuple[nn.Module, str], Any] = {}  # of each attribute that is wrapped; `None`: the class's
        self._wrappers: dict[tuple[nn.Module, str], MethodType] = {}
        self._taken: list[nn.Module] = []
        try:
            self._wrap()
        except BaseException:  # an interrupt: the user gets no handle
            self._unwrap()
            self.hf_model.unwrapped_forward = None
            raise

    def __repr__(self) -> str:
        name = type(self.hf_model.model).__name__
        return f"<Blender of a {name}, removed>" if self._is_removed else f"<Blender of a {name}: {self._summary()}>"

    def _repr_html_(self) -> str:
        from .display.reprs import card

        figures = [("model", type(self.hf_model.model).__name__), ("settings", self._summary()),
                   ("store", repr(self.store).strip("<>")), ("last call", str(self.trace))]  # fmt: skip
        return card("Blender, removed" if self._is_removed else "Blender", figures)

    def _summary(self) -> str:
        """suffix_attention 0.15, no correction"""
        config = self.config
        if not (config.enabled and config.check_layers):
            return "nothing recomputed" if config.enabled else "off"
        rule, correction = name_of(config.selection), name_of(config.correction)
        ratios = "auto" if config.is_auto else ", ".join(f"{ratio:g}" for ratio in config.fixed_ratios)
        if config.correction == BlendConfig.correction:
            return f"{rule} {ratios}"
        return f"{rule} {ratios}, " + (f"correction {correction}" if correction else "no correction")

    # --- settings and results -------------------------------------------------------------------------------------

    @property
    def config(self) -> BlendConfig:
        """The settings of calls without `blend_config`; may be replaced at any time."""
        return self._config

    @config.setter
    def config(self, config: BlendConfig) -> None:
        self._config = self._settled(config)
        self._separator = self._separator_of(self._config)

    @property
    def store(self) -> Store:
        """The store of chunk KV; another may be set at any time, also as a folder or a URL."""
        return self._store

    @store.setter
    def store(self, store: Store | str | os.PathLike[str] | None) -> None:
        self._store = store_at(store)

    @property
    def trace(self) -> BlendTrace:
        """The trace of this thread's last call of `generate`; of a batch, that of the first row."""
        return self.traces[0]

    @property
    def traces(self) -> list[BlendTrace]:
        """The traces of the rows of this thread's last call of `generate`; rows of one prompt share theirs."""
        return getattr(self._traces, "last", None) or [BlendTrace()]

    def _settled(self, config: BlendConfig, name: str = "config") -> BlendConfig:
        """Returns the settings, checked against the model, with the filler's ids filled in."""
        config = as_config(config, name)
        config.require_layers(self.hf_model.num_kv_layers)
        self._controller_of(config)
        if config.chunk_prefix != "filler" or config.filler_ids:
            return config
        ids = () if self.tokenizer is None else filler_ids(self.tokenizer)
        return replace(config, filler_ids=require_filler(ids))

    def _separator_of(self, config: BlendConfig) -> Separator | None:
        if config.separator is None or (isinstance(config.separator, str) and self.tokenizer is None):
            return None
        return Separator(config.separator, self.tokenizer)

    def _finder_of(self, config: BlendConfig) -> Finder | None:
        if config.find is None:
            return None
        self.hf_model.ranks.require_one("find", "Mark the chunks.")
        self.hf_model.fingerprint.current(self.hf_model.model)  # a prompt in which nothing is found asks no more
        finder = Finder(self.hf_model, self.store, config)
        if config.find == "learn" and config.on_miss == "isolated":
            finder.heard = self._heard.setdefault(finder.scope, Traffic())
        return finder

    # --- against full prefill -------------------------------------------------------------------------------------

    @overload
    def verify(self, prompts: Prompt, *, num_tokens: int = 16, **options: Any) -> Verification: ...

    @overload
    def verify(self, prompts: Iterable[Prompt], *, num_tokens: int = 16, **options: Any) -> list[Verification]: ...

    def verify(
        self, prompts: Prompt | Iterable[Prompt], *, num_tokens: int = 16, **options: Any
    ) -> Verification | list[Verification]:
        """Measures how far blending a prompt, with this blender's store and settings, is from its full prefill.

        >>> print(blender.verify(prompt))  # doctest: +SKIP

        Args:
            prompts: one, or several.
            num_tokens: of each answer that are compared.
            options: another `store` or `config`.

        Returns:
            A `hfblend.Verification`; a list of them for several prompts.

        Raises:
            TypeError: text, ids or inputs instead of prompts.
            ValueError: an empty list.
        """
        options = {"store": self.store, "config": self.config, "num_tokens": num_tokens, **options}
        if isinstance(prompts, Prompt):
            return verify_prompt(self.model, prompts, **options)
        return [verify_prompt(self.model, prompt, **options) for prompt in require_prompts(prompts, "verify")]

    def blame(
        self,
        prompt: Prompt,
        *,
        num_tokens: int = 64,
        seconds: float = 60.0,
        progress: Callable[[str], None] | None = None,
        **options: Any,
    ) -> Blame:
        """Searches for the chunks and tokens that, recomputed too, bring full prefill's answer back.

        >>> print(blender.blame(prompt))  # doctest: +SKIP
        >>> hfblend.show(blender.blame(prompt)).save("why.html")  # doctest: +SKIP

        Args:
            prompt: one whose blended answer, with this blender's store and settings, is not full prefill's.
            num_tokens: the longest answer; it ends earlier where the model ends it.
            seconds: no new blend begins after these.
            progress: called with a line of text after each blend, say `print`; what it raises ends the search.
            options: another `store`, `config` or `tokenizer`.

        Returns:
            A `hfblend.Blame`.
        """
        options = {"store": self.store, "config": self.config, "tokenizer": self.tokenizer, **options}
        return blame_prompt(self.model, prompt, num_tokens=num_tokens, seconds=seconds, progress=progress, **options)

    def calibrate(
        self,
        prompts: Iterable[Prompt],
        *,
        max_kl: float,
        ratios: Sequence[float] = RATIOS,
        layers: Sequence[Layers] | None = None,
        num_tokens: int = 16,
        **options: Any,
    ) -> Calibration:
        """Finds the settings with the smallest ratio that keeps the KL from full prefill below `max_kl`; sets nothing.

        >>> blender.config = blender.calibrate(prompts, max_kl=0.05).config  # doctest: +SKIP

        Args:
            prompts: such as the model will get.
            max_kl: in nats, of the mean over the prompts.
            ratios: to choose from.
            layers: to choose from too; see `hfblend.measure.calibrate.calibrate`.
            num_tokens: of each answer that are compared.
            options: another `store` or `config`.
        """
        options = {"store": self.store, "config": self.config, **options}
        return calibrate(
            self.model, prompts, max_kl=max_kl, ratios=ratios, layers=layers, num_tokens=num_tokens, **options
        )

    def profile(self, *, refresh: bool = False) -> Profile:
        """Returns the costs of prefilling, blending and loading from the store on this machine, measured once.

        Args:
            refresh: measure again, after the machine or the store has changed.
        """
        profile = profile_of(self.model, self.store, self.config, refresh=refresh)
        self._controllers.clear()
        return profile

    def _controller_of(self, config: BlendConfig) -> Controller | None:
        """Returns the controller of `"auto"`; the first time, measures the machine, or reads an earlier measurement."""
        if not config.is_auto:
            return None
        self.hf_model.ranks.require_one()
        key = (id(self.store), config.selection, config.check_layers, config.score_layers, config.least_ratio)
        if key not in self._controllers:
            self._controllers[key] = Controller(profile_of(self.model, self.store, config), config.least_ratio)
        return self._controllers[key]

    def refresh(self) -> None:
        """Makes the next prompt read all weights again: needed only after a write that their sample may miss.

        >>> model.lm_head.weight.data[0, 0] = 1  # doctest: +SKIP
        >>> blender.refresh()  # doctest: +SKIP
        """
        self.hf_model.fingerprint.refresh()

    # --- ahead of time --------------------------------------------------------------------------------------------

    def precompute(
        self, chunks: Iterable[str | Sequence[int]], *, prefix: str | Sequence[int] = (), **options: Any
    ) -> Precomputed:
        """Stores the KV of many chunks before the first prompt with them comes; skips stored ones.

        >>> print(blender.precompute(texts, prefix=system))  # doctest: +SKIP

        Args:
            chunks: texts or token ids; a generator is not expanded.
            prefix: text or ids of all that will precede the first chunk: `prompt.prefix_ids`.
            options: of `hfblend.generate.precompute.precompute`: `batch_size`, `progress`, `separator`, ….

        Returns:
            A `hfblend.generate.precompute.Precomputed`: how many chunks, tokens, bytes, seconds.
        """
        options = {"store": self.store, "config": self.config, "tokenizer": self.tokenizer, **options}
        return precompute(self.model, chunks, prefix=prefix, **options)

    def reordered(self, prompt: Prompt, order: Order) -> Prompt:
        """Returns a prompt with its documents in another order; in a conversation, those of the last turn.

        >>> prompt = blender.reordered(prompt, "prefix")  # doctest: +SKIP
        >>> prompt.note  # doctest: +SKIP
        "… Documents ordered by prefix (3, 1, 2 of those given): 301 of their tokens are an exact prefix in the store."

        Args:
            order: `"prefix"` puts first what this blender's store holds as computed right there: with the default
                settings one document, with `on_miss="in_context"` all that an earlier prompt had in a row.
                `"relevance"` puts the document last that shares most rare tokens with the question (BM25).

        Raises:
            TypeError: no prompt.
            ValueError: another order, or documents with different texts between them.
            ImportError: the package `bm25s` is missing, for `"relevance"`.
        """
        return reordered(self.model, prompt, order, self.store, self.config)

    # --- in and out -----------------------------------------------------------------------------------------------

    def _require_unpatched(self) -> None:
        if self.hf_model.unwrapped_forward is not None:
            raise ValueError(
                "This model is already patched. Use its blender, or call remove() on model.generate.blender first."
            )
        if any(module in _patched for module in self._shared_modules()):
            raise ValueError(
                f"This {type(self.hf_model.model).__name__} has decoder layers of another model that is patched "
                "already. Generate with that model, or call remove() on its blender first."
            )

    def _shared_modules(self) -> list[nn.Module]:
        return [self.hf_model.decoder, self.hf_model.layer_owner, *self.hf_model.layers]

    def _wrap(self) -> None:
        model, decoder = self.hf_model.model, self.hf_model.decoder
        runs = [(self.model, "generate", self._generate), (decoder, "forward", self._forward)]
        runs += [(model, "forward", self._model_forward)]
        if hasattr(type(model), _BATCHING):
            runs += [(model, _BATCHING, self._init_continuous_batching)]
        self._before = {(module, name): vars(module).get(name) for module, name, _ in runs}
        self._taken = self._shared_modules()
        # Bound methods, so that a deep copy of the model is not this instance, and functools.wraps of the class's
        # function, because `generate` reads the signature of `forward`.
        for module, name, run in runs:
            wrapper = functools.update_wrapper(functools.partial(run), getattr(type(module), name))
            wrapper.blender = self  # type: ignore[attr-defined]
            self._wrappers[module, name] = MethodType(wrapper, module)
            setattr(module, name, self._wrappers[module, name])
        _patched.update(self._taken)
        # Last: until then, the wrappers do nothing.
        self.hf_model.unwrapped_forward = functools.partial(self._written, decoder, "forward")

    def _stock(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """Returns a module's method without hfblend: its own, or else its class's, which may be replaced at any time.

        A copy of the module, which has the wrapper of its original, has the class's.
        """
        own = self._before.get((module, name))
        return functools.partial(getattr(type(module), name), module) if own is None else own

    def _written(self, module: nn.Module, name: str) -> Callable[..., Any]:
        """Returns the same, uncompiled."""
        own = self._before.get((module, name))
        return self._stock(module, name) if own is None else as_written(own)

    def _is_inactive(self, module: nn.Module) -> bool:
        """Whether this blender has been removed, or the module is a copy of the one that is patched."""
        return self._is_removed or all(module is not one for one, _ in self._before)

    def remove(self) -> None:
        """Takes hfblend off the model and waits until its chunk KV is stored. A second call does nothing."""
        if self._is_removed:
            return
        self._unwrap()
        self.hf_model.graphs.clear()  # and their memory
        self.hf_model.decoding.clear()
        self._tidy()
        forget(self.model)
        self.hf_model.unwrapped_forward = None  # last: an interrupted removal can be repeated
        flush(self.store)

    def _unwrap(self) -> None:
        for (module, name), wrapper in self._wrappers.items():
            now, before = vars(module).get(name), self._before[module, name]
            if now is wrapper:
                put_back(vars(module), name, wrapper, *(() if before is None else (before,)))
            elif now is not before:
                logger.warning("%s.%s was wrapped again after patch; hfblend stays inside, inactive.", module, name)
        _patched.difference_update(self._taken)

    def __enter__(self) -> Blender:
        if self._is_removed:
            raise ValueError("This blender was removed from its model; call hfblend.patch(model) again.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def _is_removed(self) -> bool:
        return self.hf_model.unwrapped_forward is None

    # --- generate -------------------------------------------------------------------------------------------------

    def _generate(
        self,
        module: nn.Module,
        /,
        *args: Any,
        chunk_spans: Iterable[Any] | None = None,
        blend_config: BlendConfig | None = None,
        find: Find | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decides whether this call is blended, and runs stock `generate` in that scope."""
        stock_generate = self._stock(module, "generate")
        if self._is_inactive(module):  # or inside a wrapper that was put around this one
            given = {"chunk_spans": chunk_spans, "blend_config": blend_config, "find": find}
            return stock_generate(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        self._tidy()
        require_token_ids(self.model, args, kwargs)
        args, kwargs = self.hf_model.named_behind_the_ids(args, kwargs)
        config = self.config if blend_config is None else self._settled(blend_config, "blend_config")
        config = _with(config, find)
        controller = self._controller_of(config)
        started = time.perf_counter()
        separator = self._separator if config.separator == self.config.separator else self._separator_of(config)
        if chunk_spans is not None:
            args, kwargs = self._on_device(args, kwargs)
        is_inside = self._running_call() is not None or self.hf_model.lock.is_mine
        finder = None if is_inside or not config.enabled else self._finder_of(config)
        planned = Request(
            self.hf_model,
            self.model,
            args,
            kwargs,
            chunk_spans,
            config,
            separator,
            is_inside,
            None if finder is None else finder.spans,
        ).plan()
        store = self.store if finder is None else finder.found_in
        by_stock = kwargs.get("custom_generate") is None and self._runs_stock_loops()
        call = Call(self.hf_model, planned, by_stock, config, store, controller, started, self._level, self.tokenizer)
        nested = planned.fallback is Fallback.NESTED
        if not nested:  # the traces are those of the user's call
            self._traces.last = call.traces
        if call.is_blended and generate_option(self.model, kwargs, "prefill_chunk_size") is not None:
            kwargs["prefill_chunk_size"] = None  # the blended prefill is one forward; pieces would hide the prompt
        if nested:
            output = Running().do(stock_generate, *args, **kwargs)
        else:
            output = self._run(call, stock_generate, args, kwargs)
        call.end(output)
        if self._verifier is not None and call.is_blended and planned.given is None:
            for prompt, trace in zip(planned.prompts, call.traces_of_prompts):
                ratio = None if trace.decision is None else trace.decision.share
                self._verifier.after(self.model, prompt, store, config.settled(ratio), trace)
        return output

    @keeps_alive("call")
    def _run(
        self, call: Call, stock_generate: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stock `generate`; forwards inside find the call on the stack."""
        try:
            if self._blends_ahead():
                call.blend_ahead(kwargs)
            if call.is_blended:
                set_aside(call, self.hf_model.model, self.hf_model.decoder)
            return stock_generate(*args, **kwargs)
        finally:
            call.give_up_ahead()
            give_back(call)

    def _running_call(self) -> Call | None:
        """Returns the call of this model that this thread runs; work of a blended prefill is part of none."""
        call = innermost()
        if not isinstance(call, Call) or call.hf_model is not self.hf_model or call.is_prefilling:
            return None
        return call

    def _tidy(self) -> None:
        """Ends the leftovers of work that an exception ended."""
        switch_back()
        self.hf_model.lock.tidy()
        tidy()

    def _blends_ahead(self) -> bool:
        return self.hf_model.device.type == "cuda"

    def _on_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        device = device_of(self.hf_model.decoder)
        sent = [value.to(device) if torch.is_tensor(value) else value for value in (*args, *kwargs.values())]
        return tuple(sent[: len(args)]), dict(zip(kwargs, sent[len(args) :]))

    def _runs_stock_loops(self) -> bool:
        """Whether `generate` is Transformers' own, which reads the last row of a prompt's forward."""
        kind: Any = type(self.hf_model.model)
        is_own = self._before[self.model, "generate"] is not None
        return kind.generate.__module__.startswith("transformers.") and not is_own

    def _init_continuous_batching(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not self._is_inactive(module) and self._running_call() is None:
            self._note_continuous_batching()
        return self._stock(module, _BATCHING)(*args, **kwargs)

    def _note_continuous_batching(self) -> None:
        """Notes it in this thread's trace, and once in the log."""
        fallback = Fallback.CONTINUOUS_BATCHING
        name, said = fallback.name.lower(), fallback.reason
        self._traces.last = [BlendTrace(fallback=name, fallback_reason=said, num_layers=self.hf_model.num_layers)]
        if not self._has_noted_batching:
            self._has_noted_batching = True
            logger.log(fallback.level, "Not blended, stock runs: %s", fallback.reason)

    def _note_hooks(self, call: Call) -> None:
        """Notes in the trace, and once in the log, that hooks do not see the prompt as in stock."""
        if not self._has_noted_hooks:
            self._has_noted_hooks = True
            logger.warning(_HOOKS_NOTE)
        for trace in call.traces_of_prompts:
            trace.notes.append(_HOOKS_NOTE)

    # --- the decoder's forward ------------------------------------------------------------------------------------

    def _forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        stock_forward = self._stock(module, "forward")
        if torch.compiler.is_compiling() or self._is_inactive(module):
            return stock_forward(*args, **kwargs)
        call = self._running_call()
        if call is not None:
            kwargs.update(zip(self.hf_model.decoder_parameters, args))
            args = ()
            ids = kwargs.get("input_ids")
            call.note_forward(0 if ids is None else ids.shape[1])
            if ids is not None and call.is_whole_batch(ids, kwargs):
                output = call.blended_forward(kwargs)
                if has_inner_hooks(self.hf_model):
                    self._note_hooks(call)
                return output
            is_compiled = as_written(stock_forward) is not stock_forward
            if ids is not None and not is_compiled and (output := call.decoded(ids, kwargs)) is not None:
                return output
        elif is_paged(cache_given(kwargs)):
            self._note_continuous_batching()
        return self.hf_model.lock.shared(stock_forward, *args, **kwargs)

    def _model_forward(self, module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Notes the arguments of the whole model's forward: they say whether all of a prompt's logits are wanted."""
        is_active = not torch.compiler.is_compiling() and not self._is_inactive(module)
        call = self._running_call() if is_active else None
        if call is None or not call.is_waiting:
            return self._stock(module, "forward")(*args, **kwargs)
        outer, call.asked = call.asked, {**dict(zip(self.hf_model.model_parameters, args)), **kwargs}
        try:
            return self._written(module, "forward")(*args, **kwargs)
        finally:
            call.asked = outer
