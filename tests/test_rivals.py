"""Each rival recomputes what its source says, on hand-made evidence and on a tiny model."""

from __future__ import annotations

import copy
import inspect
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import config, full_prefill_kv, make_llama, make_prompt, shared, store_of_true_kv

import hfblend
from hfblend.blend.algorithm import Blend
from hfblend.blend.correction import Errors
from hfblend.blend.selection import Evidence, highest
from hfblend.generate.blending import Blending
from hfblend.kv.rows import full_length_cache
from hfblend.lab import probes, rivals, texts
from hfblend.lab.baselines import METHODS
from hfblend.support.registry import model_of

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt(sizes=(20, 31, 13, 25))
RIVALS = {name: method for name, method in METHODS.items() if method.source}


def run(name, ratio=0.25, prompt=PROMPT, store=None, model=None, **more):
    store = hfblend.MemoryStore() if store is None else store
    return METHODS[name].blend(model or shared(), prompt, ratio, store, **more)


def evidence(spans, kv=None, attention=None, layers=6):
    candidates = torch.cat([torch.arange(*span) for span in spans])
    return Evidence(candidates, spans, 1, layers, config(), kv, attention)


def changed_values(store, trace, places=slice(None)):
    """The store with other values in each moved chunk, at some of its places; keys stay."""
    other, generator = hfblend.MemoryStore(), torch.Generator().manual_seed(3)
    for chunk in trace.chunks:
        entry = store.open(chunk.key)
        layers = []
        for keys, values in (entry.layer(i) for i in range(entry.num_layers)):
            new = values.clone()
            noise = torch.randn(values.shape, generator=generator)
            at = places(chunk) if callable(places) else places
            new[:, :, at] += noise[:, :, at]
            layers.append((keys, values if chunk.exact else new))
        other.put(chunk.key, replace(entry, cache=full_length_cache(layers)))
    return other


def blend_at(stop, name, prompt=PROMPT, store=None):
    method, tested = METHODS[name], model_of(shared())
    store = hfblend.MemoryStore() if store is None else store
    settings = method.config(0.25)
    state = Blending(tested, prompt.input_ids, prompt.chunk_spans, store, settings, algorithm=method.algorithm)
    with torch.no_grad():
        return state.stopped_at(stop, tested.last_logits)


# --- what tables say of them ------------------------------------------------------------------------------------------


def test_each_names_its_source_and_the_unfinished_ones_say_so():
    assert len(RIVALS) == 9
    for name, method in RIVALS.items():
        document = texts.after_dummies.__doc__ if name in ("link0", "psr") else method.algorithm.__doc__
        assert method.source in document, name
        assert "Left out" in document or "Built is" in document, name
        assert ("ot reproduced" in document) >= (not method.reproduced), name


def test_the_documentation_has_a_row_for_each_with_its_source():
    page = (Path(__file__).parent.parent / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page.split("### Rivals")[1].split("###")[0], re.MULTILINE))
    del rows["hfblend"]  # the default's row, to compare with
    assert {name: row.split(" | ")[1] for name, row in rows.items()} == {n: m.source for n, m in RIVALS.items()}
    assert {name for name, row in rows.items() if "not reproduced" in row} == {
        name for name, method in RIVALS.items() if not method.reproduced
    }


# --- rules on hand-made evidence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [(range, 4, (0, 1, 2, 3)), (rivals.last, 12, (11,)), (rivals.last_two, 12, (10, 11)), (rivals.last_two, 1, (0,))],
)
def test_attention_is_read_at_the_layers_that_the_rule_names(layers, depth, expected):
    asked = []

    def attention(wanted):
        asked.append(wanted)
        return torch.tensor([[[1.0, 0.0, 4.0], [3.0, 0.0, 0.0]]] * len(wanted))  # (layers, H, N)

    scores = rivals.by_attention_at(layers)(evidence([(2, 5)], attention=attention, layers=depth))
    assert (asked, scores.tolist()) == ([expected], [2.0, 0.0, 2.0])


def test_middle_layers_meet_the_profiles_of_the_four_models_and_fit_every_depth():
    profiles = {32: [(14, 13, 17), (16, 19, 15)], 36: [(20, 21, 18)], 40: [(24, 26, 21)]}
    for depth, known in profiles.items():
        assert all(set(rivals.middle_three(depth)) & set(profile) for profile in known)
    for depth in range(3, 100):
        layers = rivals.middle_three(depth)
        assert len(layers) == 3
        assert layers.start >= 0
        assert layers.stop <= depth


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_a_share_of_each_chunk_is_the_best_of_each_chunk(ratio):
    sizes = (40, 7, 100, 1)
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    one = evidence([(stop - size, stop) for size, stop in zip(sizes, stops)])
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0)) + 100 * (one.candidate_idx < 40)
    chosen = highest(rivals.share_of_chunk(scores, one), math.ceil(ratio * sum(sizes)))
    for start, stop in one.spans:
        inside = chosen[(chosen >= start) & (chosen < stop)]
        assert abs(len(inside) - ratio * (stop - start)) <= 1
        best = scores[start:stop].topk(len(inside)).indices + start
        assert set(inside.tolist()) == set(best.tolist())


def test_divergence_takes_keys_and_values_of_each_chunk():
    """In the second chunk all deviate more than any token of the first, and still the first has its probes."""
    keys, values = torch.zeros(1, 2, 20, 4), torch.zeros(1, 2, 20, 4)
    keys[:, :, [3, 15]], values[:, :, [7, 12]] = 0.5, 0.01
    keys[:, :, 10:] += 100.0
    zeros = torch.zeros_like(keys)
    one = evidence([(0, 10), (10, 20)], kv=lambda layer: ((keys, values), (zeros, zeros)))
    assert highest(rivals.by_divergence(one), 4).tolist() == [3, 7, 12, 15]


def by_low_frequencies_written_out(layers, spans):
    """Discrete cosine and sine sums, in fp64: no FFT."""
    total = []
    for start, stop in spans:
        n, scores = stop - start, 0
        for kv in layers:
            norms = 0
            for states in kv:
                x = states[0, :, start:stop].double()
                low = torch.zeros_like(x)
                for k in range((n // 2 + 1) // 2):
                    angle = 2 * math.pi * k * torch.arange(n, dtype=torch.float64) / n
                    for wave in (angle.cos(), angle.sin()):
                        weight = (1 if k == 0 else 2) / n
                        low += weight * wave[:, None] * (x * wave[:, None]).sum(1, keepdim=True)
                norms = norms + low.square().sum((0, 2)).sqrt()
            scores = scores + norms / norms.sum()
        total.append(scores)
    return torch.cat(total)


@pytest.mark.parametrize("sizes", [(16, 9), (31, 2), (5, 24)])
def test_low_frequencies_are_a_sum_of_slow_waves(sizes):
    generator = torch.Generator().manual_seed(sum(sizes))
    spans = [(0, sizes[0]), (sizes[0], sum(sizes))]
    layers = [[torch.randn(1, 2, sum(sizes), 8, generator=generator) for _ in range(2)] for _ in range(3)]
    one = evidence(spans, kv=lambda layer: (None, layers[layer]), layers=3)
    expected = rivals.share_of_chunk(by_low_frequencies_written_out(layers, spans).float(), one)
    assert torch.equal(rivals.by_low_frequencies(one), expected)


def test_what_alternates_from_token_to_token_is_no_low_frequency():
    """A bump that is slow is found among larger numbers that change sign at every token."""
    n = 64
    states = 50.0 * torch.tensor([1.0, -1.0]).repeat(n // 2)[None, None, :, None].expand(1, 2, n, 4).clone()
    states[:, :, 20:30] += 1.0
    one = evidence([(0, n)], kv=lambda layer: (None, (states, states)))
    assert set(highest(rivals.by_low_frequencies(one), 6).tolist()) <= set(range(19, 31))


# --- how the suffix's attention is read -------------------------------------------------------------------------------


def test_one_row_that_looks_hard_outweighs_many_that_glance_in_infoflow():
    weights = torch.zeros(2, 4, 2)  # (H, S, T)
    weights[:, 0, 0], weights[:, :, 1] = 0.6, 0.2
    assert weights.mean((0, 1)).argmax() == 1
    assert probes.InfoFlowKV.over_rows(None, weights).argmax() == 0


def test_a_row_that_looks_at_the_question_itself_counts_as_much_as_others_in_prophetkv():
    weights = torch.tensor([[[0.5, 0.4, 0.1, 0.0], [0.0, 0.02, 0.0, 0.98]]])  # the context is the first two
    prompt = SimpleNamespace(look_up=SimpleNamespace(spans=[(0, 2)]))
    assert weights.mean(1)[0, :2].argmax() == 0
    read = probes.ProphetKV.over_rows(prompt, weights)[0, :2]
    assert read.argmax() == 1
    assert read.sum().item() == pytest.approx(1)


def stock_weights(model, prompt):
    """Per layer (H, S, T), of the suffix's rows, from Transformers' own eager attention."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    start = prompt.chunk_spans[-1][1]
    return [weights[0, :, start:] for weights in eager(prompt.input_ids, output_attentions=True).attentions]


@pytest.mark.parametrize("name", ["prophetkv", "infoflow_kv"])
def test_over_true_kv_scores_are_the_formula_on_stock_weights(name):
    prompt, model = make_prompt(separator=()), shared()
    trace = run(name, prompt=prompt, store=store_of_true_kv(model, prompt)).trace
    weights, stop = stock_weights(model, prompt), prompt.chunk_spans[-1][1]
    if name == "prophetkv":
        expected = torch.stack([(w / w[..., :stop].sum(-1, keepdim=True)).mean((0, 1)) for w in weights]).mean(0)
    else:
        expected = torch.stack([w.mean(0).square().sum(0).sqrt() for w in weights[-2:]]).mean(0)
    assert torch.allclose(trace.scores, expected[trace.candidate_idx], atol=1e-5)


@pytest.mark.parametrize("name", ["prophetkv", "infoflow_kv", "qcfuse", "fusionrag"])
def test_what_the_suffix_did_not_see_is_reused_and_not_lost(name):
    """Rows hidden from the suffix are back when the rest is recomputed."""
    store = hfblend.MemoryStore()
    result = run(name, store=store)
    trace, kept = result.trace, run(name, ratio=0.0, store=store).cache
    unselected = trace.candidate_idx[~torch.isin(trace.candidate_idx, trace.selected_idx)]
    assert trace.selected_tokens == math.ceil(0.25 * len(trace.candidate_idx))
    for layer, reused in zip(result.cache.layers, kept.layers):
        assert torch.equal(layer.values[:, :, unselected], reused.values[:, :, unselected])
        assert layer.values[:, :, unselected].abs().sum(-1).min() > 0


@pytest.mark.parametrize(("name", "notices"), [("prophetkv", True), ("infoflow_kv", True), ("fusionrag", False)])
def test_queries_of_fusionrag_know_nothing_of_the_chunks(name, notices):
    """Other values in the chunks change queries that saw them; keys, which are what is looked at, stay."""
    method, store = replace(METHODS[name], chunk_after=None), hfblend.MemoryStore()
    trace = method.blend(shared(), PROMPT, 0.25, store).trace
    again = method.blend(shared(), PROMPT, 0.25, changed_values(store, trace)).trace
    assert torch.allclose(trace.scores, again.scores, atol=1e-6) is not notices
    assert trace.scores.std() > 0


@pytest.mark.parametrize("in_anchors", [True, False])
def test_queries_of_qcfuse_know_the_anchors_alone(in_anchors):
    store = hfblend.MemoryStore()
    trace = run("qcfuse", store=store).trace
    unseen = blend_at("realigned", "qcfuse", store=store).unseen()

    def places(chunk):
        start, stop = chunk.span
        inside = torch.arange(start, stop)
        return inside[torch.isin(inside, unseen) != in_anchors] - start

    other = changed_values(store, trace, places)
    for chunk in trace.chunks:  # the same anchors, though the entries are new
        probes._anchors_of[other.open(chunk.key)] = probes._anchors_of.get(store.open(chunk.key), torch.empty(0))
    again = run("qcfuse", store=other).trace
    assert torch.allclose(trace.scores, again.scores, atol=1e-6) is not in_anchors


@torch.no_grad()
def test_anchors_are_four_first_tokens_and_what_a_second_copy_looks_at_most():
    blend = blend_at("realigned", "qcfuse")
    eager = copy.deepcopy(shared())
    eager.set_attn_implementation("eager")
    for size in (3, 9, 60, 95):
        ids = torch.randint(7, 97, (size,), generator=torch.Generator().manual_seed(size))
        weights = eager(ids.repeat(2)[None], output_attentions=True).attentions
        scores = torch.stack([w[0, :, size:, :size].amax((0, 1)) for w in weights]).mean(0)
        scores[:4] = torch.arange(9.0, 1.0, -2.0)[:size]  # first, in order
        expected = scores.topk(math.ceil(size / 10)).indices.sort().values
        assert torch.equal(probes.anchors_of(blend, ids), expected)


@torch.no_grad()
def test_anchors_are_a_tenth_of_each_moved_chunk():
    blend = blend_at("realigned", "qcfuse")
    seen = blend.reuse.candidate_idx[~torch.isin(blend.reuse.candidate_idx, blend.unseen())]
    for piece in blend.reuse.moved:
        start, stop = piece.span
        assert ((seen >= start) & (seen < stop)).sum() == math.ceil((stop - start) / 10)


def test_row_by_row_reading_is_refused_where_a_kernel_keeps_the_mean(monkeypatch):
    monkeypatch.setattr(probes, "has_kernels", lambda device: True)
    run("prophetkv")  # float32 does not run there
    with pytest.raises(ValueError, match=r"ProphetKV reads attention row by row; .* torch\.bfloat16 .* torch\.float32"):
        run("prophetkv", model=make_llama(dtype=torch.bfloat16))


# --- other algorithms -------------------------------------------------------------------------------------------------


def test_targets_of_relaxkv_see_each_other_and_what_is_exact_or_new():
    """Their K/V are those of a stock forward over these tokens alone, at their positions."""
    result = run("relaxkv")
    trace, suffix_start = result.trace, PROMPT.chunk_spans[-1][1]
    hidden = trace.candidate_idx[~torch.isin(trace.candidate_idx, trace.selected_idx)]
    seen = torch.arange(suffix_start)
    seen = seen[~torch.isin(seen, hidden)]
    cache = shared()(
        PROMPT.input_ids[:, seen], position_ids=seen[None], attention_mask=torch.ones(1, len(seen)), use_cache=True
    ).past_key_values
    places = torch.searchsorted(seen, trace.selected_idx)
    for blended, stock in zip(result.cache.layers, cache.layers):
        assert torch.allclose(blended.values[:, :, trace.selected_idx], stock.values[:, :, places], atol=1e-5)
    full = full_prefill_kv(shared(), PROMPT.input_ids)[3][1]
    assert not torch.allclose(result.cache.layers[3].values[:, :, trace.selected_idx], full[:, :, trace.selected_idx])


def test_relaxkv_at_ratio_1_is_a_full_prefill_and_at_0_full_reuse():
    stock = shared()(PROMPT.input_ids).logits[:, -1]
    assert torch.allclose(run("relaxkv", 1.0).logits, stock, atol=1e-4)
    assert torch.allclose(run("relaxkv", 0.0).logits, run("full_reuse").logits, atol=1e-5)


def test_cachetune_ranks_the_same_whatever_is_asked_and_runs_nothing_before():
    other = hfblend.Prompt(PROMPT.input_ids.clone(), PROMPT.chunk_spans)
    other.input_ids[0, -8:-1] = torch.tensor([9, 17, 33, 21, 60, 11, 50])
    one, again = run("cachetune").trace, run("cachetune", prompt=other).trace
    assert torch.equal(one.scores, again.scores)
    assert not torch.equal(run("prophetkv").trace.scores, run("prophetkv", prompt=other).trace.scores)
    assert one.computed_pairs == 4 * (one.selected_tokens + len(one.fresh_idx))
    for start, stop in PROMPT.chunk_spans[1:]:
        inside = (one.selected_idx >= start) & (one.selected_idx < stop)
        assert abs(inside.sum() - 0.25 * (stop - start)) <= 1


@pytest.mark.parametrize("rope", ["default", "llama3", "yarn"])
def test_keys_of_cachetune_are_those_before_the_rotation(rope):
    model = make_llama(rope)
    tested, method = model_of(model), METHODS["cachetune"]
    settings = replace(method.config(0.2), chunk_prefix="prompt")
    state = Blending(
        tested, PROMPT.input_ids, PROMPT.chunk_spans, hfblend.MemoryStore(), settings, algorithm=method.algorithm
    )
    with torch.no_grad():
        blend = state.stopped_at("realigned", tested.last_logits)
        layer, idx = model.model.layers[0], blend.reuse.candidate_idx
        before = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(PROMPT.input_ids[:, idx])))
        keys = blend.stored(0)[1][0]
    scaling = getattr(model.model.rotary_emb, "attention_scaling", 1.0)
    assert torch.allclose(keys, scaling * before.view(1, len(idx), -1, 16).transpose(1, 2), atol=1e-5)


def test_agentkvshift_takes_the_same_share_of_every_chunk():
    trace = run("agentkvshift", 0.3).trace
    for start, stop in PROMPT.chunk_spans[1:]:
        inside = (trace.selected_idx >= start) & (trace.selected_idx < stop)
        assert abs(inside.sum() - 0.3 * (stop - start)) <= 2
    by_deviation = run("kv_deviation", 0.3).trace
    assert trace.computed_pairs == by_deviation.computed_pairs


def test_agentkvshift_moves_other_rows_by_the_mean_error_of_their_chunks_probes():
    """Layer 2 is the first that is corrected, and its probes' K/V do not depend on corrections."""
    model, store = make_llama(), hfblend.MemoryStore()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(0.1)  # distances around 1
    shifted = run("agentkvshift", 0.3, store=store, model=model)
    plain = hfblend.blend(model, PROMPT, store=store, config=METHODS["agentkvshift"].config(0.3))
    assert torch.equal(shifted.trace.selected_idx, plain.trace.selected_idx)
    reused = run("full_reuse", store=store, model=model).cache
    true = full_prefill_kv(model, PROMPT.input_ids)[1]
    chosen = shifted.trace.selected_idx
    for start, stop in PROMPT.chunk_spans[1:]:
        inside = torch.arange(start, stop)
        probes_, rest = inside[torch.isin(inside, chosen)], inside[~torch.isin(inside, chosen)]
        distance = (true[1][0, :, rest] - reused.layers[1].values[0, :, rest]).square().sum((0, 2)).sqrt()
        errors = plain.cache.layers[2].values[0, :, probes_] - reused.layers[2].values[0, :, probes_]
        assert distance.min() < 0.9
        added = distance.clamp(max=1)[:, None] * errors.mean(1, keepdim=True)
        expected = reused.layers[2].values[0, :, rest] + added
        assert torch.allclose(shifted.cache.layers[2].values[0, :, rest], expected, atol=1e-5)
        assert not torch.allclose(
            shifted.cache.layers[2].keys[0, :, rest], reused.layers[2].keys[0, :, rest], atol=1e-3
        )


def test_the_shift_of_a_row_is_its_chunks_mean_and_no_more_than_that():
    shift = rivals.ProbeShift()
    shift.weights = [
        torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0, 0.0]),
        torch.ones(6),
    ]  # a seventh token is the prompt's last
    known = torch.tensor([[[1.0], [3.0], [10.0]]])  # (Hkv, S, D)
    pieces = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    errors = Errors(known, 0, torch.tensor([0, 2, 4]), pieces, torch.tensor([0, 1, 2, 3, 0, 1, 2]), 2, 4)
    assert shift(errors)[0, :, 0].tolist() == [2.0, 1.0, 2.0, 2.0, 10.0, 0.0, 10.0]
    assert shift(replace(errors, slot=1))[0, :, 0].tolist() == [2.0, 2.0, 2.0, 2.0, 10.0, 10.0, 10.0]


# --- texts before a chunk ---------------------------------------------------------------------------------------------


def around(own, corpus, limit=None, prompt=PROMPT):
    chunks = hfblend.Prompt.from_ids([1, 2], [own], [3], ())
    return texts.Around(own, chunks, (), corpus, SimpleNamespace(max_position_embeddings=limit))


def test_neighbours_are_the_texts_that_share_rare_ids():
    own = list(range(100, 140))
    common = list(range(10, 30))
    related = [[*common, *range(100, 100 + count)] for count in (5, 20, 12)]
    strangers = [[*common, *range(1000 + 50 * i, 1020 + 50 * i)] for i in range(20)]
    found = texts.after_neighbours(around(own + common, [*strangers, *related]))
    order = [related[1], related[2], related[0]]
    assert list(found[: 2 + sum(map(len, order))]) == [1, 2, *order[0], *order[1], *order[2]]
    assert len(found) == 2 + sum(map(len, order)) + 7 * 40  # ten in all


def test_a_chunk_is_no_neighbour_of_its_own_and_neighbours_leave_room():
    own, other = list(range(100, 140)), list(range(120, 180))
    again = [7, *own[:-1]]  # the passage as the data has it, joined otherwise
    assert list(texts.after_neighbours(around(own, [own, again, other]))) == [1, 2, *other]
    assert list(texts.after_neighbours(around(own, [other], limit=30))) == [1, 2, *other[:15]]
    assert texts.after_neighbours(around(own, [])) == (1, 2)


def test_fusionrag_computes_chunks_after_neighbours_and_recomputes_the_rest_over_them():
    store, corpus = hfblend.MemoryStore(), [[*ids[:5], 90, 91] for ids in PROMPT.chunk_ids]
    trace = run("fusionrag", store=store, corpus=corpus).trace
    for chunk, ids in zip(trace.chunks, PROMPT.chunk_ids):
        entry = store.open(chunk.key)
        expected = texts.after_neighbours(texts.Around(ids, PROMPT, (), corpus, shared().config))
        assert entry.behind_ids == tuple(expected)
        assert len(expected) > len(PROMPT.prefix_ids) + 20
    assert run("fusionrag", store=store, corpus=corpus).trace.hits == 4


def test_link0_and_psr_start_after_four_bos_and_psr_recomputes_by_keys():
    store = hfblend.MemoryStore()
    trace = run("link0", store=store).trace
    assert trace.selected_tokens == 0
    assert {tuple(store.open(chunk.key).behind_ids) for chunk in trace.chunks} == {(1, 1, 1, 1)}
    psr = run("psr", store=store).trace
    assert psr.hits == 4  # the same chunk KV
    assert (psr.selected_tokens, METHODS["psr"].config(0.2).deviation) == (math.ceil(0.25 * 89), "key")
    without = SimpleNamespace(bos_token_id=None)
    with pytest.raises(ValueError, match="no bos_token_id"):
        texts.after_dummies(replace(around([8, 9], []), config=without))


def test_the_core_knows_no_rival():
    own = {name for _, method in RIVALS.items() for name in vars(method.algorithm) if method.algorithm is not Blend}
    hooks = {name for name in own if not name.startswith("__") and hasattr(Blend, name)}
    assert hooks <= {"find", "rows_pass", "evidence_at", "recompute"}
    assert "rival" not in inspect.getsource(Blend).lower()
