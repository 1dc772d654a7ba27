"""A real browser, where the machine has one."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_QUIET = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"


def chromium() -> str:
    """The installed browser; skips where there is none, or nothing to drive it with."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("HFBLEND_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium), and HFBLEND_CHROMIUM names none")
    return found


@contextmanager
def running() -> Iterator[Any]:
    """A browser."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_QUIET.split())
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, address: str) -> Iterator[Any]:
    """An empty page. What would show that text was run as code, or that the page asks for anything that does not begin
    with `address`, is noted in `page.alarms`."""
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.alarms = []
    page.on("dialog", lambda dialog: (page.alarms.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: page.alarms.append(f"error {error}"))
    page.on("request", lambda r: None if r.url.startswith(address) else page.alarms.append(f"request {r.url}"))
    yield page
    page.close()


@contextmanager
def opened(address: str) -> Iterator[Any]:
    """An empty page in a browser that closes with it."""
    with running() as browser, page_of(browser, address) as page:
        yield page


def in_every_form(page: Any, height: int = 844) -> Iterator[int]:
    """Makes the page wide and narrow, light and dark; gives each width."""
    for width, scheme in itertools.product((1400, 390), ("light", "dark")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("scrollTo(0, 0)")
        yield width
