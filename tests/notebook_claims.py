"""What the notebooks' text says, held against the names that their cells leave."""

from __future__ import annotations

from typing import Any

import torch

Names = dict[str, Any]


def claims_1(names: Names) -> None:
    answers, blended, norm = names["answers"], names["blended"].trace, names["norm"]
    assert "red otter" in answers["full prefill"]
    assert "otter" not in answers["full reuse"]
    assert "red otter" in answers["blended"]
    assert names["reused"].trace.selected_tokens == 0
    assert norm[0] < 1e-3 * norm[1]
    assert norm[1:].min() > 0
    first, *others = blended.chunks
    assert first.exact
    assert not any(chunk.exact for chunk in others)
    assert blended.candidate_idx.min() >= first.span[1]


def claims_2(names: Names) -> None:
    off, stops, distances = names["off"], names["stops"], names["distances"]
    assert list(off) == ["1 look up", "2 realign", "3 select", "4 recompute"]
    assert max(off.values()) < 1e-3, off
    assert set(names["computed_at"]) == {names["prefix_stop"]}
    assert torch.equal(names["candidate_idx"], stops["scored"].candidate_idx)
    assert torch.equal(names["selected_idx"], stops["selected"].selected_idx)
    assert torch.equal(stops["generated"].result.logits, names["result"].logits)
    assert torch.equal(names["step"].trace.selected_idx, names["by_hand"].sort().values)
    assert distances["true KV put in"] < 1e-5 < distances["full reuse"]


def claims_3(names: Names) -> None:
    assert max(names["values_apart"]) < 1e-4
    assert max(names["turned_apart"]) < 1e-4
    assert min(names["keys_apart"]) > 0.1
    assert abs(names["products"][0] - names["products"][1]) < 2e-3
    assert names["angles"][0] == 1
    assert names["angles"][-1] < 1e-3
    assert names["realigned"].moved_idx.tolist() == list(range(names["start"], names["stop"]))
    assert names["turned"][0] < 1e-4 < names["turned"][1]
    assert all(turned < as_stored for turned, as_stored in zip(names["turned"], names["as_stored"]))
    assert names["errors"][-1] > 3 * names["errors_at_once"][-1]


def claims_4(names: Names) -> None:
    matrix, lines, traces, common = names["matrix"], names["lines"], names["traces"], names["common"]
    assert names["share"][1:].min() > 0.30
    assert names["neighbours"].mean() > 0.7
    assert matrix[1, names["L"] // 2 :].mean() < matrix[1, 2] - 0.1
    at_15 = {rule: line.mean(-1)[names["ratios"].index(0.15)] for rule, line in lines.items()}
    assert at_15["suffix_attention"] < at_15["kv_deviation"]
    assert all(line[-1].max() < 1e-3 < line[0].max() for line in lines.values())
    assert 0.15 < common["kv_deviation"]["suffix_attention"] < 0.7
    assert torch.equal(traces["own rule"].candidate_idx, traces["suffix_attention"].candidate_idx)
    assert traces["own rule"].selected_tokens == traces["suffix_attention"].selected_tokens


def claims_5(names: Names) -> None:
    first, second, third = names["asked"][:3]  # the solution asks a fourth
    found, again = names["find"](names["question"]), names["find"](names["again"])
    assert len(names["documents"]) == 12
    assert sorted(found) == sorted(again)
    assert found != again
    assert all(trace.blended for trace in names["asked"])
    assert [trace.hits for trace in (first, second, third)] == [0, 4, 4]
    assert max(second.ttft_ms, third.ttft_ms) < first.ttft_ms
    assert names["answers"][2] == names["answers"][0]
    assert "pellow soup" in names["answers"][0]
    assert "smoked eel" in names["answers"][1]
    assert "pellow soup" in names["full_answer"]
    assert not names["full_trace"].blended
    trace, held = names["second_trace"], names["held"]
    assert (trace.prefix.span, trace.prefix.exact) == ((0, held), True)
    assert (trace.hits, len(trace.chunks), trace.num_tokens) == (4, 4, len(names["prompt"]))
    assert trace.computed_pairs < 0.5 * (trace.num_tokens - held) * trace.num_layers


def claims_6(names: Names) -> None:
    text, found, margins, trace = names["text"], names["found"], names["margins"], names["result"].trace
    assert "1866" in text(found.full_answer_ids)
    assert "1866" not in text(found.blended_answer_ids)
    assert text(found.full_answer_ids[: names["part"]]).endswith("opened in 1")
    assert (text(names["right"]), text(names["wrong"])) == ("8", "9")
    assert trace.hits == 4
    assert not trace.fallback
    assert margins[0.15] < 0 < margins[0.3]
    assert margins[1.0] > 0
    _claims_of_tokens(names, trace)
    assert names["why"].chunks[0].part == f"chunk {names['to_blame']}"
    assert names["why"].fewest.part == f"chunk {names['to_blame']}"


def _claims_of_tokens(names: Names, trace: Any) -> None:
    """Notebook 6: whose true KV makes the answer right."""
    text, ids, by_passage, culprit = names["text"], names["ids"], names["by_passage"], names["culprit"]
    stale, mended, to_blame = names["stale"], names["mended"], names["to_blame"]
    assert stale < 0 < names["full_margin"]
    assert abs(stale - names["margin"](names["stops"]["generated"].result.logits)) < 1e-2
    assert abs(mended(list(range(names["suffix_start"]))) - names["full_margin"]) < 1e-2
    assert abs(by_passage[0] - stale) < 1e-2  # it stands where it was computed, and is exact
    assert by_passage[to_blame] > 0
    assert names["titles"][to_blame] == "Orla Venn"
    assert names["best"][0] == names["start"]  # "Orla Venn (1834 to 1902) was an engineer …"
    assert names["of_token"][culprit] > 0
    assert text(ids[0, culprit]) == text(names["wrong"]) == "9"
    assert text(ids[0, culprit - 1 : culprit + 3]) == "1902"
    assert culprit not in trace.selected_idx.tolist()
