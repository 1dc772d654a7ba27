"""Heads whose logits a correction foretells wrong keep their keys: the regression, and what a blend sees of queries."""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, make_llama, make_prompt, shared

import hfblend
from hfblend.blend.caches import BlendingCache
from hfblend.blend.correction import offset
from hfblend.blend.trust import DOUBTED, NUM_QUERIES, TRUSTED, Queries, asked, trust
from hfblend.kernels.reference import AttentionArgs, attention_weights, visible
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt(sizes=(40, 64, 36))


def some_queries(seed=0, heads=2, rows=40, dim=8):
    """Queries of two KV heads, whose attention is spread over the recomputed rows."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(heads, 12, dim, generator=generator)
    attention = torch.rand(heads, 12, rows, generator=generator)
    return Queries(states, attention / attention.sum(-1, keepdim=True), lambda errors: errors)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the regression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [-1.0, 0.1, 0.3, 0.4, 0.9])
def test_the_ramp_is_that_of_the_share_that_is_true(share):
    """Errors are a share of what is foretold of them, and noise that no query sees."""
    queries, foretold = some_queries(), noise(2, 40, 8)
    found = trust(queries, share * foretold, foretold)
    shrunk = share / (1 + 10 / 40)
    assert torch.allclose(
        found, torch.tensor((shrunk - DOUBTED) / (TRUSTED - DOUBTED)).clamp(0, 1).expand(2), atol=1e-5
    )


def test_it_is_the_regression_query_by_query():
    queries, known, foretold = some_queries(), noise(2, 40, 8), noise(2, 40, 8, seed=2)
    known = 0.45 * foretold + 0.1 * known
    for head, found in enumerate(trust(queries, known, foretold)):
        up = down = 0.0
        for query, attention in zip(queries.states[head].double(), queries.attention[head].double()):
            for weight, true, told in zip(attention, known[head].double(), foretold[head].double()):
                up += weight * (query @ true) * (query @ told)
                down += weight * (query @ told) ** 2
        expected = ((up / down).item() / 1.25 - DOUBTED) / (TRUSTED - DOUBTED)
        assert 0 < expected < 1
        assert found.item() == pytest.approx(expected, abs=1e-4)


def test_a_head_is_refused_whose_attended_rows_do_not_share_the_shift_of_most():
    """39 rows agree on a shift, and carry no attention; the row that is looked at has none."""
    queries, shift = some_queries(heads=1), noise(1, 1, 8).expand(1, 40, 8)
    on_one = torch.zeros_like(queries.attention)
    on_one[..., 7] = 1
    known = shift.clone()
    known[:, 7] = 0
    seen = Queries(queries.states, on_one, queries.turned)
    assert trust(seen, known, shift) == 0
    assert trust(queries, known, shift) == 1  # whoever looks at all of them sees the shift of most


@pytest.mark.parametrize("known", [torch.zeros(2, 40, 8), noise(2, 40, 8, seed=9)])
def test_where_nothing_is_foretold_nothing_is_corrected(known):
    found = trust(some_queries(), known, torch.zeros(2, 40, 8))
    assert torch.equal(found, torch.zeros(2))


# --- what queries see -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("count", [9, 64, 150])
def test_attention_is_that_of_the_rows_asked(window, groups, count):
    keys = noise(2, 200, 8)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:count].sort().values
    args = AttentionArgs(noise(1, 2 * groups, count, 8, seed=4), keys[None], keys[None], 0.3, window)
    states, attention = asked(args, rows, keys, torch.arange(200))
    every = attention_weights(args, visible(rows[None], 200, window))[0]  # (H, S, T)
    picked = [(i * (count - 1) + NUM_QUERIES // 2) // (NUM_QUERIES - 1) for i in range(NUM_QUERIES)]
    assert (picked[0], picked[-1]) == (0, count - 1)
    assert torch.allclose(attention, every[:, picked].reshape(2, groups * NUM_QUERIES, 200), atol=1e-6)
    assert torch.allclose(states, 0.3 * args.query[0][:, picked].reshape(2, groups * NUM_QUERIES, 8))


def seen_in_blend(model, **settings):
    """(layer, slot, queries) in the order in which a correction is asked in a warm blend."""
    seen, calls = [], []

    def watch(errors):
        calls.append((errors.slot, errors.queries))
        return offset(errors)

    with hfblend.patch(model, config=config(0.3, **settings, correction=watch)) as blender:
        for _ in range(2):
            calls.clear()
            generate(model, PROMPT.inputs())
        assert blender.trace.blended
    for nth, (slot, queries) in enumerate(calls):
        seen.append((nth // 2, slot, queries))
    return seen


def test_keys_have_queries_but_in_the_layer_where_a_pass_ends():
    seen = seen_in_blend(shared())
    assert [slot for _, slot, _ in seen] == [0, 1] * 4
    for layer, slot, queries in seen:
        assert (queries is None) == (slot == 1 or layer == 3)  # in the last layer all rows but one end at their K/V
        if queries is not None:
            assert queries.attention.shape[1] % NUM_QUERIES == 0
            assert 0 < queries.attention.sum(-1).max() <= 1 + 1e-5


def test_layers_that_make_keys_of_what_is_cached_have_none():
    """Latent attention: what is cached is mixed before the layer makes keys of it."""
    from families import FAMILIES

    assert model_of(make_llama()).attends_to_cache
    latent = FAMILIES["deepseek_v3"].make()
    if model_of(latent).attends_to_cache:
        pytest.skip("this Transformers caches DeepSeek's keys, not its latents")
    assert {queries for _, _, queries in seen_in_blend(latent)} == {None}


def test_rows_wait_for_the_queries_of_their_layer_only_where_something_is_corrected():
    order = []
    fresh = noise(1, 2, 3, 8), noise(1, 2, 3, 8, seed=2)
    buffers = {0: (torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8))}
    rows = torch.tensor([1, 4, 6])
    cache = BlendingCache(1, buffers, rows, 7, correct=lambda *given: order.append(given[-1]))
    cache.is_told = True
    keys, _ = cache.update(*fresh, 0)
    assert not keys.any()
    assert not order
    args = AttentionArgs(noise(1, 2, 3, 8), keys, keys, 1.0)
    cache.attending(0, args)
    cache.attending(0, args)  # a layer that shares K/V with it
    assert order == [args]
    assert torch.equal(keys[:, :, rows], fresh[0])

    cache = BlendingCache(1, {0: tuple(t.clone() for t in buffers[0])}, rows, 7)
    cache.is_told = True
    keys, _ = cache.update(*fresh, 0)
    assert torch.equal(keys[:, :, rows], fresh[0])
