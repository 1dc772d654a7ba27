"""`hfblend verify`: compares the blended prompts of a file with their full prefills, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..config import BlendConfig
from ..util import require_folders_of
from .common import Device, JsonFile, Model, Rule, console, existing, given, in_words, write_json

if TYPE_CHECKING:
    from ..measure.verify import Verification
    from ..prompts.prompt import Prompt


def verify(
    prompts: Annotated[Path, existing('JSON: {"prefix", "chunks", "question"} or {"question", "ctxs"}, or a list.')],
    model: Model = None,
    ratio: Annotated[float, typer.Option(help="Share of the reused tokens to recompute.")] = 0.15,
    selection: Rule = None,
    max_kl: Annotated[float | None, typer.Option(help="In nats; exit code 1 if a prompt's mean KL is above.")] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="Answer tokens to compare.")] = 16,
    json_file: JsonFile = None,
    device: Device = None,
) -> None:
    """Blend the prompts of a file and say how far each is from its full prefill.

    Example: hfblend verify --prompts prompts.json --max-kl 0.1 --json figures.json
    """
    with in_words():
        require_folders_of(json_file)
        config = BlendConfig(recompute_ratios=(ratio,), **given(selection=selection))

        from ..demo import model as demo_model
        from .prompts import read_prompts

        loaded, tokenizer = demo_model.load(model, device)
        read = read_prompts(str(prompts), tokenizer)
        found = _verified(loaded, read, config, num_tokens)
    console.print(_table(found, max_kl))
    write_json(json_file, _figures(found, loaded, model or demo_model.HUB_NAME, config, max_kl))
    if any(_is_above(one, max_kl) for one in found):
        raise typer.Exit(1)


def _verified(model: Any, prompts: Sequence[Prompt], config: BlendConfig, num_tokens: int) -> list[Verification]:
    """Verifies each prompt; chunks that prompts share are prefilled once."""
    from ..measure.verify import verify_prompt
    from ..store import MemoryStore

    store, shown = MemoryStore(), track(prompts, "Prompts", console=Console(stderr=True), transient=True)
    return [verify_prompt(model, prompt, store=store, config=config, num_tokens=num_tokens) for prompt in shown]


def _is_above(found: Verification, max_kl: float | None) -> bool:
    """Whether a KL exceeds the bound; NaN does."""
    return max_kl is not None and not found.kl <= max_kl


def _table(found: Sequence[Verification], max_kl: float | None) -> Table:
    """One row per prompt; a KL above the bound is red and marked."""
    table = Table(title=f"Blended against full prefill, {len(found[0].full_answer_ids)} tokens of its greedy answer")
    for name in ("prompt", "tokens", "chunks", "KL, nats", "top-1", "largest logit diff.", "answers part at", "pairs"):
        table.add_column(name, justify="right")
    for i, one in enumerate(found):
        table.add_row(
            str(i),
            str(one.trace.num_tokens),
            str(len(one.trace.chunks)),
            f"[red]{one.kl:.2e} ✗[/red]" if _is_above(one, max_kl) else f"{one.kl:.2e}",
            f"{one.top1_agreement:.0%}",
            f"{one.largest_logit_difference:.2e}",
            "–" if one.first_difference is None else f"token {one.first_difference}",
            f"{one.recomputed_pairs_share:.1%}",
        )
    return table


def _figures(
    found: Sequence[Verification], model: Any, name: str, config: BlendConfig, max_kl: float | None
) -> dict[str, Any]:
    """Everything measured, with the model and the machine."""
    from ..measure.divergence import describe_machine
    from ..support.registry import model_of

    return {
        "model": name,
        "machine": describe_machine(model_of(model).device),
        "selection": config.selection,
        "recompute_ratio": config.fixed_ratios[0],
        "max_kl": max_kl,
        "prompts": [one.to_dict() for one in found],
    }
