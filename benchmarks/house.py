"""Measures the house: lines, import circles, floors, the way of one warm `generate`, words of prose.

    python benchmarks/house.py            # of the package in this folder

Runs on any version of hfblend, so that two versions can be compared.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIALECT = r"\b(behind|beside|nobody|of its own)\b"


def module_of(file: Path, root: Path) -> str:
    """`hfblend/blend/caches.py` -> `blend.caches`; a package is its `__init__`."""
    return ".".join(file.relative_to(root).with_suffix("").parts)


def imports_of(file: Path, root: Path, modules: set[str]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    package = module_of(file, root).split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == root.name:
            base = (node.module or "").split(".")[1:]
        else:
            continue
        target = ".".join(part for part in base if part)
        for name in node.names:
            found = f"{target}.{name.name}".strip(".")
            for one in (found, f"{found}.__init__", target, f"{target}.__init__".strip(".")):
                if one in modules:
                    yield one
                    break


def circles_of(graph: dict[str, set[str]]) -> tuple[list[set[str]], dict[str, int]]:
    """Groups of modules that import each other, and each module's floor: 1 for those that import none."""
    order, found, stack, index = [], list[set[str]](), list[str](), dict[str, int]()
    low: dict[str, int] = {}

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = set()
            while not group or node not in group:
                group.add(stack.pop())
            order.append(group)
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    floor: dict[str, int] = {}
    for group in order:
        below = {other for node in group for other in graph[node]} - group
        level = 1 + max((floor[other] for other in below), default=0)
        floor |= dict.fromkeys(group, level)
    return found, floor


def way_of_one_prompt(root: Path) -> dict[str, int]:
    """Files, calls from one file into another, and own frames of a warm blended `generate` on a tiny Llama."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hfblend

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = lambda n: torch.randint(3, 97, (n,)).tolist()  # noqa: E731
    prefix, chunks, suffix = ids(7), [ids(30) for _ in range(6)], ids(9)
    prompts = [hfblend.Prompt.from_ids(prefix, [chunks[i] for i in order], suffix) for order in
               ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (2, 0, 1, 5, 3, 4))]  # fmt: skip
    blender = hfblend.patch(model, hfblend.BlendConfig(min_reused_tokens=0))
    for prompt in prompts[:2]:
        model.generate(**prompt.inputs(), max_new_tokens=2, do_sample=False)
    files: set[str] = set()
    stack: list[str] = []
    hops = deepest = 0

    def note(frame: Any, event: str, arg: Any) -> None:
        nonlocal hops, deepest
        file = frame.f_code.co_filename
        if not file.startswith(str(root)):
            return
        if event == "call":
            files.add(file)
            hops += bool(stack) and stack[-1] != file
            stack.append(file)
            deepest = max(deepest, len(stack))
        elif event == "return" and stack:
            stack.pop()

    sys.setprofile(note)
    model.generate(**prompts[2].inputs(), max_new_tokens=1, do_sample=False)
    sys.setprofile(None)
    assert blender.trace.hits == 6
    return {"files of a warm generate": len(files), "hops": hops, "own stack depth": deepest}


def prose_of(file: Path) -> str:
    """Docstrings and comments of a Python file; all of any other."""
    text = file.read_text()
    if file.suffix != ".py":
        return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]  # fmt: skip
    comments = re.findall(r"(?m)#\s(.*)$", text)
    return re.sub(r"`[^`]*`", "", "\n".join([*docs, *comments]))


def functions_of(file: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))


def measured(repository: Path) -> dict[str, Any]:
    """Name -> figure, in the order of the report."""
    root = repository / "hfblend"
    files = sorted(root.rglob("*.py"))
    modules = {module_of(file, root) for file in files}
    graph = {module_of(f, root): set(imports_of(f, root, modules)) - {module_of(f, root)} for f in files}
    circles, floors = circles_of(graph)
    arguments = [a for f in files for fn in functions_of(f) for a in (*fn.args.args, *fn.args.kwonlyargs)
                 if a.arg not in ("self", "cls")]  # fmt: skip
    longest = max((fn.end_lineno or 0) - fn.lineno + 1 for f in files for fn in functions_of(f))
    docs = list((repository / "docs").glob("*.md"))
    words = sum(len(page.read_text().split()) for page in docs if page.name != "models.md")
    core = [root / "blend" / f"{name}.py" for name in ("algorithm", "selection", "rotation", "caches")]
    dialect = sum(len(re.findall(DIALECT, prose_of(file), re.I)) for file in [*files, *docs, repository / "README.md"])
    return {
        "lines in hfblend/": sum(len(file.read_text().splitlines()) for file in files),
        "modules in hfblend/ itself": sum(file.parent == root and file.stem != "__init__" for file in files),
        "lines of the core": sum(len(f.read_text().splitlines()) for f in core if f.exists()) or None,
        "import circles": len(circles),
        "import depth": max(floors.values()),
        **way_of_one_prompt(root),
        "arguments annotated": f"{sum(a.annotation is not None for a in arguments) / len(arguments):.1%}",
        "longest function": longest,
        "docs pages": len(docs),
        "docs words without models.md": words,
        "words of the old dialect": dialect,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parent.parent)
    folder = parser.parse_args().repository.resolve()
    sys.path.insert(0, str(folder))
    for name, figure in measured(folder).items():
        print(f"{name:34} {figure}")
