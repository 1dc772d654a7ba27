"""What a prompt took is free when the call is over: no cycle of references waits for the garbage collector."""

import gc
import weakref

import pytest
from helpers import config, generate, make_llama, make_prompt

import hfblend
from hfblend.blend.algorithm import Blend
from hfblend.blend.caches import PassCache
from hfblend.generate.blending import Blending

PROMPT = make_prompt((20, 31, 13))


@pytest.fixture
def alive(monkeypatch):
    """Returns a function that names what is still there of the blends that were made."""
    made = []
    for kind in (Blend, Blending, PassCache):

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
