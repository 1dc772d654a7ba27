"""`hfblend explain` and `hfblend run`: prompts from files, blended, answered, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..config import BlendConfig
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
    given,
    in_words,
    print_json,
    store_at,
)

if TYPE_CHECKING:
    from ..display import Display
    from ..measure.verify import Verification
    from ..patching import Blender
    from ..prompts.prompt import Prompt
    from ..trace.trace import BlendTrace

COMPARED_TOKENS = 16

_PROMPT_HELP = "JSON: prefix, chunks, question; - is standard input."


def explain(
    prompt_file: Annotated[str, typer.Argument(metavar="PROMPT_FILE", help=_PROMPT_HELP)],
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
        loaded, tokenizer, (prompt, *others) = _read([prompt_file], model, device, dtype)
        if others:
            raise ValueError(f"explain takes one prompt, {prompt_file} holds {1 + len(others)}.")

        from ..patching import patch

        with (
            stderr.status("Blending, and prefilling in full …"),
            patch(loaded, config, tokenizer, kept_in, trace="full") as blender,
        ):
            explained = Explained.of(blender, prompt, max_new_tokens, prefill_before=kept_in is None)
        if html is not None:
            explained.display().save(html)
    if as_json:
        print_json(explained.to_dict())
    else:
        console.print(explained.display())
        for label, answer in explained.answers.items():
            print_answer(label, answer)
    if html is not None:
        stderr.print(f"Wrote {html}", highlight=False, soft_wrap=True)


def run(
    prompt_files: Annotated[list[str], typer.Argument(metavar="PROMPT_FILE…", help=_PROMPT_HELP)],
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
    found: list[dict[str, Any]] = []
    with in_words():
        config, kept_in = config_of(ratio, selection), None if store is None else store_at(store)
        loaded, tokenizer, prompts = _read(prompt_files, model, device, dtype)

        from ..demo.passages import greedy_answer
        from ..display import Display
        from ..patching import patch

        with patch(loaded, config, tokenizer, kept_in, trace="tokens" if trace else "summary") as blender:
            for prompt in prompts:
                answer = greedy_answer(blender.model, blender.tokenizer, prompt, max_new_tokens)
                found.append({"answer": answer, "trace": blender.trace.to_dict()})
                if not as_json:
                    print_answer("", answer)
                    if trace:
                        console.print(Display(blender.trace))
    if as_json:
        print_json(found)


def _read(
    files: Sequence[str], model: str | None, device: str | None, dtype: str | None
) -> tuple[Any, Any, list[Prompt]]:
    from ..demo import model as demo_model
    from .prompts import read_prompts

    loaded, tokenizer = demo_model.load(model, device, dtype_of(dtype))
    return loaded, tokenizer, [prompt for file in files for prompt in read_prompts(file, tokenizer)]


def config_of(ratio: float, selection: str | None) -> BlendConfig:
    """The settings; without a lower limit on the length of a prompt."""
    return BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=0, **given(selection=selection))


@dataclass(frozen=True)
class Explained:
    """One prompt, both ways.

    Attributes:
        trace: of the blended call, level `"full"`.
        answer, full_answer: greedy, after blending and after a full prefill.
        full_ttft_ms: of the full prefill.
        verification: the distance between the two.
        prefilled_before: whether this command stored the chunks before the call that is shown.
    """

    trace: BlendTrace
    answer: str
    full_answer: str
    full_ttft_ms: float | None
    verification: Verification
    prefilled_before: bool

    @classmethod
    def of(cls, blender: Blender, prompt: Prompt, max_new_tokens: int, prefill_before: bool) -> Explained:
        """Blends a prompt, and prefills it in full; `prefill_before` stores its chunks first."""
        from ..demo.passages import greedy_answer

        if prefill_before:
            greedy_answer(blender.model, blender.tokenizer, prompt, 1)
        full_answer = greedy_answer(
            blender.model, blender.tokenizer, prompt, max_new_tokens, replace(blender.config, enabled=False)
        )
        full_ttft_ms = blender.trace.ttft_ms
        answer = greedy_answer(blender.model, blender.tokenizer, prompt, max_new_tokens)
        trace = blender.trace
        verification = blender.verify(prompt, num_tokens=COMPARED_TOKENS)
        return cls(trace, answer, full_answer, full_ttft_ms, verification, prefill_before)

    @property
    def answers(self) -> dict[str, str]:
        """Labels and texts: both answers, and their distance."""
        full_ms = "" if self.full_ttft_ms is None else f", first token after {self.full_ttft_ms:,.0f} ms"
        distance = {"how far apart": str(self.verification)}
        return {f"full prefill{full_ms}": self.full_answer, "blended": self.answer, **distance}

    def display(self) -> Display:
        """The view, with the answers."""
        from ..display import Display

        return Display(self.trace, title="hfblend explain", answers=self.answers)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON."""
        return {
            "answer": self.answer,
            "full_prefill_answer": self.full_answer,
            "full_prefill_ttft_ms": self.full_ttft_ms,
            "chunks_prefilled_before": self.prefilled_before,
            "verification": {name: v for name, v in self.verification.to_dict().items() if name != "trace"},
            "trace": self.trace.to_dict(),
        }


def print_answer(label: str, answer: str) -> None:
    """Prints an answer; nothing in it acts on the terminal."""
    from ..util import visible

    text = Text(f"{label}: " if label else "", style="bold")
    text.append("\n".join(visible(line) for line in answer.split("\n")), style="not bold")
    console.print(text, soft_wrap=True)
