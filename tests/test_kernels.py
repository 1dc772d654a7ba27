"""Kernel = reference (invariant 11): on the GPU where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfblend.attention.by_position import QueryRows, sdpa_attention
from hfblend.blend.rotation import rotate, rotation_between
from hfblend.kernels.reference import AttentionArgs, attention_weights, reference_attention, visible
from hfblend.kv.rows import RowLayout, empty_kv, rows_behind

pytest.importorskip("triton")
from hfblend.kernels.by_position import attend, received
from hfblend.kernels.paged import decode
from hfblend.kernels.rows import load_rows, pieces_of, write_rows
from hfblend.kernels.state import State

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def states(batch, heads, kv_heads, rows, length, head_dim=16, value_dim=None, dtype=torch.float32):
    torch.manual_seed(0)
    dims = (head_dim, head_dim, value_dim or head_dim)
    shapes = ((heads, rows), (kv_heads, length), (kv_heads, length))
    return [torch.randn(batch, h, n, d, device=DEVICE, dtype=dtype) for (h, n), d in zip(shapes, dims)]


def close(out, expected, dtype=torch.float32):
    limit = {torch.float32: 2e-3 if ON_GPU else 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert torch.isfinite(out).all()
    assert (out.float() - expected.float()).norm() <= limit * expected.float().norm()


def rows_of(which, length):
    every = torch.arange(length)
    rows = {
        "one": every[length // 2 :][:1],
        "all": every,
        "first": every[:1],
        "last": every[-1:],
        "scattered": every[::3],
        "doubled": every[::5].repeat_interleave(2),
    }
    return rows[which].to(DEVICE, torch.int32)


WHICH = ["one", "all", "first", "last", "scattered", "doubled"]
DTYPES = [torch.float32] if not ON_GPU else [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)] if ON_GPU else [(6, 2)])
@pytest.mark.parametrize("length", [1, 17, 131, 1000] if ON_GPU else [1, 17, 150])
@pytest.mark.parametrize("which", WHICH)
def test_attend(heads, kv_heads, length, which):
    dtype = DTYPES[0]
    positions = rows_of(which, length)[None].expand(2, -1).contiguous()  # the interpreter is slow: few sizes there
    args = AttentionArgs(*states(2, heads, kv_heads, positions.shape[1], length, dtype=dtype), 0.25)
    out, _ = attend(args, positions)
    close(out, reference_attention(args, positions), dtype)


OPTIONS = {
    "window": {"sliding_window": 5},
    "wide_window": {"sliding_window": 100},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "hidden": {"hidden": True},
    "all": {"sliding_window": 40, "softcap": 5.0, "sinks": True, "hidden": True},
}


def options_of(name, heads, positions, length):
    """Settings of `AttentionArgs`, and the mask of hidden keys."""
    options, hidden = dict(OPTIONS[name]), None
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, heads, device=DEVICE)
    if options.pop("hidden", False):
        hidden = torch.zeros(length, dtype=torch.uint8, device=DEVICE)
        hidden[1::4] = 1
        hidden[positions.flatten().long()] = 0  # a row always sees itself
    return options, hidden


def ids_of(hidden):
    return None if hidden is None else hidden.nonzero().flatten()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("length", [17, 190])
@pytest.mark.parametrize("which", ["one", "scattered"])
def test_attend_with_options(name, length, which):
    dtype = DTYPES[0]
    positions = rows_of(which, length)[None]
    options, hidden = options_of(name, 4, positions, length)
    args = AttentionArgs(*states(1, 4, 2, positions.shape[1], length, dtype=dtype), 0.3, **options)
    out, _ = attend(args, positions, hidden)
    close(out, reference_attention(args, positions, ids_of(hidden)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (48, 32), (128, 128), (256, 256)])
def test_head_dims(head_dim, value_dim, dtype):
    positions = rows_of("scattered", 70)[None]
    args = AttentionArgs(*states(1, 4, 2, positions.shape[1], 70, head_dim, value_dim, dtype), 0.2)
    out, _ = attend(args, positions)
    close(out, reference_attention(args, positions), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sliding_window", [None, 1500])
def test_many_rows_are_no_worse_than_sdpa(sliding_window):
    """The tuned way, of enough rows to fill the GPU, and its error against fp32."""
    query, key, value = states(1, 16, 4, 2000, 8192, 128, dtype=torch.bfloat16)
    positions = torch.randperm(8192, device=DEVICE)[:2000].sort().values
    args = AttentionArgs(query, key, value, 0.09, sliding_window)
    out, _ = attend(args, positions[None].int())
    exact = reference_attention(args, positions[None])
    mask = QueryRows(positions[None], 8192).additive_mask(sliding_window, query.dtype, query.device)
    theirs = sdpa_attention(args, mask)
    error, own = ((one.float() - exact.float()).norm() / exact.float().norm() for one in (out, theirs))
    assert error <= 1.2 * own


@pytest.fixture
def hopper(monkeypatch):
    """The kernel for such GPUs takes few rows too; gives a list of whether it did, per call."""
    module = pytest.importorskip("hfblend.kernels.hopper", reason="needs Gluon")
    if not (ON_GPU and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU")
    taken, own = [], module.attend
    monkeypatch.setattr(module, "attend", lambda *args: taken.append(own(*args)) or taken[-1])
    monkeypatch.setattr(module, "_FEWEST_PROGRAMS", 1)
    monkeypatch.setattr("hfblend.kernels.by_position._splits", lambda tiles: 1)
    return taken


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 128), (8, 2, 128), (6, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("length", [1, 130, 1000])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_on_hopper(hopper, heads, kv_heads, head_dim, length, which, dtype):
    positions = rows_of(which, length)[None].expand(2, -1).contiguous()
    args = AttentionArgs(*states(2, heads, kv_heads, positions.shape[1], length, head_dim, dtype=dtype), 0.1)
    out, _ = attend(args, positions)
    assert hopper == [True]
    close(out, reference_attention(args, positions), dtype)


@pytest.mark.gpu
def test_attend_on_hopper_through_a_state(hopper):
    query, key, value = states(1, 8, 2, 300, 900, 128, dtype=DTYPES[0])
    buffers = [empty_kv((key, value), 1000) for _ in range(2)]
    for buffer, own in zip(buffers[1], (key, value)):
        buffer.fill_(torch.nan)
        buffer[:, :, :900] = own
    positions = rows_of("scattered", 900)[None]
    state = state_of([buffers[1], buffers[1]], 900, 300)
    args = AttentionArgs(query, key, value, 0.3)
    out, _ = attend(args, positions, state=state, layer=1)
    assert hopper == [True]
    close(out, reference_attention(args, positions), DTYPES[0])


def compile_for_hopper():
    """PTX of the kernel for Hopper GPUs. No such GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from hfblend.kernels import hopper

    kernel = hopper._attend_kernel
    constants = {"D": 128, "KEYS": 128, "GROUP": 3, "GROUP_BLOCK": 4, "IN_STATE": True}
    types = {"Q": "*bf16", "K": "*i64", "V": "*i64", "OUT": "*bf16", "POSITIONS": "*i32", "unit": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.thorough
def test_the_kernel_for_hopper_compiles():
    """Gluon is experimental: the Triton at hand must still take the code. Its interpreter does not know Gluon."""
    pytest.importorskip("hfblend.kernels.hopper", reason="needs Gluon")
    code = "import test_kernels; print(test_kernels.compile_for_hopper())"
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ptx = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True
    ).stdout
    assert "wgmma" in ptx
    assert "cp.async.bulk.tensor" in ptx


def test_rows_of_a_batch_have_positions_of_their_own():
    positions = torch.stack([rows_of("scattered", 60), rows_of("all", 20)]).contiguous()
    args = AttentionArgs(*states(2, 4, 2, 20, 60, dtype=DTYPES[0]), 0.2)
    out, _ = attend(args, positions)
    close(out, reference_attention(args, positions), DTYPES[0])


def test_what_stands_behind_the_last_key_is_not_read():
    """Buffers have spare rows, which were never written."""
    query, key, value = states(1, 4, 2, 10, 64, dtype=DTYPES[0])
    positions = torch.arange(1, 41, 4, device=DEVICE, dtype=torch.int32)[None]
    args = AttentionArgs(query, key[:, :, :41], value[:, :, :41], 0.25)
    expected = reference_attention(args, positions)
    key[:, :, 41:], value[:, :, 41:] = torch.nan, torch.nan
    out, _ = attend(args, positions)
    close(out, expected, DTYPES[0])


@pytest.mark.parametrize("name", ["plain", "window", "softcap", "sinks", "hidden"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), pytest.param((2, 2), marks=pytest.mark.thorough)])
@pytest.mark.parametrize("rows", [1, 70])
def test_received_is_the_mean_of_the_weights(name, rows, heads):
    length, dtype = 150, DTYPES[0]
    positions = torch.arange(length - rows, length, device=DEVICE, dtype=torch.int32)[None]
    options, hidden = ({}, None) if name == "plain" else options_of(name, heads[0], positions, length)
    args = AttentionArgs(*states(1, *heads, rows, length, dtype=dtype), 0.3, **options)
    _, lse = attend(args, positions, hidden, return_lse=True)
    out = torch.empty(heads[0], length, device=DEVICE)
    received(args, lse, positions, hidden, out=out)
    weights = attention_weights(args.float(), visible(positions, length, args.sliding_window, ids_of(hidden)))
    close(out, weights[0].mean(1), dtype)


# --- rows of the cache --------------------------------------------------------------------------------------------


def addresses(*tensors):
    return torch.tensor([t.data_ptr() for t in tensors], device=DEVICE)


def test_tiles_cover_every_piece():
    pieces = [(70, 5, -1), (32, 80, 0), (1, 112, 32)]  # tokens, row in the buffer, turn
    assert pieces_of(pieces) == ([0, 70, 5, -1, 3, 32, 80, 0, 4, 1, 112, 32], 5)


def pieces_there(pieces):
    numbers, tiles = pieces_of(pieces)
    return torch.tensor(numbers, device=DEVICE).view(-1, 4), tiles


def test_several_layers_are_loaded_at_once():
    layout = RowLayout(1, 16, 1, 16)
    torch.manual_seed(0)
    pieces = [[torch.randn(n, layout.width, device=DEVICE, dtype=DTYPES[0]) for n in (3, 40)] for _ in range(3)]
    rows = [torch.zeros(50, layout.width, device=DEVICE, dtype=DTYPES[0]) for _ in range(3)]
    given = pieces_there([(3, 0, -1), (40, 5, -1)])
    sources = torch.stack([addresses(*layer) for layer in pieces])
    load_rows(addresses(*rows), sources, *given, layout, DTYPES[0], None)
    for layer, (one, other) in zip(rows, pieces):
        assert torch.equal(layer[:3], one)
        assert torch.equal(layer[5:45], other)
        assert not layer[3:5].any()


@pytest.mark.parametrize("rotates", [0, 1, -1])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("pairs", [8, 3])  # all dimensions, or some
def test_load_rows_gathers_and_turns(rotates, half, pairs):
    layout, dtype = RowLayout(2, 16, 2, 16), DTYPES[0]
    torch.manual_seed(0)
    pieces = [torch.randn(n, layout.width, device=DEVICE, dtype=dtype) for n in (5, 33, 70)]
    places, turns = (40, 3, 50), (-1, 0, 33)  # the first is copied as it is
    cos, sin = (torch.randn(103, pairs, device=DEVICE) for _ in range(2))
    rows = torch.full((130, layout.width), 7.0, device=DEVICE, dtype=dtype)
    given = pieces_there([(len(p), to, turn) for p, to, turn in zip(pieces, places, turns)])
    sources = addresses(*pieces)[None]
    load_rows(addresses(rows), sources, *given, layout, dtype, (cos, sin), rotates, half)

    expected = torch.full_like(rows, 7.0)
    for piece, to, turn in zip(pieces, places, turns):
        kv = list(layout.views(piece[None].clone()))
        if turn >= 0 and rotates >= 0:
            table = slice(turn, turn + len(piece))
            kv[rotates] = rotate(kv[rotates], cos[table], sin[table], "half" if half else "interleaved")
        target = layout.views(expected[None, to : to + len(piece)])
        for mine, states in zip(target, kv):
            mine.copy_(states)
    close(rows, expected, dtype)
    untouched = [i for i in range(130) if not any(to <= i < to + len(p) for p, to in zip(pieces, places))]
    assert bool((rows[untouched] == 7).all())
    assert torch.equal(rows[40:45], pieces[0])


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_turn_from_position_to_position(sign):
    """By tables of positions, as by tables of what lies between."""
    layout, cached, places = RowLayout(2, 16, 2, 16), (7, 90), (40, 3)
    torch.manual_seed(0)
    pieces = [torch.randn(n, layout.width, device=DEVICE, dtype=DTYPES[0]) for n in (5, 33)]
    angles = torch.arange(130, device=DEVICE)[:, None] * 0.7 ** torch.arange(8, device=DEVICE)
    tables = angles.cos(), sign * angles.sin()
    rows = torch.zeros(60, layout.width, device=DEVICE, dtype=DTYPES[0])
    given = pieces_there([(len(p), to, turn) for p, to, turn in zip(pieces, places, cached)])
    load_rows(addresses(rows), addresses(*pieces)[None], *given, layout, DTYPES[0], tables, 0, between=True)
    for piece, to, start in zip(pieces, places, cached):
        old, new = ([table[at : at + len(piece)] for table in tables] for at in (start, to))
        keys, values = layout.views(piece[None])
        turned = rotate(keys, *rotation_between(tuple(old), tuple(new)), "half")
        close(layout.views(rows[None, to : to + len(piece)])[0], turned, DTYPES[0])
        assert torch.equal(layout.views(rows[None, to : to + len(piece)])[1], values)


def test_rows_are_turned_where_they_lie():
    """As those are that were copied to their places before: one piece of them, another from elsewhere."""
    layout = RowLayout(2, 16, 2, 16)
    torch.manual_seed(0)
    pieces = [torch.randn(n, layout.width, device=DEVICE, dtype=DTYPES[0]) for n in (5, 90)]
    cos, sin = (torch.randn(95, 8, device=DEVICE) for _ in range(2))
    given = pieces_there([(5, 0, 0), (90, 10, 5)])
    rows = torch.zeros(2, 120, layout.width, device=DEVICE, dtype=DTYPES[0])
    rows[1, 10:100] = pieces[1]
    sources = addresses(*pieces, pieces[0], rows[1, 10:]).view(2, 2)
    load_rows(addresses(*rows), sources, *given, layout, DTYPES[0], (cos, sin), 0)
    assert rows[0, 10:100].any(1).all()
    assert not torch.equal(rows[0, 10:100], pieces[1])
    assert torch.equal(rows[0], rows[1])


def test_unequal_keys_and_values():
    """Latent attention: a wide latent in the keys' slot, a narrow rotated part in the values' slot."""
    layout = RowLayout(1, 48, 1, 16)
    torch.manual_seed(0)
    piece = torch.randn(21, layout.width, device=DEVICE, dtype=DTYPES[0])
    rows = torch.zeros(30, layout.width, device=DEVICE, dtype=DTYPES[0])
    cos, sin = (torch.randn(21, 8, device=DEVICE) for _ in range(2))
    given = pieces_there([(21, 4, 0)])
    load_rows(addresses(rows), addresses(piece)[None], *given, layout, DTYPES[0], (cos, sin), 1, False)
    keys, values = layout.views(rows[None, 4:25])
    stored_keys, stored_values = layout.views(piece[None])
    assert torch.equal(keys, stored_keys)
    close(values, rotate(stored_values, cos, sin, "interleaved"), DTYPES[0])


def state_of(buffers, length, live, received_at=0):
    addresses = [rows_behind(kv).data_ptr() for kv in buffers]
    numbers = torch.tensor([length, live, received_at, 0, *addresses], device=DEVICE)
    return State(numbers, {i: RowLayout.of(kv) for i, kv in enumerate(buffers)})


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 2), (4, 4), (32, 1)])
@pytest.mark.parametrize(("length", "name"), [(1, None), (64, None), (65, "all"), (330, None), (330, "window")])
def test_a_token_that_is_decoded_sees_all_before_it(heads, kv_heads, length, name):
    """Through a state, its keys split among programs; spare rows hold anything."""
    query, key, value = states(1, heads, kv_heads, 1, length, dtype=DTYPES[0])
    positions = torch.tensor([[length - 1]], device=DEVICE, dtype=torch.int32)
    options = {} if name is None else options_of(name, heads, positions, length)[0]
    buffers = empty_kv((key, value), length + 70)
    for buffer, states_ in zip(buffers, (key, value)):
        buffer.fill_(torch.nan)
        buffer[:, :, :length] = states_
    fresh = [states_[:, :, -1:] for states_ in (key, value)]
    out, _ = attend(AttentionArgs(query, *fresh, 0.3, **options), positions, state=state_of([buffers], length, 1))
    close(out, reference_attention(AttentionArgs(query, key, value, 0.3, **options), positions), DTYPES[0])


@pytest.mark.parametrize("dims", [(16, 16), (32, 16)])
def test_kernels_find_the_prompt_through_a_state(dims):
    """As inside a CUDA graph: written and read by address, rows padded with copies of the last one."""
    length, live, dtype = 90, 7, DTYPES[0]
    query, key, value = states(1, 4, 2, 10, length, *dims, dtype=dtype)
    buffers = [empty_kv((key, value), length + 30) for _ in range(3)]
    for buffer in (b for kv in buffers for b in kv):
        buffer.fill_(torch.nan)
    buffers[2][0][:, :, :length], buffers[2][1][:, :, :length] = key, value
    positions = torch.tensor([3, 20, 21, 40, 60, 88, 89, 89, 89, 89], device=DEVICE, dtype=torch.int32)
    query[:, :, live:] = query[:, :, live - 1 : live]
    fresh = [t[:, :, positions.long()] + 1 for t in (key, value)]
    out = torch.zeros(2, 4, length, device=DEVICE)
    state = state_of(buffers, length, live, out.data_ptr())
    write_rows(*fresh, positions, state, 2)
    expected_kv = [t.clone() for t in (key, value)]
    for states_, new in zip(expected_kv, fresh):
        states_[:, :, positions.long()] = new
    for buffer, expected in zip(buffers[2], expected_kv):
        assert torch.equal(buffer[:, :, :length], expected)
    assert all(bool(b.isnan().all()) for kv in buffers[:2] for b in kv)

    args, expected = (AttentionArgs(query, *kv, 0.3) for kv in ((key, value), expected_kv))
    got, lse = attend(args, positions[None], state=state, layer=2, return_lse=True)
    close(got, reference_attention(expected, positions[None]), dtype)
    received(args, lse, positions[None], state=state, layer=2, slot=1)
    counted = AttentionArgs(query[:, :, :live], *expected_kv, 0.3).float()
    close(out[1], attention_weights(counted, visible(positions[None, :live], length))[0].mean(1), dtype)
    assert not out[0].any()


def paged(prompts, heads, kv_heads, lengths, dim, tokens, dtype):
    """Queries, new K/V, pages with room between them, a table, and the K/V of each prompt, its new token last."""
    torch.manual_seed(0)
    of_pages = [-(-length // tokens) for length in lengths]
    count = sum(of_pages) + 2
    order = torch.randperm(count)[: sum(of_pages)].split(of_pages)
    table = torch.full((prompts, max(of_pages) + 1), -1, dtype=torch.int32)
    # As they lie in Transformers' cache: a layer's keys and values next to each other, those of other layers between.
    store = torch.randn(count, 4, tokens, kv_heads, dim, device=DEVICE, dtype=dtype)
    keys, values = (store.flatten(0, 1).as_strided((count * 4 - 2, tokens, kv_heads, dim), store.stride()[1:], at)
                    for at in (0, store.stride(1)))  # fmt: skip
    query, *new = (torch.randn(1, prompts, h, dim, device=DEVICE, dtype=dtype).transpose(1, 2)
                   for h in (heads, kv_heads, kv_heads))  # fmt: skip
    every = []
    for i, (length, pages) in enumerate(zip(lengths, order)):
        table[i, : len(pages)] = pages * 4
        rows = [states[(pages * 4).to(DEVICE)].flatten(0, 1)[:length].clone() for states in (keys, values)]
        for states, fresh in zip(rows, new):
            states[-1:] = fresh[0, :, i]
        every.append([states.transpose(0, 1)[None] for states in rows])
    return query, tuple(new), store, (keys, values), table.to(DEVICE), every


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (6, 1, 80), (4, 2, 256)])
@pytest.mark.parametrize("tokens", [256, 16])
@pytest.mark.parametrize("lengths", [(1, 300, 64, 65), (17,), (255, 256, 257, 2, 3)])
def test_a_token_of_each_prompt_attends_to_pages(heads, kv_heads, dim, tokens, lengths):
    dtype = DTYPES[0]
    query, new, store, pages, table, every = paged(len(lengths), heads, kv_heads, lengths, dim, tokens, dtype)
    filled = torch.cat([query, query[:, :, :1]], 2)  # the last row only fills a graph's batch
    new = tuple(torch.cat([states, states[:, :, :1]], 2) for states in new)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0).to(DEVICE, torch.int32)
    before = store.clone()
    out = decode(filled, new, pages, torch.cat([table, table[:1]]), ends, 0.3)
    for i, (keys, values) in enumerate(every):
        args = AttentionArgs(query[:, :, i : i + 1], keys, values, 0.3)
        close(out[:, :, i : i + 1], reference_attention(args, torch.tensor([[lengths[i] - 1]], device=DEVICE)), dtype)
        page, row = int(table[i, (lengths[i] - 1) // tokens]), (lengths[i] - 1) % tokens
        for states, fresh in zip(pages, new):
            assert torch.equal(states[page, row], fresh[0, :, i])
    assert int((store != before).flatten(3).any(-1).sum()) == 2 * len(lengths), "other rows are as before"
