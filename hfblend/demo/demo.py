"""`hfblend demo`: one question about twelve passages, answered by full prefill, full reuse and blending.

Measured per method: time to first token, share of (token, layer) pairs computed, closeness to the full prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from ..measure.divergence import FullAnswer, describe_machine, kl_divergence, teacher_forced_logits, top1_agreement
from ..patching import Blender, patch
from ..prompts.filler import filler_ids
from ..prompts.prompt import Prompt
from ..trace.trace import BlendTrace
from .passages import FULL_PREFILL, NOTHING_RECOMPUTED, demo_data, demo_prompt, greedy_answer

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


STEPS = 1 + REPEATS * len(METHODS) + 1 + len(METHODS)  # reported by `compare`


def compare(blender: Blender, prompt: Prompt, advance: Callable[[], None]) -> tuple[list[Run], BlendTrace]:
    """Runs every method on a prompt.

    Args:
        blender: of the patched model, with a tokenizer.
        advance: called `STEPS` times, as the work goes on.

    Returns:
        The runs, and the trace of the first (untimed) blended call.
    """
    # 1. chunk KV into the store; not timed
    greedy_answer(blender.model, blender.tokenizer, prompt, 1, _REUSE)
    first_trace = blender.trace
    advance()
    # 2. time to first token, the methods taking turns so that a slow moment of the machine affects all alike
    ttft_ms: dict[Any, list[float]] = {method: [] for method in METHODS}
    for method, config in REPEATS * list(METHODS.items()):
        greedy_answer(blender.model, blender.tokenizer, prompt, 1, config)
        assert blender.trace.ttft_ms is not None
        ttft_ms[method].append(blender.trace.ttft_ms)
        advance()
    # 3. full prefill's text, not stopped by the end token, and its likelihood after each method
    full = FullAnswer.of(blender.model, prompt, FORCED_TOKENS)
    advance()
    # 4. answers
    runs = []
    for method, config in METHODS.items():
        logits, share = full.logits, 1.0
        if config.enabled:
            filled = replace(config, filler_ids=filler_ids(blender.tokenizer))
            result = blend(blender.model, prompt, store=blender.store, config=filled)
            logits = teacher_forced_logits(blender.model, prompt.input_ids, full.ids, result.cache)
            share = result.trace.recomputed_pairs_share
        answer = greedy_answer(blender.model, blender.tokenizer, prompt, ANSWER_TOKENS, config)
        kl, agreement = kl_divergence(full.logits, logits).mean().item(), top1_agreement(full.logits, logits)
        runs.append(Run(*method, median(ttft_ms[method]), kl, agreement, answer, share))
        advance()
    return runs, first_trace


# --- telling ----------------------------------------------------------------------------------------------------------


def run_demo(model: Any, tokenizer: Any, model_name: str, console: Console) -> dict[str, Any]:
    """Runs the passages in their order, then reversed; prints a table each.

    Returns:
        Numbers and strings, for JSON: `context_tokens`, `runs`, `reordered_runs`, `machine`, `model`, `dtype`.
    """
    data = demo_data()
    question, order = data["questions"][QUESTION]["question"], range(len(data["passages"]))
    forms = {"Passages in order": order, "The same passages reversed": order[::-1]}
    prompts = {title: demo_prompt(tokenizer, data, question, passages) for title, passages in forms.items()}
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
    with patch(model, tokenizer=tokenizer) as blender, bar:
        found = [
            compare(blender, prompt, partial(bar.advance, bar.add_task(title, total=STEPS)))
            for title, prompt in prompts.items()
        ]
    machine, dtype = describe_machine(model.device), str(model.dtype).removeprefix("torch.")
    console.print(f"\n[bold]{question}[/bold]\n{model_name}, {dtype}, {machine}", highlight=False)
    for (title, prompt), (runs, first_trace) in zip(prompts.items(), found):
        console.print()
        console.print(_table(runs, f"{title}: {len(prompt)} tokens"))
        console.print(_answers(runs))
        console.print(_reuse_line(first_trace), highlight=False)
    console.print(f"\n{_CAPTION}", highlight=False)
    return {
        "context_tokens": len(next(iter(prompts.values()))),
        "runs": [asdict(run) for run in found[0][0]],
        "reordered_runs": [asdict(run) for run in found[1][0]],
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


def _table(runs: Sequence[Run], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("TTFT ms", "speed-up", "computed", "KL nats", "top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    full_ms = runs[0].ttft_ms
    for run in runs:
        times = (f"{run.ttft_ms:.0f}", f"{full_ms / run.ttft_ms:.1f}×")
        quality = (f"{run.recomputed_pairs_share:.1%}", f"{run.kl:.3f}", f"{run.top1_agreement:.0%}")
        table.add_row(run.label, *times, *quality)
    return table


def _answers(runs: Sequence[Run]) -> Table:
    table = Table.grid(padding=(0, 2))
    for run in runs:
        table.add_row(Text(run.label, style="bold"), Text(run.answer))
    return table


def _reuse_line(trace: BlendTrace) -> str:
    moved = sum(chunk.cached_start != chunk.span[0] for chunk in trace.chunks)
    exact = sum(chunk.exact for chunk in trace.chunks)
    return (
        f"First call: {trace.hits} of {len(trace.chunks)} chunks hit, {trace.misses} prefilled alone; "
        f"{moved} reused at new positions, {exact} exact."
    )
