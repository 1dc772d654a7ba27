"""Files that are not what they claim, folders that hold others' files, budgets under pressure: sweeps of whole kinds.

What a store holds may be damaged or forged in any way: a prompt answers as without it, raises nothing, and takes no
more memory than its chunks do. What is whole is never removed, nor what is not hfblend's.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash
from helpers import (
    config,
    entry,
    generate,
    header_of,
    make_llama,
    make_prompt,
    same,
    shared,
    signed,
    with_another_value,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_script
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.kv.chunk import ChunkLost
from hfblend.kv.ids import Ids
from hfblend.kv.origin import Origin
from hfblend.kv.rows import full_length_cache
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore
from hfblend.store.folders import LocalFolder, RemoteFolder
from hfblend.store.format import MOST_UNASKED, CorruptEntry, OtherVersion, contents_of, dump, parse

fsspec = pytest.importorskip("fsspec")
resource = pytest.importorskip("resource", reason="needs fork and limits of a POSIX system")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
KEY = KEYS[0]
SIZE = len(dump(KEY, entry()))
PROMPT = make_prompt()
SWEEP = settings(
    deadline=None, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip


# --- headers ------------------------------------------------------------------------------------------------------


def claiming(file, tokens=None, behind=None):
    """The header of a file that claims to have so many tokens, or ids before them, and is consistent otherwise."""
    header, at = header_of(file), 0
    for name, place in header.items():
        if name == "__metadata__":
            continue
        count = behind if name == "behind_ids" else tokens
        if count is not None:
            place["shape"][0] = count
        size = {"I64": 8, "F32": 4}[place["dtype"]]
        for number in place["shape"]:
            size *= number
        place["data_offsets"] = [at, at + size]
        at += size
    return header, at


SIZES = st.integers(0, 70).map(lambda power: 2**power) | st.sampled_from([-1, 0, 10**9, 10**12, 2**63 - 1, 2**64])
VALUES = (
    SIZES
    | st.sampled_from([None, True, 1.5, 2.0, float("inf"), float("nan"), "", "F16", "F64", "BF16", "I64", "isolated"])
    | st.sampled_from(["in_context", "hfblend-chunk-2", "int8", [], {}, [[]], "[[2.0,8,2,8]]", "Infinity", "9" * 5000])
    | st.lists(SIZES, max_size=3)
)


@st.composite
def damages(draw):
    """A change of a file: every field of its header, also inside of JSON in JSON; its layout; its bytes."""
    kind = draw(st.sampled_from(["field", "field", "inner", "drop", "twice", "flip", "cut", "longer", "claim", "page"]))
    return kind, draw(st.integers(0, 10**9)), draw(VALUES)


def damaged(file, damage):
    kind, number, value = damage
    header, data = header_of(file), file[8 + int.from_bytes(file[:8], "little") :]
    if kind == "field":
        changed = with_another_value(header, number, value)
        return signed(changed if isinstance(changed.get("__metadata__"), dict) else json.dumps(changed), data)
    if kind == "inner":
        name = ["layouts", "checksums", "origin"][number % 3]
        inner = json.loads(header["__metadata__"][name])
        header["__metadata__"][name] = json.dumps(with_another_value(inner, number // 3, value))
        return signed(header, data)
    if kind == "drop":
        names = list(header["__metadata__"])
        header["__metadata__"].pop(names[number % len(names)])
        return signed(json.dumps(header, separators=(",", ":")), data)
    if kind == "twice":  # the same names again, with other values
        header["__metadata__"]["header"] = "0" * 32
        again = json.dumps({"cached_positions": value, "layer_0000": header["layer_0001"]})
        return signed(json.dumps(header, separators=(",", ":"))[:-1] + "," + again[1:], data)
    if kind == "claim":
        count = value if type(value) is int and value > 0 else number + 1
        return signed(claiming(file, **{["tokens", "behind"][number % 2]: count})[0], data)
    if kind == "flip":
        at = number % (8 * len(file))
        return file[: at // 8] + bytes([file[at // 8] ^ 1 << at % 8]) + file[at // 8 + 1 :]
    if kind == "page":
        return b"<html>gateway</html>" * (number % 5000)
    return file[: number % len(file)] if kind == "cut" else file + bytes(number % 5000 + 1)


class Place:
    """A store of one kind with what a prompt put into it, and the prompt's answer."""

    def __init__(self, kind, tmp_path):
        self.kind, self.folder = kind, tmp_path / "chunks"
        self.model = make_llama(layers=2)
        self.right, trace = self.answer()
        self.keys = [trace.prefix.key, *(chunk.key for chunk in trace.chunks)]
        self.files = {key: self.read(key) for key in self.keys}

    def store(self):
        if self.kind == "disk":
            return DiskStore(self.folder)
        remote = RemoteStore("memory://faults/chunks", pause_s=0.001, max_failures=10**6)
        return remote if self.kind == "remote" else TieredStore([MemoryStore(), DiskStore(self.folder), remote])

    def answer(self):
        with hfblend.patch(self.model, config=config(0.3), store=self.store()) as blender:
            return generate(self.model, PROMPT.inputs()).sequences[0].tolist(), blender.trace

    def read(self, key):
        if self.kind == "disk":
            return DiskStore(self.folder)._path(key).read_bytes()
        return fsspec.filesystem("memory").cat_file(f"/faults/chunks/{key}.safetensors")

    def write(self, key, file):
        if self.kind != "remote":
            DiskStore(self.folder)._path(key).write_bytes(file)
        if self.kind != "disk":
            fsspec.filesystem("memory").pipe_file(f"/faults/chunks/{key}.safetensors", file)


KINDS = ["disk", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("remote", "tiers"))]


@pytest.fixture
def place(request, tmp_path):
    MemoryFileSystem.store.clear()
    yield Place(request.param, tmp_path)
    MemoryFileSystem.store.clear()


def answers_alike(place, which, damage):
    key = place.keys[which]
    place.write(key, damaged(place.files[key], damage))
    tokens, trace = place.answer()
    assert tokens == place.right
    assert trace.blended
    for other in place.keys:  # what was whole stays, and what was damaged is written again
        assert place.read(other) == place.files[other] or (other == key and parse_or_none(key, place.read(key)))
    place.write(key, place.files[key])


@pytest.mark.parametrize("place", ["disk"], indirect=True)
@SWEEP
@given(which=st.integers(0, 3), damage=damages())
def test_a_prompt_answers_alike_whatever_a_file_has_become(place, which, damage):
    answers_alike(place, which, damage)


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["remote", "tiers"], indirect=True)
@settings(SWEEP, max_examples=20)  # what reads a file is that of a disk
@given(which=st.integers(0, 3), damage=damages())
def test_a_prompt_answers_alike_whatever_an_object_has_become(place, which, damage):
    answers_alike(place, which, damage)


def parse_or_none(key, file):
    with contextlib.suppress(CorruptEntry, OtherVersion):
        return parse(key, file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_takes_no_memory_and_costs_reuse_only(kind, tmp_path):
    """Sparse files as long as they claim, and objects that are not; in a process that may not have the memory."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import logging, os, resource, torch
torch.set_num_threads(1)
from test_store_faults import *
place = Place({kind!r}, Path({str(tmp_path)!r}))
assert place.answer()[0] == place.right
most = int(open("/proc/self/statm").read().split()[0]) * 4096 + 3 * 2**30  # stacks and arenas of threads included
resource.setrlimit(resource.RLIMIT_AS, (most, most))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for count in (1000, 10**5, 10**6, 10**7, 10**8, 10**9, 10**12, 2**62, 2**70):
    for claim in ({{"tokens": count}}, {{"behind": count}}, {{"tokens": count, "behind": count}}):
        for key in place.keys[:3]:
            header, stop = claiming(place.files[key], **claim)
            forged = signed(header, bytes(70_000))
            place.write(key, forged)
            if place.kind != "remote" and stop < 2**40:
                with contextlib.suppress(OSError):
                    path = DiskStore(place.folder)._path(key)
                    os.truncate(path, 8 + int.from_bytes(forged[:8], "little") + stop)
        tokens, trace = place.answer()
        assert tokens == place.right, claim
        assert trace.hits == 1, (claim, trace.hits)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    done = run_script(script)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 100  # MiB


@pytest.mark.parametrize("kind", ["disk", "remote"])
def test_ids_beyond_what_is_read_unasked_are_read_when_they_are_asked_for(kind, tmp_path):
    MemoryFileSystem.store.clear()
    store = DiskStore(tmp_path) if kind == "disk" else RemoteStore("memory://faults/chunks")
    written = entry(behind_ids=range(MOST_UNASKED // 8))
    store.put(KEY, written)
    found = store.open(KEY)
    assert not {"behind_ids", "cached_positions"} & vars(found).keys()
    assert (len(found), found.num_behind) == (4, MOST_UNASKED // 8)
    assert same(found, written)
    name = f"{KEY}.safetensors"
    whole = store._folder.read(name)
    at = contents_of(KEY, whole, len(whole)).places["cached_positions"].start
    store._folder.write(name, whole[:at] + b"\x01" + whole[at + 1 :])
    found = store.open(KEY)
    with pytest.raises(ChunkLost, match="checksum"):
        _ = found.cached_positions
    assert KEY not in store
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("positions", [[-1, 0, 1, 2], [3, 4, 5, 2**62], [3, 4, 5, 2**33]])
def test_positions_where_no_token_can_have_stood_are_damage(positions):
    file = dump(KEY, entry())
    header, start = header_of(file), 8 + int.from_bytes(file[:8], "little")
    tensor = torch.tensor(positions)
    state = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.numpy().tobytes())
    checksums = json.loads(header["__metadata__"]["checksums"]) | {"cached_positions": state.hexdigest()}
    header["__metadata__"]["checksums"] = json.dumps(checksums)
    with pytest.raises(CorruptEntry, match="positions"):
        parse(KEY, signed(header, tensor.numpy().tobytes() + file[start + 32 :]))


# --- a second reading ---------------------------------------------------------------------------------------------

ANSWERS = {
    "a proxy's page": lambda data: b"<html>gateway</html>" * 100,
    "nothing": lambda data: b"",
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "too few bytes": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "another object": lambda data: dump(KEYS[1], entry(tokens=9))[: len(data)],
}


@pytest.mark.parametrize("kind", ["disk", "remote"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("at", range(4))
def test_what_came_damaged_once_stays(kind, answer, at, tmp_path, monkeypatch, caplog):
    """Whichever of its readings it is: of the header, or of a run of layers."""
    MemoryFileSystem.store.clear()
    monkeypatch.setattr("hfblend.store.sources.HEAD_BYTES", 2**12)
    store = DiskStore(tmp_path) if kind == "disk" else RemoteStore("memory://faults/chunks")
    written = entry(layers=12, tokens=40)
    store.put(KEY, written)
    readings = []

    def once(data):
        readings.append(data)
        return ANSWERS[answer](data) if len(readings) == at + 1 else data

    with monkeypatch.context() as patched:
        if kind == "disk":
            preadv = os.preadv

            def read(number, buffers, start, *flags):
                count = preadv(number, buffers, start, *flags)
                came = once(bytes(buffers[0][:count]))[:count]
                buffers[0][: len(came)] = came
                return len(came)

            patched.setattr(os, "preadv", read)
        else:
            folder_read = RemoteFolder.read
            patched.setattr(RemoteFolder, "read", lambda self, *place: once(folder_read(self, *place)))
        with contextlib.suppress(ChunkLost):
            if found := store.open(KEY):
                _ = [found.layer(i) for i in range(12)]
    assert KEY in store
    assert same(store.open(KEY), written)
    assert "removed and" not in caplog.text
    MemoryFileSystem.store.clear()


def with_a_flipped_bit(data, number):
    """The data with another bit flipped for each number."""
    place = number * 7919 % (8 * len(data)) if data else 0
    return data and data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


@pytest.mark.parametrize("kind", ["disk", "remote"])
@pytest.mark.parametrize("start", range(0, 120, 5))
def test_what_comes_damaged_differently_each_time_stays(kind, start, tmp_path, monkeypatch, caplog):
    """A second reading that is damaged, too, says nothing of the entry unless it brings the same bytes."""
    MemoryFileSystem.store.clear()
    monkeypatch.setattr("hfblend.store.sources.HEAD_BYTES", 2**12)
    store = DiskStore(tmp_path) if kind == "disk" else RemoteStore("memory://faults/chunks")
    written = entry(layers=12, tokens=40)
    store.put(KEY, written)
    numbers = iter(range(start, 10**6))
    with monkeypatch.context() as patched:
        folder, preadv = LocalFolder if kind == "disk" else RemoteFolder, os.preadv
        read = folder.read
        patched.setattr(folder, "read", lambda self, *place: with_a_flipped_bit(read(self, *place), next(numbers)))

        def read_into(number, buffers, place, *flags):
            count = preadv(number, buffers, place, *flags)
            buffers[0][:count] = with_a_flipped_bit(bytes(buffers[0][:count]), next(numbers))
            return count

        patched.setattr(os, "preadv", read_into)
        for _ in range(3):
            with contextlib.suppress(ChunkLost):
                if found := store.open(KEY):
                    _ = [found.layer(i) for i in range(12)]
    assert KEY in store
    assert same(store.open(KEY), written)
    assert "stays" in caplog.text
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("kind", ["disk", "remote"])
@pytest.mark.parametrize("place", [3, 9, 40, 300, -1, -2000, "short", "long"])
def test_what_is_damaged_for_good_is_removed(kind, place, tmp_path):
    MemoryFileSystem.store.clear()
    store = DiskStore(tmp_path) if kind == "disk" else RemoteStore("memory://faults/chunks")
    store.put(KEY, entry(layers=12, tokens=400))
    file, name = bytearray(store._folder.read(f"{KEY}.safetensors")), f"{KEY}.safetensors"
    if isinstance(place, int):
        file[place] ^= 1
    store._folder.write(name, {"short": file[:-1], "long": file + b"x"}.get(place, file))
    with contextlib.suppress(ChunkLost):
        if found := store.open(KEY):
            _ = [found.layer(i) for i in range(12)]
    assert KEY not in store
    assert store.counts.damaged == 1
    MemoryFileSystem.store.clear()


def test_a_page_that_a_proxy_answers_for_good_removes_nothing(monkeypatch, caplog):
    MemoryFileSystem.store.clear()
    store = RemoteStore("memory://faults/chunks")
    store.put(KEY, entry())
    with monkeypatch.context() as patched:
        patched.setattr(RemoteFolder, "read", lambda *place: b"<html>gateway</html>" * 9)
        assert store.open(KEY) is None
    assert "cannot be read again" in caplog.text
    assert same(store.open(KEY), entry())
    MemoryFileSystem.store.clear()


# --- folders that are gone ----------------------------------------------------------------------------------------


def tiers_over(folder, count):
    """A store over a folder: alone, with memory before it, and with a remote after it."""
    stores = [MemoryStore(max_bytes=1), DiskStore(folder), RemoteStore("memory://faults/gone")]
    return stores[1] if count == 1 else TieredStore(stores[:count])


def break_folder(how, folder, monkeypatch):
    """Makes a folder useless in one of the ways that happen."""
    if isinstance(how, int):  # what the system answers for whatever is in it

        def refuse(path, real, *args, **kwargs):
            if str(path).startswith(str(folder)):
                raise OSError(how, os.strerror(how))
            return real(path, *args, **kwargs)

        for name in ("lstat", "stat", "open", "scandir", "mkdir", "unlink", "utime", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda path, *args, _real=real, **kw: refuse(path, _real, *args, **kw))
        return
    if how == "unreadable":
        if os.geteuid() == 0:
            pytest.skip("everything is readable for root; the errors of the system are tried above")
        folder.chmod(0)
        return
    shutil.rmtree(folder)
    if how == "a file":
        folder.write_text("mine")


@functools.cache
def answers():
    """Of a model that is patched, cold and warm."""
    with hfblend.patch(shared(), config=config(0.3), store=MemoryStore()):
        return [generate(shared(), PROMPT.inputs()).sequences for _ in range(2)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("how", [errno.EACCES, errno.EIO, errno.ESTALE, "a file", "deleted", "unreadable"])
def test_a_folder_that_is_gone_costs_reuse_only(how, count, tmp_path, monkeypatch, caplog):
    """A prompt answers as without it, and nothing that stands where it stood is changed."""
    MemoryFileSystem.store.clear()
    model, folder, expected = shared(), tmp_path / "chunks", answers()
    store = tiers_over(folder, count)
    with hfblend.patch(model, config=config(0.3), store=store) as blender:
        generate(model, PROMPT.inputs())
        if count > 1:
            store.flush()
        with monkeypatch.context() as patched:
            break_folder(how, folder, patched)
            assert KEY not in store
            assert store.open(KEY) is None
            for sequences in expected:
                assert torch.equal(generate(model, PROMPT.inputs()).sequences, sequences)
                assert blender.trace.blended
            store.put(KEY, entry())
            if count > 1:
                store.flush()
            if how == "a file":
                assert folder.read_text() == "mine"
            if how == "unreadable":
                folder.chmod(0o700)
    MemoryFileSystem.store.clear()


# --- what is others' ----------------------------------------------------------------------------------------------

GONE = subprocess.Popen([sys.executable, "-c", ""])
OTHERS = [
    "thesis.tmp", "backup-2019.tmp", "notes.txt", f"{KEY}.tmp", f"{KEY}.1.tmp", f"{KEY}.{2**40}.{'a' * 31}.tmp",
    f"{KEY[:-1]}.999999.{'a' * 32}.tmp", f"{KEY}.999999.{'a' * 32}.tmp.old", f"{KEY}.x.{'a' * 32}.tmp",
    f"{KEY}.{os.getpid()}.{'a' * 32}.tmp", "profile.abcdefgh", f"{KEY}.safetensors.bak", "making-x",
]  # fmt: skip


def left_by_a_killed_process(number=0):
    GONE.wait()
    return f"{KEYS[number]}.{GONE.pid}.{'b' * 32}.tmp"


def aged(folder, names):
    for name in names:
        (folder / name).write_text("mine")
        os.utime(folder / name, (time.time() - 7200,) * 2)


def state_of(folder):
    return {one.name: (one.lstat().st_mtime_ns, one.read_bytes()) for one in folder.iterdir()}


@pytest.mark.parametrize("url", ["", "file://"])
def test_what_only_reads_changes_nothing(tmp_path, url):
    """Not even what hfblend would remove when it writes."""
    DiskStore(tmp_path).put(KEY, entry())
    aged(tmp_path, [*OTHERS, left_by_a_killed_process()])
    before = state_of(tmp_path)
    for words in (["ls"], ["ls", "--json"], ["stat"], ["stat", "--json"], ["verify"]):
        assert CliRunner().invoke(app, ["store", *words, f"{url}{tmp_path}"]).exit_code == 0
    store = RemoteStore(f"{url}{tmp_path}") if url else DiskStore(tmp_path)
    assert KEY in store
    assert [one.key for one in store.entries()] == store.keys() == [KEY]
    assert store.fault_of(KEY) is None
    assert state_of(tmp_path) == before
    assert same(store.open(KEY), entry())
    assert state_of(tmp_path).keys() == before.keys()


def test_only_what_a_killed_process_left_is_removed_by_a_put(tmp_path):
    left, locked, young = (left_by_a_killed_process(i) for i in range(3))
    aged(tmp_path, [*OTHERS, left, locked])
    (tmp_path / young).touch()
    link, target = tmp_path / left_by_a_killed_process(3), tmp_path.parent / f"{tmp_path.name}-elsewhere"
    target.write_text("mine")
    link.symlink_to(target)
    os.utime(link, (0, 0), follow_symlinks=False)
    folder = tmp_path / left_by_a_killed_process(4)
    folder.mkdir()
    os.utime(folder, (0, 0))
    import fcntl

    with open(tmp_path / locked) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = {one.name for one in tmp_path.iterdir()}
        store = DiskStore(tmp_path, max_bytes=2 * SIZE + 1)
        for key in KEYS[5:9]:
            store.put(key, entry())
        store.clear()
        store.prune(0)
        assert {one.name for one in tmp_path.iterdir()} == before - {left}
    assert target.read_text() == "mine"


# --- budgets ------------------------------------------------------------------------------------------------------


def a_store(where, tmp_path, max_bytes=None):
    if where == "disk":
        return DiskStore(tmp_path, "50GB" if max_bytes is None else max_bytes)
    return RemoteStore("memory://faults/chunks", max_bytes)


@pytest.mark.parametrize("where", ["disk", "remote"])
@pytest.mark.parametrize("stuck", [1, 5, 12])
def test_what_cannot_be_removed_is_passed_over(where, stuck, tmp_path, monkeypatch, caplog):
    """Others go in its place, also where it is most of what there is; it is said once."""
    MemoryFileSystem.store.clear()
    for i in range(stuck):
        a_store(where, tmp_path).put(KEYS[i], entry())
        time.sleep(0.002)
    names = {f"{key}.safetensors" for key in KEYS[:stuck]}
    unlink, rm_file = Path.unlink, MemoryFileSystem.rm_file

    def refuse(path, real, *args, **kwargs):
        if str(path).rpartition("/")[2] in names:
            raise PermissionError(1, "Operation not permitted")
        return real(*args, **kwargs)

    monkeypatch.setattr(Path, "unlink", lambda path, **kw: refuse(path, unlink, path, **kw))
    monkeypatch.setattr(MemoryFileSystem, "rm_file", lambda self, path: refuse(path, rm_file, self, path))
    store = a_store(where, tmp_path, (stuck + 3) * SIZE)
    for key in KEYS[stuck : stuck + 20]:
        store.put(key, entry())
        assert key in store
    assert (store.counts.stored, store.counts.failed) == (20, 0)
    assert store.num_bytes <= store.max_bytes
    assert caplog.text.count("cannot be removed") == 1
    with pytest.raises(PermissionError):
        store.prune(0)
    assert sorted(store.keys()) == sorted(KEYS[:stuck])  # all that can go has gone
    with pytest.raises(PermissionError):
        store.clear()
    MemoryFileSystem.store.clear()


def noting(files, looks):
    return lambda self: looks.append(1) or files(self)


@pytest.mark.parametrize("where", ["disk", "remote"])
@pytest.mark.parametrize("pinned", [0.0, 0.5, 1.0])
def test_puts_at_the_budget_list_the_folder_as_rarely_however_much_it_holds(where, pinned, tmp_path, monkeypatch):
    listed = {}
    for count in (64, 512):
        MemoryFileSystem.store.clear()
        folder = tmp_path / str(count)
        room = a_store(where, folder)
        for i in range(count):
            name = hashlib.sha256(str(i).encode()).hexdigest()
            room._folder.write(f"{name}.safetensors", bytes(SIZE)) if where == "remote" else None
            if where == "disk":
                (folder / f"{name}.safetensors").write_bytes(bytes(SIZE))
            if i < pinned * count:
                room.pin(name)
        store, looks = a_store(where, folder, count * SIZE), []
        with monkeypatch.context() as patched:
            for kind in (LocalFolder, RemoteFolder):
                patched.setattr(kind, "files", noting(kind.files, looks))
            if pinned == 1:
                patched.setattr("hfblend.store.upkeep._RESTS", 10**6)  # so that it does not hang on the machine's speed
            for key in KEYS[:64]:
                store.put(key, entry())
            listed[count] = len(looks)
        assert store.num_bytes <= store.max_bytes
        assert sum(one.pinned for one in store.entries()) == int(pinned * count)
    assert listed[512] <= min(listed[64], 8)
    MemoryFileSystem.store.clear()


def test_processes_at_one_budget_keep_it_about(tmp_path):
    """By no more than a 32nd of it for each, and the last one to write finds it kept."""
    entries, budget = 64, 64 * SIZE
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import hashlib
from entries import entry
from hfblend.store import DiskStore
store = DiskStore({str(tmp_path)!r}, {budget})
for i in range(200):
    store.put(hashlib.sha256(f"{{sys.argv[1]}} {{i}}".encode()).hexdigest(), entry())
    assert i % 10 or store.num_bytes <= {budget + 3 * (budget // 32 + SIZE)}, store.num_bytes
assert (store.counts.stored, store.counts.failed) == (200, 0)
"""
    pinned = DiskStore(tmp_path)
    pinned.put(KEY, entry())
    pinned.pin(KEY)
    os.utime(pinned._path(KEY), (0, 0))
    with ThreadPoolExecutor(3) as threads:
        running = threads.map(lambda i: run_script(script, str(i)), range(3))
        assert [(one.returncode, one.stderr) for one in running] == [(0, "")] * 3
    store = DiskStore(tmp_path, budget)
    store.put(KEYS[1], entry())
    assert store.num_bytes <= budget
    assert len(store) > entries // 2
    assert same(store.open(KEY), entry())


@pytest.mark.parametrize("where", ["disk", "remote"])
@pytest.mark.parametrize("stores", [1, 32, *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 8))])
@pytest.mark.parametrize("begin", ["empty", "full"])
def test_stores_that_write_in_turn_pass_a_budget_by_their_share_at_most(begin, stores, where, tmp_path):
    """By a 32nd of it or one entry for each store but the first, whatever each of them last saw of the folder."""
    MemoryFileSystem.store.clear()
    budget = 48 * SIZE
    for key in KEYS[100:148] if begin == "full" else ():
        a_store(where, tmp_path).put(key, entry())
    many = [a_store(where, tmp_path, budget) for _ in range(stores)]
    most = 0
    for i in range(192):
        name = hashlib.sha256(str(i).encode()).hexdigest()
        many[i % stores].put(name, entry())
        most = max(most, many[0].num_bytes)
    assert most <= budget + (stores - 1) * max(SIZE, budget // 32)
    assert sum(one.counts.stored for one in many) == 192
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("where", ["disk", "remote"])
@pytest.mark.parametrize("entries", [3, 12, 100])
def test_threads_of_one_store_never_pass_its_budget(where, entries, tmp_path, monkeypatch):
    """Also while others are inside of a write: what has room and is not yet in the list counts."""
    MemoryFileSystem.store.clear()
    budget, sizes = entries * SIZE, []
    kind = LocalFolder if where == "disk" else RemoteFolder
    write = kind.write

    def slow_write(self, name, data):
        time.sleep(0.001)
        write(self, name, data)
        sizes.append(sum(one.num_bytes for one in self.files()))

    monkeypatch.setattr(kind, "write", slow_write)
    store = a_store(where, tmp_path, budget)

    def work(thread):
        for i in range(25):
            store.put(hashlib.sha256(f"{thread} {i}".encode()).hexdigest(), entry())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(sizes) <= budget
    assert store._under_way == 0
    assert store.counts.stored == 200 or entries < 8
    assert store.counts.failed == 0
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("kind", ["ids", "origin", "layers", "view", "positions"])
def test_memory_counts_all_that_its_entries_hold(kind):
    """What its budget does not count, Python and torch hold beside it."""

    def one(i):
        more = {"behind_ids": list(range(i, i + 4000))} if kind == "ids" else {}
        if kind == "origin":
            more["origin"] = Origin("m", f"{i}" * 3000, f"{i}r" * 3000, "i", "b")
        if kind == "view":
            large = torch.randn(1, 2, 400, 8)
            kv = [(large[:, :, :4], large[:, :, 4:8])] * 2
            return hfblend.ChunkKV(full_length_cache(kv), torch.arange(4))
        return entry(layers=40 if kind == "layers" else 2, tokens=900 if kind == "positions" else 4, **more)

    one(0)
    store = MemoryStore("1MB")
    tracemalloc.start()
    try:
        for i in range(300):
            store.put(f"{i}", one(i))
        gc.collect()
        python = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for found in store._entries.values()
        for t in (found.cached_positions, *(t for i in range(found.num_layers) for t in found.layer(i)))
    }
    assert len(store) > 3
    assert python + sum(tensors.values()) <= store.num_bytes <= store.max_bytes
    store.clear()
    assert store.num_bytes == 0


def test_ids_that_many_chunks_have_before_them_are_kept_once(tmp_path):
    disk = DiskStore(tmp_path)
    for key in KEYS[:4]:
        disk.put(key, entry(behind_ids=range(1000, 5000)))
    tiers = TieredStore([MemoryStore(), disk])
    for key in KEYS[:4]:
        assert same(tiers.open(key), entry(behind_ids=tuple(range(1000, 5000))))
    assert len({id(tiers.stores[0].open(key).behind_ids._ids) for key in KEYS[:4]}) == 1


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.lists(st.integers(0, 3), max_size=5))
def test_ids_are_as_the_tuple_of_them(ids, others):
    kept = Ids(ids)
    assert (list(kept), len(kept), kept[1:3], tuple(kept)) == (ids, len(ids), tuple(ids[1:3]), tuple(ids))
    assert (kept == tuple(ids), kept == Ids(ids), tuple(ids) == kept) == (True, True, True)
    assert (kept == tuple(others)) == (ids == others)
    assert Ids.from_bytes(memoryview(torch.tensor(ids, dtype=torch.int64).numpy().tobytes())) == ids
