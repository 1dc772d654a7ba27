"""The digest of everything that a model's KV depend on: every weight and buffer, its structure and its configs."""

from __future__ import annotations

import hashlib
import logging
import operator
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...kv.streams import synchronize
from ...locks import Mutex
from ..rotary_tables import find_rotary_sources
from ..structure import Members, Structure, plain_tensors
from . import adapters
from . import quantised as quantised_weights
from .description import config_text
from .digests import digests
from .offloading import OffloadedWeights
from .samples import Samples

logger = logging.getLogger(__name__)

State = tuple[Any, ...]
_IS_META = operator.attrgetter("is_meta")
_PARTS = (operator.methodcaller("data_ptr"), operator.attrgetter("_version"), operator.attrgetter("shape"),
          operator.methodcaller("stride"), operator.attrgetter("dtype"))  # fmt: skip


class Fingerprint:
    """A model's fingerprint, taken again when anything that it covers has changed.

    A weight or buffer counts as changed when its memory, its shape or its version counter does: after assignment,
    in-place operations, moving, casting. Writes past the counter (fused optimizers, `.data`, NumPy views) are
    found in a sample of every tensor's elements, which is compared at each call. A write that misses the sample
    (`samples.Samples`) is not found, so call `refresh()` after it. `hfblend.model.structure` finds all other changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._lock = Mutex()  # while weights are read, the old digest must not be taken for theirs
        self._inside = _Inside(model)
        self._taken = _Taken()
        self._unreadable = uuid.uuid4().hex  # stands for weights on `meta` that no hook knows
        self._warned = False
        self.current(model)

    @property
    def digest(self) -> str:
        """The fingerprint as `current` last found it."""
        return self._taken.digest

    @property
    def devices(self) -> frozenset[torch.device]:
        """The devices of the weights, as `current` last found them."""
        return self._taken.devices

    @property
    def generation(self) -> int:
        """Counts the changes."""
        return self._taken.generation

    def current(self, model: nn.Module) -> str:
        """Returns the fingerprint as a hex digest. Looks at every weight, and reads only those that have changed."""
        with self._lock:
            if self._taken.samples.has_lost_memory():
                self._forget()
            samples = self._taken.samples
            now = samples.take()  # first: a GPU is at it while Python looks at the rest
            if not self._inside.is_as_it_was():
                self._taken = replace(self._taken, state=None)
                self._inside = _Inside(model)
            state = self._inside.state()
            if state != self._taken.state or not samples.are_as_they_were(now):
                self._taken = self._take(state, model.config)
            return self.digest

    def refresh(self) -> None:
        """Forgets the fingerprint: the next call reads every weight again."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._taken = _Taken(generation=self._taken.generation)

    def _take(self, state: State, config: Any) -> _Taken:
        """Samples first: weights written while they are read differ from the sample, and are read at the next call."""
        inside, before = self._inside, self._taken
        samples = Samples(inside.tensors())
        seen = dict(zip(inside.keys, zip(map(_state_of, inside.tensors()), samples.of_each())))
        known = {key: digest for key, digest in before.digests.items() if seen.get(key) == before.seen[key]}
        changed = [key for key in seen if key in before.seen and seen[key] != before.seen[key]]
        if silent := [key for key in changed if seen[key][0] == before.seen[key][0]]:
            logger.info("Weights were written past their version counters (%s, …): all are read again.", silent[0])
            known = {}
        known |= inside.read([key for key in inside.acting() if key not in known])
        if None in known.values() and not self._warned:
            self._warned = True
            logger.warning("Some weights are offloaded and cannot be read: chunk KV is valid for this process only.")
        digest = hashlib.sha256(repr(inside.described(config, known, self._unreadable)).encode()).hexdigest()
        return _Taken(digest, inside.devices(), before.generation + 1, state, samples, seen, known)


@dataclass(frozen=True)
class _Taken:
    """A fingerprint, and the weights as it was taken.

    Attributes:
        seen: key of each weight -> its state, its sample.
        digests: key of each weight that was read -> the digest of its bytes, `None` if they are unavailable.
    """

    digest: str = ""
    devices: frozenset[torch.device] = frozenset()
    generation: int = 0
    state: State | None = None
    samples: Samples = field(default_factory=lambda: Samples([]))
    seen: dict[str, tuple[State | None, bytes]] = field(default_factory=dict)
    digests: dict[str, bytes | None] = field(default_factory=dict)


@dataclass
class _Weight:
    """A plain tensor that the model's output depends on; `note` tells everything of it but its numbers."""

    name: str
    note: str
    tensor: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.name} {self.note}"


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Parameters, buffers and scales; of rotary tables that grow with prompts, those at rest."""
    at_rest: dict[nn.Module, dict[str, torch.Tensor]] = {}
    for source in find_rotary_sources(model):
        at_rest.setdefault(source.module, {}).update(source.at_rest())
    for path, module in model.named_modules():
        members = {**module._parameters, **module._buffers, **at_rest.get(module, {}), **dict(plain_tensors(module))}
        for name, value in (*members.items(), *quantised_weights.scales(module)):
            if torch.is_tensor(value):
                for note, part in quantised_weights.plain_parts(value):
                    yield _Weight(f"{path}.{name}", f"{note} {tuple(part.shape)} {part.dtype}", part)
            elif value is not None:
                yield _Weight(f"{path}.{name}", str(value), torch.empty(0))


class _Inside:
    """The parts of a model. Compared before every blended prompt, where each millisecond delays the first token."""

    def __init__(self, model: nn.Module) -> None:
        holders: list[dict[str, Any]] = [d for m in model.modules() for d in (m._parameters, m._buffers)]
        self._members = Members([*holders, *(d for m in model.modules() for d in quantised_weights.holders(m))])
        self._structure = Structure(model)
        self._described = self._structure.described(model)
        self._weights = {weight.key: weight for weight in _weights(model)}
        self.keys = list(self._weights)
        self._tensors: list[Any] = [weight.tensor for weight in self._weights.values()]
        self._adapters = adapters.Adapters(model)
        self._offloaded = OffloadedWeights(model)

    def is_as_it_was(self) -> bool:
        """Whether every module still holds the same members, and computes as it did."""
        return self._members.are_as_they_were() and self._structure.is_as_it_was()

    def devices(self) -> frozenset[torch.device]:
        """The devices of all weights."""
        return frozenset(weight.tensor.device for weight in self._weights.values())

    def tensors(self) -> list[torch.Tensor | None]:
        """The memory that holds each weight; `None` if it is in a file, or unknown."""
        if not any(map(_IS_META, self._tensors)):
            return self._tensors
        weights = self._weights.values()
        return [self._offloaded.in_ram(w.name) if w.tensor.is_meta else w.tensor for w in weights]

    def state(self) -> State:
        """Changes when a weight is written in place, moved or cast, an adapter switched, or a hook set."""
        of_adapters = self._adapters.merged(), self._adapters.state()
        return _states_of(self.tensors()), of_adapters, [hook for _, hook in self._structure.foreign_hooks()]

    def acting(self) -> list[str]:
        """The keys of the weights that forwards read."""
        unread = self._adapters.unread()
        return [key for key, weight in self._weights.items() if not f"{weight.name}.".startswith(unread)]

    def read(self, keys: list[str]) -> dict[str, bytes | None]:
        """Digests of weights, tied ones read once; `None` where the numbers are unavailable."""
        for device in self.devices():
            synchronize(device)
        tensors = dict(zip(self.keys, self.tensors()))
        place_of: dict[str, Any] = {key: _state_of(tensors[key]) or key for key in keys}
        one_of = {place: key for key, place in place_of.items()}
        found = dict(zip(one_of, digests(one_of.values(), self._content)))
        return {key: found[place] for key, place in place_of.items()}

    def _content(self, key: str) -> torch.Tensor | None:
        weight = self._weights[key]
        tensor = self._offloaded.read(weight.name) if weight.tensor.is_meta else weight.tensor
        return tensor if tensor is None or tensor.data_ptr() or not tensor.numel() else None  # freed, as FSDP does

    def described(self, config: Any, digests: dict[str, bytes | None], unreadable: str) -> list[Any]:
        """All that the output depends on, the same for every copy of the model."""
        weights = [(self._weights[key], digests[key] or unreadable) for key in self.acting()]
        return [
            config_text(config),
            self._described,
            self._structure.described_hooks(),
            [(adapters.plain_name(weight.name), weight.note, content) for weight, content in weights],
            self._adapters.state(),
            self._adapters.configs(),
        ]


def _states_of(tensors: list[Any]) -> Any:
    """`_state_of` all of them, a list for each part of it: a few calls of C."""
    try:
        return [list(map(part, tensors)) for part in _PARTS]
    except (AttributeError, RuntimeError):  # `None`, or a tensor of inference mode
        return list(map(_state_of, tensors))


def _state_of(tensor: torch.Tensor | None) -> State | None:
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype
