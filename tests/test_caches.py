"""The cache that a blended call hands back does what a stock one does, whatever becomes of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import config, generate, make_llama, make_mistral, make_prompt, shared
from transformers.cache_utils import DynamicCache, DynamicLayer

import hfblend
from hfblend.generate.hand_over import GrowingLayer
from hfblend.model.hf_model import CACHE

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
IDS = PROMPT.input_ids
MODEL = shared()


def cache_of(model, blended, **arguments):
    """What a call leaves: stock's, or the blended one of the same numbers."""
    if not blended:
        return generate(model, {"input_ids": IDS}, **arguments).past_key_values
    with hfblend.patch(model, config=config(1.0)) as blender:
        cache = generate(model, PROMPT.inputs(), **arguments).past_key_values
        assert blender.trace.blended
    assert isinstance(cache.layers[0], GrowingLayer) == isinstance(model, type(MODEL))
    return cache


def step(model, cache, *tokens, rows=1):
    return model(torch.tensor([tokens] * rows), **{CACHE: cache}).logits


def shallow(cache):
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def by_hand(cache):
    """A copy by another way than `copy`: attribute by attribute."""
    new = copy.copy(cache)
    new.layers = [type(layer).__new__(type(layer)) for layer in cache.layers]
    for one, layer in zip(new.layers, cache.layers):
        vars(one).update(vars(layer))
    return new


def pickled(cache):
    new = copy.copy(cache)
    new.layers = pickle.loads(pickle.dumps(cache.layers))
    return new


def saved(cache):
    file = io.BytesIO()
    torch.save(cache.layers, file)
    file.seek(0)
    new = copy.copy(cache)
    new.layers = torch.load(file, weights_only=False)
    return new


def rebuilt(cache):
    return type(cache)([(layer.keys, layer.values) for layer in cache.layers])


COPIES = [shallow, by_hand, copy.deepcopy, pickled, saved, rebuilt]


def forks(model, cache, copied):
    """Two copies and the original go on in turns, each with tokens of its own."""
    one, other = copied(cache), copied(cache)
    found = []
    for a, b, c in ((9, 50, 13), (11, 12, 14), (20, 21, 22)):
        found += [step(model, one, a), step(model, other, b, b + 1), step(model, cache, c)]
    third = copied(one)
    return [*found, step(model, one, 30), step(model, third, 31), step(model, one, 32), step(model, third, 33)]


def cropped(model, cache):
    copied = shallow(cache)
    copied.crop(-3)
    found = [step(model, copied, 9, 10), step(model, cache, 11)]
    cache.crop(-2)
    return [*found, step(model, cache, 12), step(model, copied, 13)]


def reordered(model, cache):
    cache.batch_repeat_interleave(3)
    found = [step(model, cache, 9, rows=3)]
    found.append(model(torch.tensor([[20], [30], [40]]), **{CACHE: cache}).logits)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    found.append(step(model, cache, 9, rows=3))
    cache.batch_select_indices(torch.tensor([0, 2]))
    return [*found, step(model, cache, 9, rows=2), step(model, cache, 8, rows=2)]


def edited(model, cache):
    """K/V changed in place, or put in the place of others, after a copy was made and both went on."""
    copied = shallow(cache)
    found = [step(model, copied, 9), step(model, cache, 10)]
    for layer in copied.layers:
        layer.keys.mul_(0.5)
    found += [step(model, copied, 11), step(model, cache, 12)]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.flip(2), layer.values.flip(2)
    return [*found, step(model, cache, 13), step(model, copied, 14)]


def reset(model, cache):
    cache.reset()
    return [step(model, cache, 9, 10), step(model, cache, 11)]


def kept(model, cache):
    """What a caller took out of it stays as it was."""
    taken = [(layer.keys, layer.values) for layer in cache.layers]
    before = [t.clone() for kv in taken for t in kv]
    found = [step(model, cache, 9), step(model, cache, 10)]
    assert all(torch.equal(a, b) for a, b in zip(before, (t for kv in taken for t in kv)))
    return found


def kept_for_gradients(model, cache):
    """A loss over what a caller took out goes backward after decoding went on."""
    weight = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        loss = sum((layer.keys * weight).pow(2).sum() for layer in cache.layers)
    with torch.no_grad():
        found = [step(model, cache, 9), step(model, cache, 10)]
    loss.backward()
    return [*found, weight.grad / weight.grad.abs().max(), loss.detach() / weight.grad]


WAYS = {
    **{f"forks by {copied.__name__}": lambda m, c, copied=copied: forks(m, c, copied) for copied in COPIES},
    **{one.__name__: one for one in (cropped, reordered, edited, reset, kept, kept_for_gradients)},
}


def compare(make, way, made_in=torch.no_grad, used_in=torch.no_grad):
    found = []
    for blended in (False, True):
        model = shared(make)
        with made_in():
            cache = cache_of(model, blended)
        with used_in():
            found.append(WAYS[way](model, cache))
    assert len(found[0]) == len(found[1]) > 1
    for stock, ours in zip(*found):
        assert torch.allclose(ours, stock, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [make_llama, make_mistral])
def test_a_returned_cache_is_used_as_stocks(make, way):
    if make is make_mistral and way in ("forks by rebuilt", "cropped", "reset", "edited"):
        pytest.skip("stock's sliding layers do not take it")
    compare(make, way)


MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("way", ["forks by shallow", "forks by by_hand", "cropped", "reordered", "kept"])
@pytest.mark.parametrize("made_in", MODES[:2])
@pytest.mark.parametrize("used_in", MODES)
def test_in_and_out_of_inference_mode_and_gradients(way, made_in, used_in):
    compare(make_llama, way, made_in, used_in)


def gradient(model, cache, parameters=None):
    for parameter in model.parameters():
        parameter.requires_grad_(parameters is None)
    for parameter in parameters or ():
        parameter.requires_grad_()
    with torch.enable_grad():
        first = step(model, cache, 9, 10, 11)[0, -1, 5]
        second = step(model, cache, 12)[0, -1, 6]
    with torch.no_grad():
        step(model, cache, 13)  # must not write into what the graph keeps
        step(model, cache, 14)
    (first + second).backward()
    return [p.grad for p in (parameters or model.parameters()) if p.grad is not None]


@pytest.mark.parametrize("trained", ["all", "queries only", "one layer"])
@pytest.mark.parametrize("copied", [None, shallow, copy.deepcopy])
def test_gradients_through_a_returned_cache(trained, copied):
    found = []
    for blended in (False, True):
        model = make_llama()
        choose = {
            "all": lambda layers: None,
            "queries only": lambda layers: [layer.self_attn.q_proj.weight for layer in layers],
            "one layer": lambda layers: list(layers[2].parameters()),
        }[trained]
        cache = cache_of(model, blended)
        cache = cache if copied is None else copied(cache)
        found.append(gradient(model, cache, choose(model.model.layers)))
    assert len(found[0]) == len(found[1]) > 0
    for stock, ours in zip(*found):
        assert torch.allclose(ours, stock, rtol=1e-3, atol=1e-4 * float(stock.abs().max()))


def test_after_gradients_decoding_goes_on():
    found = []
    for blended in (False, True):
        model = make_llama()
        cache = cache_of(model, blended)
        with torch.enable_grad():
            step(model, cache, 9)
        with torch.no_grad():
            found.append([step(model, cache, 10), step(model, cache, 11)])
        assert not cache.layers[0].keys.requires_grad
    assert all(torch.allclose(a, b, atol=2e-4) for a, b in zip(*found))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda kv: [t.repeat(3, 1, 1, 1) for t in kv],
        lambda kv: [t[:, :1] for t in kv],
        lambda kv: [t[..., :8] for t in kv],
        lambda kv: [t.to("meta") for t in kv],
        lambda kv: [t.double() for t in kv],
    ],
)
def test_what_cannot_be_joined_meets_stocks_answer(wrong):
    """Another batch size, number of heads, head size, device: an error, as stock's; another dtype: its promotion."""
    outcomes = []
    for blended in (False, True):
        cache = cache_of(MODEL, blended)
        layer = cache.layers[0]
        added = wrong([torch.ones(1, *t.shape[1:2], 1, t.shape[3]) for t in (layer.keys, layer.values)])
        try:
            outcomes.append([t.dtype for t in layer.update(*added)])
        except RuntimeError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cache_of_another_dtype(dtype):
    found = []
    for blended in (False, True):
        cache = cache_of(MODEL, blended)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        layer = cache.layers[0]
        new = torch.ones(1, 2, 1, 16)
        with torch.no_grad():
            found.append([layer.update(new, new), layer.update(new, new)])
    for (stock, _), (ours, _) in zip(*found):
        assert stock.dtype == ours.dtype
        assert torch.allclose(ours, stock, atol=1e-2)


def test_decoding_writes_in_place_until_a_copy_is_made():
    with torch.no_grad():
        cache = cache_of(MODEL, True)
        layer = cache.layers[0]
        address = layer.keys.data_ptr()
        step(MODEL, cache, 9)
        assert layer.keys.data_ptr() == address
        copied = shallow(cache)
        assert copied.layers[0].keys is layer.keys
        step(MODEL, cache, 9)
        step(MODEL, copied, 9)
        assert len({address, layer.keys.data_ptr(), copied.layers[0].keys.data_ptr()}) == 3
        address = layer.keys.data_ptr()
        step(MODEL, cache, 9)
        assert layer.keys.data_ptr() == address


class Halved(DynamicCache):
    """Attention reads other keys than it keeps."""

    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        return keys * 0.5, values


class Rounded(DynamicLayer):
    def update(self, key_states, *args, **kwargs):
        return super().update(key_states.round(), *args, **kwargs)


class Counted(DynamicLayer):
    """Its update is Transformers'; what else it does is not known."""

    def get_seq_length(self):
        return super().get_seq_length()


def of_layers(kind):
    cache = DynamicCache()
    cache.layers = [kind() for _ in MODEL.model.layers]
    return cache


def made_lazily(kind):
    cache = DynamicCache()
    cache.layer_class_to_replicate = kind
    return cache


def with_its_own_update(place):
    cache = of_layers(DynamicLayer)
    one = place(cache)
    own = one.update
    one.update = lambda keys, values, *args, **kwargs: own(keys, values * 2, *args, **kwargs)
    return cache


FOREIGN = {
    "a cache": Halved,
    "layers": lambda: of_layers(Rounded),
    "layers that inherit update": lambda: of_layers(Counted),
    "layers to come": lambda: made_lazily(Rounded),
    "an instance": lambda: with_its_own_update(lambda cache: cache),
    "an instance of a layer": lambda: with_its_own_update(lambda cache: cache.layers[1]),
}


@pytest.mark.parametrize("by", ["generate", "custom_generate"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_cache_of_other_code_than_transformers_is_filled_by_stock(name, by):
    def custom(model, input_ids, **kwargs):
        return model(input_ids, logits_to_keep=1, **{CACHE: FOREIGN[name]()}).logits

    def answer(inputs):
        if by == "generate":
            return torch.stack(generate(MODEL, inputs, past_key_values=FOREIGN[name]()).logits)
        return MODEL.generate(**inputs, custom_generate=custom)

    with torch.no_grad():
        stock = answer({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
        with hfblend.patch(MODEL, config=config(1.0)) as blender:
            found = answer(PROMPT.inputs())
            assert blender.trace.fallback == "foreign_cache"
    assert torch.allclose(found, stock, atol=2e-4)
