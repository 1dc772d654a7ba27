"""`hfblend explain` and `hfblend run`: prompts from files, blended, answered, and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..config import BlendConfig
from ..demo import model as demo_model
from ..display import Display
from ..display.text import visible
from ..measure.verify import Verification
from ..patching import Blender, patch
from ..prompts.prompt import Prompt
from ..store import Store
from ..trace.trace import BlendTrace, Level
from ..util import require_folders_of
from .common import (
    Device,
    DType,
    KeptIn,
    Model,
    NewTokens,
    PrintJson,
    Ratio,
    Rule,
    console,
    dtype_of,
    in_words,
    print_json,
    store_at,
)
from .prompts import read_prompts

COMPARED_TOKENS = 16

PromptFiles = Annotated[
    list[str], typer.Argument(metavar="PROMPT_FILE…", help="JSON: prefix, chunks, question; - is standard input.")
]


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
    stderr = Console(stderr=True)
    with in_words():
        require_folders_of(html)
        config, kept_in = config_of(ratio, selection), None if store is None else store_at(store)
        loaded, tokenizer = demo_model.load(model, device, dtype_of(dtype))
        prompt, *others = read_prompts(prompt_file, tokenizer)
        if others:
            raise ValueError(f"explain takes one prompt, {prompt_file} holds {1 + len(others)}.")
        with stderr.status("Blending, and prefilling in full …"):
            explained = _explain(loaded, tokenizer, prompt, config, kept_in, max_new_tokens)
        if html is not None:
            explained.display().save(html)
    if as_json:
        print_json(explained.to_dict())
    else:
        console.print(explained.display())
        for label, answer in explained.display().answers.items():
            print_answer(console, label, answer)
    if html is not None:
        stderr.print(f"Wrote {html}", highlight=False, soft_wrap=True)


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
    found = []
    with in_words():
        config, kept_in = config_of(ratio, selection), None if store is None else store_at(store)
        loaded, tokenizer = demo_model.load(model, device, dtype_of(dtype))
        prompts = [prompt for file in prompt_files for prompt in read_prompts(file, tokenizer)]
        level: Any = "tokens" if trace else "summary"
        for answer, done in _answers(loaded, tokenizer, prompts, config, kept_in, max_new_tokens, level):
            found.append({"answer": answer, "trace": done.to_dict()})
            if not as_json:
                print_answer(console, "", answer)
                if trace:
                    console.print(Display(done))
    if as_json:
        print_json(found)


def config_of(ratio: float, selection: str | None) -> BlendConfig:
    """The settings; a prompt that is given to be blended is blended, however short."""
    chosen: dict[str, Any] = {} if selection is None else {"selection": selection}
    return BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0, **chosen)


@dataclass(frozen=True)
class Explained:
    """One prompt, both ways.

    Attributes:
        trace: of the blended call, level `"full"`.
        answer, full_answer: greedy, after blending and after a full prefill.
        full_ttft_ms: of the full prefill.
        verification: how far apart they are.
        prefilled_before: whether the chunks were stored by this command before the call that is shown.
    """

    trace: BlendTrace
    answer: str
    full_answer: str
    full_ttft_ms: float | None
    verification: Verification
    prefilled_before: bool

    def display(self) -> Display:
        """The view, with the answers."""
        full_ms = "" if self.full_ttft_ms is None else f", first token after {self.full_ttft_ms:,.0f} ms"
        answers = {
            f"full prefill{full_ms}": self.full_answer,
            "blended": self.answer,
            "how far apart": str(self.verification),
        }
        return Display(self.trace, title="hfblend explain", answers=answers)

    def to_dict(self) -> dict[str, Any]:
        """Plain, for JSON."""
        return {
            "answer": self.answer,
            "full_prefill_answer": self.full_answer,
            "full_prefill_ttft_ms": self.full_ttft_ms,
            "chunks_prefilled_before": self.prefilled_before,
            "verification": {name: v for name, v in self.verification.to_dict().items() if name != "trace"},
            "trace": self.trace.to_dict(),
        }


def _explain(
    model: Any, tokenizer: Any, prompt: Prompt, config: BlendConfig, store: Store | str | None, max_new_tokens: int
) -> Explained:
    """Blends a prompt, and prefills it in full.

    Args:
        store: where chunks are looked up. `None`: one of its own, in which they are stored first, so that what is shown
            is a call that finds them.
    """
    with patch(model, config, tokenizer, store, trace="full") as blender:
        if store is None:
            _answer(blender, prompt, 1)
        full_answer = _answer(blender, prompt, max_new_tokens, replace(config, enabled=False))
        full_ttft_ms = blender.trace.ttft_ms
        answer = _answer(blender, prompt, max_new_tokens)
        trace = blender.trace
        verification = blender.verify(prompt, num_tokens=COMPARED_TOKENS)
    return Explained(trace, answer, full_answer, full_ttft_ms, verification, store is None)


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: BlendConfig,
    store: Store | str | None,
    max_new_tokens: int,
    level: Level,
) -> Iterator[tuple[str, BlendTrace]]:
    """Answers prompts one after the other, chunks shared between them."""
    with patch(model, config, tokenizer, store, trace=level) as blender:
        for prompt in prompts:
            yield _answer(blender, prompt, max_new_tokens), blender.trace


def _answer(blender: Blender, prompt: Prompt, max_new_tokens: int, config: BlendConfig | None = None) -> str:
    output = blender.model.generate(
        **prompt.inputs(blender.model.device), blend_config=config, max_new_tokens=max_new_tokens, do_sample=False
    )
    return blender.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()


def print_answer(console: Console, label: str, answer: str) -> None:
    """An answer, none of which acts on the terminal."""
    text = Text(f"{label}: " if label else "", style="bold")
    text.append("\n".join(visible(line) for line in answer.split("\n")), style="not bold")
    console.print(text, soft_wrap=True)
