"""Records of many questions -> one row per method and ratio."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from .metrics import bootstrap_mean_ci, bootstrap_ratio_ci, recovered
from .records import Record

FULL_PREFILL, FLOOR = "full_prefill", "no_context"
SCORES = ("kl", "top1_agreement", "f1", "f1_ids", "rouge_l", "string_match")

Group = dict[int, Record]  # question -> record
Groups = dict[tuple[str, float], Group]  # method and ratio -> group


def summarize(records: Sequence[Record], baseline: str | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """A row per method and ratio, in the order of the records.

    Args:
        baseline: the method that `kl_vs_baseline` divides by, at the row's own ratio, or at its only one.
        seed: of the bootstrap.

    Returns:
        Rows with `method, ratio, n, kl, kl_ci95, top1_agreement, f1, ttft_ms, recomputed_pairs_share`, then `f1_ids`,
        `rouge_l`, `string_match`, `kl_vs_baseline`, `kl_vs_baseline_ci95`, `ttft_speedup`, and for each of `SCORES`
        `<score>_recovered` and `<score>_recovered_ci95`; `None` where something was not measured.
    """
    groups: Groups = {}
    for record in records:
        groups.setdefault((record.method, record.ratio), {})[record.question] = record
    full, floor = _only(groups, FULL_PREFILL), _only(groups, FLOOR)

    def theirs(ratio: float) -> Group:
        return {} if baseline is None else groups.get((baseline, ratio)) or _only(groups, baseline)

    return [
        _figures(method, ratio, group, seed)
        | _versus_baseline(group, theirs(ratio), seed)
        | {"ttft_speedup": _speed_up(group, full)}
        | _recovered(group, floor, full, seed)
        for (method, ratio), group in groups.items()
    ]


def _figures(method: str, ratio: float, group: Group, seed: int) -> dict[str, Any]:
    def mean_of(name: str) -> float | None:
        values = [value for record in group.values() if (value := getattr(record, name)) is not None]
        return mean(values) if values else None

    return {
        "method": method,
        "ratio": ratio,
        "n": len(group),
        "kl": mean_of("kl"),
        "kl_ci95": list(bootstrap_mean_ci([record.kl for record in group.values()], seed)),
        "top1_agreement": mean_of("top1_agreement"),
        "f1": mean_of("f1"),
        "ttft_ms": median(record.ttft_ms for record in group.values()),
        "recomputed_pairs_share": mean_of("recomputed_pairs_share"),
        "f1_ids": mean_of("f1_ids"),
        "rouge_l": mean_of("rouge_l"),
        "string_match": mean_of("string_match"),
    }


def _versus_baseline(group: Group, baseline: Group, seed: int) -> dict[str, Any]:
    """The ratio of mean KLs over the questions that both have."""
    shared = sorted(group.keys() & baseline.keys())
    ours, theirs = ([of[question].kl for question in shared] for of in (group, baseline))
    # KLs of 0 would make a resample's mean 0, and its ratio no number
    if not shared or min(theirs) <= 0:
        return {"kl_vs_baseline": None, "kl_vs_baseline_ci95": None}
    interval = list(bootstrap_ratio_ci(ours, theirs, seed))
    return {"kl_vs_baseline": mean(ours) / mean(theirs), "kl_vs_baseline_ci95": interval}


def _recovered(group: Group, floor: Group, full: Group, seed: int) -> dict[str, Any]:
    """The shares of the gap between floor and full prefill, over the questions that all three have."""
    figures: dict[str, Any] = {}
    shared = sorted(group.keys() & floor.keys() & full.keys())
    for score in SCORES:
        triples = [[getattr(of[question], score) for of in (group, floor, full)] for question in shared]
        known, sign = [triple for triple in triples if None not in triple], -1 if score == "kl" else 1
        values, lowest, highest = ([sign * triple[i] for triple in known] for i in range(3))
        found = recovered(values, lowest, highest, seed)
        share, interval = found or (None, None)
        figures |= {f"{score}_recovered": share, f"{score}_recovered_ci95": interval and list(interval)}
    return figures


def _only(groups: Groups, method: str) -> Group:
    """The group of a method with one ratio; empty if it has several."""
    found = [group for (name, _), group in groups.items() if name == method]
    return found[0] if len(found) == 1 else {}


def _speed_up(group: Group, full: Group) -> float | None:
    """Median over questions of full prefill's time over this one's."""
    ratios = [full[question].ttft_ms / group[question].ttft_ms for question in sorted(group.keys() & full.keys())]
    return median(ratios) if ratios else None
