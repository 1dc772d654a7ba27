"""The index of stored texts: sound and complete on made-up texts, and whole again after any damage."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from entries import entry
from hypothesis import given, settings
from hypothesis import strategies as st

from hfblend.kv.part import part_of
from hfblend.kv.rows import full_length_cache, packed
from hfblend.store import DiskStore, MemoryStore, RemoteStore
from hfblend.store import index as module
from hfblend.store.folders import LocalFolder
from hfblend.store.index import LEAST, Hashed, Index, longest_first, stands_for
from hfblend.store.journal import INDEX, Journal, Text
from hfblend.store.keys import scope_of

KEYS = [f"{i:064x}" for i in range(1000)]
SCOPE, OTHER = "a" * 64, "b" * 64


def everywhere(numbers, sums):
    return np.zeros(len(numbers), int)


def found_in(index, ids):
    matches = [match for _, found in index.find(Hashed(ids), everywhere) for match in found]
    return longest_first(matches, 0, len(ids))


def indexed(texts):
    index = Index()
    for key, text in zip(KEYS, texts):
        index.add(key, text, 0, 0)
    return index


def require_sound(ids, texts, matches):
    """Each match is a part of a text, id by id, long enough, and none lies over another."""
    stop = 0
    for match in matches:
        text = texts[KEYS.index(match.key)]
        assert ids[match.start : match.stop] == text[match.offset : match.offset + match.stop - match.start]
        assert match.start >= stop
        assert match.stop - match.start >= LEAST
        stop = match.stop


def covered(matches):
    return {i for match in matches for i in range(match.start, match.stop)}


@st.composite
def edited(draw):
    """Texts, a prompt of parts of them, and the spans of the parts that are long enough to be found.

    Ids of a large vocabulary: nothing else is equal by chance. Parts are cut out (deletions), other ids stand between
    them (insertions), texts are repeated and share their beginnings (overlaps).
    """
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    texts = [random.integers(0, 50_000, draw(st.integers(1, 200))).tolist() for _ in range(draw(st.integers(1, 6)))]
    if draw(st.booleans()):
        texts.append(texts[0][len(texts[0]) // 2 :] + random.integers(0, 50_000, 80).tolist())
    ids, planted = [], []
    for _ in range(draw(st.integers(0, 8))):
        text = draw(st.sampled_from(texts))
        first = draw(st.integers(0, len(text)))
        last = draw(st.integers(first, len(text)))
        ids += random.integers(50_000, 90_000, draw(st.integers(0, 3))).tolist()
        if last - first >= LEAST:
            planted.append((len(ids), len(ids) + last - first))
        ids += text[first:last]
    return texts, ids, planted


@settings(max_examples=150, deadline=None)
@given(edited())
def test_parts_of_texts_are_found_wherever_they_stand(made):
    texts, ids, planted = made
    matches = found_in(indexed(texts), ids)
    require_sound(ids, texts, matches)
    there = covered(matches)
    longest = max((match.stop - match.start for match in matches), default=0)
    for start, stop in planted:
        # what a longer neighbour has taken of a part may leave less than can be a match
        assert len(set(range(start, stop)) - there) < 2 * LEAST
        assert longest >= stop - start


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=150), max_size=8), st.lists(st.integers(0, 2), max_size=300))
def test_texts_that_repeat_themselves_are_matched_soundly(texts, ids):
    require_sound(ids, texts, found_in(indexed(texts), ids))


def test_one_text_many_times_and_a_prompt_of_one_id():
    text = list(range(100))
    assert [(m.start, m.stop) for m in found_in(indexed([text]), text * 3)] == [(0, 100), (100, 200), (200, 300)]
    ids = [7] * 5000
    matches = found_in(indexed([[7] * 300]), ids)
    require_sound(ids, [[7] * 300], matches)
    assert matches


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=120))
def test_what_was_discarded_is_not_found(steps):
    random = np.random.default_rng(0)
    texts = [random.integers(0, 50_000, 40).tolist() for _ in range(31)]
    index, there = Index(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PENDING", 16)  # tables of several sizes
        for adds, number in steps:
            if adds:
                index.add(KEYS[number], texts[number], number % 3, 0)
                there.add(number)
            else:
                index.discard(KEYS[number])
                there.discard(number)
            if number % 5 == 0:
                found_in(index, texts[number])
        found = found_in(index, [i for text in texts for i in text])
    assert {KEYS.index(match.key) for match in found} == there
    assert len(index) == len(there)


def test_ids_before_a_text_are_told_apart():
    assert stands_for([1, 2]) != stands_for([2, 1])
    assert stands_for([]) == 0
    assert Hashed([1, 2]).followed_by(Hashed([3]))[2] == stands_for([1, 2, 3])


# --- stores -----------------------------------------------------------------------------------------------------------


def text_of(number, tokens=40):
    return np.random.default_rng(number).integers(0, 50_000, tokens).tolist()


def kv(number, scope=SCOPE, tokens=40, **more):
    return entry(tokens, seed=number, ids=text_of(number, tokens), scope=scope, **more)


def in_store(store, numbers, scope=SCOPE):
    return {n for n in numbers if [m.key for m in found_in(store.index(scope), text_of(n))] == [KEYS[n]]}


@pytest.fixture(params=["memory", "disk", "remote"])
def store(request, tmp_path):
    if request.param == "remote":
        pytest.importorskip("fsspec")
        return RemoteStore(f"memory://{tmp_path.name}")
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path)


def test_a_store_knows_what_was_put_before_and_after_it_was_asked(store):
    for number in (0, 1):
        store.put(KEYS[number], kv(number))
    assert in_store(store, range(6)) == {0, 1}
    store.put(KEYS[2], kv(2))
    store.put(KEYS[3], kv(3, OTHER))
    store.put(KEYS[4], kv(4, provenance="in_context"))
    store.put(KEYS[5], entry(40, seed=5))  # without its ids, as in files of earlier versions
    assert in_store(store, range(6)) == {0, 1, 2}
    assert in_store(store, range(6), OTHER) == {3}
    store.clear()
    if not isinstance(store, RemoteStore):  # which looks again later
        assert in_store(store, range(6)) == set()


def test_memory_forgets_texts_with_their_entries():
    one = kv(0)
    store = MemoryStore(max_bytes=3 * one.held_bytes)
    for number in range(5):
        store.put(KEYS[number], kv(number))
        assert len(store.index(SCOPE)) == len(store) == min(3, number + 1)
    assert in_store(store, range(5)) == {2, 3, 4}


def test_processes_see_what_others_put(tmp_path):
    one, other = DiskStore(tmp_path), DiskStore(tmp_path)
    one.index(SCOPE)
    for number in range(6):
        (one, other)[number % 2].put(KEYS[number], kv(number))
        assert in_store(one, range(6)) == in_store(other, range(6)) == set(range(number + 1))


def test_writers_at_the_same_time_lose_no_line(tmp_path):
    stores = [DiskStore(tmp_path) for _ in range(4)]
    stores[0].index(SCOPE)
    threads = [
        threading.Thread(target=lambda k=k: [stores[k].put(KEYS[i], kv(i)) for i in range(k, 40, 4)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert in_store(stores[0], range(40)) == set(range(40))
    assert len(list(tmp_path.glob("*" + INDEX))) == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), flipped=st.one_of(st.none(), st.integers(0, 10_000)), more=st.integers(0, 2))
def test_damaged_lines_cost_reuse_only(tmp_path_factory, cut, flipped, more):
    folder = LocalFolder(tmp_path_factory.mktemp("journal"))
    journal = Journal(folder, SCOPE + INDEX)
    texts = [Text.of(KEYS[i], kv(i)) for i in range(6)]
    journal.keep(())
    journal.append(texts[:4])
    path = folder.path / (SCOPE + INDEX)
    data = bytearray(path.read_bytes())
    if flipped is not None:
        data[flipped % len(data)] ^= 1 + cut % 255
    path.write_bytes(data[: len(data) - cut % len(data)])  # a crash in the middle of a write
    journal.append(texts[4 : 4 + more])
    _, read = Journal(folder, SCOPE + INDEX).news()
    lines = {text.line for text in texts}
    assert all(text.line in lines for text in read)
    assert {text.key for text in read} >= {text.key for text in texts[4 : 4 + more]}


@pytest.mark.parametrize(
    "wrong",
    [{"key": "../../x"}, {"key": "0" * 63}, {"key": ""}, {"num_behind": -1}, {"num_behind": 2**63},
     {"num_behind": 2**70}, {"behind": -1}, {"behind": 2**64}],
    ids=str,
)  # fmt: skip
def test_a_line_that_claims_what_cannot_be_is_damaged(wrong, tmp_path):
    """A digest that is right proves no author."""
    store = DiskStore(tmp_path)
    store.put(KEYS[0], kv(0))
    assert in_store(store, range(2)) == {0}
    path = tmp_path / (SCOPE + INDEX)
    path.write_bytes(path.read_bytes() + Text.of(KEYS[1], kv(1))._replace(**wrong).line + b"\n")
    assert in_store(store, range(2)) == in_store(DiskStore(tmp_path), range(2)) == {0}
    assert path.read_bytes().split() == Text.of(KEYS[0], kv(0)).line.split()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_the_place_of_the_index_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / (SCOPE + INDEX))
    store = DiskStore(tmp_path)

    def work():
        store.put(KEYS[0], kv(0))
        in_store(store, range(1))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert KEYS[0] in store


@pytest.mark.parametrize("harm", ["gone", "cut", "garbage", "empty"])
def test_a_damaged_index_is_made_anew_from_the_entries(tmp_path, harm, caplog):
    store = DiskStore(tmp_path)
    store.index(SCOPE)
    for number in range(4):
        store.put(KEYS[number], kv(number, behind_ids=range(number)))
    store.index(SCOPE)
    path = tmp_path / (SCOPE + INDEX)
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:200], "garbage": b"\x00\n" * 50, "empty": b""}[harm])
    caplog.set_level(logging.INFO)
    store.put(KEYS[4], kv(4))
    assert in_store(store, range(5)) == in_store(DiskStore(tmp_path), range(5)) == set(range(5))
    assert ("are damaged; it is made anew" in caplog.text) == (harm in ("cut", "garbage"))
    assert "entries; their headers were read" in caplog.text
    _, texts = (journal := Journal(LocalFolder(tmp_path), path.name)).news()
    assert (len(texts), journal.damaged) == (5, 0)


def test_the_index_of_a_folder_does_not_grow_with_what_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("hfblend.store.journal._SLACK", 4)
    store = DiskStore(tmp_path)
    store.index(SCOPE)
    for number in range(40):
        store.put(KEYS[number], kv(number))
        if number:
            store.remove(KEYS[number - 1])
        store.index(SCOPE)
    assert len(store.index(SCOPE)) <= 8
    assert (tmp_path / (SCOPE + INDEX)).read_bytes().count(b"\n" + b"0") <= 16


def test_entries_that_a_remote_gets_from_elsewhere_are_found_later(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr("hfblend.store.journal._STALE_S", 0.0)
    url = f"memory://{tmp_path.name}"
    store, other = RemoteStore(url), RemoteStore(url)
    store.index(SCOPE)
    other.put(KEYS[0], kv(0))
    store.index(SCOPE)
    store._texts[SCOPE]._begun.result(10)
    assert in_store(store, range(2)) == {0}


def test_a_folder_that_cannot_be_read_is_said_and_finds_nothing(tmp_path, caplog):
    store = DiskStore(tmp_path)
    store.put(KEYS[0], kv(0))
    (tmp_path / (SCOPE + INDEX)).mkdir()
    assert in_store(store, range(1)) == set()
    assert "is left alone" in caplog.text


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    DiskStore(tmp_path).put(KEYS[0], kv(0))
    store = DiskStore(tmp_path)
    monkeypatch.setattr(store._folder, "write", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert in_store(store, range(2)) == {0} == in_store(store, range(2))
    assert not list(tmp_path.glob("*" + INDEX))


def test_a_part_of_an_entry_is_its_rows(tmp_path):
    whole, store = kv(0, behind_ids=(1, 2, 3)), DiskStore(tmp_path)
    store.put(KEYS[0], whole)
    assert part_of(whole, KEYS[1], 0, 40) is whole
    for read in (whole, store.open(KEYS[0])):
        part = part_of(read, KEYS[1], 5, 37)
        assert len(part) == 32
        assert list(part.ids) == text_of(0)[5:37]
        assert part.num_bytes * 40 == whole.num_bytes * 32
        assert part.cached_positions.tolist() == whole.cached_positions[5:37].tolist()
        for layer in range(whole.num_layers):
            for one, other in zip(part.layer(layer), whole.layer(layer)):
                assert (one == other[:, :, 5:37]).all()


def test_scopes_differ_by_model_dtype_and_namespace():
    scopes = {scope_of(m, d, n) for m in "ab" for d in (torch.float32, torch.bfloat16) for n in ("", "x")}
    assert len(scopes) == 8


def test_a_gpu_s_kernels_read_a_part_where_it_lies():
    whole = kv(0)
    whole = replace(whole, cache=full_length_cache(packed(whole.layer(i)) for i in range(whole.num_layers)))
    part, here, layers = part_of(whole, KEYS[1], 5, 37), torch.device("cpu"), range(whole.num_layers)
    assert part.addresses_in(here, layers).tolist() == [part.rows(i).data_ptr() for i in layers]
    assert part.rows(0).data_ptr() == whole.rows(0)[5].data_ptr()
