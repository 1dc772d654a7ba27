"""What stores count, and how Prometheus sees it."""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, make_llama, make_prompt

import hfblend
from hfblend.store import DiskStore, MemoryStore, TieredStore
from hfblend.store.prometheus import export_to_prometheus

prometheus_client = pytest.importorskip("prometheus_client")
PROMPT = make_prompt()


def test_counts_are_those_of_what_was_done(tmp_path):
    model, registry = make_llama(), prometheus_client.CollectorRegistry()
    with hfblend.patch(model, config=config(0.3), store=DiskStore(tmp_path)) as blender:
        cold = generate(model, PROMPT.inputs())
        pieces = 1 + len(blender.trace.chunks)  # the prefix too
    store = TieredStore([MemoryStore(), DiskStore(tmp_path)])
    collector = export_to_prometheus(store, "test", registry)
    with hfblend.patch(model, config=config(0.3), store=store) as blender:
        assert torch.equal(generate(model, PROMPT.inputs()).sequences, cold.sequences)
        read = blender.trace.bytes_reused

    def value(name, tier):
        kind = ("MemoryStore", "DiskStore")[tier]
        return registry.get_sample_value(f"hfblend_store_{name}", {"store": "test", "tier": str(tier), "kind": kind})

    assert (value("hits_total", 0), value("misses_total", 0), value("stored_total", 0)) == (0, pieces, pieces)
    assert (value("hits_total", 1), value("misses_total", 1)) == (pieces, 0)
    assert value("bytes_read_total", 1) >= read
    assert value("read_seconds_total", 1) > 0
    assert value("bytes", 0) == store.stores[0].num_bytes > read
    with hfblend.patch(model, config=config(0.3), store=store):
        generate(model, PROMPT.inputs())
    assert value("hits_total", 0) == pieces
    registry.unregister(collector)
    assert value("hits_total", 0) is None


def test_evictions_and_damage_are_counted(tmp_path):
    model, disk = make_llama(), DiskStore(tmp_path)
    with hfblend.patch(model, config=config(0.3), store=disk) as blender:
        generate(model, PROMPT.inputs())
        path = disk._path(blender.trace.chunks[0].key)
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
        generate(model, PROMPT.inputs())
    assert disk.counts.damaged == 1
    assert disk.counts.bytes_written > disk.num_bytes
    kept = len(disk)
    disk.max_bytes = 0
    disk.prune()
    assert disk.counts.evicted == kept


def test_a_folder_that_cannot_be_looked_through_takes_no_other_metric_with_it(tmp_path):
    registry, disk = prometheus_client.CollectorRegistry(), DiskStore(tmp_path / "chunks")
    export_to_prometheus(TieredStore([MemoryStore(), disk]), registry=registry)
    (tmp_path / "chunks").rmdir()
    (tmp_path / "chunks").write_text("no folder")
    text = prometheus_client.generate_latest(registry).decode()
    assert 'hfblend_store_hits_total{kind="DiskStore",store="chunks",tier="1"} 0.0' in text
    assert 'hfblend_store_bytes{kind="MemoryStore",store="chunks",tier="0"} 0.0' in text
    assert 'hfblend_store_bytes{kind="DiskStore"' not in text


def test_tiers_of_tiers_and_stores_that_count_otherwise(tmp_path):
    class Own(MemoryStore):
        def __init__(self):
            super().__init__()
            self.counts = {"hits": 1}

    registry = prometheus_client.CollectorRegistry()
    store = TieredStore([MemoryStore(), TieredStore([Own(), DiskStore(tmp_path)])])
    export_to_prometheus(store, registry=registry)
    text = prometheus_client.generate_latest(registry).decode()
    assert [line.partition("{")[2] for line in text.splitlines() if line.startswith("hfblend_store_hits_total{")] == [
        'kind="MemoryStore",store="chunks",tier="0"} 0.0',
        'kind="DiskStore",store="chunks",tier="2"} 0.0',
    ]


def test_a_store_without_counts_is_refused():
    with pytest.raises(ValueError, match="`counts` is expected"):
        export_to_prometheus(object(), registry=prometheus_client.CollectorRegistry())
