"""Blended prefill inside Transformers' continuous batching; no other file knows that.

A blended prompt enters where stock has one with a matched prefix: K/V of all its tokens but the last lie in the
request's blocks, and stock goes on from there. Requests wait in stock's queue; at each step, in the order of coming,

    a prompt without chunks    is prefilled by stock
    one blended before         gets the blocks of an equal prompt, and stock prefills the rest of its suffix
    one to blend               is blended, one a step: others, which decode, must not wait for several

If a blend fails, its prompt is prefilled in full. If the engine dies, its requests fail, and it is rebuilt.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import get_device_and_memory_breakdown

from ..config import BlendConfig
from ..generate.blending import Blending
from ..kv.rows import KV
from ..prompts.prompt import Prompt
from ..store import Store, left_by, store_at
from ..support.registry import model_of
from . import attention
from .request import Request, checked
from .sampling import Sampler, Sampling

logger = logging.getLogger(__name__)

_LONGEST, _MOST_AT_ONCE = 131_072, 256  # tokens of a request, and requests in one step, that decode with block tables
_BATCH_ON_CPU = 512  # tokens of a step: requests that were cancelled go, and others get a token, only after it
_PAUSE_S = 1.0  # before a dead engine is rebuilt: one that dies at once would fill the log


class EngineDown(RuntimeError):
    """The engine takes no requests: it is not started, is stopping, or died and is being rebuilt."""


class _SaltedCache(PagedAttentionCache):
    """Stock's blocks, which are found again under the salted hashes of a request only."""

    requests: dict[str, Request]
    page_size: int

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        request = self.requests[request_id]
        request.num_matched = super().search_prefix_match(request_id, request.salted(prompt_ids, self.page_size))
        return request.num_matched

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        request = self.requests.get(state.request_id)
        if request is None or not complete_blocks:  # stock fails at a request that was cancelled during its step
            return
        salted: Any = copy.copy(state)
        salted.initial_tokens = request.salted(state.initial_tokens + state.generated_tokens, self.page_size)
        salted.generated_tokens = []
        super().mark_complete_blocks(salted, complete_blocks)

    def write(self, state: RequestState, buffers: dict[int, KV], count: int) -> None:
        """Writes the first `count` tokens of K/V (1, Hkv, T + room, D), by layer, to a request's new blocks."""
        if not self.can_store_request_tokens(state, count):
            raise RuntimeError(f"no blocks are left for {count} tokens")
        unread = torch.empty(0, dtype=torch.int64, device=self.device)
        places = {
            one.index: torch.tensor(one.get_write_indices(state.request_id, 0, count), device=self.device)
            for one in self.cache_allocators.values()
        }
        for layer, kv in buffers.items():
            allocator = self.layer_to_allocator[layer]
            keys, values = (states[0, :, :count].transpose(0, 1) for states in kv)
            allocator.update(keys, values, layer, unread, places[allocator.index])
        self.mark_complete_blocks(state, self.count_new_complete_blocks(state, count))


class _BlendingScheduler(FIFOScheduler):
    """Stock's scheduler, which blends a prompt when its turn has come."""

    cache: _SaltedCache
    engine: Engine
    stream: Any  # of the steps, None on a CPU: a blend waits for the one in flight, which may write to freed blocks

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        if not self.active_requests:  # stock waits for one to finish, also if all were cancelled
            self.block_new_requests = False
        return super().schedule_batch(token_budget, cache_budget)

    def clear_cancelled_requests(self) -> list[RequestState]:
        for request_id, request in list(self.engine.requests.items()):
            if request.is_cancelled:  # also if stock has read its cancellation before the request itself
                self.set_request_cancellation(request_id)
        for state in (cancelled := super().clear_cancelled_requests()):
            self.engine.requests.pop(state.request_id, None)
        return cancelled

    def _get_waiting_candidates(self) -> list[RequestState]:
        """Holds back prompts that are to be blended later: stock would prefill them in full."""
        ready, may_blend = list[RequestState](), True
        for state in super()._get_waiting_candidates():
            request = self.engine.requests.get(state.request_id)
            if request is None:  # it came while the engine died, and was failed
                self.set_request_cancellation(state.request_id)
                continue
            if request.blends and not state.is_cpu_offloaded:
                if not may_blend:
                    continue
                if not self._takes_over(state, request):
                    if not self._has_room(state, ready):
                        break  # those that came later wait, too: else it might never have room
                    may_blend = False
                    self._blend(state, request)
            ready.append(state)
        return ready

    def _takes_over(self, state: RequestState, request: Request) -> bool:
        """Gives a request the blocks of an equal prompt, if they hold all that was blended."""
        count = self.cache.search_prefix_match(state.request_id, state.initial_tokens)
        if count < request.num_blended:
            self.cache.free_blocks(state.request_id)
            request.num_matched = 0
            return False
        request.trace.blended = True
        request.trace.notes.append(f"K/V of the first {count} tokens were in blocks of an equal prompt.")
        self._admit(state, count, "matched")
        return True

    def _has_room(self, state: RequestState, ready: list[RequestState]) -> bool:
        """Whether a blended prompt can stay: without a margin, it would soon lose its blocks to the others' answers.

        Prompts that came before it and have only a part of their blocks, or none yet, must find room, too.
        """
        if not self._try_to_meet_safety_margin() and self.active_requests:
            return False
        before = {**self.active_requests, **{one.request_id: one for one in ready}}
        count = len(state.initial_tokens) + 1 + sum(len(one.remaining_prefill_tokens) for one in before.values())
        if not self.cache.can_store_request_tokens(state, count, dry_run=True) and self.cache.evict_cached_blocks():
            self.cache.pool.try_to_free_sectors()
        return self.cache.can_store_request_tokens(state, count, dry_run=True)

    @torch.no_grad()
    def _blend(self, state: RequestState, request: Request) -> None:
        """Blends a prompt into new blocks. An error would end the engine: stock prefills the prompt instead."""
        engine, ids, spans = self.engine, request.prompt.input_ids, request.prompt.chunk_spans
        of_steps = engine.attends_as(engine._original_attn_impl)  # stock's paged one masks nothing elsewhere
        try:
            with torch.cuda.stream(self.stream):
                model = model_of(engine.model)
                blending = Blending(model, ids, spans, engine.store, request.config, request.trace, ids=ids)
                blending.run(model.decoder_forward)
                self.cache.write(state, blending.buffers, len(request.prompt) - 1)
            self._admit(state, len(request.prompt) - 1, "blended")
        except Exception as error:
            logger.warning("Request %s is prefilled in full: %s", state.request_id, error, exc_info=True)
            self.cache.free_blocks(state.request_id, no_cache=True)
            request.prefill("failed", f"{type(error).__name__}: {error}")
            engine.counts["failed"] += 1
        finally:
            engine.attends_as(of_steps)

    def _admit(self, state: RequestState, count: int, counted_as: str) -> None:
        """Goes on with a request whose first `count` tokens are in its blocks, as stock does after a matched prefix."""
        self.active_requests[state.request_id] = self.waiting_requests.pop(state.request_id)
        self.waiting_requests_order.remove(state.request_id)
        state.status = RequestStatus.PREFILLING
        state.remaining_prefill_tokens = state.remaining_prefill_tokens[count:]
        state.position_offset += count
        self.engine.counts[counted_as] += 1


class _Router(OutputRouter):
    """Gives outputs their request's `trace` and `num_matched`, and forgets a request at its end.

    Drops outputs of cancelled ones.
    """

    def __init__(self, requests: dict[str, Request]) -> None:
        super().__init__()
        self.requests = requests
        self._lock: Any = threading.RLock()  # no request is cancelled between the look at it and its delivery

    def cancel(self, request_id: str) -> None:
        """Ends the outputs of a request, whose handler stock would keep for the last one."""
        with self._lock:
            if (request := self.requests.get(request_id)) is not None:
                request.is_cancelled = True
            self.result_handlers.pop(request_id, None)

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        by_loop: dict[Any, list[Any]] = {}
        with self._lock:
            for output in outputs:
                look_up = self.requests.pop if output.is_finished() else self.requests.get
                request = look_up(output.request_id, None)
                if request is not None and not request.is_cancelled:  # nobody takes it from the common queue
                    output.trace, output.num_matched = request.trace, request.num_matched
                    _, loop = self.result_handlers.get(output.request_id, (None, None))
                    by_loop.setdefault(loop, []).append(output)
            for of_loop in by_loop.values():  # stock calls all handlers of a batch in the loop of the last one
                try:
                    super().deliver_batch(of_loop)
                except RuntimeError:  # the loop is closed; the engine must not die of that
                    for output in of_loop:
                        self.cancel(output.request_id)


class Engine(ContinuousBatchingManager):
    """Transformers' continuous-batching manager, which takes prompts with chunks, too, and outlives its thread.

    >>> with Engine(model, store="chunks") as engine:  # doctest: +SKIP
    ...     engine.add_request(prompt, max_new_tokens=64)
    ...     print(engine.get_result())

    The rest is stock's: `get_result`, `register_result_handler`, `pause`. Outputs have a `trace`, a `BlendTrace`.
    Requests of one namespace share blocks of equal beginnings; of blended ones, equal prompts with equal settings do.

    Args:
        model: a causal LM in eval mode, not patched.
        store: of chunk KV: a store, a folder or a URL; default, a new `MemoryStore`.
        config: default `BlendConfig()`; a request may bring its own.
        generation_config: of all requests; default the model's. A request may bring its own sampling settings.
        max_bytes: of the model's device, for blocks, a step's tensors and the chunk KV that a `MemoryStore` may keep
            there, together; a number or `"16GB"`. Default: 80 % of what is free.
        options: of `transformers.ContinuousBatchingConfig`.

    Attributes:
        requests: by id, from `add_request` to the last output.
        sampling: settings of requests that bring none; greedy, if the generation config's `do_sample` is off.
        capacity: tokens of the longest possible request, its answer included; known after `start`.
        counts: prompts `"blended"`, `"matched"` (with blocks of an equal one), `"failed"` (prefilled in full after an
            error), and how often the engine was `"rebuilt"`.

    Raises:
        UnsupportedModel, ValueError: a model that cannot be blended or is patched; unfit settings; too few bytes.
    """

    def __init__(
        self, model: torch.nn.Module, store: Store | str | os.PathLike[str] | None = None,
        config: BlendConfig | None = None, *, generation_config: GenerationConfig | None = None,
        max_bytes: int | str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.hf_model, self.store = model_of(model), store_at(store)
        if self.hf_model.unwrapped_forward is not None:
            raise ValueError("The model is patched, and the engine blends by itself: call blender.remove() first.")
        self.config = checked(config, self.hf_model)
        self.requests: dict[str, Request] = {}
        self.counts, self.capacity = Counter[str](), 0
        self._closing, self._turn = threading.Event(), threading.Lock()
        self._supervisor: threading.Thread | None = None
        base: Any = self.hf_model.model
        generation_config = copy.deepcopy(generation_config or base.generation_config)
        if (generation_config.num_return_sequences or 1) > 1:
            raise ValueError("The engine gives one answer a request: add a prompt once for each answer.")
        self.sampling = Sampling.of(generation_config)
        generation_config.do_sample = False  # stock takes the argmax of the sampler's logits, and warps none itself
        options = {"max_memory_percent": self._share_of_free(max_bytes), **options, "scheduler_type": "hfblend"}
        SCHEDULER_MAPPING["hfblend"] = _BlendingScheduler
        attention_before = self.attends_as(None)
        try:
            super().__init__(base, generation_config, ContinuousBatchingConfig(**options))
        except BaseException:
            self.attends_as(attention_before)  # stock has changed it, and `generate` would attend to everything
            raise
        if self.model.config._attn_implementation == attention.NAME:
            self._decode_with_tables(options)
        elif self.hf_model.device.type == "cpu" and "max_batch_tokens" not in options:
            # Stock would prefill all waiting prompts in one step, with one mask of gigabytes.
            self.continuous_batching_config.max_batch_tokens = _BATCH_ON_CPU
        self.logit_processor: Any = Sampler(self.logit_processor, self.sampling)
        self.output_router: _Router = _Router(self.requests)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """As stock's; where it finds no flash attention, kernels of ours take its place if the model allows that."""
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        own = model.config._attn_implementation
        if auto_switch_to_flash and "flash" not in own and attention.takes(self.hf_model):
            self._original_attn_impl = self._original_attn_impl or own
            self.attends_as(attention.NAME)

    def attends_as(self, implementation: str | None) -> str:
        """Sets the name of the model's attention, unless `None`, and returns the one before. Stock's setter loads
        packages by that name."""
        owners: list[Any] = [self.hf_model.model, self.hf_model.layer_owner]
        configs = {id(one.config): one.config for one in owners}
        before: str = owners[0].config._attn_implementation
        for config in configs.values() if implementation else ():
            vars(config)["_attn_implementation_internal"] = implementation
        return before

    def _decode_with_tables(self, options: dict[str, Any]) -> None:
        """Has stock decode with block tables in CUDA graphs, as it does with flash attention 2 and 3."""
        config = self.continuous_batching_config
        longest = min(getattr(self.model.config, "max_position_embeddings", _LONGEST), _LONGEST)
        config.max_blocks_per_request = options.get("max_blocks_per_request") or -(-longest // config.page_size)
        if "max_requests_per_batch" not in options:  # a graph is recorded for each power of 2
            config.max_requests_per_batch = _MOST_AT_ONCE
        if "use_cuda_graph" not in options:  # prompts come in too many lengths
            config.use_cuda_graph = (False, True)

    def _share_of_free(self, max_bytes: int | str | None) -> float:
        """The share of the free memory, in (0, 1], that stock may use."""
        _, total, reserved, allocated = get_device_and_memory_breakdown()
        free = max(1, total - max(reserved, allocated))
        budget = free * 4 // 5 if max_bytes is None else max_bytes
        return min(1.0, left_by(self.store, self.hf_model.device, budget) / free)

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self.is_running() and self.background_thread_status.can_accept_new_requests() is None

    # --- requests -------------------------------------------------------------------------------------------------

    def add_request(
        self, input_ids: Prompt | Sequence[int], request_id: str | None = None, max_new_tokens: int | None = None,
        *args: Any, config: BlendConfig | None = None, temperature: float | None = None, top_p: float | None = None,
        top_k: int | None = None, seed: int | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Adds a request, of a prompt or of plain ids, and returns its id.

        Args:
            max_new_tokens: default, the generation config's, or as many as there is room for.
            config: of this request. Its `namespace` keeps chunks and blocks apart from those of others.
            temperature: 0 takes the most probable token; default `engine.sampling`'s, as for the next two.
            top_p: draws from the most probable tokens that have this much probability together; 1 from all.
            top_k: draws from this many most probable tokens; 0 from all.
            seed: with the same one, the same prompt and settings draw the same tokens, whichever requests run
                meanwhile: unless their logits differ in the last bits, as they may between batches. Default, random.
            args, options: as stock's: `streaming`, `eos_token_id`, ….

        Raises:
            EngineDown: try again soon.
            ValueError: ids that the model does not have, an id in use, a request larger than all blocks, a sampling
                setting out of its range.
        """
        sampling = self.sampling.but(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if sampling.step and self.continuous_batching_config.return_logprobs:
            raise ValueError("The engine has log-probabilities of greedy requests only: use temperature=0.")
        request = Request.of(self.hf_model, input_ids, self.config if config is None else config)
        if not self.is_up:
            raise EngineDown("The engine is not running: it is not started, is stopping, or is being rebuilt.")
        wanted, room = max_new_tokens or self.generation_config.max_new_tokens, self.capacity - len(request.prompt)
        if (wanted or 1) > room:  # stock's engine dies at such a request
            raise ValueError(
                f"A prompt of {len(request.prompt)} tokens and an answer of {wanted or 1} do not fit into blocks for "
                f"{self.capacity} tokens: shorten them, or give the engine more bytes."
            )
        request_id = request_id or uuid.uuid4().hex
        if self.requests.setdefault(request_id, request) is not request:
            raise ValueError(f"A request {request_id!r} is running; wait for its end, or take another id.")
        try:
            options["sampling"] = sampling  # stock hands it to the sampler, as it does other keywords
            if super().add_request(request.prompt.ids, request_id, wanted or room, *args, **options) is None:
                raise EngineDown("The engine has just gone down.")
        except BaseException:
            self.requests.pop(request_id, None)
            raise
        return request_id

    def cancel_request(self, request_id: str) -> None:
        """Ends a request at the next step. It has no more outputs."""
        self.output_router.cancel(request_id)
        super().cancel_request(request_id)

    def numbers(self) -> dict[str, float]:
        """Numbers for metrics: whether it takes requests, those it has, the blocks they hold, and `counts`."""
        processor: Any = self.batch_processor  # None while it is rebuilt
        allocators = () if processor is None else processor.cache.cache_allocators.values()
        tables = [table for one in allocators for table in list(one.block_table.values())]
        totals = {f"{name}_total": self.counts[name] for name in ("blended", "matched", "failed", "rebuilt")}
        return {"up": self.is_up, "requests": len(self.requests), "blocks_held": sum(map(len, tables)), **totals}

    # --- life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(hard_stop=True)

    def start(self) -> None:
        """Makes the blocks and starts two threads: the engine's, and one that rebuilds it. Once an engine."""
        if self._supervisor is not None:
            raise RuntimeError("An engine can be started once; make another one.")
        try:
            self.warmup()  # errors of making blocks come here, not in a thread
        except BaseException as error:
            self.stop()
            if not isinstance(error, (MemoryError, ValueError)):  # stock's, in its own numbers
                raise
            raise ValueError(
                f"There is too little memory for blocks and a step's tensors ({error}): raise max_bytes, or lower "
                "max_batch_tokens or the store's max_bytes."
            ) from error
        assert self.batch_processor is not None
        self.capacity = infer_max_single_request_tokens(self.batch_processor.cache)
        # When these blocks are made again, the store will have taken its part of what is free now.
        self.continuous_batching_config.max_memory_percent = 1.0
        with self._turn:
            if self._closing.is_set():
                raise RuntimeError("The engine was stopped before it had started; make another one.")
            super().start()
            self._supervisor = threading.Thread(target=self._supervise, name="hfblend-supervisor", daemon=True)
            self._supervisor.start()

    def stop(self, *args: Any, **options: Any) -> None:
        """As stock's: waits for all requests, or fails them with `hard_stop=True`. A second time, does nothing."""
        with self._turn:
            self._closing.set()
        if self._generation_thread is not None:
            super().stop(*args, **options)
        elif self._supervisor is None:  # it never ran
            self.attends_as(self._original_attn_impl)

    def _create_batch_processor(self) -> Any:
        processor: Any = super()._create_batch_processor()
        processor.cache.__class__, processor.cache.requests = _SaltedCache, self.requests
        processor.cache.page_size = self.continuous_batching_config.page_size
        processor.scheduler.engine, processor.scheduler.stream = self, processor.inputs_and_outputs.compute_stream
        self.logit_processor.keeps_apart_graphs_of(processor.inputs_and_outputs)
        return processor

    def _supervise(self) -> None:
        """Whenever the engine's thread has ended before `stop`, fails its requests and starts it anew."""
        while (thread := self._generation_thread) is not None:
            thread.join()
            if self._closing.is_set():
                return
            reason = f"The engine died: {self.background_thread_status.fatal_error or 'its thread was ended'}"
            logger.error("%s; it is rebuilt.", reason)
            # Its state is not trusted, and must go before there is room for another; the error's traceback holds it.
            self.batch_processor = self.background_thread_status.fatal_error = None
            gc.collect()
            self._fail_all_remaining_requests(EngineDown(reason), None)  # those in the queue
            for request_id in list(self.requests):
                self.output_router.deliver(GenerationOutput(request_id, error=reason, status=RequestStatus.FAILED))
            self._closing.wait(_PAUSE_S)
            with self._turn:
                if self._closing.is_set():
                    return
                self.counts["rebuilt"] += 1
                super().start()
