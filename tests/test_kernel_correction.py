"""The kernels of the correction against the estimator and what applies it, in PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hfblend.blend.correction import BLOCK, offset
from hfblend.blend.corrector import Corrector
from hfblend.blend.reuse import Piece, Reuse
from hfblend.blend.rotation import KeyRotation, pair_tables
from hfblend.blend.trust import DOUBTED, NUM_QUERIES, TRUSTED
from hfblend.kernels.reference import AttentionArgs
from hfblend.kv.rows import RowLayout, first_rows
from hfblend.trace.observer import Observer

pytest.importorskip("triton")
from hfblend.kernels.correction import OffsetKernels, Turn
from hfblend.kernels.plan import FIRST_TABLE, Plan
from hfblend.kernels.state import FIRST_LAYER, State
from hfblend.kernels.trust import Asking

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF_TURN, INTERLEAVED = KeyRotation(0, "half", "duplicated", 0), KeyRotation(0, "interleaved", "repeated", 0)
LAYOUT = RowLayout(2, 16, 2, 16)
ASKING = Asking(NUM_QUERIES, DOUBTED, TRUSTED)


class Model:
    """What a corrector asks of a model: the rotary tables of R pairs, which carry a scaling."""

    device, num_kv_layers = DEVICE, 1

    def __init__(self, rotation, pairs):
        self.rotations, self.pairs = [rotation], pairs

    def regime(self, length):
        return length

    def rotary_tables_of_pieces(self, source, pieces):
        angles = torch.cat([at for at, _ in pieces])[:, None] * 0.7 ** torch.arange(self.pairs)
        angles = angles if self.rotations[0].layout == "single" else angles.repeat_interleave(2, 1)
        if self.rotations[0].layout == "duplicated":
            angles = torch.cat([angles[:, ::2], angles[:, ::2]], 1)
        return 1.2 * angles.cos().to(DEVICE), 1.2 * angles.sin().to(DEVICE)  # with a scaling


class Sizes(Observer):
    sizes = None

    def corrected(self, layer_idx, sizes):
        self.sizes = sizes().cpu()


def layer_of(layout, length, dtype, seed=0):
    """Rows (T + room, W), and the fresh K/V of all tokens: errors agree in part, so that every weight counts."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    rows, every = noise(length + 40, layout.width), torch.arange(length)
    errors = noise(layout.width) + noise(length // 90 + 1, layout.width)[every // 90]
    errors = 0.3 * errors + 0.4 * noise(length // 30 + 1, layout.width)[every // 30] + 0.2 * noise(length, layout.width)
    rows, fresh = rows.to(DEVICE, dtype), (rows[:length] + errors).to(DEVICE, dtype)
    return rows, layout.views(fresh[None])


def corrected_by_torch(model, spans, rows, fresh, buffer, layout, length, args=None, exact=0):
    """What stands in the buffer once a pass has been there, and the sizes that its observer is told."""
    empty = torch.empty(0, dtype=torch.long)
    before = [Piece((0, exact), None, True)] if exact else []
    reuse = Reuse(before, [Piece(span, None, False) for span in spans], empty, empty, empty, empty)
    observer, kv = Sizes(), first_rows(layout.views(buffer[None]), length)
    Corrector(offset, model, reuse, length, observer)(-1, 0, rows, tuple(t[:, :, rows] for t in fresh), kv, args)
    for states, new in zip(kv, fresh):
        states[:, :, rows] = new[:, :, rows]
    return observer.sizes


def kernels_of(model, layout):
    """The kernels for one layer, and the rotary tables of 2,000 positions."""
    rotation = model.rotations[0]
    if rotation is None:
        return OffsetKernels({0: layout}, {0: None}, BLOCK, ASKING), []
    tables = model.rotary_tables_of_pieces(0, [(torch.arange(2000), 0)])
    cos, sin = (table.contiguous() / 1.2 for table in pair_tables(tables, rotation.layout))
    turn = Turn(rotation.slot, model.pairs, rotation.pairing == "half", 0)
    return OffsetKernels({0: layout}, {0: turn}, BLOCK, ASKING), [(cos, sin * rotation.sign)]


def corrected_by_kernels(model, spans, rows, fresh, buffer, layout, padding=0, args=None, exact=0):
    """The same; `padding` copies of the last row follow the others, as in a graph, where all is found by a state."""
    kernels, tables = kernels_of(model, layout)
    plan = Plan(spans, BLOCK, {0: layout}, tables, DEVICE, exact)
    numbers = torch.tensor(plan.numbers_for(rows), device=DEVICE)
    assert len(numbers) == FIRST_TABLE.value + 2 * len(tables)
    padded = torch.cat([rows, rows[-1:].expand(padding)])
    place = buffer
    if padding:
        place = State(torch.tensor([0, len(rows), 0, 0, buffer.data_ptr(), *numbers], device=DEVICE), {0: layout})
        numbers = place.numbers[FIRST_LAYER.value + 1 :]
        if args is not None:
            last = args.query[:, :, -1:].expand(-1, -1, padding, -1)
            args = replace(args, query=torch.cat([args.query, last], 2))
    kernels.correct(0, tuple(t[:, :, padded] for t in fresh), padded, place, numbers, args)
    for states, new in zip(layout.views(buffer[None]), fresh):
        states[:, :, rows] = new[:, :, rows]
    return kernels.sizes(range(1), numbers, plan.pieces)[0]


def close(one, other, reused):
    """Whether the same was added to rows, but for what rounds the other way."""
    assert torch.isfinite(one).all()
    if one.dtype == torch.bfloat16:  # the interpreter cuts it off instead
        assert ((one.float() - other.float()).abs() <= 2**-7 * other.float().abs() + 1e-5).all()
        return
    added, expected = one.float() - reused.float(), other.float() - reused.float()
    assert (added - expected).norm() <= (3e-5 if one.dtype == torch.float32 else 4e-3) * expected.norm()


def check(model, spans, rows, layout=LAYOUT, dtype=torch.float32, length=None, **settings):
    length = length or max(stop for _, stop in spans) + 3
    rows = torch.as_tensor(rows, device=DEVICE)
    reused, fresh = layer_of(layout, length, dtype)
    one, other = reused.clone(), reused.clone()
    sizes = corrected_by_torch(model, spans, rows, fresh, one, layout, length)
    own_sizes = corrected_by_kernels(model, spans, rows, fresh, other, layout, **settings)
    close(other, one, reused)
    assert sizes is None or torch.allclose(own_sizes.cpu(), sizes, rtol=1e-3, atol=1e-6)
    moved = torch.cat([torch.arange(*span) for span in spans])
    still = torch.ones(len(reused), dtype=torch.bool).index_fill(0, torch.cat([moved, rows.cpu()]), False)
    assert torch.equal(other[still], reused[still])
    return sizes


def some(spans, share, seed=1):
    """A share of the tokens of all spans, rising, and two after the last."""
    tokens = torch.cat([torch.arange(*span) for span in spans])
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[: round(share * len(tokens))]
    return torch.cat([tokens[chosen].sort().values, tokens.max() + torch.tensor([1, 2])])


SPANS = {"long": [(2, 702), (702, 703), (710, 743)], "short": [(4, 5), (5, 38), (40, 104), (110, 111), (111, 140)]}
FEW = [(1, 2), (2, 35), (40, 80)]


CASES = [("long", torch.float32, 0.08), *(("short", dtype, 0.08) for dtype in (torch.bfloat16, torch.float16)),
         ("short", torch.float32, 0.4)]  # fmt: skip
MORE = [("long", torch.float32, 0.4), *(("short", dtype, 0.4) for dtype in (torch.bfloat16, torch.float16)),
        ("short", torch.float32, 0.08)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "share"), [*CASES, *(pytest.param(*case, marks=pytest.mark.thorough) for case in MORE)]
)
def test_the_kernels_give_what_the_estimator_gives(name, dtype, share):
    sizes = check(Model(HALF_TURN, 8), SPANS[name], some(SPANS[name], share), dtype=dtype)
    assert sizes.amax(1).gt(0.02).all()


ROTATIONS = {
    "none": (None, 0),
    "half": (HALF_TURN, 8),
    "half of some": (HALF_TURN, 3),
    "interleaved": (INTERLEAVED, 8),
    "interleaved of some": (INTERLEAVED, 3),
    "the other way": (KeyRotation(0, "half", "single", 0, -1), 8),
    "values": (KeyRotation(1, "interleaved", "repeated", 0), 4),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if n in ("half", "interleaved") else ()) for n in ROTATIONS]
)
def test_any_rotation(name):
    check(Model(*ROTATIONS[name]), FEW, some(FEW, 0.3), LAYOUT if name != "values" else RowLayout(1, 48, 1, 16))


@pytest.mark.thorough
@pytest.mark.parametrize("heads", [(5, 3), (1, 1), (4, 9)])
def test_any_number_of_heads(heads):
    check(Model(HALF_TURN, 5), FEW, some(FEW, 0.3), RowLayout(heads[0], 16, heads[1], 24))


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (256, 256), (512, 64)])
def test_head_dims(key_dim, value_dim):
    check(Model(HALF_TURN, key_dim // 2), [(3, 70)], some([(3, 70)], 0.3), RowLayout(1, key_dim, 1, value_dim))


@pytest.mark.parametrize(
    "rows",
    [[7, 8, 141], [7, 112, 141], [4, 110, 141], [4, 7, 141], list(range(4, 142)), [39, 105, 111, 112, 139]],
)
def test_few_errors_all_of_them_or_none_in_a_piece(rows):
    check(Model(HALF_TURN, 8), SPANS["short"], rows)


@pytest.mark.parametrize("rows", [[0, 141], [0, 112, 141]])
def test_fewer_than_two_errors_change_nothing(rows):
    spans, rows = SPANS["short"], torch.tensor(rows, device=DEVICE)
    buffer, fresh = layer_of(LAYOUT, 150, torch.bfloat16)
    before = buffer.clone()
    sizes = corrected_by_kernels(Model(HALF_TURN, 8), spans, rows, fresh, buffer, LAYOUT)
    rest = torch.ones(len(buffer), dtype=torch.bool).index_fill(0, rows.cpu(), False)
    assert torch.equal(buffer[rest], before[rest])
    assert not sizes.any()


def test_errors_of_zero_change_nothing():
    buffer, _ = layer_of(LAYOUT, 150, torch.float32)
    before, rows = buffer.clone(), some(FEW, 0.3).to(DEVICE)
    fresh = LAYOUT.views(buffer[None, :150].clone())
    corrected_by_kernels(Model(HALF_TURN, 8), FEW, rows, fresh, buffer, LAYOUT)
    assert torch.equal(buffer, before)


def test_rows_that_fill_a_graph_do_not_count():
    """Also where the last row, whose copies they are, stands in a moved piece."""
    for rows in (some(FEW, 0.3), [6, 60, 70, 79]):
        check(Model(HALF_TURN, 8), FEW, rows, padding=9)


def test_runs_are_alike_to_the_bit():
    runs = []
    for _ in range(2):
        buffer, fresh = layer_of(LAYOUT, 150, torch.bfloat16)
        rows = some(SPANS["short"], 0.2).to(DEVICE)
        corrected_by_kernels(Model(HALF_TURN, 8), SPANS["short"], rows, fresh, buffer, LAYOUT)
        runs.append(buffer)
    assert torch.equal(*runs)


# --- the trust of a head ----------------------------------------------------------------------------------------------


def asking(layout, rows, group=1, dtype=torch.float32, window=None, seed=3):
    """A layer's attention, as its queries (1, H, S, D) show it."""
    shape = 1, layout.key_heads * group, len(rows), layout.key_dim
    query = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return AttentionArgs(query, query, query, layout.key_dim**-0.5, window)


@pytest.fixture
def ramp(monkeypatch):
    """So long that every head is on it: whatever a share is, it tells."""
    for name, value in (("DOUBTED", -1.0), ("TRUSTED", 2.0)):
        monkeypatch.setattr(sys.modules["hfblend.blend.trust"], name, value)
    monkeypatch.setattr(sys.modules[__name__], "ASKING", Asking(NUM_QUERIES, -1.0, 2.0))


def check_trust(model, spans, rows, layout=LAYOUT, dtype=torch.float32, padding=0, exact=0, noise=0.0, **asked):
    """Both ways correct alike, and keys not as without queries.

    `test_a_head_whose_attention_knows_better_is_left_alone` compares values to the bit.
    """
    length, rows = max(stop for _, stop in spans) + 3, torch.as_tensor(rows, device=DEVICE)
    reused, fresh = layer_of(layout, length, dtype)
    generator = torch.Generator().manual_seed(4)
    reused[:length] += (noise * torch.randn(length, layout.width, generator=generator)).to(DEVICE, dtype)
    args, (one, other, plain) = asking(layout, rows, dtype=dtype, **asked), (reused.clone() for _ in range(3))
    corrected_by_torch(model, spans, rows, fresh, one, layout, length, args, exact)
    corrected_by_kernels(model, spans, rows, fresh, other, layout, padding, args, exact)
    close(other, one, reused)
    corrected_by_torch(model, spans, rows, fresh, plain, layout, length)  # the kernels would take 80 times as long
    keys, values = (slice(0, layout.value_offset), slice(layout.value_offset, layout.width))
    assert (plain[:, keys].float() - other[:, keys].float()).abs().max() > 1e-2
    close(other[:, values], plain[:, values], reused[:, values])


TRUSTS = {
    "one head a KV head": {},
    "two": {"group": 2},
    "three": {"group": 3},
    "four": {"group": 4},
    "a window": {"group": 2, "window": 20},
    "in a graph": {"group": 2, "padding": 9},
    "exact rows": {"group": 2, "exact": 2},
    "bf16": {"group": 4, "dtype": torch.bfloat16},
    "fp16": {"group": 2, "dtype": torch.float16, "padding": 3},
    "noise": {"noise": 3.0},
    "odd": {"layout": RowLayout(3, 36, 1, 24), "group": 2},
    "wide": {"layout": RowLayout(1, 144, 1, 16), "group": 2, "padding": 1},
}


QUICK = ("two", "in a graph", "exact rows", "bf16", "odd")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.thorough) for n in TRUSTS])
def test_heads_are_trusted_as_by_the_estimator(name, ramp):
    check_trust(Model(HALF_TURN, 8), SPANS["short"], some(SPANS["short"], 0.2), **TRUSTS[name])


@pytest.mark.parametrize(
    ("exact", "window"), [(75, 60), *(pytest.param(40, w, marks=pytest.mark.thorough) for w in (None, 60))]
)
def test_rows_that_are_exact_take_attention(exact, window, ramp):
    """More rows than there are queries, and than a program reads at once."""
    spans = [(exact, exact + 60), (exact + 60, exact + 170)]
    check_trust(Model(HALF_TURN, 8), spans, some(spans, 0.6), exact=exact, window=window, padding=5)


@pytest.mark.parametrize(
    "name",
    [
        *("half of some", "interleaved"),
        *(pytest.param(n, marks=pytest.mark.thorough) for n in ("none", "interleaved of some", "the other way")),
    ],
)
def test_trust_under_any_rotation(name, ramp):
    check_trust(Model(*ROTATIONS[name]), FEW, some(FEW, 0.3), group=2)


@pytest.mark.parametrize("rows", [[7, 8, 141], [4, 110, 141], list(range(4, 142, 2)), [39, 105, 111, 112, 139]])
def test_trust_of_few_errors(rows, ramp):
    spans, length = SPANS["short"], 143
    rows = torch.tensor(rows, device=DEVICE)
    reused, fresh = layer_of(LAYOUT, length, torch.float32)
    args, one, other = asking(LAYOUT, rows), reused.clone(), reused.clone()
    corrected_by_torch(Model(HALF_TURN, 8), spans, rows, fresh, one, LAYOUT, length, args)
    corrected_by_kernels(Model(HALF_TURN, 8), spans, rows, fresh, other, LAYOUT, args=args)
    close(other, one, reused)


@pytest.mark.parametrize("rows", [[0, 141], [0, 112, 141]])
def test_nothing_is_asked_of_fewer_than_two_errors(rows):
    rows = torch.tensor(rows, device=DEVICE)
    buffer, fresh = layer_of(LAYOUT, 150, torch.bfloat16)
    before, args = buffer.clone(), asking(LAYOUT, rows, dtype=torch.bfloat16)
    buffer[145:] = torch.nan  # where nothing is written yet
    corrected_by_kernels(Model(HALF_TURN, 8), SPANS["short"], rows, fresh, buffer, LAYOUT, 4, args)
    rest = torch.ones(145, dtype=torch.bool).index_fill(0, rows.cpu(), False)
    assert torch.equal(buffer[:145][rest], before[:145][rest])


def test_rows_that_are_not_written_yet_are_not_read():
    """As those between pieces: whatever stands there."""
    runs, rows = [], some(FEW, 0.3).to(DEVICE)
    for value in (0.0, torch.nan):
        buffer, fresh = layer_of(LAYOUT, 90, torch.float32)
        buffer[0] = buffer[35:40] = buffer[80:] = value
        corrected_by_kernels(Model(HALF_TURN, 8), FEW, rows, fresh, buffer, LAYOUT, 3, asking(LAYOUT, rows))
        runs.append(buffer[1:35])
    assert torch.equal(*runs)


def refusing(dtype=torch.float32):
    """Errors of two heads agree, but in the first those rows that are attended to do not share them."""
    rows, length = torch.arange(2, 90, 2), 92
    buffer, fresh = layer_of(LAYOUT, length, torch.float32)
    shift = torch.randn(LAYOUT.width, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    fresh = (buffer[:length] + shift).clone()
    query = torch.zeros(1, 2, len(rows), 16, device=DEVICE)
    query[:, 1] = shift[16:32]
    query[:, 0] = shift[:16]
    for row in rows[::8]:  # they are attended to
        buffer[row, :16] = 20 * shift[:16]
        fresh[row, :16] = buffer[row, :16] - shift[:16]
    args = AttentionArgs(query.to(dtype), query, query, 1.0)
    return buffer.to(dtype), LAYOUT.views(fresh[None].to(dtype)), rows.to(DEVICE), args


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 4])
def test_a_head_whose_attention_knows_better_is_left_alone(dtype, padding):
    """Its keys stay as they are to the bit, while values and the other head are corrected wholly."""
    (reused, fresh, rows, args), spans = refusing(dtype), [(1, 60), (60, 91)]
    one, other, plain = (reused.clone() for _ in range(3))
    model = Model(None, 0)
    corrected_by_torch(model, spans, rows, fresh, one, LAYOUT, 92, args)
    corrected_by_kernels(model, spans, rows, fresh, other, LAYOUT, padding, args)
    corrected_by_kernels(model, spans, rows, fresh, plain, LAYOUT)
    stale = torch.arange(3, 90, 2, device=DEVICE)
    assert torch.equal(other[stale, :16], reused[stale, :16])
    assert torch.equal(other[stale, 16:], plain[stale, 16:])
    assert not torch.equal(plain[stale, :16], reused[stale, :16])
    close(other, one, reused)


def test_trust_is_alike_to_the_bit():
    runs = []
    for _ in range(2):
        buffer, fresh = layer_of(LAYOUT, 150, torch.bfloat16)
        rows = some(SPANS["short"], 0.2).to(DEVICE)
        args = asking(LAYOUT, rows, 4, torch.bfloat16)
        corrected_by_kernels(Model(HALF_TURN, 8), SPANS["short"], rows, fresh, buffer, LAYOUT, 0, args)
        runs.append(buffer)
    assert torch.equal(*runs)


# --- the compiler -----------------------------------------------------------------------------------------------------


def compile_all(patch, layout, turn, in_state):
    """PTX of each kernel for Hopper GPUs, by name, as they are launched for bf16 rows. No GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hfblend.kernels import correction, trust

    types = {"PLAN": "*i64", "KEYS": "*bf16", "VALUES": "*bf16", "TOKENS_OF": "*i64", "OUT": "*fp32"}
    types |= {"QUERY": "*bf16", "PARTS": "*fp32"} | dict.fromkeys(("scaling", "doubted", "trusted"), "fp32")
    types["BUFFER"] = "*i64" if in_state else "*bf16"
    divisible = ("BUFFER", "QUERY", "KEYS", "VALUES", "TOKENS_OF", "PARTS")
    divisible += ("q_head", "q_row", "k_head", "k_row", "v_head", "v_row")
    found = {}

    class Recorder:
        """In place of a kernel: compiles what would be launched."""

        def __init__(self, module, name):
            self.kernel, self.name = getattr(module, name), name

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, num_warps=4, num_stages=3, maxnreg=None, **constants):
            names = self.kernel.arg_names
            constants |= {name: arg for name, arg in zip(names, args) if isinstance(arg, triton.language.dtype)}
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
            places = {(names.index(name),): value for name, value in constants.items()}
            hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in names}
            source = ASTSource(self.kernel, signature, constexprs=places, attrs=hints)
            target = GPUTarget("cuda", 90, 32)
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
            found[self.name] = triton.compile(source, target=target, options=options).asm["ptx"]

    for module in (correction, trust):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(module, name))
    kernels = correction.OffsetKernels({0: layout}, {0: turn}, BLOCK, ASKING)
    fresh = tuple(t.to(torch.bfloat16) for t in layout.views(torch.zeros(1, 8, layout.width)))
    numbers, query = torch.zeros(11, dtype=torch.long), torch.zeros(1, 2 * layout.key_heads, 8, layout.key_dim)
    args = AttentionArgs(query.bfloat16(), query, query, 0.1, 50 if turn is None else None)
    state = State(numbers, {0: layout}) if in_state else torch.zeros(8, layout.width, dtype=torch.bfloat16)
    kernels.correct(0, fresh, torch.arange(8), state, numbers, args)
    kernels.sizes(range(1), numbers, 1)
    return found


FORMS = {
    "llama": (RowLayout(8, 128, 8, 128), Turn(0, 64, True, 0), True),
    "interleaved": (RowLayout(8, 128, 8, 128), Turn(0, 64, False, 0), True),
    "partly": (RowLayout(32, 80, 32, 80), Turn(0, 16, True, 0), True),
    "latent": (RowLayout(1, 512, 1, 64), Turn(1, 32, False, 0), False),
    "unturned": (RowLayout(1, 256, 1, 256), None, True),
    "odd": (RowLayout(3, 36, 3, 36), Turn(0, 18, True, 0), True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("forms", [["llama"], list(FORMS)[1:]])
def test_the_compiler_takes_what_the_interpreter_takes(forms):
    """And rows move 16 bytes at a time, though their address is read from memory."""
    code = f"""if True:
        import json, pytest, test_kernel_correction as own
        for form in {forms!r}:
            with pytest.MonkeyPatch.context() as patch:
                print(json.dumps(own.compile_all(patch, *own.FORMS[form])))
    """
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    for form, line in zip(forms, run.stdout.splitlines()[-len(forms) :], strict=True):
        ptx = json.loads(line)
        assert len(ptx) == (5 if form == "latent" else 7)
        moved = re.findall(r"(?:ld|st)\.global\S*b16 ", ptx["_add_offsets_kernel"])
        moved += re.findall(r"ld\.global\S*b16 ", ptx.get("_ask_kernel", ""))
        assert bool(moved) == (form == "odd"), form
