"""The documentation site: it is built without a warning, fits screens wide and narrow, and its search of models finds.

Runs where the extra `docs` is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from browsers import in_every_form, page_of, running

for package in ("material", "mkdocs", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package)
pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[1]
PAGES = ("index", "cli", "models", "reference", "configuration", "notebooks/5_rag_end_to_end")
UNMARKED = """() => [...document.querySelectorAll(".md-content *")].filter(one => {
    const style = getComputedStyle(one);
    return one.scrollWidth > one.clientWidth + 1 && /auto|scroll/.test(style.overflowX)
        && !style.backgroundImage.includes("gradient")
}).map(one => one.outerHTML.slice(0, 100))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        """Says nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does; a warning ends it."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


def test_no_markup_is_left(site):
    for name in PAGES[:4]:
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert not any(mark in page for mark in ("](", "<!-- families", "{ .", "`hfblend", "markdown="))


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_what_scrolls_says_so(browser, address, name):
    with page_of(browser, address) as page:
        page.goto(f"{address}/{name}.html")
        for width in in_every_form(page):
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(UNMARKED) == []
            wide = "all => all.filter(one => one.scrollWidth > one.clientWidth + 1).length"
            assert page.locator(".doc-signature code").evaluate_all(wide) == 0  # signatures wrap
        assert page.alarms == []


@pytest.mark.browser
@pytest.mark.parametrize(
    ("wanted", "found"), [("Llama-3.1-8B", {"llama": "yes"}), ("gpt_2", {"gpt2": "no: "}), ("no such", {})]
)
def test_models_are_found_by_the_names_that_people_know(browser, address, wanted, found):
    with page_of(browser, address) as page:
        page.goto(f"{address}/models.html")
        total = page.locator(".families tbody tr").count()
        page.get_by_label("Search the models").fill(wanted)
        rows = page.locator(".families tbody tr:visible").all()
        cells = dict(row.locator("td").all_inner_texts() for row in rows)
        assert list(cells) == list(found)
        assert all(cells[name].startswith(said) for name, said in found.items())
        status = page.locator("[role=status]").last.inner_text()
        assert status == (f"{len(found)} of {total}" if found else "None of these; hfblend.patch(model) tests it.")


@pytest.mark.browser
def test_models_need_no_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/models.html")
    assert page.locator(".families tbody tr:visible").count() > 200
    assert page.get_by_label("Search the models").count() == 0
    context.close()
