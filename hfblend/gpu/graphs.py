"""Passes without Python: recorded once as a CUDA graph, then replayed for other prompts.

A pass over a few rows is over in a few milliseconds on a GPU, while Python needs several times as long to launch it.
A graph fixes the number of rows (rounded up; the last row fills it) and nothing else: which rows they are, how long the
prompt is and where its buffers lie is read from GPU memory when it runs (`kernels.state.State`). A size is recorded the
second time it is asked for, so that a single call does not pay for what it never uses again.

A pass is recorded in parts, a graph for some layers each, and before a part runs its layers are asked for: so it goes
along while chunks arrive from RAM or disk, and Python is free for them.

Shapes: S rows of the pass, T all tokens, H query heads, L layers.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..attention.by_position import mask_of
from ..attention.record import AttentionRecord
from ..blend.model import Forward, Pass
from ..kernels.device import HAS_TRITON
from ..kernels.reference import AttentionArgs
from ..kv.rows import KV, sent
from ..model.hf_model import HFModel
from ..model.passes import run_rows
from .correction import in_graph
from .recording import GraphCache, can_record, recorded

if HAS_TRITON:
    from ..kernels.correction import OffsetKernels
    from ..kernels.state import FIRST_LAYER, State

logger = logging.getLogger(__name__)

MAX_ROWS = 4096  # with more, the GPU is busy for longer than Python needs
MAX_GRAPHS = 16
_SIMPLE = (type(None), bool, int, str)


class PassGraph:
    """One recorded pass.

    Args:
        like: a pass of the right number of rows; the first to be run.
        numbers: of its state.
        buffers: of every layer.
        pool: of CUDA graphs, whose memory it works in.
        offsets: what corrects layers, and which.
    """

    def __init__(
        self,
        hf_model: HFModel,
        forward: Forward,
        like: Pass,
        numbers: torch.Tensor,
        buffers: dict[int, KV],
        pool: Any,
        offsets: tuple[OffsetKernels, list[int]] | None = None,
    ) -> None:
        record = None if like.record is None else AttentionRecord(like.record.layers)
        inputs = {name: getattr(like, name).clone() for name in ("ids", "rows", "seen_from")}
        inputs["seen_from"] = inputs["seen_from"].to(torch.int32)
        if like.resume_with is not None:
            inputs["resume_with"] = like.resume_with.clone()
        self.state = State(numbers.clone(), hf_model.layouts)
        self._inputs, self._device = replace(like, **inputs, record=record), hf_model.device
        stop_at = None if like.record else like.stop_at
        first, end = FIRST_LAYER.value, FIRST_LAYER.value + hf_model.num_layers
        plan, size = self.state.numbers[end:], max(map(_num_bytes, buffers.values()))
        scratch = torch.zeros(size, dtype=torch.uint8, device=hf_model.device)
        self.state.numbers[first:end] = scratch.data_ptr()  # what is run now is run again: it must find what it reads

        def correct(layer_idx: int, rows: torch.Tensor, fresh: KV, args: AttentionArgs | None) -> None:
            assert offsets is not None
            offsets[0].correct(layer_idx, fresh, rows, self.state, plan, args)

        def run(reached: Callable[[int], None]) -> Any:
            if record is not None:
                record.received.clear()
            corrected = offsets[1] if offsets else ()
            cache = GraphCache(
                hf_model.num_layers, self._inputs.rows, self.state, stop_at, reached, correct, corrected
            )  # fmt: skip
            return hf_model.lock.exclusive(run_rows, hf_model, forward, self._inputs, cache, self.state)[0]

        self.output, self._parts = recorded(hf_model, pool, run)
        self._last_stream = torch.cuda.current_stream(hf_model.device)

    def replay(self, one: Pass, numbers: torch.Tensor, load: Callable[[Sequence[int]], None]) -> Any:
        """Runs a pass of the same form. Returns the forward's output, in separate memory."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._last_stream:
            stream.wait_stream(self._last_stream)  # it may still be at it
        self._last_stream = stream
        for name in ("ids", "rows", "seen_from", "resume_with"):
            if getattr(one, name) is not None:
                getattr(self._inputs, name).copy_(getattr(one, name))
        self.state.numbers.copy_(numbers)
        for graph, layers in self._parts:
            load(layers)
            graph.replay()
        if self.output is None:
            return None
        return type(self.output)(**{k: v.clone() for k, v in self.output.items() if torch.is_tensor(v)})


class PassGraphs:
    """The graphs of one model, the least recently used given up first."""

    def __init__(self, hf_model: HFModel) -> None:
        self.hf_model = hf_model
        self._graphs: OrderedDict[Any, PassGraph] = OrderedDict()
        self._asked: OrderedDict[Any, None] = OrderedDict()
        self._weights: Any = None
        self._pool: Any = None  # one working memory for all: they never run at the same time
        self._works = True

    def clear(self) -> None:
        """Gives up all graphs, and their memory."""
        self._graphs.clear()

    def run(
        self,
        forward: Forward,
        one: Pass,
        buffers: dict[int, KV],
        load: Callable[[Sequence[int]], None],
        correct: Callable[..., None] | None = None,
    ) -> tuple[bool, Any]:
        """Runs a pass as a graph, if one is there or worth recording.

        Args:
            one: its `record`, if any, gets what is recorded.
            buffers: of every layer.
            load: called before a part, with the layers whose reused rows must be in place for what is launched then.
            correct: of the pass's cache; one that is not by kernels cannot be recorded.

        Returns:
            Whether it ran, and the forward's output.
        """
        corrector, corrected = in_graph(correct)
        form = self._form(forward, one, corrected)
        if form is None or not self._is_ready(form) or (correct is not None and corrector is None):
            return False, None
        padded, count = self._padded(one), len(one.rows)
        received = None
        if one.record is not None:
            shape = (len(one.record.layers), self.hf_model.config.num_attention_heads, one.length)
            received = torch.empty(shape, dtype=torch.float32, device=self.hf_model.device)
        mask = None if one.hidden is None else mask_of(one.hidden, one.length)
        rows = [buffers[i][0] if i in buffers else None for i in range(self.hf_model.num_layers)]  # keys come first
        numbers = [one.length, count, *(0 if t is None else t.data_ptr() for t in (received, mask, *rows))]
        offsets = None
        if corrector is not None:
            offsets = corrector.kernels, corrected
            numbers += corrector.numbers_for(one.rows)
        numbers_there = sent(torch.tensor(numbers), self.hf_model.device)

        def replay() -> tuple[bool, Any]:
            if form not in self._graphs and not self._capture(form, forward, padded, numbers_there, buffers, offsets):
                return False, None
            self._graphs.move_to_end(form)
            return True, self._graphs[form].replay(padded, numbers_there, load)

        ran, output = self.hf_model.lock.exclusive(replay)
        if ran and one.record is not None and received is not None:
            one.record.received.update(zip(one.record.layers, received))
        if ran and corrector is not None:
            corrector.graph_ran(corrected, numbers_there[FIRST_LAYER.value + len(rows) :])
        return ran, output

    def _form(self, forward: Forward, one: Pass, corrected: Sequence[int] = ()) -> Any:
        """The key of a graph of this pass, in which some layers are corrected; `None` where it cannot be one."""
        kind = self._kind(forward)
        if not self._works or kind is None or not 0 < len(one.rows) <= MAX_ROWS:
            return None
        layers = None if one.record is None else one.record.layers
        what = kind, _rounded(len(one.rows)), one.stop_at, layers, one.hidden is None
        return *what, one.resume_at, one.num_read, tuple(corrected)

    def _kind(self, forward: Forward) -> Any:
        """The name of this one of the model's forwards, and its options; `None` for any other."""
        if forward == self.hf_model.last_logits:
            return "model", ()
        if not isinstance(forward, functools.partial) or forward.func != self.hf_model.decoder_forward:
            return None
        options = forward.keywords
        wanted = options.get("output_attentions") or options.get("output_hidden_states")
        if wanted or forward.args or not all(isinstance(value, _SIMPLE) for value in options.values()):
            return None
        return "decoder", tuple(sorted(options.items()))

    def _is_ready(self, form: Any) -> bool:
        """Whether the form has been asked for before, the weights are those of the graphs, and there are no hooks."""
        if not can_record(self.hf_model):
            return False
        weights = self.hf_model.fingerprint.generation
        if weights != self._weights:  # a graph holds their addresses
            self._graphs.clear()
            self._weights = weights
        if form in self._graphs or form in self._asked:
            return True
        self._asked[form] = None
        if len(self._asked) > 64 * MAX_GRAPHS:
            self._asked.popitem(last=False)
        return False

    def _capture(
        self, form: Any, forward: Forward, padded: Pass, numbers: torch.Tensor, buffers: dict[int, KV], offsets: Any
    ) -> bool:
        if not self._graphs:  # a pool ends with the last graph that was in it
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._graphs[form] = PassGraph(self.hf_model, forward, padded, numbers, buffers, self._pool, offsets)
        except Exception as error:  # anything that a model does and a graph cannot hold
            self._works = False
            name = type(self.hf_model.model).__name__
            logger.warning("Passes of %s cannot be recorded as CUDA graphs and run as usual: %s", name, error)
            return False
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return True

    def _padded(self, one: Pass) -> Pass:
        """The pass with copies of its last row up to the rounded size."""
        missing = _rounded(len(one.rows)) - len(one.rows)

        def fill(states: torch.Tensor, dim: int) -> torch.Tensor:
            last = states.narrow(dim, states.shape[dim] - 1, 1)
            return torch.cat([states, last.expand(*(missing if i == dim else -1 for i in range(states.ndim)))], dim)

        entered = None if one.resume_with is None else fill(one.resume_with, 1)
        rows = fill(one.rows, 0)
        seen_from = rows if one.seen_from is one.rows else fill(one.seen_from, 0)
        return replace(one, ids=fill(one.ids, 1), rows=rows, seen_from=seen_from, resume_with=entered)


def _num_bytes(kv: KV) -> int:
    return sum(states.nbytes for states in kv)


def _rounded(rows: int) -> int:
    """S rounded up so far that few different sizes are left, and little is computed in vain."""
    step = 16 if rows <= 128 else 32 if rows <= 512 else 64 if rows <= 2048 else 128
    return -(-rows // step) * step
