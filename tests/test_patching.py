"""In and out: one instance, nothing left behind, safe among threads, clear about bad input."""

from __future__ import annotations

import contextvars
import copy
import functools
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_mistral, make_prompt

import hfblend
from hfblend.attention.by_position import QueryRows
from hfblend.attention.switch import attend_as, attend_by_position
from hfblend.kv.rows import full_length_cache
from hfblend.locks import ForwardLock
from hfblend.model.layers import cut, resume, watch
from hfblend.support import registry as models
from hfblend.support.registry import model_of

PROMPT = make_prompt()


def state_of(model):
    """What patching could touch: instance attributes of every module, hooks, and the attention setting."""
    attributes = {name: sorted(k for k in vars(m)) for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return attributes, hooks, model.config._attn_implementation


@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_after_remove_the_model_is_as_before(make):
    model = make()
    before, weights = state_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    stock = generate(model, {"input_ids": PROMPT.input_ids})
    blender = hfblend.patch(model, config=config(0.2))
    generate(model, PROMPT.inputs())
    assert blender.trace.blended
    blender.remove()
    blender.remove()
    assert state_of(model) == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert models._known(model) is None
    after = generate(model, {"input_ids": PROMPT.input_ids})
    assert torch.equal(after.sequences, stock.sequences)
    assert largest_difference(after, stock) == 0.0
    with pytest.raises(ValueError, match="chunk_spans"):
        generate(model, PROMPT.inputs())


@pytest.mark.parametrize("phase", ["prefill", "record", "rows"])
def test_an_exception_inside_generate_leaves_nothing_switched(phase):
    model = make_llama()
    stock = generate(model, {"input_ids": PROMPT.input_ids})
    before = state_of(model)
    with hfblend.patch(model, config=config(0.2)) as blender:
        if phase != "prefill":
            generate(model, PROMPT.inputs())
        calls = []

        def fail(module, args):
            calls.append(None)
            if phase != "rows" or model.config._attn_implementation.startswith("hfblend"):
                raise MemoryError("as if")

        handle = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            generate(model, PROMPT.inputs())
        handle.remove()
        assert calls
        assert model.config._attn_implementation == "sdpa"
        generate(model, PROMPT.inputs())
        assert blender.trace.blended
    assert state_of(model) == before
    assert largest_difference(generate(model, {"input_ids": PROMPT.input_ids}), stock) == 0.0


def test_direct_calls_are_never_touched():
    model = make_llama()
    with torch.no_grad():
        stock = model(PROMPT.input_ids).logits
        with hfblend.patch(model, config=config(0.2)):
            assert torch.equal(model(PROMPT.input_ids).logits, stock)
            assert torch.equal(model(PROMPT.input_ids, use_cache=True).logits, stock)


def test_gradients_flow_as_before():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)):
        model(PROMPT.input_ids, labels=PROMPT.input_ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_second_model_is_untouched():
    one, other = make_llama(), make_llama()
    before = state_of(other)
    with hfblend.patch(one, config=config(0.2)):
        assert state_of(other) == before
        with pytest.raises(ValueError, match="chunk_spans"):
            generate(other, PROMPT.inputs())


def test_a_deep_copy_of_a_patched_model_is_stock():
    model = make_llama()
    with hfblend.patch(model, config=config(0.0)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(0)
        output = generate(twin, {"input_ids": PROMPT.input_ids})
        assert output.logits[0].abs().max() == 0
        assert generate(model, PROMPT.inputs()).logits[0].abs().max() > 0


def test_patch_keeps_wrappers_that_were_there_before():
    model = make_llama()
    seen = []
    own = model.model.forward

    def forward(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    model.model.forward = forward
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs(), max_new_tokens=2)
        assert blender.trace.blended
    assert model.model.forward is forward
    assert len(seen) >= 3


@pytest.mark.parametrize("offload", ["before", "after"])
def test_accelerate_offloading(offload):
    from accelerate import cpu_offload

    model = make_llama()
    stock = generate(model, {"input_ids": PROMPT.input_ids})
    if offload == "before":
        cpu_offload(model)
    with hfblend.patch(model, config=config(1.0)) as blender:
        if offload == "after":
            cpu_offload(model)
        output = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert torch.equal(output.sequences, stock.sequences)


# --- bad input


def test_second_patch_is_refused_until_remove():
    model = make_llama()
    blender = hfblend.patch(model)
    with pytest.raises(ValueError, match="already patched"):
        hfblend.patch(model)
    blender.remove()
    hfblend.patch(model).remove()


def test_training_mode_is_refused():
    model = make_llama().train()
    for call in (lambda: hfblend.patch(model), lambda: hfblend.blend(model, PROMPT)):
        with pytest.raises(ValueError, match="eval"):
            call()
    model.eval()
    hfblend.patch(model).remove()
    with pytest.raises(ValueError, match="eval"):
        hfblend.prefill_chunk(model.train(), [1, 2])


def test_check_layers_beyond_the_model_are_refused_everywhere():
    model = make_llama()
    with pytest.raises(ValueError, match="4 layers"):
        hfblend.patch(model, config=config(check_layers=(4,)))
    with pytest.raises(ValueError, match="4 layers"):
        hfblend.blend(model, PROMPT, config=config(check_layers=(9,)))
    with hfblend.patch(model) as blender, pytest.raises(ValueError, match="4 layers"):
        generate(model, PROMPT.inputs(), blend_config=config(check_layers=(4,)))
    assert blender.trace.num_tokens == 0


@pytest.mark.parametrize("spans", [[(0, 5), (4, 9)], [(5, 5)], [(80, 96)], [(-1, 4)], [(9, 12), (3, 5)], [(1, 2, 3)]])
def test_spans_that_do_not_fit_are_refused(spans):
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)), pytest.raises(ValueError, match="span"):
        generate(model, {"input_ids": PROMPT.input_ids, "chunk_spans": spans})


def test_a_config_of_another_type_is_refused():
    model = make_llama()
    with hfblend.patch(model) as blender:
        with pytest.raises(TypeError, match="BlendConfig"):
            generate(model, PROMPT.inputs(), blend_config={"recompute_ratios": (0.1,)})
        with pytest.raises(TypeError, match="BlendConfig"):
            blender.config = 0.15
    with pytest.raises(TypeError, match="BlendConfig"):
        hfblend.patch(model, config={})


@pytest.mark.parametrize("change", [lambda t: t.to(torch.float16), lambda t: t.repeat(2, 1, 1, 1)])
def test_an_entry_that_is_not_this_models_is_computed_again(caplog, change):
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        right = generate(model, PROMPT.inputs())
        for key in list(blender.store._entries)[1:3]:
            entry = blender.store.open(key)
            kv = [tuple(map(change, entry.layer(i))) for i in range(4)]
            cache = full_length_cache(kv)
            blender.store.put(key, hfblend.ChunkKV(cache, entry.cached_positions, entry.behind_ids))
        with caplog.at_level(logging.WARNING, "hfblend"):
            output = generate(model, PROMPT.inputs())
        assert blender.trace.misses == 2
        assert "computed again" in caplog.text
        assert largest_difference(output, right) == 0.0


# --- fingerprint


def test_one_edited_weight_makes_every_entry_a_miss():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs())
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[3, 4] += 0.5
        generate(model, PROMPT.inputs())
        assert blender.trace.misses == 3
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[3, 4] -= 0.5
        model.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 0.5  # unseen by version counters ...
        blender.hf_model.fingerprint.refresh()  # ... so one says so
        generate(model, PROMPT.inputs())
        assert blender.trace.misses == 3


def test_weights_given_other_memory_at_the_old_address_are_seen():
    """As by `weight.data = …` twice: an allocator gives the address of what was freed between."""
    model = make_llama()
    weight = model.model.layers[2].mlp.up_proj.weight
    memory = bytearray(weight.detach().numpy().tobytes())

    def assign():
        weight.data = torch.frombuffer(memory, dtype=torch.float32).view(weight.shape)
        return weight.data_ptr(), weight._version

    before = assign()
    taken = hfblend.model.weights.fingerprint.Fingerprint(model)
    first = taken.current(model)
    memory[:4] = bytes([1, 2, 3, 4])
    assert assign() == before
    assert taken.current(model) != first
    generation = taken.generation
    taken.current(model)
    assert taken.generation == generation


def test_fingerprint_tells_models_apart_and_casts():
    fingerprint = {hfblend.support.registry.model_of(m).fingerprint.current(m) for m in (make_llama(), make_llama())}
    assert len(fingerprint) == 1
    model = make_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    taken = hfblend.model.weights.fingerprint.Fingerprint(model)
    seen = {taken.current(model)}
    with torch.no_grad():
        weight[:2] = weight[:2].flip(0)  # swapped rows: every plain sum stays
        seen.add(taken.current(model))
        weight[0, :2] = weight[0, :2].flip(0)
        seen.add(taken.current(model))
    model.config.rms_norm_eps = 0.1
    taken.refresh()
    seen.add(taken.current(model))
    seen.add(taken.current(model.to(torch.bfloat16)))
    assert len(seen) == 5


def test_inside_a_wrapper_that_came_later_it_is_inactive_after_remove(caplog):
    model = make_llama()
    stock = generate(model, {"input_ids": PROMPT.input_ids})
    blender = hfblend.patch(model, config=config(0.2))
    for module, name in ((model, "generate"), (model.model, "forward")):
        inner = getattr(module, name)
        setattr(module, name, functools.wraps(inner)(lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)))
    generate(model, PROMPT.inputs())
    trace = blender.trace
    assert trace.blended
    blender.remove()
    assert "inactive" in caplog.text
    separated = PROMPT.input_ids  # with the separator of the config: it would have chunks
    assert largest_difference(generate(model, {"input_ids": separated}), stock) == 0
    assert blender.trace is trace
    with pytest.raises(ValueError, match="chunk_spans"):
        generate(model, PROMPT.inputs())
    with hfblend.patch(model, config=config(0.2)) as other:
        generate(model, PROMPT.inputs())
        assert (other.trace.blended, other.trace.misses, blender.trace) == (True, 3, trace)


# --- threads


def test_threads_generate_on_one_patched_model_at_once():
    """Blending, stock and left-padded calls side by side give what each gives alone."""
    model = make_llama()
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), make_prompt(seed=3).input_ids.repeat(2, 1)], 1)
    padded[1, 4:9] = 0
    jobs = [
        PROMPT.inputs(),
        {"input_ids": PROMPT.input_ids, "chunk_spans": []},
        {"input_ids": padded, "attention_mask": (padded != 0).long()},
        {"input_ids": padded, "attention_mask": (padded != 0).long(), "chunk_spans": []},
        make_prompt(seed=4).inputs(),
    ]
    with hfblend.patch(model, config=config(0.2)) as blender:
        alone = []
        for job in jobs:
            alone.append((generate(model, job), blender.trace.blended, blender.trace.fallback))
        failures = []

        def work(job, expected):
            for _ in range(6):
                output = generate(model, job)
                trace = blender.trace
                if (trace.blended, trace.fallback) != expected[1:] or largest_difference(output, expected[0]) > 2e-4:
                    failures.append((trace, largest_difference(output, expected[0])))

        threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, alone)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert [blended for _, blended, _ in alone] == [True, False, True, False, True]
    assert model.config._attn_implementation == "sdpa"


def test_other_forwards_wait_while_attention_is_switched():
    lock = hfblend.locks.ForwardLock()
    order = []
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        lock.shared(order.append, "other")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def run_pass():
        inside.set()
        assert not done.wait(0.1)
        lock.shared(order.append, "pass")  # the pass itself may run the whole model

    lock.exclusive(run_pass)
    thread.join()
    assert order == ["pass", "other"]


def test_a_pass_gets_its_turn_before_forwards_that_come_later():
    """Forwards of threads that decode overlap: the lock is never free of all of them."""
    lock, order = hfblend.locks.ForwardLock(), []

    sides = [(lock.exclusive, "pass"), (lock.shared, "later")]
    threads = [threading.Thread(target=side, args=(order.append, name)) for side, name in sides]

    def forward():
        for number, thread in enumerate(threads, 2):
            thread.start()
            wait_until(lambda number=number: len(lock._claims) == number)
        lock.shared(order.append, "inside")  # work inside a forward does not wait for the pass

    lock.shared(forward)
    for thread in threads:
        thread.join()
    assert order == ["inside", "pass", "later"]
    assert lock._claims == []


def wait_until(is_so):
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come to be")


def in_another_thread(work):
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, work).result()  # as asyncio.to_thread


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_a_forward_that_does_not_wait_meets_its_own_model(own):
    """It runs while the model is patched, or goes on behind `remove()`, or is another model's of the same config."""
    model = make_llama(attn_implementation=own)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())

    @torch.no_grad()
    def logits_of(one):
        return one(input_ids=PROMPT.input_ids).logits

    stock, rows = logits_of(model), torch.arange(len(PROMPT))
    lock, layers = ForwardLock(), model.model.layers

    def meet_one_more(count):
        """The model's own cache does not stop the last layer: it has the K/V of the last row twice."""
        attend_as(lambda rows: replace(rows.last(count), length=len(PROMPT) + count))

    changes = [
        lambda: attend_by_position(lock, model.config, QueryRows(rows[None], len(PROMPT)), {}),
        lambda: cut(lock, layers, len(PROMPT), 1, meet_one_more),
        lambda: watch(lock, layers, 1, rows),
        lambda: resume(lock, layers, 2, torch.zeros(1, len(PROMPT), 64)),
    ]

    def pass_of_another():
        for change in changes:
            found = change()
            for one in (model, other):
                assert torch.equal(in_another_thread(lambda one=one: logits_of(one)), stock)
            assert getattr(found, "hidden", None) is None
        assert not torch.equal(logits_of(model), stock)

    lock.exclusive(pass_of_another)
    assert model.config._attn_implementation == own
    assert torch.equal(logits_of(model), stock)


def test_passes_of_models_with_one_config_run_one_at_a_time():
    """Attention is switched in the config, which models share that were made from it."""
    one, other = make_llama(), make_llama()
    sharing = type(one)(one.config).eval()
    assert model_of(sharing).lock is model_of(one).lock
    assert model_of(other).lock is not model_of(one).lock


def test_threads_that_meet_a_model_first_have_one_host():
    model = make_llama()
    with ThreadPoolExecutor(4) as threads:
        hosts = list(threads.map(lambda _: model_of(model), range(4)))
    assert len(set(map(id, hosts))) == 1


def test_filler_ids_come_from_the_tokenizer(word_tokenizer):
    model = make_llama()
    settings = config(0.25, chunk_prefix="filler")
    with pytest.raises(ValueError, match="Give patch\\(\\) a tokenizer"):
        hfblend.patch(model, config=settings)
    with hfblend.patch(model, tokenizer=word_tokenizer) as blender:
        generate(model, PROMPT.inputs(), blend_config=settings)
        entry = blender.store.open(blender.trace.chunks[0].key)
        assert entry.behind_ids[len(PROMPT.prefix_ids) :] == hfblend.filler_ids(word_tokenizer)[:1024]
        blender.config = settings
        assert blender.config.filler_ids == hfblend.filler_ids(word_tokenizer)
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
