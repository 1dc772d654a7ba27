"""Careless input, in whole kinds: values that are no text, entries that are none, files that cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import signal

import pytest
import torch
from helpers import config, entry, generate, header_of, make_llama, make_prompt, signed
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.cli.prompts import read_prompts
from hfblend.demo import model as demo_model
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore, store_at

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(12)]
KEY = KEYS[0]
NO_TEXTS = [True, 5, None, 1.5, b"x", ["a"], {"a": 1}]


# --- the environment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NO_TEXTS, ids=repr)
@pytest.mark.parametrize("name", ["HFBLEND_ENABLED", "HFBLEND_SEPARATOR", "LMCACHE_EXTRA_CONFIG", "HFBLEND_X", "OTHER"])
def test_variables_are_texts(name, value):
    with pytest.raises(TypeError, match=rf"environ\['{name}'\] must be text, got "):
        hfblend.BlendConfig.from_env({name: value})


@pytest.mark.parametrize("name", [True, 5, None, 1.5, b"x", ("a",)], ids=repr)
def test_names_of_variables_are_texts(name):
    with pytest.raises(TypeError, match="Each name in environ must be text, got "):
        hfblend.BlendConfig.from_env({name: "1"})


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "{", "nonsense", "9" * 10_000 + "x"])
def test_json_that_cannot_be_read_is_named_in_a_line(text):
    with pytest.raises(ValueError, match=r"LMCACHE_EXTRA_CONFIG=.* cannot be read") as error:
        hfblend.BlendConfig.from_env({"LMCACHE_EXTRA_CONFIG": text})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["HFBLEND_SEPARATOR", "LMCACHE_BLEND_SPECIAL_STR"])
@pytest.mark.parametrize("text", ["None", "none", "NONE", ""])
def test_no_separator_in_the_environment(name, text):
    assert hfblend.BlendConfig.from_env({name: text}).separator is None


def test_white_space_is_no_separator():
    with pytest.raises(ValueError, match="visible text"):
        hfblend.BlendConfig.from_env({"HFBLEND_SEPARATOR": "  "})


# --- entries ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk", "remote", "tiers", "tiers of tiers"])
def store(request, tmp_path):
    if request.param == "remote":
        pytest.importorskip("fsspec")
        return RemoteStore("memory://careless/chunks")
    tiers = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    return {
        "memory": MemoryStore(),
        "disk": tiers.stores[1],
        "tiers": tiers,
        "tiers of tiers": TieredStore([MemoryStore(), tiers]),
    }[request.param]


@pytest.mark.parametrize("value", [None, 5, "kv", b"kv", {}, object(), hfblend.ChunkKV, torch.ones(2)])
def test_what_is_no_entry_is_named(store, value):
    with pytest.raises(TypeError, match=r"chunk_kv must be a hfblend\.ChunkKV, got "):
        store.put(KEY, value)
    assert store.open(KEY) is None


def test_an_entry_that_was_opened_may_be_put_elsewhere(store, tmp_path):
    source = DiskStore(tmp_path / "source")
    source.put(KEY, entry())
    store.put(KEY, source.open(KEY))
    assert torch.equal(store.open(KEY).layer(0)[0], entry().layer(0)[0])


# --- tiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "url", "memory"])
def test_every_store_of_patch_pins_counts_and_clears(where, tmp_path):
    if where == "url":
        pytest.importorskip("fsspec")
        from fsspec.implementations.memory import MemoryFileSystem

        MemoryFileSystem.store.clear()
    store = store_at({"folder": str(tmp_path), "url": "memory://careless/tiers", "memory": None}[where])
    assert (len(store), store.num_bytes, store.keys()) == (0, 0, [])
    with pytest.raises(KeyError, match="store it first"):
        store.pin(KEY)
    for key in KEYS:
        store.put(key, entry())
    store.pin(KEY)
    assert sorted(store.keys()) == sorted(KEYS)
    assert len(store) == 12
    assert store.num_bytes > 12 * 64
    for tier in getattr(store, "stores", [store]):
        tier.prune(0) if hasattr(tier, "prune") else None
    assert KEY in store
    store.unpin(KEY)
    store.clear()
    assert (len(store), store.num_bytes, KEY in store) == (0, 0, False)


def test_a_tier_that_cannot_be_cleared_is_named_and_nothing_goes():
    class Foreign:
        def put(self, key, chunk_kv): ...

        def open(self, key): ...

    tiers = TieredStore([MemoryStore(), Foreign()])
    tiers.put(KEY, entry())
    tiers.pin(KEY)
    with pytest.raises(TypeError, match=r"A Foreign has no clear\(\)"):
        tiers.clear()
    assert tiers.keys() == [KEY]


# --- files --------------------------------------------------------------------------------------------------------


def a_trace():
    model = make_llama()
    with hfblend.patch(model, config=config(0.2)) as blender:
        generate(model, make_prompt().inputs())
        return blender.trace


def test_a_trace_that_cannot_be_written_is_an_error_of_the_system(tmp_path):
    trace = a_trace()
    (tmp_path / "file").write_text("")
    places = [tmp_path / "nowhere" / "x", tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300)]
    for place in places:
        with pytest.raises(OSError, match="The trace cannot be written to"):
            trace.save(place)
        with pytest.raises(OSError, match="The trace cannot be written to"):
            trace.save(str(place))


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    """Files may grow to 1 KiB only: a trace is larger."""
    resource = pytest.importorskip("resource")
    trace, limits = a_trace(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match="The trace cannot be written to"):
            trace.save(tmp_path / "call.trace")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


WRONG_PROMPTS = [
    {"question": value, "ctxs": ["w7 w8"]} for value in (5, None, True, ["w9"], {"a": 1}, 1.5)
] + [
    {"chunks": ["w7"], name: value} | ({} if name == "suffix" else {"suffix": "w9"})
    for name in ("prefix", "suffix")
    for value in (5, None, True, ["w9"], {"a": 1})
]  # fmt: skip


@pytest.mark.parametrize("row", WRONG_PROMPTS, ids=json.dumps)
def test_prompts_of_files_are_texts(row, tmp_path, word_tokenizer):
    (tmp_path / "prompt.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"prompt 0: (question|prefix|suffix) must be a text, got "):
        read_prompts(str(tmp_path / "prompt.json"), word_tokenizer)


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, word_tokenizer):
    from hfblend.cli.precompute import prefix_of, texts_of
    from hfblend.lab.eval.data import load_json

    def written(text):
        (tmp_path / "file").write_bytes(b"\xef\xbb\xbf" + text.encode())
        return tmp_path / "file"

    row = '{"question": "w9", "answers": ["w1"], "ctxs": [{"title": "w2", "text": "w7 w8"}]}'
    assert len(read_prompts(str(written(row)), word_tokenizer)) == 1
    assert len(load_json(written(f"[{row}]"))) == len(load_json(written(row))) == 1
    assert list(texts_of(written('"w7"\n'), "text")) == ["w7"]
    assert prefix_of(None, written("w1\n")) == "w1\n"
    monkeypatch.setattr(demo_model, "load", lambda *args, **kwargs: (make_llama(), word_tokenizer))
    result = CliRunner().invoke(app, ["run", "-", "--max-new-tokens", "1"], input="\ufeff" + row)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [["ls", "--json"], ["stat", "--json"], ["verify", "--json"], ["ls"], ["stat"]])
def test_half_a_surrogate_pair_in_a_models_name(words, tmp_path):
    """A file may say anything; what is printed is what any terminal takes."""
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    file = store._folder.read(f"{KEY}.safetensors")
    header, start = header_of(file), 8 + int.from_bytes(file[:8], "little")
    said = dict.fromkeys(["model", "fingerprint", "rope", "ids", "behind"], "m\ud800")
    header["__metadata__"]["origin"] = json.dumps(said)
    store._folder.write(f"{KEY}.safetensors", signed(header, file[start:]))
    result = CliRunner().invoke(app, ["store", *words, str(tmp_path)])
    assert result.exit_code == 0, result.exception
    result.stdout.encode()
    if "--json" in words:
        assert result.stdout.isascii()
        json.loads(result.stdout)


@pytest.mark.parametrize("name", [".pin", ".used", ".safetensors"])
def test_a_folder_with_a_files_name_is_left(name, tmp_path):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    if name == ".safetensors":
        (tmp_path / f"{KEY}.safetensors").unlink()
    (tmp_path / f"{KEY}{name}").mkdir()
    store.remove(KEY)
    store.unpin(KEY)
    store.clear()
    store.prune(0)
    assert [one.name for one in tmp_path.iterdir()] == [f"{KEY}{name}"]
    with pytest.raises((OSError, KeyError)):
        store.pin(KEY)


def test_a_file_that_cannot_be_removed_is_still_said(tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(path, **kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        store.remove(KEY)
