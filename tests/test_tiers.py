"""Several stores as one: the first has an entry at once, the others soon, and nothing is lost on the way."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import config, entry, generate, make_llama, make_prompt, same
from processes import run_copies

import hfblend
from hfblend.generate import precompute as precomputing
from hfblend.kv.rows import full_length_cache, packed
from hfblend.store import DiskStore, MemoryStore, TieredStore

pytestmark = pytest.mark.usefixtures("remembered_proofs")

KEYS = [f"{i:064x}" for i in range(40)]
SIZE = entry().held_bytes
PROMPT = make_prompt()


class SlowStore(MemoryStore):
    """Takes an entry when it may, and notes who brought it."""

    def __init__(self, is_open=True, error=None):
        super().__init__()
        self.door, self.error, self.brought = threading.Event(), error, []
        if is_open:
            self.door.set()

    def put(self, key, chunk_kv):
        assert self.door.wait(20)
        self.brought.append((key, threading.current_thread().name))
        if self.error:
            raise self.error
        super().put(key, chunk_kv)


class Told:
    """A store, and what was asked of it."""

    def __init__(self, store):
        self.store, self.calls = store, []

    def put(self, key, chunk_kv):
        self.calls.append(("put", key))
        self.store.put(key, chunk_kv)

    def open(self, key):
        self.calls.append(("open", key))
        return self.store.open(key)


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "hfblend-store"]


# --- writing in the background ------------------------------------------------------------------------------------


def test_the_first_store_has_an_entry_at_once_and_the_others_after_a_flush():
    fast, slow, slowest = MemoryStore(), SlowStore(is_open=False), MemoryStore()
    tiers = TieredStore([fast, slow, slowest])
    for i, key in enumerate(KEYS):
        tiers.put(key, entry(seed=i))
    assert [len(store) for store in tiers.stores] == [40, 0, 0]
    slow.door.set()
    tiers.flush()
    assert [len(store) for store in tiers.stores] == [40, 40, 40]
    assert slow.brought == [(key, "hfblend-store") for key in KEYS]
    assert all(same(slowest.open(key), entry(seed=i)) for i, key in enumerate(KEYS))


def test_what_waits_can_be_opened_though_memory_has_evicted_it():
    fast, slow = MemoryStore(SIZE), SlowStore(is_open=False)
    tiers = TieredStore([fast, slow])
    for i, key in enumerate(KEYS[:5]):
        tiers.put(key, entry(seed=i))
    assert len(fast) == 1
    assert all(same(tiers.open(key), entry(seed=i)) and key in tiers for i, key in enumerate(KEYS[:5]))
    assert KEYS[5] not in tiers
    assert tiers.open(KEYS[5]) is None
    slow.door.set()
    tiers.flush()
    assert all(same(tiers.open(key), entry(seed=i)) and key in tiers for i, key in enumerate(KEYS[:5]))


def test_where_too_much_waits_put_writes_itself_and_the_newest_stays():
    slow = SlowStore(is_open=False)
    tiers = TieredStore([MemoryStore(), slow], max_waiting_bytes=2 * SIZE)
    for key in KEYS[:2]:
        tiers.put(key, entry(seed=1))
    opens = threading.Timer(0.2, slow.door.set)
    opens.start()
    tiers.put(KEYS[0], entry(seed=2))
    tiers.put(KEYS[2], entry(seed=3))
    tiers.close()
    opens.join()
    assert (KEYS[0], "MainThread") in slow.brought
    assert [same(slow.open(key), entry(seed=seed)) for key, seed in zip(KEYS, (2, 1, 3))] == [True] * 3


def test_an_entry_larger_than_all_that_may_wait_is_written(tmp_path):
    tiers = TieredStore([MemoryStore(), DiskStore(tmp_path)], max_waiting_bytes=0)
    for i, key in enumerate(KEYS):
        tiers.put(key, entry(seed=i))
    tiers.flush()
    assert all(same(tiers.stores[1].open(key), entry(seed=i)) for i, key in enumerate(KEYS))
    with pytest.raises(ValueError, match="max_bytes"):
        TieredStore([MemoryStore()], max_waiting_bytes="much")


def test_a_store_that_fails_is_logged_and_the_next_one_has_its_entry(caplog):
    broken, last = SlowStore(error=ZeroDivisionError("in the store")), MemoryStore()
    tiers = TieredStore([MemoryStore(), broken, last])
    for key in KEYS:
        tiers.put(key, entry())
    tiers.flush()
    assert len(last) == 40
    assert caplog.text.count("could not be put into a SlowStore: in the store") == 40


def test_many_threads_put_and_open(tmp_path):
    tiers = TieredStore([MemoryStore(3 * SIZE), DiskStore(tmp_path)], max_waiting_bytes=6 * SIZE)
    found = []

    def work(start):
        for i in range(start, 40, 4):
            tiers.put(KEYS[i], entry(seed=i))
            found.append(same(tiers.open(KEYS[i]), entry(seed=i)))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tiers.flush()
    assert found == [True] * 40
    assert all(same(DiskStore(tmp_path).open(key), entry(seed=i)) for i, key in enumerate(KEYS))


# --- the thread, and the process ----------------------------------------------------------------------------------


def test_the_thread_ends_with_the_last_entry_and_nothing_is_left_open(tmp_path):
    tiers = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    assert not threads()
    for _ in range(3):
        for key in KEYS:
            tiers.put(key, entry())
        assert len(threads()) <= 1
        tiers.close()
        assert not threads()
    if os.path.isdir("/proc/self/fd"):
        names = [os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink() and one.exists()]
        assert not [name for name in names if name.startswith(str(tmp_path))]


def test_a_store_that_nobody_has_any_more_writes_what_waits(tmp_path):
    slow = SlowStore(is_open=False)
    tiers = TieredStore([MemoryStore(), slow, DiskStore(tmp_path)])
    for key in KEYS:
        tiers.put(key, entry())
    del tiers
    gc.collect()
    slow.door.set()
    for thread in threads():
        thread.join()
    assert len(DiskStore(tmp_path)) == 40


ENDS = {"": 0, "raise SystemExit(3)": 3, "1 / 0": 1, "import atexit; atexit.register(put, 20, 40)": 0}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.thorough
def test_a_process_that_ends_writes_what_waits(tmp_path):
    prepared = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import time
from entries import entry
from hfblend.store import DiskStore, MemoryStore, TieredStore

class Slow(DiskStore):
    def put(self, key, chunk_kv):
        time.sleep(0.05)
        super().put(key, chunk_kv)

def put(start, stop):
    for i in range(start, stop):
        tiers.put(f"{{i:064x}}", entry(seed=i))
"""
    folders = [tmp_path / str(number) for number in range(len(ENDS))]
    scripts = [
        f"tiers = TieredStore([MemoryStore(), Slow({str(folder)!r})])\nput(0, 20)\n{end}"
        for folder, end in zip(folders, ENDS)
    ]
    assert [done.returncode for done in run_copies(prepared, scripts)] == [*ENDS.values()]
    for folder, end in zip(folders, ENDS):
        stored, count = DiskStore(folder), 40 if "atexit" in end else 20
        assert [same(stored.open(key), entry(seed=i)) for i, key in enumerate(KEYS[:count])] == [True] * count, end


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_and_so_does_its_parent(tmp_path):
    tiers, entries = TieredStore([MemoryStore(), DiskStore(tmp_path)]), [entry(seed=i) for i in range(40)]
    for round_ in range(10):
        for key, one in zip(KEYS[:20], entries):
            tiers.put(key, one)
        pid = os.fork()
        if pid == 0:
            try:
                for key, one in zip(KEYS[20:], entries[20:]):
                    tiers.put(key, one)
                tiers.close()
                os._exit(0 if all(same(tiers.stores[1].open(key), entries[20]) for key in KEYS[20:21]) else 2)
            except BaseException:
                os._exit(1)
        deadline = time.monotonic() + 20
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.005)
        if not ended[0]:
            os.kill(pid, 9)
        assert os.waitstatus_to_exitcode(ended[1]) == 0, round_
        tiers.flush()
        assert len(DiskStore(tmp_path)) == 40


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_threads_that_fork_at_once(tmp_path, times):
    """In the child as in the parent, entries are still written."""
    if torch.cuda.is_initialized():
        pytest.skip("a child that frees what other tests left on a GPU ends")
    tiers, codes, refused = TieredStore([MemoryStore(), DiskStore(tmp_path)]), [], []

    def fork():
        for _ in range(times):
            try:
                pid = os.fork()
            except RuntimeError as error:  # versions of filelock forbid it while another thread forks
                refused.append(str(error))
                continue
            if pid == 0:
                try:
                    tiers.put(KEYS[0], entry())
                    tiers.close()
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    forking = [threading.Thread(target=fork, daemon=True) for _ in range(4)]
    for thread in forking:
        thread.start()
    for thread in forking:
        thread.join(60)
    assert codes == [0] * (4 * times - len(refused))
    assert len(codes) >= times
    assert all("os.fork is unsafe" in reason for reason in refused)
    for key in KEYS:
        tiers.put(key, entry())
    tiers.close()
    assert len(tiers.stores[1]) == 40


# --- up and down --------------------------------------------------------------------------------------------------


def test_three_tiers(tmp_path):
    """Without a GPU, both memory stores have the same tensors."""
    sizes = {"max_bytes": 2 * SIZE}, {"max_bytes": 5 * SIZE, "device": "cpu"}

    def stores():
        return [*(MemoryStore(**size) for size in sizes), DiskStore(tmp_path)]

    tiers = TieredStore(stores())
    for i, key in enumerate(KEYS[:10]):
        tiers.put(key, entry(seed=i))
    tiers.flush()
    assert [len(store) for store in tiers.stores] == [2, 5, 10]
    assert all(same(tiers.open(key), entry(seed=i)) for i, key in enumerate(KEYS[:10]))
    tiers.close()
    again = TieredStore(stores())
    for _ in range(2):
        assert all(same(again.open(key), entry(seed=i)) for i, key in enumerate(KEYS[:5]))
    again.flush()
    assert [len(store) for store in again.stores] == [0, 5, 10]  # the second time nothing was read
    assert again.stores[2].counts.hits == 5


def test_what_a_remote_had_is_copied_to_disk_by_the_thread(tmp_path):
    fast, disk, remote = MemoryStore(), DiskStore(tmp_path), Told(MemoryStore())
    remote.store.put(KEYS[0], entry())
    tiers = TieredStore([fast, disk, remote])
    assert same(tiers.open(KEYS[0]), entry())
    assert KEYS[0] in fast  # at once
    tiers.flush()
    assert KEYS[0] in disk
    fast.clear()
    assert same(tiers.open(KEYS[0]), entry())
    assert remote.calls == [("open", KEYS[0])]


def test_entries_are_not_read_ahead_while_they_wait():
    class Ahead(SlowStore):
        asked = ()

        def read_ahead(self, keys):
            self.asked = tuple(keys)

    slow = Ahead(is_open=False)
    tiers = TieredStore([MemoryStore(SIZE), slow])
    for key in KEYS[:3]:
        tiers.put(key, entry())
    tiers.read_ahead(KEYS[:4])
    assert slow.asked == (KEYS[3],)
    slow.door.set()
    tiers.flush()


# --- in use -------------------------------------------------------------------------------------------------------


def test_precompute_reports_what_is_on_disk(tmp_path):
    class Slow(DiskStore):
        def put(self, key, chunk_kv):
            time.sleep(0.02)
            super().put(key, chunk_kv)

    model, chunks = make_llama(), [[7 + i, 9, 11] for i in range(8)]
    tiers = TieredStore([MemoryStore(), Slow(tmp_path)])
    counts = []

    def look(report):
        counts.append((report.computed, len(DiskStore(tmp_path)) - 1))  # the prefix

    options = {"prefix": [5, 6], "config": config(), "batch_size": 3, "progress": look}
    report = precomputing.precompute(model, chunks, store=tiers, **options)
    assert (report.computed, report.failed) == (8, 0)
    assert len(counts) == 4
    assert all(told == stored for told, stored in counts)


def test_remove_waits_until_all_is_stored(tmp_path):
    model, slow = make_llama(), SlowStore()
    put = slow.put
    slow.put = lambda key, chunk_kv: (time.sleep(0.05), put(key, chunk_kv))
    with hfblend.patch(model, config=config(0.3), store=TieredStore([MemoryStore(), slow, DiskStore(tmp_path)])):
        cold = generate(model, PROMPT.inputs())
    assert len(DiskStore(tmp_path)) == 4
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        assert torch.equal(generate(model, PROMPT.inputs()).sequences, cold.sequences)
        assert blender.trace.hits == 3


def test_nobody_writes_into_an_entry(tmp_path):
    """What is copied in the background must be what was computed, whatever is done with it meanwhile."""
    model = make_llama()
    for on_miss in ("isolated", "in_context"):
        slow = SlowStore(is_open=False)
        tiers = TieredStore([Told(MemoryStore()), slow])
        with hfblend.patch(model, config=config(0.3, on_miss=on_miss), store=tiers):
            generate(model, PROMPT.inputs())
            keys = [key for kind, key in tiers.stores[0].calls if kind == "put"]
            before = {key: [[t.clone() for t in tiers.open(key).layer(i)] for i in range(2)] for key in keys}
            for _ in range(2):
                generate(model, PROMPT.inputs())
            slow.door.set()
        for key in keys:
            kept = [slow.open(key).layer(i) for i in range(2)]
            assert all(torch.equal(a, b) for one, two in zip(before[key], kept) for a, b in zip(one, two))


# --- tenants ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_miss", ["isolated", "in_context"])
@pytest.mark.parametrize("chunk_prefix", ["prompt", "bos"])
def test_a_tenant_cannot_tell_what_another_one_holds(on_miss, chunk_prefix):
    """The same operations, call by call and under the same keys, whether another tenant holds the chunks or nobody."""
    model, calls, outputs = make_llama(), {}, {}
    for held_by_other in (True, False):
        store = Told(MemoryStore())
        for tenant in ("a", "b") if held_by_other else ("b",):
            store.calls.clear()
            settings = config(0.3, namespace=tenant, on_miss=on_miss, chunk_prefix=chunk_prefix)
            with hfblend.patch(model, config=settings, store=store) as blender:
                outputs[held_by_other] = generate(model, PROMPT.inputs()).sequences
                assert blender.trace.hits == 0
            calls[tenant, held_by_other] = list(store.calls)
    assert calls["b", True] == calls["b", False]
    assert torch.equal(outputs[True], outputs[False])
    of_a, of_b = ({key for _, key in calls[tenant, True]} for tenant in "ab")
    assert of_a
    assert of_a.isdisjoint(of_b)
    assert [kind for kind, _ in calls["a", True]] == [kind for kind, _ in calls["b", True]]


def test_tenants_of_one_folder_find_their_own_entries_only(tmp_path):
    model = make_llama()
    for tenant, hits in (("a", 0), ("b", 0), ("", 0), ("a", 3), ("b", 3), ("", 3)):
        with hfblend.patch(model, config=config(0.3, namespace=tenant), store=tmp_path) as blender:
            generate(model, PROMPT.inputs())
            assert blender.trace.hits == hits
    assert len(DiskStore(tmp_path)) == 3 * 4


# --- GPU ----------------------------------------------------------------------------------------------------------


def large_entry(seed, tokens=512, layers=8):
    """16 MiB on the GPU, packed as chunks are."""
    kv = [
        [torch.full((1, 8, tokens, 128), seed + i / 16, device="cuda").half() for _ in range(2)] for i in range(layers)
    ]
    cache = full_length_cache(packed(one) for one in kv)
    return hfblend.ChunkKV(cache, torch.arange(tokens))


def is_large_entry(found, seed):
    values = ((seed + i / 16, t) for i in range(8) for t in found.layer(i))
    return all(bool((t == value).all()) for value, t in values)


@pytest.mark.gpu
def test_three_tiers_of_a_gpu(tmp_path):
    size = large_entry(0).held_bytes

    def stores(first):
        return TieredStore([first, MemoryStore(8 * size, device="cpu"), DiskStore(tmp_path)])

    tiers = stores(MemoryStore(2 * size))
    for i, key in enumerate(KEYS[:6]):
        tiers.put(key, large_entry(i))
    tiers.flush()
    gpu, ram, disk = tiers.stores
    assert [len(store) for store in tiers.stores] == [2, 6, 6]
    assert gpu.open(KEYS[5]).layer(0)[0].is_cuda
    assert all(is_large_entry(tiers.open(key), i) for i, key in enumerate(KEYS[:6]))
    assert all(ram.open(key).layer(i)[0].is_pinned() for key in KEYS[:6] for i in range(8))
    again = stores(MemoryStore(8 * size, device="cuda:0"))
    for _ in range(2):  # from disk, then from where it was promoted to
        assert all(is_large_entry(again.open(key), i) for i, key in enumerate(KEYS[:6]))
        again.flush()
    assert [len(store) for store in again.stores] == [6, 6, 6]
    assert all(again.stores[0].open(key).layer(i)[0].is_cuda for key in KEYS[:6] for i in range(8))
    assert disk.counts.hits + again.stores[2].counts.hits == 6


@pytest.mark.gpu
def test_put_does_not_wait_for_the_gpu_and_copies_what_was_computed_last(tmp_path):
    tiers = TieredStore([MemoryStore(), MemoryStore(device="cpu"), DiskStore(tmp_path)])
    tiers.put(KEYS[9], large_entry(9))  # streams and kernels are made
    tiers.flush()
    with torch.cuda.stream(torch.cuda.Stream()):
        one = large_entry(1)
        torch.cuda._sleep(1_000_000_000)  # half a second and more
        for i in range(8):
            one.layer(i)[0].fill_(3.0)
        began = time.perf_counter()
        tiers.put(KEYS[0], one)
        seconds = time.perf_counter() - began
        busy = not torch.cuda.current_stream().query()
        torch.cuda._sleep(1_000_000_000)
    assert busy
    assert seconds < 0.1
    tiers.flush()
    kept = tiers.stores[1].open(KEYS[0])
    assert all(bool((kept.layer(i)[0] == 3.0).all()) for i in range(8))


@pytest.mark.gpu
def test_pinned_buffers_are_given_back(tmp_path):
    """Entries after the first few are copied through the buffers that those had."""
    tiers = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    allocated = []
    for _ in range(3):
        for i, key in enumerate(KEYS[:6]):
            tiers.put(key, large_entry(i))
        tiers.close()
        gc.collect()
        allocated.append(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    assert allocated[1] == allocated[2]
