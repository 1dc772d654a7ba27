"""What is measured of a family: the same functions for the tests and for the table of `docs/models.md`.

Differences of logits are the largest absolute ones, at the prompt's last token and the decoded ones; those of keys and
rows are relative norms.
"""

from __future__ import annotations

from typing import Any

import torch
from families import Family
from helpers import config, generate, largest_difference, make_prompt, moved_kv, store_of_true_kv

import hfblend
from hfblend.blend.selection import budget
from hfblend.generate.blending import Blending
from hfblend.kv.rows import full_length_cache
from hfblend.model.passes import mask_rows
from hfblend.support.registry import model_of

PROMPT = make_prompt()
SHIFT, NEW_TOKENS = 100, 3
_tested_models: dict[str, Any] = {}  # by the family's name
_stock_outputs: dict[tuple[str, str | None], Any] = {}  # and the attention implementation
ATTENTION = ("eager", "sdpa", "flex_attention")


def ratio_1(family: Family, implementation: str | None = None) -> float:
    """Blended at ratio 1 against stock."""
    stock, model = _stock(family, implementation), _make(family, implementation)
    with hfblend.patch(model, config=config(1.0)) as blender:
        blended = _run(model, PROMPT.inputs())
        assert blender.trace.blended
        assert blender.trace.computed_pairs == len(PROMPT) * blender.hf_model.num_layers
    return _difference(blended, stock)


def true_kv(family: Family, ratio: float, rule: str = "suffix_attention") -> tuple[float, str]:
    """True in-context KV, moved elsewhere and blended back, against stock; and the rule that selected."""
    stock, model = _stock(family), _tested(family)
    store = store_of_true_kv(model, PROMPT, SHIFT)
    with hfblend.patch(model, config=config(ratio, selection=rule), store=store) as blender:
        blended = _run(model, PROMPT.inputs())
        trace = blender.trace
        assert trace.blended
        assert trace.hits == len(PROMPT.chunk_spans)
        assert not any(chunk.exact for chunk in trace.chunks)
        assert trace.selected_tokens == budget(ratio, len(trace.candidate_idx))
    by_deviation = rule == "kv_deviation" or any("cannot be recorded" in note for note in trace.notes)
    return _difference(blended, stock), "deviation" if by_deviation else "attention"


def realign_error(family: Family) -> float:
    """Keys moved by the rotation that the self-test found, against keys computed there, in the worst layer."""
    hf_model = model_of(_tested(family))
    old, distance = torch.arange(20), 30
    kv, truth = (hf_model.run_stock(positions)[0] for positions in (old, old + distance))
    found = moved_kv(hf_model, kv, (old, old + distance, 20), 20 + distance)
    pairs = [pair for i in kv for pair in zip(found[i], truth[i])]
    return max(((moved - there).norm() / there.norm()).item() for moved, there in pairs)


@torch.no_grad()
def future_leak(family: Family) -> float:
    """How much the early rows of a pass change when everything reused behind them does; the late ones must change."""
    model, first_changed = _tested(family), 41
    hf_model = model_of(model)

    def rows_of_last_layer(change: float) -> tuple[torch.Tensor, torch.Tensor]:
        store = store_of_true_kv(model, PROMPT, SHIFT)
        for key, entry in list(store._entries.items()):
            late = entry.cached_positions - SHIFT >= first_changed
            kv = [tuple(t.clone() for t in entry.layer(i)) for i in range(entry.num_layers)]
            for states in (t for pair in kv for t in pair):
                states[:, :, late] += change * states.abs().max()
            cache = full_length_cache(kv)
            store.put(key, hfblend.ChunkKV(cache, entry.cached_positions, entry.behind_ids, "isolated", entry.regime))
        state = Blending(hf_model, PROMPT.input_ids, PROMPT.chunk_spans, store, config(0.0, correction=None))
        blend = state.stopped_at("realigned", hf_model.decoder_forward)
        rows = torch.cat([blend.reuse.candidate_idx[::5], blend.reuse.fresh_idx]).sort().values
        blend.rows_pass("recompute", rows)
        return rows, torch.cat([t[0, :, rows].transpose(0, 1).flatten(1) for t in state.buffers[max(state.buffers)]], 1)

    (rows, before), (_, after) = rows_of_last_layer(0.0), rows_of_last_layer(1.0)
    change, early = (before - after).norm(dim=1) / before.norm(dim=1), rows < first_changed
    assert change[~early].max() > 1e-2, "no row behind the change sees it"
    return change[early].max().item()


def batch(family: Family) -> float | str:
    """Two prompts of different lengths in one left-padded call, against stock with each of them alone.

    Where stock's own rows differ from the rows alone (a layer counts the padding when it decodes), the first token
    counts. `"n/a"` where stock takes no batch, `"stock"` where the call falls back.
    """
    prompts = [PROMPT, make_prompt((25, 18), prefix=7, suffix=5, seed=2)]
    inputs = hfblend.Prompt.batch(prompts, pad_token_id=0)
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    alone = [_run(family.make(), {name: value for name, value in p.inputs().items() if name in plain}) for p in prompts]
    try:
        own = _from_alone(_run(family.make(), plain), alone, NEW_TOKENS)
    except (RuntimeError, TypeError, ValueError):
        return "n/a"
    steps, differences = NEW_TOKENS if own < 1e-3 else 1, []
    for ratio in (1.0, 0.3):
        model, store = _tested(family), hfblend.MemoryStore()
        for prompt in prompts:
            store_of_true_kv(model, prompt, SHIFT, store=store)
        with hfblend.patch(model, config=config(ratio), store=store) as blender:
            blended = _run(model, inputs)
            if blender.trace.fallback:
                return "stock"
            assert [trace.hits for trace in blender.traces] == [3, 2]
        differences.append(_from_alone(blended, alone, steps))
    return max(differences)


def _from_alone(batch: Any, alone: list[Any], steps: int) -> float:
    """How far the logits of each row are from those of the row alone, over its first tokens."""
    pairs = [(batch.logits[i][row], one.logits[i][0]) for row, one in enumerate(alone) for i in range(steps)]
    return max((a - b).abs().max().item() for a, b in pairs)


def window(family: Family) -> str:
    """What the last row sees of the prompt, by the model's own masks, where that is not all."""
    hf_model, length = model_of(_tested(family)), len(PROMPT)
    masks = mask_rows(hf_model, torch.tensor([length - 1]), length)
    masks = masks if isinstance(masks, dict) else {"": masks}
    seen = {int((mask if mask.dtype == torch.bool else mask == 0).sum()) for mask in masks.values()} - {length}
    return ", ".join(f"{count} of {length}" for count in sorted(seen)) or "–"


def attention(family: Family, implementation: str) -> float | str:
    """Ratio 1 against stock, both with this implementation; "n/a" where stock has none, "refused" by `patch`."""
    with torch.compiler.set_stance("force_eager"):  # flex attention would be compiled for every shape
        try:
            _stock(family, implementation)
        except (ValueError, ImportError, NotImplementedError):
            return "n/a"
        try:
            return ratio_1(family, implementation)
        except hfblend.UnsupportedModel:
            return "refused"


def keys_turn(family: Family) -> str:
    """How cached keys depend on position, as the self-test found it."""
    hf_model = model_of(_tested(family))
    found = []
    for layer, rotation in enumerate(hf_model.rotations):
        if rotation is None:
            found.append("not")
            continue
        layout = hf_model.layouts[layer]
        cos, _ = hf_model.rotary_tables(rotation.source, torch.arange(1), 1)
        turned = cos.shape[-1] * (2 if rotation.layout == "single" else 1)
        whole = layout.key_dim if rotation.slot == 0 else layout.value_dim
        slot, sign = "KV"[rotation.slot], "" if rotation.sign == 1 else ", reversed"
        found.append(f"{slot}, {rotation.pairing}{sign}, {turned} of {whole}")
    shared = hf_model.num_layers - hf_model.num_kv_layers
    return "; ".join(dict.fromkeys(found)) + (f"; {shared} of {hf_model.num_layers} layers have none" if shared else "")


def _make(family: Family, implementation: str | None = None) -> Any:
    """The model anew each time: a rotary module may remember the longest prompt so far."""
    model = family.make()
    if implementation is not None:
        model.set_attn_implementation(implementation)
    return model


def _tested(family: Family) -> Any:
    """A model that all measurements but the first share, so that it tests itself once."""
    name = getattr(family, "name", "made up")
    if name not in _tested_models:
        _tested_models[name] = family.make()
    return _tested_models[name]


def _stock(family: Family, implementation: str | None = None) -> Any:
    key = getattr(family, "name", "made up"), implementation
    if key not in _stock_outputs:
        _stock_outputs[key] = _run_stock(family, implementation)
    return _stock_outputs[key]


def _run_stock(family: Family, implementation: str | None) -> Any:
    output = _run(
        _make(family, implementation),
        {"input_ids": PROMPT.input_ids, "attention_mask": torch.ones_like(PROMPT.input_ids)},
    )
    assert output.logits[0].std() > 1e-2, "the logits say nothing"
    return output


def _run(model: Any, inputs: dict[str, Any]) -> Any:
    return generate(model, inputs, max_new_tokens=NEW_TOKENS)


def _difference(blended: Any, stock: Any) -> float:
    assert torch.equal(blended.sequences, stock.sequences), "greedy tokens differ"
    return largest_difference(blended, stock)
