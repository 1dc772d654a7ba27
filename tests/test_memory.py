"""What a prompt took is free when the call is over: no cycle of references waits for the garbage collector."""

import copy
import gc
import pickle
import weakref

import pytest
from helpers import config, generate, make_llama, make_prompt

import hfblend
from hfblend.blend.algorithm import Blend
from hfblend.blend.caches import PassCache
from hfblend.blend.reuse import ReusedKV
from hfblend.generate.blending import Blending
from hfblend.gpu.loader import GPULoader
from hfblend.support.registry import model_of

PROMPT = make_prompt((20, 31, 13))


@pytest.fixture
def alive(monkeypatch):
    """Returns a function that names what is still there of the blends that were made."""
    made = []
    for kind in (Blend, Blending, PassCache, ReusedKV):

        def init(self, *args, own=kind.__init__, **kwargs):
            own(self, *args, **kwargs)
            made.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", init)
    gc.collect()
    gc.disable()

    def names():
        assert made
        return [type(one()).__name__ for one in made if one() is not None]

    yield names
    gc.enable()


SETTINGS = {
    "suffix_attention": {},
    "kv_deviation": {"selection": "kv_deviation"},
    "gradual": {"selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.4, 0.15)},
    "mixed": {"selection": "mixed"},
    "full": {"recompute_ratios": (1.0,)},
    "nothing": {"check_layers": (), "recompute_ratios": ()},
    "auto": {"recompute_ratios": "auto"},
}


@pytest.mark.parametrize("level", ["summary", "full"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_generate_leaves_no_blend(settings, level, alive):
    model = make_llama()
    with hfblend.patch(model, config=config(0.2, **settings), trace=level):
        for _ in range(2):
            generate(model, PROMPT.inputs())
            assert alive() == []


def test_blend_and_steps_leave_no_blend(alive):
    model = make_llama()
    hfblend.blend(model, PROMPT, config=config(0.2))
    assert alive() == []
    for step in hfblend.steps(model, PROMPT, config=config(0.2)):
        del step
    assert alive() == []


def test_a_loader_and_what_it_gathers_hold_no_cycle():
    """Each has the prompt's buffers: in a cycle they would wait for the garbage collector, prompt after prompt."""
    pytest.importorskip("triton")
    model, store = make_llama(), hfblend.MemoryStore()
    hfblend.blend(model, PROMPT, store=store, config=config(0.2))
    state = Blending(model_of(model), PROMPT.input_ids, PROMPT.chunk_spans, store, config(0.2))
    reused = state.stopped_at("realigned", state.model.last_logits).reused
    layers = list(state.model.layouts)
    loader = GPULoader(state.model, reused.reuse, len(PROMPT), state.model.device, layers)
    reused.loaders = dict.fromkeys(layers, loader)
    there = [weakref.ref(one) for one in (reused, loader)]
    gc.collect()
    gc.disable()
    try:
        del reused, loader, state
        assert [one() for one in there] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_dropped_model_is_freed(is_removed):
    model = make_llama()
    blender = hfblend.patch(model, config=config(0.2))
    generate(model, PROMPT.inputs())
    if is_removed:
        blender.remove()
    there = [weakref.ref(one) for one in (model, model.model, blender.hf_model)]
    del model, blender
    gc.collect()  # a patched model and its blender know each other
    assert [one() for one in there] == [None] * 3


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_tested_model_is_tested_itself(copied):
    model = make_llama()
    known, twin = model_of(model), copied(model)
    assert model_of(twin) is not known
    assert model_of(twin).model is twin
    assert model_of(twin).digest == known.digest
    assert model_of(model) is known
