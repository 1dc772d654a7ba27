"""Chunk KV stored before the first question, under the keys that a prompt with these chunks will look up.

Chunks are taken from an iterable a window at a time; those missing in the store are sorted by length and prefilled in
batches. Only ids of one window and KV of one batch are in memory, and each batch is stored before the next is computed,
so that the next run continues a killed one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import nn

from ..arguments import described, is_function, is_tokenizer, require_text, require_tokenizer, token_ids, whole
from ..blend.look_up import ChunksOf
from ..config import BlendConfig, as_config
from ..kv.chunk import ChunkKV, ChunkLost, Reader, in_memory
from ..model.prefill import Ids, prefill
from ..prompts.prompt import Prompt
from ..prompts.tokenize import Encoder, text_in
from ..store import MemoryStore, Store, flush, holds, store_at
from ..support.registry import TestedModel, model_of
from ..trace.progress import Line, told

logger = logging.getLogger(__name__)

_TEXT_OR_IDS = "a text or a list of token ids"
_BATCHES_IN_WINDOW = 16


@dataclass
class Precomputed:
    """The progress of `precompute`.

    Attributes:
        chunks: taken from the iterable; `computed + skipped + failed` at the end.
        computed: prefilled and stored.
        skipped: already stored, or repeated.
        failed: prefilled, but not kept by the store (the log says why).
        tokens, num_bytes: of the computed ones.
        seconds: since the start.
    """

    chunks: int = 0
    computed: int = 0
    skipped: int = 0
    failed: int = 0
    tokens: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        failed = f", {self.failed:,} not kept by the store" if self.failed else ""
        return (
            f"{self.chunks:,} chunks: {self.computed:,} computed and stored, {self.skipped:,} were there{failed}; "
            f"{self.tokens:,} tokens, {self.num_bytes / 1e6:,.1f} MB in {self.seconds:,.1f} s "
            f"({self.tokens_per_s:,.0f} tokens/s)"
        )


def precompute(
    model: nn.Module,
    chunks: Iterable[str | Sequence[int]],
    *,
    prefix: str | Sequence[int] = (),
    store: Store | str | os.PathLike[str],
    config: BlendConfig | None = None,
    tokenizer: Any = None,
    separator: str | Sequence[int] | None = None,
    add_special_tokens: bool = False,
    batch_size: int | None = None,
    progress: Callable[[Precomputed], None] | None = None,
) -> Precomputed:
    """Computes and stores the KV of many chunks, and of the prefix before them. `blender.precompute` calls it.

    >>> print(precompute(model, texts, prefix=system, store=store, tokenizer=tokenizer))  # doctest: +SKIP

    Stored chunks are skipped: to continue a run that was stopped, start it again.

    Args:
        model: a causal LM in eval mode, patched or not.
        chunks: texts, documents with one as `page_content`, `text` or `content`, or token ids, of any number; a
            generator is not expanded. Texts are tokenised as in `Prompt.from_texts`.
        prefix: text or ids of all that will precede the first chunk: `prompt.prefix_ids`.
        store, config: those of later prompts; `chunk_prefix`, `filler_ids` and `namespace` enter the keys.
        tokenizer: needed for texts.
        separator, add_special_tokens: of a prefix given as text, as in `Prompt.from_texts`.
        batch_size: chunks in one forward, at most; default 1 on a CPU and 8 on a GPU. KV is the same up to rounding,
            which is checked at the first batch; a model that fails takes chunks one by one.
        progress: called with the report so far after each batch.

    Returns:
        The report.

    Raises:
        UnsupportedModel: the model's cached KV cannot be moved.
        TypeError, ValueError: chunks that are neither texts nor ids, an empty one, ids beyond the vocabulary, texts
            without a tokenizer. Earlier chunks are stored.
    """
    _require_several(chunks)
    if store is None:
        raise TypeError("store must be a store, a folder or a URL, got None: its entries would end with this call.")
    hf_model, config, store = model_of(model), as_config(config), store_at(store)
    batch_size = whole("batch_size", hf_model.chunks_at_once if batch_size is None else batch_size, 1)
    if progress is not None and not is_function(progress):
        raise TypeError(f"progress must be a function of the report so far, got {described(progress)}.")
    to_ids = _ToIds(hf_model, tokenizer)
    prefix_ids = to_ids.prefix(prefix, separator, add_special_tokens)
    hf_model.fingerprint.current(hf_model.model)
    with told("Computing chunks", total=len(chunks) if isinstance(chunks, Sized) else None) as line:
        run = _Run(hf_model, store, config, prefix_ids, batch_size, partial(_tell, line, progress))
        try:
            return run.over(to_ids(i, chunk) for i, chunk in enumerate(chunks))
        finally:
            run.chunks_of.kv = None  # frees this KV without the garbage collector


def chunk_keys(
    model: nn.Module, chunks: Iterable[str | Sequence[int]], *, prefix: str | Sequence[int] = (),
    config: BlendConfig | None = None, tokenizer: Any = None, separator: str | Sequence[int] | None = None,
    add_special_tokens: bool = False,
) -> list[str]:  # fmt: skip
    """Returns the keys under which `precompute` with these arguments stores chunks; raises its errors."""
    _require_several(chunks)
    hf_model = model_of(model)
    to_ids = _ToIds(hf_model, tokenizer)
    prefix_ids = to_ids.prefix(prefix, separator, add_special_tokens)
    hf_model.fingerprint.current(hf_model.model)
    chunks_of = ChunksOf(hf_model, MemoryStore(), as_config(config), prefix_ids)
    return chunks_of.keys([(to_ids(i, chunk), chunks_of.after_ids) for i, chunk in enumerate(chunks)])


def _tell(line: Line, progress: Callable[[Precomputed], None] | None, report: Precomputed) -> None:
    failed = f", {report.failed:,} not kept" if report.failed else ""
    line.say(f"Computing chunks, {report.tokens_per_s:,.0f} tokens/s{failed}")
    line.advance(report.computed + report.skipped + report.failed - line.done)
    if progress is not None:
        progress(report)


def _require_several(chunks: Any) -> None:
    if isinstance(chunks, str):
        raise TypeError("chunks must be several texts or lists of ids, got one text; write [text].")
    if isinstance(chunks, Prompt):
        raise TypeError("chunks must be several texts or lists of ids, got a Prompt: pass prompt.chunk_ids.")
    if isinstance(chunks, bytes | Mapping) or not isinstance(chunks, Iterable) or is_tokenizer(chunks):
        raise TypeError(f"chunks must be several texts or lists of ids, got {described(chunks)}.")


class _ToIds:
    """Turns chunks and prefix into token ids of the model."""

    def __init__(self, hf_model: TestedModel, tokenizer: Any) -> None:
        self.vocab_size = hf_model.num_ids
        self.tokenizer = tokenizer
        self.encode = None if tokenizer is None else Encoder(require_tokenizer(tokenizer))

    def __call__(self, number: int, chunk: Any) -> Ids:
        """Returns a chunk's ids.

        Raises:
            TypeError, ValueError: no ids, or invalid ones; the message names `number` (0-based).
        """
        name = f"Chunk {number}"
        text = text_in(chunk)
        if text is None:
            ids = token_ids(name, chunk, self.vocab_size, _TEXT_OR_IDS)
        else:
            ids = self._encoder().plain(require_text(name, text))
        if not ids:
            raise ValueError(f"{name} has no tokens; leave empty chunks out.")
        return ids

    def prefix(self, prefix: str | Sequence[int], separator: Any, add_special_tokens: bool) -> Ids:
        """Returns the ids before the first chunk of a prompt with this prefix."""
        if not isinstance(prefix, str):
            return token_ids("The prefix", prefix, self.vocab_size, _TEXT_OR_IDS)
        if not (prefix or separator or add_special_tokens):
            return []
        self._encoder()
        return Prompt.from_texts(
            self.tokenizer,
            prefix=prefix,
            chunks=["a"],
            suffix="",
            separator=separator,
            add_special_tokens=add_special_tokens,
        ).prefix_ids

    def _encoder(self) -> Encoder:
        if self.encode is None:
            raise ValueError("Texts need a tokenizer: give one to patch(), or pass token ids.")
        return self.encode


@dataclass
class _Run:
    """One run over chunks."""

    model: TestedModel
    store: Store
    config: BlendConfig
    prefix_ids: Ids
    batch_size: int
    progress: Callable[[Precomputed], None]

    def __post_init__(self) -> None:
        self.chunks_of = ChunksOf(self.model, _Flushed(self.store), self.config, self.prefix_ids)
        self.report, self.started = Precomputed(), time.perf_counter()
        self._first_stored: str | None = None

    def over(self, chunks: Iterator[Ids]) -> Precomputed:
        """Stores the prefix and every chunk."""
        self._keep_prefix()
        size = self.batch_size * _BATCHES_IN_WINDOW if self.batch_size > 1 else 1
        while window := list(islice(chunks, size)):
            missing = self._missing(window)
            if not missing:
                self._tell()
            else:
                self._hold_kv_before()
            for made in self.chunks_of.prefill_missing(missing, self.batch_size):
                self._count(made)
                self._tell()
        self._tell()
        self._warn_if_pushed_out()
        return self.report

    def _keep_prefix(self) -> None:
        ids = list(self.chunks_of.prefix_ids)
        (key,) = self.chunks_of.keys([(ids, ())])
        if ids and not self._holds(key):
            self.chunks_of.prefill(key, ids, ())

    def _holds(self, key: str) -> bool:
        """Whether the store has an entry; for a tensor-parallel model, on every rank."""
        return self.model.ranks.all_agree([holds(self.store, key)])[0]

    def _missing(self, window: list[Ids]) -> dict[str, Ids]:
        """Returns key -> chunk of those missing in the store; counts the others."""
        missing: dict[str, Ids] = {}
        keys = self.chunks_of.keys([(ids, self.chunks_of.after_ids) for ids in window])
        for key, ids in zip(keys, window):
            self.report.chunks += 1
            if key in missing or self._holds(key):
                self.report.skipped += 1
            else:
                missing[key] = ids
        return missing

    def _count(self, made: Mapping[str, Reader]) -> None:
        for key, chunk_kv in made.items():
            if not self._holds(key):
                self.report.failed += 1
                continue
            self._first_stored = self._first_stored or key
            self.report.computed += 1
            self.report.tokens += len(chunk_kv)
            self.report.num_bytes += chunk_kv.num_bytes

    def _hold_kv_before(self) -> None:
        """Holds KV of the tokens before the chunks on the model's device: read once for all chunks."""
        kv = self.chunks_of.kv
        if isinstance(kv, ChunkKV) and kv.layer(0)[0].device == self.model.device:
            return
        try:
            before = self.chunks_of.to_continue()
            self.chunks_of.kv = None if before is None else in_memory(before).to(self.model.device)
        except ChunkLost as error:
            logger.warning("%s; it is prefilled again.", error)
            self.chunks_of.lost |= {error.key}
            self.chunks_of.kv = None
            self._hold_kv_before()

    def _tell(self) -> None:
        self.report.seconds = time.perf_counter() - self.started
        self.progress(self.report)

    def _warn_if_pushed_out(self) -> None:
        if self._first_stored is not None and not self._holds(self._first_stored):
            logger.warning("The store is too small for these chunks: later ones pushed earlier ones out.")


class _Flushed:
    """A store whose `put` waits until an entry is kept: tiers write in the background."""

    def __init__(self, store: Store) -> None:
        self.store, self.open = store, store.open

    def put(self, key: str, chunk_kv: ChunkKV) -> None:
        self.store.put(key, chunk_kv)
        flush(self.store)


def prefill_chunk(
    model: nn.Module, ids: Sequence[int], behind_ids: Sequence[int] = (), *, behind: Reader | None = None
) -> ChunkKV:
    """Computes a chunk's KV after `behind_ids`, by one stock forward; the rows of `behind_ids` are dropped.

    >>> chunk_kv = prefill_chunk(model, tokenizer(text).input_ids, behind_ids=system_ids)  # doctest: +SKIP

    Args:
        model: a causal LM, patched or not.
        ids: the chunk's n token ids.
        behind_ids: ids before the chunk (prefix, BOS, …).
        behind: KV of the first of `behind_ids`, at positions 0 …, to continue from instead of computing them again;
            quantised KV is not continued from.

    Returns:
        K/V at positions len(behind_ids) … len(behind_ids) + n − 1.

    Raises:
        ValueError: an empty chunk, a model in training mode, or `torch.autocast` in another dtype.
        TypeError: text, or anything but a list of token ids.
    """
    tested = model_of(model)
    ids, behind_ids = (token_ids(name, own, tested.num_ids) for name, own in (("ids", ids), ("behind_ids", behind_ids)))
    if behind is not None and not hasattr(behind, "cached_positions"):
        raise TypeError(f"behind must be chunk KV, as prefill_chunk or a store gives it, got {described(behind)}.")
    tested.fingerprint.current(tested.model)  # the entry names it as its origin
    return prefill(tested, ids, behind_ids, behind)
