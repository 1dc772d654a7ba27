"""Stored texts found in plain prompts: `find="stored"`."""

from __future__ import annotations

import pytest
import torch
from helpers import MODELS, VOCABULARY, make_llama, shared
from transformers import DynamicCache

import hfblend
from hfblend.generate.learn import Traffic
from hfblend.model.hf_model import CACHE
from hfblend.store import DiskStore, MemoryStore, TieredStore
from hfblend.store.index import Hashed

LONG = {"min_reused_tokens": 0, "separator": None}


def ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, VOCABULARY, (count,), generator=generator).tolist()


PREFIX, SUFFIX = ids(9, 1), ids(8, 2)
TEXTS = [ids(60 + 10 * i, 10 + i) for i in range(4)]


def plain(*parts):
    return torch.tensor([[i for part in parts for i in part]])


def answer(model, input_ids, **kwargs):
    return model.generate(input_ids, max_new_tokens=6, do_sample=False, **kwargs)


def config(**settings):
    return hfblend.BlendConfig(**{**LONG, "find": "stored", **settings})


def make_store(kind, path):
    stores = {"memory": MemoryStore, "disk": lambda: DiskStore(path), "tiers": lambda: str(path)}
    return stores[kind]()


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
def test_texts_are_found_as_if_they_were_marked(kind, tmp_path):
    model = shared(make_llama)
    prompt = hfblend.Prompt.from_ids(PREFIX, [TEXTS[2], TEXTS[0]], SUFFIX, ids(3, 5))
    with hfblend.patch(model, config(), store=make_store(kind, tmp_path)) as blender:
        blender.precompute(TEXTS, prefix=prompt.prefix_ids)
        found = answer(model, prompt.input_ids)
        trace = blender.trace
        assert [chunk.span for chunk in trace.chunks] == list(prompt.chunk_spans)
        assert {chunk.status for chunk in trace.chunks} == {"hit"}
        assert trace.prefix.exact
        marked = answer(model, **{"input_ids": prompt.input_ids, "chunk_spans": prompt.chunk_spans})
        assert blender.trace.blended
        assert torch.equal(found, marked)


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
@pytest.mark.parametrize("cut", [(1, 0), (0, 1), (2, 3)])
def test_unequal_edges_become_gaps(kind, cut, tmp_path):
    model, (left, right) = shared(make_llama), cut
    with hfblend.patch(model, config(recompute_ratios=(1.0,)), store=make_store(kind, tmp_path)) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        cut_texts = [text[left : len(text) - right] for text in TEXTS[:2]]
        input_ids = plain(PREFIX, ids(left, 6), cut_texts[0], ids(2, 7), cut_texts[1], ids(1, 8), SUFFIX)
        found = answer(model, input_ids)
        trace = blender.trace
        assert [(chunk.status, chunk.span[1] - chunk.span[0]) for chunk in trace.chunks] == [
            ("hit", len(text)) for text in cut_texts
        ]
        assert trace.chunks[0].exact == (left == 0)
        assert "(2 in part)" in trace.notes[0]
        assert torch.equal(found, answer(model, input_ids, blend_config=hfblend.BlendConfig(enabled=False)))


def stock(model, input_ids, **kwargs):
    return answer(model, input_ids, blend_config=hfblend.BlendConfig(enabled=False), **kwargs)


def test_ratio_1_with_other_neighbours_is_stock():
    model = shared(make_llama)
    with hfblend.patch(model, config(recompute_ratios=(1.0,))) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        for order in ([3, 1, 0], [2, 2, 1]):
            input_ids = plain(PREFIX, *(TEXTS[i][1:] for i in order), SUFFIX)
            assert torch.equal(answer(model, input_ids), stock(model, input_ids))
            assert blender.traces[0].fallback == "disabled"
            answer(model, input_ids)
            assert (blender.trace.hits, blender.trace.misses) == (3, 0)


@pytest.mark.parametrize(
    ("input_ids", "said"),
    [
        (plain(PREFIX, ids(150, 99), SUFFIX), "No text of the store was found"),
        (plain(PREFIX, TEXTS[0][:31], ids(100, 98)), "No text of the store was found"),  # too short
        (plain(ids(9, 77), TEXTS[0], TEXTS[1]), "2 texts of the store, 130 tokens, are in the prompt, but"),
    ],
)
def test_where_nothing_is_found_stock_runs_and_says_why(input_ids, said):
    model = shared(make_llama)
    with hfblend.patch(model, config()) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        found = answer(model, input_ids)
        assert blender.trace.fallback == "no_chunks"
        assert said in blender.trace.fallback_reason
        assert torch.equal(found, stock(model, input_ids))


def test_texts_computed_after_nothing_are_found_in_every_prompt():
    model = shared(make_llama)
    with hfblend.patch(model, config()) as blender:
        blender.precompute(TEXTS)
        answer(model, plain(ids(20, 50), TEXTS[1], ids(2, 51), TEXTS[3], SUFFIX))
        assert [chunk.span for chunk in blender.trace.chunks] == [(20, 90), (92, 182)]
        assert blender.trace.hits == 2
        assert blender.trace.prefix is None


def test_of_several_beginnings_the_one_with_most_tokens_is_taken():
    model = shared(make_llama)
    with hfblend.patch(model, config()) as blender:
        blender.precompute(TEXTS[:1])
        blender.precompute(TEXTS[1:], prefix=PREFIX)
        blender.precompute(TEXTS, prefix=PREFIX[:4])
        answer(model, plain(PREFIX, TEXTS[0], TEXTS[1], TEXTS[2], SUFFIX))
        assert blender.trace.hits == 3
        assert blender.trace.prefix.span == (0, 4)


@pytest.mark.parametrize("chunk_prefix", ["bos", "none", "filler"])
def test_every_chunk_prefix(chunk_prefix):
    model = shared(make_llama)
    settings = {"filler_ids": tuple(ids(12, 4))} if chunk_prefix == "filler" else {}
    with hfblend.patch(model, config(chunk_prefix=chunk_prefix, **settings)) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        answer(model, plain(PREFIX, ids(2, 3), TEXTS[2], TEXTS[1][2:], SUFFIX))
        assert [chunk.status for chunk in blender.trace.chunks] == ["hit", "hit"]
        assert blender.trace.misses == 0


def test_namespaces_and_dtypes_find_nothing_of_each_other(tmp_path):
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[0], TEXTS[1], SUFFIX)
    for store in (MemoryStore(), DiskStore(tmp_path)):
        with hfblend.patch(model, config(namespace="a"), store=store) as blender:
            blender.precompute(TEXTS, prefix=PREFIX)
            for namespace, fallback in (("b", "no_chunks"), ("", "no_chunks"), ("a", None)):
                answer(model, input_ids, blend_config=config(namespace=namespace))
                assert blender.trace.fallback == fallback
                assert "No text of the store" in (blender.trace.fallback_reason or "") or fallback is None
        with hfblend.patch(shared(make_llama, dtype=torch.bfloat16), config(namespace="a"), store=store) as blender:
            answer(blender.model, input_ids)
            assert blender.trace.fallback == "no_chunks"


@pytest.mark.parametrize("find", ["stored", "learn"])
def test_texts_of_changed_weights_are_found_at_once(find):
    """Weights may change after prompts in which nothing was found, too."""
    model, other, store = make_llama(), make_llama(), MemoryStore()
    input_ids = plain(PREFIX, TEXTS[0][1:], TEXTS[1], SUFFIX)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with hfblend.patch(other, config(), store=store) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
    with hfblend.patch(model, config(recompute_ratios=(1.0,)), store=store, find=find) as blender:
        for factor, hits in ((1.0, 0), (1.5, 2), (2.0, 0)):
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(factor)
            found = answer(model, input_ids)
            assert (blender.trace.hits, blender.trace.misses) == (hits, 0)
            assert torch.equal(found, stock(model, input_ids))


def test_what_is_gone_is_a_miss_once_and_then_found_again(tmp_path):
    model, input_ids = shared(make_llama), plain(PREFIX, ids(1, 6), TEXTS[0][1:], SUFFIX)
    store = DiskStore(tmp_path)
    with hfblend.patch(model, config(), store=store) as blender:
        blender.precompute(TEXTS[:1], prefix=PREFIX)
        answer(model, input_ids)
        assert blender.trace.hits == 1
        for key in store.keys():  # noqa: SIM118
            DiskStore(tmp_path).remove(key)  # as another process would
        answer(model, input_ids)
        assert blender.trace.misses == 1
        first = answer(model, input_ids)
        assert blender.trace.hits == 1
        assert "(0 in part)" in blender.trace.notes[0]
        assert torch.equal(first, answer(model, input_ids))


def test_a_damaged_entry_is_given_up_and_its_text_prefilled(tmp_path):
    model, input_ids = shared(make_llama), plain(PREFIX, ids(1, 6), TEXTS[0][1:], SUFFIX)
    with hfblend.patch(model, config(recompute_ratios=(1.0,)), store=DiskStore(tmp_path)) as blender:
        blender.precompute(TEXTS[:1], prefix=PREFIX)
        for path in tmp_path.glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 255
            path.write_bytes(data)
        found = answer(model, input_ids)
        assert blender.trace.misses == 1
        assert "blended again without it" in " ".join(blender.trace.notes)
        assert torch.equal(found, stock(model, input_ids))


def test_a_batch_with_padding_and_a_separator_that_is_there():
    model = shared(make_llama)
    rows = [[*PREFIX, *TEXTS[0], *SUFFIX], [*PREFIX, *TEXTS[3][2:], *TEXTS[1], *SUFFIX], [*PREFIX, *ids(30, 60)]]
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    with hfblend.patch(model, config(recompute_ratios=(1.0,), separator=(5, 6))) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        found = answer(model, input_ids, attention_mask=mask)
        assert [trace.hits for trace in blender.traces] == [1, 2, 0]
        assert torch.equal(found, stock(model, input_ids, attention_mask=mask))
        answer(model, plain(PREFIX, (5, 6), TEXTS[0], (5, 6), SUFFIX))
        assert blender.trace.chunks[0].status == "miss"
        assert not blender.trace.notes


def test_it_is_off_by_default_and_on_by_patch_call_or_environment():
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[0], SUFFIX)
    assert hfblend.BlendConfig().find is None
    assert hfblend.BlendConfig.from_env({"HFBLEND_FIND": "stored"}).find == "stored"
    with pytest.raises(ValueError, match="find must be one of"):
        hfblend.BlendConfig(find="all")
    off = hfblend.BlendConfig(**LONG)
    with hfblend.patch(model, off) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        answer(model, input_ids)
        assert blender.trace.fallback == "no_chunks"
        answer(model, input_ids, find="stored")
        assert blender.trace.hits == 1
        store = blender.store
    with hfblend.patch(model, off, store=store, find="stored") as blender:
        answer(model, input_ids)
        assert blender.trace.hits == 1
    answer(model, input_ids)  # not patched: `find` would be an unknown argument


def test_tiers_find_what_memory_has_lost(tmp_path):
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[3], TEXTS[0][1:], SUFFIX)
    store = TieredStore([MemoryStore(max_bytes=300_000), DiskStore(tmp_path)])
    with hfblend.patch(model, config(), store=store) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        assert len(store.stores[0]) < len(store.stores[1])
        answer(model, input_ids)
        assert (blender.trace.hits, blender.trace.misses) == (2, 0)


def test_auto_and_verify_go_with_it():
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[0][1:], TEXTS[1], SUFFIX)
    with hfblend.patch(model, config(), verify=1) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        answer(model, input_ids)
        assert blender.trace.verification is not None
        assert blender.trace.misses == 0
        assert len(blender.store) == len(TEXTS) + 1


# --- what it must not reuse -------------------------------------------------------------------------------------------


def test_a_part_whose_rows_saw_other_text_is_not_used():
    """What stands before a text in the entry that holds it must not reach a prompt without it."""
    model = shared(make_llama)
    with hfblend.patch(model, config()) as blender:
        blender.precompute([[*ids(40, 70), *TEXTS[0]]], prefix=PREFIX)
        answer(model, plain(PREFIX, TEXTS[0], SUFFIX))
        assert blender.trace.fallback == "no_chunks"
        answer(model, plain(PREFIX, ids(40, 70), ids(5, 71), TEXTS[0], SUFFIX))  # here it stands before it
        assert [chunk.span for chunk in blender.trace.chunks] == [(9, 49), (54, 114)]
        answer(model, plain(PREFIX, ids(40, 70), TEXTS[0][:35], SUFFIX))  # no row has seen what is cut off its end
        assert [chunk.span for chunk in blender.trace.chunks] == [(9, 84)]


@pytest.mark.parametrize("seed", range(4))  # keys in either order
def test_equal_texts_share_the_rows_that_saw_least(seed):
    """A text stands twice: the second time, an entry in which other text precedes it would do, too."""
    model, before, text = shared(make_llama), ids(70, 40 + seed), ids(60, 500 + seed)
    with hfblend.patch(model, config()) as blender:
        blender.precompute([[*before, *text], text], prefix=PREFIX)
        answer(model, plain(PREFIX, text, ids(4, 3), before[:66], ids(3, 4), text, SUFFIX))
        assert [(chunk.cached_start, chunk.exact) for chunk in blender.trace.chunks] == [
            (9, True),
            (9, False),
            (9, False),
        ]


# --- after a conversation's cache -------------------------------------------------------------------------------------


def conversation(model, blender=None):
    """The ids after each of four plain turns of one cache, and what was found in them."""
    cache, before, told = DynamicCache(config=model.config), PREFIX, []
    for turn in range(4):
        texts = TEXTS[turn][turn % 3 :], TEXTS[(turn + 1) % 4]
        input_ids = plain(before, ids(2, 90 + turn), texts[0], ids(1, 7), texts[1], ids(70, 55), ids(5, 80 + turn))
        held = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers if layer.is_initialized]
        found = answer(model, input_ids, attention_mask=torch.ones_like(input_ids), **{CACHE: cache})
        for layer, (keys, values) in zip(cache.layers, held):
            assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)
            assert torch.equal(layer.values[:, :, : keys.shape[2]], values)
        told.append((found, blender and blender.trace, len(held) and held[0][0].shape[2]))
        before = found[0].tolist()
    return told


@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["after the prefix", "after none"])
@pytest.mark.parametrize(("find", "hits"), [("stored", [2, 2, 2, 2]), ("learn", [2, 2, 3, 3])])
@pytest.mark.parametrize("name", ["llama-gqa", pytest.param("mistral-full", marks=pytest.mark.thorough)])
def test_texts_of_later_turns_are_found_after_the_cache(name, find, hits, prefix):
    model = shared(MODELS[name])
    expected = conversation(model)
    with hfblend.patch(model, config(find=find, recompute_ratios=(1.0,))) as blender:
        blender.precompute(TEXTS, prefix=prefix)
        told = conversation(model, blender)
    for (found, trace, held), (of_stock, *_), count in zip(told, expected, hits):
        assert torch.equal(found, of_stock)
        assert trace.hits == count
        assert trace.prefix is None or trace.prefix.span == (0, held or len(PREFIX))
        assert trace.computed_pairs <= (trace.num_tokens - held) * trace.num_layers


# --- what came before -------------------------------------------------------------------------------------------------


def test_a_passage_that_comes_again_is_learnt():
    model = shared(make_llama)
    with hfblend.patch(model, config(find="learn", recompute_ratios=(1.0,))) as blender:
        prompts = [
            plain(PREFIX, ids(30, 40 + i), TEXTS[3][i % 2 :], ids(12, 50 + i), TEXTS[1], SUFFIX) for i in range(4)
        ]
        counts = []
        for input_ids in prompts:
            found = answer(model, input_ids)
            trace = blender.trace
            counts.append((trace.fallback, trace.hits, trace.misses))
            assert torch.equal(found, stock(model, input_ids))
        assert counts == [("no_chunks", 0, 0), (None, 0, 2), (None, 2, 0), (None, 2, 0)]
        assert trace.prefix.span == (0, 9)


def test_the_same_prompt_again_is_no_passage():
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[0], SUFFIX)
    with hfblend.patch(model, config(), find="learn") as blender:
        for _ in range(2):
            answer(model, input_ids)
            assert blender.trace.fallback == "no_chunks"
        assert len(blender.store) == 0


@pytest.mark.parametrize("chunk_prefix", ["prompt", "none"])
def test_equal_rows_of_a_batch_are_one_prompt(chunk_prefix):
    model, input_ids = shared(make_llama), plain(PREFIX, TEXTS[0], ids(100, 70), TEXTS[1][1:], SUFFIX)
    with hfblend.patch(model, config(chunk_prefix=chunk_prefix), find="learn") as blender:
        blender.precompute(TEXTS[:1], prefix=PREFIX)
        found = answer(model, input_ids.expand(3, -1))
        assert len({id(trace) for trace in blender.traces}) == 1
        assert blender.trace.hits == 1
        assert torch.equal(found, found[:1].expand(3, -1))


def test_learning_keeps_to_its_namespace_and_budget():
    model, (one, other) = shared(make_llama), (plain(ids(20, i), TEXTS[2], SUFFIX) for i in (80, 81))
    with hfblend.patch(model, config(), find="learn") as blender:
        answer(model, one, blend_config=config(namespace="a"), find="learn")
        answer(model, other, blend_config=config(namespace="b"), find="learn")
        assert blender.trace.fallback == "no_chunks"
    traffic = Traffic(most=300)
    for number in range(5):
        traffic.add(Hashed(ids(100, number)))
    assert traffic.num_ids == 300
    assert [bool(traffic.repeated(Hashed(ids(100, n)[5:]), (), 0)[1]) for n in range(5)] == [0, 0, 1, 1, 1]
