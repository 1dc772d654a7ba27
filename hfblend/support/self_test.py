"""The end of the self-test: a pass over scattered rows must give what a stock forward over all tokens gives.

    stock    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■      16 tokens, K/V of every layer kept
    pass     · ■ · · ■ ■ · · · ■ · · ■ · · ·      5 of them again, over the K/V of the others, later ones too

A model whose positions do not come from `position_ids`, whose mask is unusual, or whose rows depend on which
others run with them, is refused here, before it could answer wrongly.

Shapes: S rows of the pass, T all tokens, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.by_position import QueryRows
from ..attention.switch import AttentionNotReplaceable, WindowLearner, attend_by_position
from ..blend.caches import BlendingCache
from ..blend.model import Pass, Watched
from ..kv.rows import KV
from ..model.hf_model import HFModel, UnsupportedModel
from ..model.layerwise import LENGTH, STARTS_AT, Steps, Stock, apart, row_errors, run_steps
from ..model.passes import run_rows

ROWS = (1, 4, 5, 9, 12)
_SHORTER = ROWS[-1] + 1
_ALIKE = 5e-2  # of quantised models, forwards over more and fewer tokens

_Measured = tuple[torch.Tensor, float]


def prove_rows(hf_model: HFModel, stock: Stock) -> None:
    """Finds how rows of this model attend: by position through our attention, or through rows of its own masks.

    Sets `attends_by_position`, `attends_to_cache`, `windows` and `layers_stand_alone` of the model.

    Raises:
        UnsupportedModel: neither way gives the rows what a stock forward gives them.
    """
    shorter = _require_causal(hf_model, stock)
    if hf_model.is_quantised:  # its layers may scale by all the rows that run together
        stock.again.append(shorter)
    wrong = []
    for by_position in (True, False) if hf_model.attends_by_position else (False,):
        hf_model.attends_by_position = by_position
        try:
            hf_model.windows = _learn_windows(hf_model) if by_position else {}
            _require_rows(hf_model, stock)
        except (AttentionNotReplaceable, UnsupportedModel) as error:
            wrong.append(f"{'by position' if by_position else 'with rows of its own masks'}, {error}")
        else:
            hf_model.layers_stand_alone = _shortened_is_equal(hf_model, stock)
            return
    raise UnsupportedModel(
        f"{type(hf_model.model).__name__}: {len(ROWS)} of {LENGTH} tokens, computed at their own positions over the "
        "cached KV of the others, differ from a forward over all tokens, so blending would change answers "
        f"({'; '.join(wrong)})."
    )


def _require_rows(hf_model: HFModel, stock: Stock) -> None:
    """Requires that rows equal those of the stock forward, mixed into the cache as attention begins, or else before.

    Models that cache latent states make keys of them in between.
    """
    hf_model.attends_to_cache = hf_model.attends_by_position
    if hf_model.attends_to_cache:
        with contextlib.suppress(UnsupportedModel):
            return _require_equal(stock, _run_rows(hf_model, stock, stock.kv), ROWS)
    hf_model.attends_to_cache = False
    _require_equal(stock, _run_rows(hf_model, stock, stock.kv), ROWS)


def _learn_windows(hf_model: HFModel) -> dict[int, int | None]:
    """Layer -> window of its mask, from a forward in which every mask is a marker."""
    positions = torch.arange(LENGTH, device=hf_model.device)
    learner = WindowLearner()

    def learn() -> None:
        attend_by_position(hf_model.lock, hf_model.layer_owner.config, QueryRows(positions[None], LENGTH), {}, learner)
        hf_model.run_stock(positions)

    hf_model.lock.exclusive(learn)
    return learner.windows


def _shortened_is_equal(hf_model: HFModel, stock: Stock) -> bool:
    """Whether rows that go on from what entered a layer, and of which one goes on in the last, come out the same.

    Where a model rounds much, rounding may send that one to other experts: then two others have to be right.
    """
    if (entered := stock.entered) is None:
        return True  # then no pass is shortened
    late = {layer: kv for layer, kv in stock.kv.items() if layer >= STARTS_AT}

    def is_equal(rows: Sequence[int]) -> bool:
        try:
            _require_equal(stock, _run_rows(hf_model, stock, late, rows, entered), rows, STARTS_AT + 1)
        except UnsupportedModel:
            return False
        return True

    return is_equal(ROWS) or (not stock.rounds_little and is_equal(ROWS[:-1]) and is_equal(ROWS[:-2]))


def _run_rows(
    hf_model: HFModel, stock: Stock, kv: dict[int, KV], of: Sequence[int] = ROWS, entered: Watched | None = None
) -> Steps:
    """A pass of some rows over K/V in which their own places are empty, from what entered a layer if that is given.

    Each layer but the first starts from what entered it in the stock forward.
    """
    rows = torch.tensor(of, device=hf_model.device)
    buffers = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in kv.items()}
    for states in (states for pair in buffers.values() for states in pair):
        states.index_fill_(2, rows.to(states.device), 0)
    one = Pass(hf_model.self_test_ids(LENGTH)[None, rows], rows, rows, LENGTH)
    if entered is not None:
        one.resume_at, one.resume_with, one.num_read = entered.layer, entered.of_rows(rows), 1

    def run() -> tuple[dict[int, KV], Any]:
        nothing = (lambda *args: None) if hf_model.attends_to_cache else None  # is corrected, as late as can be
        cache = BlendingCache(hf_model.num_layers, buffers, rows, LENGTH, correct=nothing)
        return buffers, hf_model.lock.exclusive(run_rows, hf_model, hf_model.try_forward, one, cache)[0]

    return run_steps(hf_model, run, [None, *(hidden[..., list(of), :] for hidden in stock.hidden[1:])])


def _require_equal(stock: Stock, found: Steps, rows: Sequence[int], start: int = 0) -> None:
    """Requires that the rows of a pass equal those of the stock forward, from step `start` on.

    Raises:
        UnsupportedModel: with the difference.
    """
    kv, steps = _measured(stock, found, rows, start)
    if not _agree(kv, steps, stock.rounds_little):
        raise UnsupportedModel(f"relative differences up to {max(errors.max() for errors, _ in (*kv, *steps)):.2g}")


def _agree(kv: list[_Measured], steps: list[_Measured], rounds_little: bool) -> bool:
    """Whether differences are as small as they have to be.

    Where a model rounds much, rounding may send a row to other experts: then most rows of each step, and each row in
    most steps.
    """
    if not all((errors <= allowed).all() for errors, allowed in kv):
        return False
    right = [errors <= allowed for errors, allowed in steps]
    if rounds_little:
        return all(bool(step.all()) for step in right)
    whole = torch.stack([step for step in right if len(step) == len(right[0])])
    return all(step.float().mean() >= 0.5 for step in right) and bool((whole.float().mean(0) > 0.5).all())


def _measured(stock: Stock, found: Steps, rows: Sequence[int], start: int) -> tuple[list[_Measured], list[_Measured]]:
    """Differences (S,) of all keys and values, then of the steps, each with the largest one allowed.

    Fewer rows may come out of the last step: the last ones.
    """
    kv = [
        (row_errors(one[..., rows, :], truth[..., rows, :]), stock.kv_row_tolerance(layer))
        for layer, pair in found.kv.items()
        for one, truth in zip(pair, stock.kv[layer])
    ]
    steps = []
    for step, (one, truth) in enumerate(zip(found.hidden, stock.hidden)):
        truth = truth[..., rows[-one.shape[-2] :], :]
        steps.append((row_errors(one, truth), stock.tolerance(step)))
    return kv, steps[start:]


def _require_causal(hf_model: HFModel, stock: Stock) -> Steps:
    """The stock forward over fewer tokens, whose rows have to be what they are when more tokens follow.

    Each layer starts from what entered it in the longer forward, so a layer in which a token sees those after it, or
    in which rows mix, shows by itself.

    Raises:
        UnsupportedModel: a token depends on those after it.
    """
    positions = torch.arange(_SHORTER, device=hf_model.device)
    given = [None, *(hidden[..., :_SHORTER, :] for hidden in stock.hidden[1:])]
    shorter = run_steps(hf_model, lambda: hf_model.run_stock(positions), given)
    own = max(apart(*pair) for pair in zip(shorter.hidden, stock.hidden))
    found = _measured(stock, shorter, range(_SHORTER), 0)
    if own <= _ALIKE if hf_model.is_quantised else _agree(*found, stock.rounds_little):
        return shorter
    raise UnsupportedModel(
        f"{type(hf_model.model).__name__}: forwards over {_SHORTER} and {LENGTH} tokens differ, by {own:.2g}, where "
        "they have the same tokens: what a token gives depends on those after it, or on how many run together "
        "(an attention module that gets no causal mask, say), so blending would change answers."
    )
