"""What makes a model's KV its own: a digest of every weight and of the configuration that attention depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import adapters, quantised_weights
from .offloading import OffloadedWeights

logger = logging.getLogger(__name__)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
                 "architectures", "_attn_implementation", "attn_implementation", "output_attentions",
                 "output_hidden_states", "return_dict")  # fmt: skip


class Fingerprint:
    """A model's fingerprint, taken again when a weight has changed or other adapters act.

    A weight counts as changed when its storage or its version counter does: in-place operations, assignment, moving and
    casting are seen. Writing through `.data` moves neither; call `refresh()` after that.

    Attributes:
        digest: the fingerprint as `current` last found it.
        devices: where the weights are, as `current` last found them.
        generation: counts the changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._lock = threading.Lock()  # who comes while weights are read must not take the old digest for theirs
        self._state: tuple[Any, ...] | None = None
        self._inside: _Inside | None = None
        self.digest = ""
        self.devices: frozenset[torch.device] = frozenset()
        self.generation = 0
        self._unreadable = uuid.uuid4().hex  # stands for weights on `meta` that no hook knows
        self._warned = False
        self.current(model)

    def current(self, model: nn.Module) -> str:
        """The fingerprint as a hex digest. Costs a walk over the parameters; weights are read only on a change."""
        with self._lock:
            if self._inside is None or not self._inside.is_as_it_was():
                self._inside = _Inside(model)
            elif self._inside.has_lost_memory():
                self.refresh()
            state = self._inside.state()
            if state != self._state:
                if self._state is None or state[0] != self._state[0]:  # not only adapters were switched
                    self._inside = _Inside(model)
                self._state, self.digest = state, self._take(model.config, self._inside)
                self.devices = self._inside.devices()
                self.generation += 1
            return self.digest

    @property
    def modules(self) -> list[nn.Module]:
        """All modules of the model, as `current` last saw them."""
        return [] if self._inside is None else self._inside.modules

    def refresh(self) -> None:
        """Forgets the fingerprint: the next call reads every weight again."""
        self._state = None

    @torch.no_grad()
    def _take(self, config: Any, inside: _Inside) -> str:
        digest = hashlib.sha256(_config_text(config).encode())
        unread = inside.adapters.unread()
        for i, weight in enumerate(inside.weights):
            if f"{weight.name}.".startswith(unread):
                continue
            digest.update(f"{adapters.plain_name(weight.name)} {weight.note}".encode())
            content = inside.content(i)
            if content is None:
                self._warn_unreadable()
            digest.update(content or self._unreadable.encode())
        digest.update(f"{inside.adapters.state()} {inside.adapters.configs()}".encode())
        return digest.hexdigest()

    def _warn_unreadable(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Some weights are offloaded and cannot be read: chunk KV is valid for this process only.")


@dataclass
class _Weight:
    """A plain tensor that the model's output depends on; `note` is all of it that is not in its numbers."""

    name: str
    note: str
    tensor: torch.Tensor


def _weights(model: nn.Module) -> Iterator[_Weight]:
    """Parameters, the buffers that are saved with the model (rotary tables follow from the config), and scales."""
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                for note, part in quantised_weights.plain_parts(tensor):
                    yield _Weight(f"{path}.{name}", f"{note} {tuple(part.shape)} {part.dtype}", part)
        for name, value in quantised_weights.beside(module):
            is_tensor = torch.is_tensor(value)
            note = f"{tuple(value.shape)} {value.dtype}" if is_tensor else str(value)
            yield _Weight(f"{path}.{name}", note, value if is_tensor else torch.empty(0))


class _Inside:
    """What a model consists of. Asked before every blended prompt, where a millisecond is one of the first token's."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        dicts = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self._dicts = dicts
        self._members = list(chain.from_iterable(d.values() for d in dicts))  # held, so that no id is given twice
        self._names_and_ids = self._look()
        self.weights = list(_weights(model))
        self.adapters = adapters.Adapters(model)
        self._offloaded = OffloadedWeights(model)
        self._contents: dict[int, bytes | None] = {}
        self._memory = [StorageWeakRef(weight.tensor.untyped_storage()) for weight in self.weights]

    def has_lost_memory(self) -> bool:
        """Whether a weight was given other memory, `weight.data = …`: the next one may be given the old address."""
        return any(memory.expired() for memory in self._memory)

    def is_as_it_was(self) -> bool:
        """Whether every module still holds the same modules, parameters and buffers."""
        return self._look() == self._names_and_ids

    def _look(self) -> tuple[list[int], list[str], list[int]]:
        """How many members each module has, their names and identities."""
        filled = [d for d in self._dicts if d]
        members = chain.from_iterable(d.values() for d in filled)
        return list(map(len, self._dicts)), list(chain.from_iterable(filled)), list(map(id, members))

    def devices(self) -> frozenset[torch.device]:
        """Where the weights are."""
        return frozenset(weight.tensor.device for weight in self.weights)

    def state(self) -> tuple[Any, ...]:
        """Changes whenever a weight is written in place, moved or cast, or an adapter is switched."""
        weights = [self._state_of(weight) for weight in self.weights]
        return (weights, self.adapters.merged()), self.adapters.state()

    def _state_of(self, weight: _Weight) -> tuple[int, int]:
        tensor = weight.tensor
        if tensor.is_meta:
            return self._offloaded.state(weight.name)
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    def content(self, i: int) -> bytes | None:
        """A digest of a weight's numbers, taken once; `None` if they cannot be read. Offloaded ones come one by one."""
        if i not in self._contents:
            weight = self.weights[i]
            tensor = self._offloaded.read(weight.name) if weight.tensor.is_meta else weight.tensor
            self._contents[i] = None if tensor is None else hashlib.sha256(_sums(tensor)).digest()
        return self._contents[i]


def _sums(tensor: torch.Tensor) -> bytes:
    """Exact integer sums over a tensor's bits along its rows and its columns, on its own device.

    Any single change shows, and so do swapped rows, columns or elements. Read once, in int64.
    """
    if tensor.numel() == 0:
        return b""
    matrix = tensor.detach().contiguous().view(-1, tensor.shape[-1] if tensor.ndim > 1 else tensor.numel())
    bits = matrix.view(_INTEGERS[tensor.element_size()])
    rows, columns = bits.sum(-1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    return rows.cpu().numpy().tobytes() + columns.cpu().numpy().tobytes()


def _config_text(config: Any) -> str:
    values = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_NOISE}
    return json.dumps(values, sort_keys=True, default=str)
