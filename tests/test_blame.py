"""The search for what changed an answer: it points at what was planted, and measures what it says."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import config, make_llama, make_prompt, shared, store_of_true_kv

import hfblend
from hfblend.kv.rows import full_length_cache
from hfblend.measure.blame import _Given, blame_prompt
from hfblend.measure.verify import verify_prompt

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt((20, 31, 13, 24))


def poisoned(model, chunk, tokens=slice(None), prompt=PROMPT, size=5.0):
    """A store of the prompt's true KV, with noise on the values of some tokens of one chunk."""
    store = store_of_true_kv(model, prompt)
    key = hfblend.blend(model, prompt, store=store, config=config(0.0)).trace.chunks[chunk].key
    entry, noise = store.open(key), torch.Generator().manual_seed(0)
    kv = [tuple(states.clone() for states in entry.layer(i)) for i in range(entry.num_layers)]
    for _, values in kv:
        values[:, :, tokens] += size * torch.randn(values[:, :, tokens].shape, generator=noise)
    store.put(
        key, hfblend.ChunkKV(full_length_cache(kv), entry.cached_positions, entry.behind_ids, regime=entry.regime)
    )
    return store


NOTHING = config(0.0, correction=None)  # only the poison is wrong, and nothing makes it less


@pytest.mark.parametrize("chunk", [0, 1, 2, 3])
def test_it_points_at_the_chunk_that_was_changed(chunk):
    model = shared()
    found = blame_prompt(model, PROMPT, store=poisoned(model, chunk), config=NOTHING, num_tokens=6)
    assert found.first_difference is not None
    assert found.chunks[0].part == f"chunk {chunk}"
    assert found.chunks[0].restores
    assert found.chunks[0].kl < 1e-3 < found.chunks[1].kl
    assert not any(one.restores for one in found.chunks[1:])
    assert {one.part for one in found.chunks} == {"prefix", *(f"chunk {i}" for i in range(4))}


def test_it_points_at_the_token_that_was_changed():
    model, token = shared(), PROMPT.chunk_spans[1][0] + 17
    found = blame_prompt(model, PROMPT, store=poisoned(model, 1, [17], size=20.0), config=NOTHING, num_tokens=6)
    assert found.first_difference is not None
    assert (found.fewest.start, found.fewest.stop, found.fewest.more) == (token, token + 1, 1)
    falls = found.falls()
    assert max(range(len(PROMPT)), key=lambda i: -1 if falls[i] is None else falls[i]) == token
    assert falls[token] == pytest.approx(found.kl, rel=1e-3)
    assert falls[len(PROMPT) - 1] is None  # the suffix is computed anyway
    assert f"To bring it back, recompute 1 token more: chunk 1, token {token}." in str(found)


@pytest.mark.parametrize("rule", ["suffix_attention", "kv_deviation", "chunk_start"])
def test_its_figures_are_those_of_blends(rule):
    """Its own distance is verify's; a ratio's is that of a blend with this ratio; a chunk's is less than the rest's."""
    model, settings = shared(), config(0.1, selection=rule)
    store = hfblend.MemoryStore()
    found = blame_prompt(model, PROMPT, store=store, config=settings, num_tokens=8)
    direct = verify_prompt(model, PROMPT, store=store, config=settings, num_tokens=8)
    assert found.kl == pytest.approx(direct.kl, rel=1e-3)
    assert found.full_answer_ids == direct.full_answer_ids
    assert found.blended_answer_ids == direct.blended_answer_ids
    assert found.first_difference == direct.first_difference
    for tried in found.ratios:
        at = verify_prompt(model, PROMPT, store=store, config=config(tried.ratio, selection=rule), num_tokens=8)
        assert tried.kl == pytest.approx(at.kl, rel=1e-3, abs=1e-7)
        assert tried.restores == (at.first_difference is None)
    assert found.smallest_ratio == min(one.ratio for one in found.ratios if one.restores)
    assert found.num_blends == 2 + len(found.chunks) + len(found.ratios) + len(found.stretches)


def test_the_rule_of_given_tokens_computes_what_the_settings_rule_does():
    """With no token more, a stretch is the settings' own blend: the same passes ran before it."""
    model, settings, store = shared(), config(0.2, selection="kv_deviation"), hfblend.MemoryStore()
    own = hfblend.blend(model, PROMPT, store=store, config=settings)
    chosen = own.trace.selected_idx
    count = len(chosen) / len(own.trace.candidate_idx)
    given = config(count, selection=_Given(settings, chosen))
    again = hfblend.blend(model, PROMPT, store=store, config=given)
    assert torch.equal(again.trace.selected_idx, chosen)
    assert torch.equal(again.logits, own.logits)
    assert again.trace.computed_pairs == own.trace.computed_pairs


def test_answers_end_where_the_model_ends_them():
    model = make_llama()
    ids = model.generate(PROMPT.input_ids, max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()
    end = next(i for i in range(1, 8) if ids[i] not in ids[:i])
    model.generation_config.eos_token_id = ids[end]
    found = blame_prompt(model, PROMPT, config=NOTHING, num_tokens=8)
    assert found.full_answer_ids == ids[: end + 1]
    assert len(found.token_kl) == end + 1


def test_an_answer_that_is_full_prefills_needs_nothing():
    model = shared()
    found = blame_prompt(model, PROMPT, store=store_of_true_kv(model, PROMPT), config=config(0.3), num_tokens=6)
    assert found.first_difference is None
    assert found.restores
    assert found.smallest_ratio == 0.3
    assert found.ratios == []
    assert found.fewest is None
    assert str(found).startswith("The blended answer is full prefill's; mean KL")


def test_everything_recomputed_leaves_nothing_to_try():
    found = blame_prompt(shared(), PROMPT, config=config(1.0), num_tokens=4)
    assert (found.chunks, found.ratios, found.stretches) == ([], [], [])
    assert "No token was reused" in str(found)


def test_time_and_progress():
    model, said = shared(), []
    found = blame_prompt(model, PROMPT, config=NOTHING, num_tokens=4, seconds=0, progress=said.append)
    assert found.num_blends == 2  # the chunks were stored, and the answer itself
    assert not found.is_complete
    assert "when the time was up" in str(found)
    assert len(said) == 1
    assert said[0].startswith("as it is: KL")

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blame_prompt(model, PROMPT, config=NOTHING, num_tokens=4, progress=stop)
    with pytest.raises(ValueError, match="seconds"):
        blame_prompt(model, PROMPT, seconds=-1)
    with pytest.raises(TypeError, match="progress must be a function"):
        blame_prompt(model, PROMPT, progress=True)


def test_the_blender_blames_with_its_store_settings_and_tokenizer(word_tokenizer):
    model = make_llama()
    with hfblend.patch(model, NOTHING, word_tokenizer, poisoned(model, 2)) as blender:
        found = blender.blame(PROMPT, num_tokens=6)
        assert found.chunks[0].part == "chunk 2"
        assert blender.trace.fallback is None  # of the user's calls, not of the search
    full, blended = found.words()
    place = found.first_different_word()
    assert full[:place] == blended[:place]
    assert full[place] != blended[place]
    assert f"part at word {place + 1}: full prefill {full[place].strip()!r}" in str(found)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["fewest"]["part"] == "chunk 2"
    assert plain["trace"]["num_tokens"] == len(PROMPT)
