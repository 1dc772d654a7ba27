"""`hfblend explain` and `hfblend run`: prompts from files, blended, answered, and shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .config import BlendConfig
from .display import Display
from .display.text import visible
from .patching import Blender, patch
from .prompt import Prompt
from .store import Store
from .trace import BlendTrace, Level
from .verification import Verification
from .verification_report import prompt_of_row

COMPARED_TOKENS = 16


def read_prompts(source: str, tokenizer: Any) -> list[Prompt]:
    """The prompts of a JSON file, one object or a list of them; `-` is standard input.

        {"prefix": "…", "chunks": ["…", "…"], "suffix": "…"}         "question" says the same as "suffix"
        {"question": "…", "ctxs": [{"title": "…", "text": "…"}]}     a chat about passages, where there is a template

    Raises:
        ValueError: a source that does not have this form; the message names it.
    """
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        rows = json.loads(text)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    rows = rows if isinstance(rows, list) else [rows]
    if not rows:
        raise ValueError(f"{name} holds no prompt.")
    return [prompt_of_row(_complete(row), f"{name}, prompt {i}", tokenizer) for i, row in enumerate(rows)]


def _complete(row: Any) -> Any:
    """With a prefix, and a suffix in the place of a question about chunks."""
    if not isinstance(row, dict) or "chunks" not in row:
        return row
    return {"prefix": "", **({"suffix": row["question"]} if "question" in row else {}), **row}


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


def explain(
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


def run(
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
