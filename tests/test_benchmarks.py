"""`hfblend bench`: counts by hand, the turns, the files, the command, all on tiny models."""

from __future__ import annotations

import functools
import gc
import json
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from helpers import make_llama, make_mistral
from transformers.generation import CompileConfig
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.lab import report
from hfblend.lab.baselines import METHODS, Case
from hfblend.lab.bench import answers, batching, pair, run, runner, start_up, stream, ttft
from hfblend.lab.bench.flops import Shape, causal_keys, flops, full_prefill_flops, kv_bytes, least_bytes
from hfblend.lab.bench.pair import Arrivals, Pair, empty_stores
from hfblend.lab.bench.runner import paired
from hfblend.lab.bench.stream import PrefixCache, throughput
from hfblend.lab.clock import Peaks, Turn, if_memory_lasts
from hfblend.lab.plots import plot_ttft
from hfblend.lab.report import markdown
from hfblend.lab.settings import GPU_LENGTHS, BenchSettings
from hfblend.lab.synthetic import SHAPES, Layout, PromptMaker, Stream, random_model, twin_of

PEAKS = Peaks(flops_per_s=1e12, bytes_per_s=1e11, load_bytes_per_s=1e10)
LAYOUT = Layout(prefix=8, chunk=100, suffix=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from a second thread, and lose much where another process has its core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_machine():
    """Its peaks are measured once: a second of a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peaks, "measure", functools.cache(Peaks.measure))
        yield


# --- counts ---------------------------------------------------------------------------------------------------------

SMALL = Shape(layers=3, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocabulary=10)
KV, OTHER, HEAD = 16, 128, 40  # weights: 2·4·1·2; 2·4·2·2 + 3·4·8; 4·10
LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256)


def test_weights_by_hand():
    assert (SMALL.kv_weights, SMALL.other_weights, SMALL.head_weights) == (KV, OTHER, HEAD)


def test_full_prefill_by_hand():
    keys = 1 + 2 + 3 + 4 + 5
    assert full_prefill_flops(5, shape=SMALL) == 3 * (5 * 2 * (KV + OTHER) + 16 * keys) + 2 * HEAD


def test_full_reuse_by_hand():
    """Ten tokens, a suffix of two: rows at 8 and 9, which see 9 and 10 keys; the last layer needs row 9 only."""
    whole = 2 * (2 * 2 * (KV + OTHER) + 16 * 19)
    last = 2 * 2 * KV + 2 * OTHER + 16 * 10
    assert flops(10, 0, None, 2, shape=SMALL, exact=2) == whole + last + 2 * HEAD


def test_cacheblend_by_hand():
    """Half of the tokens 2 … 7 is selected: three rows that see 5.5 keys on average, and the suffix."""
    below = 8 * 2 * (KV + OTHER) + 16 * (3 + 4 + 5 + 6 + 7 + 8 + 9 + 10)
    at_check = 8 * 2 * KV + 5 * 2 * OTHER + 16 * (3 * 5.5 + 19)
    last = 5 * 2 * KV + 2 * OTHER + 16 * 10
    assert flops(10, 0.5, 1, 2, shape=SMALL, exact=2) == below + at_check + last + 2 * HEAD


def test_suffix_guided_by_hand():
    rows, keys = 5, 3 * 5.5 + 19
    scored = 2 * (2 * 2 * (KV + OTHER) + 16 * 19) + 2 * 2 * (KV + 16) + 8 * 19
    recomputed = 2 * (rows * 2 * (KV + OTHER) + 16 * keys) + rows * 2 * KV + 2 * OTHER + 16 * 10 + 2 * HEAD
    assert flops(10, 0.5, None, 2, shape=SMALL, exact=2) == scored + recomputed
    assert flops(10, 0.5, None, 2, shape=SMALL, exact=2, scored=False) == recomputed


def test_prefix_reuse_is_full_reuse_with_all_the_rest_as_its_suffix():
    saved = 2 * (2 * 2 * (KV + OTHER) + 16 * 3) + 2 * 2 * KV  # rows 0 and 1
    assert flops(10, 0, None, 10, shape=SMALL) - flops(10, 0, None, 8, shape=SMALL, exact=2) == saved


def test_ratio_1_is_a_full_prefill_but_for_the_rows_that_nobody_reads():
    unread = 9 * 2 * OTHER + 16 * causal_keys(0, 9)
    assert flops(10, 1, 1, 2, shape=SMALL) == full_prefill_flops(10, shape=SMALL) - unread


def test_llama_8b_at_16k():
    assert 2 * LLAMA_8B.layer_weights == pytest.approx(436e6, rel=2e-3)
    assert full_prefill_flops(16448, shape=LLAMA_8B) == pytest.approx(300e12, rel=1e-2)
    limits = [
        full_prefill_flops(16448, shape=LLAMA_8B) / flops(16448, ratio, 1, 32, shape=LLAMA_8B, exact=544)
        for ratio in (0, 0.05, 0.15, 0.3, 1)
    ]
    assert limits == sorted(limits, reverse=True)
    assert 1 < limits[-1] < 1.05


def test_bytes_by_hand():
    assert kv_bytes(1, shape=LLAMA_8B) == 131072
    weights = 3 * (KV + OTHER)
    kv = 2 * 2 * 3 * 1 * 2 * 10
    assert least_bytes(10, shape=SMALL, element_bytes=4) == 4 * (weights + HEAD + kv)
    assert least_bytes(10, shape=SMALL, element_bytes=4, passes=2) == 4 * (2 * weights + HEAD + kv)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.5, 3, 2), "check_layer below 3"),
        ((10, 1.5, 1, 2), "ratio must lie in"),
        ((10, 0.5, 1, 0), "a suffix of 0"),
        ((10, 0.5, 1, 11), "cannot hold"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flops(*arguments, shape=SMALL)


def test_shapes_are_read_from_models_that_are_like_llama():
    config = SHAPES["tiny"]
    assert Shape.of(random_model("tiny", "cpu")) == Shape(
        4, config["hidden_size"], config["intermediate_size"], 4, 2, 32, config["vocab_size"]
    )
    assert Shape.of(make_mistral(window=None)).layers == 4
    assert Shape.of(make_mistral(window=24)) is None  # rows do not see all keys before them
    model = make_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 8)
    assert Shape.of(model) is None


# --- the pair of models ---------------------------------------------------------------------------------------------


def test_the_twin_shares_every_weight_and_is_never_patched():
    model = make_llama()
    twin = twin_of(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters()))
    assert twin.config is not model.config
    with paired(model) as both:
        assert "generate" in vars(both.model)
        assert "generate" not in vars(both.stock)
        assert "forward" not in vars(both.stock.model)
    assert "generate" not in vars(model)


def test_a_call_that_is_not_blended_is_no_measurement():
    case = Case(METHODS["full_reuse"], 0.0, "ram")
    prompt = hfblend.Prompt.from_ids([1, 2], [], [3, 4])
    refused = pytest.raises(RuntimeError, match="full_reuse was not blended")
    with paired(make_llama()) as both, empty_stores(("ram",)) as stores, refused:
        both.run(case, prompt, stores)


def test_arrivals_count_from_the_first_new_token(monkeypatch):
    times = iter([0.0, 5.0, 5.5, 7.0])
    monkeypatch.setattr(pair, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    arrivals = Arrivals()
    for _ in range(4):
        arrivals.put(torch.tensor([1]))
    assert arrivals.token_ms == [500.0, 1500.0]


def test_prompts_of_a_batch_share_a_pool_in_orders_of_their_own():
    pool, prompts = PromptMaker(500, LAYOUT).batch(300, 4)
    chunks = {tuple(ids) for prompt in pool for ids in prompt.chunk_ids}
    assert len(chunks) == 6
    assert all({tuple(ids) for ids in prompt.chunk_ids} < chunks for prompt in prompts)
    assert len({tuple(prompt.prefix_ids) for prompt in (*pool, *prompts)}) == 1
    assert len({tuple(prompt.suffix_ids) for prompt in prompts}) == 4


def test_a_stream_draws_by_rank_from_a_pool_that_changes():
    def counts(**settings):
        drawn = PromptMaker(500, LAYOUT).stream(300, Stream(pool=4, **settings))
        prompts = list(islice(drawn, 300))
        assert all(len({tuple(ids) for ids in prompt.chunk_ids}) == 3 for prompt in prompts)
        return Counter(tuple(ids) for prompt in prompts for ids in prompt.chunk_ids)

    still = [count for _, count in counts(churn=0.0).most_common()]
    assert len(still) == 12
    assert still[0] > 2 * still[3] > 2 * still[-1]
    assert len(counts(churn=0.01)) == pytest.approx(12 + 36, abs=5)  # some come and go undrawn
    even = [count for _, count in counts(churn=0.0, zipf=0.0).most_common()]
    assert even[0] < 2 * even[-1]


def test_prefix_caching_finds_equal_beginnings_and_answers_as_stock():
    model = random_model("tiny", "cpu")
    store = hfblend.MemoryStore()
    cache = PrefixCache(model, store)
    a, b, c = ([i] * 20 for i in (5, 6, 7))
    found = []
    for chunks in ([a, b], [a, b], [a, c], [b, a]):
        prompt = hfblend.Prompt.from_ids([1, 2, 3], chunks, [8, 9])
        number, whole = cache.generate(prompt)
        cache.keep(prompt, whole)
        found.append(number)
        expected = model(prompt.input_ids, use_cache=True).past_key_values
        for ours, stock in zip(whole.layers, expected.layers):
            torch.testing.assert_close(ours.keys, stock.keys)
            torch.testing.assert_close(ours.values, stock.values)
    assert found == [0, 2, 1, 0]
    assert len(store) == 6  # the prefix among them


@pytest.mark.thorough
def test_a_stream_lasts():
    """Neither its hits nor what it holds depends on how many prompts have been."""
    held = []

    def say(what):
        if what.startswith(("prompt 100 ", "prompt 200 ")):
            gc.collect()
            held.append((len(gc.get_objects()), threading.active_count()))

    maker = PromptMaker(80, Layout(prefix=8, chunk=24, suffix=8))
    with paired(make_llama()) as both:
        rows = throughput(both, maker, 72, 200, Stream(full_prefill_every=20), "ram", say)
    first, second, _, last = rows
    assert [row["last_prompt"] for row in rows] == [50, 100, 150, 200]
    assert 0.5 < second["hit_rate"] < 1  # a part of the pool is not stored
    assert last["hit_rate"] >= second["hit_rate"] - 0.1
    assert first["hit_rate"] <= second["hit_rate"] + 0.1  # it found empty stores
    assert all(row["prefix_hit_rate"] < row["hit_rate"] - 0.2 for row in rows)
    for row in rows:
        assert 0.8 * row["store_max_mb"] < row["store_mb"] <= row["store_max_mb"]
        assert row["prefix_store_mb"] <= row["store_max_mb"]
    (objects_before, threads_before), (objects, threads) = held
    assert objects <= 1.01 * objects_before
    assert threads <= threads_before


def test_another_attention_has_run_before_anything_is_measured(monkeypatch):
    """Some say only then that this device cannot do it."""
    model = make_llama()
    with paired(model, attention="eager") as both:
        stocks = [both._stocks[name].config._attn_implementation for name in (None, "eager")]
    assert stocks == ["sdpa", "eager"]

    def refuse(*args, **kwargs):
        raise RuntimeError("no such GPU")

    monkeypatch.setattr("transformers.models.llama.modeling_llama.eager_attention_forward", refuse)
    refused = pytest.raises(ValueError, match="Attention 'eager' cannot be measured here: no such GPU")
    with refused, paired(model, attention="eager"):
        pass
    assert "generate" not in vars(model)


@pytest.mark.parametrize("error", [RuntimeError("no compiler found\nin 7 places"), torch.OutOfMemoryError("full")])
def test_where_a_static_cache_fails_the_row_says_why_and_the_rest_goes_on(monkeypatch, error):
    own = Pair.run

    def fail_if_static(self, *args, **options):
        if options:
            self.stock._compiled_call = print
            raise error
        return own(self, *args, **options)

    monkeypatch.setattr(Pair, "run", fail_if_static)
    prompt = PromptMaker(500, LAYOUT).prompt(200)
    with paired(random_model("tiny", "cpu")) as both, empty_stores(("ram",)) as stores:
        row = answers.decoding(both, prompt, stores, 3, 1, lambda what: None, static=True)
        assert not hasattr(both.stock, "_compiled_call")
    assert row["static_failed"] in ("RuntimeError: no compiler found", "OutOfMemoryError: full")
    assert row["answer_speed_up_over_stock"] == pytest.approx(row["stock_answer_ms"] / row["blended_answer_ms"])
    assert not [name for name in row if name.startswith("static") and name != "static_failed"]


@pytest.mark.thorough
def test_a_compiled_stock_model_is_given_up_after_its_length():
    model = random_model("tiny", "cpu")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    prompt = PromptMaker(500, LAYOUT).prompt(200)
    with paired(model) as both, empty_stores(("ram",)) as stores:
        both.stock.generation_config.compile_config = config
        row = answers.decoding(both, prompt, stores, 4, 1, lambda what: None, static=True)
        assert not hasattr(both.stock, "_compiled_call")
    assert row["static_cache"] == "compiled"


# --- turns and rows -------------------------------------------------------------------------------------------------


def names_of(cases):
    return [(case.method.name, case.ratio, case.chunks_in) for case in cases]


def test_cases_begin_with_full_prefill_and_take_ratio_0_for_full_reuse():
    settings = BenchSettings(ratios=(0, 0.1, 0.3), methods=("chunk_start", "prefix_reuse"), chunks_in=("gpu", "ram"))
    assert names_of(settings.cases()) == [
        ("full_prefill", 1.0, None), ("prefix_reuse", 1.0, None),
        ("full_reuse", 0.0, "gpu"), ("full_reuse", 0.0, "ram"),
        ("chunk_start", 0.1, "gpu"), ("chunk_start", 0.1, "ram"),
        ("chunk_start", 0.3, "gpu"), ("chunk_start", 0.3, "ram"),
    ]  # fmt: skip


def test_the_device_settles_lengths_and_place():
    assert BenchSettings().on(torch.device("cuda")).lengths == GPU_LENGTHS
    assert BenchSettings().on(torch.device("cpu")).chunks_in == ("ram",)
    with pytest.raises(ValueError, match='"gpu" need a model on a GPU'):
        BenchSettings(chunks_in=("gpu", "ram")).on(torch.device("cpu"))


def test_a_method_without_the_chunks_is_not_timed():
    with pytest.raises(ValueError, match="no_context leaves the chunks out"):
        BenchSettings(methods=("full_reuse", "no_context"))


def test_another_attention_is_one_more_full_prefill():
    cases = BenchSettings(ratios=(0.1,), methods=("chunk_start",), attention="eager").cases()
    assert [str(case) for case in cases] == ["full_prefill 1", "full_prefill eager 1", "chunk_start 0.1 from gpu"]


def turn(ms, gib=None, reused=None):
    trace = None if reused is None else hfblend.BlendTrace(bytes_reused=reused, num_tokens=10, num_layers=4)
    return Turn(ms, gib, trace)


def test_rows_take_speed_ups_per_turn():
    full, reuse = BenchSettings().cases()[0], METHODS["full_reuse"]
    turns = {
        full: [turn(100), turn(300), turn(200)],
        Case(reuse, 0.0, "gpu"): [turn(50, 2.0, 400), turn(100, 2.5, 400), turn(50, 2.0, 400)],
        Case(reuse, 0.0, "ram"): [turn(100, 2.0, 400), turn(150, 2.0, 400), turn(100, 2.0, 400)],
        Case(METHODS["last"], 0.5, "gpu"): [],
    }
    rows = ttft.rows_of(turns, PromptMaker(90, LAYOUT).prompt(200), None, 2, PEAKS, [{"place": "ram", "load_ms": 40.0}])
    assert [row["speed_up"] for row in rows] == [1.0, 3.0, 2.0, None]
    assert rows[1]["speed_up_range"] == [2.0, 4.0]
    assert rows[1]["peak_gib"] == 2.0
    assert [row["over_first_place"] for row in rows] == [None, None, 2.0, None]
    assert [row["load_ms"] for row in rows] == [None, None, 40.0, None]
    assert [row["failed"] for row in rows] == [None, None, None, "out of memory"]
    assert rows[0]["flops"] is None


@pytest.mark.parametrize("name", ["kv_deviation", "suffix_attention", "chunk_start", "prefix_reuse", "lmcache_v1"])
def test_methods_are_counted_where_they_are_hfblends_own(name):
    """The count is below what full prefill does, and the pairs that the trace counts are at least as many."""
    model = random_model("tiny", "cpu")
    shape, prompt = Shape.of(model), PromptMaker(500, LAYOUT).prompt(400)
    settings = BenchSettings(ratios=(0.1,), methods=(name,), chunks_in=("ram",))
    with paired(model) as both, empty_stores(("ram",)) as stores:
        turns = runner.ttft_turns(both, prompt, stores, settings.cases(), 1, lambda what: None)
    full, row = ttft.rows_of(turns, prompt, shape, 4, PEAKS, [])
    assert full["speed_up_limit"] == 1.0
    if name == "lmcache_v1":
        assert row["flops"] is None
    else:
        assert 0 < row["flops"] / full["flops"] < row["pairs_share"] * 1.1
        assert row["speed_up_limit"] == full["flops"] / row["flops"]
        assert row["roofline_ms"] >= 1000 * row["flops"] / PEAKS.flops_per_s


def test_what_memory_does_not_last_for_is_said_and_the_rest_goes_on(monkeypatch):
    own = Pair.run

    def run_short_of_memory(self, case, prompt, *args, **kwargs):
        if len(prompt) > 300 and (case.method.whole or len(prompt) > 500):
            raise torch.OutOfMemoryError("not enough")
        return own(self, case, prompt, *args, **kwargs)

    monkeypatch.setattr(Pair, "run", run_short_of_memory)
    settings = BenchSettings(
        lengths=(200, 400, 600), ratios=(0,), methods=(), repeats=1, layout=LAYOUT, decoded_tokens=2
    )
    saved = []
    results = run(random_model("tiny", "cpu"), "tiny", settings, save=lambda so_far: saved.append(len(so_far["rows"])))
    failed = "out of memory"
    assert [row["failed"] for row in results["rows"]] == [None, None, failed, None, failed, failed]
    assert [found.get("failed") for found in results["decoding"]] == [None, failed, failed]
    assert saved == [2, 4, 6]
    assert "| 416 | full_prefill | 1 | – | out of memory |" in markdown(results)
    assert "Decoding after 616 tokens: out of memory." in markdown(results)


def test_memory_that_lasts_changes_nothing():
    assert if_memory_lasts(lambda: 7) == 7


def test_a_picture_of_nothing_measured_is_drawn(tmp_path, results):
    rows = [{**row, "failed": "out of memory"} for row in results["rows"]]
    plot_ttft({**results, "rows": rows}).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_chunks_on_disk_are_measured_layer_by_layer_and_all_first_beside_those_in_ram():
    """Both read what the store wrote; loading alone is timed in every place, plain reads where there are files."""
    settings = BenchSettings(
        lengths=(200,), ratios=(0.1,), methods=("suffix_attention", "kv_deviation_in_context"), repeats=1,
        layout=LAYOUT, decoded_tokens=0, chunks_in=("ram", "disk", "disk_whole"),
    )  # fmt: skip
    results = run(random_model("tiny", "cpu"), "tiny", settings)
    blended = [row for row in results["rows"] if row["method"] == "suffix_attention"]
    assert [row["chunks_in"] for row in blended] == ["ram", "disk", "disk_whole"]
    assert [row["over_first_place"] is None for row in blended] == [True, False, False]
    assert all("prefill_chunks" not in row["phase_ms"] and row["load_ms"] > 0 for row in blended)
    in_ram, on_disk, whole = results["loading"]
    assert in_ram["bytes"] == on_disk["bytes"] == blended[0]["bytes_reused"]
    assert "read_ms" not in in_ram
    assert min(on_disk["read_ms"], on_disk["plain_read_ms"], whole["load_ms"]) > 0
    assert "MB of 216 tokens from disk: to the device, realigned" in markdown(results)


# --- files and the command ------------------------------------------------------------------------------------------

SETTINGS = BenchSettings(
    lengths=(300, 600),
    ratios=(0, 0.1),
    repeats=2,
    layout=LAYOUT,
    attention="eager",
    decoded_tokens=3,
    static_cache=True,
    throughput_prompts=6,
    batch_prompts=2,
)
ROW_KEYS = {
    "tokens", "method", "ratio", "chunks_in", "failed", "turns", "ttft_ms", "ttft_ms_range", "speed_up",
    "speed_up_range", "peak_gib", "pairs_share", "phase_ms", "bytes_reused", "load_ms", "over_first_place", "flops",
    "speed_up_limit", "roofline_ms", "share_of_limit",
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return run(random_model("tiny", "cpu"), "tiny", SETTINGS)


def test_results_say_what_they_are_of(results):
    assert results == json.loads(json.dumps(results))
    assert results["torch"] in results["machine"]
    assert (results["dtype"], results["attention"], results["shape"]["layers"]) == ("float32", "sdpa", 4)
    assert results["settings"]["layout"] == {"prefix": 8, "chunk": 100, "suffix": 8}
    assert all(set(row) == ROW_KEYS and row["turns"] == 2 for row in results["rows"])
    assert [(row["tokens"], row["method"]) for row in results["rows"]] == [
        (tokens, method)
        for tokens in (316, 616)
        for method in (
            *("full_prefill", "full_prefill eager", "prefix_reuse", "full_reuse", "suffix_attention", "kv_deviation"),
        )
    ]


def test_figures_of_the_results(results):
    for row in results["rows"]:
        low, high = row["speed_up_range"]
        assert low <= row["speed_up"] <= high
        assert row["share_of_limit"] == pytest.approx(row["speed_up"] / row["speed_up_limit"])
        assert row["chunks_in"] == (None if row["ratio"] == 1 else "ram")
    blended = results["rows"][4]
    assert {"look_up", "select", "recompute"} <= set(blended["phase_ms"])
    assert blended["bytes_reused"] == kv_bytes(308, shape=Shape(**results["shape"]), element_bytes=4)
    for found in results["decoding"]:
        for name in ("blended_over", "answer_speed_up_over"):
            for other in ("stock", "static"):
                low, high = found[f"{name}_{other}_range"]
                assert low <= found[f"{name}_{other}"] <= high
        assert found["decoded_tokens"] == 3
        assert found["static_cache"] == "not compiled"  # on a CPU
        assert found["static_first_answer_ms"] > 0
    assert [found["last_prompt"] for found in results["throughput"]] == 2 * [1, 3, 4, 6]
    assert [found["chunks_in_pool"] for found in results["throughput"]] == 4 * [48] + 4 * [96]
    for found in results["throughput"]:
        for name in ("stock", "prefix", "blended"):
            assert 0 < found[f"{name}_ttft_ms_p50"] <= found[f"{name}_ttft_ms_p95"]
            assert found[f"{name}_prompts_per_s"] > 0
    for found in results["batching"]:
        assert found["prompts"] == 2
        assert min(value for name, value in found.items() if name.endswith("_ms")) > 0
        assert found["single_over_batch_range"][0] <= found["single_over_batch"] <= found["single_over_batch_range"][1]
        assert found["speed_up_range"][0] <= found["speed_up"] <= found["speed_up_range"][1]
    (started,) = results["start_up"]
    assert started["tokens"] == 316
    early = sum(started[f"{name}_ms"] for name in ("patch", "first_call", "second_call", "third_call"))
    later = started["new_chunks_call_ms"] + 2 * started["warm_call_ms"]
    assert started["start_up_ms"] == pytest.approx(early - later)


def test_markdown_names_the_machine_and_leaves_empty_columns_out(results):
    text = markdown(results)
    assert all(results[name] in text for name in ("machine", "model", "dtype", "attention", "transformers"))
    assert "| tokens | method | ratio |" in text
    assert not {"peak, GiB", "÷ first place"} & set(text.split(" | "))
    assert text.count("| 616 | kv_deviation | 0.1 |") == 1
    assert "Start-up, 4 tokens after 316 by hfblend" in text
    assert "Decoding 3 tokens after 616: stock" in text
    assert "Answers of 3 tokens after 616: stock" in text
    assert text.count("The same by stock with a static cache, not compiled") == 2
    assert "batch over batch" in text
    assert "Stream, prompts 5 to 6 of 616 tokens, 6 chunks each of a pool of 96" in text


def test_results_of_an_earlier_version_are_shown(results):
    """It measured neither start-up nor whole answers."""
    known = ("tokens", "decoded_tokens", "method", "ratio", "stock_tokens_per_s", "blended_tokens_per_s")
    known += ("blended_over_stock", "blended_over_stock_range")
    decoding = [{name: row[name] for name in known} for row in results["decoding"]]
    earlier = {name: part for name, part in results.items() if name != "start_up"} | {"decoding": decoding}
    text = markdown(earlier)
    assert text.count("Decoding 3 tokens") == 2
    assert not [line for line in text.splitlines() if line.startswith(("Start-up", "Answers", "The same"))]
    assert len(plot_ttft(earlier).axes) == 2


@pytest.mark.parametrize("lengths", [(316,), (316, 616)])
@pytest.mark.parametrize("places", [1, 2])
def test_picture(tmp_path, results, lengths, places):
    rows = [row for row in results["rows"] if row["tokens"] in lengths]
    if places == 2:
        rows += [{**row, "chunks_in": "gpu"} for row in rows if row["chunks_in"]]
    figure = plot_ttft({**results, "rows": rows})
    assert figure.dpi == 150
    assert len(figure.axes[2].patches) == 6  # three ways to answer, at two lengths
    figure.savefig(tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})


def test_the_command_writes_its_files(tmp_path):
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "md", "png")}
    outcome = invoke(
        *("--shape", "tiny", "--device", "cpu", "--tokens", "300,100", "--ratios", "0,0.2", "--methods", "chunk_start"),
        *("--repeats", "1", "--chunk", "100", "--decode", "0", "--batch", "2", "--batch-at", "100"),
        *("--json", str(files["json"]), "--markdown", str(files["md"]), "--plot", str(files["png"])),
    )
    assert outcome.exit_code == 0, outcome.output
    written = json.loads(files["json"].read_text())
    assert [row["method"] for row in written["rows"]] == ["full_prefill", "full_reuse", "chunk_start"] * 2
    assert written["decoding"] == written["throughput"] == []
    assert [row["tokens"] for row in written["batching"]] == [164]
    assert len(written["start_up"]) == 1
    assert files["md"].read_text() == markdown(written)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "tiny shape, random weights, float32, sdpa" in outcome.output
    assert "Time to first token, 364 tokens, 1 turns" in outcome.output


def test_a_correction_is_one_of_every_method_that_takes_it():
    settings = BenchSettings(methods=("suffix_attention", "kv_deviation"), ratios=(0.0, 0.15), correction="offset")
    corrections = {str(case): case.method.config(case.ratio).correction for case in settings.cases()}
    assert corrections["suffix_attention 0.15 from gpu"] == "offset"
    assert set(corrections.values()) == {"offset", None}
    assert [name for name, correction in corrections.items() if correction] == ["suffix_attention 0.15 from gpu"]
    assert all(case.through_generate for case in settings.cases())
    both = BenchSettings(methods=("suffix_attention", "suffix_attention_offset"), ratios=(0.15,)).cases()
    assert [case.method.config(0.15).correction for case in both[-2:]] == [None, "offset"]


def test_the_command_takes_a_correction(tmp_path):
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "md")}
    outcome = invoke(
        *("--shape", "tiny", "--device", "cpu", "--tokens", "300", "--ratios", "0.2", "--methods", "chunk_start"),
        *("--repeats", "1", "--chunk", "100", "--decode", "0", "--correction", "offset"),
        *("--json", str(files["json"]), "--markdown", str(files["md"])),
    )
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(files["json"].read_text())["settings"]["correction"] == "offset"
    assert "float32, correction offset, sdpa" in files["md"].read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "tiny", "--correction", "ofset"), "Did you mean 'offset'"),
        (("--shape", "huge"), "no shape 'huge'"),
        (("--shape", "tiny", "--model", "x"), "not both"),
        (("--shape", "tiny", "--methods", "magic"), "Unknown methods: magic"),
        (("--shape", "tiny", "--ratios", "0.1,1.5"), "shares in [0, 1], got [1.5]"),
        (("--shape", "tiny", "--ratios", "much"), "'much'"),
        (("--shape", "tiny", "--tokens", "0"), "A length must be 1 or more, got 0"),
        (("--shape", "tiny", "--tokens", "many"), "'many'"),
        (("--shape", "tiny", "--chunks-in", "attic"), "got attic"),
        (("--shape", "tiny", "--chunks-in", "gpu", "--device", "cpu"), "need a model on a GPU"),
        (
            ("--shape", "tiny", "--methods", "suffix_attention_filler", "--tokens", "300", "--device", "cpu"),
            "tokenizer",
        ),
        (("--shape", "tiny", "--json", "/missing/out.json"), "does not exist"),
        (("--shape", "tiny", "--dtype", "int8"), "got 'int8'"),
        (("--shape", "tiny", "--device", "cpu", "--decode-at", "300"), "some of the lengths (2000,), got [300]"),
        (("--shape", "tiny", "--decode", "1"), "decoded_tokens must be 0, or 2 or more"),
        (("--shape", "tiny", "--device", "cpu", "--attention", "magic"), "Attention 'magic' cannot be measured here"),
        (("--shape", "tiny", "--device", "cpu", "--attention", "sdpa"), "runs with 'sdpa'"),
    ],
)
def test_bad_input_is_said_without_a_stack_trace(arguments, message):
    outcome = invoke(*arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output


def test_a_missing_package_ends_the_command_with_1(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = invoke("--shape", "tiny", "--plot", str(tmp_path / "bench.png"))
    assert outcome.exit_code == 1
    assert "hfblend[plots]" in outcome.output


def test_settings_refuse_what_is_out_of_bounds():
    for changed in ({"decoded_tokens": -1}, {"repeats": 0}, {"ratios": ()}):
        with pytest.raises(ValueError, match=r"or more|none"):
            replace(SETTINGS, **changed)
    with pytest.raises(ValueError, match="chunk must be 1 or more, got 0"):
        Layout(chunk=0)


def test_the_runner_needs_neither_typer_nor_rich():
    for module in (answers, batching, pair, report, runner, start_up, stream, ttft):
        assert not {"typer", "rich", "Console"} & set(vars(module))
