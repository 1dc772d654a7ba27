"""The playground without its page: chunks, a question and settings in; answers, times and a trace out.

    Setup ──► Playground.run ──► Outcome     (page.py shows both)

Nothing here knows a browser.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...config import BlendConfig, Selection
from ...display import Display
from ...display.html import blame_html, rendered
from ...patching import patch
from ...prompts.prompt import Prompt
from ...trace.progress import Line, heard, told
from ...trace.trace import BlendTrace
from ..passages import (
    FULL_PREFILL,
    NOTHING_RECOMPUTED,
    data_file,
    demo_data,
    greedy_answer,
    passage_texts,
    question_prompt,
)

ANSWER_TOKENS = 32
BLAME_SECONDS = 60.0
MAX_CHUNKS = 24
MAX_CHARACTERS = 100_000  # of a text, in units of UTF-16 as browsers count; messages to the server end at a million

_BLEND = BlendConfig(min_reused_tokens=0)
_FULL_REUSE = replace(_BLEND, **NOTHING_RECOMPUTED)


@dataclass(frozen=True)
class Setup:
    """A user's choice of chunks, question and settings.

    Raises:
        ValueError: something is missing or out of bounds; the message is shown on the page.
    """

    chunks: tuple[str, ...]
    question: str
    ratio: float = 0.15
    rule: Selection = "suffix_attention"
    correction: Any = BlendConfig.correction

    def __post_init__(self) -> None:
        if not 1 <= len(self.chunks) <= MAX_CHUNKS:
            raise ValueError(f"The playground takes 1 to {MAX_CHUNKS} chunks, got {len(self.chunks)}.")
        texts = {f"Chunk {i}": chunk for i, chunk in enumerate(self.chunks)}
        for name, chunk in texts.items():
            if not chunk.strip():
                raise ValueError(f"{name} is empty. Write something into it, or remove it.")
        for name, text in (*texts.items(), ("The question", self.question)):
            if len(text.encode("utf-16-le", "surrogatepass")) // 2 > MAX_CHARACTERS:
                raise ValueError(
                    f"{name} is longer than {MAX_CHARACTERS:,} characters; its end may be missing. Shorten it."
                )
        if not self.question.strip():
            raise ValueError("There is no question. Write one.")
        _ = self.config  # refuses other rules and ratios

    @property
    def config(self) -> BlendConfig:
        """The settings of the blended answer."""
        return replace(_BLEND, selection=self.rule, recompute_ratios=(self.ratio,), correction=self.correction)

    def prompt(self, tokenizer: Any) -> Prompt:
        """The chunks in their order after hfblend's system text, then the question."""
        chunks = [chunk.strip() for chunk in self.chunks]
        return question_prompt(tokenizer, demo_data()["system"], chunks, self.question.strip())


def presets() -> dict[str, Setup]:
    """The setups that the page offers to begin with, by name; all written for hfblend.

    The first asks a question of the demo that SmolLM2-135M-Instruct answers right after full prefill and blended, and
    wrong after full reuse (notebook 1 says how it was found); the others have texts that depend on those before them.
    """
    data = demo_data()
    first = Setup(tuple(passage_texts(data, (0, 5, 4, 1))), data["questions"][3]["question"])
    others = data_file("playground.json").items()
    return {"The island's flag": first, **{name: Setup(tuple(p["chunks"]), p["question"]) for name, p in others}}


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One method on the prompt.

    Attributes:
        method: `"full_prefill"`, `"full_reuse"` or `"blended"`.
        ttft_ms: from the call of `generate` to the first new token, once, on the wall clock, every chunk stored.
        trace: of the call.
    """

    method: str
    text: str
    ttft_ms: float
    trace: BlendTrace

    @property
    def computed_share(self) -> float:
        """Computed (token, layer) pairs over those of a full prefill."""
        return self.trace.recomputed_pairs_share if self.trace.blended else 1.0

    def compared(self, full: Answer) -> str:
        """This answer against full prefill's: work, speed, words."""
        computed = f"{self.computed_share:.0%} of the (token, layer) pairs computed"
        if self is full:
            return computed
        words = "same words" if self.text == full.text else "other words"
        return f"{computed} · {full.ttft_ms / self.ttft_ms:.1f}× as fast as full prefill · {words}"


@dataclass(frozen=True)
class Outcome:
    """The result of `Playground.run`.

    Attributes:
        answers: full prefill, full reuse, blended.
        found: for each chunk, whether its KV lay in the store when the run began.
        storing_ms: time to first token of the call that stored the missing chunks; `None` if none was missing.
        repeated: whether full prefill and full reuse are those of the run before, as their prompt is the same.
    """

    prompt: Prompt
    answers: tuple[Answer, Answer, Answer]
    found: tuple[bool, ...]
    storing_ms: float | None
    repeated: bool

    @property
    def trace(self) -> BlendTrace:
        """The trace of the blended call."""
        return self.answers[-1].trace

    @property
    def answers_html(self) -> str:
        """The texts of full prefill, full reuse and blending, their times, and a comparison with full prefill."""
        slowest = max(answer.ttft_ms for answer in self.answers)
        return rendered("demo/playground/templates/answers.html.jinja", answers=self.answers, slowest=slowest)

    @property
    def tokens_html(self) -> str:
        """The blended call's trace, with every token."""
        after = "" if self.storing_ms is None else ", once the misses were stored"
        return Display(self.trace, title=f"What became of each token{after}")._repr_html_()

    @property
    def store_line(self) -> str:
        """The number of chunks that the store held, and the cost of storing the rest."""
        total, hits = len(self.found), sum(self.found)
        if self.storing_ms is None:
            return f"All {total} chunks were in the store (hits)."
        return (
            f"{hits} of {total} chunks were in the store (hits), {total - hits} were not (misses). The call that "
            f"stored them took {self.storing_ms:.0f} ms to its first token; the times above are of the call after it."
        )

    @property
    def run_line(self) -> str:
        """The size of the prompt, and the number of recomputed tokens."""
        candidates = 0 if self.trace.candidate_idx is None else len(self.trace.candidate_idx)
        recomputed = f"{self.trace.selected_tokens} of {candidates} reused tokens recomputed."
        return f"{len(self.prompt)} tokens in {len(self.found)} chunks; {recomputed}"

    @property
    def chunk_lines(self) -> list[str]:
        """`"hit · 38 → 120 · 74 tokens"`: how each chunk was found, old and new position of its keys, its length."""
        lines = []
        for chunk, found in zip(self.trace.chunks, self.found):
            start, stop = chunk.span
            moved = f"computed at {start}" if chunk.cached_start is None else f"{chunk.cached_start} → {start}"
            place = f"exact at {start}" if chunk.exact else moved
            lines.append(f"{'hit' if found else 'miss, stored now'} · {place} · {stop - start} tokens")
        return lines


class _Counter:
    """A streamer for `generate` that counts tokens."""

    def __init__(self, line: Line) -> None:
        self._line, self._is_prompt = line, True

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt's ids, then with those of each token."""
        self._line.advance(0 if self._is_prompt else 1)
        self._is_prompt = False

    def end(self) -> None:
        """Called by `generate` after the last token."""


class Playground:
    """A patched model and its store; runs one setup at a time.

    >>> outcome = Playground(model, tokenizer).run(Setup(chunks, question))  # doctest: +SKIP
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.blender = patch(model, _BLEND, tokenizer=tokenizer, trace="tokens")
        self._one_at_a_time = threading.Lock()
        self._latest: tuple[Any, tuple[Answer, Answer]] | None = None

    def close(self) -> None:
        """Leaves the model as it was."""
        self.blender.remove()

    @contextmanager
    def _turn(self, setup: Setup, progress: Callable[[str], None]) -> Iterator[Prompt]:
        """Waits for this setup's turn; gives its prompt, while `progress` hears what goes on."""
        prompt = setup.prompt(self.blender.tokenizer)
        self._require_room(prompt)
        while not self._one_at_a_time.acquire(timeout=0.2):
            progress("Waiting for the run of another page …")
        try:
            with heard(lambda line: progress(str(line))):
                yield prompt
        finally:
            self._one_at_a_time.release()

    def run(self, setup: Setup, progress: Callable[[str], None] = lambda text: None) -> Outcome:
        """Answers by full prefill, full reuse and blending, after every chunk was stored. Waits for its turn.

        Args:
            progress: called with a line of text at each chunk and token; what it raises ends the run.

        Raises:
            ValueError: the prompt is longer than the model takes.
        """
        with self._turn(setup, progress) as prompt:
            blended = self._answer("blended", prompt, setup.config)
            found = tuple(chunk.status in ("hit", "unused") for chunk in blended.trace.chunks)
            storing_ms = None if all(found) else blended.ttft_ms
            if storing_ms is not None:  # the time to show is that of a later call
                blended = self._answer("blended", prompt, setup.config)
            content = prompt.ids, prompt.chunk_spans
            repeated = self._latest is not None and self._latest[0] == content
            if self._latest is None or not repeated:
                full_reuse = self._answer("full_reuse", prompt, _FULL_REUSE)
                self._latest = content, (self._answer("full_prefill", prompt, FULL_PREFILL), full_reuse)
            answers = (*self._latest[1], blended)
        return Outcome(prompt, answers, found, storing_ms, repeated)

    def blame(self, setup: Setup, progress: Callable[[str], None]) -> str:
        """Searches for what changed the blended answer; returns it as HTML. Waits for its turn.

        Args:
            progress: called with a line of text after each blend and chunk; what it raises ends the search.

        Raises:
            ValueError: the prompt is longer than the model takes.
        """
        with self._turn(setup, progress) as prompt:
            found = self.blender.blame(prompt, config=setup.config, num_tokens=ANSWER_TOKENS, seconds=BLAME_SECONDS)
            return blame_html(found)

    def _answer(self, method: str, prompt: Prompt, config: BlendConfig) -> Answer:
        with told(f"Answering: {method.replace('_', ' ')}", total=ANSWER_TOKENS) as line:
            streamer = _Counter(line)
            text = greedy_answer(self.blender.model, self.blender.tokenizer, prompt, ANSWER_TOKENS, config, streamer)
        trace = self.blender.trace
        if config.enabled and not trace.blended:
            raise ValueError(f"This prompt is {trace}.")
        assert trace.ttft_ms is not None
        return Answer(method, text, trace.ttft_ms, trace)

    def _require_room(self, prompt: Prompt) -> None:
        room = getattr(self.blender.model.config, "max_position_embeddings", None)
        if room is not None and len(prompt) + ANSWER_TOKENS > room:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens and the answer takes up to {ANSWER_TOKENS}, but this model was "
                f"made for {room}. Shorten or remove a chunk."
            )
