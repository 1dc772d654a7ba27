"""`hfblend verify`: prompts from a file, each blended and held against its full prefill, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .config import BlendConfig
from .evaluation.data import Example, prompt_of, titled
from .measures import describe_machine
from .models import host_of
from .prompt import Prompt
from .store import MemoryStore
from .verification import Verification, verify_prompt


def prompt_of_row(row: Any, where: str, tokenizer: Any) -> Prompt:
    """The prompt of an object in a file of prompts; errors say `where` it stands."""
    names = set(row) if isinstance(row, dict) else set()
    try:
        if {"prefix", "chunks", "suffix"} <= names:
            return _of_pieces(tokenizer, row["prefix"], _texts(row["chunks"]), row["suffix"])
        if {"question", "ctxs"} <= names:
            return prompt_of(tokenizer, Example(row["question"], (), tuple(_texts(row["ctxs"]))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    raise ValueError(f'{where} needs "prefix", "chunks" and "suffix", or "question" and "ctxs"; got {sorted(names)}.')


def _of_pieces(tokenizer: Any, prefix: str, chunks: list[str], suffix: str) -> Prompt:
    if not (isinstance(prefix, str) and isinstance(suffix, str)):
        raise TypeError("prefix and suffix must be texts.")
    return Prompt.from_texts(tokenizer, prefix=prefix, chunks=chunks, suffix=suffix, add_special_tokens=True)


def _texts(passages: Any) -> list[str]:
    """Passages as texts; one with a title is headed by it."""
    texts = []
    for passage in passages if isinstance(passages, list) else [passages]:
        if isinstance(passage, dict) and isinstance(passage.get("text"), str):
            passage = titled(passage)
        if not isinstance(passages, list) or not isinstance(passage, str):
            raise TypeError(f'chunks and ctxs must be lists of texts, or of {{"title", "text"}}, got {passage!r}.')
        texts.append(passage)
    return texts


def verify_prompts(
    model: Any, prompts: Sequence[Prompt], config: BlendConfig, num_tokens: int, console: Console
) -> list[Verification]:
    """Verifies each prompt; chunks that prompts share are prefilled once."""
    store = MemoryStore()
    return [
        verify_prompt(model, prompt, store=store, config=config, num_tokens=num_tokens)
        for prompt in track(prompts, "Prompts", console=console, transient=True)
    ]


def is_above(found: Verification, max_kl: float | None) -> bool:
    """Whether a KL breaks the bound; one that is no number does."""
    return max_kl is not None and not found.kl <= max_kl


def table_of(found: Sequence[Verification], max_kl: float | None) -> Table:
    """One row per prompt; a KL above the bound is red and marked."""
    table = Table(title=f"Blended against full prefill, {len(found[0].full_answer_ids)} tokens of its greedy answer")
    for name in ("prompt", "tokens", "chunks", "KL, nats", "top-1", "largest logit diff.", "answers part at", "pairs"):
        table.add_column(name, justify="right")
    for i, one in enumerate(found):
        kl = f"[red]{one.kl:.2e} ✗[/red]" if is_above(one, max_kl) else f"{one.kl:.2e}"
        parts = "–" if one.first_difference is None else f"token {one.first_difference}"
        table.add_row(
            str(i),
            str(one.trace.num_tokens),
            str(len(one.trace.chunks)),
            kl,
            f"{one.top1_agreement:.0%}",
            f"{one.largest_logit_difference:.2e}",
            parts,
            f"{one.recomputed_pairs_share:.1%}",
        )
    return table


def as_json(
    found: Sequence[Verification], model: Any, name: str, config: BlendConfig, max_kl: float | None
) -> dict[str, Any]:
    """Everything measured, with what it was measured on."""
    return {
        "model": name,
        "machine": describe_machine(host_of(model).device),
        "selection": config.selection,
        "recompute_ratio": config.fixed_ratios[0],
        "max_kl": max_kl,
        "prompts": [one.to_dict() for one in found],
    }
