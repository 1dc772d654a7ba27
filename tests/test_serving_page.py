"""The page of `hfblend serve --demo`, in headless Chromium where there is one."""

from __future__ import annotations

import pytest

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import httpx
from browsers import chromium, in_every_form, opened
from helpers import save_byte_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfblend.demo.passages import demo_data
from hfblend.serving.gate import GateSettings

from live_server import TEMPLATE, served  # isort: skip

pytestmark = pytest.mark.thorough

HOSTILE = "</textarea><script>window.ran=1</script><img src=x onerror=window.ran=2>"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    texts = [passage["text"] for passage in demo_data()["passages"]]
    folder = save_byte_model(tmp_path_factory.mktemp("tiny"), texts, TEMPLATE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with served(model=model, tokenizer=tokenizer, with_page=True, num_blocks=1024) as server:
        yield server


@pytest.fixture
def page(server):
    chromium()
    with opened(server.url) as page:
        page.goto(server.url)
        yield page
        assert page.alarms == []


def asked(page, button="Ask with reuse"):
    """The cells of the new row."""
    rows = page.locator("tbody tr")
    number = rows.count() + 1
    page.get_by_role("button", name=button, exact=True).click()
    rows.nth(number - 1).wait_for(timeout=60_000)
    cells = rows.first.locator("td").all_inner_texts()
    assert cells[0] == str(number)
    assert page.get_by_role("alert").inner_text() == ""
    assert page.get_by_role("status").inner_text().startswith(f"Answer {number}: first token after ")
    assert page.locator("#answer").inner_text()
    return [cell.strip() for cell in cells[1:]]


@pytest.mark.browser
def test_the_second_question_finds_the_passages(page):
    reuse, _, found, recomputed, cached = asked(page)
    assert (reuse, found, cached.split()[0]) == ("with", "0 of 12", "0")
    page.get_by_label("Question", exact=True).fill("Which school is mentioned?")
    reuse, ms, found, recomputed, cached = asked(page)
    assert (reuse, found) == ("with", "12 of 12")
    of_cached, of_prompt = (int(part.replace(",", "")) for part in cached.split(" of "))
    assert 0 < int(recomputed.replace(",", "")) < of_cached < of_prompt
    assert ms.endswith("ms")
    reuse, _, found, recomputed, cached = asked(page, "Ask without reuse")
    assert (reuse, found, recomputed) == ("without", "–", "–")
    assert int(cached.split()[0].replace(",", "")) < 100
    for width in in_every_form(page):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.get_by_role("button", name="Ask with reuse").bounding_box()["y"] < 844


@pytest.mark.browser
def test_errors_are_shown_and_texts_are_never_run(page):
    page.get_by_label("An empty line ends a passage.").fill(f"{HOSTILE}\n\n{HOSTILE} again")
    page.get_by_label("Question", exact=True).fill(HOSTILE)
    assert asked(page)[2] == "0 of 2"
    assert page.evaluate("window.ran") is None
    page.get_by_label("An empty line ends a passage.").fill("word " * 60_000)
    page.get_by_role("button", name="Ask with reuse").click()
    alert = page.get_by_role("alert")
    alert.filter(has_text="do not fit into blocks").wait_for(timeout=30_000)
    page.get_by_label("An empty line ends a passage.").fill("A passage.")
    assert asked(page)[2] == "0 of 1"


@pytest.mark.browser
def test_an_answer_is_stopped(page, server):
    page.get_by_role("button", name="Ask without reuse").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("status").filter(has_text="Stopped.").wait_for(timeout=10_000)
    assert page.get_by_role("button", name="Ask with reuse").is_enabled()


def test_the_page_is_at_the_root_only_and_loads_nothing(server):
    page = httpx.get(server.url)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in page.text
    assert "https://" not in page.text
    for passage in demo_data()["passages"]:
        assert passage["title"] in page.text
    assert httpx.post(server.url).status_code >= 400
    assert httpx.get(f"{server.url}/other").status_code == 404
    with served() as without:
        assert httpx.get(without.url).status_code == 404


def test_a_page_and_keys_do_not_go_together():
    with (
        pytest.raises(ValueError, match="demo page asks without a key"),
        served(settings=GateSettings(keys={"key": "tenant"}), with_page=True),
    ):
        pass
