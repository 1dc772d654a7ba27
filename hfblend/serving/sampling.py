"""The next token of each request: every one has its own temperature, top-k, top-p and seed within a batch.

A token is the argmax of logits + temperature · noise. With noise of the Gumbel distribution that is a draw from
softmax(logits / temperature); with temperature 0 it is exactly the argmax of the logits. The noise of a token id is a
hash of the request's seed, the position and the id. So a request draws the same tokens whichever others are in its
batch, and goes on with the same ones after it lost its blocks. No state is kept, and no generator of torch is used.

    Sampling   settings of one request
    noise      Gumbel noise, from a hash
    lowest     the least logit that top-k and top-p keep
    perturbed  logits whose argmax are the next tokens
    Sampler    calls them in the engine
"""

from __future__ import annotations

import logging
import math
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import blake2b
from numbers import Integral, Real
from typing import Any

import torch

logger = logging.getLogger(__name__)

_NARROW = 1024  # logits that a top-k takes where it can: a sort of a large vocabulary costs ten times as much
_ALL = 2**31 - 1  # top_k of those who keep all
_RANGES: tuple[tuple[str, Any, int, int, str], ...] = (
    ("temperature", Real, 0, 1000, "a number from 0 (greedy) to 1000"),
    ("top_p", Real, 0, 1, "a number from 0 to 1 (all tokens)"),
    ("top_k", Integral, 0, _ALL, "an integer from 0 (all tokens) up"),
    ("seed", Integral, -(2**63), 2**64 - 1, "an integer of 64 bits"),
)
_NOT_APPLIED = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


class Step(IntEnum):
    """The work that the requests of a step ask for; each kind includes those before it."""

    GREEDY = 0
    DRAW = 1
    TOP = 2  # top-k of at most `_NARROW` tokens, with or without top-p
    SORT = 3


@dataclass(frozen=True)
class Sampling:
    """Settings of one request.

    Attributes:
        temperature: 0 takes the most probable token, the first one of equals.
        top_p: draws from the fewest, most probable tokens whose probabilities sum up to this; 1 from all. If `top_k`
            is given, too, from those of its tokens, as Transformers does.
        top_k: draws from so many most probable tokens; 0 from all. Tokens as probable as the last one stay, too.
        seed: default, a random one.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = field(default_factory=lambda: secrets.randbits(64))

    def __post_init__(self) -> None:
        for name, kind, least, most, expected in _RANGES:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
                raise ValueError(f"{name} must be {expected}, got {value!r}.")

    @classmethod
    def of(cls, generation_config: Any) -> Sampling:
        """The settings of a generation config: greedy, if its `do_sample` is off."""
        samples, values = bool(generation_config.do_sample), vars(generation_config)
        if samples and (names := [name for name in _NOT_APPLIED if values.get(name) not in (None, 0, 1)]):
            logger.warning("The generation config's %s are not applied in serving.", ", ".join(names))
        temperature, top_p, top_k = (values.get(name) for name in ("temperature", "top_p", "top_k"))
        return cls(
            (1.0 if temperature is None else temperature) if samples else 0.0,
            1.0 if top_p is None else top_p,
            top_k or 0,
        )

    def but(self, **changes: Any) -> Sampling:
        """Returns a request's settings: these, but for the changes that are not None, and with a new seed."""
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **{"seed": secrets.randbits(64), **changes})

    @property
    def step(self) -> Step:
        if self.temperature == 0 or self.top_k == 1:
            return Step.GREEDY
        if self.top_k:
            return Step.TOP if self.top_k <= _NARROW else Step.SORT
        return Step.DRAW if self.top_p == 1 else Step.SORT

    def packed(self, position: int) -> bytes:
        """Five int32: temperature and top-p as floats, top-k, and two for the noise."""
        if self.step is Step.GREEDY:
            return struct.pack("=ffiii", 0.0, math.inf, _ALL, 0, 0)
        top_p = math.inf if self.top_p == 1 else self.top_p
        key = blake2b(f"{self.seed} {position}".encode(), digest_size=8).digest()
        return struct.pack("=ffi", self.temperature, top_p, self.top_k or _ALL) + key


_GREEDY = Sampling()


# --- maths: R rows of V logits, and settings of each row (R, 1) -------------------------------------------------------


def noise(factor: torch.Tensor, offset: torch.Tensor, count: int) -> torch.Tensor:
    """Returns Gumbel noise (R, V) of two int32 numbers of each row."""
    return gumbel(hashed(factor, offset, count))


def hashed(factor: torch.Tensor, offset: torch.Tensor, count: int) -> torch.Tensor:
    """Returns uniform int32 numbers (R, V): lowbias32, a hash, of odd multiples of the ids.

    Source: https://nullprogram.com/blog/2018/07/31/
    """
    bits = torch.arange(count, dtype=torch.int32, device=factor.device) * (factor | 1) + offset
    for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
        bits ^= (bits >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # `>>` alone repeats the sign
        bits *= multiplier
    return bits


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Returns numbers of the Gumbel distribution, from -2.9 to 22.2, of uniform int32 ones.

    Improbable tokens need large noise, and so small uniform numbers, where floats are dense.
    """
    uniform = bits.bitwise_and(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def lowest(
    scores: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, step: Step
) -> torch.Tensor:
    """Returns the least logit of each row (R, 1) that its top-k and then its top-p keep; -inf where they keep all."""
    # Only a CPU may look whether a few logits are enough: a GPU would have to be waited for.
    width = _NARROW if step is Step.TOP or scores.device.type == "cpu" else scores.size(-1)
    while True:
        kept, is_known = _lowest_of(scores, temperature, top_p, top_k, width)
        if step is Step.TOP or width >= scores.size(-1) or is_known.all():
            return kept
        width *= 16


def _lowest_of(
    scores: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Looks for the least logits among the `width` largest ones; returns whether they suffice, too."""
    is_part = width < scores.size(-1)
    top = scores.topk(width).values if is_part else scores.sort(descending=True).values  # (R, W)
    is_beyond = torch.arange(top.size(-1), device=scores.device) >= top_k
    scale = temperature.clamp_min(torch.finfo(torch.float32).tiny)
    weights = ((top - top[:, :1]) / scale).exp().masked_fill_(is_beyond, 0.0)  # probabilities, but for a factor
    of_all = ((scores - top[:, :1]) / scale).exp().sum(-1, keepdim=True)
    total = weights.sum(-1, keepdim=True).where(top_k < _ALL, of_all)
    before = ((weights.cumsum(-1) < top_p * total) & ~is_beyond).sum(-1, keepdim=True)
    last = torch.minimum(before, top_k - 1)
    is_there = last < top.size(-1)
    kept = top.gather(-1, last.clamp_max(top.size(-1) - 1)).masked_fill_(~is_there, -torch.inf)
    is_all = (top_k == _ALL) & top_p.isinf()
    return kept, is_all | (is_there & ((top_k <= width) | (top_k == _ALL)))


def as_rows(packed: list[bytes]) -> torch.Tensor:
    """Returns an int32 tensor (5, R) of the settings of R requests."""
    return torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.int32).view(len(packed), -1).T


def perturbed(scores: torch.Tensor, rows: torch.Tensor, step: Step) -> torch.Tensor:
    """Returns logits (R, V) whose argmax are the next tokens, for rows (5, R) of `as_rows`."""
    if step is Step.GREEDY:
        return scores
    temperature, top_p = rows[:2].view(torch.float32).unsqueeze(-1)
    top_k, factor, offset = rows[2:].unsqueeze(-1)
    added = noise(factor, offset, scores.size(-1)).mul_(temperature).add_(scores)
    if step is Step.DRAW:
        return added
    return added.masked_fill_(scores < lowest(scores, temperature, top_p, top_k, step), -torch.inf)


# --- in the engine ----------------------------------------------------------------------------------------------------


class Sampler:
    """Stands where the engine has Transformers' logits processors: calls those, and draws from their logits.

    The engine then takes the argmax. Requests bring their settings as the keyword argument `sampling`; those that a
    warm-up makes up have the default ones.

    Attributes:
        step: of the batch that was prepared last.
    """

    do_processing = True
    _rows = 5  # of int32: those of `as_rows`

    def __init__(self, processors: Any, default: Sampling) -> None:
        self.processors, self.default = processors, default
        self.tensors_required = processors.tensors_required + self._rows
        self.step = Step.GREEDY

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        self.processors.check_kwargs({name: value for name, value in kwargs.items() if name != "sampling"})

    def fill_defaults(self, storage: torch.Tensor) -> None:
        self.processors.fill_defaults(storage[: -self._rows])
        storage[-self._rows :] = as_rows([_GREEDY.packed(0)]).to(storage.device)

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Writes the settings of requests that get a token now."""
        self.processors.prepare_tensor_args(requests_in_batch, arg_storage)
        # The position is that of the new token: unlike the list of tokens it is right while a step is in flight.
        drawn = [
            (request.state.logit_processor_kwargs.get("sampling", self.default), request.state.position_offset)
            for request in requests_in_batch
            if request.has_new_token
        ]
        self.step = max((sampling.step for sampling, _ in drawn), default=Step.GREEDY)
        if drawn:
            rows = as_rows([sampling.packed(position) for sampling, position in drawn])
            arg_storage[-self._rows :, : len(drawn)] = rows.to(arg_storage.device)
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, storage: torch.Tensor) -> torch.Tensor:
        scores = self.processors(input_ids, scores, storage)
        return perturbed(scores, storage[-self._rows :, : scores.size(0)], self.step)

    def keeps_apart_graphs_of(self, inputs_and_outputs: Any) -> None:
        """Has the engine record and replay a separate CUDA graph for each kind of step: a graph cannot branch."""
        for pair in getattr(inputs_and_outputs, "io_pairs", [inputs_and_outputs]):  # pairs, if batches are asynchronous
            held = getattr(pair, "device_io", pair)
            if not isinstance(held.graphs, _Graphs):
                held.graphs = _Graphs(held.graphs, self)


class _Graphs:
    """Stock's CUDA graphs by sizes of a step, and also by its kind."""

    def __init__(self, graphs: Any, sampler: Sampler) -> None:
        self.graphs, self.sampler = graphs, sampler

    def get_graph(self, key: tuple[int, ...]) -> Any:
        return self.graphs.get_graph((*key, self.sampler.step))

    def set_graph(self, key: tuple[int, ...], graph: Any) -> None:
        self.graphs.set_graph((*key, self.sampler.step), graph)
