"""Readers of files raise what they promise and nothing else, whatever a file has become; what is foreign stays."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict

import pytest
import torch
from helpers import (
    config,
    entry,
    generate,
    header_of,
    make_llama,
    make_prompt,
    places_in,
    signed,
    with_another_value,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.cli.prompts import read_prompts
from hfblend.controller import BlendCost, Cost, LoadCost, Profile
from hfblend.display import Display
from hfblend.lab.eval.data import load
from hfblend.lab.eval.records import Record, RecordFile
from hfblend.store import DiskStore
from hfblend.store.format import dump

SWEEP = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
DEEP = json.loads("[" * 200 + "]" * 200)
VALUES = st.sampled_from(
    [None, True, -1, 0, 1, 3, 2**31, 10**9, 2**63, 2**70, 10**400, 1.5, -1e300, 1e300, float("inf"), float("nan"), "",
     "<b>", "\ud800", "full", "hit", [], [0, 3], [3, 0], [[]], {}, {"a": 1}, {"error": [[["deep"]]]}, DEEP]
)  # fmt: skip
KEYS_OF_ITS_OWN = ("settings", "verification")  # of a trace: objects with any keys
TEXTS = ["", "[" * 100_000, '{"a":' * 100_000, "nonsense", "NaN", "Infinity", "9" * 10_000, '"\\ud800"', "\ufeff{}"]


# --- traces -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Metadata and tensors of a blended call, at the level `"full"`, and of one that was not blended."""
    folder, model, found = tmp_path_factory.mktemp("traces"), make_llama(), []
    with hfblend.patch(model, config=config(0.2), trace="full") as blender:
        for _ in range(2):
            generate(model, make_prompt().inputs())
        blender.trace.decision = hfblend.controller.Decision(0.2, "because", 1.0, 2.0, None, 3.0)
        blender.trace.verification = {"kl": [0.1, float("nan")], "within_bound": True}
        blender.trace.texts = ["t"] * blender.trace.num_tokens
        for trace in (blender.trace, hfblend.BlendTrace(fallback="too_short", num_tokens=5, notes=["a note"])):
            trace.save(folder / "one")
            shown(hfblend.BlendTrace.load(folder / "one"))
            with safe_open(folder / "one", "pt") as file:
                found.append((file.metadata(), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    return folder, found


def shown(trace):
    """All that is made of a trace."""
    assert "<html" in Display(trace).to_html()
    for width in (20, 100):
        Console(file=io.StringIO(), width=width).print(Display(trace))
    assert str(trace)
    assert json.dumps(trace.to_dict())
    assert len(trace.token_columns()["status"]) == trace.num_tokens


def value_or_refusal(read):
    """What it reads, or the words in which it refuses to; whatever else it raises goes through."""
    try:
        return read(), ""
    except ValueError as error:
        return None, str(error)


def shown_or_refused(path):
    trace, refusal = value_or_refusal(lambda: hfblend.BlendTrace.load(path))
    if trace is not None:
        shown(trace)
    else:
        assert "is no trace of hfblend, or a damaged one" in refusal
        assert len(refusal) < 1000


@SWEEP
@given(which=st.integers(0, 1), number=st.integers(0, 10**6), value=VALUES)
def test_a_trace_with_another_value_anywhere_is_shown_or_refused(traces, which, number, value):
    folder, found = traces
    described, tensors = found[which]
    body = json.dumps(with_another_value(json.loads(described["trace"]), number, value))
    save_file(tensors, folder / "call.trace", {**described, "trace": body})
    shown_or_refused(folder / "call.trace")


def test_a_trace_that_lacks_anything_is_refused(traces):
    """A default in its place would say what no call has noted: a chunk that is not exact, or never quantised."""
    folder, found = traces
    described, tensors = found[0]
    body = json.loads(described["trace"])
    named = [way for way in places_in(body) if isinstance(way[-1], str)]
    lacking = [way for way in named if len(way) == 1 or way[0] not in KEYS_OF_ITS_OWN]
    assert {("chunks", 0, "exact"), ("prefix", "quantised"), ("timeline", 0, "layer"), ("decision",)} <= {*lacking}
    for way in lacking:
        save_file(tensors, folder / "call.trace", {**described, "trace": json.dumps(without(body, way))})
        if way == ("fallback_reason",):  # files of earlier versions have none
            assert hfblend.BlendTrace.load(folder / "call.trace").fallback_reason == ""
        else:
            with pytest.raises(ValueError, match=f"is no trace of hfblend.*{way[-1]}"):
                hfblend.BlendTrace.load(folder / "call.trace")


TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 4, 84]), max_size=3),
    st.sampled_from([torch.int64, torch.int8, torch.bool, torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([0, 1, -1, 10**6, float("nan"), float("inf")]),
)


@SWEEP
@given(number=st.integers(0, 20), tensor=TENSORS | st.none())
def test_a_trace_with_other_tensors_is_shown_or_refused(traces, number, tensor):
    folder, found = traces
    described, tensors = found[0]
    name = sorted(tensors)[number % len(tensors)]
    others = {key: value for key, value in tensors.items() if key != name}
    save_file(others | ({} if tensor is None else {name: tensor}), folder / "call.trace", described)
    shown_or_refused(folder / "call.trace")


@SWEEP
@given(number=st.integers(0, 10**9), cut=st.booleans())
def test_a_trace_with_flipped_bits_or_cut_off_is_shown_or_refused(traces, number, cut):
    folder, found = traces
    save_file(found[0][1], folder / "call.trace", found[0][0])
    file = bytearray((folder / "call.trace").read_bytes())
    if cut:
        file = file[: number % len(file)]
    else:
        file[number // 8 % len(file)] ^= 1 << number % 8
    (folder / "call.trace").write_bytes(file)
    shown_or_refused(folder / "call.trace")


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_trace_whose_json_is_none_is_refused(traces, text):
    folder, found = traces
    save_file(found[0][1], folder / "call.trace", {**found[0][0], "trace": text})
    with pytest.raises(ValueError, match="is no trace of hfblend"):
        hfblend.BlendTrace.load(folder / "call.trace")
    with pytest.raises(FileNotFoundError):
        hfblend.BlendTrace.load(folder / "nowhere")


# --- profiles, records, examples, prompts -------------------------------------------------------------------------


@SWEEP
@given(number=st.integers(0, 10**6), value=VALUES)
def test_a_profile_with_another_value_anywhere_computes_or_is_none(tmp_path, number, value):
    file = tmp_path / "profile.json"
    Profile("machine", 4, 1, Cost(1e-2, 1e-6, 1e-9), BlendCost(1e-2, 1.2, 1e-6), {"disk": LoadCost(0, 2e9)}).save(file)
    file.write_text(json.dumps(with_another_value(json.loads(file.read_text()), number, value)), encoding="utf-8")
    found = Profile.load(file)
    if found is not None:
        loads = {"disk": hfblend.controller.Load(1, 1000)} if "disk" in found.tiers else {}
        assert hfblend.controller.Controller(found).decide(hfblend.controller.BlendShape(500, 100, 32), loads)


def test_a_profile_that_lacks_anything_is_none(tmp_path):
    file = tmp_path / "profile.json"
    Profile("machine", 4, 1, Cost(1e-2, 1e-6, 1e-9), BlendCost(1e-2, 1.2, 1e-6), {"disk": LoadCost(0, 2e9)}).save(file)
    body = json.loads(file.read_text())
    for way in places_in(body):
        if way != ("tiers", "disk"):  # one less may have been measured
            file.write_text(json.dumps(without(body, way)), encoding="utf-8")
            assert Profile.load(file) is None, way


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_files_that_are_no_json_are_refused_as_promised_and_stay(tmp_path, text, word_tokenizer):
    file = tmp_path / "file.json"
    content = text.encode("utf-8", "surrogatepass")
    file.write_bytes(content)
    assert Profile.load(file) is None
    for read in (lambda: load(str(file)), lambda: read_prompts(str(file), word_tokenizer)):
        with pytest.raises(ValueError, match=r"file\.json"):
            read()
    if content:
        with pytest.raises(ValueError, match="is not a file of records"):
            RecordFile(file, {"model": "m"})
    assert file.read_bytes() == content


FOREIGN = [
    "my notes",
    '{"a": 1}',
    '[{"question": "q"}]',
    "a\nb",
    "a\n",
    '{"header": 5}\n',
    '{"header": [1]}\nx',
    "{",
    "\n",
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_that_holds_no_records_is_refused_and_stays(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content)
    if not '{"header": {"model": "m"}}\n'.startswith(content):
        with pytest.raises(ValueError, match=r"mine\.json"):
            RecordFile(file, {"model": "m"})
        assert file.read_text() == content


@pytest.mark.parametrize("length", range(0, 27, 3))
def test_a_header_that_was_cut_off_is_written_again(tmp_path, length):
    file = tmp_path / "records.jsonl"
    RecordFile(file, {"model": "m"})
    whole = file.read_text()
    file.write_text(whole[:length])
    RecordFile(file, {"model": "m"})
    assert file.read_text() == whole


@SWEEP
@given(number=st.integers(0, 10**6), value=VALUES)
def test_a_record_with_another_value_is_read_or_refused(tmp_path, number, value):
    file = tmp_path / "records.jsonl"
    line = with_another_value(
        asdict(Record(0, "epic", 0.15, 80, 0.1, 1.0, 5.0, 0.3, "an answer", 1.0, None, None)), number, value
    )
    file.write_text(json.dumps({"header": {}}) + "\n" + json.dumps(line) + "\n")
    records, refusal = value_or_refusal(lambda: RecordFile(file, {}))
    assert records is not None or "holds a line that is no record" in refusal
    for key, found in () if records is None else records.found.items():
        assert key == found.key
        assert isinstance(found.method, str)
        assert isinstance(float(found.kl + found.ttft_ms + found.recomputed_pairs_share), float)


@SWEEP
@given(form=st.integers(0, 1), number=st.integers(0, 100), value=VALUES)
def test_a_prompt_with_another_value_anywhere_is_read_or_refused(tmp_path, word_tokenizer, form, number, value):
    forms = (
        {"prefix": "w1", "chunks": ["w2 w3", {"title": "w4", "text": "w5"}], "suffix": "w6"},
        {"question": "w1", "ctxs": [{"title": "w2", "text": "w3"}]},
    )
    (tmp_path / "prompt.json").write_text(json.dumps(with_another_value([forms[form]], number, value)))
    prompts, refusal = value_or_refusal(lambda: read_prompts(str(tmp_path / "prompt.json"), word_tokenizer))
    assert prompts or "prompt.json" in refusal


# --- a store's lists ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0, 10**6), value=VALUES, used=st.sampled_from([-(2**40), 0, 1e9, 2**40]))
def test_a_folder_with_any_header_is_listed(tmp_path, number, value, used):
    file = dump("ab" * 32, entry(origin=hfblend.kv.origin.Origin("m", "f", "{}", "i", "b")))
    header = with_another_value(header_of(file), number, value)
    store = DiskStore(tmp_path)
    store._path("ab" * 32).write_bytes(signed(header if isinstance(header.get("__metadata__"), dict) else "{}", b""))
    os.utime(store._path("ab" * 32), (used, used))
    for words in (["ls"], ["ls", "--json"], ["stat"], ["stat", "--json"], ["verify"]):
        outcome = CliRunner().invoke(app, ["store", *words, str(tmp_path)])
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
        assert outcome.exit_code == (words == ["verify"]), outcome.output
