"""The trace: levels of detail that never change what is computed, maps, timeline, frame, file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import config, generate, make_llama, make_mistral, make_prompt, store_of_true_kv
from safetensors.torch import load_file, save_file

import hfblend
from hfblend.lab.baselines import LMCacheV1
from hfblend.trace.recorder import relative_deviation
from hfblend.trace.timeline import Interval, PhaseClock, ms_per_phase
from hfblend.trace.tokens import texts_of
from hfblend.util import require

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
LEVELS = ("summary", "tokens", "full")
RULES = {
    "suffix_attention": {},
    "kv_deviation": {"selection": "kv_deviation"},
    "gradual": {"selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.5, 0.2)},
    "chunk_start": {"selection": "chunk_start"},
    "whole": {"layerwise": False},
    "all": {"recompute_ratios": (1.0,)},
    "in_context": {"on_miss": "in_context"},
    "corrected": {"correction": "offset"},
    "corrected_gradual": {
        "correction": "offset", "selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.5, 0.2),
    },
}  # fmt: skip


def blended(level="full", prompt=PROMPT, model=None, store=None, **settings):
    """The result of a warm blend."""
    model, store = model or make_llama(), store or hfblend.MemoryStore()
    settings = config(**{"ratio": 0.2, **settings})
    hfblend.blend(model, prompt, store=store, config=settings)
    return hfblend.blend(model, prompt, store=store, config=settings, trace=level)


# --- it changes nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_mistral])
@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_the_level_never_changes_what_is_computed(make, settings):
    model = make()
    results = [blended(level, model=model, **settings) for level in LEVELS]
    for one in results[1:]:
        assert torch.equal(one.logits, results[0].logits)
        for a, b in zip(one.cache.layers, results[0].cache.layers):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
        assert one.trace.computed_pairs == results[0].trace.computed_pairs
        assert one.trace.selected_idx.tolist() == results[0].trace.selected_idx.tolist()


def test_nor_in_generate():
    outputs = []
    for level in LEVELS:
        model = make_llama()
        with hfblend.patch(model, config=config(0.2), trace=level) as blender:
            outputs.append([generate(model, PROMPT.inputs()) for _ in range(2)][-1])
            assert blender.trace.level == level
            assert blender.trace.ttft_ms > 0
    for one in outputs[1:]:
        assert torch.equal(one.sequences, outputs[0].sequences)
        assert all(torch.equal(a, b) for a, b in zip(one.logits, outputs[0].logits))


# --- levels -----------------------------------------------------------------------------------------------------------


def test_what_each_level_holds():
    summary, tokens, full = (blended(level).trace for level in LEVELS)
    assert summary.input_ids is summary.maps is tokens.maps is None
    assert tokens.input_ids.tolist() == full.input_ids.tolist() == PROMPT.ids
    assert {one.lane for one in tokens.timeline} == {"phase"}
    assert {one.lane for one in full.timeline} == {"phase", "ask", "load", "compute"}
    assert full.settings["selection"] == "suffix_attention"
    assert full.settings["recompute_ratios"] == [0.2]


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="trace must be one of"):
        hfblend.blend(make_llama(), PROMPT, trace="everything")
    with pytest.raises(ValueError, match="trace must be one of"):
        hfblend.patch(make_llama(), trace=True)


def test_a_level_survives_a_lost_entry_and_drafts():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2), trace="full") as blender:
        generate(model, PROMPT.inputs())
        generate(model, PROMPT.inputs(), prompt_lookup_num_tokens=3)
        assert blender.trace.maps is not None
        assert len(blender.trace.input_ids) == blender.trace.num_tokens


# --- maps -------------------------------------------------------------------------------------------------------------


def test_deviation_is_known_where_both_sides_are():
    trace = blended().trace
    known = ~trace.maps.key_deviation.isnan()
    assert known.shape == (4, len(PROMPT))
    assert known.any(0).nonzero()[:, 0].tolist() == trace.selected_idx.tolist()
    assert known[:, trace.selected_idx].all()
    assert torch.equal(known, ~trace.maps.value_deviation.isnan())
    assert trace.maps.key_deviation[0].nan_to_num().max() < 1e-4  # nothing depends on context there
    assert trace.maps.key_deviation[1:].nan_to_num().max() > 0.01


def test_at_a_check_layer_all_candidates_are_known():
    trace = blended(selection="kv_deviation").trace
    known = ~trace.maps.value_deviation.isnan()
    assert known[1].nonzero()[:, 0].tolist() == trace.candidate_idx.tolist()
    assert known[3].nonzero()[:, 0].tolist() == trace.selected_idx.tolist()
    by_map = trace.maps.value_deviation[1, trace.candidate_idx]
    assert by_map.argmax() in trace.scores.topk(5).indices  # a relative figure, but of the same differences


def test_true_kv_deviates_by_rounding_only():
    model = make_llama()
    store = store_of_true_kv(model, PROMPT)
    maps = hfblend.blend(model, PROMPT, store=store, config=config(0.3), trace="full").trace.maps
    assert maps.key_deviation.nan_to_num().max() < 1e-3
    assert maps.value_deviation.nan_to_num().max() < 1e-3


def test_attention_is_that_of_the_scores():
    trace = blended().trace
    layers = range(4 // 3, 4)
    received = trace.maps.attention[list(layers)].mean(0)[trace.candidate_idx]
    assert torch.allclose(received, trace.scores, atol=1e-6)
    assert trace.maps.attention[0].isnan().all()
    assert blended(selection="chunk_start").trace.maps.attention is None


@pytest.mark.parametrize("rule", ["corrected", "corrected_gradual"])
def test_a_corrected_row_is_no_computed_one(rule):
    """Its K/V are another than the stored, and yet no pass computed them."""
    trace = blended(**RULES[rule]).trace
    plain = blended(**{**RULES[rule], "correction": None}).trace
    known, plain_known = (~one.maps.value_deviation.isnan() for one in (trace, plain))
    assert torch.equal(known, plain_known)
    assert known[3].nonzero()[:, 0].tolist() == trace.selected_idx.tolist()


def test_relative_deviation():
    computed = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]]])  # (1, 1, 2, 2)
    reused = torch.tensor([[[[3.0, 3.0], [1.0, 0.0]]]])
    assert relative_deviation(computed, reused).tolist() == [[pytest.approx(0.2), 0.0]]


# --- the correction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("prefix", [7, 0])
@pytest.mark.parametrize(("rule", "first"), [("suffix_attention", 0), ("kv_deviation", 2), ("gradual", 2)])
def test_what_was_added_is_kept_by_layer_and_piece(rule, first, prefix, level):
    prompt = make_prompt(prefix=prefix, separator=(5, 6) if prefix else ())
    model, store, settings = make_llama(), hfblend.MemoryStore(), {"ratio": 0.2, **RULES[rule]}
    blended(level, prompt, model, store, **settings)
    plain, result = (
        hfblend.blend(model, prompt, store=store, config=config(**settings, correction=one), trace=level)
        for one in (None, "offset")
    )
    trace = result.trace
    assert trace.settings["correction"] == "offset"
    assert plain.trace.settings["correction"] is None
    assert plain.trace.offsets is None
    if level == "summary":
        assert trace.offsets is None
        return
    assert trace.offsets.shape == (4, 2, len(trace.pieces)) == (4, 2, len(prompt.chunk_spans) + bool(prefix))
    moved = torch.tensor([not piece.exact for piece in trace.pieces])
    assert 1 < moved.sum() < len(moved) or not prefix
    known = ~trace.offsets.isnan()
    assert torch.equal(known, (torch.arange(4)[:, None, None] >= first) & moved.expand(4, 2, -1))
    rest = set(trace.candidate_idx.tolist()) - set(trace.selected_idx.tolist())
    for number in moved.nonzero()[:, 0].tolist() if rule != "gradual" else ():  # it filtered on after the first layer
        span = range(*trace.pieces[number].span)
        rows = torch.tensor(sorted(rest & set(span)))
        for layer, name in ((first, "keys"), (first, "values"), (3, "values")):
            corrected, reused = (getattr(one.cache.layers[layer], name)[0][:, rows] for one in (result, plain))
            added = (corrected - reused).square().mean().sqrt().item()
            found = trace.offsets[layer, int(name == "values"), number].item()
            assert found == pytest.approx(added, rel=0.15, abs=1e-6)  # found in recomputed tokens' blocks, too
    assert trace.offsets[2:].nan_to_num().max() > 0.05


@pytest.mark.parametrize("level", LEVELS)
def test_a_constant_is_its_own_root_mean_square(level):
    def three(errors):
        return errors.known.new_full((), 3.0).expand(errors.known.shape[0], len(errors.piece), errors.known.shape[2])

    trace = blended(level, correction=three).trace
    assert trace.settings["correction"] == "three"
    if level != "summary":
        assert torch.equal(trace.offsets[:, :, 2:], torch.full((4, 2, 2), 3.0))
        assert trace.offsets[:, :, :2].isnan().all()  # prefix and first chunk are exact


@pytest.mark.parametrize(
    "changes",
    [{"ratio": 0.0}, {"recompute_ratios": (1.0,)}, {"prompt": make_prompt(sizes=(20,))}, {"correction": None}],
)
def test_where_nothing_is_corrected_there_are_no_offsets(changes):
    assert blended(**{"correction": "offset", **changes}).trace.offsets is None


def test_offsets_of_pieces_that_are_no_chunks_are_left_out():
    """Algorithms of the lab reuse other spans, too; no column would be theirs."""
    settings = config(0.3, selection="kv_deviation", correction="offset")
    trace = hfblend.blend(make_llama(), PROMPT, config=settings, algorithm=LMCacheV1, trace="full").trace
    assert trace.settings["correction"] == "offset"
    assert trace.offsets is None


# --- timeline ---------------------------------------------------------------------------------------------------------


def test_layers_lie_inside_their_phases():
    timeline = blended().trace.timeline
    phases = {one.name: one for one in timeline if one.lane == "phase"}
    assert list(phases) == ["look_up", "select", "recompute", "hand_over"]
    of_pass = [one for one in timeline if one.name == "recompute" and one.lane == "compute"]
    assert [one.layer for one in of_pass][:5] == [0, 0, 1, 2, 3]  # up to layer 0's K/V, then from each layer's on
    for one in of_pass:
        assert phases["recompute"].start_ms <= one.start_ms <= one.stop_ms <= phases["recompute"].stop_ms
    assert sorted({one.layer for one in timeline if one.lane == "load"}) == [0, 1, 2, 3]


def test_phases_of_one_name_are_added_up():
    intervals = [Interval("phase", "a", 0, 1), Interval("phase", "b", 1, 3), Interval("phase", "a", 3, 6)]
    assert ms_per_phase([*intervals, Interval("load", "a", 0, 9, 2)]) == {"a": 4, "b": 2}
    clock = PhaseClock(torch.device("cpu"))
    clock.end_of("one")
    clock.end_of("two")
    assert [one.name for one in clock.intervals()] == ["one", "two"]


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_row_per_token(word_tokenizer):
    pytest.importorskip("pandas")
    trace = blended("tokens").trace
    frame = trace.to_frame(word_tokenizer)
    names = "index id text part chunk origin status old_position new_position score selected"
    assert " ".join(frame.columns) == names
    assert len(frame) == len(PROMPT)
    assert frame.id.tolist() == PROMPT.ids
    assert frame.text[0] == word_tokenizer.decode([PROMPT.ids[0]])
    assert frame[frame.selected].index.tolist() == trace.selected_idx.tolist()
    assert (frame[frame.selected].status == "recomputed").all()
    assert frame[frame.score.notna()].index.tolist() == trace.candidate_idx.tolist()
    start, stop = PROMPT.chunk_spans[2]
    assert (frame.part[start:stop] == "chunk").all()
    assert (frame.chunk[start:stop] == 2).all()
    assert frame.old_position[start] == trace.chunks[2].cached_start
    assert frame.new_position[start] == start
    assert frame.part.unique().tolist() == ["prefix", "chunk", "gap", "suffix"]
    assert set(frame.status) == {"exact", "reused", "recomputed", "computed"}


def test_a_frame_of_a_summary_or_of_a_call_that_was_not_blended_has_gaps():
    pytest.importorskip("pandas")
    assert blended("summary").trace.to_frame().id.isna().all()
    model = make_llama()
    with hfblend.patch(model) as blender:
        generate(model, PROMPT.inputs())
        frame = blender.trace.to_frame()
    assert len(frame) == len(PROMPT)
    assert set(frame.status) == {"computed"}


def test_at_ratio_1_nothing_is_exact():
    columns = blended(recompute_ratios=(1.0,)).trace.token_columns()
    assert set(columns["status"]) == {"recomputed", "computed"}


def test_pandas_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[display\]'"):
        blended("tokens").trace.to_frame()
    with pytest.raises(ImportError):
        require("pandas", "pandas", "display", "It needs")


def test_part_of_a_character_is_shown_as_the_tokenizer_writes_it():
    class Bytes:
        def convert_ids_to_tokens(self, i):
            return {1: "âĢ", 2: "▁word", 3: None}[i]

        def decode(self, ids):
            return "".join({1: "\ufffd", 2: "word", 3: "x"}[i] for i in ids)

    assert texts_of(Bytes(), [1, 2, 3, 2]) == ["âĢ", " word", "x", " word"]


def test_a_character_of_several_tokens_stands_at_the_first_of_them():
    class Bytes:
        def convert_ids_to_tokens(self, i):
            return chr(i + 0x100)

        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    assert texts_of(Bytes(), list("a日é".encode())) == ["a", "日", "·", "·", "é", "·"]
    assert texts_of(Bytes(), [0x97, *"日".encode()]) == ["Ɨ", "日", "·", "·"]  # one that begins in its middle
    assert texts_of(Bytes(), list("日".encode()[:2])) == ["Ǧ", "Ɨ"]


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_a_trace_comes_back_from_its_file(tmp_path, level, settings):
    trace = blended(level, **settings).trace
    trace.save(tmp_path / "call.trace")
    again = hfblend.BlendTrace.load(tmp_path / "call.trace")
    assert b'"hfblend.trace.1"' in (tmp_path / "call.trace").read_bytes()  # earlier versions wrote this name
    assert again.to_dict() == trace.to_dict()
    assert again.timeline == trace.timeline
    assert again.chunks == trace.chunks
    assert str(again) == str(trace)
    if settings.get("correction") and level != "summary":
        assert torch.equal(again.offsets.nan_to_num(-1), trace.offsets.nan_to_num(-1))
    for name, values in {} if trace.maps is None else trace.maps.items().items():
        assert torch.equal(getattr(again.maps, name).nan_to_num(-1), values.nan_to_num(-1))


def test_texts_are_saved_where_a_tokenizer_is_known(tmp_path, word_tokenizer):
    model = make_llama()
    with hfblend.patch(model, config=config(0.2), tokenizer=word_tokenizer, trace="tokens") as blender:
        generate(model, PROMPT.inputs())
        blender.trace.save(tmp_path / "call.trace")
        texts = blender.trace.token_texts()
    again = hfblend.BlendTrace.load(tmp_path / "call.trace")
    assert again.tokenizer is None
    assert again.token_texts() == texts
    assert texts[0] == word_tokenizer.decode([PROMPT.ids[0]])


def test_a_call_that_was_not_blended_can_be_saved(tmp_path):
    for trace in (hfblend.BlendTrace(), hfblend.BlendTrace(fallback="too_short", num_tokens=5)):
        trace.save(tmp_path / "call.trace")
        assert hfblend.BlendTrace.load(tmp_path / "call.trace").to_dict() == trace.to_dict()


def test_it_goes_into_json():
    plain = json.loads(json.dumps(blended().trace.to_dict(), allow_nan=False))
    assert plain["maps"]["key_deviation"][0][0] is None
    assert plain["input_ids"] == PROMPT.ids
    assert {one["lane"] for one in plain["timeline"]} == {"phase", "ask", "load", "compute"}


@pytest.fixture
def saved(tmp_path):
    blended().trace.save(tmp_path / "call.trace")
    return tmp_path / "call.trace"


def rewritten(path, change=None, tensors=None):
    """The file with other JSON, other tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        described = file.metadata()
    held = load_file(path) | (tensors or {})
    inner = json.loads(described["trace"])
    if change:
        change(inner)
    save_file(held, path, {**described, "trace": json.dumps(inner)})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("chunks"),
        lambda d: d["chunks"][0].update(span=[0, 10**9]),
        lambda d: d["chunks"][0].update(span="ab"),
        lambda d: d["chunks"][0].update(status="<b>"),
        lambda d: d["chunks"][0].update(surprise=1),
        lambda d: d.update(level="everything"),
        lambda d: d.update(num_tokens=3),
        lambda d: d.update(num_tokens="many"),
        lambda d: d.update(num_tokens=-1),
        lambda d: d.update(texts=["a"]),
        lambda d: d.update(texts=[1] * len(PROMPT)),
        lambda d: d.update(notes=[["a"]]),
        lambda d: d.update(settings=[]),
        lambda d: d["settings"].update(recompute_ratios=["a"]),
        lambda d: d["settings"].update(correction=5),
        lambda d: d["timeline"][0].update(lane="other"),
        lambda d: d["timeline"][0].update(start_ms="soon"),
        lambda d: d["chunks"][0].update(key=5),
        lambda d: d["chunks"][0].update(cached_start="five"),
        lambda d: d.update(ttft_ms="late"),
        lambda d: d.update(decision={"x": 1}),
    ],
)
def test_a_damaged_trace_is_refused(saved, change):
    rewritten(saved, change)
    with pytest.raises(ValueError, match="is no trace of hfblend, or a damaged one"):
        hfblend.BlendTrace.load(saved)


def test_a_trace_of_an_earlier_version_has_no_correction(saved):
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        described = file.metadata()
    earlier = json.loads(described["trace"])
    del earlier["settings"]["correction"]
    tensors = load_file(saved)
    tensors.pop("offsets", None)
    save_file(tensors, saved, {**described, "trace": json.dumps(earlier)})
    trace = hfblend.BlendTrace.load(saved)
    assert trace.offsets is None
    assert "correction" not in trace.settings


@pytest.mark.parametrize(
    "tensors",
    [
        {"selected_idx": torch.tensor([10**6])},
        {"maps.key_deviation": torch.zeros(2)},
        {"offsets": torch.zeros(4, 2, 3)},
        {"offsets": torch.zeros(4, 2, 4, dtype=torch.long)},
    ],
)
def test_damaged_tensors_are_refused(saved, tensors):
    rewritten(saved, tensors=tensors)
    with pytest.raises(ValueError, match="damaged"):
        hfblend.BlendTrace.load(saved)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "file"
    for content in (b"", b"{}", b"not a trace", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no trace of hfblend"):
            hfblend.BlendTrace.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="of no format"):
        hfblend.BlendTrace.load(path)
    with pytest.raises(FileNotFoundError):
        hfblend.BlendTrace.load(tmp_path / "missing")


def test_the_trace_knows_no_display():
    """Its modules name none but the line that says how far work is; tests/test_startup.py sees what is imported."""
    for source in Path(hfblend.__path__[0], "trace").glob("*.py"):
        if source.name == "progress.py":
            continue
        with source.open(encoding="utf-8") as file:
            imports = [line for line in file if line.startswith(("import", "from", "    from"))]
        assert not [line for line in imports if "display" in line or "rich" in line or "matplotlib" in line]
