"""What makes a model's KV its own: a digest of every weight and buffer, and of what the modules are, and of configs."""

from __future__ import annotations

import hashlib
import logging
import operator
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from ...kv.streams import synchronize
from ...locks import Mutex
from ..rotary_tables import find_rotary_sources
from . import adapters
from . import quantised as quantised_weights
from .contents import Samples, digests
from .description import CONFIG_NOISE, config_text, described, hooks_described, is_foreign, plain_tensors
from .offloading import OffloadedWeights

logger = logging.getLogger(__name__)

_NUMBERS = ("is_causal", "sliding_window")  # of modules, besides all floats: scaling, epsilon, softcap

State = tuple[Any, ...]
_IS_META = operator.attrgetter("is_meta")
_PARTS = (operator.methodcaller("data_ptr"), operator.attrgetter("_version"), operator.attrgetter("shape"),
          operator.methodcaller("stride"), operator.attrgetter("dtype"))  # fmt: skip


class Fingerprint:
    """A model's fingerprint, taken again when anything that it covers has changed.

    A weight or buffer counts as changed when its memory, its shape or its version counter does: after assignment,
    in-place operations, moving, casting. Writes past the counter (fused optimizers, `.data`, NumPy views) are
    found in a sample of every tensor's elements, which is compared at each call; what misses all of them is not found
    (`contents.Samples`), so call `refresh()` after such a write.

    What else it covers (`description.described`) is read once; `hfblend.model.structure` finds when that changes.
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
        """Where the weights are, as `current` last found them."""
        return self._taken.devices

    @property
    def generation(self) -> int:
        """Counts the changes."""
        return self._taken.generation

    def current(self, model: nn.Module) -> str:
        """The fingerprint as a hex digest. Costs a look at every weight; only what has changed is read whole."""
        with self._lock:
            if not self._inside.is_as_it_was():
                self._inside = _Inside(model)
            if self._taken.samples.has_lost_memory():
                self._forget()
            state = self._inside.state(model.config)
            if state != self._taken.state or not self._taken.samples.are_as_they_were():
                self._taken = self._take(state, model.config)
            return self.digest

    def refresh(self) -> None:
        """Forgets the fingerprint: the next call reads every weight again."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._taken = _Taken(generation=self._taken.generation)

    def _take(self, state: State, config: Any) -> _Taken:
        """Sample first: what is written while the weights are read differs from it, and is read at the next call."""
        inside, before = self._inside, self._taken
        samples = Samples(inside.tensors())
        seen = dict(zip(inside.keys, zip(map(_state_of, inside.tensors()), samples.of_each())))
        known = {key: digest for key, digest in before.digests.items() if seen.get(key) == before.seen[key]}
        silent = [key for key in seen if key in before.seen and _changed_silently(before.seen[key], seen[key])]
        if silent:
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
    """A fingerprint, and what it was taken of.

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


def _changed_silently(before: tuple[State | None, bytes], now: tuple[State | None, bytes]) -> bool:
    return before[0] == now[0] and before[1] != now[1]


@dataclass
class _Weight:
    """A plain tensor that the model's output depends on; `note` is all of it that is not in its numbers."""

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
        for name, tensor in {**module._parameters, **module._buffers, **at_rest.get(module, {})}.items():
            if tensor is not None:
                for note, part in quantised_weights.plain_parts(tensor):
                    yield _Weight(f"{path}.{name}", f"{note} {tuple(part.shape)} {part.dtype}", part)
        yield from (
            _Weight(f"{path}.{name}", f"{note} {tuple(part.shape)} {part.dtype}", part)
            for name, tensor in plain_tensors(module)
            for note, part in quantised_weights.plain_parts(tensor)
        )
        for name, value in quantised_weights.beside(module):
            is_tensor = torch.is_tensor(value)
            note = f"{tuple(value.shape)} {value.dtype}" if is_tensor else str(value)
            yield _Weight(f"{path}.{name}", note, value if is_tensor else torch.empty(0))


class _Inside:
    """What a model consists of. Asked before every blended prompt, where a millisecond is one of the first token's."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._dicts: list[dict[str, Any]] = [d for m in modules for d in (m._modules, m._parameters, m._buffers)]
        self._dicts += [d for m in modules for d in quantised_weights.holders(m)]
        self._members = list(chain.from_iterable(d.values() for d in self._dicts))  # held, so that no id is given twice
        self._filled = [d for d in self._dicts if d]
        self._seen = self._look()
        self._hooks = [
            (path, hooks)
            for path, module in model.named_modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._hook_dicts = [hooks for _, hooks in self._hooks]
        self._described = described(model)
        self._weights = {weight.key: weight for weight in _weights(model)}
        self.keys = list(self._weights)
        self._tensors: list[Any] = [weight.tensor for weight in self._weights.values()]
        self.adapters = adapters.Adapters(model)
        self._offloaded = OffloadedWeights(model)
        self._numbers = [
            (f"{path}.{name}", vars(module), name)
            for path, module in model.named_modules()
            if not adapters.is_part_of_peft(module)
            for name, value in vars(module).items()
            if isinstance(value, float) or name in _NUMBERS
        ]

    def is_as_it_was(self) -> bool:
        """Whether every module still holds the same modules, parameters and buffers."""
        return self._look() == self._seen

    def _look(self) -> tuple[list[int], list[str], list[int]]:
        """How many members each module has, their names and identities."""
        members = chain.from_iterable(map(dict.values, self._filled))
        return list(map(len, self._dicts)), list(chain.from_iterable(self._filled)), list(map(id, members))

    def devices(self) -> frozenset[torch.device]:
        """Where the weights are."""
        return frozenset(weight.tensor.device for weight in self._weights.values())

    def tensors(self) -> list[torch.Tensor | None]:
        """Of each weight, the memory that holds it; `None` if it is in a file, or unknown."""
        if not any(map(_IS_META, self._tensors)):
            return self._tensors
        weights = self._weights.values()
        return [self._offloaded.in_ram(w.name) if w.tensor.is_meta else w.tensor for w in weights]

    def state(self, config: Any) -> State:
        """Changes when a weight is written in place, moved or cast, an adapter switched, a number or the config set."""
        numbers = [owner.get(name) for _, owner, name in self._numbers]
        of_adapters = self.adapters.merged(), self.adapters.state()
        hooks = [hook for _, hook in self._foreign_hooks()] if any(self._hook_dicts) else []
        return _states_of(self.tensors()), of_adapters, numbers, _settings(config), hooks

    def _foreign_hooks(self) -> list[tuple[str, Any]]:
        held = ((path, hook) for path, hooks in self._hooks if hooks for hook in tuple(hooks.values()))
        return [(path, hook) for path, hook in held if is_foreign(hook)]

    def acting(self) -> list[str]:
        """The keys of the weights that forwards read."""
        unread = self.adapters.unread()
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
        unread = self.adapters.unread()
        weights = [(self._weights[key], digests[key] or unreadable) for key in self.acting()]
        numbers = [(name, owner.get(key)) for name, owner, key in self._numbers if not name.startswith(unread)]
        return [
            config_text(config),
            self._described,
            hooks_described(self._foreign_hooks()),
            [(adapters.plain_name(weight.name), weight.note, content) for weight, content in weights],
            [(adapters.plain_name(name), value) for name, value in numbers],
            self.adapters.state(),
            self.adapters.configs(),
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


def _settings(config: Any) -> list[Any]:
    """The config as it stands, without the time that `to_dict` takes."""
    named = ((name, value) for name, value in vars(config).items() if name[0] != "_" and name not in CONFIG_NOISE)
    return [(name, _settings(value) if hasattr(value, "to_dict") else repr(value)) for name, value in named]
