"""What the playground does, without its page: chunks, a question and settings in; answers, times and a trace out.

    Setup ──► Playground.run ──► Outcome ──► answers_html, store_line, chunk_line     (page.py shows these)

Nothing here knows a browser. All text that comes from people is escaped where it becomes HTML.
"""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, replace
from typing import Any, get_args

from ...config import BlendConfig, Selection
from ...display import Display
from ...display.text import escaped
from ...patching import patch
from ...prompts.prompt import Prompt
from ...trace.trace import BlendTrace, ChunkTrace
from ..demo import demo_data

ANSWER_TOKENS = 32
MAX_CHUNKS = 24
MAX_CHARACTERS = 100_000  # of a text, in units of UTF-16 as browsers count; messages to the server end at a million

_BLEND = BlendConfig(min_reused_tokens=0)
_FULL_PREFILL = BlendConfig(enabled=False)
_FULL_REUSE = replace(_BLEND, check_layers=(), recompute_ratios=())


@dataclass(frozen=True)
class Setup:
    """What a person has chosen.

    Raises:
        ValueError: something is missing or out of bounds; the message is shown on the page.
    """

    chunks: tuple[str, ...]
    question: str
    ratio: float = 0.15
    rule: Selection = "suffix_attention"

    def __post_init__(self) -> None:
        if not 1 <= len(self.chunks) <= MAX_CHUNKS:
            raise ValueError(f"The playground takes 1 to {MAX_CHUNKS} chunks, got {len(self.chunks)}.")
        for i, chunk in enumerate(self.chunks):
            if not chunk.strip():
                raise ValueError(f"Chunk {i} is empty. Write something into it, or remove it.")
        for name, text in (
            *((f"Chunk {i}", chunk) for i, chunk in enumerate(self.chunks)),
            ("The question", self.question),
        ):
            if len(text.encode("utf-16-le", "surrogatepass")) // 2 > MAX_CHARACTERS:
                raise ValueError(
                    f"{name} is longer than {MAX_CHARACTERS:,} characters; its end may be missing. Shorten it."
                )
        if not self.question.strip():
            raise ValueError("There is no question. Write one.")
        if self.rule not in get_args(Selection):
            raise ValueError(f"The rule must be one of {', '.join(get_args(Selection))}, got {self.rule!r}.")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"The ratio must lie between 0 and 1, got {self.ratio}.")

    @property
    def config(self) -> BlendConfig:
        """The settings of the blended answer."""
        return replace(_BLEND, selection=self.rule, recompute_ratios=(self.ratio,))


def prompt_of(tokenizer: Any, setup: Setup) -> Prompt:
    """The chunks in their order behind hfblend's system text; a chat where the tokenizer has a template."""
    documents = [chunk.strip() + "\n\n" for chunk in setup.chunks]
    system, ask = demo_data()["system"], f"Question: {setup.question.strip()}\nAnswer with a few words."
    if tokenizer.chat_template is None:
        texts = {"prefix": f"{system}\n\nPassages:\n", "suffix": f"{ask}\nAnswer:"}
        return Prompt.from_texts(tokenizer, chunks=documents, add_special_tokens=True, **texts)
    place = f"{{documents {uuid.uuid4().hex}}}"  # a question may say {documents}
    messages = [{"role": "system", "content": system}, {"role": "user", "content": f"Passages:\n{place}{ask}"}]
    return Prompt.from_chat(tokenizer, messages, documents, placeholder=place)


# --- results ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One method on the prompt.

    Attributes:
        method: `"full_prefill"`, `"full_reuse"` or `"blended"`.
        ttft_ms: from the call of `generate` to the first new token, once, on the wall clock, every chunk stored.
        computed_share: computed (token, layer) pairs over those of a full prefill.
        trace: of the call.
    """

    method: str
    text: str
    ttft_ms: float
    computed_share: float
    trace: BlendTrace


@dataclass(frozen=True)
class Outcome:
    """What `Playground.run` found.

    Attributes:
        answers: full prefill, full reuse, blended.
        found: for each chunk, whether its KV lay in the store when the button was pressed.
        storing_ms: time to first token of the call that stored the missing chunks; `None` if none was missing.
        repeated: whether full prefill and full reuse are those of the run before, as their prompt is the same.
    """

    setup: Setup
    prompt: Prompt
    answers: tuple[Answer, Answer, Answer]
    found: tuple[bool, ...]
    storing_ms: float | None
    repeated: bool

    @property
    def trace(self) -> BlendTrace:
        """Of the blended call."""
        return self.answers[-1].trace

    @property
    def tokens_html(self) -> str:
        """The blended call's trace, with every token: HTML without a script, all text escaped."""
        return Display(self.trace, title="What became of each token")._repr_html_()


# --- running ------------------------------------------------------------------------------------------------------


class Playground:
    """A patched model and its store; runs one setup at a time.

    >>> outcome = Playground(model, tokenizer).run(Setup(chunks, question))  # doctest: +SKIP
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.blender = patch(model, _BLEND, tokenizer=tokenizer, trace="tokens")
        self._one_at_a_time = threading.Lock()
        self._latest: tuple[Prompt, tuple[Answer, Answer]] | None = None

    def close(self) -> None:
        """Leaves the model as it was."""
        self.blender.remove()

    @property
    def is_busy(self) -> bool:
        """Whether a setup is running, say of another page."""
        return self._one_at_a_time.locked()

    def run(self, setup: Setup) -> Outcome:
        """Answers by full prefill, full reuse and blending, after every chunk was stored. Waits for its turn.

        Raises:
            ValueError: the prompt is longer than the model takes.
        """
        prompt = prompt_of(self.tokenizer, setup)
        self._require_room(prompt)
        with self._one_at_a_time:
            blended = self._answer("blended", prompt, setup.config)
            found = tuple(chunk.status != "miss" for chunk in blended.trace.chunks)
            storing_ms = None if all(found) else blended.ttft_ms
            if storing_ms is not None:  # once more, as every later call
                blended = self._answer("blended", prompt, setup.config)
            repeated = self._latest is not None and _same(self._latest[0], prompt)
            if self._latest is None or not repeated:
                full_reuse = self._answer("full_reuse", prompt, _FULL_REUSE)
                self._latest = prompt, (self._answer("full_prefill", prompt, _FULL_PREFILL), full_reuse)
            answers = (*self._latest[1], blended)
        return Outcome(setup, prompt, answers, found, storing_ms, repeated)

    def _answer(self, method: str, prompt: Prompt, config: BlendConfig) -> Answer:
        model = self.blender.model
        output = model.generate(
            **prompt.inputs(model.device), blend_config=config, max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        trace = self.blender.trace
        text = self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
        if config.enabled and not trace.blended:
            raise ValueError(f"This prompt is {trace}.")
        assert trace.ttft_ms is not None
        return Answer(method, text, trace.ttft_ms, trace.recomputed_pairs_share if trace.blended else 1.0, trace)

    def _require_room(self, prompt: Prompt) -> None:
        room = getattr(self.blender.model.config, "max_position_embeddings", None)
        if room is not None and len(prompt) + ANSWER_TOKENS > room:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens and the answer takes up to {ANSWER_TOKENS}, but this model was "
                f"made for {room}. Shorten or remove a chunk."
            )


def _same(one: Prompt, other: Prompt) -> bool:
    return one.ids == other.ids and one.chunk_spans == other.chunk_spans


# --- what the page shows ------------------------------------------------------------------------------------------


def answers_html(outcome: Outcome) -> str:
    """Full prefill, full reuse, blended: each one's words, time, and how it compares with full prefill."""
    slowest = max(answer.ttft_ms for answer in outcome.answers)
    full = outcome.answers[0]
    cards = "".join(
        f'<article class="answer {answer.method}"><h3>{answer.method.replace("_", " ")}</h3>'
        f'<p class="text">{escaped(answer.text) or "(nothing)"}</p>'
        f'<div class="bar"><i style="width:{100 * answer.ttft_ms / slowest:.0f}%"></i></div>'
        f'<p class="ttft"><b>{answer.ttft_ms:.0f} ms</b> to the first token</p>'
        f'<p class="note">{escaped(comparison(answer, full))}</p></article>'
        for answer in outcome.answers
    )
    return f'<div class="answers">{cards}</div>'


def comparison(answer: Answer, full: Answer) -> str:
    """An answer beside full prefill's: work, speed, words."""
    computed = f"{answer.computed_share:.0%} of the (token, layer) pairs computed"
    if answer is full:
        return computed
    words = "same words" if answer.text == full.text else "other words"
    return f"{computed} · {full.ttft_ms / answer.ttft_ms:.1f}× as fast as full prefill · {words}"


def chunk_line(chunk: ChunkTrace, found: bool) -> str:
    """`"hit · 38 → 120 · 74 tokens"`: how the chunk was found, where its keys were and are, its length."""
    start, stop = chunk.span
    place = f"exact at {start}" if chunk.exact else f"{chunk.cached_start} → {start}"
    return f"{'hit' if found else 'miss, stored now'} · {place} · {stop - start} tokens"


def store_line(outcome: Outcome) -> str:
    """What the store held, and what storing the rest cost."""
    total, hits = len(outcome.found), sum(outcome.found)
    if outcome.storing_ms is None:
        return f"All {total} chunks were in the store (hits)."
    return (
        f"{hits} of {total} chunks were in the store (hits), {total - hits} were not (misses). The call that stored "
        f"them took {outcome.storing_ms:.0f} ms to its first token; the times above are of the call after it."
    )
