"""The end of the self-test: a pass over scattered rows must give what a stock forward over all tokens gives.

    stock    ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■      16 tokens, K/V of every layer kept
    pass     · ■ · · ■ ■ · · · ■ · · ■ · · ·      5 of them again, over the K/V of the others, those behind them too

A model whose positions do not come from `position_ids`, whose mask is of its own kind, or whose rows depend on which
others run with them, is refused here, before it could answer wrongly.

Shapes: S rows of the pass, T all tokens, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .attention import QueryRows
from .caches import KV, BlendingCache
from .host import UnsupportedModel
from .layers import Watched, watch
from .passes import Pass
from .switching import AttentionNotReplaceable, WindowLearner, attend_by_position

if TYPE_CHECKING:
    from .models import BlendableModel

LENGTH, ROWS = 16, (1, 4, 5, 9, 12)
STARTS_AT = 1  # the layer at which a shortened pass starts
States = list[torch.Tensor]  # (S, …): keys and values of each layer, then the hidden states that come out


@dataclass
class _Stock:
    """What a stock forward over all tokens leaves.

    Attributes:
        kv: layer -> K/V (1, Hkv, T, D).
        hidden: (T, C) that come out.
        entered: what entered the layer `STARTS_AT`; `None` where that cannot be seen.
    """

    kv: dict[int, KV]
    hidden: torch.Tensor
    entered: Watched | None

    @property
    def rows(self) -> States:
        return [*_rows_of(self.kv), self.hidden[list(ROWS)]]


def prove_rows(host: BlendableModel) -> None:
    """Finds how rows of this model attend: by position through our attention, or through rows of its own masks.

    Sets `attends_by_position`, `windows` and `layers_stand_alone` of the host.

    Raises:
        UnsupportedModel: neither way gives the rows what a stock forward gives them.
    """
    stock, wrong = _run_stock(host, LENGTH), []
    for by_position in (True, False) if host.attends_by_position else (False,):
        host.attends_by_position = by_position
        try:
            host.windows = _learn_windows(host) if by_position else {}
            _require_equal(host, _run_rows(host, stock.kv), stock.rows)
        except (AttentionNotReplaceable, UnsupportedModel) as error:
            wrong.append(f"{'by position' if by_position else 'with rows of its own masks'}, {error}")
        else:
            host.layers_stand_alone = _shortened_is_equal(host, stock)
            return
    raise UnsupportedModel(
        f"{type(host.model).__name__}: {len(ROWS)} of {LENGTH} tokens, computed at their own positions over the cached "
        "KV of the others, differ from a forward over all tokens, so blending would change answers "
        f"({'; '.join(wrong)})."
    )


def _learn_windows(host: BlendableModel) -> dict[int, int | None]:
    """Layer -> window of its mask, from a forward in which every mask is a marker."""
    positions = torch.arange(LENGTH, device=host.device)
    learner = WindowLearner()

    def learn() -> None:
        attend_by_position(host.lock, host.layer_owner.config, QueryRows(positions[None]), {}, learner)
        host.run_stock(positions)

    host.lock.exclusive(learn)
    return learner.windows


def _run_stock(host: BlendableModel, length: int) -> _Stock:
    """A stock forward over the first `length` tokens."""
    positions = torch.arange(length, device=host.device)

    def run() -> _Stock:
        entered = None
        if host.may_skip_layers and host.num_layers > STARTS_AT:
            entered = watch(host.lock, host.layers, STARTS_AT, positions)
        kv, output = host.run_stock(positions)
        return _Stock(kv, output[0][0], entered if entered is not None and entered.hidden is not None else None)

    return host.lock.exclusive(run)


def _shortened_is_equal(host: BlendableModel, stock: _Stock) -> bool:
    """Whether rows that go on from what entered a layer, and of which one goes on in the last, come out the same."""
    if stock.entered is None:
        return True  # then no pass is shortened
    late = {layer: kv for layer, kv in stock.kv.items() if layer >= STARTS_AT}
    truth = [*_rows_of(late), stock.hidden[list(ROWS)]]
    try:
        found = _run_rows(host, late, stock.entered)
        _require_equal(host, [states[-1:] for states in found], [states[-1:] for states in truth])
    except UnsupportedModel:
        return False
    return True


def _run_rows(host: BlendableModel, kv: dict[int, KV], entered: Watched | None = None) -> States:
    """A pass of the rows over K/V in which their own places are empty, from what entered a layer if that is given."""
    rows = torch.tensor(ROWS, device=host.device)
    buffers = {layer: (keys.clone(), values.clone()) for layer, (keys, values) in kv.items()}
    for states in (states for pair in buffers.values() for states in pair):
        states.index_fill_(2, rows.to(states.device), 0)
    one = Pass(host.self_test_ids(LENGTH)[None, rows], rows, rows, LENGTH)
    if entered is not None:
        one.resume_at, one.resume_with, one.num_read = entered.layer, entered.of_rows(rows), 1
    cache = BlendingCache(host.num_layers, buffers, lambda layer, fresh: buffers[layer], rows, LENGTH)
    output, _ = one.run(host, host.try_forward, cache)
    return [*_rows_of(buffers), output[0][0]]


def _rows_of(kv: dict[int, KV]) -> States:
    """(S, Hkv · D) of keys and values of every layer."""
    return [states[0][:, list(ROWS)].transpose(0, 1).flatten(1) for i in sorted(kv) for states in kv[i]]


def _require_equal(host: BlendableModel, found: States, truth: States) -> None:
    """Every row has to agree; in half precision most of them, as rounding may send one to other experts.

    Raises:
        UnsupportedModel: with the difference.
    """
    is_full_precision = host.dtype in (torch.float32, torch.float64)
    share, tolerance = (1.0, 1e-3) if is_full_precision else (0.5, 6e-2)

    def agree(errors: torch.Tensor, tolerance: float) -> bool:
        return (errors <= tolerance).float().mean().item() >= share

    errors = _errors(found, truth)
    if agree(errors, tolerance):
        return
    # Quantised models differ from themselves where other rows run with these.
    shorter = ROWS[-1] + 1
    own = _errors(_run_stock(host, shorter).rows, _run_stock(host, LENGTH).rows)
    if not agree(own, 5e-2):
        raise UnsupportedModel(f"forwards over {shorter} and {LENGTH} tokens differ, too, by {own.max():.2g}")
    if not agree(errors, max(tolerance, 4 * own.median().item())):
        raise UnsupportedModel(f"relative differences up to {errors.max():.2g}")


def _errors(found: States, truth: States) -> torch.Tensor:
    """(S,) relative difference of each row, where it is largest."""
    pairs = [(a.float().cpu(), b.float().cpu()) for a, b in zip(found, truth)]
    return torch.stack([(a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-20) for a, b in pairs]).max(0).values
