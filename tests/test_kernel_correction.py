"""The kernels of the correction against the estimator and what applies it, in PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfblend.blend.correction import BLOCK, offset
from hfblend.blend.reuse import Corrector, Piece, Reuse
from hfblend.blend.rotation import KeyRotation, pair_tables
from hfblend.kv.rows import RowLayout, first_rows
from hfblend.trace.observer import Observer

pytest.importorskip("triton")
from hfblend.kernels.correction import OffsetKernels, Turn
from hfblend.kernels.plan import FIRST_TABLE, Plan
from hfblend.kernels.state import State

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF_TURN, INTERLEAVED = KeyRotation(0, "half", "duplicated", 0), KeyRotation(0, "interleaved", "repeated", 0)
LAYOUT = RowLayout(2, 16, 2, 16)


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


def corrected_by_torch(model, spans, rows, fresh, buffer, layout, length):
    """What stands in the buffer once a pass has been there, and the sizes that its observer is told."""
    empty = torch.empty(0, dtype=torch.long)
    reuse = Reuse([], [Piece(span, None, False) for span in spans], empty, empty, empty, empty)
    observer, kv = Sizes(), first_rows(layout.views(buffer[None]), length)
    Corrector(offset, model, reuse, length, observer)(-1, 0, rows, tuple(t[:, :, rows] for t in fresh), kv)
    for states, new in zip(kv, fresh):
        states[:, :, rows] = new[:, :, rows]
    return observer.sizes


def kernels_of(model, layout):
    """The kernels for one layer, and the rotary tables of 2,000 positions."""
    rotation = model.rotations[0]
    if rotation is None:
        return OffsetKernels({0: layout}, {0: None}, BLOCK), []
    tables = model.rotary_tables_of_pieces(0, [(torch.arange(2000), 0)])
    cos, sin = (table.contiguous() / 1.2 for table in pair_tables(tables, rotation.layout))
    turn = Turn(rotation.slot, model.pairs, rotation.pairing == "half", 0)
    return OffsetKernels({0: layout}, {0: turn}, BLOCK), [(cos, sin * rotation.sign)]


def corrected_by_kernels(model, spans, rows, fresh, buffer, layout, padding=0):
    """The same; `padding` copies of the last row follow the others, as in a graph."""
    kernels, tables = kernels_of(model, layout)
    plan = Plan(spans, BLOCK, {0: layout}, tables, DEVICE)
    numbers = torch.tensor(plan.numbers_for(rows), device=DEVICE)
    assert len(numbers) == FIRST_TABLE.value + 2 * len(tables)
    padded = torch.cat([rows, rows[-1:].expand(padding)])
    kernels.correct(0, tuple(t[:, :, padded] for t in fresh), padded, buffer, numbers)
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


def compile_all(patch, layout, turn, in_state):
    """PTX of each kernel for Hopper GPUs, by name, as they are launched for bf16 rows. No GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hfblend.kernels import correction

    types = {"PLAN": "*i64", "KEYS": "*bf16", "VALUES": "*bf16", "TOKENS_OF": "*i64", "OUT": "*fp32"}
    types["BUFFER"] = "*i64" if in_state else "*bf16"
    divisible = ("BUFFER", "KEYS", "VALUES", "TOKENS_OF", "k_head", "k_row", "v_head", "v_row")
    found = {}

    class Recorder:
        """In place of a kernel: compiles what would be launched."""

        def __init__(self, name):
            self.kernel, self.name = getattr(correction, name), name

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, num_warps=4, **constants):
            names = self.kernel.arg_names
            constants |= {name: arg for name, arg in zip(names, args) if isinstance(arg, triton.language.dtype)}
            signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
            places = {(names.index(name),): value for name, value in constants.items()}
            hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in names}
            source = ASTSource(self.kernel, signature, constexprs=places, attrs=hints)
            target = GPUTarget("cuda", 90, 32)
            found[self.name] = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["ptx"]

    for name in [name for name in vars(correction) if name.endswith("_kernel")]:
        patch.setattr(correction, name, Recorder(name))
    kernels = correction.OffsetKernels({0: layout}, {0: turn}, BLOCK)
    fresh = tuple(t.to(torch.bfloat16) for t in layout.views(torch.zeros(1, 8, layout.width)))
    numbers = torch.zeros(9, dtype=torch.long)
    state = State(numbers, {0: layout}) if in_state else torch.zeros(8, layout.width, dtype=torch.bfloat16)
    kernels.correct(0, fresh, torch.arange(8), state, numbers)
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


@pytest.mark.parametrize("forms", [["llama"], pytest.param(list(FORMS)[1:], marks=pytest.mark.thorough)])
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
        assert len(ptx) == 5
        moved = re.findall(r"(?:ld|st)\.global\S*b16 ", ptx["_add_offsets_kernel"])
        assert bool(moved) == (form == "odd"), form
