"""What looks after entries, in a folder and behind a URL alike: budgets, pins, lists, origins, `hfblend store`."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from helpers import config, entry, generate, make_llama, make_prompt, same
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.kv.origin import Origin, digest_of
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore
from hfblend.store.folders import RemoteFolder
from hfblend.store.format import CorruptEntry, contents_of, dump, parse
from hfblend.support.registry import model_of

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

KEYS = [f"{i:064x}" for i in range(40)]
KEY = "ab" * 32
SIZE = len(dump(KEY, entry()))
PROMPT = make_prompt()


@pytest.fixture(params=["disk", "memory", "s3"])
def where(request, tmp_path, monkeypatch):
    """A place for a store, empty."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield "s3://bucket/chunks"
    elif request.param == "memory":
        MemoryFileSystem.store.clear()
        yield "memory://chunks"
        MemoryFileSystem.store.clear()
    else:
        yield str(tmp_path / "chunks")


def store_at(where, max_bytes=None):
    if "://" in where:
        return RemoteStore(where, max_bytes)
    return DiskStore(where, "50GB" if max_bytes is None else max_bytes)


def wait_until(happens):
    deadline = time.monotonic() + 5
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happens()


def let_time_pass(where):
    """Until what is used next is younger than what was used before: moto counts in seconds."""
    time.sleep(1.1 if where.startswith("s3") else 0.02)


def names_in(where):
    folder = store_at(where)._folder
    return sorted(one.name for one in folder.files())


def command(*words):
    return CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "80"})


# --- budgets ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(where):
    store = store_at(where, 3 * SIZE + SIZE // 2)
    for key in KEYS[:3]:
        store.put(key, entry())
        let_time_pass(where)
    reader = store_at(where, 3 * SIZE + SIZE // 2)  # another process
    assert same(reader.open(KEYS[0]), entry())
    if "://" in where:
        wait_until(lambda: f"{KEYS[0]}.used" in names_in(where))
    store.put(KEYS[3], entry())
    assert sorted(store.keys()) == [KEYS[0], KEYS[2], KEYS[3]]
    assert store.counts.evicted == 1
    store.put(KEYS[3], entry(seed=1))  # replacing an entry pushes nobody out
    assert len(store) == 3
    assert same(store.open(KEYS[3]), entry(seed=1))
    assert store.num_bytes == 3 * SIZE


def test_what_was_evicted_leaves_nothing_behind(where):
    store = store_at(where, SIZE + SIZE // 2)
    store.put(KEYS[0], entry())
    store_at(where, SIZE).open(KEYS[0])
    if "://" in where:
        wait_until(lambda: f"{KEYS[0]}.used" in names_in(where))
    store.put(KEYS[1], entry())
    assert names_in(where) == [f"{KEYS[1]}.safetensors"]


def test_pinned_entries_stay_and_what_finds_no_room_is_not_kept(where, caplog):
    store = store_at(where, 2 * SIZE + SIZE // 2)
    for key in KEYS[:2]:
        store.put(key, entry())
        store.pin(key)
    store.put(KEYS[2], entry())
    assert "leaves no room" in caplog.text
    assert [one.pinned for one in store.entries()] == [True, True]
    store.unpin(KEYS[0])
    store.put(KEYS[2], entry())
    assert sorted(store.keys()) == [KEYS[1], KEYS[2]]
    store.prune(0)
    assert store.keys() == [KEYS[1]]
    with pytest.raises(KeyError, match="store it first"):
        store.pin(KEYS[0])
    store.remove(KEYS[1])
    assert names_in(where) == []


def test_an_entry_larger_than_the_budget_pushes_nobody_out(where, caplog):
    store = store_at(where, 2 * SIZE)
    store.put(KEYS[0], entry())
    store.put(KEYS[1], entry(tokens=400))
    assert "does not fit" in caplog.text
    assert store.keys() == [KEYS[0]]


def test_a_bucket_that_is_full_is_not_listed_at_every_put(monkeypatch):
    MemoryFileSystem.store.clear()
    listed, files = [], RemoteFolder.files
    monkeypatch.setattr(RemoteFolder, "files", lambda self: listed.append(1) or files(self))
    store = RemoteStore("memory://chunks", 160 * SIZE)
    for i in range(240):
        store.put(f"{i:064x}", entry())
    assert store.counts.evicted > 0
    assert len(listed) < 60  # of 240 puts
    MemoryFileSystem.store.clear()


def test_without_a_budget_nothing_is_marked_or_listed(monkeypatch):
    MemoryFileSystem.store.clear()
    monkeypatch.setattr(RemoteFolder, "files", lambda self: pytest.fail("listed"))
    store = RemoteStore("memory://chunks")
    store.put(KEY, entry())
    assert same(store.open(KEY), entry())
    assert [path.rpartition(".")[2] for path in MemoryFileSystem.store] == ["safetensors"]
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("max_bytes", ["a lot", -1, 1.5])
def test_a_budget_that_is_no_size(max_bytes):
    with pytest.raises(ValueError, match="max_bytes must be"):
        RemoteStore("memory://chunks", max_bytes)


def test_a_bucket_that_cannot_be_listed_costs_reuse_only(monkeypatch, caplog):
    def fail(self, path, **kwargs):
        raise RuntimeError("no listing for you")

    MemoryFileSystem.store.clear()
    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    store = RemoteStore("memory://chunks", 10 * SIZE)
    store.put(KEY, entry())
    assert "could not be given room in memory://chunks" in caplog.text
    assert "no listing for you" in caplog.text
    assert store.open(KEY) is None
    with pytest.raises(OSError, match="no listing for you"):
        store.keys()


def test_a_prompt_answers_alike_whatever_its_remote_evicts():
    MemoryFileSystem.store.clear()
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=MemoryStore()) as blender:
        alone = generate(model, PROMPT.inputs())
        largest = max(blender.store.open(chunk.key).num_bytes for chunk in blender.trace.chunks)
    tight = TieredStore([MemoryStore(0), RemoteStore("memory://chunks", 2 * largest)])
    for _ in range(2):
        with hfblend.patch(model, config=config(0.3), store=tight) as blender:
            assert torch.equal(generate(model, PROMPT.inputs()).sequences, alone.sequences)
            assert blender.trace.blended
    assert tight.stores[1].counts.evicted > 0
    assert tight.stores[1].num_bytes <= 2 * largest
    MemoryFileSystem.store.clear()


# --- where entries come from --------------------------------------------------------------------------------------


def test_entries_say_of_which_model_they_are(where):
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=store_at(where)) as blender:
        generate(model, PROMPT.inputs())
        fingerprint = model_of(model).fingerprint.digest
        chunk = blender.trace.chunks[1]
        found = blender.store.open(chunk.key).origin
    ids = PROMPT.ids[slice(*chunk.span)]
    assert found == model_of(model).origin_of(ids, PROMPT.prefix_ids)
    assert (found.model, found.fingerprint) == ("LlamaForCausalLM", fingerprint)
    assert (found.ids, found.behind) == (digest_of(ids), digest_of(PROMPT.prefix_ids))
    assert json.loads(found.rope) == model.config.rope_parameters
    assert {(one.model, one.fingerprint) for one in store_at(where).entries()} == {("LlamaForCausalLM", fingerprint)}


@pytest.mark.parametrize("name", ["org/model", "/home/somebody/models/model-7b/"])
def test_a_models_name_does_not_tell_where_it_lies(name):
    model = make_llama()
    model.config._name_or_path = name
    assert model_of(model).name == {"org/model": "org/model"}.get(name, "model-7b")


def test_origins_survive_tiers_8_bits_and_contexts(tmp_path):
    origin = Origin("model", "f" * 64, "{}", digest_of([1]), digest_of([]))
    written = replace(entry(), origin=origin)
    tiers = TieredStore([MemoryStore(0), DiskStore(tmp_path / "near"), DiskStore(tmp_path / "far", kv_dtype="int8")])
    tiers.put(KEY, written)
    tiers.flush()
    assert [store.open(KEY).origin for store in tiers.stores[1:]] == [origin, origin]
    assert parse(KEY, dump(KEY, written)).origin == origin
    assert parse(KEY, dump(KEY, entry())).origin is None

    model, store = make_llama(), DiskStore(tmp_path / "in_context")
    with hfblend.patch(model, config=config(0.3, on_miss="in_context"), store=store) as blender:
        generate(model, PROMPT.inputs())
        first = blender.trace.chunks[0]
    behind = PROMPT.ids[: first.span[0]]
    assert store.open(first.key).origin == model_of(model).origin_of(PROMPT.ids[slice(*first.span)], behind)


@pytest.mark.parametrize("said", ["nonsense", "[]", '{"model": "m"}', '"x"', "[" * 5000])
def test_an_origin_that_cannot_be_read_is_a_damaged_header(said, monkeypatch):
    real = json.dumps

    def dumps(value, **kwargs):
        return said if isinstance(value, dict) and "fingerprint" in value else real(value, **kwargs)

    monkeypatch.setattr("hfblend.store.format.json.dumps", dumps)
    file = dump(KEY, replace(entry(), origin=Origin("m", "f", "{}", "i", "b")))
    with pytest.raises(CorruptEntry, match="origin"):
        contents_of(KEY, file, len(file))


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_looks_after_every_place(where):
    store = store_at(where)
    for i, key in enumerate(KEYS[:3]):
        model = Origin(f"model-{i % 2}", f"{i % 2}" * 64, "{}", "", "")
        store.put(key, replace(entry(tokens=4 + i), origin=model))
        let_time_pass(where)
    listed = json.loads(command("ls", where, "--json").stdout)
    assert [(one["key"], one["tokens"], one["model"]) for one in listed] == [
        (KEYS[2], 6, "model-0"), (KEYS[1], 5, "model-1"), (KEYS[0], 4, "model-0"),
    ]  # fmt: skip
    assert KEYS[2][:12] in command("ls", where).stdout
    assert [one["key"] for one in json.loads(command("ls", where, "--model", "1111", "--json").stdout)] == [KEYS[1]]
    found = json.loads(command("stat", where, "--json").stdout)
    assert (found["store"], found["entries"], found["num_bytes"]) == (where, 3, store.num_bytes)
    assert {one["model"]: (one["entries"], one["tokens"]) for one in found["models"]} == {
        "model-0": (2, 10), "model-1": (1, 5),
    }  # fmt: skip
    assert "model-1" in command("stat", where).stdout
    assert "3 of 3 entries are whole" in command("verify", where).stdout
    store._folder.write(f"{KEYS[2]}.safetensors", store._folder.read(f"{KEYS[2]}.safetensors")[:-1] + b"\xff")
    assert list(json.loads(command("verify", where, "--json").stdout)["damaged"]) == [KEYS[2]]
    assert command("verify", where).exit_code == 1
    assert command("pin", where, KEYS[0]).exit_code == 0
    assert command("prune", where, "--max-bytes", "0").exit_code == 0
    assert store.keys() == [KEYS[0]]
    assert command("unpin", where, KEYS[0]).exit_code == 0
    assert command("rm", where, "--model", "model-0").exit_code == 0
    assert names_in(where) == []
    assert "No entries" in command("ls", where).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("ls", "/no/such/folder"), "there is no folder"),
        (("ls", "nowhere://bucket"), "nowhere://bucket"),
        (("rm", "HERE"), "give keys, or --model"),
        (("rm", "HERE", "ab", "--model", "m"), "give keys, or --model"),
        (("rm", "HERE", "--model", "m"), "no entry is of 'm'"),
        (("rm", "HERE", "zz"), "is the beginning of no entry"),
        (("prune", "HERE", "--max-bytes", "much"), "max_bytes must be"),
    ],
)
def test_wrong_uses_are_said_in_words(tmp_path, words, says):
    found = command(*(str(tmp_path) if word == "HERE" else word for word in words))
    assert found.exit_code == 2
    assert says in " ".join(found.output.replace("│", " ").split())
    assert "Traceback" not in found.output


def test_a_remote_that_fails_is_said_in_words(monkeypatch):
    def fail(self, path, **kwargs):
        raise RuntimeError("no route")

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    found = command("ls", "memory://chunks")
    assert (found.exit_code, "no route" in found.output) == (1, True)


def test_a_folder_that_may_not_be_listed_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError("not yours")))
    found = command("ls", tmp_path)
    assert (found.exit_code, "not yours" in found.output) == (1, True)


def test_names_in_files_do_not_act_on_the_terminal(tmp_path):
    origin = Origin("\x1b[31mm[red]", "\x1b]0;f", "{}", "", "")
    DiskStore(tmp_path).put(KEY, replace(entry(), origin=origin))
    for name in ("ls", "stat"):
        found = command(name, tmp_path)
        assert found.exit_code == 0
        assert "\x1b" not in found.output
        assert "␛" in found.output
