"""A trace, shown: what is said, that nothing in a prompt's text acts, that long prompts stay small, the plots."""

from __future__ import annotations

import ast
import base64
import dataclasses
import html
import io
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browsers import in_every_form, page_of, running
from helpers import config, generate, make_llama, make_prompt
from rich.console import Console

import hfblend
from hfblend.demo.demo import _reuse_line
from hfblend.demo.playground import Answer, Outcome
from hfblend.display import Display, view
from hfblend.display.blame import BlameView
from hfblend.display.html import rendered
from hfblend.display.plots import new_figure
from hfblend.display.view import clipped
from hfblend.lab import insights, plots
from hfblend.measure.blame import blame_prompt
from hfblend.trace.facts import ChunkTrace, LayerMaps
from hfblend.trace.timeline import Interval
from hfblend.trace.trace import BlendTrace
from hfblend.util import visible

pytestmark = pytest.mark.usefixtures("remembered_proofs")

PROMPT = make_prompt()
HOSTILE = [
    "<script>alert(1)</script>",
    "</div><img src=x onerror=alert(2)>",
    '"\' onmouseover="alert(3)',
    "\u202eevil\u2066",
    "\x1b[31mred\x1b]0;title\x07",
    "[red]markup[/red] [link=http://evil.example]x[/link]",
    "&lt;b&gt;",
    "\ud800",
    "a\u2028b\x00",
    "</style><style>*{display:none}",
]


@pytest.fixture(scope="module")
def trace():
    model, store = make_llama(), hfblend.MemoryStore()
    for level in ("summary", "full"):
        found = hfblend.blend(model, PROMPT, store=store, config=config(0.2), trace=level).trace
    return found


def made(length=200, texts=None, layers=None, chunk=50, prefix=10, suffix=20, **kwargs) -> BlendTrace:
    """A trace of a prompt of that many tokens, by hand."""
    generator = torch.Generator().manual_seed(0)
    stop = length - suffix
    spans = [(start, min(start + chunk, stop)) for start in range(prefix, stop, chunk)]
    candidates = torch.arange(spans[0][1], stop)
    scores = torch.rand(len(candidates), generator=generator)
    pieces = [ChunkTrace(span, f"{i:032x}", "hit", i == 0, prefix) for i, span in enumerate(spans)]
    maps = None
    if layers:
        maps = LayerMaps(*(torch.rand(layers, length, generator=generator) for _ in range(3)))
    plain = {
        "blended": True,
        "num_tokens": length,
        "num_layers": layers or 4,
        "prefix": ChunkTrace((0, prefix), "ab" * 16, "hit", True, 0),
        "chunks": pieces,
        "candidate_idx": candidates,
        "scores": scores,
        "selected_idx": candidates[scores.topk(len(scores) * 15 // 100).indices].sort().values,
        "fresh_idx": torch.arange(stop, length),
        "level": "full",
        "settings": {"selection": "suffix_attention", "recompute_ratios": [0.15]},
        "input_ids": torch.zeros(length, dtype=torch.long),
        "maps": maps,
        "texts": [f" t{i}" for i in range(length)] if texts is None else texts,
    }
    return BlendTrace(**{**plain, **kwargs})


def hostile() -> BlendTrace:
    """One in which every text that can be chosen by somebody else is hostile."""
    bad = "".join(HOSTILE)
    trace = made(200, texts=[HOSTILE[i % len(HOSTILE)] for i in range(200)], layers=4)
    trace.notes, trace.settings["selection"], trace.settings["correction"] = [bad], bad, bad
    trace.chunks[1].key, trace.chunks[1].quantised = bad, bad
    trace.intervals = [Interval("phase", bad, 0, 5), Interval("compute", bad, 1, 2, 0)].copy
    return trace


def printed(trace, width=100, tokenizer=None) -> str:
    console = Console(width=width, force_terminal=True, record=True, color_system="truecolor", file=io.StringIO())
    hfblend.show(trace, tokenizer, console=console)
    return console.export_text(styles=False)


def raw(trace, width=100) -> str:
    """With the escape sequences that the terminal gets."""
    console = Console(width=width, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(Display(trace))
    return capture.get()


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.unclosed = set(), set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "br", "path", "rect", "img"):
            self.unclosed.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect"):
            assert self.unclosed.pop() == tag

    def handle_data(self, data):
        if self.unclosed and self.unclosed[-1] != "style":
            self.text.append(data)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_page_says_what_happened(trace, word_tokenizer):
    page = Display(trace, word_tokenizer).to_html()
    text = "".join(Tags(page).text)
    for said in ("chunk 1", "exact", "hit", "suffix_attention 0.2", "9 → 64 (+55)", "Who sees whom", "Layer × token"):
        assert said in text, said
    assert f"{trace.selected_tokens} of {len(trace.candidate_idx)} moved tokens" in text
    assert "suffix_attention 0.2: the tokens that the question attends to" in text
    assert all(name in text for name in ("look up", "select", "recompute", "hand over"))
    assert page.startswith("<!doctype html>")
    assert Tags(page).unclosed == []
    for token in PROMPT.ids[:5]:
        assert word_tokenizer.decode([token]) in text


def test_recomputed_tokens_are_marked_and_not_by_colour_alone(trace, word_tokenizer):
    page = Display(trace, word_tokenizer).to_html()
    marked = re.findall(r'<i class="[^"]*\br\b[^"]*" title="#(\d+) recomputed', page)
    assert [int(i) for i in marked] == trace.selected_idx.tolist()
    assert "i.r,.hfb .key i.r{border-bottom:3px solid" in page


def test_levels_show_what_they_know(word_tokenizer):
    model, store = make_llama(), hfblend.MemoryStore()
    pages = {}
    for level in ("summary", "tokens", "full"):
        found = hfblend.blend(model, PROMPT, store=store, config=config(0.2), trace=level).trace
        pages[level] = Display(found, word_tokenizer).to_html()
    assert (
        "not written out: the prompt&#x27;s ids" in pages["summary"] or "trace=&quot;tokens&quot;" in pages["summary"]
    )
    assert '<div class="toks">' not in pages["summary"]
    assert '<div class="toks">' in pages["tokens"]
    assert "Layer × token" not in pages["tokens"]
    assert "Layer × token" in pages["full"]
    assert "layers loaded" in pages["full"]


def test_a_call_that_was_not_blended_says_why(word_tokenizer):
    model = make_llama()
    with hfblend.patch(model, tokenizer=word_tokenizer) as blender:
        generate(model, PROMPT.inputs())
        trace = blender.trace
    page, text = Display(trace).to_html(), printed(trace)
    assert trace.fallback
    for shown in (page, text):
        assert "Not blended" in shown
        assert trace.fallback in shown
    assert "Nothing was blended yet" in printed(BlendTrace())
    assert "Nothing was blended yet" in Display(BlendTrace()).to_html()


def test_every_origin_has_its_name_and_pattern():
    trace = made()
    for chunk, status in zip(trace.chunks[1:], ("miss", "fresh", "unused")):
        chunk.status = status
        chunk.cached_start = None if status != "miss" else chunk.cached_start
    trace.chunks[1].quantised = "int8"
    page, text = Display(trace).to_html(), printed(trace)
    for name in ("exact", "miss", "fresh", "unused"):
        assert f"o-{name}" in page
        assert name in text
    assert "int8" in page
    assert "int8" in text


@pytest.mark.parametrize("status", ["hit", "miss", "fresh", "unused"])
@pytest.mark.parametrize("exact", [False, True])
def test_hit_is_said_of_hits_alone(status, exact, word_tokenizer):
    """In the rows of the terminal's and of the page's table, in the playground's line about a chunk, in the demo's."""
    trace = made()
    trace.chunks[1].status, trace.chunks[1].exact = status, exact
    trace.chunks[1].cached_start = {"hit": 7, "miss": 7}.get(status)
    page, text = Display(trace).to_html(), printed(trace)
    rows = [
        re.search(r"^chunk 1 .*$", text, re.MULTILINE)[0],
        re.sub("<.*?>", " ", re.search(r"<td>chunk 1</td>(.*?)</tr>", page, re.DOTALL)[1]),
    ]
    for row in rows:
        assert {word for word in ("hit", "miss", "fresh", "unused") if word in row} == {status}
        assert ("exact" in row) == exact
    found = sum(chunk.status in ("hit", "unused") for chunk in trace.chunks)
    assert f"{found} hits, {len(trace.chunks) - found} misses" in text
    blended = Answer("blended", "", 1.0, trace)
    outcome = Outcome(PROMPT, (blended,) * 3, (True, status == "hit", True, True), None, False)
    assert ("hit" in outcome.chunk_lines[1]) == (status == "hit")
    hits = sum(chunk.status == "hit" for chunk in trace.chunks)
    assert f"First call: {hits} of {len(trace.chunks)} passages hit, {hits - 1} of them at new" in _reuse_line(trace)


def test_the_terminal_says_what_happened(trace, word_tokenizer):
    text = printed(trace, 100, word_tokenizer)
    for said in ("chunk 1", "exact", "9 → 64 (+55)", "recomputed", "who sees whom", "look up", "△ some"):
        assert said in text, said


def test_figures_and_phases_are_not_torn_apart():
    trace = made(intervals=[Interval("phase", "prefill_chunks", 0, 5)].copy, ttft_ms=10_312.0)
    for width in (80, 100, 120):
        text = printed(trace, width)
        for name, figure in view.figures_of(trace):
            assert f"{name} {figure}" in text
        assert "prefill chunks" in text


@pytest.mark.parametrize("width", [30, 60, 100, 250])
def test_no_line_is_longer_than_the_terminal(trace, width):
    assert max(map(len, printed(trace, width).splitlines())) <= width


def test_show_returns_the_display_and_a_notebook_draws_it(trace, monkeypatch, capsys, tmp_path):
    display = hfblend.show(trace)
    assert "chunk 1" in capsys.readouterr().out
    assert display._repr_html_().startswith('<div class="hfb">')
    display.save(tmp_path / "call.html")
    assert (tmp_path / "call.html").read_text(encoding="utf-8") == display.to_html()
    assert "blended 88 tokens" in repr(display)
    monkeypatch.setattr("hfblend.display._in_notebook", lambda: True)
    hfblend.show(trace)
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match=r"blender\.trace"):
        hfblend.show("a trace")


def test_no_element_is_one_that_notebooks_lay_out_their_own_way(trace):
    """JupyterLab floats the terms of a list of definitions, whatever a cell's own styles say of their place."""
    assert not {"dl", "dt", "dd"} & Tags(Display(trace)._repr_html_()).tags


# --- nothing acts -----------------------------------------------------------------------------------------------------


def test_visible():
    assert visible("a\x1b[31mb\u202ec\u200b") == "a␛[31mb⟨U+202E⟩c⟨U+200B⟩"
    assert visible("né 日本 👩\u200d🔬 ‌") == "né 日本 👩\u200d🔬 ‌"
    assert visible("a\nb\t\r") == "a↵b⇥␍"
    assert clipped("x" * 100, 5) == "xxxx…"


def test_templates_escape_every_text_and_make_it_visible():
    answer = type("Answer", (), {"method": "\u202e<i>", "text": "<a href='\"'>&\x1b", "ttft_ms": 1.0})()
    answer.compared = lambda full: "\x00<b>"
    page = rendered("demo/playground/templates/answers.html.jinja", answers=[answer], slowest=1.0)
    found = Tags(page)
    assert {"<a href='\"'>&␛", "⟨U+202E⟩<i>", "⟨U+0000⟩<b>"} <= set(found.text)
    assert found.attributes == {"class", "style"}
    assert found.tags == {"div", "article", "h3", "p", "i", "b"}


def test_every_data_file_travels_in_a_wheel():
    root, tomllib = Path(hfblend.__file__).parent, pytest.importorskip("tomllib")
    project = tomllib.loads((root.parent / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["hfblend"]
    data = {file for file in root.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert len(data) >= 8
    assert data == {file for pattern in globs for file in root.glob(pattern)}


def test_hostile_text_is_inert_in_html():
    page = Display(hostile(), answers={HOSTILE[0]: "".join(HOSTILE)}, title=HOSTILE[0]).to_html()
    page.encode("utf-8")
    found = Tags(page)
    assert found.tags <= {
        "html", "head", "meta", "title", "style", "body", "div", "h2", "h3", "span", "b", "i", "u",
        "em", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg", "path", "p", "ul", "li", "br",
    }  # fmt: skip
    assert not [name for name in found.attributes if name.startswith("on") or name in ("src", "href", "srcdoc")]
    assert found.unclosed == []
    assert page.count("<style>") == 2  # the page's own, the view's own
    assert "default-src 'none'" in page
    text = html.unescape(page)
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]
    assert "<script>alert(1)</script>" in "".join(found.text)  # as text


def test_hostile_text_is_inert_in_a_terminal():
    trace = hostile()
    found = raw(trace)
    sequences = re.findall(r"\x1b[^m]*m", found)
    assert all(re.fullmatch(r"\x1b\[[\d;]*m", one) for one in sequences)  # colours of our own
    rest = re.sub(r"\x1b\[[\d;]*m", "", found)
    assert not [c for c in rest if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]
    assert "[red]markup[/red]" in rest.replace("\n", "")
    assert "␛" in rest


# --- long prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return blame_prompt(make_llama(), PROMPT, config=config(0.1), num_tokens=6)


@pytest.fixture
def blamed(found, word_tokenizer):
    found.trace.tokenizer = word_tokenizer
    return found


def test_what_changed_an_answer_is_shown(blamed):
    page = Display(blamed.trace, blame=blamed).to_html()
    cells = re.findall(r"<td>(.*?)</td>", page)
    for one in blamed.chunks:
        assert one.part in cells
    assert cells.count("✓ yes") >= sum(one.restores for one in (*blamed.chunks, *blamed.ratios))
    words = re.findall(r'<b class="first">(.*?)</b>', page)
    place = blamed.first_different_word()
    assert words == [answer[place].strip() for answer in blamed.words()]
    assert page.index("Why did the answer change?") < page.index("Scores and recomputed tokens")
    text = " ".join(printed(blamed, 100).split())
    assert all(" ".join(sentence.split()) in text for sentence in blamed.sentences())
    assert f"{blamed.chunks[0].part} " in text
    assert hfblend.show(blamed, console=Console(file=io.StringIO())).to_html() == page


def test_the_heat_map_is_what_was_measured(blamed):
    """Dark where the KL falls; blank where nothing was tried, or all is recomputed."""
    levels, falls = BlameView(blamed).levels(), blamed.falls()
    tried = {i for one in blamed.chunks for i in range(one.start, one.stop)} - blamed.recomputed()
    assert {i for i, level in enumerate(levels) if level} == tried
    assert levels[max(tried, key=lambda i: falls[i])] == max(levels)
    assert all(level == 1 for i, level in enumerate(levels) if i in tried and falls[i] < 0.05 * blamed.kl)


def test_hostile_text_is_inert_where_blame_is_shown(blamed, monkeypatch):
    texts = (HOSTILE * len(PROMPT))[: len(PROMPT)]
    trace = dataclasses.replace(blamed.trace, texts=texts, tokenizer=None)
    monkeypatch.setattr(type(blamed), "words", lambda self: (HOSTILE, HOSTILE[1:]))
    hostile = dataclasses.replace(blamed, trace=trace)
    page, text = Display(trace, blame=hostile).to_html(), printed(hostile, 100)
    assert not {"script", "img"} & Tags(page).tags
    assert all(c not in page + text for c in "\u202e\u2066\x07\u2028\x00\ud800")
    assert "\x1b[31mred" not in text


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


@pytest.mark.browser
def test_the_page_of_what_changed_an_answer_fits(browser, blamed, tmp_path):
    file = tmp_path / "why.html"
    hfblend.show(blamed, console=Console(file=io.StringIO())).save(file)
    with page_of(browser, file.as_uri()) as page:
        page.goto(file.as_uri())
        for width in in_every_form(page):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            first, second = (box.bounding_box() for box in page.locator(".hfb .two > div").all())
            assert (first["y"] == second["y"]) == (width > 600)  # side by side where there is room
            assert page.locator(".hfb b.first").count() == 2
        assert page.alarms == []


def test_20k_tokens_stay_small_and_say_so():
    trace = made(20_000, layers=40, chunk=500)
    page, text = Display(trace).to_html(), printed(trace)
    assert len(page.encode()) < 600_000
    assert len(text) < 30_000
    assert re.search(r"2,5\d\d of 20,000 written out", page)
    assert "a column is 125 tokens" in page
    assert "a column is about 31 tokens" in page
    assert "a column is 1 or 2 tokens" in Display(made(700)).to_html()
    assert page.count('class="toks"') == 41 + 1  # every part has its place: prefix, chunks, suffix
    assert Tags(page).unclosed == []


def test_many_chunks_are_left_out_of_the_table():
    trace = made(20_000, chunk=10)
    page, text = Display(trace).to_html(), printed(trace)
    assert "chunks left out" in page
    assert "more" in text
    assert len(page.encode()) < 700_000


def test_the_highest_scores_are_written_out():
    trace = made(5000, chunk=500)
    parts = view.parts_of(trace)
    wanted = view.wanted_tokens(parts, trace.token_columns()["score"], 600)
    best = trace.candidate_idx[trace.scores.topk(20).indices].tolist()
    assert all(wanted[i] for i in best)
    assert sum(wanted) < 900
    assert all(wanted[part.start] for part in parts)


def test_levels_of_scores():
    levels = view.score_levels([None, *range(100), float("nan")])
    assert levels[0] == 0
    assert levels[-1] == 7  # a NaN ranks highest, as in selection
    assert levels[1] == 1
    assert levels[1:-1] == sorted(levels[1:-1])
    assert view.score_levels([1.0, 1.0, 1.0]) == [7, 7, 7]
    assert view.score_levels([]) == []


def test_the_mask_is_the_rule_that_passes_follow(trace):
    grid = view.mask_of(trace, 1000, 1000)
    rows = view.computed_rows(trace)
    assert len(grid) == len(rows)
    for row, cells in zip(rows, grid):
        assert [bool(cell) for cell in cells] == [key <= row for key in range(len(PROMPT))]
        assert cells[row] == 3
    reused = [i for i in range(len(PROMPT)) if i not in set(rows)]
    assert all(grid[-1][i] == 1 for i in reused)
    small = view.mask_of(made(20_000), 30)
    assert (len(small), len(small[0])) == (30, view.COLUMNS)


def test_maps_are_binned_by_their_highest():
    values = torch.full((2, 1000), torch.nan)
    values[1, 500] = 0.9
    grid = view.map_of(values, "key_deviation").grid
    assert (len(grid), len(grid[0])) == (2, view.COLUMNS)
    assert grid[0] == [0] * view.COLUMNS
    assert [level for level in grid[1] if level] == [7]


# --- the correction ---------------------------------------------------------------------------------------------------


def corrected(layers=3, **kwargs) -> BlendTrace:
    """A trace by hand, in which more was added to later pieces and layers, and to keys 10 times as much."""
    trace = made(layers=layers, **kwargs)
    trace.settings["correction"] = "offset"
    pieces = torch.arange(1.0, len(trace.pieces) + 1)
    keys = torch.arange(1.0, layers + 1)[:, None] * pieces
    trace.offsets = torch.stack([keys, keys / 10], 1)
    trace.offsets[:, :, :2] = torch.nan  # prefix and first chunk are exact
    trace.offsets[0] = torch.nan  # fresh for every token
    return trace


def test_a_correction_is_shown_by_chunk():
    trace = corrected()
    page, text = Display(trace).to_html(), printed(trace)
    cells = re.findall(r"<td>([^<]*)</td>", page)
    for number in range(1, len(trace.chunks)):
        piece = number + 2  # the prefix, counted from 1
        size = ((4 + 9) / 2) ** 0.5 * piece  # over layers 1 and 2
        assert f"{size:.2g} · {size / 10:.2g}" in cells
        line = next(line for line in text.splitlines() if line.startswith(f"chunk {number}"))
        assert f"{size:.2g} · {size / 10:.2g}" in line
    first = next(line for line in text.splitlines() if line.startswith("chunk 0"))
    assert re.search("– +– ", first)
    assert "added to K · V" in page
    assert "added to K · V" in text
    assert ("correction", "offset") in view.figures_of(trace)
    assert Tags(page).unclosed == []
    assert max(map(len, printed(trace, 60).splitlines())) <= 60


@pytest.mark.parametrize("offsets", [None, 0.0, float("nan")])
def test_a_correction_that_added_nothing_takes_no_room(offsets):
    trace = made(layers=3)
    if offsets is not None:
        trace.offsets = torch.full((3, 2, len(trace.pieces)), offsets)
    for shown in (Display(trace).to_html(), printed(trace)):
        assert "added to" not in shown
        assert "offset" not in shown
    assert [one.name for one in view.maps_of(trace)] == ["key_deviation", "value_deviation", "attention"]
    assert not [name for name, _ in view.figures_of(trace) if name == "correction"]


def test_a_correction_is_shown_by_layer_and_chunk():
    trace = corrected()
    keys, values = view.maps_of(trace)[-2:]
    assert (keys.name, values.name) == ("key_offset", "value_offset")
    assert keys.grid == values.grid  # each shaded by shares of its largest
    assert keys.bounds == pytest.approx([10 * bound for bound in values.bounds])
    assert keys.bounds[-1] == pytest.approx(0.75 * 3 * len(trace.pieces))
    assert len(keys.grid) == 3
    assert len(keys.grid[0]) == view.COLUMNS
    assert set(keys.grid[0]) == {0}
    assert keys.grid[1] == sorted(keys.grid[1][:144]) + [0] * 16  # more and more, then the suffix of 20 tokens of 200
    assert all(low <= high for low, high in zip(keys.grid[1], keys.grid[2]))
    assert max(keys.grid[2]) == 7
    assert keys.grid[2][47] == 0  # the first chunk is exact
    assert keys.grid[2][49] > 0
    page, text = Display(trace).to_html(), printed(trace)
    assert "Values: added to the rows that stay reused" in page
    assert "blank: nothing to correct" in page
    assert f"≥ {keys.bounds[-1]:.2g}" in page
    assert f"key offset, layers 0 … 2 downwards; █ {keys.bounds[-1]:.2g} or more" in text
    trace.maps = None
    assert view.maps_of(trace) == []  # below level "full"


def test_a_blended_prompts_correction_is_shown(word_tokenizer):
    model, store, settings = make_llama(), hfblend.MemoryStore(), config(0.3, correction="offset")
    pages = {}
    for level in ("summary", "tokens", "full"):
        trace = hfblend.blend(model, PROMPT, store=store, config=settings, trace=level).trace
        pages[level] = Display(trace, word_tokenizer).to_html()
        assert "correction" in pages[level]
        sizes = view.added_texts(trace)
        assert [size == "–" for size in sizes] == [piece.exact or level == "summary" for piece in trace.pieces]
    assert "added to K" not in pages["summary"]
    assert "added to K · V" in pages["tokens"]
    assert "added to the rows that stay reused" not in pages["tokens"]
    assert "added to the rows that stay reused" in pages["full"]


def test_many_layers_and_chunks_are_binned_by_their_highest():
    trace = corrected(layers=100, length=20_000, chunk=10)
    grid = view.maps_of(trace)[-1].grid
    assert (len(grid), len(grid[0])) == (view.ROWS, view.COLUMNS)
    assert max(map(max, grid)) == grid[-1][-2] == 7
    assert len(Display(trace).to_html().encode()) < 800_000


def test_bins_cover_everything_once():
    for count in (1, 7, 160, 161, 20_000):
        edges = view.edges_of(count, 160)
        assert edges[0] == 0
        assert edges[-1] == count
        assert all(a < b for a, b in zip(edges, edges[1:]))  # noqa: RUF007


# --- plots ------------------------------------------------------------------------------------------------------------


def test_plots_of_a_trace(trace, tmp_path):
    pytest.importorskip("matplotlib")
    for plot in (hfblend.plot_scores, hfblend.plot_timeline):
        plot(trace).savefig(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000
    scores = hfblend.plot_scores(trace).axes[0]
    assert len(scores.lines[1].get_xdata()) == trace.selected_tokens
    assert [label.get_text() for label in hfblend.plot_timeline(trace).axes[0].get_yticklabels()] == [
        "phases", "layers computed", "layers loaded", "asked for",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="ranked"):
        hfblend.plot_scores(BlendTrace())
    with pytest.raises(ValueError, match="not blended"):
        hfblend.plot_timeline(BlendTrace())


def test_plots_of_results_are_those_of_the_commands(tmp_path):
    pytest.importorskip("matplotlib")
    row = {
        "method": "hfblend", "ratio": 0.15, "n": 3, "kl": 0.1, "kl_ci95": [0.05, 0.2], "recomputed_pairs_share": 0.3,
    }  # fmt: skip
    plots.plot_quality([row], "a title").savefig(tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000
    times = {"tokens": 100, "ratio": 0.15, "chunks_in": None, "failed": None, "speed_up_limit": None}
    rows = [
        {**times, "method": "full_prefill", "ttft_ms": 10.0, "speed_up": None},
        {**times, "method": "hfblend", "ttft_ms": 5.0, "speed_up": 2.0},
    ]
    settings = {"layout": {"prefix": 1, "chunk": 2, "suffix": 3}}
    about = {"model": "m", "dtype": "d", "attention": "a", "machine": "m", "transformers": "5", "settings": settings}
    plots.plot_ttft({**about, "rows": rows}).savefig(tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 5000


def drawn(trace) -> dict:
    """A figure of every function that returns one."""
    row = {"method": "hfblend", "ratio": 0.15, "n": 3, "kl": 0.1, "kl_ci95": [0.05, 0.2], "recomputed_pairs_share": 0.3}
    about = {"model": "m", "dtype": "d", "attention": "a", "machine": "m", "transformers": "5"}
    return {
        "new_figure": new_figure(4, 3)[0],
        "plot_scores": hfblend.plot_scores(trace),
        "plot_timeline": hfblend.plot_timeline(trace),
        "plot_quality": plots.plot_quality([row]),
        "plot_ttft": plots.plot_ttft(
            {**about, "settings": {"layout": {"prefix": 1, "chunk": 2, "suffix": 3}}, "rows": []}
        ),
        "figure_of_deviation": insights.figure_of_deviation(torch.rand(4, 9)),
        "figure_of_rank_correlation": insights.figure_of_rank_correlation(torch.rand(4, 4)),
        "figure_of_attention_deviation": insights.figure_of_attention_deviation((0.0, 1.0), {"one": torch.rand(2, 4)}),
    }


def functions_that_return_figures() -> set[str]:
    files = Path(hfblend.__file__).parent.rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    functions = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns]
    return {node.name for node in functions if re.search(r"\bFigure\b", ast.unparse(node.returns))}


def test_every_figure_is_a_picture_in_a_notebook(trace):
    """Also in one that never said `%matplotlib inline`."""
    pytest.importorskip("matplotlib")
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    inline = pytest.importorskip("IPython.core.pylabtools").select_figure_formats
    figures = drawn(trace)
    assert set(figures) == functions_that_return_figures()
    plain, drawing = shell(), shell()
    inline(drawing, {"png"})
    for name, figure in figures.items():
        for notebook in (plain, drawing):
            shown, _ = notebook.display_formatter.format(figure)
            png = shown["image/png"]
            assert (base64.b64decode(png) if isinstance(png, str) else png).startswith(b"\x89PNG"), name


@pytest.mark.browser
def test_a_notebooks_own_styles_leave_the_figures_in_line(browser, tmp_path):
    """Under rules such as JupyterLab's for what a cell shows, a figure stands below its name."""
    host = (
        ".host dl{display:inline} .host dt{float:left;clear:left;width:20%} .host dd{margin-left:22%}"
        ".host p,.host table,.host ul{margin-bottom:1em} .host table{table-layout:fixed;border:none;margin:0 auto}"
        ".host th,.host td{text-align:right;max-width:none;white-space:normal;padding:.5em}"
    )
    file = tmp_path / "host.html"
    file.write_text(
        f"<!doctype html><meta charset=utf-8><style>{host}</style><div class=host>{Display(made())._repr_html_()}</div>"
    )
    with page_of(browser, file.as_uri()) as page:
        page.goto(file.as_uri())
        for tile in page.locator(".figs > div").all():
            name, figure = (tile.locator(tag).bounding_box() for tag in ("span", "b"))
            assert name["x"] == figure["x"]
            assert name["y"] + name["height"] <= figure["y"] + 1
        assert page.locator(".hfb td").first.evaluate("cell => getComputedStyle(cell).whiteSpace") == "nowrap"


@pytest.mark.browser
def test_hostile_text_is_inert_in_a_browser(browser, tmp_path):
    """As a page of its own, and set into another page, as a notebook does: nothing runs, nothing is asked for."""
    display, own, inside = Display(hostile()), tmp_path / "own.html", tmp_path / "inside.html"
    display.save(own)
    inside.write_text(f"<!doctype html><meta charset=utf-8><body>{display._repr_html_()}", errors="replace")
    for file in (own, inside):
        with page_of(browser, file.as_uri()) as page:
            page.goto(file.as_uri())
            page.wait_for_timeout(300)
            page.locator("body").hover()
            assert page.alarms == []
            assert page.locator("script, img, iframe, object, embed, link, form, [onerror], [onmouseover]").count() == 0
            assert "<script>alert(1)</script>" in page.locator("body").inner_text()
            assert page.locator("body").is_visible()
