"""`hfblend explain`, `run` and `verify`: prompts from files, blended, answered, shown, and compared with their full
prefills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Exit, Option

from ..config import BlendConfig
from ..trace.progress import Line, told
from ..util import require_folders_of
from .common import corrected, given, load, shown_on, stderr, store_at, write_json
from .options import Blame, Correction, Device, DType, Json, KeptIn, Model, NewTokens, Ratio, Rule

if TYPE_CHECKING:
    from rich.console import Console

    from ..measure.results import Blame as FoundBlame
    from ..measure.results import Verification
    from ..patching import Blender
    from ..prompts.prompt import Prompt
    from ..store import Store
    from ..trace.trace import BlendTrace

COMPARED_TOKENS = 16

_PROMPT_HELP = "JSON: passages and question, or prefix, chunks and suffix; - is standard input."


def explain(
    prompt_file: Annotated[str, Argument(metavar="PROMPT_FILE", help=_PROMPT_HELP)],
    html: Annotated[Path | None, Option(help="Write the report to this file.")] = None,
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    correction: Correction = None,
    store: KeptIn = None,
    max_new_tokens: NewTokens = 32,
    blame: Blame = None,
    device: Device = None,
    dtype: DType = None,
    json_file: Json = None,
) -> None:
    """Blend one prompt, show which chunks and tokens were reused, and hold the answer against full prefill's.

    Without --store, the chunks are stored first, and the call that is shown finds them.

    Example: hfblend explain prompt.json --html report.html

    Example: hfblend explain prompt.json --blame 60
    """
    require_folders_of(html, json_file)
    config, kept_in = config_of(ratio, selection, correction), None if store is None else store_at(store)
    loaded, tokenizer, (prompt, *others) = _read([prompt_file], model, device, dtype)
    if others:
        raise ValueError(f"explain takes one prompt, {prompt_file} holds {1 + len(others)}.")

    from ..display import Display
    from ..patching import patch

    with patch(loaded, config, tokenizer, kept_in, trace="full") as blender, told("Blending") as line:
        trace, verification, said = _both_ways(line, blender, prompt, max_new_tokens, prefill_before=kept_in is None)
        in_use = {"store": blender.store, "config": blender.config, "tokenizer": tokenizer}
    found = None
    if blame is not None:
        found = _blame_of(loaded, prompt, "the prompt", seconds=blame, num_tokens=max_new_tokens, **in_use)
    full_ms = said["full_prefill_ttft_ms"]
    after = "" if full_ms is None else f", first token after {full_ms:,.0f} ms"
    answers = {f"full prefill{after}": said["full_prefill_answer"], "blended": said["answer"]}
    answers["how far apart"] = str(verification)
    display = Display(trace, title="hfblend explain", answers=answers, blame=found)
    if html is not None:
        display.save(html)
    shown = shown_on(json_file)
    shown.print(display)
    for label, answer in answers.items():
        print_answer(label, answer, shown)
    if json_file is not None:
        compared = {name: value for name, value in verification.to_dict().items() if name != "trace"}
        blamed = {} if found is None else {"blame": found.to_dict()}
        write_json(json_file, {**said, "verification": compared, "trace": trace.to_dict(), **blamed})
    if html is not None:
        stderr.print(f"Wrote {html}", highlight=False, soft_wrap=True)


def _both_ways(
    line: Line, blender: Blender, prompt: Prompt, max_new_tokens: int, prefill_before: bool
) -> tuple[BlendTrace, Verification, dict[str, Any]]:
    """Answers a prompt after a full prefill and after blending, and compares them; `prefill_before` stores its chunks
    first. Returns the trace of the blended call, the distance, and the answers as JSON has them."""
    from ..demo.passages import greedy_answer

    if prefill_before:
        greedy_answer(blender.model, blender.tokenizer, prompt, 1)
    line.say("Prefilling in full")
    full_answer = greedy_answer(
        blender.model, blender.tokenizer, prompt, max_new_tokens, replace(blender.config, enabled=False)
    )
    full_ttft_ms = blender.trace.ttft_ms
    line.say("Blending")
    said = {
        "answer": greedy_answer(blender.model, blender.tokenizer, prompt, max_new_tokens),
        "full_prefill_answer": full_answer,
        "full_prefill_ttft_ms": full_ttft_ms,
        "chunks_prefilled_before": prefill_before,
    }
    trace = blender.trace
    if prefill_before:
        trace.notes.append("The chunks were stored just before this call: its hits say nothing about earlier ones.")
    line.say("Comparing the two")
    return trace, blender.verify(prompt, num_tokens=COMPARED_TOKENS), said


def run(
    prompt_files: Annotated[list[str], Argument(metavar="PROMPT_FILE", help=_PROMPT_HELP)],
    trace: Annotated[bool, Option("--trace", help="Show what was reused and recomputed.")] = False,
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    correction: Correction = None,
    store: KeptIn = None,
    max_new_tokens: NewTokens = 64,
    device: Device = None,
    dtype: DType = None,
    json_file: Json = None,
) -> None:
    """Answer the prompts of files, one after the other; chunks that they share are computed once.

    Example: hfblend run prompt.json --store chunks --trace

    Example: echo '{"passages": ["Ann was born in Hull.", "Bo is the son of Ann."], "question": "Where was Ann born?"}'
    | hfblend run -
    """
    require_folders_of(json_file)
    found: list[dict[str, Any]] = []
    config, kept_in = config_of(ratio, selection, correction), None if store is None else store_at(store)
    loaded, tokenizer, prompts = _read(prompt_files, model, device, dtype)

    from ..demo.passages import greedy_answer
    from ..display import Display
    from ..patching import patch

    with patch(loaded, config, tokenizer, kept_in, trace="tokens" if trace else "summary") as blender:
        for i, prompt in enumerate(prompts):
            with told(f"Answering prompt {i + 1} of {len(prompts)}"):
                answer = greedy_answer(blender.model, blender.tokenizer, prompt, max_new_tokens)
            found.append({"answer": answer, "trace": blender.trace.to_dict()})
            print_answer("", answer, shown_on(json_file))
            if trace:
                shown_on(json_file).print(Display(blender.trace))
    write_json(json_file, found)


def _read(
    files: Sequence[str], model: str | None, device: str | None, dtype: str | None
) -> tuple[Any, Any, list[Prompt]]:
    from .prompts import read_prompts

    loaded, tokenizer, _ = load(model, device, dtype)
    return loaded, tokenizer, [prompt for file in files for prompt in read_prompts(file, tokenizer)]


def config_of(ratio: float, selection: str | None, correction: str | None) -> BlendConfig:
    """The settings; without a lower limit on the length of a prompt."""
    chosen: dict[str, Any] = given(selection=selection) | corrected(correction)
    return BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0, **chosen)


def print_answer(label: str, answer: str, console: Console) -> None:
    """Prints an answer; nothing in it acts on the terminal."""
    from ..util import visible

    text = Text(f"{label}: " if label else "", style="bold")
    text.append("\n".join(visible(line) for line in answer.split("\n")), style="not bold")
    console.print(text, soft_wrap=True)


def verify(
    prompt_files: Annotated[list[str], Argument(metavar="PROMPT_FILE", help=_PROMPT_HELP)],
    model: Model = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    correction: Correction = None,
    store: KeptIn = None,
    max_kl: Annotated[float | None, Option(help="In nats; exit code 1 if a prompt's mean KL is above.")] = None,
    num_tokens: Annotated[int, Option(min=1, help="Answer tokens to compare.")] = COMPARED_TOKENS,
    blame: Blame = None,
    device: Device = None,
    dtype: DType = None,
    json_file: Json = None,
) -> None:
    """Blend the prompts of files and say how far each is from its full prefill.

    With --blame, each prompt whose answer is another gets the search.

    Example: hfblend verify prompts.json --max-kl 0.1 --json figures.json
    """
    require_folders_of(json_file)
    if max_kl is not None and not 0 <= max_kl < math.inf:
        raise ValueError(f"--max-kl must be a finite number of nats, 0 or more, got {max_kl}.")

    from ..demo.model import HUB_NAME
    from ..display.blame import renderables
    from ..store import MemoryStore

    config, kept_in = config_of(ratio, selection, correction), MemoryStore() if store is None else store_at(store)
    loaded, tokenizer, prompts = _read(prompt_files, model, device, dtype)
    found = _verified(loaded, prompts, kept_in, config, num_tokens)
    shown = shown_on(json_file)
    shown.print(_table(found, max_kl))
    figures = _figures(found, loaded, model or HUB_NAME, config, max_kl)
    for i, prompt in enumerate(prompts):
        if blame is not None and found[i].first_difference is not None:
            options = {"store": kept_in, "config": config, "tokenizer": tokenizer, "seconds": blame}
            why = _blame_of(loaded, prompt, f"prompt {i}", num_tokens=num_tokens, **options)
            shown.print(f"\nPrompt {i}", *renderables(why, shown.width), sep="\n")
            figures["prompts"][i]["blame"] = why.to_dict()
    write_json(json_file, figures)
    if any(_is_above(one, max_kl) for one in found):
        raise Exit(1)


def _verified(
    model: Any, prompts: Sequence[Prompt], store: Store, config: BlendConfig, num_tokens: int
) -> list[Verification]:
    """Verifies each prompt; chunks that prompts share are prefilled once."""
    from ..measure.verify import verify_prompt

    found = []
    with told("Comparing prompts", total=len(prompts)) as line:
        for prompt in prompts:
            found.append(verify_prompt(model, prompt, store=store, config=config, num_tokens=num_tokens))
            line.advance()
    return found


def _blame_of(model: Any, prompt: Prompt, name: str, **options: Any) -> FoundBlame:
    """Searches for what changed an answer."""
    from ..measure.blame import blame_prompt

    with told(f"Searching in {name}"):
        return blame_prompt(model, prompt, **options)


def _is_above(found: Verification, max_kl: float | None) -> bool:
    """Whether a KL exceeds the bound; NaN does."""
    return max_kl is not None and not found.kl <= max_kl


def _table(found: Sequence[Verification], max_kl: float | None) -> Table:
    """One row per prompt; a KL above the bound is red and marked."""
    table = Table(title=f"Blended against full prefill, {len(found[0].full_answer_ids)} tokens of its greedy answer")
    for name in ("prompt", "tokens", "chunks", "KL, nats", "top-1", "largest logit diff.", "answers part at", "pairs"):
        table.add_column(name, justify="right")
    for i, one in enumerate(found):
        table.add_row(
            str(i),
            str(one.trace.num_tokens),
            str(len(one.trace.chunks)),
            f"[red]{one.kl:.2e} ✗[/red]" if _is_above(one, max_kl) else f"{one.kl:.2e}",
            f"{one.top1_agreement:.0%}",
            f"{one.largest_logit_difference:.2e}",
            "–" if one.first_difference is None else f"token {one.first_difference}",
            f"{one.recomputed_pairs_share:.1%}",
        )
    return table


def _figures(
    found: Sequence[Verification], model: Any, name: str, config: BlendConfig, max_kl: float | None
) -> dict[str, Any]:
    from ..measure.divergence import describe_machine
    from ..support.registry import model_of

    return {
        "model": name,
        "machine": describe_machine(model_of(model).device),
        "selection": config.selection,
        "correction": config.correction,
        "recompute_ratio": config.fixed_ratios[0],
        "max_kl": max_kl,
        "prompts": [one.to_dict() for one in found],
    }
