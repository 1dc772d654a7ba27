"""`hfblend precompute`: stores the chunks of a corpus before the first question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from ..arguments import require_text
from ..config import BlendConfig
from ..util import require
from .common import console, given, load, print_json, stderr, store_at, wake
from .completion import CHUNK_PREFIXES, values
from .options import Device, DType, KVDType, Model, existing

if TYPE_CHECKING:
    from ..generate.precompute import Precomputed
    from ..store import Store


def precompute(
    corpus: Annotated[Path, existing("JSON lines: strings, or objects with a text.")],
    store: Annotated[str, Option(help="Folder or URL that keeps the chunk KV.")],
    model: Model = None,
    prefix: Annotated[str | None, Option(help="The text before the first chunk.")] = None,
    prefix_file: Annotated[Path | None, existing("The same, from a file.")] = None,
    field: Annotated[str, Option(help="Of an object, the text.")] = "text",
    chunk_prefix: Annotated[
        str | None,
        Option(
            help="The text that chunks are computed after.",
            show_default="BlendConfig's",
            autocompletion=values(CHUNK_PREFIXES),
        ),
    ] = None,
    namespace: Annotated[str, Option(help="As in BlendConfig.")] = "",
    max_bytes: Annotated[
        str | None, Option(help="Of the store; the oldest go.", show_default="50GB; of a URL, none")
    ] = None,
    kv_dtype: KVDType = None,
    batch_size: Annotated[
        int | None, Option(help="Chunks in one forward.", min=1, show_default="1 on a CPU, else 8")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    ray: Annotated[
        bool, Option("--ray", help="Work on Ray, of this machine or of $RAY_ADDRESS; all workers reach the store.")
    ] = False,
    workers: Annotated[
        int | None, Option(help="With --ray, models that work at once.", min=1, show_default="one a GPU, else 1")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Compute and store the KV of a corpus' chunks. Stopped and started again, it goes on where it was.

    Example: hfblend precompute --corpus passages.jsonl --store chunks --prefix-file system.txt

    Example: hfblend precompute --corpus passages.jsonl --store s3://bucket/chunks --ray --workers 8
    """
    try:
        config = BlendConfig(namespace=namespace, **given(chunk_prefix=chunk_prefix))
        before, total = prefix_of(prefix, prefix_file), count_texts(corpus, field)

        texts = _Counted(corpus, field, total)
        open_store = partial(store_at, store, max_bytes, kv_dtype)
        work = partial(_Work, model, device, dtype, open_store, before, config, batch_size)
        on_ray = ray or workers is not None
        report = _on_ray(work, open_store(), texts, workers) if on_ray else work().compute(texts)
    except KeyboardInterrupt as error:
        stderr.print("Stopped. The stored chunks stay; the same command goes on from there.")
        raise typer.Exit(130) from error
    if as_json:
        print_json(asdict(report) | {"tokens_per_s": report.tokens_per_s})
    else:
        console.print(str(report), highlight=False, soft_wrap=True)
    if report.failed:
        raise typer.Exit(1)


class _Work:
    """A loaded model, and what its chunks are computed with."""

    def __init__(
        self, model: str | None, device: str | None, dtype: str | None, open_store: Callable[[], Store], prefix: str,
        config: BlendConfig, batch_size: int | None,
    ) -> None:  # fmt: skip
        wake()
        from ..prompts.filler import filler_ids

        self.store, self.batch_size = open_store(), batch_size
        self.model, tokenizer, _ = load(model, device, dtype)
        if config.chunk_prefix == "filler":
            config = replace(config, filler_ids=filler_ids(tokenizer))
        self.options: dict[str, Any] = {"prefix": prefix, "config": config, "tokenizer": tokenizer}

    def keys(self, texts: Iterable[str]) -> list[str]:
        """The keys of chunks."""
        from ..generate.precompute import chunk_keys

        return chunk_keys(self.model, texts, **self.options)

    def compute(self, texts: Iterable[str]) -> Precomputed:
        """Stores the chunks that are missing."""
        from ..generate.precompute import precompute as precompute_texts

        return precompute_texts(self.model, texts, store=self.store, batch_size=self.batch_size, **self.options)


def _on_ray(work: Callable[[], _Work], store: Store, texts: Iterable[str], workers: int | None) -> Precomputed:
    require("ray.data", "ray[serve,data]", "ray", "Workers need")
    wake()
    from ..serving import cluster

    with cluster.joined():
        return cluster.precompute(work, store, texts, workers)


def count_texts(corpus: Path, field: str) -> int:
    """Counts the texts of a corpus, and checks the whole file before any model is loaded; raises `ValueError`."""
    if not corpus.is_file():
        raise ValueError(f"{corpus} is no file, and the corpus is read twice; write it to one.")
    count = sum(1 for _ in texts_of(corpus, field))
    if not count:
        raise ValueError(f"{corpus} holds no texts.")
    return count


def texts_of(corpus: Path, field: str) -> Iterator[str]:
    """Yields the texts of a JSONL file: lines are strings, or objects with that field. Skips blank lines."""
    with corpus.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _text_of(line, field, f"{corpus}, line {number}")


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}).") from error
    if isinstance(row, dict) and field not in row:
        raise ValueError(f"{where}: no field {field!r}, only {', '.join(row) or 'none'}; name another with --field.")
    text = row[field] if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f'{where}: expected a text, or an object such as {{"{field}": "…"}}.')
    if not text.strip():
        raise ValueError(f"{where}: the text is empty; leave the line out.")
    return require_text(f"{where}: the text", text)


def prefix_of(prefix: str | None, prefix_file: Path | None) -> str:
    """Returns the prefix from either option; a file's text keeps its last newline, and loses its byte order mark."""
    if prefix is not None and prefix_file is not None:
        raise ValueError("--prefix and --prefix-file are two ways to give the prefix; use one.")
    if prefix_file is not None:
        return prefix_file.read_bytes().decode("utf-8-sig")
    return require_text("--prefix", prefix or "")


@dataclass(frozen=True)
class _Counted:
    """The texts of a corpus, whose number is known and which are read one by one."""

    corpus: Path
    field: str
    total: int

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[str]:
        return texts_of(self.corpus, self.field)
