"""`hfblend demo`: one question about twelve passages, answered by full prefill, full reuse and blending.

Measured per method: time to first token, share of (token, layer) pairs computed, closeness to the full prefill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..config import BlendConfig
from ..generate.blend_one import blend
from ..measure.divergence import describe_machine, kl_divergence, teacher_forced_logits, top1_agreement
from ..patching import Blender, patch
from ..prompts.filler import filler_ids
from ..prompts.prompt import Prompt
from ..trace.trace import BlendTrace

QUESTION = 2  # of those that come with the passages: it shows what full reuse loses, and blending brings back
REPEATS = 3
ANSWER_TOKENS = 32
FORCED_TOKENS = 16


@dataclass(frozen=True)
class Method:
    """A way to prefill: its name, the ratio to show, the settings that make it."""

    name: str
    recompute_ratio: float
    config: BlendConfig

    @property
    def label(self) -> str:
        """As shown: `full prefill`, `blend 0.15`."""
        return f"blend {self.recompute_ratio}" if self.name == "blend" else self.name.replace("_", " ")


_REUSE = BlendConfig(chunk_prefix="filler", min_reused_tokens=0)


def _blend_at(ratio: float) -> Method:
    return Method("blend", ratio, replace(_REUSE, recompute_ratios=(ratio,)))


FULL_PREFILL = Method("full_prefill", 1.0, BlendConfig(enabled=False))
FULL_REUSE = Method("full_reuse", 0.0, replace(_REUSE, check_layers=(), recompute_ratios=()))
METHODS = (FULL_PREFILL, FULL_REUSE, _blend_at(0.15), _blend_at(0.05))


@dataclass
class Run:
    """One method on one prompt.

    Attributes:
        ttft_ms: time to first token, median of the repetitions.
        kl: KL(full prefill || this) in nats, mean over forced tokens.
        top1_agreement: share of forced tokens with the full prefill's most likely token.
        answer: greedy.
        recomputed_pairs_share: computed (token, layer) pairs over those of a full prefill.
    """

    method: str
    recompute_ratio: float
    ttft_ms: float
    kl: float
    top1_agreement: float
    answer: str
    recomputed_pairs_share: float


@dataclass
class Comparison:
    """All methods on one prompt, and the trace of its first (untimed) blended call."""

    prompt: Prompt
    runs: list[Run]
    first_trace: BlendTrace


def demo_data() -> dict[str, Any]:
    """The system text, the passages and the questions that come with hfblend."""
    return json.loads(resources.files("hfblend").joinpath("data/passages.json").read_text(encoding="utf-8"))


def demo_prompt(tokenizer: Any, data: dict[str, Any], question: str, order: Sequence[int]) -> Prompt:
    """The passages in `order`, as chunks of a chat where the tokenizer has a template, else of plain text."""
    documents = [f"{p['title']}: {p['text']}\n\n" for p in (data["passages"][i] for i in order)]
    ask = f"Question: {question}\nAnswer with a few words."
    if tokenizer.chat_template is None:
        prefix = f"{data['system']}\n\nPassages:\n"
        return Prompt.from_texts(
            tokenizer, prefix=prefix, chunks=documents, suffix=f"{ask}\nAnswer:", add_special_tokens=True
        )
    messages = [
        {"role": "system", "content": data["system"]},
        {"role": "user", "content": f"Passages:\n{{documents}}{ask}"},
    ]
    return Prompt.from_chat(tokenizer, messages, documents)


def compare(blender: Blender, tokenizer: Any, prompt: Prompt, advance: Callable[[], None]) -> Comparison:
    """Runs every method on a prompt.

    Args:
        blender: of the patched model.
        advance: called `STEPS` times, as the work goes on.
    """

    def generate(method: Method, num_tokens: int, **kwargs: Any) -> list[int]:
        inputs = prompt.inputs(blender.model.device)
        output = blender.model.generate(
            **inputs, blend_config=method.config, max_new_tokens=num_tokens, do_sample=False, **kwargs
        )
        advance()
        return output[0, len(prompt) :].tolist()

    # 1. chunk KV into the store, or out of it; not timed
    generate(METHODS[-1], 1)
    first_trace = blender.trace
    # 2. time to first token, the methods taking turns so that a slow moment of the machine strikes all alike
    ttft_ms: dict[Method, list[float]] = {method: [] for method in METHODS}
    for _ in range(REPEATS):
        for method in METHODS:
            generate(method, 1)
            ttft_ms[method].append(_ttft_ms(blender.trace))
    # 3. what full prefill says, and how likely each method finds it; the end token does not stop it
    forced_ids = generate(FULL_PREFILL, FORCED_TOKENS, min_new_tokens=FORCED_TOKENS)
    full_logits = teacher_forced_logits(blender.model, prompt.input_ids, forced_ids)  # (P, V)
    advance()
    # 4. answers
    runs = []
    for method in METHODS:
        logits, share = full_logits, 1.0
        if method is not FULL_PREFILL:
            config = replace(method.config, filler_ids=filler_ids(tokenizer))
            result = blend(blender.model, prompt, store=blender.store, config=config)
            logits = teacher_forced_logits(blender.model, prompt.input_ids, forced_ids, result.cache)
            share = result.trace.recomputed_pairs_share
            advance()
        answer = tokenizer.decode(generate(method, ANSWER_TOKENS), skip_special_tokens=True).strip()
        kl = kl_divergence(full_logits, logits).mean().item()
        agreement = top1_agreement(full_logits, logits)
        runs.append(Run(method.name, method.recompute_ratio, median(ttft_ms[method]), kl, agreement, answer, share))
    return Comparison(prompt, runs, first_trace)


STEPS = 1 + REPEATS * len(METHODS) + 2 + 2 * len(METHODS) - 1  # what `compare` reports


def _ttft_ms(trace: BlendTrace) -> float:
    assert trace.ttft_ms is not None
    return trace.ttft_ms


def run_demo(model: Any, tokenizer: Any, model_name: str, console: Console) -> dict[str, Any]:
    """The passages in their order, then reversed; prints a table each.

    Returns:
        Numbers and strings, for JSON: `context_tokens`, `runs`, `reordered_runs`, `machine`, `model`, `dtype`.
    """
    data = demo_data()
    question = data["questions"][QUESTION]["question"]
    order = list(range(len(data["passages"])))
    forms = (("Passages in order", order), ("The same passages reversed", order[::-1]))
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    with patch(model, tokenizer=tokenizer) as blender, bar:
        comparisons = []
        for title, passages in forms:
            task = bar.add_task(title, total=STEPS)
            prompt = demo_prompt(tokenizer, data, question, passages)
            comparisons.append(compare(blender, tokenizer, prompt, partial(bar.advance, task)))
    machine, dtype = describe_machine(model.device), str(model.dtype).removeprefix("torch.")
    first, reordered = comparisons
    console.print(f"\n[bold]{question}[/bold]\n{model_name}, {dtype}, {machine}", highlight=False)
    for comparison, (title, _) in zip(comparisons, forms):
        console.print()
        console.print(_table(comparison, title))
        console.print(_answers(comparison))
        console.print(_reuse_line(comparison), highlight=False)
    console.print(f"\n{_CAPTION}", highlight=False)
    return {
        "context_tokens": len(first.prompt),
        "runs": [asdict(run) for run in first.runs],
        "reordered_runs": [asdict(run) for run in reordered.runs],
        "machine": machine,
        "model": model_name,
        "dtype": dtype,
    }


_CAPTION = (
    f"[dim]TTFT: time to first token, chunks already stored, median of {REPEATS} turns. Computed: share of a full "
    f"prefill's (token, layer) pairs. KL and top-1: against full prefill, over {FORCED_TOKENS} tokens of its own text. "
    "The passages were written so that the default model answers in these two orders after a full prefill. So this "
    "shows the mechanism; it does not measure accuracy: of six such questions, in both orders, that model answers 12 "
    "of 12 after full prefill, 7 after full reuse and 8 after either blend. Where an answer differs from full "
    "prefill's, reuse changed it.[/dim]"
)


def _table(comparison: Comparison, title: str) -> Table:
    table = Table(title=f"{title}: {len(comparison.prompt)} tokens", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("TTFT ms", "speed-up", "computed", "KL nats", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    full_ms = comparison.runs[0].ttft_ms
    for method, run in zip(METHODS, comparison.runs):
        table.add_row(
            method.label,
            f"{run.ttft_ms:.0f}",
            f"{full_ms / run.ttft_ms:.1f}×",
            f"{run.recomputed_pairs_share:.1%}",
            f"{run.kl:.3f}",
            f"{run.top1_agreement:.0%}",
        )
    return table


def _answers(comparison: Comparison) -> Table:
    table = Table.grid(padding=(0, 2))
    for method, run in zip(METHODS, comparison.runs):
        table.add_row(Text(method.label, style="bold"), Text(run.answer))
    return table


def _reuse_line(comparison: Comparison) -> str:
    trace = comparison.first_trace
    moved = sum(chunk.cached_start != chunk.span[0] for chunk in trace.chunks)
    exact = sum(chunk.exact for chunk in trace.chunks)
    return (
        f"First call: {trace.hits} of {len(trace.chunks)} chunks hit, {trace.misses} prefilled alone; "
        f"{moved} reused at new positions, {exact} exact."
    )
