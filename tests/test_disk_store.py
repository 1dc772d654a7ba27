"""Chunk KV on disk: what was written is read, and what cannot be trusted is a miss. Faults are made for real."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import xxhash
from helpers import config, damage, entry, generate, header_of, make_llama, make_prompt, same
from helpers import signed as signed_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_script
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.kv.chunk import ChunkLost
from hfblend.kv.rows import full_length_cache
from hfblend.store import DiskStore, MemoryStore, TieredStore, store_at
from hfblend.store.folders import LocalFolder
from hfblend.store.format import FORMAT, CorruptEntry, OtherVersion, contents_of, dump, parse
from hfblend.store.sizes import num_bytes_of
from hfblend.store.sources import FileSource

resource = pytest.importorskip("resource", reason="needs fork and limits of a POSIX system")
KEYS = [f"{i:064x}" for i in range(200)]
KEY = "ab" * 32  # not all zeros, which stand for the digest while it is taken


def read(store, key):
    """The entry, every layer of it checked; `None` where the store has none that can be trusted."""
    found = store.open(key)
    try:
        return found if found is None or all(found.layer(i) for i in range(found.num_layers)) else None
    except ChunkLost:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(tmp_path, dtype):
    written = entry(dtype=dtype, provenance="in_context", behind_ids=[7, 1, 9], regime=300)
    DiskStore(tmp_path).put(KEY, written)
    store = DiskStore(tmp_path)  # as another process would
    assert same(store.open(KEY), written)
    assert KEY in store
    assert len(store) == 1
    assert store.open(KEYS[1]) is None
    store.clear()
    assert (len(store), store.num_bytes) == (0, 0)


def test_unequal_layers_are_kept_as_they_are(tmp_path):
    kv = [(torch.randn(1, 1, 4, 48), torch.randn(1, 1, 4, 16)), (torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8))]
    written = hfblend.ChunkKV(full_length_cache(kv), torch.arange(4))
    store = DiskStore(tmp_path)
    store.put(KEY, written)
    assert same(store.open(KEY), written)


# --- faults -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    """1,000 of them: in the header's length, in the header, and in every tensor; by both ways of reading."""
    whole, draw, store = entry(behind_ids=[5, 6]), random.Random(0), DiskStore(tmp_path)
    file = dump(KEY, whole)
    assert same(parse(KEY, file), whole)
    header_stop, contents = 8 + int.from_bytes(file[:8], "little"), contents_of(KEY, file, len(file))
    regions = [(0, 8), (8, header_stop), *((place.start, place.stop) for place in contents.places.values())]
    assert sum(stop - start for start, stop in regions) == len(file)
    places = [draw.randrange(*regions[i % len(regions)]) for i in range(1000)]
    for place in places:
        damaged = bytearray(file)
        damaged[place] ^= 1 << draw.randrange(8)
        with pytest.raises((CorruptEntry, OtherVersion)) as found:
            parse(KEY, bytes(damaged))
        assert found.type is CorruptEntry
        store._path(KEY).write_bytes(damaged)
        assert read(store, KEY) is None
    assert store.counts.damaged == 1000
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_or_lengthened_file_is_found():
    file = dump(KEY, entry())
    for length in (0, 1, 7, 8, 9, 100, *range(200, len(file), 97), len(file) - 1):
        with pytest.raises(CorruptEntry):
            parse(KEY, file[:length])
    with pytest.raises(CorruptEntry):
        parse(KEY, file + b"\0")


def test_a_file_under_another_key_or_of_another_version_is_not_read(tmp_path, monkeypatch, caplog):
    file = dump(KEY, entry())
    with pytest.raises(CorruptEntry, match="stored under"):
        parse(KEYS[1], file)
    monkeypatch.setattr("hfblend.store.format.FORMAT", "hfblend-chunk-0")
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    monkeypatch.setattr("hfblend.store.format.FORMAT", FORMAT)
    with caplog.at_level(logging.INFO):
        assert store.open(KEY) is None
    assert "hfblend-chunk-0" in caplog.text
    assert KEY in store  # it may be another version's; it is only passed by


def test_hostile_headers_are_refused():
    for header in (
        b"",
        b"{}",
        b"[" * 5000,
        b'{"__metadata__":{}}',
        b"\xff" * 90,
        b'{"__metadata__":{"header":"' + b"0" * 32,
    ):
        for length in (len(header), 0, 2**63, len(header) + 5):
            with pytest.raises(CorruptEntry):
                parse(KEY, length.to_bytes(8, "little") + header)


def signed(header, data=b""):
    """A file whose header has the right digest, as somebody would write who means harm."""
    digest = xxhash.xxh3_128_hexdigest(len(header).to_bytes(8, "little") + header)
    return len(header).to_bytes(8, "little") + header.replace(b"0" * 32, digest.encode(), 1) + data


TEXT = st.text("ab01[]{},:", max_size=8) | st.sampled_from([FORMAT, KEY, "{}", "[]", "[[1,2,3,4]]"])
WORDS = st.none() | st.booleans() | st.integers() | TEXT
TREES = st.recursive(WORDS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8)
PLACE = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["I64", "F32", "X"]), "shape": st.lists(st.integers(-1, 2**62), max_size=3),
     "data_offsets": st.lists(st.integers(-1, 2**62), min_size=2, max_size=2)}
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    metadata=st.dictionaries(st.sampled_from(["layouts", "checksums", "provenance", "regime", "format", "key"]), TREES),
    tensors=st.dictionaries(st.sampled_from(["layer_0000", "cached_positions", "behind_ids"]), PLACE | TREES),
    data=st.binary(max_size=64),
)
def test_files_made_to_do_harm_are_refused(metadata, tensors, data):
    metadata = {"format": FORMAT, "key": KEY, **metadata, "header": "0" * 32}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    with pytest.raises((CorruptEntry, OtherVersion)):
        parse(KEY, signed(header, data))


FORMS = ['[{"header":"%s"}]', '{"__metadata__":"\\"","header":"%s"}', '{"a":{"header":"%s"}}', '{"header":"%s"']


@pytest.mark.parametrize("header", FORMS)
def test_headers_of_another_form_are_refused(header):
    with pytest.raises(CorruptEntry):
        parse(KEY, signed((header % ("0" * 32)).encode()))


def test_a_damaged_file_is_removed_and_said(tmp_path, caplog):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    assert read(store, KEY) is None
    assert "damaged" in caplog.text
    assert not path.exists()


def test_a_folder_that_cannot_be_written_costs_reuse_only(tmp_path, caplog):
    store = DiskStore(tmp_path / "chunks")
    (tmp_path / "chunks").rmdir()
    (tmp_path / "chunks").write_text("a file")
    store.put(KEY, entry())
    assert "could not be given room in" in caplog.text
    assert store.open(KEY) is None
    assert (tmp_path / "chunks").read_text() == "a file"


@pytest.mark.parametrize("max_bytes", ["50GB", 100_000])
def test_a_folder_that_is_removed_comes_back_with_the_next_put(tmp_path, max_bytes, caplog):
    store = DiskStore(tmp_path / "some" / "chunks", max_bytes)
    store.put(KEYS[1], entry())
    shutil.rmtree(tmp_path / "some")
    assert store.open(KEYS[1]) is None
    assert (len(store), store.num_bytes) == (0, 0)
    store.put(KEY, entry())
    assert same(store.open(KEY), entry())
    assert caplog.text == ""


def in_a_fork(work):
    """Runs `work` in a child of this warm process; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A limit on the size of files stands for it: the write fails in its middle."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        store = DiskStore(tmp_path)
        store.put(KEY, entry(tokens=200))
        assert KEY not in store
        assert store.open(KEY) is None

    assert succeeded(in_a_fork(work))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            yield tmp_path
            subprocess.run(["umount", str(tmp_path)], check=True)
            return
    pytest.skip("needs the right to mount")


def test_a_disk_that_fills_up_keeps_what_it_has(small_disk, caplog):
    store = DiskStore(small_disk)
    for i, key in enumerate(KEYS[:60]):
        store.put(key, entry(tokens=60, seed=i))
    kept = [i for i, key in enumerate(KEYS[:60]) if key in store]
    assert 3 <= len(kept) < 60
    assert "No space left" in caplog.text
    assert store.counts.failed == 60 - len(kept)
    assert all(same(store.open(KEYS[i]), entry(tokens=60, seed=i)) for i in kept)
    assert not list(small_disk.glob("*.tmp"))


def test_generate_answers_on_a_full_disk(small_disk):
    (small_disk / "others").write_bytes(bytes(250 * 1024))
    model = make_llama()
    with hfblend.patch(model, config=config(0.3)) as blender:
        intact = [generate(model, PROMPT.inputs()) for _ in range(2)]
    for store in (DiskStore(small_disk), small_disk):
        with hfblend.patch(model, config=config(0.3), store=store) as blender:
            for expected in intact:
                assert torch.equal(generate(model, PROMPT.inputs()).sequences, expected.sequences)
    assert blender.store.stores[1].counts.failed > 0
    assert not list(small_disk.glob("*.tmp"))


def test_a_folder_that_may_only_be_read_is_read(tmp_path):
    def work():
        os.chdir(tmp_path)
        if os.geteuid() == 0:  # who may write everywhere
            os.setgid(65534)
            os.setuid(65534)
        store = DiskStore(".")
        store.put(KEYS[1], entry())
        assert store.counts.failed == 1
        assert store.open(KEYS[1]) is None
        assert same(store.open(KEY), entry(seed=3))
        store.prune()

    DiskStore(tmp_path).put(KEY, entry(seed=3))
    tmp_path.chmod(0o555)
    assert succeeded(in_a_fork(work))
    tmp_path.chmod(0o755)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("times", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_write_nothing_half_is_seen_and_nothing_stored_is_lost(tmp_path, times):
    entries = {key: entry(tokens=600, seed=i) for i, key in enumerate(KEYS[:5])}
    draw = random.Random(0)

    def work(told):
        store = DiskStore(tmp_path)
        while True:
            for i, (key, one) in enumerate(entries.items()):
                store.put(key, one)
                os.write(told, bytes([i]))

    found, stored = 0, set()
    for _ in range(times):
        ear, mouth = os.pipe()
        pid = in_a_fork(lambda mouth=mouth: work(mouth))
        first = os.read(ear, 1)  # by then it is at work, however busy the machine is
        time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(mouth)
        stored.update(KEYS[i] for i in first + os.read(ear, 65536))
        os.close(ear)
        store = DiskStore(tmp_path)
        for key in entries:
            assert key in store or key not in stored
            if key in store:
                assert same(store.open(key), entries[key])
                found += 1
    assert found > times
    assert stored
    for path in tmp_path.glob("*.tmp"):
        os.utime(path, (0, 0))
    DiskStore(tmp_path).put(KEYS[0], entries[KEYS[0]])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * len(store)


@pytest.mark.thorough
def test_eight_processes_share_200_chunks_of_a_folder_while_one_prunes(tmp_path):
    entries = {key: entry(seed=i) for i, key in enumerate(KEYS)}
    size = len(dump(KEYS[0], entries[KEYS[0]]))

    def work(seed):
        draw, found = random.Random(seed), 0
        store = DiskStore(tmp_path, max_bytes=10**9 if seed else 60 * size)
        for _ in range(600):
            key = draw.choice(KEYS)
            if seed == 0:
                store.prune()
                assert store.num_bytes < 10**9
            elif draw.random() < 0.4:
                store.put(key, entries[key])
            else:
                chunk_kv = store.open(key)
                assert chunk_kv is None or same(chunk_kv, entries[key])
                found += chunk_kv is not None
        assert seed == 0 or found > 50
        assert store.counts.damaged == store.counts.failed == 0

    children = [in_a_fork(lambda seed=seed: work(seed)) for seed in range(8)]
    assert [succeeded(pid) for pid in children] == [True] * 8
    store = DiskStore(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert all(same(store.open(one.key), entries[one.key]) for one in store.entries())


def test_an_entry_that_could_not_be_read_once_stays(tmp_path, monkeypatch, caplog):
    store, fill = DiskStore(tmp_path), FileSource.fill
    store.put(KEY, entry())
    found = store.open(KEY)

    def fail(self, buffer, start):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileSource, "fill", fail)
    with pytest.raises(ChunkLost, match="Input/output error"):
        found.layer(0)
    assert "could not be read" in caplog.text
    assert (store.counts.failed, store.counts.damaged) == (1, 0)
    monkeypatch.setattr(FileSource, "fill", fill)
    assert same(store.open(KEY), entry())


# --- budget, names, places ----------------------------------------------------------------------------------------


def test_least_recently_used_goes_first(tmp_path):
    size = len(dump(KEY, entry()))
    store = DiskStore(tmp_path, max_bytes=2 * size + size // 2)
    for i, key in enumerate(KEYS[:2]):
        store.put(key, entry())
        os.utime(store._path(key), (i, i))
    store.open(KEYS[0])
    store.put(KEYS[2], entry())
    assert [key in store for key in KEYS[:3]] == [True, False, True]
    store.put(KEYS[2], entry())  # replacing an entry pushes nobody out
    assert [key in store for key in KEYS[:3]] == [True, False, True]


def test_what_was_used_while_a_clock_was_ahead_goes_in_its_turn(tmp_path):
    size = len(dump(KEY, entry()))
    store, ahead = DiskStore(tmp_path, max_bytes=2 * size), time.time() + 3e9
    store.put(KEYS[0], entry())
    os.utime(store._path(KEYS[0]), (ahead, ahead))
    for key in KEYS[1:3]:
        store.put(key, entry())
    assert sorted(store.keys()) == KEYS[1:3]


def test_an_entry_larger_than_the_budget_is_not_kept_and_said(tmp_path, caplog):
    store = DiskStore(tmp_path, max_bytes=100)
    store.put(KEY, entry())
    assert len(store) == 0
    assert "does not fit" in caplog.text


@pytest.mark.parametrize("key", ["../" + "0" * 61, "a", "", "G" * 64, "0" * 64 + "/x", "0" * 64 + "\n"])
def test_keys_cannot_leave_the_folder(tmp_path, key):
    store = DiskStore(tmp_path)
    for use in (store.open, lambda k: store.put(k, entry()), store.__contains__):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            use(key)


def test_links_are_not_followed(tmp_path, caplog):
    other, store = DiskStore(tmp_path / "other"), DiskStore(tmp_path / "mine")
    other.put(KEY, entry())
    store._path(KEY).symlink_to(other._path(KEY))
    assert store.open(KEY) is None
    assert len(store) == 0
    store.clear()
    assert KEY in other


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("512 MiB", 512 * 2**20), ("1.5kb", 1500), ("7", 7), (12, 12), ("2Ti", 2**41)],
)
def test_sizes(text, expected):
    assert num_bytes_of(text) == expected


def test_tiers_fill_the_faster_from_the_slower(tmp_path):
    disk, fast = DiskStore(tmp_path), MemoryStore()
    first = TieredStore([MemoryStore(), disk])
    first.put(KEY, entry())
    first.flush()
    tiers = TieredStore([fast, disk])
    found = tiers.open(KEY)
    assert KEY not in fast  # nothing of it has been read yet
    assert same(found, entry())
    assert KEY in fast
    disk.clear()
    assert same(tiers.open(KEY), entry())
    assert tiers.open(KEYS[1]) is None
    with pytest.raises(ValueError, match="one or more stores"):
        TieredStore([])


def test_places_as_users_name_them(tmp_path):
    assert isinstance(store_at(None), MemoryStore)
    assert [type(store) for store in store_at(str(tmp_path)).stores] == [MemoryStore, DiskStore]
    own = MemoryStore()
    assert store_at(own) is own


# --- the command --------------------------------------------------------------------------------------------------


def command(*words):
    return CliRunner().invoke(app, ["store", *map(str, words)])


def a_store(folder):
    store = DiskStore(folder)
    for i, key in enumerate(KEYS[:3]):
        store.put(key, entry(tokens=4 + i))
        os.utime(store._path(key), (i, i))
    return store


def test_ls_and_stat_tell_what_is_there(tmp_path):
    store = a_store(tmp_path)
    listed = json.loads(command("ls", tmp_path, "--json").stdout)
    assert [one["key"] for one in listed] == KEYS[2::-1]
    newest = {name: listed[0][name] for name in ("tokens", "layers", "dtype", "provenance")}
    assert newest == {"tokens": 6, "layers": 2, "dtype": "F32", "provenance": "isolated"}
    assert KEYS[2][:12] in command("ls", tmp_path).stdout
    found = json.loads(command("stat", tmp_path, "--json").stdout)
    assert (found["entries"], found["tokens"], found["num_bytes"]) == (3, 15, store.num_bytes)
    assert "15" in command("stat", tmp_path).stdout
    store._path(KEY).write_bytes(b"nonsense")
    assert json.loads(command("stat", tmp_path, "--json").stdout)["unreadable_headers"] == 1
    assert command("ls", tmp_path).exit_code == 0


def test_verify_finds_a_planted_fault(tmp_path):
    store = a_store(tmp_path)
    whole = command("verify", tmp_path)
    assert (whole.exit_code, "3 of 3 entries are whole" in whole.stdout) == (0, True)
    content = bytearray(store._path(KEYS[1]).read_bytes())
    content[-1] ^= 128
    store._path(KEYS[1]).write_bytes(content)
    found = command("verify", tmp_path, "--json")
    assert found.exit_code == 1
    assert list(json.loads(found.stdout)["damaged"]) == [KEYS[1]]
    assert "2 of 3" in command("verify", tmp_path).stdout
    assert KEYS[1] in store  # told, not removed


def test_prune_and_rm(tmp_path):
    store = a_store(tmp_path)
    assert command("prune", tmp_path, "--max-bytes", store.num_bytes - 1).exit_code == 0
    assert [key in store for key in KEYS[:3]] == [False, True, True]
    assert command("rm", tmp_path, KEYS[1]).exit_code == 0
    assert [key in store for key in KEYS[:3]] == [False, False, True]
    assert command("rm", tmp_path, "f" * 5).exit_code == 2
    assert command("prune", tmp_path, "--max-bytes", "a lot").exit_code == 2
    assert command("ls", tmp_path / "nowhere").exit_code == 2


# --- generate -----------------------------------------------------------------------------------------------------

PROMPT = make_prompt()


def test_a_second_process_reuses_what_the_first_one_stored(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import hfblend
from helpers import config, generate, make_llama, make_prompt
model = make_llama()
with hfblend.patch(model, config=config(0.3), store={str(tmp_path)!r}) as blender:
    output = generate(model, make_prompt().inputs())
    print(blender.trace.hits, output.sequences[0].tolist())
"""
    runs = [run_script(script) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    (cold, first), (warm, second) = (run.stdout.strip().split(" ", 1) for run in runs)
    assert (cold, warm) == ("0", "3")
    assert first == second


@pytest.mark.parametrize("fault", ["flip", "truncate", "remove", "empty"])
def test_generate_answers_as_with_an_intact_store(tmp_path, fault):
    model = make_llama()
    with hfblend.patch(model, config=config(0.3), store=str(tmp_path)) as blender:
        intact = generate(model, PROMPT.inputs())
    damaged = store_at(str(tmp_path)).stores[1]._path(blender.trace.chunks[1].key)
    content = damaged.read_bytes()
    if fault == "flip":
        damaged.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif fault == "remove":
        damaged.unlink()
    else:
        damaged.write_bytes(content[: len(content) // 2 if fault == "truncate" else 0])
    with hfblend.patch(model, config=config(0.3), store=tmp_path) as blender:
        output = generate(model, PROMPT.inputs())
        assert (blender.trace.hits, blender.trace.misses) == (2, 1)
        assert torch.equal(output.sequences, intact.sequences)
    assert damaged.read_bytes()[8:] != b""  # written again
    assert same(DiskStore(tmp_path).open(damaged.stem), blender.store.open(damaged.stem))


def test_pinned_entries_stay_until_they_are_let_go(tmp_path, caplog):
    size = len(dump(KEY, entry()))
    store = DiskStore(tmp_path, max_bytes=2 * size + size // 2)
    store.put(KEYS[0], entry())
    os.utime(store._path(KEYS[0]), (0, 0))
    runner = CliRunner()
    assert "Pinned" in runner.invoke(app, ["store", "pin", str(tmp_path), KEYS[0]]).output
    for key in KEYS[1:4]:
        store.put(key, entry())
    assert KEYS[0] in store
    assert len(store) == 2
    (listed,) = [one for one in store.entries() if one.pinned]
    assert listed.key == KEYS[0]
    assert "pinned" in runner.invoke(app, ["store", "ls", str(tmp_path)], env={"COLUMNS": "160"}).output
    assert "Unpinned" in runner.invoke(app, ["store", "unpin", str(tmp_path), KEYS[0]]).output
    os.utime(store._path(KEYS[0]), (0, 0))
    store.put(KEYS[5], entry())
    assert KEYS[0] not in store
    with pytest.raises(KeyError, match="store it first"):
        store.pin(KEYS[0])
    store.pin(KEYS[5])
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_pinned_entries_of_memory_stay(caplog):
    one = entry()
    store = MemoryStore(max_bytes=one.held_bytes * 2)
    store.put(KEYS[0], one)
    store.pin(KEYS[0])
    for key in KEYS[1:4]:
        store.put(key, entry())
    assert KEYS[0] in store
    assert KEYS[3] in store
    assert len(store) == 2
    store.pin(KEYS[3])
    store.put(KEYS[4], entry())
    assert KEYS[4] not in store
    assert "leave no room" in caplog.text
    store.unpin(KEYS[0])
    store.put(KEYS[4], entry())
    assert [key in store for key in KEYS[:5]] == [False, False, False, True, True]
    with pytest.raises(KeyError, match="store it first"):
        store.pin(KEYS[0])


def test_a_folder_with_room_is_not_looked_through_at_every_put(tmp_path, monkeypatch):
    store, looks = DiskStore(tmp_path, max_bytes=100 * len(dump(KEY, entry()))), []
    files = LocalFolder.files
    monkeypatch.setattr(LocalFolder, "files", lambda self: looks.append(1) or files(self))
    for key in KEYS[:40]:
        store.put(key, entry())
    assert len(looks) <= 1 + 40 // 3  # a 32nd of the budget holds three entries


def test_a_file_that_was_replaced_is_not_removed_for_the_damage_of_the_one_before(tmp_path):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    stale = store.open(KEY)
    damage(store, KEY, 1)
    store.put(KEY, entry())  # by another process, which found the damage first
    with pytest.raises(ChunkLost):
        stale.layer(1)
    assert same(store.open(KEY), entry())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_is_no_file_is_not_waited_for_and_leaves_none_open(tmp_path):
    store = DiskStore(tmp_path)
    store._path(KEYS[0]).mkdir()
    os.mkfifo(store._path(KEYS[1]))
    before = len(os.listdir("/dev/fd"))
    opened = []
    thread = threading.Thread(target=lambda: opened.extend(store.open(key) for key in KEYS[:2]), daemon=True)
    thread.start()
    thread.join(20)
    assert opened == [None, None]
    assert len(os.listdir("/dev/fd")) == before


def test_a_filesystem_that_syncs_no_folders_keeps_entries(tmp_path, monkeypatch):
    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    assert (store.counts.stored, store.counts.failed) == (1, 0)


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": ["F32"]}, {"dtype": "[/red]"}, {"shape": ["9"]}, {"provenance": {}}, {"provenance": "[/red]"}]
    + [{"provenance": "\ud800"}, {"shape": ["\ud800"]}],
)
def test_what_looks_at_a_folder_survives_headers_made_to_do_harm(tmp_path, wrong):
    header = {
        "__metadata__": {"header": "0" * 32, "provenance": "isolated"},
        "cached_positions": {"dtype": "I64", "shape": [9]},
        "layer_0000": {"dtype": "F32"},
    }
    for name, one in header.items():
        header[name] = {**one, **{key: value for key, value in wrong.items() if key in one}}
    store = DiskStore(tmp_path)
    store._path(KEY).write_bytes(signed(json.dumps(header, separators=(",", ":")).encode()))
    for command in (["ls"], ["ls", "--json"], ["stat"], ["stat", "--json"], ["verify"]):
        outcome = CliRunner().invoke(app, ["store", *command, str(tmp_path)])
        assert outcome.exit_code == int(command == ["verify"]), outcome.output
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit)


def test_a_claim_that_no_terminal_can_print_is_said(tmp_path):
    """Half of a surrogate pair, in a header that is whole otherwise."""
    file, store = dump(KEY, entry()), DiskStore(tmp_path)
    header = header_of(file)
    header["cached_positions"]["shape"] = ["\ud800"]
    store._path(KEY).write_bytes(signed_header(header, b""))
    for words, code in ((["verify"], 1), (["ls"], 0), (["verify", "--json"], 1)):
        outcome = CliRunner().invoke(app, ["store", *words, str(tmp_path)])
        assert (outcome.exit_code, type(outcome.exception)) in ((0, type(None)), (code, SystemExit))
