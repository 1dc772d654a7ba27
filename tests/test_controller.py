"""The controller: what it forecasts, what it decides, and that a decision never changes what is computed wrongly."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from helpers import entry, generate, make_llama, make_prompt
from typer.testing import CliRunner

import hfblend
from hfblend.config import BlendConfig
from hfblend.controller import BlendCost, BlendShape, Controller, Cost, Load, LoadCost, Profile, Work
from hfblend.measure import profile as profiling
from hfblend.store import DiskStore, MemoryStore
from hfblend.trace.facts import Decision

pytestmark = pytest.mark.usefixtures("remembered_proofs")

LAYERS = 10
PREFILL = Cost(0.01, 1e-6, 1e-9)
EARLY = Profile(
    "a machine", LAYERS, 1, PREFILL, BlendCost(0.01, 1.2, 1e-6), {"ram": LoadCost(0, 50e9), "disk": LoadCost(0, 2e9)}
)
LATE = replace(EARLY, check_layer=None)
PROMPT = BlendShape(10_000, 500, 32)


# --- counting and fitting -------------------------------------------------------------------------------------------


def test_work_is_counted_row_by_row():
    """Against a loop over layers and rows: at ratio 1 the selected rows are all those that are not exact."""
    shape, check = BlendShape(20, 4, 6), 2
    seen = [p + 1 for p in range(20)]
    every = Work.of_blend(shape, 1.0, 5, check)
    assert every == Work(2 * 20 + 3 * 16, 2 * sum(seen) + 3 * sum(seen[4:]))
    none = Work.of_blend(shape, 0.0, 5, None)
    assert none == Work(2 * 5 * 6, 2 * 5 * sum(seen[14:]))
    assert Work.of_prefill(20, 5, exact=4) == Work(5 * 16, 5 * sum(seen[4:]))


def test_a_fit_finds_the_cost_that_made_the_times():
    works = [Work.of_prefill(n, LAYERS) for n in (64, 256, 1024, 4096)]
    found = Cost.fit(works, [PREFILL.seconds(work) for work in works])
    assert [found.fixed, found.per_row, found.per_key] == pytest.approx([0.01, 1e-6, 1e-9], rel=1e-4)
    true = BlendCost(0.002, 1.4, 3e-6)
    shapes = [(BlendShape(n, 0, 32), ratio) for n in (1024, 4096) for ratio in (0.05, 0.3)]
    works = [Work.of_blend(shape, ratio, LAYERS, 1) for shape, ratio in shapes]
    lengths = [shape.tokens for shape, _ in shapes]
    blend = BlendCost.fit(PREFILL, works, lengths, [true.seconds(PREFILL, w, n) for w, n in zip(works, lengths)])
    assert [blend.fixed, blend.slower, blend.per_token] == pytest.approx([0.002, 1.4, 3e-6], rel=1e-3)


def test_entries_cost_beside_their_bytes():
    """Many short chunks load more slowly than few long ones of the same bytes."""
    loads = [Load(8, 10**6), Load(8, 10**8)]
    found = LoadCost.fit(loads, [8e-3 + 1e-3, 8e-3 + 1e-1])
    assert [found.per_entry, found.bytes_per_s] == pytest.approx([1e-3, 1e9], rel=1e-3)
    assert found.seconds(Load(100, 10**8)) > found.seconds(Load(10, 10**8))


def test_a_fit_has_nothing_below_0():
    """Noise makes long prompts look cheaper than short ones: no forecast may fall with the work."""
    works = [Work.of_prefill(n, LAYERS) for n in (64, 256, 1024)]
    found = Cost.fit(works, [0.05, 0.04, 0.03])
    assert min(found.fixed, found.per_row, found.per_key) >= 0
    assert found.seconds(works[0]) <= found.seconds(works[2])


# --- deciding -------------------------------------------------------------------------------------------------------


def test_the_least_ratio_where_computing_hides_loading():
    decision = Controller(EARLY).decide(PROMPT, {"memory": Load(1, 10**12)})
    assert decision.ratio == 0.15
    assert decision.load_ms == 0
    assert decision.ttft_ms == decision.compute_ms < decision.full_ms


def test_loading_hides_more_recomputing():
    """The largest ratio, to a percent: one percent more would take longer than loading."""
    controller = Controller(EARLY)
    decision = controller.decide(PROMPT, {"disk": Load(1, 600_000_000)})
    load = decision.load_ms / 1000
    assert load == 0.3
    assert 0.15 < decision.ratio < 1
    assert controller.compute_s(PROMPT, decision.ratio) <= load < controller.compute_s(PROMPT, decision.ratio + 0.01)
    assert decision.ttft_ms == decision.load_ms
    assert f"{decision.ratio:.0%}" in decision.reason


def test_a_least_ratio_between_two_percents_is_not_rounded_up():
    """What computing half a percent less hides need not hide the next percent."""
    controller = Controller(EARLY, 0.155)
    seconds = (controller.compute_s(PROMPT, 0.155) + controller.compute_s(PROMPT, 0.16)) / 2
    assert controller.decide(PROMPT, {"disk": Load(1, int(2e9 * seconds))}).ratio == 0.155


def test_a_rule_that_waits_for_late_layers_hides_nothing():
    decision = Controller(LATE).decide(PROMPT, {"disk": Load(1, 50_000_000)})
    assert decision.ratio == 0.15
    assert decision.ttft_ms == pytest.approx(decision.compute_ms + decision.load_ms)


@pytest.mark.parametrize("profile", [EARLY, LATE])
def test_a_full_prefill_where_it_is_quicker(profile):
    slow = Controller(profile).decide(PROMPT, {"disk": Load(1, 10**12), "memory": Load(1, 10**12)})
    assert slow.ratio is None
    assert slow.ttft_ms == slow.full_ms
    assert "loading from disk" in slow.reason
    short = Controller(profile, 0.9).decide(BlendShape(64, 0, 32), {"memory": Load(1, 1)})
    assert short.ratio is None
    assert "blending computes" in short.reason


def test_a_tier_that_was_not_measured_gets_the_least_ratio():
    decision = Controller(EARLY).decide(PROMPT, {"remote": Load(1, 10**9)})
    assert (decision.ratio, decision.load_ms, decision.ttft_ms) == (0.15, None, None)
    assert "no rate for remote" in decision.reason


def test_the_cheapest_tier_that_hides_loading():
    controller = Controller(EARLY)
    assert controller.cheapest_tier(PROMPT, Load(1, 10**6)) == "disk"
    assert controller.cheapest_tier(PROMPT, Load(1, 10**9)) == "ram"
    assert controller.cheapest_tier(PROMPT, Load(1, 10**12)) == "memory"
    assert Controller(LATE).cheapest_tier(PROMPT, Load(1, 10**6)) == "memory"


# --- kept ---------------------------------------------------------------------------------------------------------


def test_a_profile_is_kept(tmp_path):
    file = tmp_path / "profiles" / "one.json"
    EARLY.save(file)
    assert Profile.load(file) == EARLY
    assert [one.name for one in file.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"format": "another"}', '{"format": "hfblend-profile-1", "tiers": 1}']
)
def test_what_is_no_profile_is_none(tmp_path, text):
    (tmp_path / "one.json").write_text(text)
    assert Profile.load(tmp_path / "one.json") is None
    assert Profile.load(tmp_path / "another.json") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": 0}, {"layers": "10"}, {"layers": None},
        {"check_layer": 10}, {"check_layer": "1"}, {"check_layer": -1},
        {"prefill": {"fixed": 0, "per_row": math.nan, "per_key": 0}},
        {"prefill": {"fixed": "0", "per_row": 0, "per_key": 0}},
        {"blend": {"fixed": 0, "slower": math.inf, "per_token": 0}},
        {"tiers": {"disk": {"per_entry": 0, "bytes_per_s": 0}}},
        {"tiers": {"disk": {"per_entry": -1, "bytes_per_s": 1}}},
        {"tiers": {"disk": {"per_entry": None, "bytes_per_s": 1}}},
    ],
)  # fmt: skip
def test_a_profile_of_numbers_that_nobody_measured_is_none(tmp_path, wrong):
    """Somebody's editor, or half of a copy: the machine is measured again, and no call of generate fails."""
    file = tmp_path / "one.json"
    EARLY.save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **wrong}))
    assert Profile.load(file) is None


def test_a_profile_that_cannot_be_kept_leaves_nothing_behind(tmp_path):
    (tmp_path / "one.json").mkdir()
    with pytest.raises(OSError, match=r"one\.json"):
        EARLY.save(tmp_path / "one.json")
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]


# --- in a model -----------------------------------------------------------------------------------------------------

AUTO = BlendConfig(selection="kv_deviation", recompute_ratios="auto", min_reused_tokens=0)


class Fixed(Controller):
    """Decides what it is told."""

    def __init__(self, ratio):
        super().__init__(EARLY)
        self.ratio, self.asked = ratio, []

    def decide(self, prompt, loads):
        self.asked.append((prompt, dict(loads)))
        return Decision(self.ratio, "the test says so", 1.0, 1.0, 1.0, 1.0)


def test_auto_needs_a_controller_and_one_check_layer():
    with pytest.raises(ValueError, match="needs a controller"):
        hfblend.blend(make_llama(), make_prompt(), config=AUTO)
    with pytest.raises(ValueError, match="one check layer"):
        BlendConfig(recompute_ratios="auto", check_layers=())
    with pytest.raises(ValueError, match=r"least_ratio must be a number in \[0, 1\], got 2"):
        BlendConfig(least_ratio=2)
    assert BlendConfig.from_env({"HFBLEND_RECOMPUTE_RATIOS": "auto", "HFBLEND_LEAST_RATIO": "0.2"}).is_auto


def test_a_full_prefill_is_that_of_the_stock_model_and_is_noted():
    """Every chunk is found, none is used, nothing is stored again, and the logits are a stock forward's."""
    model, prompt, store = make_llama(), make_prompt(), MemoryStore()
    hfblend.blend(model, prompt, store=store, config=AUTO, controller=Fixed(0.2))
    entries = dict(store._entries)
    result = hfblend.blend(model, prompt, store=store, config=AUTO, controller=Fixed(None))
    with torch.no_grad():
        logits = model(prompt.input_ids).logits[:, -1]
    torch.testing.assert_close(result.logits, logits, rtol=1e-5, atol=1e-5)
    trace = result.trace
    moved = [chunk for chunk in trace.chunks if not chunk.exact]
    assert moved
    assert all(chunk.status == "unused" and chunk.cached_start is None for chunk in moved)
    assert trace.hits == len(trace.chunks)
    assert trace.selected_tokens == 0
    assert "Computed in full: the test says so." in trace.notes
    assert trace.to_dict()["decision"]["reason"] == "the test says so"
    assert store._entries == entries


@pytest.mark.parametrize("selection", ["kv_deviation", "suffix_attention"])
def test_a_decision_is_what_that_ratio_is(selection):
    model, prompt, store = make_llama(), make_prompt(), MemoryStore()
    config, controller = replace(AUTO, selection=selection), Fixed(0.3)
    decided = hfblend.blend(model, prompt, store=store, config=config, controller=controller)
    fixed = hfblend.blend(model, prompt, store=store, config=replace(config, recompute_ratios=(0.3,)))
    assert torch.equal(decided.logits, fixed.logits)
    assert torch.equal(decided.trace.selected_idx, fixed.trace.selected_idx)
    ((shape, loads),) = controller.asked
    assert shape.tokens == len(prompt)
    assert loads == {"memory": Load(1 + len(prompt.chunk_spans), decided.trace.bytes_reused)}
    assert shape.exact + len(decided.trace.candidate_idx) + shape.suffix == len(prompt)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HFBLEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiling, "_LONGEST", 256)
    return tmp_path / "cache"


def test_generate_measures_once_and_says_what_was_decided(tmp_path, cache, monkeypatch):
    """The store is as it was, the profile is found again by the next patch, and `refresh` measures anew."""
    model, prompt, store = make_llama(), make_prompt(), DiskStore(tmp_path / "chunks")
    with hfblend.patch(model, AUTO, store=store) as blender:
        assert len(store) == 0
        (file,) = (cache / "profiles").iterdir()
        output = generate(model, prompt.inputs())
        assert blender.trace.decision is not None
        assert output.sequences.shape[1] > len(prompt)
    found = json.loads(file.read_text())
    assert found["check_layer"] == 1
    assert found["tiers"]
    assert set(found["tiers"]) <= {"disk", "page_cache"}
    assert min(tier["bytes_per_s"] for tier in found["tiers"].values()) > 0
    monkeypatch.setattr(profiling, "measure", None)
    with hfblend.patch(model, AUTO, store=store) as blender:
        assert {tier: asdict(cost) for tier, cost in blender.profile().tiers.items()} == found["tiers"]
        with pytest.raises(TypeError):
            blender.profile(refresh=True)


def test_measuring_pushes_no_chunk_out(tmp_path, cache):
    """Not from a folder that is full, as any is after a while; nor does it leave what a killed process left."""
    model, prompt, folder = make_llama(), make_prompt(), tmp_path / "chunks"
    with hfblend.patch(model, replace(AUTO, recompute_ratios=(0.15,)), store=DiskStore(folder)):
        generate(model, prompt.inputs())
    kept = sorted(path.name for path in folder.iterdir())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = folder / f"hfblend-profile.{gone.pid}.abcd1234"
    DiskStore(left).put("ab" * 32, entry())
    others = [
        "profile.of-before", "profile.abcd1234", f"hfblend-profile.{gone.pid}.abcd1234.mine",
        f"hfblend-profile.{os.getpid()}.abcd1234",
    ]  # fmt: skip
    for name in others:
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("mine")
    (folder / f"hfblend-profile.{gone.pid}.wxyz1234").symlink_to(folder / others[0])
    for name in (left.name, *others):
        os.utime(folder / name, (0, 0))
    store = DiskStore(folder, DiskStore(folder).num_bytes)
    assert profiling.profile_of(model, store, AUTO).tiers
    there = sorted(path.name for path in folder.iterdir())
    assert there == sorted([*kept, *others, f"hfblend-profile.{gone.pid}.wxyz1234"])
    assert all((folder / name / "thesis.txt").exists() for name in others)
    assert store.counts.evicted == 0


def test_a_folder_that_may_only_be_read_is_not_measured(tmp_path, cache, caplog):
    model, prompt, folder = make_llama(), make_prompt(), tmp_path / "mounted"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        with hfblend.patch(model, replace(AUTO, recompute_ratios=(0.15,)), store=DiskStore(folder)):
            generate(model, prompt.inputs())
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with hfblend.patch(model, AUTO, store=DiskStore(folder)) as blender:
            generate(model, prompt.inputs())
            assert blender.trace.hits == len(prompt.chunk_spans)
            assert "no rate for" in blender.trace.decision.reason
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert "DiskStore could not be measured: " in caplog.text


def test_a_store_in_8_bits_has_a_profile_of_its_own(tmp_path, cache):
    model = make_llama()
    for kv_dtype in (None, "int8"):
        profiling.profile_of(model, DiskStore(tmp_path / "chunks", kv_dtype=kv_dtype), AUTO)
    assert len(list((cache / "profiles").iterdir())) == 2


def test_a_call_may_ask_for_auto(cache):
    model, prompt = make_llama(), make_prompt()
    with hfblend.patch(model, replace(AUTO, recompute_ratios=(0.15,))) as blender:
        generate(model, prompt.inputs())
        assert blender.trace.decision is None
        generate(model, prompt.inputs(), blend_config=AUTO)
        assert blender.trace.decision is not None
        assert blender.verify(prompt).kl >= 0


def test_what_a_rule_waits_for():
    assert profiling.check_layer_of(AUTO) == 1
    assert profiling.check_layer_of(BlendConfig()) is None
    assert profiling.check_layer_of(replace(AUTO, selection=lambda evidence: None)) is None
    assert profiling.check_layer_of(replace(AUTO, selection="last")) == 0


def test_the_command_shows_what_would_be_decided(tmp_path, cache, monkeypatch):
    """Every tier at every length; what was measured is measured once; nothing stays in the store."""
    from hfblend.cli import app
    from hfblend.demo import model as demo_model

    monkeypatch.setattr(demo_model, "load", lambda model, device, dtype: (make_llama(), None))
    arguments = ["profile", "--store", str(tmp_path / "chunks"), "--tokens", "600,1200"]
    first = CliRunner().invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.output)
    assert {row["tier"] for row in found["forecasts"]} >= {"memory"} | set(found["profile"]["tiers"])
    assert [row["tokens"] for row in found["forecasts"]][:: len(found["forecasts"]) // 2] == [600, 1200]
    assert sum(row["cheapest_that_hides"] for row in found["forecasts"]) == 2
    assert not list((tmp_path / "chunks").iterdir())
    monkeypatch.setattr(profiling, "measure", None)
    table = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert "1,200" in table.output
    assert "Loading from" in table.output
    refused = CliRunner().invoke(app, ["profile", "--tokens", "5"])
    assert refused.exit_code == 2
    assert "--tokens must be above 32" in refused.output
