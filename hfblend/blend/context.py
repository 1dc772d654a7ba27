"""What a prompt's chunks are computed behind: the same for a prompt that is answered and for chunks stored before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..config import BlendConfig
from ..kv.chunk import ChunkLost, Reader, in_memory
from ..prompts.filler import require_filler
from ..store import Store, chunk_key
from ..support.registry import BlendableModel

logger = logging.getLogger(__name__)

Prefill = Callable[[str, list[int], tuple[int, ...], "Reader | None"], Reader]

_MOST_BEHIND = 2**24  # ids that an entry captured in some context may claim: more than any model's context


@dataclass
class ChunkContext:
    """The ids that chunks are computed behind, their KV, and the store's entries as this model has them.

    Args:
        prefix_ids: all that stands before the first chunk.
        prefill: makes and stores KV of (key, ids, behind_ids, KV to continue from).
        lost: keys of entries that could not be read to their end; they count as missing.
        kv: KV of `behind_ids`, if it is already at hand.

    Attributes:
        behind_ids: what chunks are computed behind.

    Raises:
        ValueError: `chunk_prefix="bos"` without a BOS, `"filler"` without its ids.
    """

    host: BlendableModel
    store: Store
    config: BlendConfig
    prefix_ids: Sequence[int]
    prefill: Prefill
    lost: frozenset[str] = frozenset()
    kv: Reader | None = None
    behind_ids: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.behind_ids = self._behind_ids()
        # Asked for every chunk of a prompt, which waits for it.
        self._dtype, self._layouts = self.host.dtype, tuple(self.host.layouts.values())
        self._token_bytes = sum(layout.width for layout in self._layouts) * self._dtype.itemsize

    def key(self, ids: Sequence[int], behind_ids: Sequence[int] | None) -> str:
        """The key of ids that are computed behind others; `None`: in some context."""
        return chunk_key(self.host.fingerprint.digest, self._dtype, ids, behind_ids, self.config.namespace)

    def open(self, key: str, num_tokens: int, num_behind: int | None) -> Reader | None:
        """The entry; `None` if there is none that can be this model's KV of so many tokens.

        What it claims to be is compared before any of it is read: a file's header may claim anything.

        Args:
            num_behind: ids that the tokens were computed behind; `None`, in some context.
        """
        entry = None if key in self.lost else self.store.open(key)
        entry = entry if entry is not None and self._can_be_used(entry, num_tokens, num_behind, key) else None
        return self._on_all_ranks(entry) if self.host.ranks.are_several else entry

    def _can_be_used(self, entry: Reader, num_tokens: int, num_behind: int | None, key: str) -> bool:
        try:
            return self._fits(entry, num_tokens, num_behind, key) and len(entry.cached_positions) == num_tokens
        except ChunkLost as error:
            logger.warning("%s", error)
            return False

    def _on_all_ranks(self, entry: Reader | None) -> Reader | None:
        """The entry, in memory, if every rank has its own; what one cannot read is prefilled by all, together."""
        try:
            entry = None if entry is None else in_memory(entry)
        except ChunkLost as error:
            logger.warning("%s", error)
            entry = None
        return entry if self.host.ranks.all_agree(entry is not None) else None

    def to_continue(self) -> Reader | None:
        """KV of prefix, or of prefix and filler, to compute chunks from; `None` where that is not worth storing.

        It is looked for, and made, at the first chunk that is missing: a warm store is not asked for it.
        """
        if self.kv is None and self.behind_ids and self.config.chunk_prefix in ("prompt", "filler"):
            ids = list(self.behind_ids)
            key = self.key(ids, ())
            self.kv = self.open(key, len(ids), 0) or self.prefill(key, ids, (), None)
        return self.kv

    def _behind_ids(self) -> tuple[int, ...]:
        match self.config.chunk_prefix:
            case "prompt":
                return tuple(self.prefix_ids)
            case "filler":
                return (*self.prefix_ids, *self._filler())
            case "none":
                return ()
        bos = getattr(self.host.config, "bos_token_id", None)
        if bos is None:
            raise ValueError('chunk_prefix="bos" needs a bos_token_id in the model\'s config, which has none.')
        return (bos if isinstance(bos, int) else bos[0],)

    def _filler(self) -> tuple[int, ...]:
        """The filler, at most as long as half of the context that the model was trained for."""
        limit = getattr(self.host.config, "max_position_embeddings", None) or len(self.config.filler_ids) * 2
        return require_filler(self.config.filler_ids)[: limit // 2]

    def _fits(self, entry: Reader, num_tokens: int, num_behind: int | None, key: str) -> bool:
        """Whether an entry can be this model's KV of that many tokens; if not, it is logged and treated as a miss."""
        behind = min(entry.num_behind, _MOST_BEHIND) if num_behind is None else num_behind
        got = (entry.num_layers, len(entry), entry.num_behind, entry.num_bytes, entry.dtype, entry.layouts)
        num_bytes = num_tokens * self._token_bytes
        expected = (len(self._layouts), num_tokens, behind, num_bytes, self._dtype, self._layouts)
        if got != expected:
            logger.warning(
                "The store's entry %s… is not this model's: (layers, tokens, ids before them, bytes, dtype, layouts) "
                "are %s, expected %s. The chunk is computed again.",
                key[:12],
                got,
                expected,
            )
        return got == expected
