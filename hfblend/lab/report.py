"""The report of a benchmark or an evaluation: its header, title, table and notes, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import starmap
from statistics import median
from string import Formatter
from typing import Any

from ..measure.divergence import describe_machine

Row = dict[str, Any]
Results = dict[str, Any]

# heading -> format of a row's fields
_BENCH_COLUMNS = {
    "tokens": "{tokens:,}",
    "method": "{method}",
    "ratio": "{ratio:g}",
    "chunks in": "{chunks_in}",
    "TTFT, ms": "{ttft_ms:.1f} ({ttft_ms_range[0]:.1f} … {ttft_ms_range[1]:.1f})",
    "speed-up": "{speed_up:.2f} ({speed_up_range[0]:.2f} … {speed_up_range[1]:.2f})",
    "computed": "{pairs_share:.1%}",
    "TFLOP": "{tflop:.3g}",
    "limit": "{speed_up_limit:.1f}",
    "reached": "{share_of_limit:.0%}",
    "roofline, ms": "{roofline_ms:.1f}",
    "peak, GiB": "{peak_gib:.2f}",
    "reused, MB": "{reused_mb:,.1f}",
    "load, ms": "{load_ms:.1f}",
    "÷ first place": "{over_first_place:.2f}",
    "phases, ms": "{phases}",
}
_RECOVERED = "{{{0}_recovered:.0%}} [{{{0}_recovered_ci95[0]:.0%}}, {{{0}_recovered_ci95[1]:.0%}}]"
_EVAL_COLUMNS = {
    "method": "{method}",
    "ratio": "{ratio:g}",
    "n": "{n}",
    "KL, nats [95 %]": "{kl:.4f} [{kl_ci95[0]:.4f}, {kl_ci95[1]:.4f}]",
    "KL ÷ baseline's [95 %]": "{kl_vs_baseline:.2f} [{kl_vs_baseline_ci95[0]:.2f}, {kl_vs_baseline_ci95[1]:.2f}]",
    "top-1": "{top1_agreement:.1%}",
    "F1": "{f1:.3f}",
    "F1 of ids": "{f1_ids:.3f}",
    "ROUGE-L": "{rouge_l:.3f}",
    "match": "{string_match:.3f}",
    "KL recovered [95 %]": _RECOVERED.format("kl"),
    "F1 recovered [95 %]": _RECOVERED.format("f1"),
    "ROUGE-L recovered [95 %]": _RECOVERED.format("rouge_l"),
    "match recovered [95 %]": _RECOVERED.format("string_match"),
    "TTFT, ms": "{ttft_ms:.0f}",
    "speed-up": "{ttft_speedup:.1f}×",
    "computed": "{recomputed_pairs_share:.1%}",
}

_RANGE = "{{{0}:.2f}} ({{{0}_range[0]:.2f}} … {{{0}_range[1]:.2f}})"

# part of a benchmark -> the lines of each of its measurements; one whose figures were not measured is left out
_NOTES = {
    "start_up": (
        "Start-up, {new_tokens} tokens after {tokens:,} by {method} {ratio:g}: patch() {patch_ms:,.0f} ms, first call "
        "{first_call_ms:,.0f} ms (later, with new chunks, {new_chunks_call_ms:,.0f} ms), second {second_call_ms:,.0f} "
        "ms, third {third_call_ms:,.0f} ms, later ones {warm_call_ms:,.0f} ms: in all {start_up_ms:,.0f} ms over later "
        "calls. Stock's first call {stock_first_call_ms:,.0f} ms.",
        "Start-up with chunks of {tokens:,} tokens: {failed}.",
    ),
    "decoding": (
        "Decoding {decoded_tokens} tokens after {tokens:,}: stock {stock_tokens_per_s:.1f} tokens/s, after {method} "
        "{ratio:g} {blended_tokens_per_s:.1f} tokens/s; ratio " + _RANGE.format("blended_over_stock") + ".",
        "Answers of {decoded_tokens} tokens after {tokens:,}: stock {stock_answer_ms:,.0f} ms, {method} {ratio:g} "
        "{blended_answer_ms:,.0f} ms; speed-up " + _RANGE.format("answer_speed_up_over_stock") + ".",
        "The same by stock with a static cache, {static_cache}: {static_tokens_per_s:.1f} tokens/s, an answer "
        "{static_answer_ms:,.0f} ms, the first {static_first_answer_ms:,.0f} ms; {method} {ratio:g} over it: "
        + _RANGE.format("answer_speed_up_over_static")
        + ".",
        "The same by stock with a static cache: {static_failed}.",
        "Decoding after {tokens:,} tokens: {failed}.",
    ),
    "throughput": (
        "Stream, prompts {first_prompt:,} to {last_prompt:,} of {tokens:,} tokens, {chunks_per_prompt} chunks each of "
        "a pool of {chunks_in_pool} that changes: {method} {ratio:g} finds {hit_rate:.1%} of the chunks, TTFT p50 "
        "{blended_ttft_ms_p50:.1f} ms, p95 {blended_ttft_ms_p95:.1f} ms, {blended_prompts_per_s:.3g} prompts/s; prefix "
        "caching {prefix_hit_rate:.1%}, {prefix_ttft_ms_p50:.1f} ms, {prefix_ttft_ms_p95:.1f} ms, "
        "{prefix_prompts_per_s:.3g} prompts/s; full prefill {stock_ttft_ms_p50:.1f} ms, {stock_ttft_ms_p95:.1f} ms, "
        "{stock_prompts_per_s:.3g} prompts/s. Speed-up {blended_over_stock:.2f}, prefix caching's "
        "{prefix_over_stock:.2f}, hfblend's over it {blended_over_prefix:.2f}. Stores {store_mb:,.1f} and "
        "{prefix_store_mb:,.1f} MB of {store_max_mb:,.1f} MB, process {rss_mb:,.0f} MB.",
        "A stream of prompts of {tokens:,} tokens: {failed}.",
    ),
    "batching": (
        "First tokens of {prompts} prompts of {tokens:,} tokens: full prefill {stock_single_ms:.1f} ms one by one, "
        "{stock_batch_ms:.1f} ms in one batch; {method} {ratio:g} {blended_single_ms:.1f} ms one by one, "
        "{blended_batch_ms:.1f} ms in one batch; batch over batch " + _RANGE.format("speed_up") + ", one by one over "
        "its batch " + _RANGE.format("single_over_batch") + ".",
        "A batch of prompts of {tokens:,} tokens: {failed}.",
    ),
}
_LOADS = {"load_ms": "to the device, realigned", "read_ms": "through the store", "plain_read_ms": "a plain read"}


def header_of(model: Any, name: str, settings: Mapping[str, Any]) -> Results:
    """The model, machine and settings that figures depend on, as JSON gives them back; callers add the version."""
    return {
        "machine": describe_machine(model.device),
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "settings": json.loads(json.dumps(settings)),
    }


def markdown(results: Results) -> str:
    """The title, the table, and the notes."""
    return "\n\n".join(part.strip("\n") for part in (title(results), table(results), *notes(results))) + "\n"


def title(results: Results) -> str:
    """Model, prompts and machine, in two lines."""
    settings, machine = results["settings"], results["machine"]
    correction = f", correction {settings['correction']}" if settings.get("correction") else ""
    about = f"{results['model']}, {results['dtype']}{correction}"
    if "layout" in settings:
        parts = "prefix {prefix}, chunks of {chunk}, suffix {suffix} tokens".format_map(settings["layout"])
        return f"{about}, {results['attention']}; {parts}\n{machine}, transformers {results['transformers']}"
    kv = "" if settings["kv_dtype"] is None else f", chunk KV in {settings['kv_dtype']}"
    start, stop = results["questions"]
    return f"{about}{kv}, {stop - start} questions of {results['data']['source']}\n{machine}"


def table(results: Results) -> str:
    """The rows as a GitHub table; columns that no row has a figure for are left out."""
    rows = [cells(row) for row in results["rows"]]
    headings = [heading for heading in rows[0] if any(row[heading] for row in rows)] if rows else []
    lines = [headings, ["---" if i < 2 else "---:" for i in range(len(headings))]]
    lines += [[row[heading] or "–" for heading in headings] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Row) -> dict[str, str]:
    """Heading -> text; empty where there is no figure."""
    if "kl" in row:
        return {heading: _filled(form, row) for heading, form in _EVAL_COLUMNS.items()}
    more = {
        "tflop": None if row["flops"] is None else row["flops"] / 1e12,
        "reused_mb": None if row["bytes_reused"] is None else row["bytes_reused"] / 1e6,
        "phases": ", ".join(f"{phase} {ms:.1f}" for phase, ms in row["phase_ms"].items()),
    }
    found = {heading: _filled(form, row | more) for heading, form in _BENCH_COLUMNS.items()}
    return found | {"TTFT, ms": row["failed"] or found["TTFT, ms"]}


def _filled(form: str, row: Row) -> str:
    """The form with the row's figures; empty where one was not measured."""
    fields = {name.partition("[")[0] for _, name, _, _ in Formatter().parse(form) if name}
    return "" if any(row.get(field) is None for field in fields) else form.format_map(row)


def notes(results: Results) -> list[str]:
    """Of a benchmark: loading, start-up, decoding, a stream, batches and the machine's peaks, a line each."""
    if "peaks" not in results:
        return []
    loads = [_loading_note(found) for found in results["loading"]]
    measured = ((form, row) for part, forms in _NOTES.items() for row in results.get(part, ()) for form in forms)
    peaks, load = results["peaks"], results["peaks"]["load_bytes_per_s"]
    from_ram = "" if load is None else f", {load / 1e9:.3g} GB/s from pinned RAM"
    rates = f"{peaks['flops_per_s'] / 1e12:.3g} TFLOP/s, {peaks['bytes_per_s'] / 1e9:.4g} GB/s{from_ram}"
    return [*loads, *filter(None, starmap(_filled, measured)), f"Measured peaks: {rates}."]


def _loading_note(found: Row) -> str:
    rates = [
        f"{name} {found[ms]:.1f} ms ({found['bytes'] / found[ms] / 1e6:.3g} GB/s)"
        for ms, name in _LOADS.items()
        if ms in found
    ]
    loaded = f"{found['bytes'] / 1e6:,.1f} MB of {found['tokens']:,} tokens from {found['place']}"
    return f"Loading {loaded}: {', '.join(rates)}."


def with_range(name: str, values: Sequence[float]) -> Row:
    """The median of some values, and the lowest and highest of them under `<name>_range`."""
    return {name: middle(values), f"{name}_range": [min(values), max(values)] if values else None}


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
