"""Each preset does what its source does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import config, full_prefill_kv, generate, make_llama, make_mistral, make_prompt

import hfblend
from hfblend.blend.algorithm import Blend
from hfblend.lab import baselines
from hfblend.lab.baselines import METHODS
from hfblend.measure.divergence import kl_divergence
from hfblend.model import passes
from hfblend.model.passes import see_rows

PROMPT = make_prompt(sizes=(20, 31, 13, 25))
ELSEWHERE = list(range(10, 40))


@pytest.fixture(scope="module")
def model():
    return make_llama()


def run(model, name, ratio=0.25, store=None, tokenizer=None):
    store = hfblend.MemoryStore() if store is None else store
    return METHODS[name].blend(model, PROMPT, ratio, store, tokenizer=tokenizer, elsewhere=ELSEWHERE)


def keys_seen(run_pass):
    """Per decoder forward that attends by position: (positions of the rows, what they see from)."""
    seen = []

    def spy(model, rows):
        seen.append(rows.positions[0].tolist())
        return see_rows(model, rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passes, "see_rows", spy)
        return seen, run_pass()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_finite_logits_and_a_cache_to_continue(model, name, word_tokenizer):
    result = run(model, name, tokenizer=word_tokenizer)
    assert torch.isfinite(result.logits).all()
    prompt = METHODS[name].prompt_of(PROMPT)
    assert result.cache.get_seq_length() == len(prompt) - 1
    for layer in result.cache.layers:
        assert torch.isfinite(layer.keys).all()
    out = model.generate(prompt.input_ids, past_key_values=result.cache, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == len(prompt) + 3


@pytest.mark.parametrize("name", METHODS)
def test_only_methods_of_our_own_are_corrected(name):
    """Whatever the default is, the others stay what their papers and the baselines' names say."""
    method = METHODS[name]
    default = hfblend.BlendConfig().correction
    own = "offset" if name.endswith("_offset") else default if name == "hfblend" else None
    assert method.config(0.2).correction == own
    for correction in ("offset", None):
        changed = method.corrected(correction)
        taken = correction if method.takes_correction else own
        assert changed.config(0.2) == replace(method.config(0.2), correction=taken)
        assert (changed is method) == (not method.takes_correction)
    assert not (method.takes_correction and (method.algorithm is not Blend or "deviation" in name))


def test_suffix_attention_after_the_filler_differs_in_nothing_else():
    """Not even when the default configuration, `hfblend`, has another correction or no filler."""
    alone, after_filler = METHODS["suffix_attention"].config(0.2), METHODS["suffix_attention_filler"].config(0.2)
    assert after_filler == replace(alone, chunk_prefix="filler", correction=None)


def test_offset_methods_recompute_the_same_tokens(model):
    for name in ("suffix_attention", "kv_deviation"):
        plain, corrected = run(model, name), run(model, f"{name}_offset")
        assert corrected.trace.selected_idx.tolist() == plain.trace.selected_idx.tolist()
        assert (corrected.logits - plain.logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["full_prefill", "prefix_reuse"])
def test_exact_baselines_equal_a_stock_forward(model, name):
    stock = model(PROMPT.input_ids).logits[:, -1]
    store = hfblend.MemoryStore()
    for _ in range(2):  # cold, then warm
        assert torch.allclose(run(model, name, store=store).logits, stock, atol=2e-5)
    pairs = run(model, name, store=store).trace.computed_pairs
    prefix = PROMPT.chunk_spans[0][0]
    assert pairs == 4 * (len(PROMPT) - (prefix if name == "prefix_reuse" else 0))


def test_without_context_only_prefix_and_suffix_are_seen(model):
    result, prompt = run(model, "no_context"), METHODS["no_context"].prompt_of(PROMPT)
    assert prompt.ids == PROMPT.prefix_ids + PROMPT.suffix_ids
    assert torch.allclose(result.logits, model(prompt.input_ids).logits[:, -1], atol=2e-5)
    assert result.trace.computed_pairs == 4 * len(prompt)
    assert all(METHODS[name].prompt_of(PROMPT).ids == PROMPT.ids for name in METHODS if name != "no_context")


def test_full_reuse_selects_nothing(model):
    trace = run(model, "full_reuse").trace
    assert trace.selected_tokens == 0
    assert trace.computed_pairs == 4 * len(trace.fresh_idx)


def test_paper_filters_over_layers_by_keys_and_values():
    settings = METHODS["cacheblend_paper"].config(0.2)
    assert (settings.selection, settings.deviation, settings.chunk_prefix) == ("kv_deviation", "key_value", "none")
    assert settings.check_layers == (1, 2, 3)
    assert settings.recompute_ratios[0] > settings.recompute_ratios[1] > settings.recompute_ratios[2] == 0.2


def test_references_show_rows_the_keys_behind_them(model):
    for name in ("research_repo", "lmcache_v1", "kv_deviation_leaky"):
        seen, result = keys_seen(lambda name=name: run(model, name))
        rows = sorted({*result.trace.selected_idx.tolist(), *result.trace.fresh_idx.tolist()})
        assert seen[-1] == list(range(len(PROMPT) - len(rows), len(PROMPT)))  # bottom-right, not their own positions
        assert seen[-1] != rows
    seen, result = keys_seen(lambda: run(model, "kv_deviation"))
    assert seen[-1] == sorted([*result.trace.selected_idx.tolist(), *result.trace.fresh_idx.tolist()])


def test_leak_is_real_a_later_token_changes_a_selected_row(model):
    """The row of an early selected token depends on tokens behind it with the leaky mask, and not without."""
    ids = PROMPT.input_ids.clone()
    stop = PROMPT.chunk_spans[-1][1]
    ids[0, stop - 3] = (ids[0, stop - 3] + 5) % 90 + 7  # in the last chunk
    changed = hfblend.Prompt(ids, PROMPT.chunk_spans)
    for algorithm, leaks in ((baselines.LeakyMask, True), (baselines.Blend, False)):
        results = [
            hfblend.blend(
                model, p, config=config(0.3, selection="chunk_start", on_miss="isolated"), algorithm=algorithm
            )
            for p in (PROMPT, changed)
        ]
        first = results[0].trace.selected_idx[0]
        one, other = (r.cache.layers[3].values[0, :, first] for r in results)
        assert torch.allclose(one, other, atol=1e-6) is not leaks


def test_research_repo_counts_all_tokens_before_the_suffix_and_rounds_down(model):
    trace = run(model, "research_repo", 0.16).trace
    assert trace.selected_tokens == int(PROMPT.chunk_spans[-1][1] * 0.16)
    assert METHODS["research_repo"].config(0.16).chunk_prefix == "bos"
    suffix = range(PROMPT.chunk_spans[-1][1], len(PROMPT))
    assert set(suffix) <= set(trace.fresh_idx.tolist())


def test_stale_rows_keep_the_check_layer_reused(model):
    store = hfblend.MemoryStore()
    stale, fresh = (run(model, name, store=store) for name in ("kv_deviation_stale", "kv_deviation"))
    true = full_prefill_kv(model, PROMPT.input_ids)
    kept = fresh.trace.candidate_idx[~torch.isin(fresh.trace.candidate_idx, fresh.trace.selected_idx)]
    assert torch.equal(stale.trace.selected_idx, fresh.trace.selected_idx)
    assert torch.allclose(fresh.cache.layers[1].values[:, :, kept], true[1][1][:, :, kept], atol=1e-5)
    assert not torch.allclose(stale.cache.layers[1].values[:, :, kept], true[1][1][:, :, kept], atol=1e-3)


def test_lmcache_ranks_every_token_and_leaves_unselected_separators_zero(model):
    result = run(model, "lmcache_v1", 0.25)
    trace = result.trace
    assert trace.selected_tokens == int(0.25 * len(PROMPT))
    assert trace.fresh_idx.tolist() == [len(PROMPT) - 1]
    gaps = [i for (_, stop), (start, _) in zip(PROMPT.chunk_spans, PROMPT.chunk_spans[1:]) for i in range(stop, start)]
    zero = (result.cache.layers[2].keys.abs().sum((0, 1, 3)) == 0).nonzero().flatten().tolist()
    unselected = set(range(PROMPT.chunk_spans[-1][1])) - set(trace.selected_idx.tolist())
    assert set(zero) >= set(gaps) & unselected
    assert METHODS["lmcache_v1"].config(0.1).deviation == "key"


def test_in_context_methods_use_kv_from_another_request(model):
    store = hfblend.MemoryStore()
    trace = run(model, "lmcache_v1", store=store).trace
    entry = store.open(trace.chunks[0].key)
    assert entry.provenance == "in_context"
    assert list(entry.behind_ids) == [*PROMPT.prefix_ids, *ELSEWHERE]
    with pytest.raises(ValueError, match="another request"):
        METHODS["lmcache_v1"].blend(model, PROMPT, 0.2, store)
    assert run(model, "kv_deviation", store=store).trace.misses == 4  # entries do not mix


def test_epic_recomputes_the_first_tokens_of_every_chunk(model):
    trace = run(model, "epic", 0.2).trace
    count = math.ceil(0.2 * len(trace.candidate_idx))
    wanted = sorted((i - start, i) for start, stop in PROMPT.chunk_spans for i in range(start, stop))[:count]
    offsets = {i: i - start for start, stop in PROMPT.chunk_spans for i in range(start, stop)}
    chosen = [offsets[i] for i in trace.selected_idx.tolist()]
    assert sorted(chosen) == [offset for offset, _ in wanted]
    assert trace.computed_pairs == 4 * (count + len(trace.fresh_idx))  # no pass before it


def test_the_filler_needs_a_tokenizer(model, word_tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        run(model, "suffix_attention_filler")
    store = hfblend.MemoryStore()
    cold = run(model, "suffix_attention_filler", store=store, tokenizer=word_tokenizer)
    warm = run(model, "suffix_attention_filler", store=store, tokenizer=word_tokenizer)
    entry = store.open(warm.trace.chunks[0].key)
    filler = hfblend.filler_ids(word_tokenizer)
    assert len(filler) > model.config.max_position_embeddings // 2  # and so it is cut
    assert entry.behind_ids == (*PROMPT.prefix_ids, *filler[: model.config.max_position_embeddings // 2])
    assert (cold.trace.misses, warm.trace.hits) == (4, 4)
    assert torch.equal(cold.logits, warm.logits)
    assert not any(chunk.exact for chunk in warm.trace.chunks)
    assert warm.trace.isolated_pairs == 0


def test_filler_kv_equals_one_prefill_of_prefix_filler_and_chunk(model, word_tokenizer):
    filler = hfblend.filler_ids(word_tokenizer)[:50]
    store, settings = hfblend.MemoryStore(), config(0.2, chunk_prefix="filler", filler_ids=filler)
    trace = hfblend.blend(model, PROMPT, store=store, config=settings).trace
    before = [*PROMPT.prefix_ids, *filler]
    for chunk, ids in zip(trace.chunks, PROMPT.chunk_ids):
        kv = full_prefill_kv(model, torch.tensor([[*before, *ids]]))
        for layer in range(4):
            for stored, stock in zip(store.open(chunk.key).layer(layer), kv[layer]):
                assert torch.allclose(stored, stock[:, :, len(before) :], atol=1e-5)
    context_pairs = 4 * (len(before) + len(PROMPT.prefix_ids) + sum(map(len, PROMPT.chunk_ids)))
    assert trace.isolated_pairs == context_pairs  # prefix, prefix and filler, and each chunk, once


def test_ratio_1_is_full_prefill_for_every_selection_rule():
    for make in (make_llama, make_mistral):
        model = make()
        stock = model(PROMPT.input_ids).logits[:, -1]
        for name in ("suffix_attention", "kv_deviation", "chunk_start", "mixed", "random", "last"):
            result = METHODS[name].blend(model, PROMPT, 1.0, hfblend.MemoryStore())
            assert result.trace.computed_pairs == 4 * len(PROMPT)
            assert kl_divergence(stock, result.logits).item() < 1e-6


def test_patched_generate_equals_blend_for_the_default(model):
    store = hfblend.MemoryStore()
    first = hfblend.blend(model, PROMPT, store=store, config=config(0.25)).logits
    with hfblend.patch(model, config=config(0.25), store=store):
        assert torch.allclose(generate(model, PROMPT.inputs(), max_new_tokens=1).logits[0], first, atol=1e-5)
