"""The short HTML of prompts, traces, stores and measurements, as the last line of a notebook's cell shows it.

Lower folders know nothing of HTML: `register` gives their classes the method that notebooks ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..measure.results import Blame, Calibration, Verification
from ..prompts.prompt import Prompt
from ..store import DiskStore, MemoryStore, RemoteStore, TieredStore
from ..trace.trace import BlendTrace
from .view import Part

Figures = Sequence[tuple[str, Any]]  # names and what they are


def register() -> None:
    """Gives each class its `_repr_html_`."""
    for kind, html in _HTML.items():
        kind._repr_html_ = html


def card(
    title: str,
    figures: Figures,
    *,
    bar: Sequence[Part] = (),
    header: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    note: str = "",
) -> str:
    """A title, figures, the prompt to scale, and a table whose last row is the outcome."""
    from .html import rendered

    given = {"title": title, "figures": figures, "bar": bar, "header": header, "rows": rows, "note": note}
    return rendered("display/templates/card.html.jinja", **given)


def _prompt(prompt: Prompt) -> str:
    parts, at = [], 0
    for i, (start, stop) in enumerate(prompt.chunk_spans):
        parts += [Part("gap" if i else "prefix", at, start), Part(f"chunk {i}", start, stop)]
        at = stop
    parts.append(Part("suffix" if prompt.chunk_spans else "prompt", at, len(prompt)))
    sizes = [stop - start for start, stop in prompt.chunk_spans]
    lengths = f"{min(sizes):,} to {max(sizes):,} tokens" if sizes else "none"
    figures = [("tokens", f"{len(prompt):,}"), ("chunks", f"{len(sizes)}: {lengths}" if sizes else lengths),
               ("prefix", f"{len(prompt.prefix_ids):,}"), ("suffix", f"{len(prompt.suffix_ids):,}")]  # fmt: skip
    return card("Prompt", figures, bar=[part for part in parts if part.tokens], note=prompt.chunk_spans.note)


def _trace(trace: BlendTrace) -> str:
    from .html import trace_html

    return trace_html(trace, None, "hfblend", {})


def _blame(blame: Blame) -> str:
    from .html import blame_html

    return blame_html(blame)


def _verification(found: Verification) -> str:
    part = "no difference" if found.first_difference is None else f"at token {found.first_difference}"
    figures = [
        ("mean KL, nats", f"{found.kl:.2e}"),
        ("answers part", part),
        ("top-1 agreement", f"{found.top1_agreement:.0%} of {len(found.full_answer_ids)} tokens"),
        ("largest logit difference", f"{found.largest_logit_difference:.2e}"),
        ("computed", f"{found.recomputed_pairs_share:.1%} of a full prefill"),
    ]
    return card("Verification: blended against full prefill", figures)


def _calibration(found: Calibration) -> str:
    rows = [
        (f"{row.recompute_ratio:g}", "default" if row.layers is None else ", ".join(map(str, row.layers)),
         row.correction_name, f"{row.kl:.2e}", f"{row.largest_kl:.2e}",
         f"{row.top1_agreement:.0%}", f"{row.recomputed_pairs_share:.1%}")
        for row in found.rows
    ]  # fmt: skip
    ratio = ", ".join(f"{one:g}" for one in found.config.fixed_ratios)
    header = ("ratio", "layers", "correction", "mean KL, nats", "largest KL", "top-1", "computed")
    return card("Calibration", [("ratio found", ratio), ("KL at most", f"{found.max_kl:g}")], header=header, rows=rows)


def _counts(store: Any) -> Figures:
    counts = store.counts
    return [("found", f"{counts.hits:,}"), ("not found", f"{counts.misses:,}"), ("stored", f"{counts.stored:,}"),
            ("evicted", f"{counts.evicted:,}")]  # fmt: skip


def _memory_store(store: MemoryStore) -> str:
    size = f"{store.num_bytes / 1e6:,.1f} MB of {store.max_bytes / 1e9:,.1f} GB"
    return card("MemoryStore", [("entries", f"{len(store):,}"), ("memory", size), *_counts(store)])


def _file_store(store: DiskStore | RemoteStore) -> str:
    budget = "no limit" if store.max_bytes is None else f"{store.max_bytes / 1e9:,.1f} GB at most"
    figures = [("where", store.where), ("size", budget), ("kept", store.kv_dtype or "as computed"), *_counts(store)]
    return card(type(store).__name__, figures)


def _tiered_store(store: TieredStore) -> str:
    return card("TieredStore", [(f"tier {i}", repr(one).strip("<>")) for i, one in enumerate(store.stores)])


_HTML: dict[Any, Callable[[Any], str]] = {
    Prompt: _prompt,
    BlendTrace: _trace,
    Blame: _blame,
    Verification: _verification,
    Calibration: _calibration,
    MemoryStore: _memory_store,
    DiskStore: _file_store,
    RemoteStore: _file_store,
    TieredStore: _tiered_store,
}
