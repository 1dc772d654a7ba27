"""`hfblend demo`: one question about twelve passages, answered by full prefill, full reuse and blending.

Measured per method: time to first token, share of (token, layer) pairs computed, closeness to the full prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..config import BlendConfig
from ..generate.blending import blend
from ..measure.divergence import describe_machine, kl_divergence, teacher_forced_logits, top1_agreement
from ..patching import Blender, patch
from ..prompts.filler import filler_ids
from ..prompts.prompt import Prompt
from ..trace.trace import BlendTrace
from .passages import FULL_PREFILL, NOTHING_RECOMPUTED, demo_data, demo_prompt, greedy_answer, greedy_ids

QUESTION = 2  # of those that come with the passages: it shows what full reuse loses, and blending brings back
REPEATS = 3
ANSWER_TOKENS = 32
FORCED_TOKENS = 16


# --- measuring --------------------------------------------------------------------------------------------------------


_REUSE = BlendConfig(chunk_prefix="filler", min_reused_tokens=0)
METHODS = {
    ("full_prefill", 1.0): FULL_PREFILL,
    ("full_reuse", 0.0): replace(_REUSE, **NOTHING_RECOMPUTED),
    **{("blend", ratio): replace(_REUSE, recompute_ratios=(ratio,)) for ratio in (0.15, 0.05)},
}


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

    @property
    def label(self) -> str:
        """As shown: `full prefill`, `blend 0.15`."""
        return f"blend {self.recompute_ratio}" if self.method == "blend" else self.method.replace("_", " ")


@dataclass
class Comparison:
    """All methods on one prompt, and the trace of its first (untimed) blended call."""

    prompt: Prompt
    runs: list[Run]
    first_trace: BlendTrace


STEPS = 1 + REPEATS * len(METHODS) + 1 + len(METHODS)  # reported by `compare`


def compare(blender: Blender, prompt: Prompt, advance: Callable[[], None]) -> Comparison:
    """Runs every method on a prompt.

    Args:
        blender: of the patched model, with a tokenizer.
        advance: called `STEPS` times, as the work goes on.
    """
    # 1. chunk KV into the store; not timed
    greedy_ids(blender.model, prompt, 1, _REUSE)
    first_trace = blender.trace
    advance()
    # 2. time to first token, the methods taking turns so that a slow moment of the machine affects all alike
    ttft_ms: dict[Any, list[float]] = {method: [] for method in METHODS}
    for method, config in REPEATS * list(METHODS.items()):
        greedy_ids(blender.model, prompt, 1, config)
        assert blender.trace.ttft_ms is not None
        ttft_ms[method].append(blender.trace.ttft_ms)
        advance()
    # 3. full prefill's text, not stopped by the end token, and its likelihood after each method
    forced_ids = greedy_ids(blender.model, prompt, FORCED_TOKENS, FULL_PREFILL, min_new_tokens=FORCED_TOKENS).tolist()
    full_logits = teacher_forced_logits(blender.model, prompt.input_ids, forced_ids)  # (P, V)
    advance()
    # 4. answers
    runs = []
    for method, config in METHODS.items():
        logits, share = full_logits, 1.0
        if config.enabled:
            filled = replace(config, filler_ids=filler_ids(blender.tokenizer))
            result = blend(blender.model, prompt, store=blender.store, config=filled)
            logits = teacher_forced_logits(blender.model, prompt.input_ids, forced_ids, result.cache)
            share = result.trace.recomputed_pairs_share
        answer = greedy_answer(blender.model, blender.tokenizer, prompt, ANSWER_TOKENS, config)
        kl, agreement = kl_divergence(full_logits, logits).mean().item(), top1_agreement(full_logits, logits)
        runs.append(Run(*method, median(ttft_ms[method]), kl, agreement, answer, share))
        advance()
    return Comparison(prompt, runs, first_trace)


# --- telling ----------------------------------------------------------------------------------------------------------


def run_demo(model: Any, tokenizer: Any, model_name: str, console: Console) -> dict[str, Any]:
    """Runs the passages in their order, then reversed; prints a table each.

    Returns:
        Numbers and strings, for JSON: `context_tokens`, `runs`, `reordered_runs`, `machine`, `model`, `dtype`.
    """
    data = demo_data()
    question, order = data["questions"][QUESTION]["question"], range(len(data["passages"]))
    forms = {"Passages in order": order, "The same passages reversed": order[::-1]}
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    comparisons = {}
    with patch(model, tokenizer=tokenizer) as blender, bar:
        for title, passages in forms.items():
            advance = partial(bar.advance, bar.add_task(title, total=STEPS))
            comparisons[title] = compare(blender, demo_prompt(tokenizer, data, question, passages), advance)
    machine, dtype = describe_machine(model.device), str(model.dtype).removeprefix("torch.")
    console.print(f"\n[bold]{question}[/bold]\n{model_name}, {dtype}, {machine}", highlight=False)
    for title, comparison in comparisons.items():
        console.print()
        console.print(_table(comparison, title))
        console.print(_answers(comparison))
        console.print(_reuse_line(comparison.first_trace), highlight=False)
    console.print(f"\n{_CAPTION}", highlight=False)
    first, reordered = comparisons.values()
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
    f"prefill's (token, layer) pairs. KL and top-1: against full prefill, over its first {FORCED_TOKENS} tokens. "
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
    for run in comparison.runs:
        times = (f"{run.ttft_ms:.0f}", f"{full_ms / run.ttft_ms:.1f}×")
        quality = (f"{run.recomputed_pairs_share:.1%}", f"{run.kl:.3f}", f"{run.top1_agreement:.0%}")
        table.add_row(run.label, *times, *quality)
    return table


def _answers(comparison: Comparison) -> Table:
    table = Table.grid(padding=(0, 2))
    for run in comparison.runs:
        table.add_row(Text(run.label, style="bold"), Text(run.answer))
    return table


def _reuse_line(trace: BlendTrace) -> str:
    moved = sum(chunk.cached_start != chunk.span[0] for chunk in trace.chunks)
    exact = sum(chunk.exact for chunk in trace.chunks)
    return (
        f"First call: {trace.hits} of {len(trace.chunks)} chunks hit, {trace.misses} prefilled alone; "
        f"{moved} reused at new positions, {exact} exact."
    )
