"""What makes a model's KV its own: a digest of every weight and of the configuration that attention depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
                 "architectures", "_attn_implementation", "attn_implementation", "output_attentions",
                 "output_hidden_states", "return_dict")  # fmt: skip


class Fingerprint:
    """A model's fingerprint, taken again when a weight has changed.

    A weight counts as changed when its storage or its version counter does: in-place operations, assignment, moving and
    casting are seen. Writing through `.data` moves neither; call `refresh()` after that.

    Attributes:
        digest: the fingerprint as `current` last found it.
        devices: where the weights are, as `current` last found them.
        generation: counts the changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state: tuple[Any, ...] | None = None
        self._inside: _Inside | None = None
        self.digest = ""
        self.devices: frozenset[torch.device] = frozenset()
        self.generation = 0
        self._unreadable = uuid.uuid4().hex  # stands for weights that are not in memory (offloaded)
        self._warned = False
        self.current(model)

    def current(self, model: nn.Module) -> str:
        """The fingerprint as a hex digest. Costs a walk over the parameters; all weights are read only on a change."""
        if self._inside is None or not self._inside.is_as_it_was():
            self._inside = _Inside(model)
        state = self._inside.weights_state()
        if state != self._state:
            self._state, self.digest = state, self._take(model)
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
    def _take(self, model: nn.Module) -> str:
        digest = hashlib.sha256(_config_text(model.config).encode())
        for name, tensor in _named_tensors(model):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.device.type == "meta":
                self._warn_unreadable()
                digest.update(self._unreadable.encode())
            else:
                digest.update(_sums(tensor))
        digest.update(repr(_adapter_state(_adapters(model.modules()))).encode())
        return digest.hexdigest()

    def _warn_unreadable(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Some weights are offloaded and cannot be read: chunk KV is valid for this process only.")


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters, and the buffers that are saved with the model (rotary tables follow from the config)."""
    return [
        (f"{path}.{name}", tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]


class _Inside:
    """What a model consists of. Asked before every blended prompt, where a millisecond is one of the first token's."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        dicts = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self._dicts = dicts
        self._members = list(chain.from_iterable(d.values() for d in dicts))  # held, so that no id is given twice
        self._names_and_ids = self._look()
        self._weights = [tensor for _, tensor in _named_tensors(model)]
        self._adapters = _adapters(self.modules)

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
        return frozenset(tensor.device for tensor in self._weights)

    def weights_state(self) -> tuple[Any, ...]:
        """Changes whenever a weight is written in place, moved or cast, or an adapter is switched."""
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._weights]
        return versions, _adapter_state(self._adapters)


def _adapters(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """PEFT's tuner layers."""
    return [
        m
        for m in modules
        if "base_layer" in m._modules and hasattr(m, "active_adapters") and hasattr(m, "disable_adapters")
    ]


def _adapter_state(adapters: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Which adapters act, and how strongly: they change KV without changing a weight."""
    return tuple(
        (str(m.active_adapters), bool(m.disable_adapters), str(getattr(m, "merged_adapters", ())),
         str(getattr(m, "scaling", {})))
        for m in adapters
    )  # fmt: skip


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
