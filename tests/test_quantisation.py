"""Chunk KV in 8 bits: how far it may be off, that a file of it is checked as any other, and that it is never exact."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers import config, entry, generate, largest_difference, make_llama, make_prompt, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_disk_store import signed
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.generate.precompute import prefill_chunk
from hfblend.kv.rows import RowLayout, full_length_cache
from hfblend.lab.eval.runner import _store_of
from hfblend.lab.settings import EvalSettings
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore
from hfblend.store.format import QUANTISED_FORMAT, CorruptEntry, OtherVersion, contents_of, dump, parse
from hfblend.store.quantise import can_be_quantised, dequantise, quantise
from hfblend.store.tiers import holds

pytestmark = pytest.mark.usefixtures("remembered_proofs")

KEY, PROMPT = "ab" * 32, make_prompt()  # `signed` puts the digest where 32 zeros stand first
LAYOUTS = {"mha": (4, 8, 4, 8), "gqa": (2, 16, 2, 16), "mqa": (1, 8, 1, 8), "mla": (1, 24, 2, 5), "odd": (3, 1, 1, 7)}
both = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])


def largest_error(rows, quantised, layout):
    """(n, W) what quantising may be off by."""
    num_tokens, (keys, values) = len(rows), layout.views(torch.ones(1, len(rows), layout.width))
    key_scales = (keys[0].transpose(0, 1) * quantised.key_scales).reshape(num_tokens, -1)
    value_scales = (values[0].transpose(0, 1) * quantised.value_scales[..., None]).reshape(num_tokens, -1)
    scales = torch.cat((key_scales, value_scales), -1)
    if quantised.rows.dtype == torch.int8:
        return scales / 2
    return torch.maximum(rows.float().abs() / 16, scales / 2**10)


# --- the maths ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
@settings(deadline=None, max_examples=20)
@given(num_tokens=st.integers(1, 40), seed=st.integers(0, 2**31), size=st.sampled_from([1e-6, 1e-2, 1.0, 30.0]))
def test_numbers_are_off_by_no_more_than_the_bound(name, kv_dtype, dtype, num_tokens, seed, size):
    layout, generator = RowLayout(*LAYOUTS[name]), torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tokens, layout.width, generator=generator) * size
    rows[:, 0] *= 100  # keys have channels like that
    rows = rows.to(dtype)
    quantised = quantise(rows, layout, kv_dtype)
    found = dequantise(quantised, layout, dtype)
    assert (found.dtype, found.shape) == (dtype, rows.shape)
    rounding = torch.finfo(dtype).eps * rows.float().abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = largest_error(rows, quantised, layout) * 1.001 + rounding
    assert ((found.float() - rows.float()).abs() <= bound).all()


@both
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3.0, -1e38])
def test_constant_channels_and_extreme_numbers(kv_dtype, value):
    layout = RowLayout(*LAYOUTS["mla"])
    rows = torch.full((5, layout.width), value)
    found = dequantise(quantise(rows, layout, kv_dtype), layout, torch.float32)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, rows, rtol=1e-6, atol=1e-35)


@both
def test_the_largest_numbers_of_half_precision_stay_finite(kv_dtype):
    layout = RowLayout(*LAYOUTS["gqa"])
    for dtype in (torch.float16, torch.bfloat16):
        largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 2.1)
        rows = torch.full((3, layout.width), largest, dtype=torch.float32).to(dtype)
        assert can_be_quantised(rows)
        assert torch.isfinite(dequantise(quantise(rows, layout, kv_dtype), layout, dtype)).all()


@both
def test_quantising_again_changes_nothing(kv_dtype):
    """Tiers hand quantised KV from one store of a kind to another."""
    layout, rows = RowLayout(*LAYOUTS["gqa"]), torch.randn(50, 64).bfloat16()
    once = dequantise(quantise(rows, layout, kv_dtype), layout, torch.bfloat16)
    again = dequantise(quantise(once, layout, kv_dtype), layout, torch.bfloat16)
    assert (again.float() - once.float()).abs().max() <= 2**-7 * once.float().abs().max()


# --- the file -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_in_8_bits_is_read_as_its_dtype(tmp_path, kv_dtype, dtype):
    written = entry(tokens=32, dtype=dtype, behind_ids=[4, 2], regime=99)
    store = DiskStore(tmp_path, kv_dtype=kv_dtype)
    store.put(KEY, written)
    found, whole = store.open(KEY), parse(KEY, store._path(KEY).read_bytes())
    assert same(found, whole)
    for one in (found, whole):
        said = (one.quantised, one.dtype, one.num_bytes, one.layouts, one.behind_ids, one.regime)
        assert said == (kv_dtype, dtype, written.num_bytes, written.layouts, (4, 2), 99)
    keys = found.layer(1)[0]
    assert not torch.equal(keys, written.layer(1)[0])
    assert torch.allclose(keys.float(), written.layer(1)[0].float(), atol=0.2)
    (listed,) = store.entries()
    assert (listed.layers, listed.tokens) == (2, 32)
    assert store.fault_of(KEY) is None


@both
def test_it_is_a_safetensors_file_whose_layers_are_one_block_each(tmp_path, kv_dtype):
    store = DiskStore(tmp_path, kv_dtype=kv_dtype)
    store.put(KEY, entry(tokens=5))
    file = store._path(KEY).read_bytes()
    contents = contents_of(KEY, file, len(file))
    rows = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_dtype]
    with safe_open(store._path(KEY), "pt") as opened:
        assert opened.get_tensor("layer_0001").dtype == rows
        assert opened.get_tensor("key_scales_0001").shape == (2, 8)
        assert opened.get_tensor("value_scales_0001").shape == (5, 2)
        assert opened.metadata()["dtype"] == "F32"
    for i in range(2):
        place = contents.layers[i]
        assert place.stop - place.start == 5 * 32 + 4 * (2 * 8 + 5 * 2)
    assert contents.layers[0].stop == contents.layers[1].start
    assert contents.layers[1].stop == len(file)


@both
def test_layers_that_differ_and_rows_of_odd_width_are_kept(tmp_path, kv_dtype):
    kv = [(torch.randn(1, 1, 7, 3), torch.randn(1, 2, 7, 5)), (torch.randn(1, 2, 7, 1), torch.randn(1, 1, 7, 9))]
    store = DiskStore(tmp_path, kv_dtype=kv_dtype)
    store.put(KEY, hfblend.ChunkKV(full_length_cache(kv), torch.arange(7)))
    found = store.open(KEY)
    for i, (keys, values) in enumerate(kv):
        assert torch.allclose(found.layer(i)[0], keys, atol=0.3)
        assert torch.allclose(found.layer(i)[1], values, atol=0.3)


@both
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_kv_that_8_bits_cannot_hold_is_stored_as_computed(tmp_path, kv_dtype, wrong):
    written = entry(tokens=6)
    written.layer(1)[1][0, 0, 3, 2] = wrong
    store = DiskStore(tmp_path, kv_dtype=kv_dtype)
    store.put(KEY, written)
    found = store.open(KEY)
    assert found.quantised is None
    assert all(torch.equal(a, b) for a, b in zip(found.layer(0), written.layer(0)))
    assert torch.allclose(found.layer(1)[1], written.layer(1)[1], equal_nan=True, rtol=0, atol=0)


@both
def test_every_byte_is_covered(kv_dtype):
    file = dump(KEY, entry(tokens=3, behind_ids=[5]), kv_dtype)
    for place in range(0, len(file), 3):
        damaged = bytearray(file)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(CorruptEntry):
            parse(KEY, bytes(damaged))
    for length in range(0, len(file), 101):
        with pytest.raises(CorruptEntry):
            parse(KEY, file[:length])


# What a header says must hold together even where its digest and its checksums do.
HARM = {
    "no scales": lambda header: header.pop("key_scales_0000"),
    "one layer less": lambda header: header.pop("layer_0001"),
    "scales of integers": lambda header: header["key_scales_0000"].update(dtype="I8"),
    "scales of another shape": lambda header: header["key_scales_0000"].update(shape=[8, 2]),
    "rows of the other kind": lambda header: header["layer_0000"].update(dtype="F8_E4M3"),
    "rows of integers": lambda header: header["layer_0000"].update(dtype="I64"),
    "rows of another shape": lambda header: header["layer_0000"].update(shape=[16, 6]),
    "swapped scales": lambda header: swap(header, "key_scales_0000", "value_scales_0000"),
    "layers apart": lambda header: swap(header, "layer_0000", "layer_0001"),
    "not side by side": lambda header: header["layer_0000"].update(data_offsets=[0, 96]),
    "no dtype": lambda header: header["__metadata__"].pop("dtype"),
    "dtype in 8 bits": lambda header: header["__metadata__"].update(dtype="I8"),
    "another kind": lambda header: header["__metadata__"].update(kv_dtype="fp8"),
    "unknown kind": lambda header: header["__metadata__"].update(kv_dtype="int4"),
    "plain": lambda header: header["__metadata__"].update(format="hfblend-chunk-1"),
    "huge layout": lambda header: header["__metadata__"].update(layouts="[[2,8,2,8],[4611686018427387904,8,2,8]]"),
}  # fmt: skip


def swap(header, one, other):
    places = header[one]["data_offsets"], header[other]["data_offsets"]
    header[other]["data_offsets"], header[one]["data_offsets"] = places


def forged(file, change):
    """A file whose header was changed by somebody who made its digest fit."""
    stop = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:stop])
    change(header)
    header["__metadata__"]["header"] = "0" * 32
    return signed(json.dumps(header, separators=(",", ":")).encode(), file[stop:])


@pytest.mark.parametrize("harm", HARM)
def test_headers_made_to_do_harm_are_refused(harm):
    file = dump(KEY, entry(tokens=3), "int8")
    assert parse(KEY, forged(file, lambda header: None)).quantised == "int8"
    with pytest.raises(CorruptEntry):
        parse(KEY, forged(file, HARM[harm]))


NAMES = ["layer_0000", "key_scales_0000", "value_scales_0000", "cached_positions", "behind_ids"]
PLACE = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["I64", "F32", "I8", "F8_E4M3", "X"]), "shape": st.lists(st.integers(-1, 9), max_size=3),
     "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2)}
)  # fmt: skip


@settings(deadline=None)
@given(
    tensors=st.dictionaries(st.sampled_from(NAMES), PLACE | st.none() | st.integers()),
    said=st.fixed_dictionaries({}, optional={
        "layouts": st.sampled_from(["[[1,1,1,1]]", "[]", "[[0,1,1,1]]", "7"]),
        "kv_dtype": st.sampled_from(["int8", "fp8", "", "X"]),
        "dtype": st.sampled_from(["F32", "BF16", "I8", "X"]),
        "regime": st.sampled_from(["1", "x"]),
        "provenance": st.just("isolated"),
        "checksums": st.just(json.dumps(dict.fromkeys(NAMES, "1" * 32))),
    }),
    data=st.binary(max_size=99),
)  # fmt: skip
def test_files_of_any_header_are_refused(tensors, said, data):
    metadata = {"format": QUANTISED_FORMAT, "key": KEY, **said, "header": "0" * 32}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    with pytest.raises(CorruptEntry):
        parse(KEY, signed(header, data))


# --- which store serves what --------------------------------------------------------------------------------------


def stores_of(kind, place):
    """Stores of one place, by what they keep."""
    if kind == "disk":
        return lambda kv_dtype: DiskStore(place, kv_dtype=kv_dtype)
    pytest.importorskip("fsspec")
    return lambda kv_dtype: RemoteStore(f"file://{place}", kv_dtype=kv_dtype)


@pytest.mark.parametrize("kind", ["disk", "remote"])
@pytest.mark.parametrize("wants", [None, "int8", "fp8"])
@pytest.mark.parametrize("has", [None, "int8", "fp8"])
def test_a_store_serves_its_own_kind_and_none_worse(tmp_path, caplog, kind, has, wants):
    store_of = stores_of(kind, tmp_path)
    store_of(has).put(KEY, entry())
    store = store_of(wants)
    with caplog.at_level(logging.INFO):
        found = store.open(KEY)
    served = has in (None, wants)
    assert (found is not None, holds(store, KEY)) == (served, served)
    if served:
        assert found.quantised == has
        return
    assert f"its KV is in {has}" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert store_of(has).open(KEY) is not None  # passed by, not removed
    store.put(KEY, entry())
    assert store.open(KEY).quantised == wants


@pytest.mark.parametrize("kind", ["disk", "remote"])
def test_a_store_does_not_keep_what_was_in_another_kind(tmp_path, caplog, kind):
    was_int8 = parse(KEY, dump(KEY, entry(), "int8"))
    store_of = stores_of(kind, tmp_path)
    for wants in (None, "fp8"):
        with caplog.at_level(logging.INFO):
            store_of(wants).put(KEY, was_int8)
        assert "was in int8 is not kept" in caplog.text
        assert store_of("int8").open(KEY) is None
        with pytest.raises(ValueError, match="cannot be kept"):
            dump(KEY, was_int8, wants)
    store_of("int8").put(KEY, was_int8)
    assert store_of("int8").open(KEY).quantised == "int8"


def test_versions_before_pass_such_files_by(monkeypatch):
    key = "e" * 64  # a file that this process has not read yet
    file = dump(key, entry(), "int8")
    monkeypatch.setattr("hfblend.store.format.QUANTISED_FORMAT", "hfblend-chunk-3")
    with pytest.raises(OtherVersion):
        parse(key, file)


def test_memory_keeps_the_mark_of_what_it_was_given(tmp_path):
    fast, disk = MemoryStore(), DiskStore(tmp_path, kv_dtype="int8")
    disk.put(KEY, entry())
    tiers = TieredStore([fast, disk])
    found = tiers.open(KEY)
    assert all(found.layer(i) for i in range(2))
    tiers.flush()
    kept = fast.open(KEY)
    assert kept.quantised == "int8"
    assert kept.to("meta").quantised == "int8"


def test_other_kinds_are_refused_when_the_store_is_made(tmp_path):
    for wrong in ("int4", "", "torch.int8"):
        with pytest.raises(ValueError, match="'int8', 'fp8'"):
            DiskStore(tmp_path, kv_dtype=wrong)
        with pytest.raises(ValueError, match="'int8', 'fp8'"):
            EvalSettings(kv_dtype=wrong)


# --- in generate --------------------------------------------------------------------------------------------------


def stock(model):
    return generate(model, {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)})


@both
@pytest.mark.parametrize("chunk_prefix", ["prompt", "none", "bos", "filler"])
def test_ratio_1_equals_full_prefill(tmp_path, kv_dtype, chunk_prefix):
    """Prefix and first chunk, exact in a plain store, are recomputed here."""
    model = make_llama()
    expected, store = stock(model), DiskStore(tmp_path, kv_dtype=kv_dtype)
    chosen = config(1.0, chunk_prefix=chunk_prefix, filler_ids=(9, 8, 7) if chunk_prefix == "filler" else ())
    with hfblend.patch(model, config=chosen, store=store) as blender:
        for hits in (0, 3):
            output = generate(model, PROMPT.inputs())
            trace = blender.trace
            assert trace.blended
            assert trace.hits == hits
            assert largest_difference(output, expected) <= 2e-4
        pieces = [trace.prefix, *trace.chunks]
        assert [(piece.quantised, piece.exact) for piece in pieces] == [(kv_dtype, False)] * 4
        assert f"0 exact, 4 in {kv_dtype})" in str(trace)
        plain = json.loads(json.dumps(trace.to_dict()))
        assert [piece["quantised"] for piece in (plain["prefix"], *plain["chunks"])] == [kv_dtype] * 4
        assert trace.computed_pairs == len(PROMPT) * 4


@pytest.mark.parametrize("missing", ["prefix", "chunks"])
def test_ratio_1_equals_full_prefill_where_some_is_missing(tmp_path, missing):
    """A first chunk prefilled behind a quantised prefix is exact: it must not have seen the quantised KV."""
    model = make_llama()
    expected, store = stock(model), DiskStore(tmp_path, kv_dtype="int8")
    with hfblend.patch(model, config=config(1.0), store=store) as blender:
        generate(model, PROMPT.inputs())
        found = [blender.trace.prefix] if missing == "prefix" else blender.trace.chunks
        for piece in found:
            store.remove(piece.key)
        output = generate(model, PROMPT.inputs())
        assert blender.trace.chunks[0].exact == (missing == "chunks")
        assert blender.trace.chunks[0].quantised == (None if missing == "chunks" else "int8")
        assert largest_difference(output, expected) <= 2e-4


def test_what_is_computed_behind_quantised_kv_does_not_see_it():
    model = make_llama()
    prefix_kv = prefill_chunk(model, PROMPT.prefix_ids)
    quantised = parse(KEY, dump(KEY, prefix_kv, "int8"))
    alone = prefill_chunk(model, PROMPT.chunk_ids[0], PROMPT.prefix_ids)
    behind = prefill_chunk(model, PROMPT.chunk_ids[0], PROMPT.prefix_ids, behind=quantised)
    assert same(alone, behind)


def test_in_context_chunks_behind_a_quantised_prefix_are_not_kept(tmp_path):
    model, chosen = make_llama(), config(0.0, on_miss="in_context")
    store = DiskStore(tmp_path, kv_dtype="int8")
    with hfblend.patch(model, config=chosen, store=store) as blender:
        generate(model, PROMPT.inputs())
        for chunk in blender.trace.chunks:
            store.remove(chunk.key)
        generate(model, PROMPT.inputs())
        assert (blender.trace.prefix.quantised, blender.trace.prefix.exact) == ("int8", False)
        assert not any(chunk.key in store for chunk in blender.trace.chunks)


@both
def test_precomputed_chunks_are_near_those_computed_behind_plain_kv(tmp_path, kv_dtype):
    """The prefix that the store has in 8 bits is not what later chunks are computed behind."""
    model, store, plain = make_llama(), DiskStore(tmp_path, kv_dtype=kv_dtype), MemoryStore()
    for one in (store, plain):
        with hfblend.patch(model, config=config(0.3), store=one) as blender:
            assert blender.precompute(PROMPT.chunk_ids, prefix=PROMPT.prefix_ids).computed == 3
            generate(model, PROMPT.inputs())
            assert blender.trace.hits == 3
    for key in [chunk.key for chunk in blender.trace.chunks]:
        assert same(store.open(key), parse(key, dump(key, plain.open(key), kv_dtype)))


# --- the commands -------------------------------------------------------------------------------------------------


def test_precompute_refuses_an_unknown_kind(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('"one text"\n')
    words = ["precompute", "--corpus", str(corpus), "--store", str(tmp_path / "store"), "--kv-dtype", "int4"]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 2
    assert "'int8', 'fp8'" in " ".join(outcome.output.split())


@both
def test_the_evaluations_store_gives_back_what_a_file_does(kv_dtype):
    written, store = entry(tokens=20), _store_of(kv_dtype, torch.device("cpu"))
    store.put(KEY, written)
    assert same(store.open(KEY), parse(KEY, dump(KEY, written, kv_dtype)))
    assert store.open(KEY).quantised == kv_dtype
    plain = _store_of(None, torch.device("cpu"))
    plain.put(KEY, written)
    assert plain.open(KEY) is written
