from __future__ import annotations

from array import array

import pytest
import torch

from hfblend import ChunkKV, MemoryStore
from hfblend.kv.ids import Ids, ids_in
from hfblend.kv.rows import full_length_cache
from hfblend.store import DiskStore, chunk_key


def entry(tokens=4, layers=2, **kwargs):
    kv = [(torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8)) for _ in range(layers)]
    return ChunkKV(full_length_cache(kv), torch.arange(3, 3 + tokens), **kwargs)


KV_SIZE = 2 * 2 * 2 * 4 * 8 * 4  # layers, keys and values, heads, tokens, head_dim, bytes
SIZE = entry().held_bytes


def test_what_is_put_is_found_unchanged():
    store, one = MemoryStore(), entry()
    store.put("a", one)
    found = store.open("a")
    assert all(torch.equal(x, y) for i in range(2) for x, y in zip(found.layer(i), one.layer(i)))
    assert found.cached_positions.tolist() == [3, 4, 5, 6]
    assert store.open("b") is None
    assert one.num_bytes == KV_SIZE
    assert store.num_bytes == one.held_bytes == SIZE > KV_SIZE


def test_least_recently_used_goes_first_and_bytes_stay_in_budget():
    store = MemoryStore(max_bytes=2 * SIZE)
    store.put("a", entry())
    store.put("b", entry())
    store.open("a")
    store.put("c", entry())
    assert ("a" in store, "b" in store, "c" in store) == (True, False, True)
    store.put("c", entry(tokens=2))
    assert store.num_bytes == SIZE + entry(tokens=2).held_bytes < 2 * SIZE
    store.clear()
    assert (len(store), store.num_bytes) == (0, 0)


def test_an_entry_larger_than_the_budget_is_not_kept_and_said(caplog):
    store = MemoryStore(max_bytes=SIZE - 1)
    store.put("a", entry())
    assert len(store) == 0
    assert "does not fit" in caplog.text


def test_an_open_reader_outlives_its_eviction():
    store = MemoryStore(max_bytes=SIZE)
    store.put("a", entry())
    reader = store.open("a")
    store.put("b", entry())
    assert "a" not in store
    assert torch.isfinite(reader.layer(1)[0]).all()


@pytest.mark.parametrize("size", [-1, 1.5, "8 gulps", "", True, "9" * 400])
def test_bad_budget(size):
    with pytest.raises(ValueError, match="max_bytes"):
        MemoryStore(max_bytes=size)


def test_the_device_is_where_entries_are_kept():
    store = MemoryStore(device="cpu")
    store.put("a", entry(provenance="in_context", behind_ids=[1, 2, 3], regime=50))
    found = store.open("a")
    assert found.layer(0)[0].device.type == "cpu"
    assert (found.provenance, found.behind_ids, found.regime) == ("in_context", (1, 2, 3), 50)


def test_keys_cover_everything_kv_depends_on():
    base = {"fingerprint": "f", "dtype": torch.float32, "ids": [1, 2], "behind_ids": [3], "namespace": ""}
    others = [
        {"fingerprint": "g"}, {"dtype": torch.bfloat16}, {"ids": [2, 1]}, {"behind_ids": []}, {"behind_ids": None},
        {"namespace": "tenant"}, {"ids": [1], "behind_ids": [2, 3]}, {"ids": [12], "behind_ids": [3]},
    ]  # fmt: skip
    keys = [chunk_key(**base), *(chunk_key(**{**base, **other}) for other in others)]
    assert len(set(keys)) == len(keys)
    assert chunk_key(**base) == keys[0]
    assert all(len(key) == 64 for key in keys)


def test_keys_and_comparisons_do_not_depend_on_how_ids_are_held():
    ids, behind = [5, 2**40, 0, 7], [9, 8]
    kinds = (list, tuple, Ids, lambda ids: array("q", ids), lambda ids: ids_in(torch.tensor(ids)))
    for hold in kinds:
        assert chunk_key("f", torch.float32, hold(ids), hold(behind)) == chunk_key("f", torch.float32, ids, behind)
        assert Ids(ids) == hold(ids)
        assert Ids(ids) != hold(ids[:-1])
        assert Ids(ids) != hold([*ids[:-1], 8])
    # What is in folders was found by this key: another one would lose all of it.
    known = "6c54c6a0866a12b2332126d2d9222234675c59206d1833850b28469d1e8fbde5"
    assert chunk_key("f", torch.float32, ids, behind, "tenant") == known


def test_a_chunk_kv_checks_itself():
    kv = [(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))]
    with pytest.raises(ValueError, match="5 positions"):
        ChunkKV(full_length_cache(kv), torch.arange(5))
    with pytest.raises(ValueError, match="every layer"):
        ChunkKV(full_length_cache([]), torch.arange(4))
    assert ChunkKV(full_length_cache(kv), torch.arange(10, 14)).regime == 14


def test_a_store_too_small_for_a_prompt_says_so_and_answers_alike(caplog):
    from helpers import config, generate, largest_difference, make_llama, make_prompt

    import hfblend

    model, prompt = make_llama(), make_prompt()
    outputs = []
    for max_bytes in (2**30, 40_000):
        with hfblend.patch(model, config=config(0.2), store=MemoryStore(max_bytes)) as blender:
            outputs += [generate(model, prompt.inputs()) for _ in range(2)]
            trace = blender.trace
    assert trace.misses == 2  # one was still there, and was opened before the others took its place
    assert "too small" in trace.notes[0]
    assert "too small" in caplog.text
    assert all(largest_difference(output, outputs[0]) == 0.0 for output in outputs)


def test_a_chunk_and_a_prefix_of_one_token_are_kept_by_every_store(tmp_path):
    """A prefix is often BOS alone."""
    from helpers import config, generate, make_llama, make_prompt

    import hfblend

    model, prompt = make_llama(), make_prompt(sizes=(1, 31), prefix=1)
    with hfblend.patch(model, config=config(0.2)):
        expected = generate(model, prompt.inputs()).sequences
    for store in (DiskStore(tmp_path / "plain"), DiskStore(tmp_path / "int8", kv_dtype="int8"), tmp_path / "tiers"):
        with hfblend.patch(model, config=config(0.2), store=store):
            assert torch.equal(generate(model, prompt.inputs()).sequences, expected)
    for folder, kv_dtype in (("plain", None), ("int8", "int8"), ("tiers", None)):
        store = DiskStore(tmp_path / folder, kv_dtype=kv_dtype)
        assert len(store) == 3
        with hfblend.patch(model, config=config(0.2), store=store) as blender:
            generate(model, prompt.inputs())
            assert (blender.trace.hits, blender.trace.prefix.status) == (2, "hit")
