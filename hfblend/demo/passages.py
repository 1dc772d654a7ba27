"""The passages that come with hfblend, prompts of passages and a question, and greedy answers to them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from importlib import resources
from typing import Any

from rich.console import Console

from ..config import BlendConfig
from ..prompts.prompt import Prompt
from ..trace.progress import Line
from ..util import visible

FULL_PREFILL = BlendConfig(enabled=False)
NOTHING_RECOMPUTED: dict[str, Any] = {"check_layers": (), "recompute_ratios": ()}


def data_file(name: str) -> dict[str, Any]:
    """A JSON file of hfblend's `data` folder."""
    return json.loads(resources.files("hfblend").joinpath("data", name).read_text(encoding="utf-8"))


def demo_data() -> dict[str, Any]:
    """The system text, the passages and the questions that come with hfblend."""
    return data_file("passages.json")


def passage_texts(data: dict[str, Any], order: Sequence[int]) -> list[str]:
    """The passages in `order`, each after its title."""
    return [f"{data['passages'][i]['title']}: {data['passages'][i]['text']}" for i in order]


def demo_prompt(tokenizer: Any, data: dict[str, Any], question: str, order: Sequence[int]) -> Prompt:
    """The passages in `order`, and the question."""
    return question_prompt(tokenizer, data["system"], passage_texts(data, order), question)


def question_prompt(tokenizer: Any, system: str, passages: Sequence[str], question: str) -> Prompt:
    """The passages as chunks of a chat if the tokenizer has a template, else of plain text; then the question."""
    documents, ask = [f"{text}\n\n" for text in passages], f"Question: {question}\nAnswer with a few words."
    if tokenizer.chat_template is None:
        texts = {"prefix": f"{system}\n\nPassages:\n", "suffix": f"{ask}\nAnswer:"}
        return Prompt.from_texts(tokenizer, chunks=documents, add_special_tokens=True, **texts)
    place = f"{{documents {uuid.uuid4().hex}}}"  # a question may contain {documents}
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Passages:\n{place}{ask}"}]
    return Prompt.from_chat(tokenizer, messages, documents, placeholder=place)


def greedy_answer(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    num_tokens: int,
    config: BlendConfig | None = None,
    streamer: Any = None,
) -> str:
    """The text of a greedy answer of a patched model; `config=None` takes its blender's settings."""
    options = {"blend_config": config, "max_new_tokens": num_tokens, "do_sample": False, "streamer": streamer}
    ids = model.generate(**prompt.inputs(model.device), **options)
    return tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


class Typed:
    """A streamer for `generate`: prints an answer as its tokens come, and ends the line of progress at the first."""

    def __init__(self, tokenizer: Any, console: Console, line: Line, label: str = "") -> None:
        self._tokenizer, self._console, self._line, self._label = tokenizer, console, line, label
        self._ids: list[int] | None = None
        self._shown = ""

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt's ids, then with those of each token."""
        if self._ids is None:
            self._ids = []
            return
        self._line.stop()
        if not self._ids and self._label:
            self._console.print(self._label, end="", style="bold")
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip()
        if not text.endswith("\ufffd"):  # part of a character
            self._print(text)

    def end(self) -> None:
        """Called by `generate` after the last token."""
        self._print(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip())
        self._console.print()

    def _print(self, text: str) -> None:
        new, self._shown = text[len(self._shown) :], text
        lines = "\n".join(map(visible, new.split("\n")))
        self._console.print(lines, end="", markup=False, highlight=False, soft_wrap=True)
