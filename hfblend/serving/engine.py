"""Blended prefill inside Transformers' continuous batching; no other file knows that.

A blended prompt enters where stock has a prompt with a matched prefix: its K/V lie in the request's blocks, all but the
last token's, and stock goes on from there.

    add_request   checks the request; it waits in stock's queue
    each step     cancelled requests go; then, in the order of coming, a request that waits
                    plain              is prefilled by stock
                    blended before     takes the blocks of an equal prompt, and stock prefills the rest of its suffix
                    to blend           is blended, at most one a step; the next ones wait for later steps
    any error     of a blend: the prompt is prefilled in full; of the engine: its requests fail, and it is rebuilt

Blocks are shared between requests of one namespace, and blended ones between equal prompts of equal settings.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import itertools
import logging
import os
import threading
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import GenerationConfig

from ..arguments import described
from ..config import BlendConfig, as_config
from ..generate.blending import Blending, require_known
from ..generate.fallbacks import Fallback
from ..kv.rows import KV
from ..model.hf_model import UnsupportedModel
from ..prompts.filler import require_filler
from ..prompts.prompt import Prompt
from ..store import Store, held_on, store_at
from ..store.sizes import num_bytes_of
from ..support.registry import model_of
from ..trace.trace import BlendTrace

if Version(transformers.__version__) < Version("5.23"):
    raise ImportError(
        f"Serving needs Transformers 5.23 or later, got {transformers.__version__}: run `pip install 'hfblend[serve]'`."
    )

from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

logger = logging.getLogger(__name__)

_SCHEDULER = "hfblend"
_PAUSE_S = 1.0  # before a dead engine is rebuilt: one that dies at once would fill the log


class EngineDown(RuntimeError):
    """The engine takes no requests: it is not started, is stopping, or died and is being rebuilt."""


@dataclass
class _Request:
    """One request, from `add_request` until its last output.

    Attributes:
        blends: whether it is to be blended; an error ends that.
        trace: of its blend; otherwise it says why it was not blended.
    """

    prompt: Prompt
    config: BlendConfig
    trace: BlendTrace
    blends: bool = field(init=False)

    def __post_init__(self) -> None:
        num_chunk_tokens = sum(stop - start for start, stop in self.prompt.chunk_spans)
        self.blends = False
        if not self.config.enabled:
            self.prefill(Fallback.DISABLED.name, Fallback.DISABLED.reason)
        elif not self.prompt.chunk_spans:
            self.prefill(Fallback.NO_CHUNKS.name, Fallback.NO_CHUNKS.reason)
        elif num_chunk_tokens < self.config.min_reused_tokens:
            self.prefill(Fallback.TOO_FEW_TOKENS.name, Fallback.TOO_FEW_TOKENS.reason)
        else:
            self.blends = True

    def prefill(self, name: str, reason: str) -> None:
        """Leaves the prompt to stock's prefill."""
        self.blends, self.trace.blended = False, False
        self.trace.fallback, self.trace.fallback_reason = name.lower(), reason

    @property
    def num_before_last(self) -> int:
        """Tokens that are in the blocks of a blended prompt: all but the last."""
        return len(self.prompt) - 1

    @property
    def num_blended(self) -> int:
        """Tokens up to the end of the last chunk: a prefill of the later ones computes what blending would."""
        return min(self.prompt.chunk_spans[-1][1], self.num_before_last)

    @cached_property
    def _digest(self) -> Any:
        """Of all that K/V of this prompt's blended tokens depend on."""
        settings = repr((self.config, tuple(self.prompt.chunk_spans))).encode()
        return hashlib.sha256(settings + array("q", self.prompt.ids).tobytes())

    def salted(self, ids: list[int], page_size: int) -> list[int]:
        """Ids to be hashed: those of the first page give way to a digest of them and of what sets this request apart.

        Every later page's hash is made from the one before it, so that no other request finds any of these blocks.
        """
        if len(ids) < page_size:
            return ids
        salt = self._digest.copy() if self.blends else hashlib.sha256(b"plain")
        salt.update(repr((self.config.namespace, ids[:page_size])).encode())
        words = array("i", salt.digest())[:page_size]
        return [*words, *[0] * (page_size - len(words)), *ids[page_size:]]


class _SaltedCache(PagedAttentionCache):
    """Stock's cache of blocks, found again under salted hashes only.

    Attributes:
        requests: by id; those that are over have no blocks.
    """

    requests: dict[str, _Request]
    page_size: int

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        salted = self.requests[request_id].salted(prompt_ids, self.page_size)
        return super().search_prefix_match(request_id, salted)

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        request = self.requests.get(state.request_id)
        if request is None or not complete_blocks:  # stock fails at a request that was cancelled during this step
            return
        ids = request.salted(state.initial_tokens + state.generated_tokens, self.page_size)
        alike = SimpleNamespace(
            request_id=state.request_id, status=state.status, initial_tokens=ids, generated_tokens=[]
        )
        super().mark_complete_blocks(alike, complete_blocks)  # type: ignore[arg-type]

    def num_matching(self, request: _Request, ids: list[int]) -> int:
        """Tokens at the beginning of a request's ids whose blocks are here."""
        if not self.use_prefix_sharing:
            return 0
        salted = request.salted(ids, self.page_size)
        return min(
            len(one.match_prefix_blocks(salted)) * one.tokens_per_page for one in self.cache_allocators.values()
        )

    def write(self, state: RequestState, buffers: dict[int, KV], count: int) -> None:
        """Writes the first `count` tokens of K/V (1, Hkv, T + room, D), by layer, to a request's blocks."""
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        places = {
            one.index: torch.tensor(one.get_write_indices(state.request_id, 0, count), device=self.device)
            for one in self.cache_allocators.values()
        }
        for layer, kv in buffers.items():
            allocator = self.layer_to_allocator[layer]
            keys, values = (states[0, :, :count].transpose(0, 1) for states in kv)
            allocator.update(keys, values, layer, nothing, places[allocator.index])
        self.mark_complete_blocks(state, self.count_new_complete_blocks(state, count))


class _BlendingScheduler(FIFOScheduler):
    """Stock's scheduler, which blends a prompt when its turn has come.

    Attributes:
        stream: of the engine's steps, `None` on a CPU: a blend's work waits there for the step in flight, which may
            still write to blocks that were freed since it began.
    """

    cache: _SaltedCache
    engine: Engine
    stream: Any

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        if not self.active_requests:  # stock waits for a request to finish, also if all of them were cancelled
            self.block_new_requests = False
        return super().schedule_batch(token_budget, cache_budget)

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled = super().clear_cancelled_requests()
        for state in cancelled:
            self.engine.requests.pop(state.request_id, None)
        return cancelled

    def _get_waiting_candidates(self) -> list[RequestState]:
        """Leaves out the prompts that are to be blended later: stock would prefill them in full."""
        ready, may_blend = [], True
        for state in super()._get_waiting_candidates():
            request = self.engine.requests[state.request_id]
            if request.blends and not state.is_cpu_offloaded and not self._take_over(state, request):
                if not may_blend:
                    continue
                if not self._has_room(state):
                    break  # the ones that came later wait, too: else it might never have room
                may_blend = False
                self._blend(state, request)
            ready.append(state)
        return ready

    def _take_over(self, state: RequestState, request: _Request) -> bool:
        """Gives a request the blocks of an equal prompt, if they hold all that was blended."""
        if self.cache.num_matching(request, state.initial_tokens) < request.num_blended:
            return False
        self._admit(state, self.cache.search_prefix_match(state.request_id, state.initial_tokens))
        self.engine.counts["matched"] += 1
        return True

    def _has_room(self, state: RequestState) -> bool:
        """Whether a blended prompt would stay: blending is dear, and a request without room for its answer is reset."""
        has_margin, count = self._try_to_meet_safety_margin(), len(state.initial_tokens) + 1
        if self.active_requests and not has_margin:
            return False
        if not self.cache.can_store_request_tokens(state, count, dry_run=True) and self.cache.evict_cached_blocks():
            self.cache.pool.try_to_free_sectors()
        return self.cache.can_store_request_tokens(state, count, dry_run=True)

    @torch.no_grad()
    def _blend(self, state: RequestState, request: _Request) -> None:
        """Blends a prompt into blocks; after an error, which would end the engine, stock prefills it."""
        try:
            with torch.cuda.stream(self.stream):
                buffers = self.engine.blended(request)
                if not self.cache.can_store_request_tokens(state, request.num_before_last):
                    raise RuntimeError("its blocks are gone")
                self.cache.write(state, buffers, request.num_before_last)
        except Exception as error:
            logger.warning("Request %s is prefilled in full: %s", state.request_id, error, exc_info=True)
            self.cache.free_blocks(state.request_id, no_cache=True)
            request.prefill("failed", f"{type(error).__name__}: {error}")
            self.engine.counts["failed"] += 1
            return
        self._admit(state, request.num_before_last)
        self.engine.counts["blended"] += 1

    def _admit(self, state: RequestState, count: int) -> None:
        """Goes on with a request whose first tokens are in its blocks, as stock does after a matched prefix."""
        self.active_requests[state.request_id] = self.waiting_requests.pop(state.request_id)
        self.waiting_requests_order.remove(state.request_id)
        state.status = RequestStatus.PREFILLING
        state.remaining_prefill_tokens = state.remaining_prefill_tokens[count:]
        state.position_offset += count


class _Router(OutputRouter):
    """Gives every output the request's `trace`, forgets a request with its last one, and drops those of cancelled ones,
    which nothing would collect."""

    def __init__(self, requests: dict[str, _Request]) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: Iterable[GenerationOutput]) -> None:
        known = []
        for output in outputs:
            of_end = output.is_finished()
            request = (self._requests.pop if of_end else self._requests.get)(output.request_id, None)
            if request is not None:
                output.trace = request.trace  # type: ignore[attr-defined]
                known.append(output)
        super().deliver_batch(known)


class Engine(ContinuousBatchingManager):
    """Transformers' continuous-batching manager, which takes prompts with chunks, too, and outlives its thread.

    >>> with Engine(model, store="chunks") as engine:  # doctest: +SKIP
    ...     engine.add_request(prompt, max_new_tokens=64)
    ...     engine.get_result()

    All other methods are stock's: `cancel_request`, `get_result`, `register_result_handler`, `pause`. An output has
    the attribute `trace`, a `hfblend.BlendTrace`. An engine is started once.

    Args:
        model: a causal LM in eval mode, not patched.
        store: of chunk KV: a store, a folder or a URL; default, a new `MemoryStore`.
        config: default `BlendConfig()`; a request may bring its own.
        generation_config: of all requests; default the model's. Stock's engine samples for all of them alike, unless
            `per_request_processors=True`.
        max_bytes: of the model's device, for blocks, a step's tensors and the chunk KV that a `MemoryStore` may keep
            there, together; a number or `"16GB"`. Default: 80 % of what is free.
        options: of `transformers.ContinuousBatchingConfig`.

    Attributes:
        capacity: tokens of the longest request, its answer included.
        counts: requests by how their prompts were prefilled: `"blended"`, `"matched"` (found in blocks of an equal
            prompt), `"failed"` (in full, after an error); and how often the engine was `"rebuilt"`.

    Raises:
        UnsupportedModel: the model's KV cannot be moved, or stock has no blocks for a kind of its layers.
        ValueError: a patched model, settings that the model cannot have, several answers a request, or too few bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store | str | os.PathLike[str] | None = None,
        config: BlendConfig | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_bytes: int | str | None = None,
        **options: Any,
    ) -> None:
        self.hf_model, self.store = model_of(model), store_at(store)
        if self.hf_model.unwrapped_forward is not None:
            raise ValueError("The model is patched, and the engine blends by itself: call blender.remove() first.")
        self.config = self._checked(config)
        self.requests: dict[str, _Request] = {}
        self.counts, self.capacity = Counter[str](), 0
        self._numbers, self._closing, self._turn = itertools.count(), threading.Event(), threading.Lock()
        self._supervisor: threading.Thread | None = None
        base: Any = self.hf_model.model
        generation_config = copy.deepcopy(generation_config or base.generation_config)
        if (generation_config.num_return_sequences or 1) > 1:
            raise ValueError("The engine gives one answer a request: add the prompt once for each answer.")
        SCHEDULER_MAPPING[_SCHEDULER] = _BlendingScheduler
        options = {"max_memory_percent": self._share_of_free(max_bytes), **options, "scheduler_type": _SCHEDULER}
        super().__init__(base, generation_config, ContinuousBatchingConfig(**options))
        self.output_router = _Router(self.requests)

    def _checked(self, config: BlendConfig | None) -> BlendConfig:
        config = as_config(config)
        config.require_layers(self.hf_model.num_kv_layers)
        if config.is_auto:
            raise ValueError('The engine needs a number for recompute_ratios, got "auto": say (0.15,).')
        if config.chunk_prefix == "filler":
            require_filler(config.filler_ids)
        return config

    def _share_of_free(self, max_bytes: int | str | None) -> float:
        """The share of the free memory that is stock's, in (0, 1]."""
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        free = max(1, total - max(reserved, allocated))
        budget = int(0.8 * free) if max_bytes is None else num_bytes_of(max_bytes)
        in_store = held_on(self.store, self.hf_model.device)
        if budget <= in_store:
            raise ValueError(
                f"A budget of {budget} bytes leaves none for blocks: the store may take {in_store} of them. Raise "
                "max_bytes, or give the store fewer: MemoryStore(max_bytes=…)."
            )
        return min(1.0, (budget - in_store) / free)

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(  # type: ignore[override]
        self,
        input_ids: Prompt | Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        config: BlendConfig | None = None,
        **options: Any,
    ) -> str:
        """Adds a request, and returns its id.

        Args:
            input_ids: a prompt, which is blended, or plain ids.
            request_id: one that no running request has.
            max_new_tokens: default, the generation config's, or as many as there is room for.
            config: of this request. Its `namespace` keeps chunks and blocks apart from those of others.
            args, options: as stock's: `streaming`, `record_timestamps`, `eos_token_id`, ….

        Raises:
            EngineDown: try again soon, or `start` it.
            ValueError: ids that the model does not have, an id that is taken, a request larger than all blocks.
        """
        prompt = input_ids if isinstance(input_ids, Prompt) else Prompt(torch.tensor([list(input_ids)]), ())  # type: ignore[arg-type]
        ids = prompt.ids
        require_known(array("q", ids), self.hf_model.num_ids)  # an id outside would end the engine
        config = self.config if config is None else self._checked(config)
        self._require_up()
        asked = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if len(ids) + max(1, asked or 1) > self.capacity:  # stock's engine dies at such a request
            raise ValueError(
                f"A request of {len(ids)} tokens and {asked or 1} new ones does not fit: the blocks hold "
                f"{self.capacity} tokens. Shorten it, or give the engine more memory."
            )
        request_id = f"request_{next(self._numbers)}" if request_id is None else request_id
        request = _Request(prompt, config, BlendTrace(num_tokens=len(ids), num_layers=self.hf_model.num_layers))
        if self.requests.setdefault(request_id, request) is not request:
            raise ValueError(f"There is a request {described(request_id)} already; wait for its end.")
        added = None
        try:
            asked = self.capacity - len(ids) if asked is None else asked
            added = super().add_request(ids, request_id, asked, *args, **options)
        finally:
            if added is None:
                self.requests.pop(request_id, None)
        if added is None:
            self._require_up()
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """Ends a request at the next step; it has no more outputs."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)  # stock keeps it for an output that never comes
        super().cancel_request(request_id)

    def blended(self, request: _Request) -> dict[int, KV]:
        """Blends a prompt. Returns layer -> K/V (1, Hkv, T + room, D)."""
        hf_model, ids = model_of(self.hf_model.model), request.prompt.input_ids
        blending = Blending(
            hf_model, ids, request.prompt.chunk_spans, self.store, request.config, request.trace, ids=ids
        )
        blending.run(hf_model.decoder_forward)
        return blending.buffers

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(hard_stop=True)

    def start(self) -> None:
        """Makes the blocks, and starts the engine's thread and the one that rebuilds it."""
        if self._supervisor is not None:
            raise RuntimeError("An engine is started once; make another one.")
        try:
            self.warmup()
        except ValueError as error:
            raise UnsupportedModel(f"Continuous batching cannot run this model: {error}") from error
        assert self.batch_processor is not None
        self.capacity = infer_max_single_request_tokens(self.batch_processor.cache)
        # From now on the number of blocks is settled. When they are made again, the store holds more of what is free.
        self.continuous_batching_config.max_memory_percent = 1.0
        super().start()
        self._supervisor = threading.Thread(target=self._supervise, name="hfblend-supervisor", daemon=True)
        self._supervisor.start()

    def stop(self, *args: Any, **options: Any) -> None:
        """As stock's: by default it waits for all requests; `hard_stop=True` fails them."""
        with self._turn:
            self._closing.set()
        super().stop(*args, **options)

    def _require_up(self) -> None:
        reason = self.background_thread_status.can_accept_new_requests()
        if self._supervisor is None or reason is not None or not self.is_running():
            raise EngineDown(reason or "The engine is not running.")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        scheduler: Any = processor.scheduler
        cache: Any = processor.cache
        cache.__class__ = _SaltedCache
        cache.requests, cache.page_size = self.requests, self.continuous_batching_config.page_size
        scheduler.engine, scheduler.stream = self, processor.inputs_and_outputs.compute_stream
        return processor

    def _supervise(self) -> None:
        """Whenever the engine's thread has ended before `stop`, fails its requests and starts it anew."""
        while (thread := self._generation_thread) is not None:
            thread.join()
            if self._closing.is_set():
                return
            error = self.background_thread_status.fatal_error or EngineDown("the engine's thread was ended")
            logger.error("The engine died and is rebuilt: %s", error)
            self._fail_all_remaining_requests(EngineDown(f"The engine died: {error}"), self.batch_processor)
            # All that holds the blocks: a traceback, too. A broken state is not trusted, nor is there memory for both.
            self.batch_processor = self.background_thread_status.fatal_error = error = None  # type: ignore[assignment]
            gc.collect()
            self._closing.wait(_PAUSE_S)
            with self._turn:
                if self._closing.is_set():
                    return
                self.counts["rebuilt"] += 1
                super().start()
