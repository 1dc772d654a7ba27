"""Keys cover all that K/V depend on: every byte of weights and buffers, numbers in modules, the config."""

from __future__ import annotations

import functools
import logging
import re
import tempfile

import accelerate
import pytest
import torch
from helpers import MODELS, config, generate, largest_difference, make_llama, make_mistral, make_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, Trainer, TrainingArguments

import hfblend
from hfblend.gpu.fused import find_norms
from hfblend.model.structure import Structure
from hfblend.model.weights.digests import digest, digests
from hfblend.model.weights.fingerprint import Fingerprint
from hfblend.model.weights.offloading import OffloadedWeights
from hfblend.model.weights.samples import Samples, reference_views

# A chunk right after its prefix is exact: at ratio 0 its stored K/V are used as they are.
PROMPT = hfblend.Prompt.from_ids(list(range(7, 13)), [list(range(20, 60))], list(range(70, 77)))
STOCK = {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def k_proj(model, layer=1):
    return model.model.layers[layer].self_attn.k_proj.weight


def inv_freq(model):
    return model.model.rotary_emb.inv_freq


# --- ways of changing what K/V depend on --------------------------------------------------------------------------


def step_of(name, **options):
    """A step of an optimizer over all parameters."""

    def step(model):
        parameters = list(model.parameters())
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(parameter)
        try:
            optimizer = getattr(torch.optim, name)(parameters, lr=0.01, **options)
            optimizer.step()
        except RuntimeError as error:  # a fused step may be made for some devices only
            if not re.search("supported devices|Could not run", str(error)):
                raise
            pytest.skip(f"{name} on {model.device.type}: {error}")
        optimizer.zero_grad()

    return step


def through_trainer(model):
    """`Trainer` with its default optimizer, which is fused."""
    row = {"input_ids": PROMPT.input_ids[0], "labels": PROMPT.input_ids[0]}
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": model.device.type == "cpu", "report_to": [], "save_strategy": "no"}
        arguments = TrainingArguments(
            folder, max_steps=1, learning_rate=0.01, disable_tqdm=True, logging_strategy="no", **options
        )
        Trainer(model, arguments, train_dataset=[row] * 8).train()
    model.eval()


def through_data(model):
    k_proj(model).data.mul_(1.5)


def through_detached_alias_of_a_row_block(model):
    k_proj(model).data[8:16] += 0.5


def through_a_column_block(model):
    k_proj(model).data[:, 40:48] += 0.5


def through_numpy(model):
    k_proj(model).detach().numpy()[...] *= 1.5


def through_dlpack(model):
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(k_proj(model).detach())).mul_(1.5)


def through_storage(model):
    weight = k_proj(model)
    torch.empty(0, dtype=weight.dtype, device=weight.device).set_(weight.untyped_storage(), 0, weight.shape).neg_()


def past_the_counter(model):
    weights = [p.detach() for p in model.parameters()]
    with torch.autograd._unsafe_preserve_version_counter(tuple(weights)):
        torch._foreach_mul_(weights, 1.1)


def through_flat_buffer(model):
    """As ZeRO does it: parameters are slices of one buffer, which is written whole."""
    flat = model.flat_buffer
    flat.add_(0.05)


def as_flat_buffer(model):
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.data = part.view(parameter.shape)
    model.__dict__["flat_buffer"] = flat


def with_set(model):
    weight = k_proj(model)
    with torch.no_grad():
        weight.set_(weight.detach() * 1.5)


def assigned_data(model):
    k_proj(model).data = k_proj(model).data * 1.5


def transposed_in_place(model):
    """The same memory, read in another order."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.t()


def loaded_in_place(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})


def loaded_by_assignment(model):
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)


def inference_tensors(model):
    with torch.inference_mode():
        model.load_state_dict({name: value * 1.0 for name, value in model.state_dict().items()}, assign=True)


def inside_inference_mode(model):
    """Inference tensors have no counter at all."""
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def inv_freq_in_place(model):
    inv_freq(model).mul_(0.5)


def inv_freq_through_data(model):
    inv_freq(model).data[3] *= 2


def inv_freq_replaced(model):
    model.model.rotary_emb.inv_freq = inv_freq(model) * 0.5


def attention_scaling(model):
    model.model.rotary_emb.attention_scaling = 1.2


def epsilon_of_a_norm(model):
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def tied_row(model):
    """A block of the embedding's rows."""
    model.get_input_embeddings().weight.data[20:40] *= 1.5


def nothing(model):
    pass


WAYS = {
    "SGD": (nothing, step_of("SGD")),
    **{
        f"fused {name}": (nothing, step_of(name, fused=True))
        for name in ("AdamW", "Adam", "SGD", "Adagrad")
    },
    "foreach AdamW": (nothing, step_of("AdamW", foreach=True)),
    "Trainer": (nothing, through_trainer),
    "flat buffer": (as_flat_buffer, through_flat_buffer),
    "assigned inference tensors": (inference_tensors, inside_inference_mode),
    **{
        way.__name__.replace("_", " "): (nothing, way)
        for way in (
            through_data,
            through_detached_alias_of_a_row_block,
            through_a_column_block,
            through_numpy,
            through_dlpack,
            through_storage,
            past_the_counter,
            with_set,
            assigned_data,
            transposed_in_place,
            loaded_in_place,
            loaded_by_assignment,
            inv_freq_in_place,
            inv_freq_through_data,
            inv_freq_replaced,
            attention_scaling,
            epsilon_of_a_norm,
            tied_row,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_kv_of_before_a_change_is_not_served(way, device):
    prepare, change = WAYS[way]
    if device == "cuda" and change in (through_numpy, through_trainer):
        pytest.skip("on a CPU only")
    model = make_llama().to(device)
    prepare(model)
    before = generate(model, {name: value.to(device) for name, value in STOCK.items()})
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, PROMPT.inputs())
        generate(model, PROMPT.inputs())
        assert (blender.trace.hits, blender.trace.chunks[0].exact) == (1, True)
        change(model)
        blended = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 0
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 1
    after = generate(model, {name: value.to(device) for name, value in STOCK.items()})
    assert largest_difference(before, after) > 1e-2  # the change was one
    assert largest_difference(blended, after) <= (1e-4 if device == "cpu" else 1e-3)


# --- equal weights in modules that compute otherwise ---------------------------------------------------------------


class Around(torch.nn.Module):
    """Scales what comes out of a module, by values of every kind that a module may hold."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self._factor, self.factors, self.by_name = inner, 1, [1, 2], {"a": 1}
        self.function, self.vector = torch.tanh, torch.full((64,), 0.5)

    def forward(self, x):
        factor = self._factor * self.factors[0] * self.by_name["a"]
        return self.function(self.inner(x)) * factor * self.vector


class Negated(Around):
    def forward(self, x):
        return -super().forward(x)


class OtherNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.variance_epsilon)


def scaled_by(factor):
    """Two of these have the same code and differ in what it captured."""
    return lambda module, args, output: output * factor


def with_own_forward(block, factor):
    inner = block.inner
    block.forward = lambda x: inner(x) * factor


def in_each_layer(change):
    def changed(model):
        for layer in model.model.layers:
            change(layer)

    return changed


OTHERWISE = {
    "activation": lambda layer: setattr(layer.mlp.inner, "act_fn", torch.nn.GELU().eval()),
    "private number": lambda layer: setattr(layer.mlp, "_factor", 5),
    "list": lambda layer: layer.mlp.factors.__setitem__(0, 5),
    "dict": lambda layer: layer.mlp.by_name.update(a=5),
    "function": lambda layer: setattr(layer.mlp, "function", torch.relu),
    "tensor": lambda layer: setattr(layer.mlp, "vector", torch.full((64,), 2.5)),
    "tensor in place": lambda layer: layer.mlp.vector.mul_(3),
    "class": lambda layer: setattr(layer.mlp, "__class__", Negated),
    "norm": lambda layer: setattr(layer, "input_layernorm", OtherNorm(layer.input_layernorm).eval()),
    "captured value": lambda layer: with_own_forward(layer.mlp, 2.5),
    "hook": lambda layer: layer.mlp.register_forward_hook(scaled_by(2.0)),
}


def made_of_blocks():
    model = make_llama()
    for layer in model.model.layers:
        layer.mlp = Around(layer.mlp).eval()
        with_own_forward(layer.mlp, 0.5)
        del layer.mlp.forward
    return model


@pytest.mark.parametrize("kind", OTHERWISE)
def test_equal_weights_in_modules_that_compute_otherwise_have_other_kv(kind):
    model, change, store = made_of_blocks(), in_each_layer(OTHERWISE[kind]), hfblend.MemoryStore()
    if kind == "captured value":
        in_each_layer(lambda layer: with_own_forward(layer.mlp, 0.5))(model)
    with hfblend.patch(model, config=config(0.0), store=store) as blender:
        generate(model, PROMPT.inputs())
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 1
        change(model)
        blended = generate(model, PROMPT.inputs())
        assert blender.trace.hits == 0
    assert largest_difference(blended, generate(model, STOCK)) <= 1e-4
    other = made_of_blocks()
    change(other)
    with hfblend.patch(other, config=config(0.0), store=store) as blender:
        generate(other, PROMPT.inputs())
        assert blender.trace.hits == 1  # of the changed model's, not of the first one's


@pytest.mark.parametrize("kind", OTHERWISE)
def test_the_fingerprint_alone_sees_modules_that_compute_otherwise(kind):
    model = made_of_blocks()
    taken = Fingerprint(model)
    before = taken.digest
    in_each_layer(OTHERWISE[kind])(model)
    assert taken.current(model) == Fingerprint(model).digest != before


def test_a_config_inside_a_config_counts():
    model = make_llama()
    model.config.inner = LlamaConfig(rms_norm_eps=0.1)
    taken, structure = Fingerprint(model), Structure(model)
    before = taken.digest
    assert structure.is_as_it_was()
    model.config.inner.rms_norm_eps = 0.2
    assert not structure.is_as_it_was()
    assert taken.current(model) != before


def test_a_write_that_the_sample_misses_is_seen_after_refresh():
    model = make_llama(vocab_size=300)
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, PROMPT.inputs())
        weight = model.get_input_embeddings().weight.data.view(-1)
        samples = Samples([weight])
        for place in range(20 * 64, len(weight)):
            value = weight[place].clone()
            weight[place] += 1
            if samples.are_as_they_were():
                break
            weight[place] = value
        assert not torch.equal(weight[place], value)
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 1
        blender.refresh()
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 0


def test_one_element_of_a_small_tensor_is_seen():
    model = make_llama()
    taken = Fingerprint(model)
    small = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() <= 8192]
    assert len(small) > 20
    for tensor in small:
        before = taken.digest
        tensor.data.view(-1)[tensor.numel() // 3] += 1
        assert taken.current(model) != before


def test_a_change_of_the_config_is_seen():
    model = make_mistral()
    taken = Fingerprint(model)
    seen = {taken.digest}
    model.config.sliding_window = 12
    seen.add(taken.current(model))
    model.config.rope_parameters["rope_theta"] = 5.0
    seen.add(taken.current(model))
    assert len(seen) == 3
    model.config._attn_implementation = "eager"  # which tells nothing of KV
    model.config.use_cache = False
    assert taken.current(model) in seen


def test_an_offloaded_weight_written_past_its_counter_is_seen():
    model = make_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, PROMPT.inputs())
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 1
        OffloadedWeights(model).read("model.layers.1.self_attn.k_proj.weight").data.mul_(1.5)
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 0


@pytest.mark.parametrize("change", ["in place", "past the counter", "another"])
def test_a_change_inside_a_tensor_subclass_is_seen(change):
    """As the scales of torchao's and quanto's weights are."""
    model = make_llama()
    model.model.extra = torch.nn.Parameter(TwoTensor(torch.ones(3, 4), torch.ones(3, 4)))
    taken = Fingerprint(model)
    before = taken.digest
    assert taken.current(model) == before
    match change:
        case "in place":
            model.model.extra.b.mul_(2)
        case "past the counter":
            model.model.extra.b.data.mul_(2)
        case "another":
            model.model.extra.b = torch.full((3, 4), 2.0)
    assert taken.current(model) == Fingerprint(model).digest != before


# --- what is read again ---------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """How many tensors were read whole."""
    counted = []

    def counting(sources, how):
        found = digests(sources := list(sources), how)
        counted.append(len(sources))
        return found

    monkeypatch.setattr(hfblend.model.weights.fingerprint, "digests", counting)
    return counted


def test_only_what_has_changed_is_read_again(read, caplog):
    model = make_llama()
    tensors = len({id(t) for t in (*model.parameters(), *model.buffers())})
    taken = Fingerprint(model)
    taken.current(model)
    with torch.no_grad():
        k_proj(model).mul_(2)
        model.lm_head.weight.mul_(2)
    taken.current(model)
    assert read == [tensors, 2]
    assert "version counters" not in caplog.text
    with caplog.at_level(logging.INFO, "hfblend"):
        k_proj(model).data.mul_(2)
        taken.current(model)
    assert read == [tensors, 2, tensors]  # others may have been written past their counters, too
    assert "version counters" in caplog.text


def test_a_fingerprint_that_was_interrupted_is_taken_at_the_next_call(monkeypatch):
    model = make_llama()
    taken = Fingerprint(model)
    before = taken.digest
    k_proj(model).data.mul_(2)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hfblend.model.weights.fingerprint, "digests", stopped)
        with pytest.raises(KeyboardInterrupt):
            taken.current(model)
    assert taken.current(model) == Fingerprint(model).digest != before


# --- the digest -------------------------------------------------------------------------------------------------------


def checkerboard(weight):
    bits = weight.view(torch.int32)
    rows, columns = torch.arange(bits.shape[0])[:, None], torch.arange(bits.shape[1])
    bits += (1 << 23) * torch.where((rows + columns) % 2 == 0, 1, -1).to(torch.int32)


def plus_and_minus(weight):
    weight[:2, :2] += torch.tensor([[0.5, -0.5], [-0.5, 0.5]])


def swapped(weight, dim, one=0, other=1):
    order = list(range(weight.shape[dim]))
    order[one], order[other] = order[other], order[one]
    weight.copy_(weight.index_select(dim, torch.tensor(order)))


EDITS = {
    "checkerboard": checkerboard,
    "plus and minus": plus_and_minus,
    "swapped rows": functools.partial(swapped, dim=0),
    "swapped last columns": functools.partial(swapped, dim=1, one=-2, other=-1),
    "rows in reverse": lambda weight: weight.copy_(weight.flip(0)),
    "rolled": lambda weight: weight.copy_(weight.roll(1)),
    "sign of zero": lambda weight: weight[0, :1].copysign_(torch.tensor(-1.0)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_models_that_differ_have_other_fingerprints(edit):
    one, other = make_llama(), make_llama()
    with torch.no_grad():
        for model in (one, other):
            k_proj(model)[0, 0] = 0.0
        EDITS[edit](k_proj(other))
    assert Fingerprint(one).digest != Fingerprint(other).digest
    assert Fingerprint(one).digest == Fingerprint(make_equal_to(one)).digest


def make_equal_to(model):
    other = make_llama()
    other.load_state_dict(model.state_dict())
    return other


def test_which_tensor_has_which_numbers_counts():
    one, other = make_llama(), make_llama()
    for name in ("k_proj", "v_proj"):
        swapped_name = "v_proj" if name == "k_proj" else "k_proj"
        source = one.model.layers[1].self_attn.get_submodule(swapped_name).weight
        with torch.no_grad():
            other.model.layers[1].self_attn.get_submodule(name).weight.copy_(source)
    assert Fingerprint(one).digest != Fingerprint(other).digest


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn]  # fmt: skip


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_every_bit_of_every_element_counts(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(1, 9), max_size=3))
    raw = torch.randint(0, 2, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    before, samples = digest(tensor), Samples([tensor])
    place, bit = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, 0 if dtype == torch.bool else 7))
    raw[place] ^= 1 << bit
    assert digest(tensor) != before
    if tensor.numel() <= 32:  # the sample is all of it
        assert not samples.are_as_they_were()
    raw[place] ^= 1 << bit
    assert digest(tensor) == before
    assert samples.are_as_they_were()


def test_the_digest_is_of_elements_in_order_not_of_memory():
    tensor = torch.arange(12.0).view(3, 4)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(tensor.t()) != digest(tensor)
    assert digest(torch.zeros(1).expand(5)) == digest(torch.zeros(5))
    assert digest(torch.empty(0)) == digest(torch.empty(0, 3))


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (1536, 576), (49152, 96), (4, 96, 64), (3, 4096), (4096, 2)])
@pytest.mark.parametrize("dim", [0, -1])
def test_a_write_to_a_block_of_rows_or_columns_meets_the_sample(shape, dim):
    """A twelfth of them, wherever it begins."""
    tensor = torch.zeros(shape)
    size = tensor.shape[dim]
    width = -(-size // 12)
    samples = Samples([tensor])
    for start in {*range(0, size - width, max(width // 2, 1)), size - width}:
        tensor.narrow(dim, start, width).fill_(1)
        assert not samples.are_as_they_were(), start
        tensor.zero_()


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_of_memory_of_any_form(device):
    base = torch.randn(40, 60, dtype=torch.float64, device=device)
    tensors = [base, base.t(), base[:, 10:20], base[0, 0], base[:, :1], torch.ones(1, device=device).expand(9), None,
               torch.empty(0, device=device), base.to(torch.complex128), base > 0, base.half()]  # fmt: skip
    samples = Samples(tensors)
    assert samples.are_as_they_were()
    assert not samples.has_lost_memory()
    assert [bool(sample) for sample in samples.of_each()] == [t is not None and t.numel() > 0 for t in tensors]
    base.neg_()
    assert not samples.are_as_they_were()


def test_the_kernel_takes_the_reference_sample():
    pytest.importorskip("triton")
    from hfblend.kernels.small import sample

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        tensors = [torch.randint(-99, 99, (n, 7), dtype=dtype, device=device) for n in (1, 50, 900)]
        places = [(7, 1), (50, 7), (2100, 3)]
        starts = [0, 7, 57]
        rows = [(t.data_ptr(), step, start, count) for t, (count, step), start in zip(tensors, places, starts)]
        found = sample(torch.tensor(rows, device=device), 2157, dtype)
        assert torch.equal(found, torch.cat(reference_views(tensors, places)))


@pytest.mark.gpu
def test_moving_a_patched_model_away_frees_the_gpu():
    model = make_llama().to("cuda")
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, PROMPT.inputs())
        key = blender.hf_model.fingerprint.digest
        weight = model.model.layers[1].mlp.up_proj.weight
        memory = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
        model.to("cpu")
        assert memory.expired()
        assert blender.hf_model.fingerprint.current(model) == key  # the same numbers, elsewhere


@pytest.mark.gpu
def test_a_norm_in_one_kernel_has_the_epsilon_that_its_module_has_now():
    model = make_llama(dtype=torch.bfloat16).to("cuda")
    norms = find_norms(model.model)
    norm, x = model.model.layers[0].input_layernorm, torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    assert norm in norms
    norm.variance_epsilon = 2.0
    assert torch.allclose(norms[norm](norm.forward, x).float(), norm(x).float(), atol=1e-2)


# --- rotary buffers ---------------------------------------------------------------------------------------------------


def test_a_cast_rotary_table_has_keys_of_its_own(tmp_path):
    make_llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    load = type(make_llama()).from_pretrained
    one, again = (load(tmp_path, dtype=torch.bfloat16).eval() for _ in range(2))
    cast = load(tmp_path, dtype=torch.float32).to(torch.bfloat16).eval()
    assert (inv_freq(one).dtype, inv_freq(cast).dtype) == (torch.float32, torch.bfloat16)
    store = hfblend.MemoryStore()
    hits = []
    for model in (one, again, cast, cast):
        with hfblend.patch(model, config=config(0.0), store=store) as blender:
            generate(model, PROMPT.inputs())
            hits.append(blender.trace.hits)
    assert hits == [0, 1, 0, 1]


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_what_a_long_prompt_does_to_the_rotary_table_is_no_change(rope):
    model, long = make_llama(rope), make_prompt(sizes=(60, 70))
    with hfblend.patch(model, config=config(0.0)) as blender:
        generate(model, PROMPT.inputs())
        at_rest, digests = inv_freq(model).clone(), {blender.hf_model.fingerprint.digest}
        for prompt in (long, long, PROMPT, long):
            generate(model, prompt.inputs())
            digests.add(blender.hf_model.fingerprint.current(model))
        assert not torch.equal(inv_freq(model), at_rest)
        assert len(digests) == 1
        generate(model, PROMPT.inputs())
        assert blender.trace.hits == 1
    assert Fingerprint(make_llama(rope)).digest in digests
    for name in ("original_inv_freq",) if rope == "longrope" else ("inv_freq", "original_inv_freq"):
        model = make_llama(rope)
        getattr(model.model.rotary_emb, name).mul_(0.5)
        assert Fingerprint(model).digest not in digests


def test_a_buffer_that_is_not_saved_counts():
    one, other = make_llama(), make_llama()
    for model, value in ((one, 1.0), (other, 2.0)):
        model.model.register_buffer("embed_scale", torch.tensor(value), persistent=False)
    assert len({Fingerprint(model).digest for model in (one, other, make_llama())}) == 3


@pytest.mark.parametrize("name", MODELS)
def test_two_copies_of_a_checkpoint_have_one_fingerprint(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = [type(model).from_pretrained(tmp_path).eval() for _ in range(2)]
    assert len({Fingerprint(one).digest for one in loaded}) == 1
