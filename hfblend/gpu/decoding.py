"""Decoding without Python: the decoder's forward over one token, recorded once as a CUDA graph, replayed for each.

Eager code launches some twenty kernels a layer, and a GPU that reads 16 GB of weights in 5 ms waits for Python for the
rest of the 25. One graph serves all prompts, of any length: it finds them through a `kernels.state.State`.

    state    T · addresses of the rows of each layer        ids, position
    graph    fresh K/V are written to row T − 1, attention reads T keys, …        -> hidden states (1, 1, C)

Transformers' `generate` calls the model as before, makes logits of the hidden states and chooses the token. The cache
is the one that a blend has handed over: packed rows with room for more; each step shows it one row more.

Shapes: T tokens with the new one, C hidden size, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.modules.module import _has_any_global_hook

from ..attention.by_position import QueryRows
from ..kernels.device import HAS_TRITON
from ..kv.rows import KV, RowLayout, sent
from ..model.hf_model import CACHE, CACHE_NAMES, HFModel
from ..model.passes import see_rows, until_stopped
from .recording import GraphCache, can_record, recorded

if HAS_TRITON:
    from ..kernels.state import FIRST_LAYER, State

logger = logging.getLogger(__name__)

_READ_HERE = {"input_ids", "attention_mask", "position_ids", "use_cache", *CACHE_NAMES}


class GrowingRows(Protocol):
    """A layer of a cache with spare rows: `hfblend.generate.hand_over.GrowingLayer`."""

    @property
    def kv(self) -> KV:
        """Keys and values (1, Hkv, T − 1, D)."""
        ...

    @property
    def address(self) -> int | None:
        """The address of its packed rows, if the next one may be written there."""
        ...

    def show_next_row(self) -> None:
        """Counts the next row, which has been written."""
        ...


class StepGraph:
    """The recorded forward over one token.

    Args:
        ids, positions: (1, 1).
        length: T.
        addresses: (L,) of the rows of each layer.
    """

    def __init__(
        self, hf_model: HFModel, ids: torch.Tensor, positions: torch.Tensor, length: int, addresses: list[int]
    ) -> None:
        self._hf_model, self._addresses = hf_model, addresses
        self._ids, self._positions = ids.clone(), positions.clone()
        numbers = torch.tensor([length, 1, 0, 0, *addresses])
        self.state = State(sent(numbers, hf_model.device), hf_model.layouts)
        # It runs twice, and writes the same row to its place each time: nothing that it reads changes.
        self._output, self._parts = recorded(hf_model, None, self._run)
        more = {name for name, value in self._output.items() if value is not None} - {"last_hidden_state", *CACHE_NAMES}
        if more:
            raise ValueError(f"its forward returns more than hidden states: {sorted(more)}")
        self._last_stream = torch.cuda.current_stream(hf_model.device)

    def _run(self, reached: Callable[[int], None]) -> Any:
        return self._hf_model.lock.exclusive(self._forward)

    def _forward(self) -> Any:
        hf_model, row = self._hf_model, self.state.numbers[:1] - 1
        mask = see_rows(hf_model, QueryRows(row[None], 1, state=self.state))
        hf_model.small_steps_in_one_kernel()
        cache = GraphCache(hf_model.num_layers, row, self.state, None)
        return until_stopped(hf_model.decoder_forward, self._ids, self._positions[0], mask, cache)

    def replay(self, ids: torch.Tensor, positions: torch.Tensor, length: int, addresses: list[int], cache: Any) -> Any:
        """Runs the forward over a token. Returns its output, in separate memory, with the caller's cache."""
        stream = torch.cuda.current_stream(self._hf_model.device)
        if stream != self._last_stream:
            stream.wait_stream(self._last_stream)  # it may still be at another prompt's token
        self._last_stream = stream
        numbers = self.state.numbers
        if addresses != self._addresses:
            numbers[FIRST_LAYER.value :].copy_(sent(torch.tensor(addresses), numbers.device))
            self._addresses = addresses
        numbers[:1].fill_(length)
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        for graph, _ in self._parts:
            graph.replay()
        return type(self._output)(last_hidden_state=self._output.last_hidden_state.clone(), **{CACHE: cache})


class Decoding:
    """The decoding of one model: its graph, recorded at the second token that could use it."""

    def __init__(self, hf_model: HFModel) -> None:
        self._hf_model = hf_model
        self._graph: StepGraph | None = None
        self._weights: Any = None
        self._was_asked, self._works = False, True

    def clear(self) -> None:
        """Gives up the graph, and its memory."""
        self._graph = None

    def step(self, kwargs: dict[str, Any], cache: Any, layers: Sequence[GrowingRows]) -> Any:
        """Runs the decoder's forward over one token, and puts its K/V into the cache.

        Args:
            kwargs: of the forward. Its mask (1, T), if any, hides no token.
            layers: of the cache.

        Returns:
            The output, or `None`, nothing done, where this forward is not, or not yet, a graph.
        """
        if not self._takes(kwargs, len(layers)):
            return None
        addresses = [layer.address for layer in layers]
        if None in addresses:  # no room, or not the rows that were handed over
            return None
        if not self._was_asked:
            self._was_asked = True
            return None
        return self._hf_model.lock.exclusive(self._step, kwargs, cache, layers, addresses)

    def _takes(self, kwargs: dict[str, Any], num_layers: int) -> bool:
        """Whether a forward is a plain one over one token, of a model that can be recorded."""
        hf_model, ids, positions = self._hf_model, kwargs.get("input_ids"), kwargs.get("position_ids")
        return (
            self._works
            and can_record(hf_model)
            and hf_model.layers_run_as_written
            and num_layers == hf_model.num_layers == hf_model.num_kv_layers
            and all(torch.is_tensor(one) and one.shape == (1, 1) for one in (ids, positions))
            and bool(kwargs.get("use_cache"))
            and all(value is None or value is False for name, value in kwargs.items() if name not in _READ_HERE)
            and not (torch.is_grad_enabled() or hf_model.lock.is_mine or _has_any_global_hook())
        )

    def _step(self, kwargs: dict[str, Any], cache: Any, layers: Sequence[GrowingRows], addresses: list[int]) -> Any:
        weights = self._hf_model.fingerprint.generation
        if weights != self._weights:  # a graph holds their addresses
            self._graph, self._weights = None, weights
        given = kwargs["input_ids"], kwargs["position_ids"], layers[0].kv[0].shape[2] + 1, addresses
        if self._graph is None and not self._record(layers, given):
            return None
        assert self._graph is not None
        output = self._graph.replay(*given, cache)
        for layer in layers:  # while the GPU is busy
            layer.show_next_row()
        return output

    def _record(self, layers: Sequence[GrowingRows], given: tuple[Any, ...]) -> bool:
        try:
            self._require_rows(layers)
            with torch.inference_mode(False), torch.no_grad():
                self._graph = StepGraph(self._hf_model, *given)
        except Exception as error:  # anything that a model does and a graph cannot hold
            self._works = False
            name = type(self._hf_model.model).__name__
            logger.warning("Decoding of %s cannot be recorded as a CUDA graph and runs as usual: %s", name, error)
        return self._graph is not None

    def _require_rows(self, layers: Sequence[GrowingRows]) -> None:
        """Raises `ValueError` for a cache of other K/V than the kernels expect."""
        kinds = [(RowLayout.of(layer.kv), layer.kv[0].dtype) for layer in layers]
        if kinds != [(self._hf_model.layouts[i], self._hf_model.dtype) for i in range(len(layers))]:
            raise ValueError("its cache holds other K/V than its self-test found")
