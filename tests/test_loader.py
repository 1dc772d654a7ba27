"""Chunks read a layer at a time: ahead of the pass, checked, and given up in its middle when a file fails."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import config, damage, generate, make_llama, make_prompt
from processes import run_copies

import hfblend
from hfblend.kv.chunk import ChunkLost
from hfblend.kv.rows import full_length_cache
from hfblend.store import DiskStore, MemoryStore, TieredStore, loader, sources

PROMPT = make_prompt()
KEYS = [f"{i:064x}" for i in range(8)]


def entry(layers=12, tokens=5):
    kv = [[torch.randn(1, 2, tokens, 8) for _ in range(2)] for _ in range(layers)]
    return hfblend.ChunkKV(full_length_cache(kv), torch.arange(3, 3 + tokens))


def test_layers_are_read_ahead_and_few_are_held(tmp_path):
    store, written = DiskStore(tmp_path), entry()
    store.put(KEYS[0], written)
    found = store.open(KEYS[0])
    assert found.tier_beside(torch.device("cpu")) in ("disk", "page_cache")
    for i in range(found.num_layers):
        keys, values = found.layer(i)
        assert torch.equal(keys, written.layer(i)[0])
        assert torch.equal(values, written.layer(i)[1])
        assert found.layer(i)[0].data_ptr() == keys.data_ptr()  # asked for twice, read once
        run = i // loader.LAYERS_A_READ
        assert set(found._ahead) == ({run + 1} if run < 2 else set())
    assert torch.equal(found.layer(2)[0], written.layer(2)[0])  # and again, from the beginning


def test_a_kept_entry_may_be_asked_for_a_layer_before_those_it_has(tmp_path):
    store, written, whole = DiskStore(tmp_path), entry(layers=12), []
    store.put(KEYS[0], written)
    found = store.open(KEYS[0])
    found.keep(whole.append)
    for i in (3, 11, 0, 1, 2):
        assert torch.equal(found.layer(i)[0], written.layer(i)[0])
    assert not whole


def test_an_entry_is_read_on_when_its_file_is_gone(tmp_path):
    store, written = DiskStore(tmp_path), entry()
    store.put(KEYS[0], written)
    found = store.open(KEYS[0])
    store.clear()
    assert all(torch.equal(found.layer(i)[1], written.layer(i)[1]) for i in range(12))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_threads_are_few_however_many_chunks_are_read(tmp_path):
    store = DiskStore(tmp_path)
    for key in KEYS:
        store.put(key, entry())
    before = threading.active_count()
    for _ in range(3):
        for reader in [store.open(key) for key in KEYS]:
            reader.layer(11)
    assert threading.active_count() <= before + sources.READERS
    del reader
    gc.collect()
    assert not files_in(tmp_path)


def files_in(folder):
    """Those that this process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if name.startswith(str(folder))]


def test_a_layer_that_fails_says_so_and_takes_the_entry_away(tmp_path, caplog):
    store = DiskStore(tmp_path)
    store.put(KEYS[0], entry())
    found = store.open(KEYS[0])
    damage(store, KEYS[0], 8)
    assert found.layer(7)
    with pytest.raises(ChunkLost, match="checksum") as error:
        found.layer(8)
    assert error.value.key == KEYS[0]
    assert KEYS[0] not in store
    assert "prefilled again" in caplog.text


def test_a_chunk_that_was_given_up_is_freed_at_once(tmp_path):
    store = DiskStore(tmp_path)
    store.put(KEYS[0], entry())
    found = store.open(KEYS[0])
    damage(store, KEYS[0], 0)
    gc.disable()
    logging.disable()  # a record holds the error
    try:
        with contextlib.suppress(ChunkLost):
            found.layer(0)
        there = weakref.ref(found)
        del found
        deadline = time.monotonic() + 5  # a thread that reads a layer ahead holds it for a moment
        while there() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert there() is None
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


@pytest.fixture
def _no_collector():
    gc.collect()
    gc.disable()
    logging.disable()  # a record holds the error
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_call_that_is_over_holds_no_file(tmp_path, lost):
    """Nor the layers of a file: a server would gather them until a collector comes by."""
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        generate(model, PROMPT.inputs())
        if lost is not None:
            damage(blender.store, [blender.trace.prefix, *blender.trace.chunks][lost].key, 3)
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 3 - (lost == 1)
        deadline = time.monotonic() + 5  # a thread that reads a layer ahead holds it for a moment
        while (left := files_in(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left


# --- in generate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "layer"), [("suffix_attention", 0), ("suffix_attention", 3), ("kv_deviation", 2)]
)
@pytest.mark.parametrize("layerwise", [True, False])
def test_a_chunk_lost_in_mid_pass_is_prefilled_alone(tmp_path, layer, selection, layerwise):
    model, settings = make_llama(), config(0.3, selection=selection, layerwise=layerwise)
    disk = DiskStore(tmp_path)
    with hfblend.patch(model, config=settings, store=disk) as blender:
        intact = generate(model, PROMPT.inputs())
        chunk = blender.trace.chunks[1]
        selected = blender.trace.selected_idx
        damage(disk, chunk.key, layer)
        output = generate(model, PROMPT.inputs())
        trace = blender.trace
        assert torch.equal(output.sequences, intact.sequences)
        assert torch.equal(trace.selected_idx, selected)
        assert [one.status for one in trace.chunks] == ["hit", "miss", "hit"]
        assert [note for note in trace.notes if chunk.key[:12] in note and "blended again" in note]
        generate(model, PROMPT.inputs())  # what was prefilled again was stored
        assert blender.trace.hits == 3


def test_every_chunk_may_be_lost_and_a_miss_stays_a_miss(tmp_path):
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        intact = generate(model, PROMPT.inputs())
        keys = [chunk.key for chunk in blender.trace.chunks]
        blender.store.remove(keys[0])
        for key in keys[1:]:
            damage(blender.store, key, 3)
        output = generate(model, PROMPT.inputs())
        assert torch.equal(output.sequences, intact.sequences)
        assert [one.status for one in blender.trace.chunks] == ["miss"] * 3


def test_a_damaged_file_that_cannot_be_removed_is_given_up_once(tmp_path, monkeypatch):
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        intact = generate(model, PROMPT.inputs())
        damage(blender.store, blender.trace.chunks[0].key, 3)
        monkeypatch.setattr(DiskStore, "put", lambda *_: None)  # a folder that is only read
        monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        output = generate(model, PROMPT.inputs())
        assert torch.equal(output.sequences, intact.sequences)
        assert [one.status for one in blender.trace.chunks] == ["miss", "hit", "hit"]


@pytest.mark.parametrize("selection", ["suffix_attention", "kv_deviation"])  # which never asks for layer 0
def test_what_is_read_from_disk_is_in_memory_the_next_time(tmp_path, selection):
    model, settings = make_llama(), config(0.3, selection=selection)
    with hfblend.patch(model, config=settings, store=DiskStore(tmp_path)):
        intact = generate(model, PROMPT.inputs())
    fast = MemoryStore()
    with hfblend.patch(model, config=settings, store=TieredStore([fast, DiskStore(tmp_path)])) as blender:
        assert torch.equal(generate(model, PROMPT.inputs()).sequences, intact.sequences)
        assert blender.trace.hits == 3
        assert all(chunk.key in fast for chunk in blender.trace.chunks)


def test_a_failing_disk_costs_reuse_only(tmp_path, monkeypatch):
    """Reads that fail for good, in the middle of every file."""
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        intact = generate(model, PROMPT.inputs())

        def fail(self, buffer, start):
            if len(buffer) > 1000:  # a layer
                raise OSError(5, "Input/output error")
            return fill(self, buffer, start)

        fill = sources.FileSource.fill
        monkeypatch.setattr(sources.FileSource, "fill", fail)
        output = generate(model, PROMPT.inputs())
        assert torch.equal(output.sequences, intact.sequences)
        assert blender.trace.hits == 0
        assert any("Input/output error" in note for note in blender.trace.notes)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_more_chunks_than_files_that_may_be_open_cost_reuse_only(tmp_path):
    import resource

    model, prompt = make_llama(), make_prompt(sizes=[3] * 60)
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        intact = generate(model, prompt.inputs())
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
        try:
            output = generate(model, prompt.inputs())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert torch.equal(output.sequences, intact.sequences)
        assert 10 < blender.trace.hits < 40
        generate(model, prompt.inputs())
        assert blender.trace.hits == 60  # nothing was removed


IN_A_THREAD = """
def late():
    threading.main_thread().join()
    again()

threading.Thread(target=late).start()
"""
WITHOUT_THREADS = """
import resource
if os.geteuid() == 0:  # whom no limit binds
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
again()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits of processes")
@pytest.mark.thorough
def test_where_no_thread_is_to_be_had_the_caller_reads(tmp_path):
    """A thread that outlives the main one cannot start others, nor can a process at its limit."""
    prepared = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import os, threading
import torch; torch.set_num_threads(1)
import hfblend
from hfblend.store import DiskStore, sources
from helpers import config, damage, generate, make_llama, make_prompt

model, prompt = make_llama(), make_prompt()

def begin(folder):
    global blender, intact
    os.mkdir(folder)
    os.chdir(folder)
    os.chmod(".", 0o777)
    blender = hfblend.patch(model, config=config(0.3), store=DiskStore("."))
    intact = generate(model, prompt.inputs())
    damage(blender.store, blender.trace.chunks[0].key, 1)

def again():
    output = generate(model, prompt.inputs())
    print(torch.equal(output.sequences, intact.sequences), [chunk.status for chunk in blender.trace.chunks])
    print(sources._threads()._threads)
"""
    ends = {"late": IN_A_THREAD, "limited": WITHOUT_THREADS}
    for done in run_copies(prepared, [f"begin({str(tmp_path / name)!r})\n{end}" for name, end in ends.items()]):
        assert done.stdout.splitlines() == ["True ['miss', 'hit', 'hit']", "set()"], done.stderr
