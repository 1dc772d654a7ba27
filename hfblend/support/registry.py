"""One `TestedModel` per Transformers model, its self-test done, kept by the model."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..arguments import described
from ..attention.by_position import HALF
from ..blend.caches import BlendingCache, RecordingCache
from ..blend.correction import CORRECTIONS, Correction, offset
from ..blend.corrector import corrector_of
from ..blend.model import Forward, Pass, Watched
from ..blend.reuse import Reuse, ReusedKV
from ..config import BlendConfig
from ..gpu.correction import Offsets
from ..gpu.decoding import Decoding
from ..gpu.fused import Fused, find_gates, find_norms, find_rotary, run_fused
from ..gpu.graphs import PassGraphs
from ..gpu.loader import loaders_of
from ..kv.chunk import ChunkKV, ChunkLost, Reader, in_memory
from ..locks import ForwardLock
from ..model.compiled import as_written, run_as_written
from ..model.hf_model import CACHE, FORWARD_ERRORS, HFModel, UnsupportedModel, base_of
from ..model.layers import wrap_forward
from ..model.layerwise import LENGTH, apart, stock_steps
from ..model.passes import run_all, run_rows
from ..model.prefill import in_batches, prefill_together
from ..model.structure import Structure, any_training, with_mode
from ..model.weights import adapters
from ..model.weights.fingerprint import Fingerprint
from ..model.weights.offloading import device_of, has_no_values
from ..trace.observer import Observer
from ..trace.progress import told
from .rotations import find_rotations
from .self_test import prove_rows

logger = logging.getLogger(__name__)


class TestedModel(HFModel):
    """A model that has passed the self-test: `hfblend.blend.model.BlendableModel` for Transformers.

    Attributes:
        reads_last_row_only: whether the last token's logits come from the last row of the decoder's output alone.
    """

    __test__ = False  # the name is no test's

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.fingerprint = Fingerprint(model)
        self._make_dependents()
        self._small_steps: Fused | None = None
        self._self_test()
        self._forward = _forward_of(model)
        self._structure = Structure(model, (model, self.decoder))
        self.refusal: str | None = None  # by the self-test, of the structure that was looked at last

    def _self_test(self) -> None:
        """Finds by forwards over a few fixed ids how cached state turns, how rows attend, and which rows are read.

        Raises:
            UnsupportedModel: the model cannot be blended.
        """
        with told(f"Testing once whether {type(self.model).__name__} can be blended", total=4) as line:
            stock = stock_steps(self)
            line.advance()
            self.rotations, self.layouts, dtype = find_rotations(self, stock)
            self._kv_dtypes = {super().dtype: dtype}
            line.advance()
            prove_rows(self, stock)
            line.advance()
            self.reads_last_row_only = _reads_last_row_only(self)

    def _make_dependents(self) -> None:
        """Makes what refers to this object and works for it on a GPU: graphs, decoding, the correction's kernels."""
        self.graphs, self.decoding, self._offsets = PassGraphs(self), Decoding(self), Offsets(self)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Copies and pickles of the model hold `None` instead, and are tested themselves."""
        return type(None), ()

    def look(self) -> tuple[bool, str | None]:
        """Returns whether the model, or a module inside it that then computes otherwise, is in training mode, and why
        the model cannot be blended in its present structure, `None` if it can.

        Where modules, the code they run, their settings or their configs have changed, the self-test runs again.
        """
        is_training, as_it_was = self.state()
        if not (as_it_was or is_training):
            _making.exclusive(self._prove_again)
        return is_training, self.refusal

    def state(self) -> tuple[bool, bool]:
        """Returns whether the model, or a module inside it that then computes otherwise, is in training mode, and
        whether the rest is as it was when it was looked at last."""
        model, self.device = self.model, device_of(self.decoder)
        as_it_was = self._is_as_it_was(model)
        modules = self._structure.with_mode if as_it_was else with_mode(model.modules())
        return model.training or any_training(modules), as_it_was

    def _is_as_it_was(self, model: nn.Module) -> bool:
        kind, own = _forward_of(model)
        has_forward = kind is self._forward[0] and (self.unwrapped_forward is not None or own == self._forward[1])
        return has_forward and self._structure.is_as_it_was()

    @property
    def has_hooks(self) -> bool:
        """Whether hooks watched or steered the model's modules from outside at the last look."""
        return self._structure.has_hooks()

    def _prove_again(self) -> None:
        model, forward = self.model, self.unwrapped_forward
        if self._is_as_it_was(model):  # another thread was quicker
            return
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
            self._make_dependents()
            logger.info("%s was changed since its self-test, which ran again and passed.", type(model).__name__)

    # --- what it is -----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its K/V, found by the self-test: parameters may be packed integers."""
        of_parameters = super().dtype
        return self._kv_dtypes.get(of_parameters, of_parameters)

    # --- passes ---------------------------------------------------------------------------------------------------

    def full_pass(self, forward: Forward, ids: torch.Tensor, cache: RecordingCache) -> tuple[Any, Watched | None]:
        """A forward over all tokens."""
        return self.lock.exclusive(run_all, self, forward, ids, cache)

    def rows_pass(self, forward: Forward, one: Pass, cache: BlendingCache, watch: bool) -> tuple[Any, Watched | None]:
        """A forward over some rows: a CUDA graph where that gives all that is asked for."""
        reused = cache.reused
        if isinstance(reused, ReusedKV) and reused.takes_graphs and (one.stop_at is None or one.record is not None):
            if reused.is_near:
                cache.load(list(self.layouts))  # by one kernel
            buffers = {**reused.unfilled, **cache.buffers}
            ran, output = self.graphs.run(forward, one, buffers, cache.load, cache.correct)
            if ran:
                return output, None
        return self.lock.exclusive(run_rows, self, forward, one, cache, watches=watch)

    def gather(self, reuse: Reuse, length: int, config: BlendConfig, observer: Observer) -> ReusedKV:
        """The reused K/V of a prompt, gathered by kernels on a GPU."""
        correction = correction_of(config)
        by_kernels = correction is offset and self.takes_kernels and self.dtype in HALF and bool(reuse.moved)
        corrector: Any = corrector_of(None if by_kernels else correction, self, reuse, length, observer)
        if by_kernels:
            corrector = self._offsets.of_prompt(reuse, length, observer)
        reused = ReusedKV(self, reuse, length, observer, corrector)
        reused.loaders = loaders_of(self, reuse, length)
        reused.takes_graphs = config.cuda_graphs and bool(reused.loaders) and self.takes_kernels
        if not config.layerwise:
            reused.preload()
        return reused

    def small_steps_in_one_kernel(self) -> None:
        """Lets norms, rotary embedding and gates run as one kernel each in a pass, in half precision on a GPU."""
        if not self.takes_kernels or self.dtype not in HALF or not self.layers_run_as_written:
            return
        if self._small_steps is None:
            decoder = self.decoder
            self._small_steps = find_norms(decoder) | find_rotary(decoder) | find_gates(decoder)
        run_fused(self.lock, self._small_steps)

    # --- chunks ---------------------------------------------------------------------------------------------------

    def prefill(self, chunks: Sequence[Sequence[int]], after_ids: Sequence[int], after: Reader | None) -> list[ChunkKV]:
        """K/V of chunks, each computed alone after the same ids."""
        num_tokens = sum(map(len, chunks)) + (len(after_ids) if after is None else 0)
        with told(f"Computing the KV of {num_tokens:,} tokens"):
            return prefill_together(self, chunks, after_ids, after)

    def batches(
        self, chunks: Mapping[str, Sequence[int]], num_after: int, batch_size: int | None = None
    ) -> Iterator[dict[str, Sequence[int]]]:
        """Chunks by key, in batches for `prefill`; default size 1 on a CPU, which is busy with one."""
        if not chunks:
            return
        with told("Computing chunks that are not stored", total=len(chunks)) as line:
            for batch in in_batches(chunks.items(), batch_size or self.chunks_at_once, num_after):
                yield dict(batch)
                line.advance(len(batch))

    # --- processes that share the model ---------------------------------------------------------------------------

    def all_heads(self, states: torch.Tensor, dim: int) -> torch.Tensor:
        """The heads of every rank."""
        return self.ranks.gathered(states, dim)

    def agreed(self, scores: torch.Tensor) -> torch.Tensor:
        """The first rank's scores."""
        return self.ranks.as_first(scores)

    def entries_of_all(self, entries: list[Reader | None]) -> list[Reader | None]:
        """The entries that every rank has, in memory; a chunk that one cannot read is prefilled by all."""
        if not self.ranks.are_several:
            return entries
        read = list(map(_read, entries))
        agreed = self.ranks.all_agree([entry is not None for entry in read])
        return [entry if everywhere else None for entry, everywhere in zip(read, agreed)]


def correction_of(config: BlendConfig) -> Correction | None:
    """Returns the correction that settings name, or hold; `None` for none."""
    return config.correction if callable(config.correction) else CORRECTIONS.get(config.correction)


def _read(entry: Reader | None) -> Reader | None:
    """The entry in memory; `None` where it cannot be read."""
    try:
        return None if entry is None else in_memory(entry)
    except ChunkLost as error:
        logger.warning("%s", error)
        return None


def _forward_of(model: nn.Module) -> tuple[type, tuple[Any, ...]]:
    """The model's class, and what names a forward that stands in place of the class's, without keeping it alive.

    While the model is patched, that is hfblend's.
    """
    own = vars(model).get("forward")
    own = None if own is None else as_written(own)
    return type(model), (id(own), getattr(own, "__code__", None))


def _reads_last_row_only(hf_model: HFModel) -> bool:
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
        tries = (functools.partial(hf_model.lock.exclusive, _try_whole, hf_model, around) for around in (keep, cut))
        whole, last = (run_as_written((hf_model.model, hf_model.decoder), one) for one in tries)
    except FORWARD_ERRORS as error:
        logger.info("%s has no forward over a prompt's last row: %s", type(hf_model.model).__name__, error)
        return False
    rounds_little = hf_model.dtype in (torch.float32, torch.float64) and not hf_model.is_quantised
    return not outputs and last.shape == whole.shape and apart(last, whole) <= (1e-3 if rounds_little else 5e-2)


@torch.no_grad()
def _try_whole(hf_model: HFModel, around: Callable[..., Any]) -> torch.Tensor:
    """Logits (1, 1, V) of the last of a few fixed ids, in exclusive work, where `around` has the decoder's forward."""
    hf_model.keep_rotary_state()
    ids = hf_model.self_test_ids(LENGTH)[None]
    wrap_forward(hf_model.lock, hf_model.decoder, around)
    cache = DynamicCache(config=hf_model.config)
    output = hf_model.last_logits(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{CACHE: cache})
    return output.logits if "logits_to_keep" in hf_model.model_parameters else output.logits[:, -1:]


_making = ForwardLock()  # a second model would not know that the first one is patched
# The attribute of a model that holds its tested model. A patched model and its `TestedModel` reach each other: a weak
# dictionary, whose values live as long as it does, would never free them.
_ATTRIBUTE = "_hfblend"


def _known(model: nn.Module) -> TestedModel | None:
    """The tested model of this very one: a shallow copy has its original's."""
    found = vars(model).get(_ATTRIBUTE)
    return found if found is not None and found.is_of(model) else None


def model_of(model: nn.Module) -> TestedModel:
    """The tested model; the first call runs the self-test and reads every weight once.

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
    known = _known(base)
    is_training, refusal = (any_training(with_mode(base.modules())), None) if known is None else known.look()
    if model.training or is_training:
        raise ValueError(
            "The model, or a module inside it, is in training mode, where dropout would enter the cache; call "
            "model.eval()."
        )
    if reason := adapters.reason_against(model) or refusal:
        raise UnsupportedModel(reason)
    return known or _making.exclusive(_make, base)


def _make(model: nn.Module) -> TestedModel:
    known = _known(model)
    if known is None:
        known = vars(model)[_ATTRIBUTE] = _proved(model)
    return known


def _proved(model: nn.Module) -> TestedModel:
    if has_no_values(model):
        raise UnsupportedModel("Its weights are on the device meta, without values; load it with from_pretrained(…).")
    return torch.autocast(device_of(model).type, enabled=False)(TestedModel)(model)


def forget(model: nn.Module) -> None:
    """Drops a tested model; the next `model_of` tests it again."""
    vars(base_of(model)).pop(_ATTRIBUTE, None)
