"""The Transformers model, adapted: the only file that knows Transformers' module names, signatures and versions."""

from __future__ import annotations

import functools
import inspect
import json
import operator
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from ..blend.caches import RecordingCache
from ..blend.rotation import KeyRotation, Tables, pair_tables
from ..kernels.device import has_kernels
from ..kv.origin import Origin, digest_of
from ..kv.rows import KV, RowLayout
from ..locks import lock_of
from .compiled import run_as_written
from .rotary_tables import KeptTables, TableKind, find_rotary_sources, state_of
from .tensor_parallel import Ranks
from .weights.fingerprint import Fingerprint
from .weights.offloading import device_of
from .weights.quantised import is_quantised

T = TypeVar("T")

_MOVABLE_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_SELF_TEST_SHIFT = 37
# What an unfit model may raise.
FORWARD_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# What forwards, masks and outputs call the cache. Transformers renamed it in 5.24; users may still give the old name.
CACHE = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"
CACHE_NAMES = dict.fromkeys((CACHE, "past_key_values"))


def cache_given(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or of `generate`, by either name; `None` if there is none."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def is_paged(cache: Any) -> bool:
    """Whether it is the cache of continuous batching, whose forwards hold tokens of many prompts in a row."""
    return type(cache).__name__ == "PagedAttentionCache"


def is_token_input(value: Any, ids: torch.Tensor) -> bool:
    """Whether a tensor describes the tokens: an entry each, or pixels and sound that stand for some."""
    return torch.is_tensor(value) and value.ndim >= 2 and (value.shape[1] == ids.shape[1] or value.is_floating_point())


class UnsupportedModel(ValueError):
    """This model's cached KV cannot be moved and blended; the message says why."""


class HFModel:
    """A causal language model as blending sees it: its decoder's own forward, layers, rotary tables and masks.

    Args:
        model: a Transformers causal LM in eval mode. Nothing of it is changed.

    Attributes:
        device: takes token ids, the first of those that the model is spread over; as it was looked at last.
        rotations: per layer, how cached state turns with position; set by the self-test, as are the next two.
        layouts: per layer, the shape of one token's cached state.
        fingerprint: of weights and configuration, for store keys.

    Raises:
        UnsupportedModel: encoder-decoders, recurrent or convolutional state, no decoder layers to be found.
    """

    rotations: list[KeyRotation | None]
    layouts: dict[int, RowLayout]
    fingerprint: Fingerprint

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModel(f"{type(model).__name__} is an encoder-decoder; hfblend blends decoder-only models.")
        self.config = config.get_text_config(decoder=True)
        kinds = set(getattr(self.config, "layer_types", None) or ()) - _MOVABLE_LAYER_TYPES
        if kinds:
            raise UnsupportedModel(
                f"{type(model).__name__} has layers of type {sorted(kinds)}, which keep more than keys and values: "
                "recurrent or convolutional state depends on all tokens before it, and an index next to the keys is "
                "not moved with them."
            )
        self.num_layers: int = self.config.num_hidden_layers
        self._decoder = weakref.ref(_find_decoder(model, self.num_layers))
        self.device = device_of(self.decoder)
        self._layer_owner = weakref.ref(_find_layer_owner(self.decoder, self.num_layers))
        self.decoder_parameters = list(inspect.signature(type(self.decoder).forward).parameters)[1:]
        self.model_parameters = list(inspect.signature(type(model).forward).parameters)[1:]
        self.rotary_sources = find_rotary_sources(self.layer_owner)
        # Whether a pass replaces attention by ours (else it takes rows of the model's own masks), its windows then, and
        # whether layers attend to what their cache returned as it is then; the self-test has the last word on all.
        self.attends_by_position = bool(getattr(type(model), "_supports_attention_backend", False))
        self.attends_to_cache = self.attends_by_position
        self.windows: dict[int, int | None] = {}
        self.layers_stand_alone = True  # it also finds whether layers hand each other more than hidden states
        # While the decoder's forward is wrapped, returns the one without the wrapper.
        self.unwrapped_forward: Callable[[], Callable[..., Any]] | None = None
        self.lock = lock_of(getattr(self.layer_owner, "config", self.config))
        self.ranks = Ranks(*_tensor_parallel(model))
        self.is_quantised = is_quantised(model)
        self.prefills_in_batches: bool | None = None  # found by prefill.py; None: not yet

    @property
    def model(self) -> nn.Module:
        return _alive(self._model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the model that was adapted, and no copy of it."""
        return self._model() is model

    @property
    def decoder(self) -> nn.Module:
        return _alive(self._decoder)

    @property
    def layer_owner(self) -> nn.Module:
        """The module that holds the decoder layers: the decoder, or the text model inside it."""
        return _alive(self._layer_owner)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers, in order."""
        for child in self.layer_owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == self.num_layers:
                return child
        raise UnsupportedModel(f"{type(self.model).__name__} no longer has a list of {self.num_layers} decoder layers.")

    @property
    def layers_run_as_written(self) -> bool:
        """Whether hooks and a layer's own forward count when it is called: compiled layers may not look at them."""
        return not any(layer._compiled_call_impl is not None or "_orig_mod" in layer._modules for layer in self.layers)

    @property
    def may_skip_layers(self) -> bool:
        """Whether a pass may start in the middle, or cut its last layer short."""
        return self.layers_stand_alone and self.layers_run_as_written

    def device_of_layer(self, layer_idx: int) -> torch.device:
        """The device that runs this layer and holds its K/V."""
        return device_of(self.layers[layer_idx])

    @property
    def num_ids(self) -> int | None:
        """Token ids that the model takes, as far as is known: some embeddings have more rows than the config says."""
        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        known = getattr(embedding, "num_embeddings", None), getattr(self.config, "vocab_size", None)
        return max((count for count in known if count), default=None)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    @property
    def chunks_at_once(self) -> int:
        """The number of chunks that one forward should prefill: one keeps a CPU busy, a GPU waits for Python."""
        return 1 if self.device.type == "cpu" else 8

    @property
    def name(self) -> str:
        """The hub's id, the name of its folder, or else its class, to be shown."""
        name = str(getattr(self.model.config, "_name_or_path", "") or "")
        return (os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name) or type(self.model).__name__

    @property
    def digest(self) -> str:
        """The fingerprint as last found."""
        return self.fingerprint.digest

    @property
    def takes_kernels(self) -> bool:
        """Whether the Triton kernels may work on this model's K/V: all of it is on one GPU that has them.

        Asked several times a prompt, so it relies on the devices that the fingerprint saw last.
        """
        on_one = has_kernels(self.device) and self.fingerprint.devices == {self.device}
        return on_one and not self.ranks.are_several

    @property
    def num_kv_layers(self) -> int:
        """Layers that hold K/V. The last ones of some models attend to those of layers before them."""
        return len(self.layouts)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's K/V in all layers."""
        return self.dtype.itemsize * sum(layout.width for layout in self.layouts.values())

    def origin_of(self, ids: Sequence[int], after_ids: Sequence[int]) -> Origin:
        """The origin, for a store, of KV that this model computes from ids after others."""
        rope = json.dumps(getattr(self.config, "rope_parameters", None) or {}, default=str)
        return Origin(self.name, self.digest, rope, digest_of(ids), digest_of(after_ids))

    @property
    def is_cast(self) -> bool:
        """Whether `torch.autocast` has forwards compute in another dtype than the model's: K/V would be of that."""
        kind = self.device.type
        is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return is_on and torch.get_autocast_dtype(kind) != self.dtype

    def require_own_dtype(self) -> None:
        """Raises `ValueError` where `torch.autocast` is on in another dtype."""
        if self.is_cast:
            raise ValueError(
                f"torch.autocast computes in {torch.get_autocast_dtype(self.device.type)}, and this model's K/V are "
                f"{self.dtype}: leave it, or load the model in that dtype."
            )

    def decoder_forward(self, **kwargs: Any) -> Any:
        """The decoder's own forward, past hfblend's wrapper if there is one."""
        decoder = self.decoder
        forward = decoder if self.unwrapped_forward is None else self.unwrapped_forward()
        return run_as_written((decoder,), forward, **kwargs)

    def last_logits(self, **kwargs: Any) -> Any:
        """The whole model's forward, asked for the logits of the last row only."""
        if "logits_to_keep" in self.model_parameters:
            kwargs["logits_to_keep"] = 1
        return run_as_written((self.model, self.decoder), self.model, **kwargs)

    def named_behind_the_ids(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of `generate` with names for all but the first: settings count wherever a caller writes them."""
        if len(args) < 2:
            return args, kwargs
        kind: Any = type(self.model)
        parameters = list(inspect.signature(kind.generate).parameters.values())[2:]
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = dict(zip(names, args[1:]))
        if len(named) < len(args) - 1 or named.keys() & kwargs.keys():
            return args, kwargs  # stock `generate` says what is wrong
        return args[:1], {**named, **kwargs}

    @property
    def has_hooks(self) -> bool:
        """Whether hooks watch or steer the model's modules from outside."""
        return False

    def small_steps_in_one_kernel(self) -> None:
        """Lets norms, rotary embedding and gates run as one kernel each in exclusive work; here they do not."""

    # --- rotary tables --------------------------------------------------------------------------------------------

    def regime(self, length: int) -> int:
        """The prompt length that sets length-dependent frequencies for a forward whose last position is `length` − 1.

        Dynamic NTK keeps the frequencies of the longest prompt so far, so its own state is asked.
        """
        trained = getattr(self.config, "max_position_embeddings", 0) or 0
        if length < trained:
            return length
        grown = max((s.length_in_force for s in self.rotary_sources), default=0)
        return max(length, grown) if grown > trained else length

    def prefilling(self, work: Callable[..., T], *args: Any) -> T:
        """Runs a forward of ids alone, with the frequencies of a model that has seen no prompt, then restores them."""
        if not self.length_dependent:
            return self.lock.shared(work, *args)
        return self.lock.exclusive(self._from_rest, work, *args)

    def _from_rest(self, work: Callable[..., T], *args: Any) -> T:
        self.keep_rotary_state()
        for source in self.rotary_sources:
            if source.length_in_force:
                source.back_to_rest()
        return work(*args)

    def keep_rotary_state(self) -> None:
        """Restores rotary modules when the exclusive work ends (dynamic NTK remembers the longest prompt)."""
        self.lock.undo_later(state_of(self.rotary_sources))

    def rotary_tables(self, source: int, positions: torch.Tensor, regime: int) -> Tables:
        """cos and sin (N, 2R or R) in fp32 of a rotary source at `positions` (N,), in a given regime."""
        return self.rotary_sources[source].tables(positions, regime)

    def rotary_tables_of_pieces(self, source: int, pieces: list[tuple[torch.Tensor, int]]) -> Tables:
        """`rotary_tables` of several (positions, regime), one after the other."""
        by_regime = groupby(pieces, operator.itemgetter(1) if self.length_dependent else lambda piece: 0)
        joined = [(torch.cat([positions for positions, _ in run]), regime) for regime, run in by_regime]
        cos, sin = zip(*(self.rotary_tables(source, *one) for one in joined))
        return torch.cat(cos), torch.cat(sin)

    def unit_tables(self, kind: TableKind, length: int) -> Tables:
        """cos and sin (at least `length`, R) of positions 0, 1, …, without scaling, on the model's device."""
        kept = None if self.length_dependent else self._unit_tables.of(kind, length, self.fingerprint.generation)
        return kept or self._unit_tables_at(kind, torch.arange(length), self.regime(length))

    @functools.cached_property
    def _unit_tables(self) -> KeptTables:
        trained = getattr(self.config, "max_position_embeddings", None) or 0
        return KeptTables(lambda kind, positions: self._unit_tables_at(kind, positions, 0), trained)

    def _unit_tables_at(self, kind: TableKind, positions: torch.Tensor, regime: int) -> Tables:
        source, layout, sign = kind
        tables = pair_tables(self.rotary_tables(source, positions, regime), layout)
        cos, sin = (table.to(self.device) for table in tables)
        scaling = torch.hypot(cos, sin)  # which keys keep when they are turned to position 0
        return (cos / scaling).contiguous(), (sign * sin / scaling).contiguous()

    @functools.cached_property
    def length_dependent(self) -> bool:
        """Whether frequencies depend on the prompt's length (dynamic, longrope), found by asking for two lengths."""
        try:
            return not self._same_tables(1, 2**20)
        except IndexError:  # a table of as many positions as the model has
            return not self._same_tables(1, self.config.max_position_embeddings)

    def same_regime(self, one: int, other: int) -> bool:
        """Whether two prompt lengths give every rotary source the same frequencies."""
        return one == other or not self.length_dependent or self._same_tables(one, other)

    def _same_tables(self, one: int, other: int) -> bool:
        return all(source.has_same_tables(one, other) for source in self.rotary_sources)

    # --- the self-test's forwards -------------------------------------------------------------------------------

    def self_test_positions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two ranges of positions for `count` ids, both inside the shortest context the RoPE was made for."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        lengths = [getattr(self.config, "max_position_embeddings", None), rope.get("original_max_position_embeddings")]
        limit = min((n for n in lengths if n), default=count + _SELF_TEST_SHIFT)
        first = torch.arange(count, device=self.device)
        return first, first + max(1, min(_SELF_TEST_SHIFT, limit - count))

    def self_test_ids(self, count: int) -> torch.Tensor:
        """(count,) fixed ids."""
        return (torch.arange(count, device=self.device) * 7 + 3) % self.config.vocab_size

    def run_stock(self, positions: torch.Tensor) -> tuple[dict[int, KV], Any]:
        """A stock forward over a few fixed ids at `positions` (N,): K/V of all layers, and its output."""
        cache = RecordingCache(self.num_layers)
        output = self.lock.exclusive(
            self.try_forward,
            input_ids=self.self_test_ids(len(positions))[None],
            position_ids=positions[None],
            use_cache=True,
            **{CACHE: cache},
        )
        if not cache.recorded:
            raise UnsupportedModel(f"{type(self.model).__name__} caches no keys and values.")
        return cache.recorded, output

    @torch.no_grad()
    def try_forward(self, **kwargs: Any) -> Any:
        """A forward of the decoder, in exclusive work, that leaves rotary modules as they were.

        Raises:
            UnsupportedModel: with the error that it ended in.
        """
        try:
            self.keep_rotary_state()
            return self.decoder_forward(**kwargs)
        except FORWARD_ERRORS as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot run with explicit position_ids and a cache: {error}"
            ) from error


def _alive(reference: weakref.ref[nn.Module]) -> nn.Module:
    module = reference()
    if module is None:
        raise RuntimeError("The model that hfblend was given no longer exists.")
    return module


def base_of(model: nn.Module) -> nn.Module:
    """The Transformers model itself, out of what peft wraps around it."""
    if isinstance(model, PreTrainedModel):
        return model
    return next((one for one in model.modules() if isinstance(one, PreTrainedModel)), model)


def _tensor_parallel(model: nn.Module) -> tuple[Any, torch.device | None]:
    """The process group that holds the model in shards, and the device where it exchanges tensors; `None`: one process.

    Raises:
        UnsupportedModel: a mesh of more than tensor parallelism.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or mesh.size() == 1:
        return None, None
    if mesh.ndim > 1 and mesh.size() != (getattr(model, "_tp_size", None) or 1):
        raise UnsupportedModel(
            f"{type(model).__name__} is spread over a mesh of {tuple(mesh.shape)} {mesh.mesh_dim_names}; hfblend "
            "blends tensor-parallel models, where every rank runs every layer."
        )
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    local = torch.device("cpu") if mesh.device_type == "cpu" else next(model.parameters()).device
    return mesh.get_group(), local


def _find_decoder(model: nn.Module, num_layers: int) -> nn.Module:
    """The outermost module below the LM head that takes token ids: the decoder, or a decoder with its vision tower."""
    for module in model.modules():
        takes_ids = "input_ids" in inspect.signature(type(module).forward).parameters
        if takes_ids and not isinstance(module, GenerationMixin) and _lists_of(module, num_layers):
            return module
    raise UnsupportedModel(
        f"{type(model).__name__} has no module below its LM head that takes input_ids and holds a list of {num_layers} "
        "decoder layers, as many as its config says that its cache has."
    )


def _find_layer_owner(decoder: nn.Module, num_layers: int) -> nn.Module:
    """The module that holds the decoder layers, not those of a vision tower next to it."""
    inner = decoder.get_decoder() if isinstance(decoder, PreTrainedModel) else decoder
    return (_lists_of(inner, num_layers) or _lists_of(decoder, num_layers))[0]


def _lists_of(root: nn.Module, length: int) -> list[nn.Module]:
    """The modules that have a list of that many modules."""
    return [module for module in root.modules() if any(_is_list_of(child, length) for child in module.children())]


def _is_list_of(module: nn.Module, num_layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == num_layers
