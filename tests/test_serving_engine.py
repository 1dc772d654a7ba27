"""The engine: what it relies on in Transformers' continuous batching, equal answers, steps, and faults."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import importlib
import inspect
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from helpers import config, make_llama, make_mistral, make_prompt
from packaging.version import Version

import hfblend
from hfblend.store import MemoryStore

if Version(transformers.__version__) < Version("5.23"):
    with pytest.raises(ImportError, match=r"5\.23 or later, got .*hfblend\[serve\]"):
        importlib.import_module("hfblend.serving")
    pytest.skip("serving needs Transformers 5.23 or later", allow_module_level=True)

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache, continuous_api, requests, scheduler
from transformers.generation.continuous_batching.cache_allocators import CacheAllocator, CachePool

from hfblend.serving import engine as serving
from hfblend.serving.engine import Engine, EngineDown
from hfblend.serving.request import Request

PAGE = 16
ROOMY = {"page_size": PAGE, "num_blocks": 128, "max_batch_tokens": 256}
TIGHT = {"page_size": PAGE, "num_blocks": 18, "max_batch_tokens": 256}  # for two prompts
PROMPT = make_prompt()
MODELS = {
    "llama": make_llama,
    "llama-eager": lambda: make_llama(attn_implementation="eager"),
    "mistral-window": make_mistral,
    "gemma3": lambda: FAMILIES["gemma3_text"].make(),
}

pytestmark = pytest.mark.usefixtures("remembered_proofs")


@contextmanager
def running(model=None, store=None, settings=None, **options):
    """A started engine, which every test leaves without requests and with all of its blocks free."""
    settings = config(0.2) if settings is None else settings
    with Engine(model or make_llama(), store, settings, **{**ROOMY, **options}) as engine:
        yield engine
        assert not engine.requests
        assert all_blocks_are_free(engine)


def all_blocks_are_free(engine) -> bool:
    with engine.pause():
        blocks = engine.batch_processor.cache
        blocks.evict_cached_blocks()
        return blocks.compute_free_capacity() == 1.0 and not any(
            one.block_table for one in blocks.cache_allocators.values()
        )


def results_of(engine, ids, seconds=60):
    """Request id -> its last output, of requests that end by themselves."""
    results, deadline = {}, time.monotonic() + seconds
    while len(results) < len(set(ids)):
        assert time.monotonic() < deadline, f"Only {len(results)} of {len(set(ids))} requests have ended."
        output = engine.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            results[output.request_id] = output
    return results


def result_of(engine, *args, **kwargs):
    request_id = engine.add_request(*args, **{"max_new_tokens": 6, **kwargs})
    return results_of(engine, [request_id])[request_id]


def until(is_so, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def plain_answer(model, prompt, count):
    return model.generate(prompt.input_ids, max_new_tokens=count, do_sample=False)[0, len(prompt) :].tolist()


def blended_answers(model, prompts, counts, settings):
    """The greedy answers of `model.generate`, each with an empty store."""
    with hfblend.patch(model, settings) as blender:
        answers = []
        for prompt, count in zip(prompts, counts):
            blender.store = MemoryStore()
            output = model.generate(**prompt.inputs(), max_new_tokens=count, do_sample=False)
            assert blender.trace.blended
            answers.append(output[0, len(prompt) :].tolist())
    return answers


# --- what is relied on in Transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (scheduler.FIFOScheduler.__init__, "self cache safety_margin max_requests_per_batch"),
        (scheduler.FIFOScheduler.schedule_batch, "self token_budget cache_budget"),
        (scheduler.FIFOScheduler._get_waiting_candidates, "self"),
        (scheduler.FIFOScheduler._try_to_meet_safety_margin, "self"),
        (scheduler.FIFOScheduler.clear_cancelled_requests, "self"),
        (cache.PagedAttentionCache.search_prefix_match, "self request_id prompt_ids"),
        (cache.PagedAttentionCache.mark_complete_blocks, "self state complete_blocks"),
        (cache.PagedAttentionCache.count_new_complete_blocks, "self state request_len"),
        (cache.PagedAttentionCache.can_store_request_tokens, "self state request_len dry_run"),
        (cache.PagedAttentionCache.free_blocks, "self request_id no_cache"),
        (cache.PagedAttentionCache.evict_cached_blocks, "self"),
        (CacheAllocator.get_write_indices, "self request_id past_length query_length"),
        (CacheAllocator.update, "self key_states value_states layer_idx read_index write_index"),
        (CachePool.try_to_free_sectors, "self"),
        (continuous_api.OutputRouter.deliver, "self output"),
        (continuous_api.OutputRouter.deliver_batch, "self outputs"),
        (continuous_api.ContinuousBatchingManager._create_batch_processor, "self"),
        (continuous_api.ContinuousBatchingManager._fail_all_remaining_requests, "self error batch_processor"),
        (continuous_api.ContinuousBatchingManager.warmup, "self"),
        (continuous_api.ContinuousBatchingManager.stop, "self block timeout keep_for_next_session hard_stop"),
        (
            continuous_api.ContinuousBatchingManager.add_request,
            "self input_ids request_id max_new_tokens streaming record_timestamps eos_token_id logit_processor_kwargs",
        ),
    ],
)
def test_functions_that_are_called_or_replaced_have_these_parameters(function, parameters):
    assert " ".join(inspect.signature(function).parameters) == parameters


def test_requests_and_outputs_have_these_fields():
    state = {field.name for field in dataclasses.fields(requests.RequestState)}
    assert state >= {"request_id", "initial_tokens", "generated_tokens", "remaining_prefill_tokens", "position_offset"}
    assert {"is_cpu_offloaded", "num_children"} <= state
    assert [status.name for status in requests.RequestStatus][:2] == ["PENDING", "PREFILLING"]
    output = requests.GenerationOutput("a")
    output.trace = None  # it takes attributes


def test_the_manager_has_these_attributes():
    with running() as engine:
        assert engine._generation_thread.is_alive()
        assert engine.background_thread_status.fatal_error is None
        assert engine.output_router.result_handlers == {}
        processor = engine.batch_processor
        assert processor.scheduler.engine is engine
        assert processor.scheduler.cache is processor.cache
        assert processor.inputs_and_outputs.compute_stream is None  # on a CPU
        assert set(processor.cache.layer_to_allocator) == {0, 1, 2, 3}


def test_stock_dies_of_a_prompt_larger_than_its_blocks():
    """The reason for `capacity`: without this fault the check would only be polite."""
    model = make_llama()
    manager = model.init_continuous_batching(
        GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(page_size=PAGE, num_blocks=2, max_batch_tokens=64),
    )
    manager.start()
    manager.add_request(PROMPT.ids)
    until(lambda: not manager.is_running())
    assert manager.background_thread_status.fatal_error is not None
    assert manager.add_request([5, 6]) is None  # dropped without a word
    manager.stop()


def test_stock_delivers_nothing_of_a_cancelled_request_and_frees_its_blocks():
    with running() as engine:
        request_id = engine.add_request(PROMPT.ids, max_new_tokens=500)
        engine.cancel_request(request_id)
        until(lambda: not engine.requests)
        assert engine.get_result(timeout=0.3) is None


# --- equal ------------------------------------------------------------------------------------------------------------


_QUICK = [("llama", "tight"), ("mistral-window", "roomy")]


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        pytest.param(name, pool, id=f"{name}-{size}", marks=() if (name, size) in _QUICK else pytest.mark.thorough)
        for name in MODELS
        for size, pool in (("roomy", ROOMY), ("tight", TIGHT))
    ],
)
def test_answers_equal_those_of_generate(name, pool):
    """80 requests: 10 prompts, each four times blended, cold and warm, and four times plain; others are cancelled."""
    model, settings, draw = MODELS[name](), config(0.2), random.Random(0)
    prompts = [make_prompt(seed=seed, order=order) for seed in range(5) for order in ((0, 1, 2), (2, 0, 1))]
    counts = [draw.randint(3, 14) for _ in prompts]
    blended = blended_answers(model, prompts, counts, settings)
    plain = [plain_answer(model, prompt, count) for prompt, count in zip(prompts, counts)]
    jobs = [(i, is_blended) for i in range(len(prompts)) for is_blended in (True, False)] * 4
    draw.shuffle(jobs)
    expected = {}
    with running(model, settings=settings, **pool) as engine:
        for number, (i, is_blended) in enumerate(jobs):
            prompt = prompts[i] if is_blended else prompts[i].ids
            request_id = engine.add_request(prompt, max_new_tokens=counts[i])
            expected[request_id] = (blended if is_blended else plain)[i]
            if number % 5 == 0:
                engine.cancel_request(engine.add_request(prompts[draw.randrange(10)], max_new_tokens=30))
        results = results_of(engine, expected)
        until(lambda: not engine.requests)  # the cancelled ones
        wrong = [key for key, answer in expected.items() if results[key].generated_tokens != answer]
        assert not wrong, f"{len(wrong)} of {len(expected)} answers differ; {engine.counts}"
        assert not engine.counts["failed"]
        assert engine.counts["blended"] >= len(prompts)
        if name.startswith("llama"):  # only models without windows share blocks
            assert engine.counts["matched"] > 0 or pool is TIGHT
    assert blended != plain  # the two kinds can be told apart


def test_a_request_that_lost_its_blocks_is_blended_again():
    """Answers of three requests outgrow the blocks, so that stock resets one after the other."""
    model, settings = make_llama(), config(0.2)
    prompts = [make_prompt(seed=seed) for seed in range(3)]
    expected = blended_answers(model, prompts, [40] * 3, settings)
    with running(model, settings=settings, num_blocks=20, safety_margin=0.0) as engine:
        with engine.pause():
            ids = [engine.add_request(prompt, max_new_tokens=40) for prompt in prompts]
        results = results_of(engine, ids)
        assert [results[key].generated_tokens for key in ids] == expected
        assert [results[key].prompt_ids for key in ids] == [prompt.ids for prompt in prompts]
        assert engine.counts["blended"] > 3


def test_a_plain_prompt_is_prefilled_in_full_after_a_blended_one_of_the_same_ids():
    model = make_llama()
    expected = plain_answer(model, PROMPT, 6)
    with running(model) as engine:
        blended, plain = result_of(engine, PROMPT), result_of(engine, PROMPT.ids)
        assert plain.generated_tokens == expected != blended.generated_tokens
        assert (plain.trace.blended, plain.trace.fallback) == (False, "no_chunks")


def test_a_store_that_was_filled_by_generate_is_used():
    model, settings = make_llama(), config(0.2)
    with hfblend.patch(model, settings) as blender:
        expected = model.generate(**PROMPT.inputs(), max_new_tokens=6, do_sample=False)[0, len(PROMPT) :].tolist()
        store = blender.store
    with running(model, store, settings) as engine:
        output = result_of(engine, PROMPT)
        assert output.generated_tokens == expected
        assert (output.trace.blended, output.trace.hits) == (True, 3)


# --- batched ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_concurrent_requests_are_batched(make):
    """N requests of m tokens take at most m + N + 2 steps: one prompt is blended a step, and all decode together."""
    count, num_tokens = 12, 10
    with running(make()) as engine:
        with engine.pause():
            steps = engine.current_batch
            ids = [engine.add_request(make_prompt(seed=i), max_new_tokens=num_tokens) for i in range(count)]
        results = results_of(engine, ids)
        assert engine.counts["blended"] == count
        assert all(len(one.generated_tokens) == num_tokens for one in results.values())
        assert num_tokens <= engine.current_batch - steps <= num_tokens + count + 2


def test_one_prompt_is_blended_a_step():
    with running() as engine:
        blends, stock = [], engine.batch_processor.scheduler._blend
        engine.batch_processor.scheduler._blend = lambda *args: (blends.append(engine.current_batch), stock(*args))
        with engine.pause():
            ids = [engine.add_request(make_prompt(seed=i), max_new_tokens=3) for i in range(6)]
        results_of(engine, ids)
        assert len(blends) == len(set(blends)) == 6


@pytest.mark.parametrize("large_is_blended", [True, False])
@pytest.mark.parametrize("small_is_blended", [True, False])
def test_a_large_prompt_gets_its_turn_while_small_ones_keep_coming(large_is_blended, small_is_blended):
    """Small ones that are blended took their blocks before the rest of a large one could have them."""
    large, seeds = make_prompt(sizes=(150, 150, 100), seed=99), itertools.count()

    def add_a_small_one():
        prompt = make_prompt(sizes=(10, 10), seed=next(seeds))
        engine.add_request(prompt if small_is_blended else prompt.ids, max_new_tokens=20)

    with running(num_blocks=30, max_batch_tokens=64) as engine:
        for _ in range(6):
            add_a_small_one()
        large_id = engine.add_request(large if large_is_blended else large.ids, max_new_tokens=10)
        for _ in range(60):
            add_a_small_one()
            until(lambda: len(engine.requests) < 8, 60)
            if large_id not in engine.requests:
                break
        assert large_id not in engine.requests, "60 prompts that came later have overtaken it"
        for request_id in list(engine.requests):
            engine.cancel_request(request_id)
        until(lambda: not engine.requests)


# --- blocks are found under salted hashes -----------------------------------------------------------------------------


def num_found(engine, prompt, settings):
    """Tokens of a new request that blocks of earlier ones hold."""
    with engine.pause():
        engine.requests["probe"] = Request.of(engine.hf_model, prompt, settings)
        blocks = engine.batch_processor.cache
        found = blocks.search_prefix_match("probe", PROMPT.ids)
        blocks.free_blocks("probe")
        del engine.requests["probe"]
    return found


def test_blocks_are_found_by_requests_of_the_same_kind_only():
    full = (len(PROMPT) - 1) // PAGE * PAGE
    mine, other = config(0.2, namespace="mine"), config(0.2, namespace="other")
    with running(settings=mine) as engine:
        result_of(engine, PROMPT)
        assert num_found(engine, PROMPT, mine) == full
        assert num_found(engine, PROMPT, other) == 0
        assert num_found(engine, PROMPT, config(0.3, namespace="mine")) == 0
        assert num_found(engine, hfblend.Prompt(PROMPT.input_ids, PROMPT.chunk_spans[:2]), mine) == 0
        assert num_found(engine, PROMPT.ids, mine) == 0
        result_of(engine, PROMPT.ids)
        assert num_found(engine, PROMPT.ids, mine) == full
        assert num_found(engine, PROMPT.ids, other) == 0
        assert num_found(engine, PROMPT.ids, config(0.3, namespace="mine")) == full  # settings do not matter to it


def test_an_equal_prompt_takes_over_the_blended_blocks():
    with running() as engine:
        first, second = result_of(engine, PROMPT), result_of(engine, PROMPT)
        assert engine.counts == {"blended": 1, "matched": 1}
        assert first.generated_tokens == second.generated_tokens
        assert second.trace.blended
        assert "blocks of an equal prompt" in second.trace.notes[0]


def test_blocks_that_end_before_the_last_chunk_are_not_taken_over():
    """The rest of the chunk would be prefilled, where blending reuses it."""
    prompt = make_prompt(suffix=1)
    assert (len(prompt) - 1) // PAGE * PAGE < prompt.chunk_spans[-1][1]
    with running() as engine:
        first, second = result_of(engine, prompt), result_of(engine, prompt)
        assert engine.counts == {"blended": 2}
        assert first.generated_tokens == second.generated_tokens


# --- memory -----------------------------------------------------------------------------------------------------------


def test_blocks_and_the_store_share_a_budget():
    options = {"num_blocks": None, "max_bytes": "60MB", "max_batch_tokens": 64}
    sizes = []
    for store_bytes in ("10MB", "40MB"):
        with running(store=MemoryStore(store_bytes), **options) as engine:
            sizes.append(engine.batch_processor.cache.cache_tensor.nbytes)
    assert sizes[1] < sizes[0]
    assert sizes[0] <= 50e6
    assert sizes[1] <= 20e6
    with pytest.raises(ValueError, match="leaves none to others"):
        Engine(make_llama(), MemoryStore("60MB"), **{**ROOMY, **options})


def test_a_request_may_fill_all_blocks_and_no_more():
    model = make_llama()
    with running(model, **TIGHT) as engine:
        room = engine.capacity - len(PROMPT)
        assert engine.capacity == TIGHT["num_blocks"] * PAGE
        with pytest.raises(ValueError, match=rf"do not fit into blocks for {engine.capacity} tokens"):
            engine.add_request(PROMPT, max_new_tokens=room + 1)
        with pytest.raises(ValueError, match="do not fit"):
            engine.add_request([5] * engine.capacity)
        assert len(result_of(engine, PROMPT, max_new_tokens=room).generated_tokens) == room
        assert len(result_of(engine, PROMPT, max_new_tokens=None).generated_tokens) == room
        expected = plain_answer(model, PROMPT, 5)
        assert result_of(engine, PROMPT.ids, max_new_tokens=5).generated_tokens == expected
        assert engine.counts["rebuilt"] == 0


# --- faults -----------------------------------------------------------------------------------------------------------


def killed(engine):
    thread = engine._generation_thread
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    thread.join(10)


def failing_step(engine):
    thread = engine._generation_thread
    engine.batch_processor.inputs_and_outputs = None
    thread.join(10)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("end", [killed, failing_step])
def test_a_dead_engine_is_rebuilt(end, monkeypatch):
    monkeypatch.setattr(serving, "_PAUSE_S", 0.05)
    model, options = make_llama(), {"num_blocks": None, "max_bytes": "60MB", "max_batch_tokens": 64}
    expected = plain_answer(model, PROMPT, 6)
    with running(model, MemoryStore("10MB"), **options) as engine:
        num_blocks = engine.batch_processor.cache.num_blocks
        for count in (1, 2):
            lost = engine.add_request(PROMPT, max_new_tokens=engine.capacity - len(PROMPT), streaming=True)
            until(lambda: engine.get_result(timeout=0.1) is not None)
            end(engine)
            output = results_of(engine, [lost])[lost]
            assert output.status == requests.RequestStatus.FAILED
            assert output.error
            until(lambda count=count: engine.counts["rebuilt"] == count and engine.is_running())
            until(lambda: engine.background_thread_status.can_accept_new_requests() is None)
            assert result_of(engine, PROMPT.ids).generated_tokens == expected
            assert engine.batch_processor.cache.num_blocks == num_blocks
            assert result_of(engine, PROMPT).trace.blended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_takes_no_requests(monkeypatch):
    monkeypatch.setattr(serving, "_PAUSE_S", 60.0)
    engine = Engine(make_llama(), None, config(0.2), **ROOMY)
    with engine:
        killed(engine)
        until(lambda: engine.batch_processor is None)
        with pytest.raises(EngineDown):
            engine.add_request(PROMPT)
        assert not engine.requests
    engine._supervisor.join(10)
    assert not engine._supervisor.is_alive()


def test_a_request_that_was_failed_before_its_state_came_is_dropped():
    """As one that is added while the engine dies."""
    with running() as engine:
        continuous_api.ContinuousBatchingManager.add_request(engine, PROMPT.ids, "stray")
        assert len(result_of(engine, PROMPT).generated_tokens) == 6
        until(lambda: not engine.batch_processor.has_pending_requests())
        assert engine.counts["rebuilt"] == 0


class DeadStore:
    def put(self, key, chunk_kv):
        raise OSError("the store is dead")

    open = put


def test_a_dead_store_costs_a_full_prefill(caplog):
    model = make_llama()
    expected = plain_answer(model, PROMPT, 6)
    with running(model, DeadStore()) as engine:
        output = result_of(engine, PROMPT)
        assert output.generated_tokens == expected
        assert engine.counts == {"failed": 1}
        assert (output.trace.blended, output.trace.fallback) == (False, "failed")
        assert "the store is dead" not in (output.error or "")
    assert "prefilled in full" in caplog.text


def test_an_error_while_blocks_are_written_costs_a_full_prefill():
    model = make_llama()
    expected = plain_answer(model, PROMPT, 6)
    with running(model) as engine:
        allocator = engine.batch_processor.cache.layer_to_allocator[0]
        stock, calls = allocator.update, []

        def fails_once(*args):
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return stock(*args)

        allocator.update = fails_once
        assert result_of(engine, PROMPT).generated_tokens == expected
        assert engine.counts == {"failed": 1}
        assert result_of(engine, PROMPT).trace.blended


@pytest.mark.parametrize("is_blended", [True, False])
def test_a_cancelled_request_frees_its_blocks(is_blended):
    with running() as engine:
        request_id = engine.add_request(PROMPT if is_blended else PROMPT.ids, max_new_tokens=1000, streaming=True)
        until(lambda: engine.get_result(timeout=0.1) is not None)
        with engine.pause():
            engine.output_router.result_handlers.update({request_id: None, "another": None})
            engine.cancel_request(request_id)
            assert list(engine.output_router.result_handlers) == ["another"]
        until(lambda: not engine.requests, 1.0)
        while engine.get_result(timeout=0.1) is not None:
            pass  # those before the end
        assert all_blocks_are_free(engine)


def test_a_cancelled_request_has_no_more_outputs():
    """Not even those of the step in which it was cancelled, which nobody would take from the common queue."""
    with running() as engine:
        scheduler, router = engine.batch_processor.scheduler, engine.output_router
        for is_last in (False, True):
            request_id = engine.add_request(PROMPT.ids, max_new_tokens=1000, streaming=True)
            until(lambda: engine.get_result(timeout=0.1) is not None)
            with engine.pause():
                state = scheduler.active_requests[request_id]
                engine.cancel_request(request_id)
                while engine.get_result(timeout=0.01) is not None:
                    pass  # those before
                output = state.to_generation_output()
                output.status = requests.RequestStatus.FINISHED if is_last else output.status
                router.deliver(output)
                assert router.output_queue.empty()
            until(lambda: all_blocks_are_free(engine))


def test_a_cancellation_that_is_read_before_its_request_is_heeded():
    """Stock empties its queue of requests before that of cancellations; a request may come between the two."""
    with running() as engine:
        with engine.pause():
            request_id = engine.add_request(PROMPT.ids, max_new_tokens=1000)
            engine.cancel_request(request_id)
            assert engine.cancel_queue.get_nowait() == request_id
        until(lambda: not engine.requests)
        assert engine.get_result(timeout=0.1) is None


def test_handlers_are_called_in_their_loops_and_a_closed_loop_hurts_nobody():
    """Stock calls all handlers of a step in one of their loops, and dies if that is closed."""

    async def answered(name, leaves):
        ended, here, wrong = asyncio.Event(), threading.get_ident(), []

        def take(output):
            wrong.extend([output] * (threading.get_ident() != here))
            if leaves or output.is_finished():
                ended.set()

        engine.register_result_handler(name, take)
        engine.add_request(PROMPT.ids, name, 1000 if leaves else 40, streaming=True)
        await asyncio.wait_for(ended.wait(), 60)
        return not wrong

    with running() as engine, ThreadPoolExecutor(4) as pool:
        with engine.pause():
            jobs = [pool.submit(asyncio.run, answered(f"{i}", leaves=i == 0)) for i in range(4)]
            until(lambda: len(engine.requests) == 4)
        assert all(job.result() for job in jobs)
        until(lambda: not engine.requests)
        assert engine.output_router.result_handlers == {}
        assert len(result_of(engine, PROMPT).generated_tokens) == 6
        assert not engine.counts["rebuilt"]


def test_requests_wait_no_longer_for_cancelled_ones():
    """Stock takes no new requests after a reset until one finishes, and none does when all are cancelled."""
    with running() as engine:
        with engine.pause():
            request_id = engine.add_request(PROMPT, max_new_tokens=1000)
            engine.batch_processor.scheduler.block_new_requests = True
            engine.cancel_request(request_id)
        assert len(result_of(engine, PROMPT).generated_tokens) == 6


def test_a_block_that_is_complete_after_its_request_was_cancelled_is_left_alone():
    """As in asynchronous batching, where a step is in flight when its request is cancelled."""
    with running() as engine, engine.pause():
        state = requests.RequestState("gone", PROMPT.ids)
        engine.batch_processor.cache.mark_complete_blocks(state, {"full_attention": 1})


def test_what_would_end_the_engine_is_refused():
    model = make_llama()
    with running(model) as engine:
        with pytest.raises(ValueError, match=r"token ids from 5 to 97"):
            engine.add_request([5, 97])
        with pytest.raises(ValueError, match="must be 0 or more, got -1"):
            engine.add_request([5, -1])
        with pytest.raises(ValueError, match="one or more tokens"):
            engine.add_request([])
        with pytest.raises(ValueError, match=r'got "auto"'):
            engine.add_request(PROMPT, config=config(recompute_ratios="auto"))
        with engine.pause():
            engine.add_request(PROMPT, "taken", max_new_tokens=2)
            with pytest.raises(ValueError, match="'taken' is running"):
                engine.add_request(PROMPT, "taken")
        results_of(engine, ["taken"])
        assert len(result_of(engine, PROMPT).generated_tokens) == 6
    with pytest.raises(EngineDown):
        engine.add_request(PROMPT)
    with pytest.raises(RuntimeError, match="once"):
        engine.start()


def test_engines_that_could_not_work_are_refused():
    model = make_llama()
    with pytest.raises(ValueError, match="one answer a request"):
        Engine(model, generation_config=GenerationConfig(num_return_sequences=2, do_sample=True), **ROOMY)
    with pytest.raises(ValueError, match="layers"):
        Engine(model, config=config(check_layers=(9,)), **ROOMY)
    with pytest.raises(ValueError, match="filler"):
        Engine(model, config=config(chunk_prefix="filler"), **ROOMY)
    with hfblend.patch(model), pytest.raises(ValueError, match=r"blender\.remove"):
        Engine(model, **ROOMY)
    with pytest.raises(EngineDown):
        Engine(model, **ROOMY).add_request(PROMPT)


def test_short_prompts_and_disabled_configs_are_not_blended():
    with running() as engine:
        short = result_of(engine, PROMPT, config=config(min_reused_tokens=1000)).trace
        disabled = result_of(engine, PROMPT, config=config(enabled=False)).trace
        assert (short.fallback, disabled.fallback) == ("too_few_tokens", "disabled")
        assert not engine.counts


def test_the_model_is_as_it_was_afterwards():
    model = make_llama(attn_implementation="eager")
    before = model.generate(PROMPT.input_ids, max_new_tokens=4, do_sample=False)
    with running(model) as engine:
        result_of(engine, PROMPT)
    assert model.config._attn_implementation == "eager"
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(PROMPT.input_ids, max_new_tokens=4, do_sample=False), before)


@pytest.mark.parametrize(
    "fail",
    [
        lambda model: Engine(model, nonsense=1),
        lambda model: Engine(model, page_size=1),
        lambda model: Engine(model, num_blocks=10**9, page_size=PAGE).start(),
        lambda model: Engine(model, **ROOMY).stop(),
    ],
)
def test_an_engine_that_does_not_run_leaves_the_model_as_it_was(fail):
    """Stock changes an eager model's attention at once, and `generate` would then see the tokens to come."""
    model = make_llama(attn_implementation="eager")
    expected = plain_answer(model, PROMPT, 6)
    with suppress(ValueError, TypeError):
        fail(model)
    assert model.config._attn_implementation == "eager"
    assert plain_answer(model, PROMPT, 6) == expected


@pytest.mark.parametrize("moment", ["before", "during"])
def test_an_engine_that_was_stopped_first_does_not_start(moment):
    engine = Engine(make_llama(), **ROOMY)
    if moment == "before":
        engine.stop()
    else:
        warm_up = engine.warmup
        engine.warmup = lambda: (warm_up(), engine.stop())  # by another thread
    with pytest.raises(RuntimeError, match="stopped before it had started"):
        engine.start()
    assert not engine.is_running()


def test_a_prompt_of_very_many_chunks_is_refused():
    """900 of two tokens held up all others for ten seconds."""
    prompt = hfblend.Prompt.from_ids([3, 4], [[5, 6]] * 513, [7])
    with running() as engine, pytest.raises(ValueError, match="512 chunks here, got 513"):
        engine.add_request(prompt)


def test_too_little_memory_for_blocks_is_told():
    engine = Engine(make_llama(), MemoryStore("1MB"), max_bytes="1200KB")
    with pytest.raises(ValueError, match=r"too little memory for blocks .*: raise max_bytes"):
        engine.start()


@pytest.mark.slow
def test_the_benchmark_runs():
    sizes = "--shape tiny --tokens 512 --batches 2 --answer 8 --requests 2 --store-bytes 200MB --max-bytes 1GB"
    script = Path(__file__).parent.parent / "benchmarks" / "serving.py"
    output = subprocess.run([sys.executable, script, *sizes.split()], capture_output=True, text=True, check=True)
    report = json.loads(output.stdout)
    assert report["engine, 2"]["tokens/s"] > 0
    assert report["gap, ms"]["longest gap"] >= report["gap, ms"]["step"]
    assert report["throughput"]["ratio"] > 0
