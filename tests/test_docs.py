"""The documentation names what exists: fallbacks, settings, public names, links; its Python blocks compile."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import hfblend
import hfblend.config
import hfblend.generate.fallbacks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTERNAL_LINKS = {  # looked at by whoever added them; no test asks the network
    "https://arxiv.org/abs/2410.15332",
    "https://docs.lmcache.ai/kv_cache_optimizations/cacheblend.html",
    "https://docs.vllm.ai/en/latest/design/prefix_caching",
    "https://huggingface.co/docs/safetensors",
    "https://keepachangelog.com/en/1.1.0/",
    "https://kvboost.readthedocs.io/en/latest/architecture/cache-keys.html",
    "https://kvboost.readthedocs.io/en/latest/guide/recompute.html",
    "https://nicegui.io",
    "https://semver.org/spec/v2.0.0.html",
}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_every_fallback_has_its_row_in_order():
    section = text_of("docs/fallbacks.md").split("## Reasons for a fallback")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        f.name.lower() for f in hfblend.generate.fallbacks.Fallback
    ]


def test_every_fallbacks_log_level_is_the_documented_one():
    section = text_of("docs/fallbacks.md").split("## Reasons for a fallback")[1].split("\n## ")[0]
    levels = re.findall(r"^\| `\w+` \|.*\| (info|warning) \|", section, re.MULTILINE)
    assert levels == [{20: "info", 30: "warning"}[fallback.level] for fallback in hfblend.generate.fallbacks.Fallback]


@pytest.mark.parametrize("field", dataclasses.fields(hfblend.BlendConfig), ids=lambda field: field.name)
def test_every_setting_is_documented_with_its_default(field):
    row = re.search(rf"^\| `{field.name}` \| `(.+?)` \|", text_of("docs/configuration.md"), re.MULTILINE)
    assert row, f"docs/configuration.md has no row for {field.name}."
    assert row[1] == (f'"{field.default}"' if isinstance(field.default, str) else repr(field.default))
    assert f"`HFBLEND_{field.name.upper()}`" in text_of("docs/configuration.md")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"LMCACHE_[A-Z_]+[A-Z]\b", inspect.getsource(hfblend.config)))))
def test_every_lmcache_variable_is_documented(name):
    assert re.search(rf"^\| `{name}` \|", text_of("docs/configuration.md"), re.MULTILINE)


def test_readme_opens_with_the_quickstart_that_the_tests_run():
    assert python_blocks(text_of("README.md"))[0] in text_of("examples/quickstart.py")


@every_page
def test_python_blocks_compile(page):
    for block in python_blocks(page.read_text(encoding="utf-8")):
        compile(block, page.name, "exec")


@every_page
def test_names_in_hfblend_exist(page):
    names = set(re.findall(r"(?<![\w/.])hfblend(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    for name in sorted(names):
        pkgutil.resolve_name(name)


@every_page
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


def anchors_of(page: Path) -> set[str]:
    """What a link can point to: headings as GitHub and the site spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@every_page
def test_anchors_resolve(page):
    targets = re.findall(r"\]\(([\w./-]*\.md)?#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [
        (name, anchor) for name, anchor in targets if anchor not in anchors_of(page.parent / (name or page.name))
    ]
    assert not missing


@every_page
def test_external_links_are_listed(page):
    links = set(re.findall(r"(?:\]\(|<)(https?://[^\s)>]+)[)>]", page.read_text(encoding="utf-8")))
    assert links <= EXTERNAL_LINKS


@every_page
def test_test_files_named_in_the_docs_are_in_tests(page):
    """A claim's test may be renamed; its mention is then renamed too."""
    for name in re.findall(r"`((?:tests|hfblend)/[\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name
