"""The simulation of many machines: what must hold whatever the numbers are, and a model that can be solved by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("simulate", ROOT / "benchmarks" / "simulate.py")
simulate = importlib.util.module_from_spec(spec)
sys.modules["simulate"] = simulate
spec.loader.exec_module(simulate)
from simulate import Curve, Held, Measured, Tier, Workload, h200, lru_hit_rate, requests_of, run, zipf  # noqa: E402

pytestmark = pytest.mark.thorough

CHUNK = 100  # bytes, of 10 tokens
LOAD = Workload(requests=400, rate=2.0, documents=200, chunks=4, chunk_tokens=10, other_tokens=10)
UNIT = Measured(Curve((50.0,), (0.4,)), Curve((50.0,), (0.1,)), Curve((50.0,), (0.02,)), 0.1, CHUNK // 10)


def tier(name="RAM", chunks=50, **settings):
    return Tier(name, chunks * CHUNK, **settings)


def served(tiers=None, load=LOAD, measured=UNIT, **settings):
    return run(requests_of(load), load, measured, [tier()] if tiers is None else tiers, **{"filling": 0.0, **settings})


# --- requests -----------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_for_the_same_seed():
    assert requests_of(LOAD) == requests_of(LOAD)
    assert requests_of(LOAD) != requests_of(replace(LOAD, seed=1))


def test_requests_come_at_the_rate_and_have_different_documents():
    stream = requests_of(replace(LOAD, requests=4000))
    assert stream[-1].at == pytest.approx(4000 / LOAD.rate, rel=0.05)
    assert {len(set(one.documents)) for one in stream} == {LOAD.chunks}
    counts = Counter(document for one in stream for document in one.documents)
    assert counts.most_common(1)[0][0] == 0
    assert min(counts) == 0
    assert max(counts) < LOAD.documents


def test_documents_of_a_request_are_of_one_group():
    groups = [{document % 20 for document in one.documents} for one in requests_of(replace(LOAD, groups=20))]
    assert {len(one) for one in groups} == {1}
    assert len(set.union(*groups)) == 20
    with pytest.raises(ValueError, match="all different in groups of 2"):
        requests_of(replace(LOAD, groups=100))


def test_churn_brings_documents_that_were_never_seen():
    assert max(max(one.documents) for one in requests_of(replace(LOAD, churn=2.0))) >= LOAD.documents
    assert served(load=replace(LOAD, churn=5.0)).hit_rate < served().hit_rate


# --- tiers --------------------------------------------------------------------------------------------------------


def test_a_tier_keeps_to_its_budget_and_drops_the_least_recently_used():
    held = Held(tier(chunks=3))
    for key in "abc":
        held.put(key, CHUNK)
    held.use("a")
    held.put("d", CHUNK)
    assert list(held.entries) == ["c", "a", "d"]
    assert held.num_bytes == 3 * CHUNK
    held.put("a", 2 * CHUNK)  # a larger one in its place
    assert list(held.entries) == ["d", "a"]
    held.put("huge", 4 * CHUNK)
    assert list(held.entries) == ["d", "a"]


def test_a_tier_frees_more_than_is_needed():
    held = Held(tier(chunks=32, freed=1 / 16))
    for key in range(33):
        held.put(key, CHUNK)
    assert list(held.entries) == list(range(3, 33))  # room for two more


def test_a_line_that_is_shared_is_waited_for():
    held = Held(tier(bytes_per_s=CHUNK, all_bytes_per_s=2 * CHUNK, latency_s=0.5))
    assert held.seconds(CHUNK, now=10.0) == 1.5
    for _ in range(4):
        held.occupy(CHUNK, 10.0)
    assert held.seconds(CHUNK, now=10.0) == 2.5
    assert held.seconds(CHUNK, now=20.0) == 1.5


def test_a_disks_store_evicts_as_the_simulated_one(tmp_path):
    """The files of a `DiskStore` and the entries of its tier, while chunks come and are found."""
    from entries import entry

    from hfblend.store import DiskStore
    from hfblend.store.format import dump

    one = entry()
    size = len(dump(f"{0:064x}", one))
    store, held = DiskStore(tmp_path, 20 * size), Held(Tier("disk", 20 * size, freed=1 / 16))
    same, chance = 0, np.random.default_rng(0)
    for document in np.searchsorted(np.cumsum(zipf(60, 0.9))[:-1], chance.random(120)):
        key = f"{document:064x}"
        same += (store.open(key) is not None) == (key in held)
        held.use(key)
        if key not in held:
            held.put(key, size)
        if key not in store:
            store.put(key, one)
    assert same >= 0.95 * 120


# --- what holds for every run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", simulate.ROUTERS)
@pytest.mark.parametrize("method", simulate.METHODS)
def test_nothing_is_lost(method, router):
    """Every request is served once, its chunks are found or computed once, and no tier holds more than it may."""
    tiers = (tier("GPU", 5), tier("RAM", 20, bytes_per_s=1e4), tier("Redis", 60, shared=True, all_bytes_per_s=1e4))
    found = served(tiers, replicas=3, method=method, router=router)
    assert [one.at for one in found.records] == [one.at for one in requests_of(LOAD)]
    assert all(one.hits.total() == LOAD.chunks for one in found.records)
    assert all(one.ttft_s >= one.service_s - 1e-9 for one in found.records)
    for held in (held for replica in found.fleet for held in replica.tiers):
        assert held.num_bytes == sum(held.entries.values()) <= held.tier.num_bytes
    assert found.fleet[0].tiers[2] is found.fleet[1].tiers[2]
    assert found.fleet[0].tiers[1] is not found.fleet[1].tiers[1]
    assert 0 < found.utilisation <= 1.01


@pytest.mark.parametrize("method", ["prefix caching", "blending"])
def test_without_room_every_method_is_full_prefill_or_slower(method):
    nothing = (tier(chunks=0),)
    full, found = served(nothing, method="full prefill"), served(nothing, method=method)
    assert found.hit_rate == full.hit_rate == 0
    assert full.gpu_s == pytest.approx(0.4)
    if method == "prefix caching":
        assert found.records == full.records
    else:  # chunks are prefilled by themselves, and blended
        assert found.gpu_s == pytest.approx(4 * 0.1 + 0.1)


def test_no_slower_tier_is_asked_than_computing_is():
    slow = (tier(bytes_per_s=1.0),)
    assert served(slow).gpu_s <= 0.5
    assert served(slow).records[-1].hits == Counter({"": 4})


def test_hits_grow_with_the_budget_and_bring_time():
    found = [served((tier(chunks=chunks),)) for chunks in (10, 40, 100, 200)]
    rates, times = [one.hit_rate for one in found], [one.gpu_s for one in found]
    assert rates == sorted(rates)
    assert times == sorted(times, reverse=True)
    assert rates[-1] > 0.8


@pytest.mark.parametrize(("alpha", "held"), [(0.7, 20), (0.9, 50), (1.1, 100)])
def test_hits_are_those_of_ches_approximation(alpha, held):
    load = replace(LOAD, requests=6000, chunks=1, alpha=alpha)
    found = run(requests_of(load), load, UNIT, (tier(chunks=held),))
    assert found.hit_rate == pytest.approx(lru_hit_rate(zipf(200, alpha), held), abs=0.02)
    assert lru_hit_rate(zipf(200, alpha), 200) == 1


def test_prefix_caching_finds_prompts_that_begin_alike_and_blending_all():
    load = replace(LOAD, documents=4, chunks=4)  # all of them, in another order each time
    prefix, blend = (served(load=load, method=method) for method in ("prefix caching", "blending"))
    assert blend.hit_rate > 0.98
    assert 0.3 < prefix.hit_rate < blend.hit_rate


def test_the_router_by_chunks_beats_turns_on_a_grouped_workload():
    load = replace(LOAD, requests=2000, rate=8.0, documents=800, groups=20)
    by_turns, by_chunks = (
        run(requests_of(load), load, UNIT, (tier(chunks=220),), replicas=4, router=name)
        for name in ("round robin", "most held")
    )
    assert by_chunks.local_rate > by_turns.local_rate + 0.2
    assert by_chunks.ttft_ms(95) < by_turns.ttft_ms(95)
    assert by_chunks.imbalance < 2


def test_a_shared_tier_serves_what_another_replica_computed():
    tiers = (tier(chunks=20), tier("Redis", 200, bytes_per_s=1e5, shared=True))
    alone, shared = (served(those, replicas=4, router="round robin") for those in (tiers[:1], tiers))
    assert shared.hit_rate > alone.hit_rate + 0.2
    assert shared.local_rate <= alone.local_rate + 0.02
    assert shared.hits["Redis"] > 0


# --- time ---------------------------------------------------------------------------------------------------------


def test_a_curve_passes_through_what_was_measured():
    curve = Curve((100.0, 200.0, 400.0), (1.0, 2.0, 8.0))
    assert [curve(tokens) for tokens in (100, 200, 400)] == pytest.approx([1, 2, 8])
    assert curve(800) == pytest.approx(32)
    assert curve(50) == pytest.approx(0.5)
    assert curve(0) == 0


def test_loading_runs_during_selection_or_during_all():
    assert UNIT.with_loading(50, 0.02) == pytest.approx(0.1)
    assert UNIT.with_loading(50, 0.07) == pytest.approx(0.15)
    layerwise = replace(UNIT, layerwise=True)
    assert layerwise.with_loading(50, 0.07) == pytest.approx(0.1)
    assert layerwise.with_loading(50, 0.3) == pytest.approx(0.3)


def test_a_queue_is_that_of_theory():
    """Poisson arrivals, one server, services of one length: Pollaczek and Khinchine's mean wait."""
    load = replace(LOAD, requests=12_000, rate=1.5)
    found = run(requests_of(load), load, UNIT, (), method="full prefill")
    busy = 1.5 * 0.4
    waits = np.mean([one.ttft_s - one.service_s for one in found.records])
    assert waits == pytest.approx(0.4 * busy / (2 * (1 - busy)), rel=0.1)
    assert found.utilisation == pytest.approx(busy, rel=0.05)


def test_the_measured_numbers_predict_what_was_measured_with_chunks_in_ram_and_on_disk():
    """Of the same JSON: TTFT with chunks on the GPU, and loading alone, give TTFT with loading within a tenth."""
    measured = h200()
    for row in simulate.rows_in(simulate.BENCH):
        if row["method"] == "hfblend" and row["ratio"] == 0.15 and row["load_ms"]:
            predicted = 1e3 * measured.with_loading(row["tokens"], row["load_ms"] / 1e3)
            assert predicted == pytest.approx(row["ttft_ms"], rel=0.12), row["tokens"]


def test_the_price_is_that_of_gpus_and_tiers():
    month = 30 * 24 * 3600
    load = replace(LOAD, requests=2, rate=2 / month)
    found = served((Tier("RAM", 10e9, gb_month=2.0),), load=load, replicas=2, method="full prefill")
    months = (found.records[1].at - found.records[0].at) / month
    assert found.cost_of_1000(3.6) == pytest.approx(1000 * (0.4 / 1000 + 2 * 10 * 2.0 * months / 2))


def test_every_scenario_makes_a_table():
    for scenario in simulate.SCENARIOS.values():
        small = replace(scenario, load=replace(scenario.load, requests=40))
        lines = simulate.table(simulate.rows_of(small, h200(), 3.0)).splitlines()
        assert len(lines) == 2 + 1 + 2 * len(scenario.routers)


@pytest.mark.smollm
@pytest.mark.slow
def test_a_check_compares_the_prediction_with_a_real_run():
    """Hits are those that were predicted; times are compared by hand on a quiet machine (docs/scaling.md)."""
    found = simulate.check(replace(simulate.CHECKED, requests=12, chunk_tokens=64))
    predicted, real = found["hit rate"]
    assert predicted == pytest.approx(real, abs=0.06)
    assert all(min(pair) > 0 for pair in found.values())
