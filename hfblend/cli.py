"""The command `hfblend`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from . import __version__, store_cli
from .outputs import require_folders_of

EXIT_CODES = "Exit codes: 0 done; 1 it failed, or something is missing; 2 an option, a file or a model will not do."

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="CacheBlend inside Hugging Face Transformers.", epilog=EXIT_CODES
)
app.add_typer(store_cli.app, name="store")
console = Console()

Number = TypeVar("Number", int, float)

Model = Annotated[
    str | None, typer.Option(help="Hub id or folder of a causal LM.", show_default="SmolLM2-135M-Instruct")
]
Device = Annotated[str | None, typer.Option(help="As torch names it.", show_default="GPU if any, else CPU")]
KVDType = Annotated[str | None, typer.Option(help="Keep chunk KV in 8 bits: int8 or fp8.", show_default="as computed")]
DType = Annotated[str | None, typer.Option(help="As torch names it.", show_default="float32 on a CPU, else bfloat16")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the table to this file.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"hfblend {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """CacheBlend inside Hugging Face Transformers."""


@contextmanager
def _in_words() -> Iterator[None]:
    """An error that a person can mend is said on stderr, without a stack trace, and ends the command."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, ValueError) as error:  # UnsupportedModel is a ValueError
        stderr = Console(stderr=True)
        stderr.print(f"[red]{type(error).__name__}[/red]:", Text(str(error)))
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


@app.command(epilog=EXIT_CODES)
def demo(
    model: Model = None,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Answer a question about twelve passages by full prefill, full reuse and blending, and compare them.

    Example: hfblend demo --json demo.json
    """
    from . import demo_model
    from .demo import run_demo

    with _in_words():
        require_folders_of(json_file)
        loaded, tokenizer = demo_model.load(model, device)
        results = run_demo(loaded, tokenizer, model or demo_model.HUB_NAME, console)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {json_file}", markup=False, highlight=False, soft_wrap=True)


@app.command(epilog=f"{EXIT_CODES} With --max-kl, 1 says that a prompt is above it.")
def verify(
    prompts: Annotated[
        Path,
        typer.Option(
            help='JSON: {"prefix", "chunks", "question"} or {"question", "ctxs"}, or a list.',
            exists=True,
            dir_okay=False,
        ),
    ],
    model: Model = None,
    ratio: Annotated[float, typer.Option(help="Share of the reused tokens to recompute.")] = 0.15,
    selection: Annotated[
        str | None, typer.Option(help="The rule that selects them.", show_default="BlendConfig's")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="In nats; exit code 1 if a prompt's mean KL is above.")] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Answer tokens to compare.")] = 16,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Blend the prompts of a file and say how far each is from its full prefill.

    Example: hfblend verify --prompts prompts.json --max-kl 0.1 --json figures.json
    """
    from . import demo_model
    from . import verification_report as report
    from .config import BlendConfig
    from .explain_cli import read_prompts

    chosen: dict[str, Any] = {} if selection is None else {"selection": selection}
    with _in_words():
        require_folders_of(json_file)
        config = BlendConfig(recompute_ratios=(ratio,), **chosen)
        loaded, tokenizer = demo_model.load(model, device)
        read = read_prompts(str(prompts), tokenizer)
        found = report.verify_prompts(loaded, read, config, num_tokens, Console(stderr=True))
    console.print(report.table_of(found, max_kl))
    if json_file is not None:
        figures = report.as_json(found, loaded, model or demo_model.HUB_NAME, config, max_kl)
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        console.print(f"Wrote {json_file}", markup=False, highlight=False, soft_wrap=True)
    if any(report.is_above(one, max_kl) for one in found):
        raise typer.Exit(1)


PromptFiles = Annotated[
    list[str], typer.Argument(metavar="PROMPT_FILE…", help="JSON: prefix, chunks, question; - is standard input.")
]
Ratio = Annotated[float, typer.Option(help="Share of the reused tokens to recompute.", min=0, max=1)]
Rule = Annotated[str | None, typer.Option(help="The rule that selects them.", show_default="BlendConfig's")]
KeptIn = Annotated[
    str | None, typer.Option("--store", help="Folder or URL that keeps the chunk KV.", show_default="in memory")
]
NewTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]
PrintJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command(epilog=EXIT_CODES)
def explain(
    prompt_file: Annotated[
        str, typer.Argument(metavar="PROMPT_FILE", help="JSON: prefix, chunks, question; - is standard input.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report to this file.")] = None,
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    store: KeptIn = None,
    max_new_tokens: NewTokens = 32,
    device: Device = None,
    dtype: DType = None,
    as_json: PrintJson = False,
) -> None:
    """Blend one prompt, show which chunks and tokens were reused, and hold the answer against full prefill's.

    Without --store, the chunks are stored first, and the call that is shown finds them.

    Example: hfblend explain prompt.json --html report.html
    """
    from . import demo_model
    from . import explain_cli as command

    stderr = Console(stderr=True)
    with _in_words():
        require_folders_of(html)
        config, kept_in = command.config_of(ratio, selection), _store_at(store)
        loaded, tokenizer = demo_model.load(model, device, _dtype(dtype))
        prompt, *others = command.read_prompts(prompt_file, tokenizer)
        if others:
            raise ValueError(f"explain takes one prompt, {prompt_file} holds {1 + len(others)}.")
        with stderr.status("Blending, and prefilling in full …"):
            explained = command.explain(loaded, tokenizer, prompt, config, kept_in, max_new_tokens)
        if html is not None:
            explained.display().save(html)
    if as_json:
        console.print_json(data=explained.to_dict())
    else:
        console.print(explained.display())
        for label, answer in explained.display().answers.items():
            command.print_answer(console, label, answer)
    if html is not None:
        stderr.print(f"Wrote {html}", highlight=False, soft_wrap=True)


@app.command(epilog=EXIT_CODES)
def run(
    prompt_files: PromptFiles,
    trace: Annotated[bool, typer.Option("--trace", help="Show what was reused and recomputed.")] = False,
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    store: KeptIn = None,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    dtype: DType = None,
    as_json: PrintJson = False,
) -> None:
    """Answer the prompts of files, one after the other; chunks that they share are computed once.

    Example: hfblend run prompt.json --store chunks --trace

    Example: echo '{"chunks": ["Ann was born in Hull.", "Bo is Ann's son."], "question": "Where was Bo's mother born?"}'
    | hfblend run -
    """
    from . import demo_model
    from . import explain_cli as command

    found = []
    with _in_words():
        config, kept_in = command.config_of(ratio, selection), _store_at(store)
        loaded, tokenizer = demo_model.load(model, device, _dtype(dtype))
        prompts = [prompt for file in prompt_files for prompt in command.read_prompts(file, tokenizer)]
        level: Any = "tokens" if trace else "summary"
        for answer, done in command.run(loaded, tokenizer, prompts, config, kept_in, max_new_tokens, level):
            found.append({"answer": answer, "trace": done.to_dict()})
            if not as_json:
                command.print_answer(console, "", answer)
                if trace:
                    console.print(command.Display(done))
    if as_json:
        console.print_json(data=found)


_EVALUATED = "full_prefill,full_reuse,kv_deviation,hfblend"


@app.command("eval", epilog=EXIT_CODES)
def evaluate(
    data: Annotated[str, typer.Option(help="File of questions, or a name: musique, 2wikimqa, hotpotqa, samsum, …")],
    n: Annotated[int, typer.Option(help="How many questions.", min=1)] = 40,
    skip: Annotated[int, typer.Option(help="Leave out the first questions.", min=0)] = 0,
    methods: Annotated[str, typer.Option(help="Names, separated by commas.")] = _EVALUATED,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas.")] = "0.05,0.15,0.3",
    max_context: Annotated[int, typer.Option(help="Tokens of the longest prompt.", min=1)] = 6500,
    answer_tokens: Annotated[int, typer.Option(help="Of greedy answers, for F1; 0 measures none.", min=0)] = 32,
    baseline: Annotated[
        str | None, typer.Option(help="Method that KL is compared with.", show_default="kv_deviation if measured")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and of methods that draw.")] = 0,
    kv_dtype: KVDType = None,
    model: Model = None,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against cost into this file (.png).")] = None,
    records: Annotated[
        Path | None, typer.Option(help="Keep every measurement here; what is there is not measured again.")
    ] = None,
) -> None:
    """Measure methods on questions: closeness to full prefill, answers, time to first token.

    Example: hfblend eval --data musique --n 20 --plot quality.png

    Example: hfblend eval --data questions.json --methods full_reuse,kv_deviation,hfblend --ratios 0.1,0.2
    """
    from . import demo_model
    from .baselines import METHODS
    from .evaluation import command
    from .evaluation.runner import Settings

    with _in_words():
        outputs = command.Outputs(json_file, markdown, plot, records)
        outputs.check()
        settings = Settings(max_context, answer_tokens, seed, kv_dtype=kv_dtype)
        ratio_values = _numbers(ratios, float, "--ratios")
        asked = command.prepare(data, n, skip, _names(methods), ratio_values, baseline, settings, METHODS)
        loaded, tokenizer = demo_model.load(model, device, _dtype(dtype))
        command.evaluate(asked, loaded, tokenizer, model or demo_model.HUB_NAME, outputs, console)


@app.command(epilog=EXIT_CODES)
def bench(
    model: Model = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape instead: llama-8b, tiny.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt's chunks, separated by commas.", show_default="4096 … 65536; 2000 on a CPU"
        ),
    ] = None,
    ratios: Annotated[str, typer.Option(help="Recompute ratios, separated by commas; 0 is full reuse.")] = (
        "0,0.05,0.15,0.3"
    ),
    methods: Annotated[
        str, typer.Option(help="Names, separated by commas, to compare with full prefill.")
    ] = "prefix_reuse,suffix_attention,kv_deviation",
    repeats: Annotated[int, typer.Option(help="Turns that count.", min=1)] = 7,
    chunk: Annotated[int, typer.Option(help="Tokens of a chunk.", min=1)] = 512,
    prefix: Annotated[int, typer.Option(help="Tokens of the prefix.", min=0)] = 32,
    suffix: Annotated[int, typer.Option(help="Tokens of the suffix.", min=1)] = 32,
    chunks_in: Annotated[
        str,
        typer.Option(
            help="Where chunk KV is kept, separated by commas: gpu, ram, disk, disk_whole.", show_default="gpu if any"
        ),
    ] = "",
    decode: Annotated[int, typer.Option(help="Tokens to decode, for their speed; 0 measures none.", min=0)] = 64,
    throughput: Annotated[
        int, typer.Option(help="Prompts of a stream that shares chunks; 0 measures none.", min=0)
    ] = 0,
    batch: Annotated[
        int, typer.Option(help="Prompts in one batch, against the same one by one; 0 measures none.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Device = None,
    dtype: DType = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and speed-up by tokens into this file (.png).")] = None,
) -> None:
    """Measure speed: time to first token by length, method and ratio, and how near each is to its limit.

    Example: hfblend bench --tokens 2000,6000 --ratios 0.05,0.15 --markdown table.md

    Example: hfblend bench --shape llama-8b --chunks-in gpu,ram,disk
    """
    from .benchmarks import command
    from .benchmarks.prompts import Layout
    from .benchmarks.settings import Settings

    with _in_words():
        outputs = command.Outputs(json_file, markdown, plot)
        outputs.check()
        settings = Settings(
            lengths=tuple(_numbers(tokens or "", int, "--tokens")),
            ratios=tuple(_numbers(ratios, float, "--ratios")),
            methods=tuple(_names(methods)),
            repeats=repeats,
            layout=Layout(prefix, chunk, suffix),
            chunks_in=tuple(_names(chunks_in)),
            decoded_tokens=decode,
            throughput_prompts=throughput,
            batch_prompts=batch,
            seed=seed,
        )
        loaded, tokenizer, name = command.load(model, shape, device, _dtype(dtype))
        command.bench(loaded, name, settings, outputs, console, tokenizer)


@app.command(epilog=f"{EXIT_CODES} 1 also says that a chunk was not kept; 130, stopped by Ctrl-C.")
def precompute(
    corpus: Annotated[
        Path, typer.Option(help="JSON lines: strings, or objects with a text.", exists=True, dir_okay=False)
    ],
    store: Annotated[str, typer.Option(help="Folder or URL that keeps the chunk KV.")],
    model: Model = None,
    prefix: Annotated[str | None, typer.Option(help="What will stand before the first chunk.")] = None,
    prefix_file: Annotated[
        Path | None, typer.Option(help="The same, from a file.", exists=True, dir_okay=False)
    ] = None,
    field: Annotated[str, typer.Option(help="Of an object, the text.")] = "text",
    chunk_prefix: Annotated[
        str | None, typer.Option(help="What chunks are computed behind.", show_default="BlendConfig's")
    ] = None,
    namespace: Annotated[str, typer.Option(help="As in BlendConfig.")] = "",
    max_bytes: Annotated[
        str | None,
        typer.Option(help="Of the store; the oldest go.", show_default="50GB; of a URL, none"),
    ] = None,
    kv_dtype: KVDType = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Chunks in one forward.", min=1, show_default="1 on a CPU, else 8")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Compute and store the KV of a corpus' chunks. Stopped and started again, it goes on where it was.

    Example: hfblend precompute --corpus passages.jsonl --store chunks --prefix-file system.txt
    """
    from . import demo_model
    from . import precompute_cli as command
    from .config import BlendConfig
    from .filler import filler_ids

    stderr = Console(stderr=True)
    try:
        with _in_words():
            chosen: dict[str, Any] = {} if chunk_prefix is None else {"chunk_prefix": chunk_prefix}
            config = BlendConfig(namespace=namespace, **chosen)
            options: dict[str, Any] = {"prefix": command.prefix_of(prefix, prefix_file), "batch_size": batch_size}
            total = command.count_texts(corpus, field)
            options["store"] = command.store_of(store, max_bytes, kv_dtype)
            loaded, options["tokenizer"] = demo_model.load(model, device, _dtype(dtype))
            if chunk_prefix == "filler":
                config = replace(config, filler_ids=filler_ids(options["tokenizer"]))
            report = command.precompute_corpus(loaded, corpus, field, total, stderr, config=config, **options)
    except KeyboardInterrupt as error:
        stderr.print("Stopped. What is stored stays; the same command goes on from there.")
        raise typer.Exit(130) from error
    if as_json:
        console.print_json(command.as_json(report))
    else:
        console.print(str(report), highlight=False, soft_wrap=True)
    if report.failed:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def profile(
    store: Annotated[str | None, typer.Option(help="Folder or URL whose loading is measured too.")] = None,
    model: Model = None,
    tokens: Annotated[str, typer.Option(help="Lengths to forecast, separated by commas.")] = "1024,4096,16384",
    selection: Annotated[str, typer.Option(help="The rule to forecast.")] = "kv_deviation",
    least_ratio: Annotated[float, typer.Option(help="The paper's r*.", min=0, max=1)] = 0.15,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    device: Device = None,
    dtype: DType = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure prefilling, blending and loading once, and show what recompute_ratios="auto" would decide.

    Example: hfblend profile --store chunks --tokens 2048,8192
    """
    from . import demo_model, precompute_cli, profile_cli
    from .config import BlendConfig
    from .controller import Controller
    from .models import host_of
    from .profiling import profile_of
    from .store import MemoryStore

    with _in_words():
        lengths = _numbers(tokens, int, "--tokens")
        if not lengths or min(lengths) <= profile_cli.SUFFIX:
            raise ValueError(f"--tokens must be above {profile_cli.SUFFIX}, got {tokens!r}.")
        config = BlendConfig(selection=selection, recompute_ratios="auto", least_ratio=least_ratio)  # type: ignore[arg-type]
        where = MemoryStore() if store is None else precompute_cli.store_of(store, None)
        loaded, _ = demo_model.load(model, device, _dtype(dtype))
        with Console(stderr=True).status("Measuring …"):
            found = profile_of(loaded, where, config, refresh=refresh)
        bytes_per_token = host_of(loaded).kv_bytes_per_token
        rows = profile_cli.forecasts(Controller(found, least_ratio), lengths, bytes_per_token)
    if as_json:
        console.print_json(profile_cli.as_json(found, rows))
    else:
        profile_cli.show(found, rows, console)


def _store_at(store: str | None) -> Any:
    from . import precompute_cli

    return None if store is None else precompute_cli.store_of(store, None)


@app.command(epilog=EXIT_CODES)
def playground(
    model: Model = None,
    device: Device = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1, where the page is served.", min=1, max=65535)] = 8017,
) -> None:
    """Serve a page on this machine: reorder chunks, move the ratio, see tokens, answers and times.

    Example: hfblend playground --model path/or/hub-id --port 9000
    """
    from . import demo_model
    from .playground_page import serve

    with _in_words():
        serve(lambda: demo_model.load(model, device), model or demo_model.HUB_NAME, port)


def _names(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    try:
        return [kind(name) for name in _names(text)]
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def _dtype(name: str | None) -> Any:
    """The floating-point type that torch knows by this name."""
    import torch

    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype must be a floating-point type of torch such as float32 or bfloat16, got {name!r}.")
    return dtype
