"""Rows that stay reused are corrected by those that are recomputed: the estimate, its invariants, where it applies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from helpers import (
    MODELS,
    ROPE,
    config,
    full_prefill_kv,
    generate,
    largest_difference,
    make_llama,
    make_prompt,
    moved_kv,
    shared,
    store_of_true_kv,
)

import hfblend
from hfblend.blend.correction import BLOCK, Errors, offset
from hfblend.generate.blending import Blending
from hfblend.kv.rows import full_length_cache
from hfblend.store import MemoryStore, chunk_key
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt(sizes=(40, 64, 36))
OFFSET = {"correction": "offset"}
# partial, interleaved and interleaved partial rotation; latent attention; layers without rotation; windows; shared K/V
KINDS = ("gpt_neox", "cohere", "glm", "deepseek_v3", "smollm3", "gemma3_text", "gemma3n_text", "phi3", "qwen3")


def some_errors(sizes, share, seed=0, heads=2, dim=8) -> Errors:
    """Noise, for pieces of these sizes, of which a share is recomputed."""
    generator = torch.Generator().manual_seed(seed)
    piece, place = (torch.tensor(t) for t in zip(*((p, i) for p, size in enumerate(sizes) for i in range(size))))
    known_idx = torch.randperm(len(piece), generator=generator)[: max(2, round(share * len(piece)))].sort().values
    noise = torch.randn(heads, len(known_idx), dim, generator=generator)
    return Errors(noise, 0, known_idx, piece, place, len(sizes), max(sizes))


def plainly(errors: Errors) -> torch.Tensor:
    """The same estimate, token by token and in fp64."""
    known, idx = errors.known.double(), errors.known_idx
    count = known.shape[1]

    def predictors(token, without=None):
        others = [j for j in range(count) if j != without]
        same_piece = [j for j in others if errors.piece[idx[j]] == errors.piece[token]]
        same_block = [j for j in same_piece if errors.place[idx[j]] // BLOCK == errors.place[token] // BLOCK]
        shrunk = [known[:, group].sum(1) / (len(group) + 1) for group in (same_piece, same_block)]
        return torch.stack([known[:, others].mean(1), *shrunk], -1)  # (Hkv, D, 3)

    left_out = [predictors(token, j) for j, token in enumerate(idx)]
    features, targets = torch.stack(left_out, 1).flatten(1, 2), known.flatten(1)
    gram = features.mT @ features
    held = (0.01 + 10 / count) * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    weights = torch.linalg.solve(gram + held[:, None, None] * torch.eye(3), features.mT @ targets[..., None])
    return torch.stack([(predictors(token) @ weights)[..., 0] for token in range(len(errors.piece))], 1)


# --- the estimate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5,), (70, 3, 40), (1, 1, 90), (33, 32, 31)])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_estimate_is_the_one_that_is_written_down(sizes, share):
    errors = some_errors(sizes, share, seed=sum(sizes))
    assert torch.allclose(offset(errors).double(), plainly(errors), atol=1e-5)


def test_one_offset_a_piece_is_found_where_errors_agree():
    errors = some_errors((200, 150, 100), 0.3)
    offsets = torch.randn(2, 3, 8)
    errors = replace(errors, known=offsets[:, errors.piece[errors.known_idx]] + 0.05 * errors.known)
    truth = offsets[:, errors.piece]
    assert (offset(errors) - truth).norm() < 0.15 * truth.norm()


def test_noise_corrects_nothing():
    errors = some_errors((200, 150, 100), 0.3)
    added = offset(errors)
    assert added.square().mean() < 0.02 * errors.known.square().mean()


@pytest.mark.parametrize("heads", [1, 3])
def test_each_head_has_its_own_trust(heads):
    """One head's errors agree, the other's are noise; each is corrected as if it were alone."""
    agreed = some_errors((100, 60), 0.3, heads=heads)
    agreed = replace(agreed, known=agreed.known * 0.01 + 1)
    noise = some_errors((100, 60), 0.3, heads=heads)
    both = replace(noise, known=torch.cat([agreed.known, noise.known]))
    assert torch.allclose(offset(both), torch.cat([offset(agreed), offset(noise)]), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_one_known_error_says_nothing(count):
    errors = some_errors((3, 40), 0.4)
    errors = replace(errors, known=errors.known[:, :count], known_idx=errors.known_idx[:count])
    assert offset(errors).shape == (2, 43, 8)
    assert offset(errors).abs().sum() == 0


def test_errors_of_zero_correct_by_zero():
    errors = some_errors((60, 60), 0.4)
    assert offset(replace(errors, known=torch.zeros_like(errors.known))).abs().sum() == 0


# --- in a blend ---------------------------------------------------------------------------------------------------


def shifted_store(model, size=0.2):
    """True KV of the prompt's chunks, each with a separate offset in values and in keys before their rotation."""
    hf_model, store = model_of(model), store_of_true_kv(model, PROMPT)
    generator = torch.Generator().manual_seed(3)
    for start, stop in PROMPT.chunk_spans:
        ids = PROMPT.ids[start:stop]
        key = chunk_key(hf_model.fingerprint.current(hf_model.model), hf_model.dtype, ids, tuple(PROMPT.prefix_ids))
        entry = store.open(key)
        kv = {i: entry.layer(i) for i in sorted(hf_model.layouts)}
        added = {
            i: tuple(
                (size * states.std() * torch.randn(1, states.shape[1], 1, states.shape[3], generator=generator))
                .expand_as(states)
                .contiguous()
                for states in own
            )
            for i, own in kv.items()
        }
        at = entry.cached_positions
        turned = moved_kv(hf_model, added, (torch.zeros_like(at), at, entry.regime), entry.regime)
        layers = [tuple(s + t for s, t in zip(kv[i], turned[i])) for i in kv]
        store.put(key, hfblend.ChunkKV(full_length_cache(layers), at, entry.behind_ids, "isolated", entry.regime))
    return store


def blended_kv(model, store, **settings):
    """Blended K/V (Hkv, T, D) by layer and slot, and the trace; without a correction unless one is asked for."""
    hf_model = model_of(model)
    with torch.no_grad():
        settings = {"correction": None, **settings}
        state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(**settings))
        state.run(hf_model.last_logits)
    return {i: tuple(t[0, :, : len(PROMPT)] for t in kv) for i, kv in state.buffers.items()}, state.trace


def error_of(kv, truth, idx):
    """Error of some rows of a layer."""
    return sum((a[:, idx] - b[0][:, idx]).square().sum() for a, b in zip(kv, truth)).sqrt().item()


def assert_offsets_are_mended(model):
    truth = full_prefill_kv(model, PROMPT.input_ids)
    settings = {"ratio": 0.3, "selection": "random"}  # under a window, the suffix attends to the last chunk only
    kv, trace = blended_kv(model, shifted_store(model), **settings, **OFFSET)
    stale, _ = blended_kv(model, shifted_store(model), **settings)
    rest = trace.candidate_idx[~torch.isin(trace.candidate_idx, trace.selected_idx)]
    assert len(rest) > 40
    left = [error_of(kv[i], truth[i], rest) / error_of(stale[i], truth[i], rest) for i in truth]
    assert left[0] < 0.25  # fresh rows of the first layer are the truth
    assert max(left) < 0.8  # others see what is left of the error in the layers before


@pytest.mark.parametrize("name", MODELS)
def test_an_offset_of_each_chunk_is_mended(name):
    assert_offsets_are_mended(shared(MODELS[name]))


@pytest.mark.parametrize("rope", sorted(ROPE))
def test_keys_are_corrected_under_their_rotation(rope):
    assert_offsets_are_mended(shared(make_llama, rope=rope))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_corrected(name):
    assert_offsets_are_mended(FAMILIES[name].make())


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
def test_true_kv_moved_stays_exact(ratio, selection):
    model = shared()
    stock = generate(model, {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)})
    settings = config(ratio, selection=selection, **OFFSET)
    with hfblend.patch(model, config=settings, store=store_of_true_kv(model, PROMPT)) as blender:
        blended = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        assert torch.equal(blended.sequences, stock.sequences)
        assert largest_difference(blended, stock) <= 3e-4


def test_ratio_1_is_full_prefill():
    model = shared()
    stock = generate(model, {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)})
    with hfblend.patch(model, config=config(1.0, **OFFSET)) as blender:
        for _ in range(2):
            assert largest_difference(generate(model, PROMPT.inputs()), stock) <= 2e-4
            assert blender.trace.blended


@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"check_layers": (), "recompute_ratios": ()}])
def test_nothing_selected_corrects_nothing(settings):
    model, store = shared(), MemoryStore()
    blended_kv(model, store, **settings)
    one, other = (blended_kv(model, store, **settings, **more)[0] for more in ({}, OFFSET))
    assert all(torch.equal(a, b) for i in one for a, b in zip(one[i], other[i]))


def test_exact_pieces_are_never_corrected():
    """The prefix, and the first chunk, which stands where it was computed."""
    model, store = shared(), MemoryStore()
    blended_kv(model, store)
    (one, trace), (other, _) = (blended_kv(model, store, **more) for more in ({}, OFFSET))
    exact = [chunk for chunk in trace.chunks if chunk.exact]
    assert exact
    rows = torch.cat([torch.arange(len(PROMPT.prefix_ids)), *(torch.arange(*chunk.span) for chunk in exact)])
    assert all(torch.equal(a[:, rows], b[:, rows]) for i in one for a, b in zip(one[i], other[i]))
    assert any(not torch.equal(a, b) for i in one for a, b in zip(one[i], other[i]))


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.3},
        {"ratio": 0.3, "selection": "kv_deviation", "check_layers": (2,)},
        {"ratio": 0.3, "selection": "mixed"},
        {"selection": "kv_deviation", "check_layers": (1, 2, 3), "recompute_ratios": (0.6, 0.4, 0.2)},
    ],
)
def test_every_layer_with_stale_rows_is_corrected_once(settings):
    """Also where a pass is cut in the last layer, or goes on where another ended."""
    seen, slots = [], []

    def watch(errors):
        seen.append(errors.known.shape)
        slots.append(errors.slot)
        return offset(errors)

    model, store = shared(), MemoryStore()
    blended_kv(model, store, **settings)
    _, trace = blended_kv(model, store, **settings, correction=watch)
    first = 0 if settings.get("selection") is None else settings.get("check_layers", (1,))[0] + 1
    assert slots == [0, 1] * (4 - first)
    moved = sum(stop - start for start, stop in (chunk.span for chunk in trace.chunks if not chunk.exact))
    assert all(0 < shape[1] < moved for shape in seen)


def test_cold_is_warm_and_a_batch_is_its_rows():
    model = shared()
    prompts = [PROMPT, make_prompt(sizes=(64, 36, 50), seed=2)]
    with hfblend.patch(model, config=config(0.2, **OFFSET)) as blender:
        cold, warm = (generate(model, PROMPT.inputs()) for _ in range(2))
        assert largest_difference(cold, warm) == 0
        alone = [generate(model, prompt.inputs()) for prompt in prompts]
        together = generate(model, hfblend.Prompt.batch(prompts, pad_token_id=0))
        assert all(trace.blended for trace in blender.traces)
    for i, one in enumerate(alone):
        assert torch.equal(together.sequences[i, -8:], one.sequences[0, -8:])


# --- a function of one's own --------------------------------------------------------------------------------------


def test_a_correction_by_zero_is_none():
    model, store = shared(), MemoryStore()

    def nothing(errors):
        return errors.known.new_zeros(errors.known.shape[0], len(errors.piece), errors.known.shape[2])

    blended_kv(model, store)
    one, other = (blended_kv(model, store, correction=correction)[0] for correction in (None, nothing))
    assert all(torch.equal(a, b) for i in one for a, b in zip(one[i], other[i]))


@pytest.mark.parametrize(
    "result", [lambda errors: errors.known, lambda errors: errors.known.tolist(), lambda errors: 0]
)
def test_a_result_of_another_shape_is_refused(result):
    with pytest.raises(ValueError, match="must return one vector per head and token of moved pieces"):
        blended_kv(shared(), MemoryStore(), correction=result)


@pytest.mark.parametrize("value", ["shift", 1, ()])
def test_another_name_is_refused(value):
    with pytest.raises((ValueError, TypeError), match=r"correction must be one of .*None, or a function"):
        hfblend.BlendConfig(correction=value)


@pytest.mark.parametrize(("text", "value"), [("offset", "offset"), ("none", None)])
def test_the_environment_sets_it(text, value):
    assert hfblend.BlendConfig.from_env({"HFBLEND_CORRECTION": text}).correction == value
