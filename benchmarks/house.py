"""Measures the structure of the package: lines, imports, the way of one warm `generate`, annotations, prose, docs.

    python benchmarks/house.py                     # this checkout
    python benchmarks/house.py ../another --json   # another one, of any version: the same figures to compare with

The floors of `FLOORS` are checked where folders or modules have these names; a flat layout has no upward imports.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

# A file imports from its own folder or a lower one. Names between bars stand on one floor.
FLOORS = (
    "util|locks|arguments|optional|outputs config|kv|prompts|documents kernels|store|trace attention blend "
    "controller|model gpu support generate measure display patching __init__|demo lab serving cli"
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS.split()) for name in names.split("|")}
CORE = ("algorithm", "selection", "rotation", "caches")
DIALECT = r"\b(behind|beside|nobody|of its own)\b"

Graph = dict[str, set[str]]  # module -> modules that it imports
Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- imports ----------------------------------------------------------------------------------------------------------


def import_graph(package: Path) -> Graph:
    """The imports between modules of a package; those in functions and under `TYPE_CHECKING` count."""
    modules = {".".join(file.relative_to(package).with_suffix("").parts): file for file in package.rglob("*.py")}
    return {
        name: set(_imports_of(ast.parse(file.read_text()), name, package.name, set(modules))) - {name}
        for name, file in modules.items()
    }


def _imports_of(tree: ast.Module, module: str, package: str, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package, *module.split(".")][: -node.level] if node.level else []
            base += (node.module or "").split(".")
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for path in paths:
            if path[0] == package:
                yield from _module_at([part for part in path[1:] if part], modules)


def _module_at(path: list[str], modules: set[str]) -> Iterator[str]:
    """The module of a path, or the one that holds its last name."""
    for parts in (path, path[:-1]):
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in modules:
                yield name
                return


def circles_of(graph: Graph) -> dict[str, frozenset[str]]:
    """The modules that each module imports and is imported by, directly or not, with itself."""
    reached = {}
    for module in graph:
        seen, waiting = set[str](), [module]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[module] = seen
    return {one: frozenset({one} | {other for other in reached[one] if one in reached[other]}) for one in graph}


def longest_chain(graph: Graph) -> list[str]:
    """A longest chain of imports, the highest module first; a circle counts as one module."""
    circles = circles_of(graph)

    @functools.cache
    def chain_from(circle: frozenset[str]) -> tuple[str, ...]:
        lower = {circles[other] for module in circle for other in graph[module]} - {circle}
        longest: tuple[str, ...] = max(map(chain_from, lower), key=lambda chain: (len(chain), chain), default=())
        return (" = ".join(sorted(circle)), *longest)

    return list(max(map(chain_from, circles.values()), key=lambda chain: (len(chain), chain)))


def transformers_imports(files: Iterable[Path]) -> list[str]:
    """The modules of Transformers that files import."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return sorted({name for name in names if name.split(".")[0] == "transformers"})


def upward_imports(graph: Graph) -> list[str]:
    """Imports of a higher floor, as `blend.reuse -> gpu.loader`."""
    floors = {module: FLOOR_OF.get(module.split(".")[0], 0) for module in graph}
    return [f"{one} -> {other}" for one in sorted(graph) for other in sorted(graph[one]) if floors[other] > floors[one]]


# --- one call ---------------------------------------------------------------------------------------------------------


class Way:
    """A profiler that follows a call through a package.

    Attributes:
        files: that it enters.
        hops: calls from a file of the package into another, calls through other libraries included.
        depth: most frames of the package at once.
    """

    def __init__(self, package: Path) -> None:
        self._package, self._stack = f"{package}/", list[str]()
        self.files, self.hops, self.depth = set[str](), 0, 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        file = frame.f_code.co_filename
        if not file.startswith(self._package):
            return
        if event == "call":
            self.files.add(file)
            self.hops += bool(self._stack) and self._stack[-1] != file
            self._stack.append(file)
            self.depth = max(self.depth, len(self._stack))
        elif event == "return" and self._stack:
            self._stack.pop()


def way_of_generate(package: Path) -> Way:
    """The way of a warm blended `generate` of one token, over six stored chunks, on a tiny Llama.

    Imports the package from the first place of `sys.path`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import hfblend

    if Path(hfblend.__file__).parent != package:
        raise ImportError(f"Python imports {hfblend.__file__}, not {package}.")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)).eval()
    prefix, suffix, *chunks = (torch.randint(3, 97, (size,)).tolist() for size in (7, 9, *(30,) * 6))
    blender = hfblend.patch(model, hfblend.BlendConfig(min_reused_tokens=0))
    way = Way(package)
    for order in ("012345", "543210", "201534"):
        prompt = hfblend.Prompt.from_ids(prefix, [chunks[int(i)] for i in order], suffix)
        inputs = prompt.inputs()
        sys.setprofile(way if order == "201534" else None)
        try:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        finally:
            sys.setprofile(None)
    if blender.trace.hits != 6:
        raise RuntimeError(f"The call was not warm: {blender.trace}")
    return way


# --- text -------------------------------------------------------------------------------------------------------------


def prose_of(file: Path) -> str:
    """Docstrings, comments and messages of a Python file, the whole of any other; without code."""
    text = file.read_text()
    if file.suffix == ".py":
        strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
        prose = [value for value in strings if isinstance(value, str) and " " in value]
        text = "\n".join([*prose, *re.findall(r"(?m)(?:^|\s)#\s(.*)$", text)])
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def dialect_words(files: Iterable[Path]) -> int:
    """How often the words of `DIALECT` stand in prose."""
    return sum(len(re.findall(DIALECT, prose_of(file), re.IGNORECASE)) for file in files)


def functions_of(file: Path) -> list[Function]:
    """Every function and method."""
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function)]


def arguments_of(function: Function) -> list[ast.arg]:
    """The arguments of a function but `self` and `cls`."""
    own = function.args
    return [a for a in (*own.posonlyargs, *own.args, *own.kwonlyargs) if a.arg not in ("self", "cls")]


def lines_of(files: Iterable[Path]) -> int:
    """Lines, empty ones included."""
    return sum(len(file.read_text().splitlines()) for file in files)


# --- all --------------------------------------------------------------------------------------------------------------


def figures_of_text(repository: Path) -> dict[str, Any]:
    """Name -> figure, from the files alone."""
    package, docs = repository / "hfblend", sorted((repository / "docs").glob("*.md"))
    files = sorted(package.rglob("*.py"))
    core = [file for name in CORE if (file := package / "blend" / f"{name}.py").is_file()]
    graph = import_graph(package)
    upward = upward_imports(graph)
    functions = [function for file in files for function in functions_of(file)]
    lengths = [(function.end_lineno or 0) - function.lineno + 1 for function in functions]
    arguments = [argument for function in functions for argument in arguments_of(function)]
    annotated = sum(argument.annotation is not None for argument in arguments)
    return {
        "lines in hfblend/": lines_of(files),
        "top-level modules": len([*package.glob("*.py")]) - 1,  # __init__ is the package
        "lines of the core": lines_of(core) if core else None,
        "Transformers in the core": ", ".join(transformers_imports(core)) if core else None,
        "import circles": len({circle for circle in circles_of(graph).values() if len(circle) > 1}),
        "upward imports": len(upward) if core else None,
        "import depth": len(chain := longest_chain(graph)),
        "arguments annotated, %": round(100 * annotated / len(arguments), 1),
        "functions over 80 lines": sum(length > 80 for length in lengths),
        "longest function": max(lengths),
        "docs pages": len(docs),
        "docs words without models.md": sum(len(one.read_text().split()) for one in docs if one.name != "models.md"),
        "behind, beside, nobody, of its own": dialect_words([*files, *docs, repository / "README.md"]),
        "upward": upward if core else [],
        "chain": chain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    repository = args.repository.resolve()
    sys.path.insert(0, str(repository))
    figures, way = figures_of_text(repository), way_of_generate(repository / "hfblend")
    figures |= {"files of a warm generate": len(way.files), "hops": way.hops, "own stack depth": way.depth}
    upward, chain = figures.pop("upward"), figures.pop("chain")
    if args.json:
        print(json.dumps(figures | {"upward": upward, "chain": chain}, indent=1))
        return
    for name, figure in figures.items():
        print(f"{name:36} {'–' if figure is None else figure}")
    for one in upward:
        print(f"    {one}")
    print(f"A longest chain of imports: {' -> '.join(chain)}")


if __name__ == "__main__":
    main()
