"""What stores count, and how Prometheus sees it."""

from __future__ import annotations

import pytest
import torch
from helpers import config, generate, make_llama, make_prompt

import hfblend
from hfblend.metrics import export_to_prometheus
from hfblend.store import DiskStore, MemoryStore, TieredStore

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
    assert value("bytes", 0) == read
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


def test_a_store_without_counts_is_refused():
    with pytest.raises(ValueError, match="`counts` is expected"):
        export_to_prometheus(object(), registry=prometheus_client.CollectorRegistry())
