"""Fallbacks, settings, code, options and links that the documentation names exist; its Python blocks compile."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import pkgutil
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import hfblend
import hfblend.config
import hfblend.generate.fallbacks
from hfblend.cli import app

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTES = sorted((ROOT / "docs" / "notes").glob("*.md"))
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *NOTES]
EXTERNAL_LINKS = {  # checked by hand when they were added; no test asks the network
    "https://arxiv.org/abs/2410.15332",
    "https://arxiv.org/abs/2606.21842",
    "https://arxiv.org/abs/2607.19957",
    "https://docs.lmcache.ai/kv_cache_optimizations/cacheblend.html",
    "https://docs.vllm.ai/en/latest/design/prefix_caching",
    "https://huggingface.co/docs/safetensors",
    "https://keepachangelog.com/en/1.1.0/",
    "https://kvboost.readthedocs.io/en/latest/architecture/cache-keys.html",
    "https://kvboost.readthedocs.io/en/latest/guide/recompute.html",
    "https://nicegui.io",
    "https://semver.org/spec/v2.0.0.html",
}
FOREIGN_NAMES = {  # of Python, pytest, tests, Transformers, peft, RAG frameworks and other projects; families of models
    *("MemoryError", "True", "False", "None", "browser", "smollm", "thorough", "with"),
    *("PROVE_ALL", "remembered_proofs"),
    *("PeftModel", "add_adapter", "continuous_batching", "cpu_offload", "disk_offload", "dispatch_model"),
    *("generate_batch", "init_continuous_batching", "inv_freq", "load_adapter", "modules_to_save"),
    *("output_scores", "pixel_values", "set_adapter", "set_stance", "token_type_ids"),
    "model_type",
    "flash_attention_4",
    *("HuggingFacePipeline", "from_model_id", "function_mappings", "llm", "page_content", "pipeline"),
    "blend_thresholds",
    *("beam", "codegen", "doge", "gptj", "llama4", "longcat_flash", "mllama", "prophetnet"),
    *("ChatOpenAI", "OpenAILike", "traceparent", "repetition_penalty", "min_new_tokens"),
    "layer_0000",  # made from a layer's number
}
FOREIGN_OPTIONS = {"continuous-batching"}  # `transformers serve`


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_guide = pytest.mark.parametrize("page", GUIDES, ids=name_of)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def prose_of(page: Path) -> str:
    """A page without fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code_in(page: Path) -> list[str]:
    """The `code` of a page's prose and tables; those of models.md are generated."""
    lines = [line for line in prose_of(page).splitlines() if page.name != "models.md" or not line.startswith("|")]
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", "\n".join(lines))


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name that code defines or uses, and strings that are one name, such as settings and reasons."""
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield from name.split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


@functools.cache
def known_names() -> set[str]:
    """Names in the package's code, its modules' among them."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "hfblend").rglob("*.py")]
    names = {part for path in paths for part in path.parts}
    for path in paths:
        names.update(identifiers(ast.parse((ROOT / path).with_suffix(".py").read_text(encoding="utf-8"))))
    return names | {name.lower() for name in names} | {f"HFBLEND_{name.upper()}" for name in names}


def test_every_fallback_has_its_row_in_order():
    section = text_of("docs/generate.md").split("## Reasons for a fallback")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        f.name.lower() for f in hfblend.generate.fallbacks.Fallback
    ]


def test_every_fallbacks_log_level_is_the_documented_one():
    section = text_of("docs/generate.md").split("## Reasons for a fallback")[1].split("\n## ")[0]
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


def test_the_landing_page_has_readmes_block_and_numbers():
    page, readme = text_of("docs/index.md"), text_of("README.md")
    assert python_blocks(page) == python_blocks(readme)
    rows = re.findall(r"^\|.*\d ms.*\|$", page, re.MULTILINE)
    assert len(rows) >= 3
    assert [row for row in rows if row not in readme] == []
    for figure in re.findall(r"\d+ %", page):
        assert figure in readme
    assert "(images/display.png)" in page


def commands_of(group: Any, name: str = "hfblend") -> Iterator[tuple[str, Any]]:
    """Every command, the groups' too, by what is typed."""
    context = typer.Context(group)
    for one in group.list_commands(context):
        command = group.resolve_command(context, [one])[1]
        yield f"{name} {one}", command
        if hasattr(command, "list_commands"):
            yield from commands_of(command, f"{name} {one}")


def test_the_page_of_commands_has_each_with_all_its_options():
    page = runpy.run_path(str(ROOT / "docs" / "site" / "commands.py"))["page"]()
    sections = dict(re.findall(r"^##+ `(.+?)`\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    commands = dict(commands_of(typer.main.get_command(app)))
    assert list(sections) == list(commands)
    assert len(commands) == 19
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        assert set(re.findall(r"^\* `(--[\w-]+)", sections[name], re.MULTILINE)) == options - {"--help"}
        assert f"```bash\n{name} " in sections[name] or name == "hfblend store"
        assert "Example:" not in sections[name]


def test_the_page_of_the_server_has_every_option_and_every_field():
    schema = pytest.importorskip("hfblend.serving.schema", exc_type=ImportError)
    page = text_of("docs/serving.md")
    (command,) = (one for name, one in commands_of(typer.main.get_command(app)) if name == "hfblend serve")
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    rows = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(--[\w-]+)`", row)} >= options - {"--help"}
    fields = {*schema.ChatBody.model_fields, *schema.CompletionBody.model_fields, *schema.BlendOptions.model_fields}
    assert {name for name in fields if f"`{name}`" not in page} == set()


@every_page
def test_python_blocks_compile(page):
    for block in python_blocks(page.read_text(encoding="utf-8")):
        compile(block, page.name, "exec")


@every_page
def test_names_in_hfblend_exist(page):
    names = set(re.findall(r"(?<![\w/.])hfblend(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    for name in sorted(names):
        pkgutil.resolve_name(name)


@every_guide
def test_names_in_code_exist(page):
    """Whatever looks like a name, `Blend.phases` or `trace.notes`, is one of the package's, or is listed as foreign."""
    names = [
        code.split("(")[0].removesuffix(".py")
        for code in code_in(page)
        if re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", code)
    ]
    parts = {part for name in names for part in name.split(".") if part}
    assert parts - known_names() - FOREIGN_NAMES == set()


@every_guide
def test_options_of_the_command_exist(page):
    lines = re.findall(r"^hfblend .*(?:\\\n.*)*", page.read_text(encoding="utf-8"), re.MULTILINE)
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", " ".join([*lines, *code_in(page)])))
    assert {option for option in options if option.replace("-", "_") not in known_names()} <= FOREIGN_OPTIONS


def test_pages_and_words_are_few():
    """The tables of models.md are generated, and notes for developers. Sixteen pages, security, serving, scaling."""
    words = sum(len(page.read_text(encoding="utf-8").split()) for page in DOCS if page.name != "models.md")
    assert len(DOCS) <= 19
    # 18,000 when the pages were merged; correction, rivals, tasks, security, turns, finding, serving (1,485 words),
    # Redis (224) and scaling (1,270) came after
    assert words <= 22_495


@pytest.mark.parametrize("page", [*GUIDES, *NOTES], ids=name_of)
def test_pages_are_written_as_an_engineer_speaks(page):
    """Tables of models.md quote errors."""
    lines = [line for line in prose_of(page).splitlines() if page.name != "models.md" or not line.startswith("|")]
    assert re.findall(r"\b(?:behind|beside|nobody|whoever|of its own)\b", "\n".join(lines)) == []


def test_pages_named_in_the_code_exist():
    sources = [path for part in ("hfblend", "tests", "examples", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text(encoding="utf-8"))}
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@every_page
def test_relative_links_resolve(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in relative if not (page.parent / target).exists()]
    assert not missing


def anchors_of(page: Path) -> set[str]:
    """The targets of links: headings as GitHub and the site spell them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
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
