"""On a CUDA GPU: the same claims in bf16 and fp16, with stores in RAM, static and offloaded caches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    MODELS,
    config,
    damage,
    full_prefill_kv,
    generate,
    largest_difference,
    make_llama,
    make_prompt,
    store_of_true_kv,
)
from test_real_models import load_smollm
from test_self_test import PECULIAR, SOUND, WRONG_ROTATIONS, made_up
from test_turns import check, conversation

import hfblend
from hfblend.attention.by_position import QueryRows, attend
from hfblend.blend.correction import offset
from hfblend.gpu.correction import OffsetCorrector
from hfblend.kernels.reference import AttentionArgs, reference_attention
from hfblend.kv.rows import RowLayout, full_length_cache, rows_behind
from hfblend.model.hf_model import CACHE
from hfblend.store import DiskStore, loader
from hfblend.support.registry import TestedModel, model_of

pytestmark = pytest.mark.gpu

PROMPT = make_prompt(sizes=(200, 311, 133), prefix=37, suffix=21)


def on_gpu(name, dtype):
    return MODELS[name](dtype).to("cuda")


def stock_inputs():
    return {"input_ids": PROMPT.input_ids.cuda()}


@pytest.mark.parametrize("name", MODELS)
def test_true_kv_from_elsewhere_is_exact_in_fp32(name):
    model = on_gpu(name, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    stock = generate(model, stock_inputs())
    for ratio in (0.0, 0.15, 0.5):
        with hfblend.patch(model, config=config(ratio), store=store_of_true_kv(model, PROMPT)) as blender:
            blended = generate(model, PROMPT.inputs())  # ids on the CPU are moved
            assert blender.trace.hits == 3
            assert torch.equal(blended.sequences, stock.sequences)
            assert largest_difference(blended, stock) <= 1e-3


@pytest.fixture
def tf32():
    """A switch of TF32 in products."""
    before = torch.get_float32_matmul_precision()
    yield lambda is_on: torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.set_float32_matmul_precision(before)


def self_tested(model, dtype=torch.float32):
    hf_model = TestedModel(model.to("cuda", dtype))
    return hf_model.rotations, hf_model.windows, hf_model.attends_by_position, hf_model.layers_stand_alone


@pytest.mark.parametrize("name", SOUND)
def test_the_self_test_finds_the_same_in_every_precision(name, tf32):
    tf32(False)
    exact = self_tested(SOUND[name]())
    tf32(True)
    assert self_tested(SOUND[name]()) == exact
    for dtype in (torch.bfloat16, torch.float16):
        assert self_tested(SOUND[name](), dtype) == exact


@pytest.mark.smollm
def test_real_weights_pass_with_tf32_on_and_stay_exact(tf32):
    model, _ = load_smollm()
    found = []
    for is_on in (False, True):
        tf32(is_on)
        found.append(self_tested(model))
    assert found[0] == found[1]
    for dtype in (torch.bfloat16, torch.float16):
        assert self_tested(model, dtype) == found[0]


@pytest.mark.parametrize("peculiarity", PECULIAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peculiar_models_are_refused_with_tf32_on(peculiarity, dtype, tf32):
    tf32(True)
    with pytest.raises(hfblend.UnsupportedModel):
        self_tested(made_up(peculiarity), dtype)


@pytest.mark.parametrize("wrong", WRONG_ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wrong_rotation_is_refused_with_tf32_on(wrong, dtype, tf32, monkeypatch):
    tf32(True)
    WRONG_ROTATIONS[wrong](monkeypatch)
    with pytest.raises(hfblend.UnsupportedModel, match="no rotation from the model's"):
        self_tested(SOUND["qwen2"](), dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ratio_1_is_full_prefill_within_rounding(name, dtype):
    """First-token logits: blended and stock lie equally far from the fp32 truth of the same weights."""
    model = on_gpu(name, dtype)
    truth = generate(MODELS[name](dtype).float().to("cuda"), stock_inputs(), max_new_tokens=1)
    stock = generate(model, stock_inputs(), max_new_tokens=1)
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = generate(model, PROMPT.inputs(), max_new_tokens=1)
        assert blender.trace.computed_pairs == len(PROMPT) * 4
    error, own = (
        (run.logits[0].float() - truth.logits[0].float()).norm() / truth.logits[0].float().norm()
        for run in (blended, stock)
    )
    assert error <= max(2 * own, 0.01)


@pytest.mark.parametrize("name", MODELS)
def test_true_kv_from_elsewhere_in_bf16(name):
    model = on_gpu(name, torch.bfloat16)
    stock = generate(model, stock_inputs(), max_new_tokens=1)
    with hfblend.patch(model, config=config(0.15), store=store_of_true_kv(model, PROMPT)) as blender:
        blended = generate(model, PROMPT.inputs(), max_new_tokens=1)
        assert blender.trace.hits == 3
    difference = (blended.logits[0].float() - stock.logits[0].float()).norm()
    assert difference <= 0.06 * stock.logits[0].float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
def test_attend_equals_the_reference(dtype, window):
    positions = torch.arange(0, 777, 7, device="cuda")[None]
    shapes = ((8, positions.shape[1]), (2, 777), (2, 777))
    states = (torch.randn(1, h, n, 64, device="cuda", dtype=dtype) for h, n in shapes)
    args = AttentionArgs(*states, 0.125, window)
    out, expected = (
        attend(args, QueryRows(positions, args.length)).float(),
        reference_attention(args.float(), positions),
    )
    assert (out - expected).norm() <= (2e-3 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_a_store_in_ram_serves_a_model_on_the_gpu():
    model = on_gpu("llama-gqa", torch.bfloat16)
    with hfblend.patch(model, config=config(0.2), store=hfblend.MemoryStore(device="cpu")) as blender:
        cold, warm = (generate(model, PROMPT.inputs()) for _ in range(2))
        assert blender.trace.hits == 3
        assert next(iter(blender.store._entries.values())).layer(0)[0].device.type == "cpu"
        assert torch.equal(cold.sequences, warm.sequences)
        assert set(blender.trace.phase_ms) >= {"look_up", "select", "recompute", "hand_over"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
def test_rows_of_a_batch_equal_the_rows_run_alone(name, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    prompts = [PROMPT, make_prompt(sizes=(90, 400), prefix=37, suffix=60, seed=2), make_prompt((311,), seed=3)]
    model = on_gpu(name, dtype)
    with hfblend.patch(model, config=config(0.15)) as blender:
        for _ in range(2):  # the second time passes may be graphs
            alone = [(generate(model, prompt.inputs()), blender.trace) for prompt in prompts]
        batch = generate(model, hfblend.Prompt.batch(prompts, pad_token_id=0))
        traces = blender.traces
    for row, (output, trace) in enumerate(alone):
        assert trace.blended
        assert torch.equal(traces[row].selected_idx, trace.selected_idx)
        difference = (batch.logits[0][row].float() - output.logits[0][0].float()).norm()
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        assert difference <= tolerance * output.logits[0].float().norm()


# On a busy GPU, Transformers' offloaded static layers come back before they have left: stock differs from itself.
@pytest.mark.parametrize(("kind", "tokens"), [("static", 8), ("offloaded", 8), ("offloaded_static", 1)])
def test_other_caches(kind, tokens):
    model = on_gpu("llama-gqa", torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    how = {"cache_implementation": kind, "disable_compile": True, "max_new_tokens": tokens}
    stock = generate(model, stock_inputs(), **how)
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = generate(model, PROMPT.inputs(), **how)
        assert blender.trace.blended
        assert torch.equal(blended.sequences, stock.sequences)


def test_compiled_static_decoding_blends():
    model = on_gpu("llama-gqa", torch.float32)
    stock = generate(model, stock_inputs(), cache_implementation="static")
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = generate(model, PROMPT.inputs(), cache_implementation="static")
        assert blender.trace.blended
        assert torch.equal(blended.sequences, stock.sequences)


def blended(model, prompt, store, **settings):
    """First-token logits and trace."""
    result = hfblend.blend(model, prompt, store=store, config=config(**settings))
    return result.logits.float(), result


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation", "chunk_start"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_what_python_gives(name, selection):
    """The third call replays what the second recorded, also for a prompt of another length."""
    model = on_gpu(name, torch.bfloat16)
    store = hfblend.MemoryStore()
    others = [make_prompt(sizes=(200, 311, n), prefix=37, suffix=21) for n in (131, 128, 133)]  # and gaps
    settings = {"ratio": 0.15, "selection": selection}
    for prompt in others * 2:
        graphed, with_graph = blended(model, prompt, store, **settings)
    graphs = model_of(model).graphs
    assert graphs._works
    assert len(graphs._graphs) == (2 if selection == "suffix_attention" else 1)
    python, without = blended(model, prompt, store, **settings, cuda_graphs=False)
    overlap = torch.isin(with_graph.trace.selected_idx, without.trace.selected_idx).float().mean()
    assert overlap > 0.9
    assert (graphed - python).norm() <= 0.05 * python.norm()
    for ours, theirs in zip(with_graph.cache.layers, without.cache.layers):
        assert (ours.keys - theirs.keys).float().norm() <= 0.05 * theirs.keys.float().norm()
        assert torch.isfinite(ours.values).all()


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_correct_as_python_does(name, selection, monkeypatch):
    """By the same kernels, for prompts of other lengths through one graph, and as PyTorch does by the estimator."""
    corrected, own = [], OffsetCorrector.graph_ran
    monkeypatch.setattr(OffsetCorrector, "graph_ran", lambda *args: corrected.append(args[1]) or own(*args))
    model, store = on_gpu(name, torch.bfloat16), hfblend.MemoryStore()
    others = [make_prompt(sizes=(200, 311, n), prefix=37, suffix=21) for n in (131, 128, 133)]
    settings = {"ratio": 0.15, "selection": selection}
    for prompt in others * 2:
        graphed, with_graph = blended(model, prompt, store, **settings, correction="offset")
    assert model_of(model).graphs._works
    assert corrected[-3:] == [[0, 1, 2, 3] if selection == "suffix_attention" else [2, 3]] * 3
    for correction in ("offset", lambda errors: offset(errors)):
        python, without = blended(model, prompt, store, **settings, correction=correction, cuda_graphs=False)
        assert (graphed - python).norm() <= 0.05 * python.norm()
        for ours, theirs in zip(with_graph.cache.layers, without.cache.layers):
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert (a - b).float().norm() <= 0.05 * b.float().norm()
    _, stale = blended(model, prompt, store, **settings, correction=None)
    assert not torch.equal(with_graph.cache.layers[3].values, stale.cache.layers[3].values)


def test_graphs_with_and_without_a_correction_stay_apart():
    """Each gives the same to the bit before and after the other was recorded, and a prompt is corrected once."""
    model, store = on_gpu("llama-gqa", torch.bfloat16), hfblend.MemoryStore()
    runs = {None: [], "offset": []}
    for correction in (None, "offset", None, "offset"):
        for _ in range(3):
            logits, result = blended(model, PROMPT, store, ratio=0.15, correction=correction)
        kv = [states for layer in result.cache.layers for states in (layer.keys, layer.values)]
        runs[correction].append([logits, *kv])
    assert len(model_of(model).graphs._graphs) == 3  # of the suffix, which serves both, and of each recompute pass
    for before, after in runs.values():
        assert all(map(torch.equal, before, after))
    assert not torch.equal(runs[None][0][0], runs["offset"][0][0])


def test_a_recorded_call_gives_what_its_replay_gives():
    """A pass runs once before it is recorded, over rows that are in their places: it must not correct them then."""
    model, store = on_gpu("llama-gqa", torch.bfloat16), hfblend.MemoryStore()
    _, recorded, replayed = (blended(model, PROMPT, store, ratio=0.15, correction="offset") for _ in range(3))
    assert len(model_of(model).graphs._graphs) == 2
    assert torch.equal(recorded[0], replayed[0])
    for ours, theirs in zip(recorded[1].cache.layers, replayed[1].cache.layers):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_hook_or_new_weights_keep_graphs_away():
    model = on_gpu("llama-gqa", torch.bfloat16)
    store = hfblend.MemoryStore()
    for _ in range(3):
        blended(model, PROMPT, store, ratio=0.15)
    recorded = model_of(model).graphs._graphs
    assert recorded
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    blended(model, PROMPT, store, ratio=0.15)
    assert seen
    hook.remove()
    before = list(recorded)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    graphed, _ = blended(model, PROMPT, store, ratio=0.15)
    assert list(recorded) != before or all(recorded[form] for form in before)
    assert model_of(model).graphs._works  # recorded again, though no graph was left
    python, _ = blended(model, PROMPT, store, ratio=0.15, cuda_graphs=False)
    assert (graphed - python).norm() <= 0.05 * python.norm()


PYTHON = config(0.15, cuda_graphs=False, correction=None)


def require_same_answer(ours, theirs):
    """Greedy tokens are the same up to where two logits are as close as rounding: from there, answers may part."""
    for ours_now, theirs_now in zip(ours.logits, theirs.logits):
        one, other = ours_now.float(), theirs_now.float()
        assert (one - other).norm() <= 0.05 * other.norm()
        if one.argmax() != other.argmax():
            best, second = other.topk(2).values[0]
            assert best - second <= 0.05 * other.abs().max()
            return


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "llama-mqa", "mistral-full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_by_a_graph_gives_what_python_gives(name, dtype):
    """One graph for prompts of several lengths, in and out of inference mode; the next turn goes on with the cache."""
    model = on_gpu(name, dtype)
    prompts = [PROMPT, make_prompt(sizes=(90, 400), prefix=37, suffix=60, seed=2), make_prompt((311,), seed=3)]
    with hfblend.patch(model, config=config(0.15, correction=None)):
        recorded = None
        for prompt, mode in zip(prompts * 2, (torch.inference_mode, torch.no_grad) * 3):
            with mode():
                python = generate(model, prompt.inputs(), max_new_tokens=24, blend_config=PYTHON)
                graphed = generate(model, prompt.inputs(), max_new_tokens=24)
            require_same_answer(graphed, python)
            decoding = model_of(model).decoding
            assert decoding._works
            assert decoding._graph is not None
            assert recorded in (None, decoding._graph)
            recorded = decoding._graph
            assert graphed[CACHE].get_seq_length() == len(prompt) + 23
            assert all(torch.isfinite(states).all() for layer in graphed[CACHE].layers for states in layer.kv)
        turns = []
        for one in (graphed, python):
            ids = torch.cat([one.sequences, PROMPT.input_ids[:, :5].cuda()], 1)
            turns.append(generate(model, {"input_ids": ids}, **{CACHE: one[CACHE]}))
    if torch.equal(graphed.sequences, python.sequences):
        require_same_answer(*turns)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-full"])
def test_decoding_by_a_graph_is_no_further_from_fp32_than_stock(name):
    model, exact = on_gpu(name, torch.bfloat16), MODELS[name](torch.bfloat16).float().to("cuda")
    with hfblend.patch(model, config=config(1.0)):
        for _ in range(2):
            graphed = generate(model, PROMPT.inputs(), max_new_tokens=33)
        assert model_of(model).decoding._graph is not None
    stock = generate(model, stock_inputs(), max_new_tokens=33)
    errors = []
    for run in (graphed, stock):
        with torch.no_grad():
            truth = exact(run.sequences).logits[0, len(PROMPT) : -1]
        found = torch.cat(run.logits[1:]).float()
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[0] <= 1.2 * errors[1]


def test_decoding_by_a_graph_goes_on_in_a_larger_buffer():
    model = on_gpu("llama-gqa", torch.bfloat16)
    with hfblend.patch(model, config=config(0.15, correction=None)):
        python = generate(model, PROMPT.inputs(), max_new_tokens=300, blend_config=PYTHON)
        graphed = generate(model, PROMPT.inputs(), max_new_tokens=300)
        graph = model_of(model).decoding._graph
        assert graph._addresses == [layer.address for layer in graphed[CACHE].layers]
    require_same_answer(graphed, python)


def test_threads_that_decode_by_one_graph_each_get_their_answer():
    model = on_gpu("llama-gqa", torch.bfloat16)
    prompts = [PROMPT, make_prompt(sizes=(90, 400), prefix=37, suffix=60, seed=2)]

    def goes_on(begun):
        with torch.cuda.stream(torch.cuda.Stream()):
            return generate(model, {"input_ids": begun.sequences}, **{CACHE: begun[CACHE]}, max_new_tokens=100)

    with hfblend.patch(model, config=config(0.15, correction=None)):
        generate(model, PROMPT.inputs(), max_new_tokens=4)  # records the graph
        begun = [[generate(model, prompt.inputs(), max_new_tokens=1) for prompt in prompts] for _ in range(4)]
        torch.cuda.synchronize()
        alone = list(map(goes_on, begun[0]))
        with ThreadPoolExecutor(2) as threads:
            together = [list(threads.map(goes_on, pair)) for pair in begun[1:]]
    for pair in together:
        for run, expected in zip(pair, alone):
            require_same_answer(run, expected)


def test_a_hook_on_a_layer_sees_every_decoded_token():
    model, seen = on_gpu("llama-gqa", torch.bfloat16), []
    with hfblend.patch(model, config=config(0.15, correction=None)):
        for _ in range(2):
            generate(model, PROMPT.inputs())
        assert model_of(model).decoding._graph is not None
        hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        generate(model, PROMPT.inputs(), max_new_tokens=9)
        hook.remove()
    assert len(seen) >= 8


def test_graphs_are_recorded_again_after_remove():
    model = on_gpu("llama-gqa", torch.bfloat16)
    for _ in range(2):
        with hfblend.patch(model, config=config(0.15, correction=None), store=hfblend.MemoryStore()):
            for _ in range(3):
                generate(model, PROMPT.inputs(), max_new_tokens=1)
            graphs = model_of(model).graphs
            assert graphs._works
            assert graphs._graphs


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
def test_chunks_on_disk_give_what_chunks_on_the_gpu_give(selection, graphs, tmp_path):
    model = on_gpu("llama-gqa", torch.bfloat16)
    runs = []
    for store in (hfblend.MemoryStore(), DiskStore(tmp_path)):
        for _ in range(4 if graphs else 2):
            last = blended(model, PROMPT, store, ratio=0.15, selection=selection, cuda_graphs=graphs)
        runs.append(last)
    assert bool(model_of(model).graphs._graphs) == graphs
    (on_device, one), (on_disk, other) = runs
    assert other.trace.hits == 3
    assert torch.equal(one.trace.selected_idx, other.trace.selected_idx)
    assert torch.equal(on_device, on_disk)


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
def test_a_chunk_lost_in_a_recorded_pass_is_prefilled_alone(selection, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "LAYERS_A_READ", 1)  # so that the first layers come before the fault
    model, disk = on_gpu("llama-gqa", torch.bfloat16), DiskStore(tmp_path)
    for _ in range(4):
        intact, one = blended(model, PROMPT, disk, ratio=0.15, selection=selection)
    assert model_of(model).graphs._graphs
    damage(disk, one.trace.chunks[1].key, 3)
    again, other = blended(model, PROMPT, disk, ratio=0.15, selection=selection)
    assert [chunk.status for chunk in other.trace.chunks] == ["hit", "miss", "hit"]
    assert (again - intact).norm() <= 0.05 * intact.norm()
    _, last = blended(model, PROMPT, disk, ratio=0.15, selection=selection)
    assert last.trace.hits == 3


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
def test_chunks_in_ram_give_what_chunks_on_the_gpu_give(selection, graphs):
    model = on_gpu("llama-gqa", torch.bfloat16)
    stores = [hfblend.MemoryStore(), hfblend.MemoryStore(device="cpu")]
    runs = []
    for store in stores:
        for _ in range(4 if graphs else 2):
            logits, result = blended(model, PROMPT, store, ratio=0.15, selection=selection, cuda_graphs=graphs)
        runs.append((logits, result))
    assert next(iter(stores[1]._entries.values())).layer(0)[0].is_pinned()
    (on_device, one), (in_ram, other) = runs
    assert torch.equal(one.trace.selected_idx, other.trace.selected_idx)
    assert torch.equal(on_device, in_ram)
    for ours, theirs in zip(one.cache.layers, other.cache.layers):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("packed", [True, False])
def test_chunks_here_and_there_give_what_chunks_on_the_gpu_give(packed):
    """On the GPU, in pinned RAM and in RAM that is not, side by side; some without rows."""
    model, store = on_gpu("llama-gqa", torch.bfloat16), hfblend.MemoryStore()
    for _ in range(2):
        expected, one = blended(model, PROMPT, store, ratio=0.15, cuda_graphs=False)
    for i, (key, entry) in enumerate(list(store._entries.items())[1:]):
        layers = [entry.layer(layer) for layer in range(entry.num_layers)]
        if i == 0:
            moved = entry.to("cpu")
        elif packed:
            moved = replace(entry, cache=full_length_cache(pageable(kv) for kv in layers))
        else:
            moved = replace(entry, cache=full_length_cache((k.clone().cpu(), v.clone().cpu()) for k, v in layers))
        store._entries[key] = moved
    assert {entry.layer(0)[0].device.type for entry in store._entries.values()} == {"cuda", "cpu"}
    assert {entry.layer(0)[0].is_pinned() for entry in store._entries.values()} == {True, False}
    got, other = blended(model, PROMPT, store, ratio=0.15, cuda_graphs=False)
    assert other.trace.hits == 3
    assert torch.equal(one.trace.selected_idx, other.trace.selected_idx)
    assert torch.equal(got, expected)


def pageable(kv):
    """The same, in rows in RAM that no GPU can read."""
    rows = rows_behind(kv).cpu()
    assert not rows.is_pinned()
    return RowLayout.of(kv).views(rows[None])


def test_prompts_from_ram_in_a_row_are_each_what_they_are_from_the_gpu():
    """Each takes up the memory of the one before while the GPU is still at it."""
    model, prompts = (
        on_gpu("llama-gqa", torch.bfloat16),
        [make_prompt(sizes=(200, 311, 133), seed=seed) for seed in range(6)],
    )
    here, in_ram = hfblend.MemoryStore(), hfblend.MemoryStore(device="cpu")
    for store in (here, in_ram):
        for prompt in prompts:
            blended(model, prompt, store, ratio=0.15)
    settings = config(0.15, selection="kv_deviation", cuda_graphs=False)
    expected = [hfblend.blend(model, prompt, config=settings, store=here).logits for prompt in prompts]
    for _ in range(3):
        results = [hfblend.blend(model, prompt, config=settings, store=in_ram).logits for prompt in prompts]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])
def test_later_turns_are_blended_after_their_cache(selection, graphs):
    """At ratio 1, and with true KV from elsewhere; twice, so that graphs are recorded and replayed."""
    model = on_gpu("llama-gqa", torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    stock = conversation(model)
    for ratio, correction in ((1.0, "offset"), (0.2, None)):
        store, settings = (
            hfblend.MemoryStore(),
            {"selection": selection, "cuda_graphs": graphs, "correction": correction},
        )
        with hfblend.patch(model, config(ratio, **settings), store=store) as blender:
            for _ in range(2):
                true_kv = partial(store_of_true_kv, model, store=store) if ratio < 1 else None
                check(model, stock, conversation(model, blender, store_for=true_kv), 1e-3)


def test_moving_a_model_keeps_its_entries():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, PROMPT.inputs())
        model.to("cuda")
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
    assert full_prefill_kv(model, PROMPT.input_ids)[0][0].device.type == "cuda"
