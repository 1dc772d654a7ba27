"""What one request's chunk KV can carry into the answers of another, and what it cannot: `docs/security.md`.

Request A holds a text before a chunk; request B holds the same chunk, and never that text.
"""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from helpers import config, damage, generate, make_llama, make_mistral, make_prompt, same, shared
from test_real_models import load_smollm

import hfblend
from hfblend.kv.rows import full_length_cache
from hfblend.lab.baselines import METHODS
from hfblend.measure.divergence import kl_divergence
from hfblend.model.hf_model import HFModel
from hfblend.store import DiskStore, MemoryStore, TieredStore, chunk_key
from hfblend.store.format import dump
from hfblend.support.registry import model_of


def ids_of(seed, count):
    return make_prompt(sizes=(count,), seed=seed).chunk_ids[0]


PREFIX, SUFFIX, CHUNK = ids_of(1, 7), ids_of(2, 9), ids_of(3, 31)
TEXTS = [ids_of(seed, 20) for seed in range(10, 18)]  # eight that A may have held
NOISE = 1e-9  # KL in nats between runs that differ by rounding, at most


def prompt(*chunks, prefix=PREFIX, suffix=SUFFIX):
    return hfblend.Prompt.from_ids(prefix, list(chunks), suffix, (5, 6))


B = prompt(ids_of(4, 17), CHUNK)


def after(requests, settings, model=None, store=None):
    """B's result, and the stored KV of the chunk, after other requests on the same store; some have other settings."""
    model, store = model or shared(), MemoryStore() if store is None else store
    for request in requests:
        one, its_settings = request if isinstance(request, tuple) else (request, settings)
        hfblend.blend(model, one, store=store, config=its_settings)
    result = hfblend.blend(model, B, store=store, config=settings)
    return result, store.open(result.trace.chunks[1].key)


# --- computed in context: something is carried


@pytest.mark.parametrize("rule", ["suffix_attention", "kv_deviation", "chunk_start"])
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_in_context_an_answer_depends_on_a_text_that_its_prompt_does_not_hold(rule, ratio):
    settings = config(ratio, selection=rule, on_miss="in_context")
    results = [after([prompt(text, CHUNK)], settings) for text in TEXTS[:3]]
    assert all(result.trace.chunks[1].status == "hit" for result, _ in results)
    for (one, kv), (other, other_kv) in itertools.combinations(results, 2):
        assert not torch.allclose(kv.layer(2)[1], other_kv.layer(2)[1], atol=1e-3)
        assert kl_divergence(one.logits, other.logits).item() > 1000 * NOISE


@pytest.mark.parametrize("name", ["lmcache_v1", "kv_deviation_in_context"])
def test_presets_that_share_kv_in_context_carry_the_other_requests_text(name):
    results = [METHODS[name].blend(shared(), B, 0.15, MemoryStore(), elsewhere=text) for text in TEXTS[:3]]
    for one, other in itertools.combinations(results, 2):
        assert kl_divergence(one.logits, other.logits).item() > 1000 * NOISE


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
def test_who_knows_the_candidates_tells_from_an_answer_which_one_a_request_held(ratio):
    """The observer runs each candidate and takes the closest answer; A held one passage more, and asked less."""
    settings = config(ratio, on_miss="in_context")
    simulated = torch.cat([after([prompt(text, CHUNK)], settings)[0].logits for text in TEXTS])
    for i, text in enumerate(TEXTS):
        request = prompt(text, CHUNK, TEXTS[0], suffix=SUFFIX[:5])
        seen = after([request], settings)[0].logits
        assert kl_divergence(seen.expand_as(simulated), simulated).argmin() == i


def test_in_context_the_system_text_of_another_request_is_carried_too():
    """Keys of KV in context do not hold what stood before it, the prefix included."""
    settings = config(0.15, on_miss="in_context")
    results = [after([prompt(CHUNK, prefix=text)], settings)[0] for text in TEXTS[:2]]
    assert [result.trace.chunks[1].status for result in results] == ["hit"] * 2
    assert kl_divergence(results[0].logits, results[1].logits).item() > 1000 * NOISE


# --- isolated: nothing is


def requests_before(text, text_2):
    """Name -> what other requests held before B."""
    return {
        "the text, the chunk": [prompt(text, CHUNK)],
        "the chunk, the text": [prompt(CHUNK, text)],
        "two texts, the chunk twice": [prompt(text, text_2, CHUNK, CHUNK)],
        "another question": [prompt(text, CHUNK, suffix=text_2)],
        "another prefix": [prompt(text, CHUNK, prefix=text_2)],
        "several requests": [prompt(text_2), prompt(text, CHUNK), prompt(CHUNK, text_2, text)],
    }


@functools.cache
def after_none(make, ratio, chunk_prefix):
    """The settings, and B's result and the chunk's KV on an empty store."""
    settings = config(ratio, chunk_prefix=chunk_prefix, filler_ids=range(20, 60))
    return settings, *after([], settings, shared(make))


@pytest.mark.parametrize("name", requests_before(*TEXTS[:2]))
@pytest.mark.parametrize("chunk_prefix", ["prompt", "filler", "bos", "none"])
def test_isolated_kv_and_answers_are_equal_whatever_other_requests_held(chunk_prefix, name):
    pairs = itertools.pairwise(TEXTS)
    for make, ratio in ((make_llama, 0.0), (make_llama, 1.0), (make_llama, 0.15), (make_mistral, 0.15)):
        settings, alone, kv_alone = after_none(make, ratio, chunk_prefix)
        result, kv = after(requests_before(*next(pairs))[name], settings, shared(make))
        assert torch.equal(result.logits, alone.logits)
        assert same(kv, kv_alone)


@pytest.mark.parametrize("chunk_prefix", ["prompt", "bos"])
def test_isolated_requests_do_not_use_what_others_computed_in_context(chunk_prefix):
    """They share the prefix with them, which no text after it reaches; its rounding is that of a longer pass."""
    settings, in_context = config(0.15, chunk_prefix=chunk_prefix), config(0.15, on_miss="in_context")
    results = [after([(prompt(text, CHUNK), in_context)], settings) for text in TEXTS[:3]]
    for result, kv in results:
        assert [chunk.status for chunk in result.trace.chunks] == ["miss", "miss"]
        assert torch.equal(result.logits, results[0][0].logits)
        assert same(kv, results[0][1])
    assert torch.allclose(results[0][0].logits, after([], settings)[0].logits, atol=2e-5)


@pytest.mark.parametrize("rule", ["suffix_attention", "kv_deviation", "chunk_start", "mixed", "random", "last"])
def test_isolated_answers_are_equal_for_every_rule(rule):
    settings = config(0.3, selection=rule)
    alone = after([], settings)[0]
    for text in TEXTS[:3]:
        assert torch.equal(after([prompt(text, CHUNK)], settings)[0].logits, alone.logits)


@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "longrope", "llama3"])
def test_isolated_answers_are_equal_whatever_the_length_of_other_requests(rope):
    settings, model = config(0.15), make_llama(rope)
    alone = after([], settings, model)[0]
    for texts in (TEXTS[:1], TEXTS[:3], [ids_of(5, 300)]):
        assert torch.equal(after([prompt(*texts, CHUNK)], settings, model)[0].logits, alone.logits)


def test_dynamic_ntk_shows_the_length_of_the_longest_prompt_before_and_no_words_as_it_does_without_hfblend():
    """Transformers' module keeps the frequencies that it has grown to, until a prompt fits the model's own context."""
    longer = [prompt(text, TEXTS[7], CHUNK) for text in TEXTS[:3]]
    settings, alone = config(0.15), after([], config(0.15), make_llama("dynamic"))[0]
    results = [after([request], settings, make_llama("dynamic"))[0] for request in longer]
    assert all(torch.equal(result.logits, results[0].logits) for result in results)
    stock = [make_llama("dynamic") for _ in range(2)]
    stock[1](longer[0].input_ids)
    stock_logits = [model(B.input_ids).logits[:, -1] for model in stock]
    for one, other in (stock_logits, (alone.logits, results[0].logits)):
        assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("kind", ["disk", "tiers"])
def test_isolated_answers_are_equal_from_files(kind, tmp_path):
    settings = config(0.15)
    alone, kv_alone = after([], settings)
    for i, text in enumerate(TEXTS[:3]):
        disk = DiskStore(tmp_path / str(i))
        store = disk if kind == "disk" else TieredStore([MemoryStore(), disk])
        result, kv = after([prompt(text, CHUNK)], settings, store=store)
        assert result.trace.chunks[1].status == "hit"
        assert torch.equal(result.logits, alone.logits)
        assert all(torch.equal(a, b) for i in range(4) for a, b in zip(kv.layer(i), kv_alone.layer(i)))


def test_chunks_prefilled_in_one_forward_do_not_carry_each_others_words(monkeypatch):
    """On a GPU up to eight are; how many and how long they are may show in the last bits, what they say may not."""
    monkeypatch.setattr(HFModel, "chunks_at_once", property(lambda self: 8))
    settings = config(0.15)
    results = [after([prompt(text, TEXTS[7], CHUNK)], settings, make_llama()) for text in TEXTS[:4]]
    for result, kv in results[1:]:
        assert torch.equal(result.logits, results[0][0].logits)
        assert same(kv, results[0][1])


def test_filler_is_the_same_text_for_all():
    settings = config(0.15, chunk_prefix="filler", filler_ids=range(20, 60))
    for text in TEXTS[:3]:
        _, kv = after([prompt(text, CHUNK)], settings)
        assert list(kv.behind_ids) == [*B.prefix_ids, *range(20, 60)]


# --- timing, keys, namespaces


def work(settings, *requests):
    """The statuses of B's chunks after other requests, and what its trace counts: the work that a clock would see."""
    trace = after(requests, settings)[0].trace
    return [chunk.status for chunk in trace.chunks], (trace.isolated_pairs, trace.computed_pairs)


@pytest.mark.parametrize("on_miss", ["isolated", "in_context"])
def test_a_chunk_that_another_request_held_costs_less_work(on_miss):
    settings = config(0.15, on_miss=on_miss)
    (*_, status), probed = work(settings, prompt(TEXTS[0], CHUNK))
    (*_, unknown), nothing_held = work(settings)
    assert (status, unknown) == ("hit", {"isolated": "miss", "in_context": "fresh"}[on_miss])
    assert sum(probed) < sum(nothing_held)


def test_a_guess_is_right_as_a_whole_or_not_at_all():
    """No part of a chunk is found, so a chunk cannot be guessed token by token."""
    unlike = work(config(0.15), prompt(TEXTS[0], TEXTS[1]))
    assert unlike != work(config(0.15), prompt(TEXTS[0], CHUNK))
    for place in (0, 15, 30):
        guess = CHUNK[:place] + [CHUNK[place] % 80 + 7] + CHUNK[place + 1 :]
        for almost in (guess, CHUNK[:-1], CHUNK[1:]):
            assert work(config(0.15), prompt(TEXTS[0], almost)) == unlike


@pytest.mark.parametrize(
    ("chunk_prefix", "found"), [("prompt", "miss"), ("filler", "miss"), ("bos", "hit"), ("none", "hit")]
)
def test_a_probe_needs_the_same_prefix_where_chunks_are_computed_after_it(chunk_prefix, found):
    settings = config(0.15, chunk_prefix=chunk_prefix, filler_ids=range(20, 60))
    assert work(settings, prompt(TEXTS[0], CHUNK, prefix=TEXTS[1]))[0][1] == found


@pytest.mark.parametrize("on_miss", ["isolated", "in_context"])
def test_a_namespace_hides_what_another_tenant_holds(on_miss):
    settings = config(0.15, on_miss=on_miss, namespace="b")
    of_a = (prompt(TEXTS[0], CHUNK), replace(settings, namespace="a"))
    assert work(settings, of_a) == work(settings)
    assert torch.equal(after([of_a], settings)[0].logits, after([], settings)[0].logits)


def test_a_namespace_may_be_given_with_each_call_of_generate():
    with hfblend.patch(make_llama(), config=config(0.15)) as blender:
        hits = []
        for tenant in ("a", "b", "a"):
            generate(blender.model, B.inputs(), blend_config=config(0.15, namespace=tenant), max_new_tokens=1)
            hits.append(blender.trace.hits)
    assert hits == [0, 0, 2]


def test_tenants_of_one_store_push_out_each_others_entries():
    settings = [config(0.15, namespace=name) for name in "ab"]
    for held, found in ((1, 2), (12, 0)):  # by another tenant, between B's two requests
        store = MemoryStore(200_000)
        hfblend.blend(shared(), B, store=store, config=settings[0])
        for i in range(held):
            request = prompt(ids_of(100 + i, 31))
            hfblend.blend(shared(), request, store=store, config=settings[1])
        assert hfblend.blend(shared(), B, store=store, config=settings[0]).trace.hits == found


# --- a shared folder


def test_who_lists_a_folder_confirms_a_guess_unless_the_namespace_is_secret(tmp_path):
    for namespace, secret in (("", False), ("tenant-7", False), ("5f0c9e", True)):
        store = DiskStore(tmp_path / namespace / "chunks")
        result, _ = after([], config(0.15, namespace=namespace), store=store)
        stored = set(store.keys())
        known = model_of(shared()).fingerprint.current(shared()), torch.float32, CHUNK, B.prefix_ids
        guessed = chunk_key(*known, "" if secret else namespace)
        assert (guessed in stored) is not secret
        assert result.trace.chunks[1].key in stored


@pytest.mark.parametrize("on_miss", ["isolated", "in_context"])
def test_a_file_holds_the_ids_that_stood_before_its_chunk(on_miss, tmp_path):
    """In context, those of the whole request up to there; isolated, those of the prefix."""
    store, text = DiskStore(tmp_path), TEXTS[0]
    hfblend.blend(shared(), prompt(text, CHUNK), store=store, config=config(0.15, on_miss=on_miss))
    content = b"".join(path.read_bytes() for path in tmp_path.glob("*.safetensors"))
    ids = {name: torch.tensor(ids).numpy().tobytes() for name, ids in (("text", text), ("prefix", B.prefix_ids))}
    assert ids["prefix"] in content
    assert (ids["text"] in content) is (on_miss == "in_context")


def test_who_writes_a_folder_changes_answers_unnoticed_for_checksums_are_no_signatures(tmp_path, caplog):
    store, settings = DiskStore(tmp_path), config(0.15)
    honest, kv = after([], settings, store=store)
    key = honest.trace.chunks[1].key
    layers = [tuple(states * 1.5 for states in kv.layer(i)) for i in range(4)]
    forged = hfblend.ChunkKV(full_length_cache(layers), kv.cached_positions, kv.behind_ids, "isolated", kv.regime)
    (tmp_path / f"{key}.safetensors").write_bytes(dump(key, forged))
    with caplog.at_level(logging.WARNING):
        result, _ = after([], settings, store=DiskStore(tmp_path))
    assert result.trace.hits == 2
    assert kl_divergence(honest.logits, result.logits).item() > 1000 * NOISE
    assert caplog.text == ""
    damage(store, key, layer=1)  # an accident is noticed
    assert torch.equal(after([], settings, store=DiskStore(tmp_path))[0].logits, honest.logits)


def test_a_store_in_8_bits_tells_a_first_answer_from_later_ones_and_no_words(tmp_path):
    settings = config(0.15)
    first = after([], settings, store=DiskStore(tmp_path / "first", kv_dtype="int8"))[0]
    later = [
        after([prompt(text, CHUNK)], settings, store=DiskStore(tmp_path / str(i), kv_dtype="int8"))[0]
        for i, text in enumerate(TEXTS[:3])
    ]
    assert all(torch.equal(one.logits, later[0].logits) for one in later)
    assert not torch.equal(first.logits, later[0].logits)


# --- a real model


@pytest.mark.smollm
@pytest.mark.thorough
def test_a_real_model_tells_another_requests_secret_in_context_and_nothing_when_isolated():
    """Of the first token's log-probabilities, the secret's own name rises most: `benchmarks/security.py` has ten."""
    from hfblend.demo.passages import demo_data, passage_texts, question_prompt

    model, tokenizer = load_smollm()
    data, names = demo_data(), ("Falcon", "Maple", "Copper", "Saturn")
    chunk, passage = (
        "The project named above will ship in May. Its code name, given above, is secret.",
        passage_texts(data, [0]),
    )
    ids = [tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in names]
    for on_miss in ("in_context", "isolated"):
        settings, rows = config(0.15, on_miss=on_miss), []
        for name in names if on_miss == "in_context" else names[:2]:  # each takes a second
            held = [f"The code name of the project is {name}. Only the team of {name} may know it.", chunk]
            ask, store = "What is the code name of the project?", MemoryStore()
            for texts in (held, [*passage, chunk]):
                request = question_prompt(tokenizer, data["system"], texts, ask)
                result = hfblend.blend(model, request, store=store, config=settings)
            rows.append(result.logits)
        told = torch.cat(rows).log_softmax(-1)[:, ids]
        if on_miss == "isolated":
            assert torch.equal(*rows)
        else:
            assert (told - told.mean(0)).argmax(1).tolist() == [0, 1, 2, 3]
