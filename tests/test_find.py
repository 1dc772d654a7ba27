"""Stored texts found in plain prompts: `find="stored"`."""

from __future__ import annotations

import pytest
import torch
from helpers import VOCABULARY, make_llama, shared

import hfblend
from hfblend.store import DiskStore, MemoryStore, TieredStore

LONG = {"min_reused_tokens": 0, "separator": None}


def ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, VOCABULARY, (count,), generator=generator).tolist()


PREFIX, SUFFIX = ids(9, 1), ids(8, 2)
TEXTS = [ids(60 + 10 * i, 10 + i) for i in range(4)]


def plain(*parts):
    return torch.tensor([[i for part in parts for i in part]])


def answer(model, input_ids, **kwargs):
    return model.generate(input_ids, max_new_tokens=6, do_sample=False, **kwargs)


def config(**settings):
    return hfblend.BlendConfig(**{**LONG, "find": "stored", **settings})


def make_store(kind, path):
    stores = {"memory": MemoryStore, "disk": lambda: DiskStore(path), "tiers": lambda: str(path)}
    return stores[kind]()


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
def test_texts_are_found_as_if_they_were_marked(kind, tmp_path):
    model = shared(make_llama)
    prompt = hfblend.Prompt.from_ids(PREFIX, [TEXTS[2], TEXTS[0]], SUFFIX, ids(3, 5))
    with hfblend.patch(model, config(), store=make_store(kind, tmp_path)) as blender:
        blender.precompute(TEXTS, prefix=prompt.prefix_ids)
        found = answer(model, prompt.input_ids)
        trace = blender.trace
        assert [chunk.span for chunk in trace.chunks] == list(prompt.chunk_spans)
        assert {chunk.status for chunk in trace.chunks} == {"hit"} and trace.prefix.exact
        marked = answer(model, **{"input_ids": prompt.input_ids, "chunk_spans": prompt.chunk_spans})
        assert blender.trace.blended and torch.equal(found, marked)


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
@pytest.mark.parametrize("cut", [(1, 0), (0, 1), (2, 3)])
def test_unequal_edges_become_gaps(kind, cut, tmp_path):
    model, (left, right) = shared(make_llama), cut
    with hfblend.patch(model, config(recompute_ratios=(1.0,)), store=make_store(kind, tmp_path)) as blender:
        blender.precompute(TEXTS, prefix=PREFIX)
        cut_texts = [text[left : len(text) - right] for text in TEXTS[:2]]
        input_ids = plain(PREFIX, ids(left, 6), cut_texts[0], ids(2, 7), cut_texts[1], ids(1, 8), SUFFIX)
        found = answer(model, input_ids)
        trace = blender.trace
        assert [(chunk.status, chunk.span[1] - chunk.span[0]) for chunk in trace.chunks] == [
            ("hit", len(text)) for text in cut_texts
        ]
        assert trace.chunks[0].exact == (left == 0)
        assert "(2 in part)" in trace.notes[0]
        assert torch.equal(found, answer(model, input_ids, blend_config=hfblend.BlendConfig(enabled=False)))
