"""Chunk KV behind a URL: what was written is read; what is damaged, late or refused is a miss, never an exception."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import sys
import threading
import time
import weakref

import pytest
import torch
from helpers import FAULTS, config, entry, generate, make_llama, make_prompt, same

import hfblend
from hfblend.kv.chunk import ChunkLost
from hfblend.store import MemoryStore, RemoteStore, TieredStore, sources, store_at
from hfblend.store.format import FORMAT, contents_of, dump, parse
from hfblend.store.loader import LAYERS_A_READ
from hfblend.store.requests import REQUESTS

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.local import LocalFileSystem  # noqa: E402
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

KEY, OTHER = f"{1:064x}", f"{2:064x}"
PATH = f"/chunks/{KEY}.safetensors"


class FaultyFileSystem(MemoryFileSystem):
    """Memory behind a bad line: its calls raise, wait or answer something else, as the test says."""

    protocol = "faulty"
    fault: Exception | None = None
    writes_are_refused = False
    line_is_up = threading.Event()
    calls = 0
    on_read = None  # (path, start, answer) -> what comes instead

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("faulty:/"))

    def _suffer(self, writes):
        cls = type(self)
        cls.calls += 1
        assert cls.line_is_up.wait(20)
        if cls.writes_are_refused and writes:
            raise PermissionError("read-only")
        if cls.fault is not None:
            raise cls.fault

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._suffer(writes=False)
        answer = super().cat_file(path, start=start, end=end, **kwargs)
        on_read = type(self).on_read
        return answer if on_read is None else on_read(self._strip_protocol(path), start, answer)

    def pipe_file(self, path, value, **kwargs):
        self._suffer(writes=True)
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        self._suffer(writes=True)
        super().rm_file(path)


@pytest.fixture(autouse=True)
def memory():
    """fsspec's filesystem in memory, empty; no thread of a store outlives its test."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.fault, FaultyFileSystem.writes_are_refused, FaultyFileSystem.calls = None, False, 0
    FaultyFileSystem.line_is_up.set()
    FaultyFileSystem.on_read = None
    MemoryFileSystem.store.clear()
    yield fsspec.filesystem("memory")
    FaultyFileSystem.line_is_up.set()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
    MemoryFileSystem.store.clear()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "hfblend-remote"]


def whole(store, key=KEY):
    """The entry, every layer read; `None` if it is not there or lost on the way."""
    found = store.open(key)
    if found is None:
        return None
    try:
        return found if [found.layer(i) for i in range(found.num_layers)] else None
    except ChunkLost:
        return None


def wait_until(happens):
    deadline = time.monotonic() + 5
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happens()


def a_faulty_store(**kwargs):
    """A store with one entry, behind a line that is still good."""
    store = RemoteStore("faulty://chunks", **kwargs)
    store.put(KEY, entry())
    assert same(store.open(KEY), entry())
    FaultyFileSystem.calls = 0
    return store


# --- what is written is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read(memory, dtype):
    written = entry(dtype=dtype, provenance="in_context", behind_ids=[7, 1, 9], regime=300)
    RemoteStore("memory://chunks").put(KEY, written)
    assert same(RemoteStore("memory://chunks/").open(KEY), written)
    assert RemoteStore("memory://chunks").open(OTHER) is None
    assert same(parse(KEY, memory.cat_file(PATH)), written)


def test_what_is_there_is_known_without_reading_it(caplog, monkeypatch):
    store = a_faulty_store()
    assert KEY in store
    assert OTHER not in store
    assert FaultyFileSystem.calls == 0

    def fail(self, path, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(FaultyFileSystem, "info", fail)
    assert KEY not in store
    assert "no route" in caplog.text


def test_what_is_done_is_counted():
    store = a_faulty_store(max_failures=9)
    assert store.open(OTHER) is None
    FaultyFileSystem.fault = OSError("no route")
    assert store.open(KEY) is None
    found = store.counts.to_dict()
    assert (found["hits"], found["misses"], found["stored"], found["failed"]) == (1, 2, 1, 1)
    assert found["bytes_written"] == len(dump(KEY, entry()))
    assert found["bytes_read"] == entry().num_bytes  # positions came with the header


def test_entries_that_are_told_are_looked_for_at_once_and_once():
    store, keys = a_faulty_store(), [f"{i:064x}" for i in range(REQUESTS + 8)]
    for i, key in enumerate(keys):
        store.put(key, entry(seed=i))
    FaultyFileSystem.calls = 0
    FaultyFileSystem.line_is_up.clear()
    tiers = TieredStore([MemoryStore(), store])
    tiers.stores[0].put(keys[0], entry(seed=0))
    tiers.read_ahead(keys)
    wait_until(lambda: FaultyFileSystem.calls == REQUESTS)
    assert len(threads()) == REQUESTS  # and no more of them for now
    FaultyFileSystem.line_is_up.set()
    for i, key in enumerate(keys):
        assert same(tiers.open(key), entry(seed=i))
    assert (
        FaultyFileSystem.calls == len(keys) - 1
    )  # the first lay in memory; the others are so small that they come whole


def test_what_is_stored_is_found_though_it_was_looked_for_before():
    store = RemoteStore("memory://chunks")
    store.read_ahead([KEY])
    store.put(KEY, entry())
    store.read_ahead([KEY])
    assert same(store.open(KEY), entry())


def test_what_was_begun_for_another_prompt_is_dropped():
    store = a_faulty_store()
    store.read_ahead([KEY, OTHER])
    store.read_ahead([OTHER])
    assert set(store._ahead) == {OTHER}
    assert store.open(OTHER) is None
    assert same(store.open(KEY), entry())


def test_a_dead_line_found_in_reading_ahead_costs_one_timeout(caplog):
    store = a_faulty_store(timeout_s=0.2)
    FaultyFileSystem.line_is_up.clear()
    store.read_ahead([KEY, OTHER])
    assert store.open(KEY) is None
    assert store.open(OTHER) is None
    assert caplog.text.count("no answer within") == 1


def test_an_entry_is_replaced():
    store = RemoteStore("memory://chunks")
    for seed in range(2):
        store.put(KEY, entry(seed=seed))
    assert same(store.open(KEY), entry(seed=1))


def test_a_file_is_moved_to_its_place(tmp_path):
    store = RemoteStore(f"file://{tmp_path}/new/chunks")
    for seed in range(2):
        store.put(KEY, entry(seed=seed))
    assert same(store.open(KEY), entry(seed=1))
    assert [path.name for path in (tmp_path / "new/chunks").iterdir()] == [f"{KEY}.safetensors"]


def test_a_file_that_cannot_be_moved_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    def mv(*args, **kwargs):
        raise OSError("no move")

    monkeypatch.setattr(LocalFileSystem, "mv", mv)
    store = RemoteStore(f"file://{tmp_path}")
    store.put(KEY, entry())
    assert "could not be written" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../" + "0" * 61, "a", "", "G" * 64, "0" * 64 + "\n"])
def test_keys_cannot_leave_the_folder(key):
    store = RemoteStore("memory://chunks")
    for use in (store.open, lambda k: store.put(k, entry())):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            use(key)


# --- what cannot be trusted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_bytes", [16, 2**11, 2**16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_object_is_a_miss_removed_and_said(memory, fault, head_bytes, caplog, monkeypatch):
    """Whether it is seen in the header, in a layer or at the end: of an object that is read whole, or in parts."""
    monkeypatch.setattr(sources, "HEAD_BYTES", head_bytes)
    store, written = RemoteStore("memory://chunks"), entry(tokens=20, behind_ids=range(50))
    store.put(KEY, written)
    assert len(memory.cat_file(PATH)) > 2**12
    memory.pipe_file(PATH, FAULTS[fault](memory.cat_file(PATH)))
    assert whole(store) is None
    assert "damaged" in caplog.text
    assert store.counts.to_dict()["damaged"] == 1
    assert not memory.exists(PATH)
    store.put(KEY, written)
    assert same(store.open(KEY), written)


def test_a_damaged_object_that_cannot_be_removed_is_a_miss(caplog):
    store = a_faulty_store()
    fsspec.filesystem("memory").pipe_file(PATH, b"nonsense")
    FaultyFileSystem.writes_are_refused = True
    assert store.open(KEY) is None
    assert "could not be removed" in caplog.text


def test_another_version_is_passed_by(memory, monkeypatch, caplog):
    store = RemoteStore("memory://chunks")
    monkeypatch.setattr("hfblend.store.format.FORMAT", "hfblend-chunk-0")
    store.put(KEY, entry())
    monkeypatch.setattr("hfblend.store.format.FORMAT", FORMAT)
    with caplog.at_level(logging.INFO):
        assert store.open(KEY) is None
    assert "hfblend-chunk-0" in caplog.text
    assert memory.exists(PATH)


# --- layer by layer -----------------------------------------------------------------------------------------------


def in_parts(monkeypatch, **kwargs):
    """A store with one entry of 12 layers that does not come whole with its header, and the entry."""
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**12)
    store, written = RemoteStore("faulty://chunks", **kwargs), entry(layers=12, tokens=40)
    store.put(KEY, written)
    FaultyFileSystem.calls = 0
    return store, written


def test_layers_are_read_ahead_and_few_are_held(monkeypatch):
    store, written = in_parts(monkeypatch)
    found = store.open(KEY)
    assert found.tier_beside(torch.device("cpu")) == "remote"
    assert FaultyFileSystem.calls == 1  # its header, and nothing is asked about its size
    for i in range(12):
        found.prefetch(i)
        run = i // LAYERS_A_READ
        assert set(found._ahead) <= {run, run + 1}
        assert (run + 1 in found._ahead) == (run < 2)
        assert all(torch.equal(a, b) for a, b in zip(found.layer(i), written.layer(i)))
    assert FaultyFileSystem.calls == 1 + 3


def test_what_a_chunk_that_was_given_up_waits_for_is_not_read(monkeypatch):
    store, _ = in_parts(monkeypatch)
    readers = [store.open(KEY) for _ in range(REQUESTS)]
    FaultyFileSystem.calls = 0
    FaultyFileSystem.line_is_up.clear()
    for reader in readers:
        reader.prefetch(0)
    wait_until(lambda: FaultyFileSystem.calls == REQUESTS)
    assert len(threads()) == REQUESTS
    readers.clear()
    del reader
    FaultyFileSystem.line_is_up.set()
    wait_until(lambda: not threads())
    # Those at work held a chunk each, of which a layer may have been begun meanwhile.
    assert FaultyFileSystem.calls < 2 * REQUESTS


def test_a_chunk_of_a_remote_that_reads_no_parts_comes_whole(monkeypatch):
    store, written = in_parts(monkeypatch)
    file = dump(KEY, written)
    FaultyFileSystem.on_read = lambda path, start, answer: file
    assert same(store.open(KEY), written)
    assert FaultyFileSystem.calls == 1


def test_a_remote_that_reads_other_parts_than_it_is_asked_for_is_a_miss(memory, monkeypatch, caplog):
    store, written = in_parts(monkeypatch)
    file = dump(KEY, written)
    FaultyFileSystem.on_read = lambda path, start, answer: file[: start + len(answer)]  # each from the beginning
    assert whole(store) is None
    assert "were asked for" in caplog.text
    assert memory.exists(PATH)  # it is not the object's fault


def test_a_remote_that_dies_between_two_layers(monkeypatch, caplog):
    store, _ = in_parts(monkeypatch, timeout_s=0.2)
    found = store.open(KEY)
    assert found.layer(3)
    wait_until(lambda: all(future.done() for future in found._ahead.values()))
    FaultyFileSystem.line_is_up.clear()
    for i in range(4, 4 + LAYERS_A_READ):
        assert found.layer(i)  # they were there already
    for i in (8, 9, 10):
        with pytest.raises(ChunkLost) as error:
            found.layer(i)
        assert error.value.key == KEY
    assert store.open(KEY) is None
    assert caplog.text.count("no answer within") == 1


def test_a_chunk_that_was_given_up_is_freed_at_once(monkeypatch):
    def fail(path, start, answer):
        raise OfABackend("gone")

    store, _ = in_parts(monkeypatch)
    found = store.open(KEY)
    FaultyFileSystem.on_read = fail
    gc.disable()
    logging.disable()  # a record holds the error
    try:
        with contextlib.suppress(ChunkLost):
            found.layer(0)
        there = weakref.ref(found)
        del found
        wait_until(lambda: there() is None)
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)


def test_a_chunk_costs_one_failure_however_many_layers_fail(monkeypatch, caplog):
    store, written = in_parts(monkeypatch)
    found = store.open(KEY)
    FaultyFileSystem.fault = OfABackend("gone")
    with pytest.raises(ChunkLost, match="OfABackend: gone"):
        found.layer(0)
    assert "left alone" not in caplog.text
    FaultyFileSystem.fault = None
    assert same(store.open(KEY), written)


# --- a remote that fails ------------------------------------------------------------------------------------------


class OfABackend(Exception):
    """As botocore's, which are no OSErrors."""


@pytest.mark.parametrize(
    "fault", [OSError("gone"), PermissionError("no"), OfABackend("what"), asyncio.TimeoutError(), NotImplementedError()]
)
def test_errors_of_the_remote_cost_reuse_only(fault, caplog):
    store = a_faulty_store(pause_s=0.01)
    FaultyFileSystem.fault = fault
    assert store.open(KEY) is None
    assert "could not be read from faulty://chunks" in caplog.text
    time.sleep(0.02)
    store.put(KEY, entry(seed=1))
    assert "could not be written to faulty://chunks" in caplog.text
    FaultyFileSystem.fault = None
    time.sleep(0.02)
    assert same(store.open(KEY), entry())


def test_a_remote_that_hangs_costs_one_timeout_and_not_one_a_chunk(caplog):
    store = a_faulty_store(timeout_s=0.2)
    FaultyFileSystem.line_is_up.clear()
    for _ in range(5):
        assert store.open(KEY) is None
        store.put(OTHER, entry())
    assert FaultyFileSystem.calls == len(threads()) == 1  # nothing else was asked for, or waited for
    assert all(thread.daemon for thread in threads())
    assert caplog.text.count("no answer within 0.2 s") == 1
    assert caplog.text.count("left alone for 60 s") == 1


def test_a_hanging_write_ends_after_the_timeout(caplog):
    store = a_faulty_store(timeout_s=0.2)
    FaultyFileSystem.line_is_up.clear()
    store.put(KEY, entry())
    assert "could not be written to faulty://chunks: no answer within 0.2 s" in caplog.text


def test_after_errors_in_a_row_the_remote_is_left_alone_for_a_while(caplog):
    store = a_faulty_store(pause_s=0.3, max_failures=3)
    FaultyFileSystem.fault = OSError("gone")
    for _ in range(10):
        assert store.open(KEY) is None
    assert FaultyFileSystem.calls == 3
    time.sleep(0.35)
    for _ in range(10):
        assert store.open(KEY) is None
    assert FaultyFileSystem.calls == 4  # one try, and left alone again
    assert caplog.text.count("could not be read") == caplog.text.count("left alone") == 1  # nothing new to say
    time.sleep(0.35)
    FaultyFileSystem.fault = None
    assert same(store.open(KEY), entry())
    FaultyFileSystem.fault = OSError("gone")
    assert store.open(KEY) is None
    assert caplog.text.count("could not be read") == 2
    FaultyFileSystem.fault = None
    assert same(store.open(KEY), entry())  # one failure alone pauses nothing


def test_many_threads_at_a_dead_remote_say_so_once(caplog):
    store = a_faulty_store(timeout_s=0.2)
    FaultyFileSystem.line_is_up.clear()
    readers = [threading.Thread(target=store.open, args=(KEY,)) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert caplog.text.count("left alone") == 1


def test_a_remote_that_may_only_be_read_is_read(caplog):
    store = a_faulty_store()
    FaultyFileSystem.writes_are_refused = True
    for _ in range(5):
        store.put(OTHER, entry())
        assert same(store.open(KEY), entry())
        assert store.open(OTHER) is None
    assert caplog.text.count("could not be written") == caplog.text.count("left alone") == 1
    assert store.counts.failed == 3


# --- names --------------------------------------------------------------------------------------------------------


def test_a_url_is_a_place_as_users_name_one():
    fast, remote = store_at("memory://chunks").stores
    assert (type(fast), type(remote)) == (MemoryStore, RemoteStore)


def test_an_unknown_protocol_says_so():
    with pytest.raises(ValueError, match="nowhere://bucket"):
        store_at("nowhere://bucket/chunks")


@pytest.mark.parametrize("limit", ["timeout_s", "pause_s", "max_failures"])
def test_bad_limits(limit):
    with pytest.raises(ValueError, match=r"above 0|1 or more"):
        RemoteStore("memory://chunks", **{limit: 0})


@pytest.mark.parametrize("package", ["fsspec", "s3fs"])
def test_a_missing_package_says_what_to_install(monkeypatch, package):
    classes = sys.modules["fsspec.registry"]._registry  # `fsspec.registry` is a view of it
    monkeypatch.delitem(classes, "s3", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[remote\]'"):
        store_at("s3://bucket/chunks")


def test_no_password_is_logged(caplog):
    store = RemoteStore("faulty://me:secret@host/chunks")
    FaultyFileSystem.fault = OSError("gone")
    store.put(KEY, entry())
    assert "faulty://host/chunks" in caplog.text
    assert "secret" not in caplog.text


# --- S3, as a real server on this machine -------------------------------------------------------------------------


def test_s3_keeps_what_is_written(s3, caplog):
    written = entry(behind_ids=[5, 6], dtype=torch.bfloat16)
    store = RemoteStore("s3://bucket/chunks")
    assert store.open(KEY) is None
    RemoteStore("s3://bucket/chunks", use_ssl=False).put(KEY, written)  # another client, as another machine's
    assert same(store.open(KEY), written)
    assert same(parse(KEY, s3.cat_file(f"bucket/chunks/{KEY}.safetensors")), written)
    assert not [record for record in caplog.records if record.name.startswith("hfblend")]


def test_s3_damaged_objects_are_removed(s3, caplog):
    store, path = RemoteStore("s3://bucket/chunks"), f"bucket/chunks/{KEY}.safetensors"
    store.put(KEY, entry())
    s3.pipe_file(path, s3.cat_file(path)[:-1])
    assert store.open(KEY) is None
    assert "damaged" in caplog.text
    assert not s3.exists(path)


@pytest.mark.parametrize("fault", ["flip", "truncate", "lengthen", "empty"])
def test_s3_objects_damaged_in_a_layer_are_lost(s3, fault, monkeypatch):
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**11)
    store, path, written = RemoteStore("s3://bucket/chunks"), f"bucket/chunks/{KEY}.safetensors", entry(tokens=64)
    store.put(KEY, written)
    s3.pipe_file(path, FAULTS[fault](s3.cat_file(path)))
    assert whole(store) is None
    store.put(KEY, written)
    assert same(store.open(KEY), written)


def test_s3_is_asked_once_for_a_header_and_once_for_some_layers(s3, monkeypatch):
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**11)
    store, written, requests = RemoteStore("s3://bucket/chunks"), entry(tokens=64, layers=3), []
    store.put(KEY, written)
    call_s3 = type(store._folder.filesystem)._call_s3

    async def call(self, method, *args, **kwargs):
        requests.append(method)
        return await call_s3(self, method, *args, **kwargs)

    monkeypatch.setattr(type(store._folder.filesystem), "_call_s3", call)
    assert store.open(OTHER) is None
    assert requests == ["get_object"]
    assert same(store.open(KEY), written)
    assert requests == ["get_object"] * (1 + 1 + 1)  # three layers come in one


def test_s3_without_its_bucket_costs_reuse_only(s3, caplog):
    store = RemoteStore("s3://nowhere/chunks")
    store.put(KEY, entry())
    assert "could not be written to s3://nowhere/chunks" in caplog.text
    assert store.open(KEY) is None


def test_s3_that_accepts_and_says_nothing_is_given_up(s3, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = RemoteStore("s3://bucket/chunks", endpoint_url=endpoint, timeout_s=0.5)
        assert store.open(KEY) is None
        store.put(KEY, entry())
        assert caplog.text.count("no answer within 0.5 s") == 1
        deadline = time.monotonic() + 3
        while threads() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not threads()  # the request was told to give up, though the server is still there


# --- generate -----------------------------------------------------------------------------------------------------

PROMPT = make_prompt()


def blended(url):
    """A prompt on a new model and behind a new memory tier, as another process would have; tokens and trace."""
    with hfblend.patch(make_llama(), config=config(0.3), store=url) as blender:
        output = generate(blender.model, PROMPT.inputs())
    assert blender.trace.blended
    return output.sequences, blender.trace


def test_a_second_use_reuses_what_the_first_one_stored():
    first, cold = blended("memory://chunks")
    second, warm = blended("memory://chunks")
    assert [(trace.hits, trace.misses) for trace in (cold, warm)] == [(0, 3), (3, 0)]
    assert torch.equal(first, second)


@pytest.mark.parametrize("head_bytes", [2**11, 2**16])
def test_a_second_use_reuses_what_the_first_one_stored_in_s3(s3, head_bytes, monkeypatch):
    monkeypatch.setattr(sources, "HEAD_BYTES", head_bytes)
    first, cold = blended("s3://bucket/chunks")
    second, warm = blended("s3://bucket/chunks")
    assert [(trace.hits, trace.misses) for trace in (cold, warm)] == [(0, 3), (3, 0)]
    assert torch.equal(first, second)


@pytest.mark.parametrize("fault", ["flip", "truncate", "other key"])
def test_generate_answers_as_with_an_intact_store(memory, fault):
    intact, trace = blended("memory://chunks")
    path = f"/chunks/{trace.chunks[1].key}.safetensors"
    file = memory.cat_file(path)
    memory.pipe_file(path, FAULTS[fault](file))
    tokens, trace = blended("memory://chunks")
    assert (trace.hits, trace.misses) == (2, 1)
    assert torch.equal(tokens, intact)
    assert same(parse(trace.chunks[1].key, memory.cat_file(path)), parse(trace.chunks[1].key, file))  # written again


def test_generate_answers_when_the_remote_is_dead(caplog):
    intact, _ = blended("memory://chunks")
    FaultyFileSystem.line_is_up.clear()
    tokens, trace = blended(hfblend.store.TieredStore([MemoryStore(), RemoteStore("faulty://chunks", timeout_s=0.2)]))
    assert caplog.text.count("no answer within") == 1
    assert (trace.hits, trace.misses) == (0, 3)
    assert FaultyFileSystem.calls == 4  # prefix and chunks, asked for at once
    assert torch.equal(tokens, intact)


class BadLine:
    """What a remote does from the moment on in which layer `layer` of a chunk is asked for."""

    def __init__(self, path, layer, fault):
        file = fsspec.filesystem("memory").cat_file(path)
        self.path, self.start = path, contents_of(path.split("/")[-1][:64], file, len(file)).layers[layer].start
        self.fault, self.reached = fault, False

    def __call__(self, path, start, answer):
        here = (path, start) == (self.path, self.start)
        if here and not self.reached and self.fault == "hangs":
            FaultyFileSystem.line_is_up.clear()
        self.reached |= here
        if self.reached and self.fault == "dies":
            raise OfABackend("connection reset")
        if self.reached and self.fault == "hangs":
            assert FaultyFileSystem.line_is_up.wait(20)
        if here and self.fault == "gone":
            raise FileNotFoundError(path)
        if here and self.fault == "other bytes":
            return bytes([answer[0] ^ 1]) + answer[1:]
        if here and self.fault == "too few":
            return answer[:-1]
        if here and self.fault == "too many":
            return answer * 2
        return answer


@pytest.mark.parametrize(
    ("fault", "layer", "layerwise"),
    [(fault, 2, True) for fault in ("dies", "hangs", "gone", "other bytes", "too few", "too many")]
    + [(fault, *when) for fault in ("dies", "hangs", "other bytes") for when in ((0, True), (3, True), (2, False))],
)
def test_generate_answers_when_the_remote_fails_in_mid_pass(monkeypatch, caplog, fault, layer, layerwise):
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**11)
    monkeypatch.setattr("hfblend.store.loader.LAYERS_A_READ", 1)  # so that the first layers come before the fault
    settings, model = config(0.3, layerwise=layerwise), make_llama()
    with hfblend.patch(model, config=settings, store=RemoteStore("faulty://chunks")) as blender:
        intact = generate(model, PROMPT.inputs()).sequences
    chunk = blender.trace.chunks[1]

    store = RemoteStore("faulty://chunks", timeout_s=0.3)
    FaultyFileSystem.on_read = line = BadLine(f"/chunks/{chunk.key}.safetensors", layer, fault)
    with hfblend.patch(model, config=settings, store=store) as blender:
        output = generate(model, PROMPT.inputs()).sequences
        assert line.reached
        assert torch.equal(output, intact)
        assert [note for note in blender.trace.notes if "blended again" in note]
        statuses = [one.status for one in blender.trace.chunks]
        assert statuses == (["miss"] * 3 if fault in ("dies", "hangs") else ["hit", "miss", "hit"])
        assert caplog.text.count("could not be read from faulty://chunks: no answer within") == (fault == "hangs")
        assert caplog.text.count("is damaged, removed") == (fault == "other bytes")
        assert caplog.text.count("came damaged") == (fault == "too few")  # the object has all of its bytes


def test_what_is_read_in_parts_is_in_memory_the_next_time(monkeypatch):
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**11)
    intact, _ = blended("memory://chunks")
    tiers = TieredStore([MemoryStore(), RemoteStore("memory://chunks")])
    tokens, trace = blended(tiers)
    assert trace.hits == 3
    assert torch.equal(tokens, intact)
    MemoryFileSystem.store.clear()
    tiers.stores[1].read_ahead([])
    tokens, trace = blended(tiers)
    assert trace.hits == 3
    assert torch.equal(tokens, intact)


def test_an_object_that_was_replaced_is_not_removed_for_not_fitting_the_header_before(memory):
    """Two machines that missed it both put it, and their sums round otherwise."""
    store = RemoteStore("memory://chunks")
    store.put(KEY, entry(tokens=400, layers=12))
    stale = store.open(KEY)
    newer = entry(tokens=400, layers=12, seed=5)
    store.put(KEY, newer)
    with pytest.raises(ChunkLost):
        stale.layer(11)
    assert same(store.open(KEY), newer)
