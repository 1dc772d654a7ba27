"""One `Host`, with its self-test done, per model: found again wherever the model is handed in."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..arguments import described
from ..attention.by_position import HALF, has_kernels
from ..blend.caches import RowLayout
from ..blend.rotation import KeyRotation, find_rotations
from ..gpu.fused_norms import Norms, find_norms, norms_in_one_kernel
from ..gpu.fused_rotary import Namespace, find_rotary, rotary_in_one_kernel
from ..kv.origin import Origin, digest_of
from ..locks import ForwardLock
from ..model.compiled import as_written, run_as_written
from ..model.hf_model import CACHE, FORWARD_ERRORS, Host, UnsupportedModel, base_of
from ..model.layers import wrap_forward
from ..model.structure import Structure, any_training, with_mode
from ..model.weights import adapters
from ..model.weights.fingerprint import Fingerprint
from ..model.weights.offloading import device_of
from .layerwise import LENGTH, apart, stock_steps
from .self_test import prove_rows

logger = logging.getLogger(__name__)


class BlendableModel(Host):
    """A host that has passed the self-test, with what blending needs to know of it.

    Attributes:
        rotations: per layer, how cached state turns with position.
        layouts: per layer, the shape of one token's cached state.
        fingerprint: of weights and configuration, for store keys.
        reads_last_row_only: whether the last token's logits come from the last row of the decoder's output alone.
    """

    rotations: list[KeyRotation | None]
    layouts: dict[int, RowLayout]
    fingerprint: Fingerprint

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        stock = stock_steps(self)
        self.rotations, self.layouts, dtype = find_rotations(self, stock)
        self._kv_dtypes = {super().dtype: dtype}
        self.fingerprint = Fingerprint(model)
        self.graphs: Any = None  # of its passes, kept by graphs.py
        self.prefills_in_batches: bool | None = None  # found by batched_prefill.py; None: not yet
        self._small_steps: tuple[Norms, list[Namespace]] | None = None
        prove_rows(self, stock)
        self._forward = _forward_of(model)
        self.reads_last_row_only = _reads_last_row_only(self)
        self._structure = Structure(model, (model, self.decoder))
        self.refusal: str | None = None  # by the self-test, of the structure that was looked at last

    def look(self) -> tuple[bool, str | None]:
        """Returns whether the model, or a module inside it that then computes otherwise, is in training mode, and why
        the model cannot be blended as it is put together now, `None` if it can.

        Where modules, the code they run, their settings or their configs have changed, the self-test runs again.
        """
        is_training, as_it_was = self.state()
        if not (as_it_was or is_training):
            _making.exclusive(self._prove_again)
        return is_training, self.refusal

    def state(self) -> tuple[bool, bool]:
        """Returns whether the model, or a module inside it that then computes otherwise, is in training mode, and
        whether the rest is as it was when it was looked at last."""
        as_it_was = self._is_as_it_was()
        modules = self._structure.with_mode if as_it_was else with_mode(self.model.modules())
        return self.model.training or any_training(modules), as_it_was

    def _is_as_it_was(self) -> bool:
        kind, own = _forward_of(self.model)
        has_forward = kind is self._forward[0] and (self.unwrapped_forward is not None or own == self._forward[1])
        return has_forward and self._structure.is_as_it_was()

    @property
    def has_hooks(self) -> bool:
        """Whether somebody watches or steers the model's modules from outside, as they were looked at last."""
        return self._structure.has_hooks()

    def _prove_again(self) -> None:
        if self._is_as_it_was():  # another thread was quicker
            return
        model, forward = self.model, self.unwrapped_forward
        try:
            fresh = _proved(model)
            if forward is not None and fresh.decoder is not self.decoder:
                raise UnsupportedModel("its decoder was replaced; call remove() on its blender, and patch it again.")
        except FORWARD_ERRORS as error:
            self._structure, self.refusal = Structure(model, (model, self.decoder)), str(error)
            logger.warning("%s was changed, and cannot be blended as it is now: %s", type(model).__name__, error)
        else:
            fresh.unwrapped_forward = forward
            self.__dict__ = fresh.__dict__
            logger.info("%s was changed since its self-test, which ran again and passed.", type(model).__name__)

    @property
    def takes_kernels(self) -> bool:
        """Whether the Triton kernels may work on this model's K/V: all of it is on one GPU that has them.

        Asked several times a prompt, so it rests on what the fingerprint saw last.
        """
        on_one = self.fingerprint.devices == {self.device} and not self.ranks.are_several
        return has_kernels(self.device) and on_one

    @property
    def dtype(self) -> torch.dtype:
        """Of its K/V, as the self-test found it: parameters may be packed integers."""
        of_parameters = super().dtype
        return self._kv_dtypes.get(of_parameters, of_parameters)

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep K/V of their own. The last ones of some models attend to those of layers before them."""
        return len(self.layouts)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's K/V in all layers."""
        return self.dtype.itemsize * sum(layout.width for layout in self.layouts.values())

    def origin_of(self, ids: Sequence[int], behind_ids: Sequence[int]) -> Origin:
        """What is to be said of KV that this model computes of ids behind others."""
        return Origin(self.name, self.fingerprint.digest, self.described_rope, digest_of(ids), digest_of(behind_ids))

    def small_steps_in_one_kernel(self) -> None:
        """Lets norms and rotary embedding run as one kernel each in exclusive work, in half precision on a GPU."""
        if not self.takes_kernels or self.dtype not in HALF or not self.layers_run_as_written:
            return
        if self._small_steps is None:
            self._small_steps = find_norms(self.decoder), find_rotary(self.decoder)
        norms, namespaces = self._small_steps
        norms_in_one_kernel(self.lock, norms)
        rotary_in_one_kernel(self.lock, namespaces)


def _forward_of(model: nn.Module) -> tuple[type, tuple[Any, ...]]:
    """The model's class, and what names a forward that stands in place of the class's, without keeping it alive.

    While the model is patched, that is hfblend's.
    """
    own = vars(model).get("forward")
    own = None if own is None else as_written(own)
    return type(model), (id(own), getattr(own, "__code__", None))


def _reads_last_row_only(host: BlendableModel) -> bool:
    """Compares what the whole model makes of the decoder's output, and of its last row, as blending gives it."""
    outputs: list[Any] = []

    def keep(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs.append(own(*args, **kwargs))
        return outputs[0]

    def cut(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = outputs.pop()
        output.last_hidden_state = output.last_hidden_state[:, -1:]
        return output

    try:
        tries = (functools.partial(host.lock.exclusive, _try_whole, host, around) for around in (keep, cut))
        whole, last = (run_as_written((host.model, host.decoder), one) for one in tries)
    except FORWARD_ERRORS as error:
        logger.info("%s has no forward over a prompt's last row: %s", type(host.model).__name__, error)
        return False
    rounds_little = host.dtype in (torch.float32, torch.float64) and not host.is_quantised
    return not outputs and last.shape == whole.shape and apart(last, whole) <= (1e-3 if rounds_little else 5e-2)


@torch.no_grad()
def _try_whole(host: BlendableModel, around: Callable[..., Any]) -> torch.Tensor:
    """Logits (1, 1, V) of the last of a few fixed ids, in exclusive work, where `around` has the decoder's forward."""
    host._keep_rotary_state()
    ids = host.self_test_ids(LENGTH)[None]
    wrap_forward(host.lock, host.decoder, around)
    cache = DynamicCache(config=host.config)
    output = host.last_logits(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{CACHE: cache})
    return output.logits if "logits_to_keep" in host.model_parameters else output.logits[:, -1:]


_making = ForwardLock()  # a second host would not know that the first one is patched
_known: weakref.WeakKeyDictionary[nn.Module, BlendableModel] = weakref.WeakKeyDictionary()


def host_of(model: nn.Module) -> BlendableModel:
    """The model's host; the first call runs the self-test and reads every weight once.

    Raises:
        UnsupportedModel: with the reason.
        TypeError: no loaded model, but its name, its class, a tokenizer, a pipeline, ….
        ValueError: a model in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a causal LM that is loaded, got {described(model)}: load one with "
            "AutoModelForCausalLM.from_pretrained(…); of a pipeline, pass its .model."
        )
    if not hasattr(model, "config"):
        raise UnsupportedModel(f"model must be a causal LM of Transformers, got {described(model)}, without a config.")
    base = base_of(model)
    known = _known.get(base)
    is_training, refusal = (any_training(with_mode(base.modules())), None) if known is None else known.look()
    if model.training or is_training:
        raise ValueError(
            "The model, or a module inside it, is in training mode, where dropout would enter the cache; call "
            "model.eval()."
        )
    if reason := adapters.reason_against(model) or refusal:
        raise UnsupportedModel(reason)
    return known or _making.exclusive(_make, base)


def _make(model: nn.Module) -> BlendableModel:
    if model not in _known:
        _known[model] = _proved(model)
    return _known[model]


def _proved(model: nn.Module) -> BlendableModel:
    return torch.autocast(device_of(model).type, enabled=False)(BlendableModel)(model)


def forget(model: nn.Module) -> None:
    """Drops what is known of a model; the next `host_of` finds it out anew."""
    _known.pop(base_of(model), None)
