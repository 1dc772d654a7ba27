"""Chunk KV on a real Redis server: what was written is read; dying, hanging, refusing and evicting cost reuse."""

from __future__ import annotations

import itertools
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import FAULTS, config, entry, generate, make_llama, make_prompt, same
from processes import run_script
from redis_servers import Server, needs_a_server
from typer.testing import CliRunner

import hfblend
from hfblend.cli import app
from hfblend.kv.chunk import ChunkLost
from hfblend.store import DiskStore, MemoryStore, RemoteStore, TieredStore, sources, store_at
from hfblend.store.format import dump, parse
from hfblend.store.redis import RedisFolder

redis = pytest.importorskip("redis")
pytestmark = [needs_a_server, pytest.mark.thorough]

KEY, OTHER = f"{1:064x}", f"{2:064x}"
NAME = f"hfblend:{KEY}.safetensors"
PROMPT = make_prompt()


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def in_parts(monkeypatch):
    """Entries are read in ranges, a layer in each."""
    monkeypatch.setattr(sources, "HEAD_BYTES", 2**11)
    monkeypatch.setattr("hfblend.store.loader.LAYERS_A_READ", 1)


def whole(store, key=KEY):
    """The entry, every layer read; `None` if it is not there or lost on the way."""
    found = store.open(key)
    try:
        return found if found and [found.layer(i) for i in range(found.num_layers)] else None
    except ChunkLost:
        return None


def complaints(caplog):
    return [record.message for record in caplog.records if record.name.startswith("hfblend")]


def with_user(server, name, *rules):
    """A URL of a user with these rights."""
    server.client.execute_command("ACL", "SETUSER", name, "on", ">secret", "-@all", *rules)
    return server.url.replace("//", f"//{name}:secret@") + f"?prefix={name}:"


# --- what is written is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(server, dtype, caplog):
    written = entry(dtype=dtype, provenance="in_context", behind_ids=[7, 1, 9], regime=300)
    RemoteStore(server.url).put(KEY, written)
    assert same(RemoteStore(server.url).open(KEY), written)
    assert RemoteStore(server.url).open(OTHER) is None
    assert same(parse(KEY, server.client.get(NAME)), written)
    assert server.client.ttl(NAME) == -1
    assert complaints(caplog) == []


@pytest.mark.parametrize("scheme", ["redis", "valkey", "unix"])
def test_a_server_is_found_by_its_scheme(server, scheme):
    url = f"unix://{server.socket}?prefix=a:" if scheme == "unix" else server.url.replace("redis", scheme)
    RemoteStore(url, prefix="a:").put(KEY, entry())
    assert server.client.keys() == [f"a:{KEY}.safetensors".encode()]
    memory, remote = store_at(url).stores
    assert isinstance(memory, MemoryStore)
    assert isinstance(remote._folder, RedisFolder)


def test_layers_are_read_in_ranges(server, in_parts):
    store, written = RemoteStore(server.url), entry(tokens=64, layers=3)
    store.put(KEY, written)
    server.client.config_resetstat()
    assert same(store.open(KEY), written)
    commands = server.client.info("commandstats")
    assert commands["cmdstat_getrange"]["calls"] == 1 + 3  # header, and each layer
    assert "cmdstat_get" not in commands
    assert store.counts.bytes_read == written.num_bytes


@pytest.mark.parametrize("how", ["url", "option"])
def test_entries_expire(server, how):
    store = RemoteStore(server.url + "?ttl=100") if how == "url" else RemoteStore(server.url, ttl=100)
    store.put(KEY, entry())
    assert 90 < server.client.ttl(NAME) <= 100
    server.client.pexpire(NAME, 1)
    time.sleep(0.05)
    assert store.open(KEY) is None
    assert (store.counts.misses, store.counts.failed, store.counts.damaged) == (1, 0, 0)


def test_upkeep_sees_its_own_entries_and_no_others(server):
    """A prefix is no pattern."""
    store, other = RemoteStore(server.url + "?prefix=a[b]*:"), RemoteStore(server.url + "?prefix=ab1:")
    server.client.set("a[b]*:note", b"x")
    for key in (KEY, OTHER):
        store.put(key, entry())
        other.put(key, entry())
    store.pin(KEY)
    assert sorted(store.keys()) == [KEY, OTHER]
    assert store.num_bytes >= 2 * len(dump(KEY, entry()))
    assert {(one.key, one.pinned, one.tokens) for one in store.entries()} == {(KEY, True, 4), (OTHER, False, 4)}
    assert store.fault_of(KEY) is None
    assert KEY in store
    store.remove(KEY)
    assert KEY not in store
    store.clear()
    assert sorted(other.keys()) == [KEY, OTHER]
    assert server.client.exists("a[b]*:note")


def test_a_list_is_no_use_of_an_entry(server):
    store = RemoteStore(server.url)
    store.put(KEY, entry())
    time.sleep(1.5)
    (listed,) = store._listed()
    assert server.client.object("idletime", NAME) >= 1
    assert time.time() - 60 < listed.last_used < time.time() - 0.9
    assert store.open(KEY) is not None
    assert server.client.object("idletime", NAME) == 0


def test_a_budget_of_the_store_removes_the_least_recently_used(server):
    size = len(dump(KEY, entry(tokens=400)))
    store = RemoteStore(server.url, max_bytes=int(5.5 * size))
    for i in range(8):
        store.put(f"{i:064x}", entry(tokens=400, seed=i))
    assert 3 <= len(store) <= 5
    assert store.counts.evicted == 8 - len(store)


def test_the_command_looks_after_a_server(server):
    RemoteStore(server.url).put(KEY, entry())
    found = CliRunner().invoke(app, ["store", "ls", server.url, "--json"])
    assert [one["key"] for one in json.loads(found.output)] == [KEY]
    assert CliRunner().invoke(app, ["store", "verify", server.url]).exit_code == 0
    assert CliRunner().invoke(app, ["store", "rm", server.url, KEY[:60]]).exit_code == 0
    assert len(RemoteStore(server.url)) == 0


# --- what cannot be trusted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_value_is_a_miss_removed_and_said(server, in_parts, fault, caplog):
    store, written = RemoteStore(server.url), entry(tokens=64)
    store.put(KEY, written)
    server.client.set(NAME, FAULTS[fault](server.client.get(NAME)))
    assert whole(store) is None
    assert "is damaged, removed" in caplog.text
    assert not server.client.exists(NAME)
    store.put(KEY, written)
    assert same(store.open(KEY), written)


def test_a_value_of_another_kind_is_a_miss(server, caplog):
    server.client.rpush(NAME, "a", "list")
    assert RemoteStore(server.url).open(KEY) is None
    assert "WRONGTYPE" in caplog.text


def test_an_entry_that_is_evicted_between_two_ranges_is_lost_and_no_fault(server, in_parts, caplog):
    store, written = RemoteStore(server.url), entry(tokens=64, layers=8)
    store.put(KEY, written)
    found = store.open(KEY)
    assert torch.equal(found.layer(0)[0], written.layer(0)[0])
    server.client.delete(NAME)
    with pytest.raises(ChunkLost, match="no longer"):
        [found.layer(i) for i in range(8)]
    assert (store.counts.damaged, store.counts.failed) == (0, 0)
    assert complaints(caplog) == []


def test_an_entry_that_was_replaced_between_two_ranges_is_lost_and_stays(server, in_parts):
    store = RemoteStore(server.url)
    store.put(KEY, entry(tokens=64, layers=8))
    found = store.open(KEY)
    store.put(KEY, entry(tokens=64, layers=8, seed=1))
    with pytest.raises(ChunkLost):
        [found.layer(i) for i in range(8)]
    assert same(store.open(KEY), entry(tokens=64, layers=8, seed=1))


def test_an_entry_larger_than_a_value_is_said_and_pauses_nothing(server, monkeypatch, caplog):
    monkeypatch.setattr(RedisFolder, "most_bytes", len(dump(KEY, entry())))
    store = RemoteStore(server.url)
    for _ in range(4):
        store.put(KEY, entry(tokens=100))
    assert "make chunks shorter, or keep KV in 8 bits" in caplog.text
    store.put(OTHER, entry())
    assert store.keys() == [OTHER]


# --- servers that refuse, hang or die -----------------------------------------------------------------------------


def test_a_wrong_password_costs_reuse_and_is_said_once(server, caplog):
    with_user(server, "a", "allcommands", "allkeys")
    store = RemoteStore(server.url.replace("//", "//a:hunter2@"), pause_s=0.05)
    for _ in range(20):
        assert store.open(KEY) is None
        store.put(KEY, entry())
        time.sleep(0.01)
    read, written, left_alone = sorted(complaints(caplog))
    assert "could not be read" in read
    assert "could not be written" in written
    assert "AuthenticationError" in read
    assert "left alone" in left_alone
    assert store.counts.failed > 6
    assert "hunter2" not in caplog.text + repr(store) + repr(vars(store)) + repr(vars(store._folder))
    assert server.client.dbsize() == 0


def test_a_tenants_keys_are_its_own(server, caplog):
    """Rights by a pattern of keys: the other's entries are neither read, written nor removed."""
    rules = ["+get", "+getrange", "+set", "+unlink", "+exists", "+strlen", "+scan", "+memory|usage", "+object|idletime"]
    ours, theirs = (RemoteStore(with_user(server, name, f"~{name}:*", *rules)) for name in ("ours", "theirs"))
    theirs.put(KEY, entry())
    ours.put(OTHER, entry())
    assert same(theirs.open(KEY), entry())
    assert (theirs.keys(), ours.keys(), len(list(ours.entries()))) == ([KEY], [OTHER], 1)
    assert ours.fault_of(OTHER) is None
    ours.remove(OTHER)
    assert complaints(caplog) == []

    intruder = RemoteStore(with_user(server, "ours", "~ours:*", *rules), prefix="theirs:")
    for _ in range(3):
        assert intruder.open(KEY) is None
    intruder.put(KEY, entry(seed=1))
    with pytest.raises(OSError, match="NoPermission"):
        intruder.remove(KEY)
    assert same(theirs.open(KEY), entry())
    assert intruder.counts.failed == 4
    assert sum("could not be read" in line for line in complaints(caplog)) == 1
    assert "secret" not in caplog.text


def test_a_tenant_that_may_only_read_reads(server, caplog):
    RemoteStore(server.url + "?prefix=a:").put(KEY, entry())
    store = RemoteStore(with_user(server, "a", "~a:*", "+getrange", "+exists"))
    for _ in range(5):
        assert same(store.open(KEY), entry())
        store.put(OTHER, entry())
    assert sum("could not be written" in line for line in complaints(caplog)) == 1
    assert server.client.keys() == [f"a:{KEY}.safetensors".encode()]


def test_a_full_server_that_evicts_nothing_is_read(tmp_path, caplog):
    server = Server(tmp_path, maxmemory="4mb", **{"maxmemory-policy": "noeviction"})
    try:
        store, large = RemoteStore(server.url), entry(tokens=20_000)
        store.put(KEY, entry())
        for i in range(3):
            store.put(f"{i + 9:064x}", large)
        assert same(store.open(KEY), entry())
        assert "maxmemory" in caplog.text
    finally:
        server.kill()


def test_a_server_that_hangs_costs_one_timeout(server, caplog):
    store = RemoteStore(server.url, timeout_s=0.3)
    store.put(KEY, entry())
    with server.hanging():
        for _ in range(5):
            assert store.open(KEY) is None
            store.put(OTHER, entry())
    assert caplog.text.count("no answer within 0.3 s") == 1
    assert caplog.text.count("left alone for 60 s") == 1


def test_a_server_that_is_not_there_costs_reuse(server, caplog):
    store = RemoteStore(server.url, pause_s=0.05)
    server.kill()
    for _ in range(3):
        assert store.open(KEY) is None
    store.put(KEY, entry())
    assert sum("could not be read" in line for line in complaints(caplog)) == 1
    server.start()
    time.sleep(0.1)
    store.put(KEY, entry())
    assert same(store.open(KEY), entry())


def test_a_server_that_was_started_anew_is_used_without_a_failure(server, caplog):
    """Connections that it closed meanwhile are opened anew."""
    store = RemoteStore(server.url)
    store.put(KEY, entry())
    server.restart()
    assert store.open(KEY) is None
    store.put(KEY, entry())
    assert same(store.open(KEY), entry())
    assert complaints(caplog) == []


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_server_that_dies_in_mid_write_has_no_half_of_an_entry(server, monkeypatch, comes_back, caplog):
    store, written = RemoteStore(server.url), entry(tokens=4000, layers=8)
    store.put(OTHER, entry())
    send, deaths = redis.connection.AbstractConnection.send_packed_command, itertools.count()

    def send_half(self, command, *args, **kwargs):
        if any(len(part) > 2**16 for part in command) and next(deaths) == 0:
            for part in command:
                self._sock.sendall(part[: len(part) // 2] if len(part) > 2**16 else part)
            (server.restart if comes_back else server.kill)()
        return send(self, command, *args, **kwargs)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", send_half)
    store.put(KEY, written)
    assert next(deaths) > 0
    if not comes_back:
        assert "could not be written" in caplog.text
        server.start()
        assert whole(store) is None
    store.put(KEY, written)
    assert same(store.open(KEY), written)
    assert store.counts.damaged == 0


def test_what_came_of_a_client_that_died_in_mid_write_is_not_seen(server):
    file = dump(KEY, entry(tokens=4000))
    command = b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s" % (
        len(NAME),
        NAME.encode(),
        len(file),
        file[: len(file) // 2],
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(command)
    assert RemoteStore(server.url).open(KEY) is None
    assert server.client.dbsize() == 0


# --- URLs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://u:sec/ret@h/0", "%2F for /"),
        ("redis://us/er:secret@h/0", "%2F for /"),
        ("redis://u:secret@h:port/0", "cannot be read"),
        ("redis://u:secret@h/tenant", "prefix=tenant"),
        ("redis://u:secret@h/0?ttl=0", "ttl must be 1"),
        ("redis://u:secret@h/0?tll=5", "tll"),
    ],
)
def test_a_url_that_cannot_be_read_says_so_and_quotes_no_password(url, says):
    with pytest.raises(ValueError, match=says) as error:
        store_at(url)
    assert "sec" not in str(error.value)


def test_a_ttl_is_a_whole_number():
    for ttl in ("soon", 1.5, True):
        with pytest.raises(TypeError, match="ttl must be a whole number"):
            RemoteStore("redis://h/0", ttl=ttl)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"pip install 'hfblend\[redis\]'"):
        store_at("redis://127.0.0.1/0")


# --- generate -----------------------------------------------------------------------------------------------------


def blended(store, ratio=0.3):
    """A prompt on a new model, as another process would have it; tokens and trace."""
    with hfblend.patch(make_llama(), config=config(ratio), store=store) as blender:
        output = generate(blender.model, PROMPT.inputs())
    assert blender.trace.blended
    return output.sequences, blender.trace


@pytest.fixture(scope="module")
def intact():
    """Tokens of an uninterrupted blend, and of stock's full prefill."""
    return blended(MemoryStore())[0], generate(make_llama(), {"input_ids": PROMPT.input_ids}).sequences


def test_a_second_use_reuses_what_the_first_one_stored(server, in_parts, intact):
    first, cold = blended(server.url)
    second, warm = blended(server.url)
    assert [(trace.hits, trace.misses) for trace in (cold, warm)] == [(0, 3), (3, 0)]
    assert torch.equal(first, intact[0])
    assert torch.equal(second, intact[0])
    assert torch.equal(blended(server.url, ratio=1.0)[0], intact[1])


def test_a_tier_between_disk_and_another_remote(server, tmp_path, in_parts, intact):
    def tiers(folder):
        far = RemoteStore("memory://far")
        return TieredStore([MemoryStore(), DiskStore(tmp_path / folder), RemoteStore(server.url), far])

    blended(tiers("one"))  # on one machine
    assert server.client.dbsize() == 4  # prefix and chunks
    tokens, trace = blended(tiers("two"))  # on another, whose disk is empty
    assert trace.hits == 3
    assert torch.equal(tokens, intact[0])
    assert len(DiskStore(tmp_path / "two")) == 4
    server.client.flushall()
    tokens, trace = blended(tiers("three"))  # from the slowest
    assert trace.hits == 3
    assert torch.equal(tokens, intact[0])
    assert server.client.dbsize() == 4


@pytest.mark.parametrize("how", ["killed", "restarted", "evicted", "hangs"])
@pytest.mark.parametrize("at", [0, 1, 5, 11, 16])
def test_generate_answers_when_the_server_fails_in_mid_read(server, in_parts, intact, monkeypatch, caplog, how, at):
    blended(RemoteStore(server.url))
    read, reads, let_go = RedisFolder.read, itertools.count(), threading.Event()

    def failing(self, name, start=0, stop=None):
        if (number := next(reads)) == at:
            {"killed": server.kill, "restarted": server.restart, "evicted": server.client.flushall}.get(how, list)()
        if how == "hangs" and number >= at:
            let_go.wait(20)
        return read(self, name, start, stop)

    monkeypatch.setattr(RedisFolder, "read", failing)
    tokens, _ = blended(RemoteStore(server.url, timeout_s=0.3 if how == "hangs" else 10))
    let_go.set()
    assert next(reads) > at
    assert torch.equal(tokens, intact[0])
    assert sum("no answer" in line and "redis://" in line for line in complaints(caplog)) == (how == "hangs")
    if how == "evicted":
        assert not [line for line in complaints(caplog) if "redis://" in line]


@pytest.mark.parametrize("rules", [[], ["+getrange", "+exists"]], ids=["foreign", "read-only"])
def test_generate_answers_without_rights(server, intact, rules, caplog):
    url = with_user(server, "a", "~a:*" if rules else "~b:*", "+set", *rules)
    tokens, trace = blended(RemoteStore(url))
    assert torch.equal(tokens, intact[0])
    assert (trace.hits, trace.misses) == (0, 3)
    if not rules:
        assert "NoPermission" in caplog.text


def test_stored_texts_are_found_in_plain_prompts(server):
    model, texts = make_llama(), make_prompt(sizes=(60, 70))
    plain = texts.inputs()["input_ids"]
    settings = config(1.0, find="stored", chunk_prefix="none", separator=None)
    with hfblend.patch(model, config=settings, store=RemoteStore(server.url)) as blender:
        blender.precompute([texts.ids[start:stop] for start, stop in texts.chunk_spans])
        generate(model, {"input_ids": plain})
        assert blender.trace.hits == 2


# --- eviction, and many at once -----------------------------------------------------------------------------------


@pytest.fixture
def small_server(tmp_path):
    one = Server(tmp_path, maxmemory="32mb", **{"maxmemory-policy": "allkeys-lru"})
    yield one
    one.kill()


def test_what_the_server_evicts_is_a_miss(small_server, in_parts, caplog):
    """200 entries of half a megabyte in 32: the newest stay, and each is whole or gone."""
    store, keys = RemoteStore(small_server.url), [f"{i:064x}" for i in range(200)]
    for i, key in enumerate(keys):
        store.put(key, entry(tokens=1024, layers=4, seed=i))
        assert same(whole(store, key), entry(tokens=1024, layers=4, seed=i))
    found = [key for i, key in enumerate(keys) if (one := whole(store, key)) and same(one, entry(1024, 4, seed=i))]
    assert 20 <= len(found) < 64
    assert len(found) == len(store)
    assert small_server.client.info("memory")["used_memory"] < 33 * 2**20
    assert small_server.client.info("stats")["evicted_keys"] == 200 - len(found)
    assert (store.counts.failed, store.counts.damaged) == (0, 0)
    assert complaints(caplog) == []


def test_generate_answers_while_the_server_evicts(small_server, in_parts, intact):
    """Others fill it all the time."""
    done, other = threading.Event(), RemoteStore(small_server.url)

    def fill():
        for i in itertools.count():
            if done.is_set():
                return
            other.put(f"{i:064x}", entry(tokens=4096, layers=4))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        for _ in range(6):
            assert torch.equal(blended(RemoteStore(small_server.url))[0], intact[0])
        assert small_server.client.info("stats")["evicted_keys"] > 0
    finally:
        done.set()
        thread.join()


WORK = """
import random, sys
sys.path.insert(0, TESTS)
from entries import entry, same
from hfblend.kv.chunk import ChunkLost
from hfblend.store import RemoteStore
store = RemoteStore(URL, timeout_s=60, pause_s=0.01)
chance, found = random.Random(NUMBER), 0
for _ in range(TIMES):
    seed = chance.randrange(40)
    key, want = f"{seed:064x}", entry(TOKENS, LAYERS, seed=seed)
    one = store.open(key)
    try:
        if one is None:
            store.put(key, want)
        else:
            assert same(one, want), key
            found += 1
    except ChunkLost:
        pass
print(found, store.counts.damaged, store.counts.failed)
"""


def eight_at(url, tokens, layers, times):
    """Lets eight processes read and write the same 40 entries; returns a call that waits for what each has found, and
    for what was damaged and what failed."""
    named = {"URL": url, "TOKENS": tokens, "LAYERS": layers, "TIMES": times, "TESTS": str(Path(__file__).parent)}
    given = "".join(f"{name} = {value!r}\n" for name, value in named.items())
    pool = ThreadPoolExecutor(8)
    begun = [pool.submit(run_script, f"NUMBER = {number}\n{given}{WORK}") for number in range(8)]

    def numbers():
        outcomes = [one.result() for one in begun]
        assert [one.returncode for one in outcomes] == [0] * 8, outcomes
        return [tuple(map(int, one.stdout.split())) for one in outcomes]

    return numbers


@pytest.mark.thorough
def test_eight_processes_share_a_server_that_evicts(tmp_path):
    """40 entries of 8 MB in 256 MB."""
    server = Server(tmp_path, maxmemory="256mb", **{"maxmemory-policy": "allkeys-lru"})
    try:
        numbers = eight_at(server.url, 4096, 16, 30)()
        assert server.client.info("stats")["evicted_keys"] > 0
    finally:
        server.kill()
    assert all(found > 0 and (damaged, failed) == (0, 0) for found, damaged, failed in numbers), numbers


@pytest.mark.thorough
def test_eight_processes_outlive_a_server_that_is_killed_again_and_again(server):
    numbers_of_all = eight_at(server.url, 512, 8, 150)
    for _ in range(8):
        time.sleep(0.5)
        server.restart()
    numbers = numbers_of_all()
    assert all(found > 0 and damaged == 0 for found, damaged, _ in numbers), numbers


@pytest.mark.thorough
def test_generate_answers_while_the_server_is_killed_again_and_again(server, in_parts, intact, caplog):
    done = threading.Event()

    def kill():
        while not done.wait(0.15):
            server.restart()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        for _ in range(20):
            assert torch.equal(blended(RemoteStore(server.url, timeout_s=2, pause_s=0.01))[0], intact[0])
    finally:
        done.set()
        thread.join()
    assert "is damaged" not in caplog.text


@pytest.mark.slow
def test_a_value_of_nearly_half_a_gigabyte_is_read_in_ranges(server):
    written = entry(tokens=120_000, layers=32)  # 492 MB
    store = RemoteStore(server.url, timeout_s=60)
    store.put(KEY, written)
    assert server.client.strlen(NAME) > 490e6
    assert same(store.open(KEY), written)
