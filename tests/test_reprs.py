"""What a prompt, a blender, a store or a measurement says of itself: one line, a card in a notebook, help."""

from __future__ import annotations

import inspect
import pydoc

import pytest
from helpers import config, generate, make_llama, make_prompt
from test_display import HOSTILE, Tags

import hfblend
from hfblend.store import DiskStore, RemoteStore, TieredStore

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Name -> an object of each kind, after one call."""
    store = TieredStore(
        [hfblend.MemoryStore("1GB"), DiskStore(tmp_path_factory.mktemp("chunks"), "2GB", kv_dtype="int8")]
    )
    with hfblend.patch(make_llama(), config(0.2), store=store) as blender:
        generate(blender.model, PROMPT.inputs(), max_new_tokens=2)
        yield {
            "prompt": PROMPT,
            "blender": blender,
            "trace": blender.trace,
            "memory": store.stores[0],
            "disk": store.stores[1],
            "tiers": store,
            "remote": RemoteStore("memory://reprs/chunks"),
            "verification": blender.verify(PROMPT, num_tokens=3),
            "calibration": blender.calibrate([PROMPT], max_kl=9.0, num_tokens=3),
            "blame": blender.blame(PROMPT, num_tokens=3, seconds=0),
        }


SAYS = {
    "prompt": "<Prompt of 88 tokens: prefix 9, 3 chunks, suffix 11>",
    "blender": "<Blender of a LlamaForCausalLM: suffix_attention 0.2>",
    "trace": "<BlendTrace: blended 88 tokens: 3 chunks",
    "memory": "<MemoryStore: 4 entries, 0.",
    "disk": "2.0 GB at most, in int8; ",
    "tiers": "<TieredStore: <MemoryStore: 4 entries",
    "remote": "<RemoteStore at memory://reprs/chunks; 0 found, 0 not, 0 stored since it was opened>",
    "verification": "<Verification: KL ",
    "calibration": "<Calibration: ratio 0.05 keeps the KL at 9 nats or less; 2 tried>",
    "blame": "<Blame: The answers part at word ",
}


@pytest.mark.parametrize("name", SAYS)
def test_each_says_in_one_line_what_it_is(things, name):
    assert SAYS[name] in repr(things[name])
    assert "\n" not in repr(things[name])
    assert len(repr(things[name])) < 400


SHOWS = {
    "prompt": "3: 13 to 31 tokens",
    "blender": "suffix_attention 0.2",
    "trace": "suffix_attention 0.2",
    "memory": "of 1.0 GB",
    "disk": "int8",
    "tiers": "tier 1",
    "remote": "memory://reprs/chunks",
    "verification": "mean KL, nats",
    "calibration": "largest KL",
    "blame": "Why did the answer change?",
}


@pytest.mark.parametrize("name", SHOWS)
def test_each_has_html_without_scripts(things, name):
    html = things[name]._repr_html_()
    assert html.startswith('<div class="hfb">')
    assert SHOWS[name] in html
    assert not {"script", "img", "dl"} & Tags(html).tags


def test_a_removed_blender_says_so():
    blender = hfblend.patch(make_llama())
    assert "min" not in repr(blender)
    blender.remove()
    assert repr(blender) == "<Blender of a LlamaForCausalLM, removed>"
    assert "Blender, removed" in blender._repr_html_()


def test_settings_that_are_no_single_number_are_said():
    with hfblend.patch(make_llama()) as blender:
        for settings, said in (
            (
                {"selection": "kv_deviation", "check_layers": (1, 2), "recompute_ratios": (0.3, 0.1)},
                "kv_deviation 0.3, 0.1",
            ),
            ({"correction": None}, "suffix_attention 0.15, no correction"),
            ({"check_layers": (), "recompute_ratios": ()}, "nothing recomputed"),
            ({"enabled": False}, "off"),
        ):
            blender.config = hfblend.BlendConfig(**settings)
            assert repr(blender) == f"<Blender of a LlamaForCausalLM: {said}>"


def test_hostile_text_is_inert_in_a_card():
    from hfblend.display.reprs import card

    html = card(HOSTILE[0], [(text, text) for text in HOSTILE], header=HOSTILE, rows=[HOSTILE], note=HOSTILE[1])
    assert not {"script", "img"} & Tags(html).tags
    assert "\u202e" not in html


@pytest.mark.parametrize("name", [name for name in hfblend.__all__ if name != "UnsupportedModel"])
def test_help_reads_well(name):
    """A sentence says what it is, and a line what may be given, with types; nothing is a bare address."""
    thing = getattr(hfblend, name)
    methods = [value for key, value in vars(thing).items() if key[0] != "_" and inspect.isfunction(value)]
    for one in [thing, *methods]:
        first = inspect.getdoc(one).split("\n\n")[0].replace("\n", " ")
        assert first.rstrip()[-1] in ".:", first
        signature = inspect.signature(one)
        assert " at 0x" not in str(signature)
        for parameter in list(signature.parameters.values())[inspect.isfunction(one) and one in methods :]:
            assert parameter.annotation is not parameter.empty, parameter
    assert inspect.getdoc(thing).splitlines()[0] in pydoc.render_doc(thing, renderer=pydoc.plaintext)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("verify", {"prompts", "num_tokens"}),
        ("blame", {"prompt", "num_tokens", "seconds", "progress"}),
        ("calibrate", {"prompts", "max_kl", "ratios", "layers", "num_tokens"}),
    ],
)
def test_an_editor_shows_what_a_method_takes(method, names):
    assert names <= set(inspect.signature(getattr(hfblend.Blender, method)).parameters)
