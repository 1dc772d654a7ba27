"""The fast ways of attention equal the reference, and the reference equals a drawn mask."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from hfblend.attention.by_position import QueryRows, attend
from hfblend.attention.record import AttentionRecord
from hfblend.kernels.reference import AttentionArgs, reference_attention, visible


def test_visible_is_the_drawn_mask():
    rows = torch.tensor([[1, 3, 5]])
    drawn = ["■■⬚⬚⬚⬚", "■■■■⬚⬚", "■■■■■■"]
    windowed = ["■■⬚⬚⬚⬚", "⬚⬚■■⬚⬚", "⬚⬚⬚⬚■■"]
    for expected, window in ((drawn, None), (windowed, 2)):
        seen = visible(rows, 6, window)[0]
        assert ["".join("■" if cell else "⬚" for cell in row) for row in seen] == expected


def states(batch, heads, kv_heads, rows, length, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, rows), (kv_heads, length), (kv_heads, length))
    return [torch.randn(batch, h, n, head_dim, generator=generator) for h, n in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 17, 64, 131])
@pytest.mark.parametrize("which", ["one", "all", "first", "last", "scattered"])
@pytest.mark.parametrize("window", [None, 5, 1000])
def test_attend_equals_the_reference(heads, kv_heads, length, which, window):
    every = torch.arange(length)
    rows = {
        "one": every[length // 2 :][:1],
        "all": every,
        "first": every[:1],
        "last": every[-1:],
        "scattered": every[::3],
    }
    positions = rows[which][None].expand(2, -1)
    args = AttentionArgs(*states(2, heads, kv_heads, positions.shape[1], length), 0.25, window)
    assert torch.allclose(attend(args, QueryRows(positions, length)), reference_attention(args, positions), atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_recorded_layer_attends_as_others_do(softcap):
    positions = torch.arange(5, 145, 2)[None]  # more rows than are recorded at once
    args = AttentionArgs(*states(1, 4, 2, positions.shape[1], 150), 0.25, None, softcap)
    record = AttentionRecord([3, 4])
    out = record.add(3, args, visible(positions, 150))
    assert torch.allclose(out, reference_attention(args, positions), atol=2e-6)
    assert record.received[3].sum(-1) == pytest.approx(torch.ones(4).tolist(), abs=1e-5)
    assert record.add(2, args, visible(positions, 150)) is None


@pytest.mark.parametrize(("softcap", "with_sinks"), [(20.0, False), (None, True), (5.0, True)])
def test_softcap_and_sinks(softcap, with_sinks):
    query, key, value = states(1, 4, 2, 3, 9)
    positions = torch.tensor([[2, 5, 8]])
    sinks = torch.tensor([0.1, -0.3, 0.5, 2.0]) if with_sinks else None
    out = attend(AttentionArgs(query, key, value, 0.3, None, softcap, sinks), QueryRows(positions, key.shape[2]))
    for head in range(4):
        for row, position in enumerate(positions[0]):
            scores = key[0, head // 2, : position + 1] @ query[0, head, row] * 0.3
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = torch.cat([scores, sinks[head : head + 1]]) if with_sinks else scores
            weights = scores.softmax(0)[: position + 1]
            assert torch.allclose(out[0, head, row], weights @ value[0, head // 2, : position + 1], atol=1e-5)


def test_the_mask_of_a_pass_is_made_once():
    rows = QueryRows(torch.tensor([[1, 3]]), 6)
    one = rows.additive_mask(None, torch.float32, torch.device("cpu"))
    assert rows.additive_mask(None, torch.float32, torch.device("cpu")) is one
    assert rows.additive_mask(2, torch.float32, torch.device("cpu")) is not one


@pytest.mark.parametrize(("rows", "length"), [(300, 1000), (256, 1024), (37, 512), (640, 640)])
def test_the_benchmarks_blocks_hold_every_visible_key_and_no_hidden_one_in_full(rows, length):
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "attention.py"))
    positions = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:rows].sort().values
    partial, which, full, which_full = (found[0, 0].tolist() for found in benchmark["_row_blocks"](positions, length))
    drawn, sees = torch.zeros(rows, length, dtype=torch.bool), torch.arange(length) <= positions[:, None]
    for i in range(len(partial)):
        block_of_rows = slice(128 * i, 128 * (i + 1))
        for block in which[i][: partial[i]]:
            keys = slice(128 * block, 128 * (block + 1))
            drawn[block_of_rows, keys] = sees[block_of_rows, keys]
        for block in which_full[i][: full[i]]:
            drawn[block_of_rows, 128 * block : 128 * (block + 1)] = True
    assert torch.equal(drawn, sees)
