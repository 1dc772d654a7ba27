"""The playground: what it computes, on a tiny model; its page, in headless Chromium where there is one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browsers import chromium, in_every_form, page_of, running
from helpers import make_llama, save_byte_model
from typer.testing import CliRunner

from hfblend import BlendConfig
from hfblend.cli import app
from hfblend.config import Selection
from hfblend.demo import playground as logic
from hfblend.demo.playground import MAX_CHARACTERS, MAX_CHUNKS, Playground, Setup, presets
from hfblend.demo.playground import page as playground_page
from hfblend.display.view import RULE_WORDS

HOSTILE = "<script>window.ran=1</script><img src=x onerror=window.ran=2> </i></div><svg onload=alert(3)>"


def words(start: int, count: int) -> str:
    return " ".join(f"w{6 + (start + 7 * i) % 91}" for i in range(count))


CHUNKS = tuple(words(start, 20) for start in (1, 2, 3))
SETUP = Setup(CHUNKS, "w8 w9 w10", ratio=0.3)


@pytest.fixture
def playground(word_tokenizer, monkeypatch):
    monkeypatch.setattr(logic, "ANSWER_TOKENS", 4)
    playing = Playground(make_llama(), word_tokenizer)
    yield playing
    playing.close()


def texts(outcome):
    return [answer.text for answer in outcome.answers]


# --- what it computes ---------------------------------------------------------------------------------------------


def test_every_rule_is_explained():
    assert set(RULE_WORDS) == set(Selection.__args__)


def test_first_run_misses_and_the_second_hits(playground):
    first, second = playground.run(SETUP), playground.run(SETUP)
    assert first.found == (False, False, False)
    assert first.storing_ms > 0
    assert first.trace.misses == 0  # its time is that of a call which found everything
    assert "0 of 3 chunks were in the store (hits), 3 were not (misses)" in first.store_line
    assert second.found == (True, True, True)
    assert second.storing_ms is None
    assert second.store_line == "All 3 chunks were in the store (hits)."
    assert second.repeated
    assert texts(first) == texts(second)


def test_answers_are_those_of_the_library(playground, word_tokenizer):
    outcome = playground.run(SETUP)
    assert [answer.method for answer in outcome.answers] == ["full_prefill", "full_reuse", "blended"]
    ids = outcome.prompt.input_ids
    stock = make_llama().generate(ids, max_new_tokens=4, do_sample=False)
    assert outcome.answers[0].text == word_tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True).strip()
    shares = [answer.computed_share for answer in outcome.answers]
    assert shares[0] == 1.0
    assert shares[1] < shares[2] < 1.0
    assert all(answer.ttft_ms > 0 for answer in outcome.answers)


def test_ratio_one_is_full_prefill(playground):
    outcome = playground.run(Setup(CHUNKS, "w8 w9", ratio=1.0))
    assert outcome.answers[2].text == outcome.answers[0].text


def test_order_ratio_and_rule_change_what_is_recomputed(playground):
    def selected(**changes):
        trace = playground.run(Setup(**{**vars(SETUP), **changes})).trace
        return trace.selected_idx.tolist()

    before = selected()
    assert len(selected(ratio=0.6)) > len(before) > len(selected(ratio=0.0)) == 0
    chosen = {rule: tuple(selected(rule=rule)) for rule in RULE_WORDS}
    assert len(set(chosen.values())) == len(RULE_WORDS)
    reordered = playground.run(Setup(CHUNKS[::-1], SETUP.question, 0.3))
    assert all(reordered.found)
    assert not reordered.repeated
    first, line, _ = reordered.chunk_lines
    assert re.fullmatch(r"hit · \d+ → \d+ · 20 tokens", line)
    assert "hit · exact at" in first


def test_why_the_answer_changed_is_searched_with_the_pages_settings(playground):
    said = []
    found = playground.blame(SETUP, said.append)
    assert "Why did the answer change?" in found
    assert f"<td>{SETUP.ratio:g}</td>" in found or "is full prefill" in found
    assert len(re.findall(r"<td>chunk \d</td>", found)) == 2  # the first one is exact
    assert any(text.startswith("Searching for what changed the answer: as it is: KL") for text in said)
    assert not any(text.startswith("as it is") for text in said)  # once each
    with pytest.raises(ValueError, match="made for 2048"):
        playground.blame(Setup(tuple(words(i, 800) for i in range(3)), "w8"), said.append)


class Stopped(Exception):
    """A run was cancelled."""


def stopping_at(step):
    """A listener that ends the run at one of its steps."""
    said = []

    def hear(text):
        said.append(text)
        if len(said) == step:
            raise Stopped

    return said, hear


def test_a_run_says_how_far_it_is_and_may_be_cancelled_at_any_step(playground):
    said, hear = stopping_at(0)
    expected = texts(playground.run(SETUP, hear))
    assert "Computing chunks that are not stored: 1 of 3 …" in said
    computed = said.index("Computing chunks that are not stored: 3 of 3 …")
    assert said[computed + 1] == "Answering: blended: 0 of 4 …"  # goes on
    assert [text for text in said if text.startswith("Answering: full prefill")][-1].endswith("4 of 4 …")
    assert next(i for i, text in enumerate(said) if "Answering" in text) == 0  # before the long work
    for step in range(1, len(said) + 1, 3):
        playground.blender.store.clear()
        playground._latest = None
        with pytest.raises(Stopped):
            playground.run(SETUP, stopping_at(step)[1])
        assert texts(playground.run(SETUP)) == expected


def test_a_search_may_be_cancelled_and_leaves_the_model_usable(playground):
    expected = texts(playground.run(SETUP))
    with pytest.raises(Stopped):
        playground.blame(SETUP, stopping_at(2)[1])
    playground._latest = None
    assert texts(playground.run(SETUP)) == expected


def test_who_waits_for_a_turn_may_give_up(playground):
    said, hear = stopping_at(2)
    with playground._one_at_a_time, pytest.raises(Stopped):
        playground.run(SETUP, hear)
    assert said == ["Waiting for the run of another page …"] * 2
    assert playground.run(SETUP).found == (False, False, False)


def test_the_correction_is_a_setting(playground):
    plain, corrected = (
        playground.run(Setup(**{**vars(SETUP), "correction": correction})) for correction in (None, "offset")
    )
    assert Setup(CHUNKS, "w8").config.correction == BlendConfig().correction
    assert corrected.trace.selected_idx.tolist() == plain.trace.selected_idx.tolist()
    assert corrected.repeated  # full prefill and full reuse know none
    assert plain.trace.offsets is None
    assert (corrected.trace.offsets[1:, 1, 2:] > 0).all()  # keys of a head may be left as they are
    assert "added to K · V" in corrected.tokens_html
    assert "added to K · V" not in plain.tokens_html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunks": ()}, "1 to 24 chunks, got 0"),
        ({"chunks": ("w6",) * (MAX_CHUNKS + 1)}, "got 25"),
        ({"chunks": ("w6", " \n")}, "Chunk 1 is empty"),
        ({"question": " "}, "no question"),
        ({"chunks": ("w6", "w" * (MAX_CHARACTERS + 1))}, "Chunk 1 is longer than 100,000 characters"),
        ({"question": "👩" * (MAX_CHARACTERS // 2 + 1)}, "The question is longer"),
        ({"ratio": 1.5}, r"recompute_ratios must be a number in \[0, 1\]"),
        ({"rule": "best"}, "selection must be one of"),
        ({"correction": "best"}, "correction must be one of"),
    ],
)
def test_what_cannot_be_run_is_said_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        Setup(**{**vars(SETUP), **changes})


def test_a_prompt_that_is_too_long_is_refused(playground):
    with pytest.raises(ValueError, match=r"The prompt has \d+ tokens .* made for 2048"):
        playground.run(Setup((words(1, 2100),), "w8"))


def test_hostile_text_is_escaped(playground):
    outcome = playground.run(Setup((HOSTILE, CHUNKS[0]), f"w8 {HOSTILE}"))
    answers = list(outcome.answers)
    answers[0] = type(answers[0])(**{**vars(answers[0]), "text": HOSTILE})
    shown = type(outcome)(**{**vars(outcome), "answers": tuple(answers)}).answers_html + outcome.tokens_html
    assert "&lt;script&gt;" in shown
    for tag in ("<script", "<img", "<svg onload"):
        assert tag not in shown


def test_a_question_may_say_documents(word_tokenizer):
    word_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    prompt = Setup(CHUNKS, "{documents} w8 {documents}").prompt(word_tokenizer)
    assert [stop - start for start, stop in prompt.chunk_spans] == [20, 20, 20]


def test_close_leaves_the_model_as_it_was(word_tokenizer):
    model = make_llama()
    Playground(model, word_tokenizer).close()
    assert "generate" not in vars(model)


def test_presets_fit():
    assert len(presets()) == 3
    for preset in presets().values():
        assert preset.config == BlendConfig(min_reused_tokens=0)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_offers_no_way_out_of_this_machine():
    outcome = CliRunner().invoke(app, ["playground", "--share"])
    assert outcome.exit_code == 2
    assert CliRunner().invoke(app, ["playground", "--host", "0.0.0.0"]).exit_code == 2
    assert playground_page.HOST == "127.0.0.1"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    outcome = CliRunner().invoke(app, ["playground"])
    assert outcome.exit_code == 1
    assert "pip install 'hfblend[playground]'" in " ".join(outcome.output.split())


def test_a_taken_port_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind((playground_page.HOST, 0))
        taken.listen()
        with pytest.raises(OSError, match="Choose another with --port"):
            playground_page._require_free(taken.getsockname()[1])


# --- the page, in a browser ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    texts = [chunk for preset in presets().values() for chunk in preset.chunks]
    return save_byte_model(tmp_path_factory.mktemp("tiny"), texts)


@pytest.fixture(scope="module")
def address(tiny_folder, tmp_path_factory):
    """A playground in another process, as the command starts it."""
    chromium()
    pytest.importorskip("nicegui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["playground", "--model", str(tiny_folder), "--device", "cpu", "--port", str(port)]
    code = f"from hfblend.cli import app; app({command!r})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "NICEGUI"))}
    log = (tmp_path_factory.mktemp("playground") / "server.log").open("w+")
    server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server, log)
        yield url
        assert "Traceback" not in Path(log.name).read_text()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        log.close()


def _wait_for(url, server, log):
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.2)
    log.seek(0)
    pytest.fail(f"the playground did not start:\n{log.read()}")


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


@pytest.fixture
def page(browser, address):
    """The page after its first run."""
    with page_of(browser, address) as page:
        page.goto(address)
        settle(page)
        yield page


def settle(page):
    """Waits until what is shown is what was asked for."""
    page.wait_for_selector(".answers", timeout=30_000)
    page.wait_for_function("!document.querySelector('.stale')", timeout=30_000)


def shown(page):
    """The blended answer, and the recomputed tokens."""
    return page.locator(".answer.blended .text").inner_text(), page.locator(".toks i.r").all_inner_texts()


def change(page, act):
    """What is shown before and after something was done."""
    before, status = shown(page), page.get_by_role("status").inner_text()
    act()
    ended = "said => document.querySelector('[role=status]').innerText.startsWith(said)"
    page.wait_for_function(ended, arg=f"Run {int(status.split()[1].strip(':')) + 1}:", timeout=30_000)
    settle(page)
    return before, shown(page)


def is_refused(request):
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code == 400
    return False


@pytest.mark.browser
def test_the_page_shows_every_change(page, address):
    assert "miss, stored now" in page.locator(".chunk").first.inner_text()
    # ratio
    before, after = change(page, lambda: page.locator(".q-slider").click())  # in its middle
    assert len(after[1]) > len(before[1])
    # ratio, by keyboard
    page.locator(".q-slider [tabindex]").focus()
    before, after = change(page, lambda: page.keyboard.press("PageUp"))
    assert len(after[1]) > len(before[1])
    # rule
    before, after = change(page, lambda: pick(page, "Rule", "chunk_start"))
    assert before[1] != after[1]
    answers = {before[0], after[0]}
    # correction
    added, switch = page.get_by_text("added to K · V"), page.get_by_role("switch", name="Correct the rows")
    was_shown = added.count()
    change(page, switch.click)
    assert added.count() == 1 - was_shown
    change(page, switch.click)
    # order: by button, by dragging
    names = page.locator(".chunk textarea").evaluate_all("fields => fields.map(field => field.value.slice(0, 9))")
    full_before = page.locator(".answer.full_prefill .text").inner_text()
    before, after = change(page, lambda: page.get_by_role("button", name="Move down").first.click())
    assert before[1] != after[1]
    assert page.locator(".answer.full_prefill .text").inner_text() != full_before
    answers.add(after[0])
    handles = page.locator(".handle")
    before, after = change(page, lambda: drag(page, handles.nth(3), handles.nth(0)))
    assert before != after
    order = page.locator(".chunk textarea").evaluate_all("fields => fields.map(field => field.value.slice(0, 9))")
    assert order == [names[3], names[1], names[0], names[2]]
    assert "hit · " in page.locator(".chunk").last.inner_text()
    assert len(answers) > 1
    assert page.alarms == []
    assert is_refused(urllib.request.Request(address, headers={"Host": "elsewhere.example"}))


def drag(page, handle, onto):
    """As a hand does it: press, move in steps, let go."""
    (x, y), (to_x, to_y) = ((box["x"] + 8, box["y"] + 8) for box in (handle.bounding_box(), onto.bounding_box()))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 20, steps=4)
    page.mouse.move(to_x, to_y, steps=12)
    page.mouse.move(to_x, to_y - 4, steps=2)
    page.wait_for_timeout(300)  # the others make room
    page.mouse.up()


def pick(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def box(page, selector):
    return page.locator(selector).first.bounding_box()


@pytest.mark.browser
def test_a_phone_shows_answers_before_the_controls(page):
    for width in in_every_form(page):
        question, answer, settings = (box(page, one) for one in (".question", ".answer", ".settings"))
        assert question["y"] < 844
        assert answer["y"] + answer["height"] < 844
        assert (settings["x"] == answer["x"]) == (width == 390)  # in one column
        assert width == 1400 or settings["y"] > answer["y"]
        tokens, chunks = box(page, ".tokens"), page.locator(".settings").last.bounding_box()
        assert (tokens["y"] > chunks["y"] + chunks["height"]) == (width == 390)
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        assert (box(page, "[role=status]")["y"] >= 0) == (width == 390)  # still in sight


@pytest.mark.browser
@pytest.mark.thorough
def test_the_button_says_why_the_answer_changed(page):
    page.get_by_role("button", name="Why did the answer change?").click()
    page.wait_for_function("document.body.innerText.includes('Searching')", timeout=10_000)
    page.locator(".hfb .two").wait_for(timeout=60_000)
    assert page.locator(".hfb .two > div").count() == 2
    assert page.locator(".hfb .tried").count() >= 1
    for width in in_every_form(page):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        hint = page.locator(".hfb .scroll").first
        assert hint.evaluate("one => getComputedStyle(one).backgroundImage").count("linear-gradient") == 4
    change(page, lambda: page.get_by_role("button", name="Run", exact=True).click())
    assert page.locator(".hfb .two").count() == 0  # of another run
    assert page.alarms == []


@pytest.mark.browser
@pytest.mark.thorough
def test_a_search_is_cancelled_and_the_page_goes_on(page):
    cancel = page.get_by_role("button", name="Cancel")
    for _ in in_every_form(page):
        assert not cancel.is_visible()
        page.get_by_role("button", name="Why did the answer change?").click()
        cancel.wait_for(timeout=30_000)
        assert 0 <= cancel.bounding_box()["y"] < 800  # in sight
        cancel.click()
        ended = "document.querySelector('[role=status]').innerText.startsWith('Cancelled')"
        page.wait_for_function(ended, timeout=60_000)
        cancel.wait_for(state="hidden")
        assert page.locator(".hfb .two").count() == 0
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("document.querySelector('[role=status]').innerText.startsWith('Run 2:')", timeout=30_000)
    settle(page)
    assert page.alarms == []


@pytest.mark.browser
def test_hostile_text_does_nothing_and_errors_are_said_in_words(page):
    field = page.locator(".chunk textarea").first
    field.fill(HOSTILE)
    page.get_by_label("Question", exact=True).fill(f"{HOSTILE}?")
    page.wait_for_function("document.querySelector('[role=status]').innerText.includes('Press Run')", timeout=10_000)
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("document.querySelector('.toks').parentElement.parentElement.innerText.includes('onerror')")
    page.wait_for_timeout(500)  # time for an event to fire
    assert page.evaluate("window.ran") is None
    assert page.locator(".page img, .page script, .page [onload], .page [onerror]").count() == 0
    assert page.alarms == []
    field.fill("")
    page.get_by_role("button", name="Run", exact=True).click()
    alert = page.get_by_role("alert")
    alert.wait_for(timeout=10_000)
    assert alert.inner_text() == "Chunk 0 is empty. Write something into it, or remove it."
    field.fill("w" * (MAX_CHARACTERS + 1))  # as much as a field takes
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("document.querySelector('[role=alert]').innerText.includes('longer than 100,000')")
    assert field.get_attribute("maxlength") == str(MAX_CHARACTERS + 1)
    page.get_by_role("button", name="Add a chunk").click()
    page.wait_for_function("document.activeElement === [...document.querySelectorAll('.chunk textarea')].at(-1)")
    page.get_by_role("button", name="Remove").last.click()
    field.fill("Text again.")
    page.get_by_role("button", name="Run", exact=True).click()
    settle(page)
    assert not alert.is_visible()
