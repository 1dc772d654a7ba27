"""A prompt's documents in another order: for a longer exact prefix in the store, or with the most relevant one last.

prefix | doc A | doc B | doc C | question        the store's entry of C was computed right after prefix and B
prefix | doc B | doc C | doc A | question        B and C are exact: nothing of them is recomputed
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from ..arguments import one_of
from ..blend.look_up import ChunksOf, is_exact
from ..config import BlendConfig
from ..kv.chunk import ChunkLost, Reader
from ..prompts.prompt import ChunkSpans, Prompt
from ..store import Store
from ..support.registry import TestedModel, model_of
from ..util import require
from .blending import require_prompt

Order = Literal["prefix", "relevance"]


def reordered(model: nn.Module, prompt: Prompt, order: Order, store: Store, config: BlendConfig) -> Prompt:
    """Returns a prompt with its documents, those of the last turn, in another order; see `Blender.reordered`."""
    prompt = require_prompt(prompt)
    one_of("order", order, get_args(Order))
    tested, first = model_of(model), prompt.num_earlier
    count = len(prompt.chunk_spans) - first
    if count < 2:
        return prompt
    gaps = [list(gap) for gap in prompt.gap_ids]
    if any(gap != gaps[first + 1] for gap in gaps[first + 1 : -1]):
        raise ValueError(
            "reordered needs documents with equal text between them: this prompt has other text between some, such as "
            "titles, or earlier turns that no Prompt.from_chat wrote. Order the documents before you make the prompt."
        )
    chunks = prompt.chunk_ids[first:]
    if order == "prefix":
        tested.fingerprint.current(tested.model)
        chain = _Chains(tested, store, config, prompt).longest(prompt.ids[: prompt.chunk_spans[first][0]], range(count))
        chosen = [*chain, *(i for i in range(count) if i not in chain)]
        said = f"{sum(len(chunks[i]) for i in chain)} of their tokens are an exact prefix in the store"
    else:
        chosen, said = _by_relevance(chunks, prompt.suffix_ids), "the most relevant to the last ids by BM25 stands last"
    numbers = ", ".join(str(i + 1) for i in chosen)
    said, given = f"Documents ordered by {order} ({numbers} of those given): {said}.", prompt.chunk_spans
    made = Prompt.of_pieces(gaps, [*prompt.chunk_ids[:first], *(chunks[i] for i in chosen)])
    spans = ChunkSpans(made.chunk_spans, given.differs_from_joined_text, f"{given.note} {said}".strip())
    return replace(made, chunk_spans=spans, note=f"{prompt.note} {said}".strip(), num_earlier=first)


def _by_relevance(chunks: Sequence[Sequence[int]], question: Sequence[int]) -> list[int]:
    """Returns the places of chunks by BM25 over token ids, the most relevant last."""
    bm25s = require("bm25s", "bm25s", "ask", "Ordering by relevance needs")
    index = bm25s.BM25()
    index.index([[str(i) for i in ids] for ids in chunks], show_progress=False)
    scores = index.get_scores([str(i) for i in question]).tolist()
    return sorted(range(len(chunks)), key=scores.__getitem__)


@dataclass
class _Chains:
    """Stored chunks of a prompt that were computed right after one another."""

    model: TestedModel
    store: Store
    config: BlendConfig
    prompt: Prompt

    def __post_init__(self) -> None:
        chunks_of = ChunksOf(self.model, self.store, self.config, self.prompt.prefix_ids)
        self._chunks = self.prompt.chunk_ids[self.prompt.num_earlier :]
        self._gap = self.prompt.gap_ids[self.prompt.num_earlier + 1]
        places = [chunks_of.after_ids] if self.config.on_miss == "isolated" else [chunks_of.after_ids, None]
        texts = [[(array("q", ids), after) for ids in self._chunks] for after in places]
        opened = [chunks_of.open(chunks_of.keys(one), one) for one in texts]
        self._entries: list[list[Reader]] = [[entry for entry in found if entry] for found in zip(*opened)]

    def longest(self, before: list[int], places: Sequence[int]) -> list[int]:
        """Returns the places, among some, of the most tokens in a row whose entries are exact after `before`."""
        best: list[int] = []
        for i in places:
            ids = [*before, *self._chunks[i]]
            if any(self._is_exact(entry, ids, len(before)) for entry in self._entries[i]):
                chain = [i, *self.longest([*ids, *self._gap], [other for other in places if other != i])]
                best = max(best, chain, key=self._tokens)
        return best

    def _is_exact(self, entry: Reader, ids: list[int], start: int) -> bool:
        try:
            return is_exact(self.model, entry, array("q", ids), (start, len(ids)), len(self.prompt))
        except ChunkLost:  # the prompt that asks for it says so
            return False

    def _tokens(self, chain: Sequence[int]) -> int:
        return sum(len(self._chunks[i]) for i in chain)
