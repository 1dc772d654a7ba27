"""Models that do not fit one device: offloaded by accelerate, spread over GPUs, in shards of several processes."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from helpers import config, generate, largest_difference, make_llama, make_mistral, make_prompt, store_of_true_kv

import hfblend
from hfblend.model.weights.offloading import OffloadedWeights, device_of
from hfblend.support.registry import model_of

PROMPT = make_prompt()
STOCK = {"input_ids": PROMPT.input_ids}
TINY = 3e-4  # on logits of |10|: what moving keys in fp32 adds


# --- offloaded ----------------------------------------------------------------------------------------------------


def on_cpu(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model)


def on_disk(model, folder):
    from accelerate import disk_offload

    return disk_offload(model, folder / "weights")


def half_in_memory(model, folder):
    """As `device_map="auto"` places a model that is too large: two layers stay, one goes to RAM and one to disk."""
    from accelerate import dispatch_model

    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{i}": where for i, where in enumerate(("cpu", "disk", "cpu", "disk"))}
    return dispatch_model(model, parts | layers, main_device="cpu", offload_dir=folder / "weights", force_hooks=True)


def loaded_with_a_device_map(model, folder):
    """As users do it: `from_pretrained` reads offloaded weights from the checkpoint's own files."""
    model.save_pretrained(folder / "checkpoint")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    layers = {f"model.layers.{i}": where for i, where in enumerate(("cpu", "disk", "cpu", "disk"))}
    return type(model).from_pretrained(folder / "checkpoint", device_map=places | layers, dtype=model.dtype).eval()


OFFLOADING = [on_cpu, on_disk, half_in_memory, loaded_with_a_device_map]


def on_meta(model):
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.mark.parametrize("offload", OFFLOADING)
@pytest.mark.parametrize("make", [make_llama, pytest.param(make_mistral, marks=pytest.mark.thorough)])
def test_an_offloaded_model_blends_as_one_in_memory(offload, make, tmp_path):
    model = make()
    stock = generate(model, STOCK)
    true_kv = store_of_true_kv(model, PROMPT)
    model = offload(model, tmp_path)
    away = on_meta(model)
    assert len(away) >= 18
    with hfblend.patch(model, config=config(1.0)) as blender:
        output = generate(model, PROMPT.inputs())
        assert blender.trace.blended
        assert torch.equal(output.sequences, stock.sequences)
        assert largest_difference(output, stock) <= TINY
    assert on_meta(model) == away
    with hfblend.patch(model, config=config(0.15), store=true_kv) as blender:  # stored by the model in memory
        output = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3
        assert largest_difference(output, stock) <= TINY
    assert on_meta(model) == away


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation", "mixed"])
@pytest.mark.parametrize("layerwise", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_chunks_on_disk_serve_an_offloaded_model(selection, layerwise, tmp_path):
    model = half_in_memory(make_llama(), tmp_path)
    settings = config(0.3, selection=selection, layerwise=layerwise)
    expected = generate_with(make_llama(), settings, hfblend.MemoryStore())
    for hits in (0, 3):
        store = hfblend.store.DiskStore(tmp_path / "chunks")
        output, trace = generate_with(model, settings, store)
        assert trace.hits == hits
        assert torch.equal(trace.selected_idx, expected[1].selected_idx)
        assert largest_difference(output, expected[0]) <= TINY


def generate_with(model, settings, store):
    with hfblend.patch(model, config=settings, store=store) as blender:
        return generate(model, PROMPT.inputs()), blender.trace


def test_an_offloaded_model_stores_chunks_ahead_and_is_verified(tmp_path):
    model = half_in_memory(make_llama(), tmp_path)
    with hfblend.patch(model, config=config(1.0)) as blender:
        report = blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids)
        assert report.computed == 3
        assert blender.verify(PROMPT).kl <= 1e-6
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3


@pytest.mark.parametrize("offload", OFFLOADING)
def test_the_fingerprint_of_an_offloaded_model_is_that_of_the_model(offload, tmp_path, caplog):
    expected = model_of(make_llama()).fingerprint.digest
    model = offload(make_llama(), tmp_path)
    assert model_of(model).fingerprint.digest == expected
    assert "cannot be read" not in caplog.text
    other = make_llama()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[5, 6] += 0.1
    other = offload(other, tmp_path / "other")
    assert model_of(other).fingerprint.digest != expected


def test_an_offloaded_weight_that_changes_is_seen(tmp_path):
    model = on_cpu(make_llama(), tmp_path)
    taken = model_of(model).fingerprint
    before = taken.current(model)
    generate(model, STOCK)  # brings every weight, and puts new ones on meta
    assert taken.current(model) == before
    with torch.no_grad():
        OffloadedWeights(model).read("model.layers.1.mlp.up_proj.weight").mul_(2)
    assert taken.current(model) != before


def test_weights_on_meta_that_no_hook_knows_are_never_taken_for_equal(caplog):
    model = make_llama()
    taken = [hfblend.model.weights.fingerprint.Fingerprint(model.to("meta")).digest for _ in range(2)]
    assert taken[0] != taken[1]
    assert "cannot be read" in caplog.text


def test_where_a_module_computes():
    from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module

    first, second, third, _ = make_llama().model.layers
    assert device_of(first) == torch.device("cpu")
    assert device_of(first.to("meta")) == torch.device("cpu")  # offloaded, without a word about where it goes
    add_hook_to_module(second.to("meta").mlp.act_fn, AlignDevicesHook("cuda:1"))
    assert device_of(second) == torch.device("cuda:1")
    add_hook_to_module(third.to("meta").mlp.act_fn, SequentialHook(AlignDevicesHook(), AlignDevicesHook("cuda:2")))
    assert device_of(third) == torch.device("cuda:2")


# --- in shards ----------------------------------------------------------------------------------------------------


in_shards = functools.partial(make_llama, vocab_size=98)  # the oldest Transformers divides the vocabulary, too

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, TWO_GPUS])])
def ranks(request, tmp_path_factory):
    """What two processes found that hold one model in shards, on the CPU or on two GPUs."""
    folder = tmp_path_factory.mktemp("ranks")
    in_shards().save_pretrained(folder / "checkpoint")
    script = pathlib.Path(__file__).with_name("tensor_parallel.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if request.param == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Transformers would give each rank one
    command = [*launch, script, folder / "checkpoint", folder, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
class TestTensorParallel:
    def test_each_rank_holds_its_heads_under_its_own_keys(self, ranks):
        assert [found["heads"] for found in ranks] == [1, 1]  # of 2
        assert len({found["key"] for found in ranks} | {model_of(in_shards()).fingerprint.digest}) == 3

    def test_ranks_equal_one_process_where_blending_is_exact(self, ranks):
        stock = generate(in_shards(), STOCK).sequences[0].tolist()
        for found in ranks:
            assert found["stock"] == stock
            assert max(found["largest_difference"]) <= TINY
            for name, hits in (("ratio 1", 0), ("true KV", 3)):
                assert found[name]["blended"]
                assert found[name]["hits"] == hits
                assert found[name]["tokens"] == stock

    @pytest.mark.parametrize("rule", ["kv_deviation", "suffix_attention", "mixed"])
    def test_ranks_select_what_one_process_selects(self, ranks, rule):
        alone = hfblend.blend(in_shards(), PROMPT, config=config(0.3, selection=rule)).trace.selected_idx.tolist()
        assert len(alone) == 14  # of 44 that moved
        assert [found[rule]["selected"] for found in ranks] == [alone, alone]
        assert ranks[0][rule]["tokens"] == ranks[1][rule]["tokens"]

    def test_ranks_share_a_folder_and_count_a_hit_only_if_all_have_it(self, ranks):
        for found in ranks:
            assert (found["disk, cold"]["hits"], found["disk, warm"]["hits"]) == (0, 3)
            assert found["disk, warm"]["tokens"] == found["disk, cold"]["tokens"]
            before, after = (found[f"one rank lost its chunks{when}"] for when in (", before", ""))
            assert after["hits"] == 0  # also on the rank that has them: the other must not prefill alone
            assert after["tokens"] == before["tokens"]
            assert found["precomputed"] == 3

    def test_ranks_do_not_measure_each_their_own_ratio(self, ranks):
        assert all("tensor-parallel" in found["auto"] for found in ranks)


# --- over GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", ["cuda", "cpu", "disk"])
class TestTwoGPUs:
    """Layers 0 and 1 on the first GPU, 2 on the second, 3 there or offloaded."""

    def spread(self, dtype, last, folder):
        from accelerate import dispatch_model

        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        layers = {f"model.layers.{i}": where for i, where in enumerate((0, 0, 1, 1 if last == "cuda" else last))}
        return dispatch_model(make_llama(dtype=dtype), places | layers, main_device=0, offload_dir=folder)

    def test_each_layers_kv_is_where_the_layer_is(self, dtype, last, tmp_path):
        model = self.spread(dtype, last, tmp_path)
        result = hfblend.blend(model, PROMPT, config=config(0.3))
        wanted = [model_of(model).device_of_layer(i) for i in range(4)]
        assert [layer.keys.device for layer in result.cache.layers] == wanted
        assert [device.index for device in wanted[:3]] == [0, 0, 1]

    @pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation", "mixed"])
    @pytest.mark.parametrize("ids_on", ["cpu", "cuda:0"])
    def test_it_equals_stock_where_blending_is_exact(self, dtype, last, selection, ids_on, tmp_path):
        model = self.spread(dtype, last, tmp_path)
        stock = generate(model, {"input_ids": PROMPT.input_ids.to("cuda:0")}, max_new_tokens=1)
        bound = TINY if dtype == torch.float32 else 0.06 * float(stock.logits[0].float().norm())
        settings = {"selection": selection, "check_layers": (2,)}
        for ratio, store in ((1.0, None), (0.3, store_of_true_kv(model, PROMPT))):
            with hfblend.patch(model, config=config(ratio, **settings), store=store) as blender:
                output = generate(model, PROMPT.inputs(ids_on), max_new_tokens=1)
                assert blender.trace.blended
                assert blender.trace.hits == (3 if store else 0)
                assert largest_difference(output, stock) <= bound

    @pytest.mark.parametrize("layerwise", [True, False])
    @pytest.mark.parametrize("where", ["gpu", "ram", "disk"])
    def test_chunks_come_from_anywhere(self, dtype, last, layerwise, where, tmp_path):
        model = self.spread(dtype, last, tmp_path / "weights")
        made = {"gpu": hfblend.MemoryStore, "ram": lambda: hfblend.MemoryStore(device="cpu")}
        store = made[where]() if where in made else hfblend.store.DiskStore(tmp_path / "chunks")
        with hfblend.patch(model, config=config(0.3, layerwise=layerwise), store=store) as blender:
            cold, warm = (generate(model, PROMPT.inputs("cuda:0")) for _ in range(2))
            assert blender.trace.hits == 3
            assert torch.equal(cold.sequences, warm.sequences)
            assert blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids).skipped == 3
