"""The stored KV that a prompt reuses, and its K/V at the new positions, a layer at a time.

    stored rows of a chunk     ▨▨▨▨▨  ──────────┐ copied, keys turned to their new positions
    the layer's buffer     ▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨▨ · · ·      T rows and room for the tokens to be decoded

On a GPU both happen in one kernel; what lies in RAM is copied to its place before, ahead of the pass (`gpu/loader.py`).

Shapes: Hkv KV heads, T all tokens, N reused tokens that could be recomputed, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch

from ..arguments import described
from ..kernels.reference import AttentionArgs
from ..kv.chunk import ChunkKV, Reader, layer_of_each
from ..kv.rows import KV, ROOM, empty_kv, rows_at, sent
from ..prompts.separator import Span
from ..trace.observer import Observer
from .correction import Correction, Errors
from .rotation import KeyRotation, Realigner, Tables, rotate
from .trust import Queries, asked


@dataclass
class Piece:
    """One reused span of the prompt and the entry that its KV comes from."""

    span: Span
    entry: Reader
    exact: bool


@dataclass
class Reuse:
    """The tokens that a prompt reuses, and those left to compute; together they cover every token once.

    Attributes:
        exact, moved: pieces whose KV holds unchanged, and pieces that stand elsewhere than where they were computed.
        candidate_idx: (N,) tokens of `moved`, rising.
        fresh_idx: (F,) all tokens that are not reused, and always the prompt's last one.
        suffix_idx: those of them that belong to the prompt's suffix.
        unread_idx: those that a pass of the suffix alone leaves out.
    """

    exact: list[Piece]
    moved: list[Piece]
    candidate_idx: torch.Tensor
    fresh_idx: torch.Tensor
    suffix_idx: torch.Tensor
    unread_idx: torch.Tensor

    @property
    def pieces(self) -> list[Piece]:
        """All of them."""
        return self.exact + self.moved

    @property
    def exact_from_start(self) -> int:
        """How many of the first tokens lie in exact pieces."""
        stop = 0
        for start, end in sorted(piece.span for piece in self.exact):
            stop = end if start == stop else stop
        return stop


class ReusingModel(Protocol):
    """The part of a model that reused K/V are assembled for.

    Attributes:
        rotations: per layer, how cached state turns with position.
    """

    rotations: list[KeyRotation | None]

    @property
    def device(self) -> torch.device: ...
    @property
    def num_kv_layers(self) -> int: ...
    def device_of_layer(self, layer_idx: int) -> torch.device: ...

    def rotary_tables_of_pieces(self, source: int, pieces: list[tuple[torch.Tensor, int]]) -> Tables:
        """Returns cos and sin (N, 2R or R) in fp32 of a rotary source, for several (positions, regime) in a row."""
        ...

    def regime(self, length: int) -> int:
        """The prompt length that sets length-dependent RoPE frequencies in a prompt of `length` tokens."""
        ...


class Loader(Protocol):
    """Gathers the reused rows of some layers, faster than `ReusedKV` does it."""

    buffers: dict[int, KV]  # layer -> (1, Hkv, T + room, D), until it is loaded
    is_near: bool  # whether all rows lie in the device's memory

    def has(self, layer_idx: int) -> bool: ...
    def load(self, layers: Sequence[int]) -> dict[int, KV]: ...
    def read_ahead(self, layer_idx: int) -> None: ...


class ReusedKV:
    """A layer's reused K/V at its new positions, assembled when asked for.

    Args:
        model, reuse: the model and the prompt's pieces.
        length: T.
        observer: is told when layers are asked for and loaded.
        correction: of the rows that stay reused, by those that are recomputed.

    Attributes:
        loaders: layer -> what gathers its rows in place of this class.
        takes_graphs: whether passes over this KV may be recorded: loaders gather all of it, into rows on one GPU.
        corrector: a `Corrector`, or what does the same faster.
    """

    def __init__(
        self,
        model: ReusingModel,
        reuse: Reuse,
        length: int,
        observer: Observer | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.model, self.reuse, self.length, self.observer = model, reuse, length, observer or Observer()
        self.corrector: Callable[..., None] | None = None
        if correction is not None and reuse.moved:
            self.corrector = Corrector(correction, model, reuse, length, self.observer)
        spans = [piece.span for piece in reuse.moved]
        self._moved_tokens = torch.from_numpy(tokens_of(spans))
        positions = self._moved_tokens.split([stop - start for start, stop in spans])
        moves = [(p.entry.cached_positions, now, p.entry.regime) for p, now in zip(reuse.moved, positions)]
        self.realigner = Realigner(model.rotary_tables_of_pieces, model.rotations, moves, model.regime(length))
        self.loaders: Mapping[int, Loader] = {}
        self.takes_graphs = False
        self._to_read = [piece.entry for piece in reuse.pieces if not isinstance(piece.entry, ChunkKV)]
        self._loaded: dict[int, KV] = {}

    @property
    def is_near(self) -> bool:
        """Whether every piece lies in the GPU's memory: nothing has to be waited for."""
        return self.takes_graphs and all(loader.is_near for loader in self.loaders.values())

    @property
    def unfilled(self) -> dict[int, KV]:
        """Layer -> the buffers that loaders will load it into; reused rows are not there yet."""
        return {i: loader.buffers[i] for i, loader in self.loaders.items() if loader.has(i)} | self._loaded

    def preload(self) -> None:
        """Reads and moves every layer now, instead of when its turn comes."""
        for i in range(self.model.num_kv_layers):
            if self.reuse.moved or self.reuse.exact:
                self._loaded[i] = self.layer(i)

    def layer(self, layer_idx: int, fresh: KV | None = None) -> KV:
        """The layer's buffers (1, Hkv, T + room, D) with every reused row in place; other rows are not yet written.

        Args:
            fresh: K/V of any tokens there, to learn shapes and device from where nothing is reused.
        """
        if layer_idx in self._loaded:
            return self._loaded.pop(layer_idx)
        with self.observer.layer("load", "reused KV", layer_idx):
            loader = self.loaders.get(layer_idx)
            is_there = loader is not None and loader.has(layer_idx)
            buffers = loader.load([layer_idx])[layer_idx] if loader and is_there else self._assembled(layer_idx, fresh)
        self.observer.layer_loaded(layer_idx, buffers)
        return buffers

    def moved_kv(self, layer_idx: int, like: KV) -> KV:
        """K/V (1, Hkv, N, D) of the pieces that moved, realigned, on the device of `like`."""
        return rows_at(self.layer(layer_idx, like), self._moved_rows)

    @cached_property
    def _moved_rows(self) -> torch.Tensor:
        """(N,) the rows of the pieces that moved; a piece that ends with the prompt has one that is no candidate."""
        return sent(self._moved_tokens, self.model.device)

    def layers(self, layers: Sequence[int], like: KV | None = None) -> dict[int, KV]:
        """Layer -> buffers of several layers; a loader gathers them together."""
        loader = self.loaders.get(layers[0]) if layers else None
        if loader is None or len(layers) == 1 or not all(map(loader.has, layers)):
            return {i: self.layer(i, like) for i in layers}
        found = loader.load(layers)
        for layer_idx, buffers in found.items():
            self.observer.layer_loaded(layer_idx, buffers)
        return found

    def correcting(self, above: int) -> Callable[..., None] | None:
        """Returns what corrects the layers above one in a pass, `None` where nothing is corrected; see `Corrector`."""
        return None if self.corrector is None else partial(self.corrector, above)

    def prefetch(self, layer_idx: int) -> None:
        """Starts reading this layer, and the next few, of entries that are not in the device's memory."""
        with self.observer.layer("ask", "asked for", layer_idx):
            if layer_idx in self.loaders:
                self.loaders[layer_idx].read_ahead(layer_idx)
                return
            for entry in self._to_read:
                entry.prefetch(layer_idx)

    def _assembled(self, layer_idx: int, fresh: KV | None) -> KV:
        self.prefetch(layer_idx)  # first: reading waits for one entry, and the others are read meanwhile
        pieces, num_exact = self.reuse.pieces, len(self.reuse.exact)
        stored = layer_of_each([piece.entry for piece in pieces], layer_idx)
        buffers = empty_kv(fresh or self._placed(stored[0], layer_idx), self.length + ROOM)
        copies = [(kv, _places(buffers, piece.span)) for kv, piece in zip(stored, pieces)]
        for kv, places in copies[:num_exact]:
            for states, place in zip(kv, places):
                place.copy_(states)
        self.realigner.move(layer_idx, copies[num_exact:])
        return buffers

    def _placed(self, kv: KV, layer_idx: int) -> KV:
        """K/V without rows, of the kind of an entry's, where the layer's own will be: the entry may be elsewhere."""
        device = self.model.device_of_layer(layer_idx)
        return kv[0][:, :, :0].to(device), kv[1][:, :, :0].to(device)


class Corrector:
    """Corrects the rows of moved pieces that stay reused, each layer once.

    Args:
        length: T.
        observer: is told how much was added.
    """

    def __init__(
        self, correction: Correction, model: ReusingModel, reuse: Reuse, length: int, observer: Observer
    ) -> None:
        self.correction, self.observer, self._rotations = correction, observer, model.rotations
        self._spans, self._done = [piece.span for piece in reuse.moved], set[int]()
        self._exact = reuse.exact_from_start
        sizes = [stop - start for start, stop in self._spans]
        self._longest, tokens = max(sizes), tokens_of(self._spans)
        nth = np.full(length, -1)  # of a token among the N
        nth[tokens] = np.arange(len(tokens))
        numbers = np.repeat(np.arange(len(sizes)), sizes), tokens_of((0, size) for size in sizes), nth
        on_device = sent(torch.from_numpy(np.concatenate(numbers)), model.device)
        self._piece, self._place, self._nth = on_device.split(list(map(len, numbers)))
        regime, tables_of, now = model.regime(length), model.rotary_tables_of_pieces, torch.from_numpy(tokens)
        off, on = (now, torch.zeros_like(now), regime), (torch.zeros_like(now), now, regime)
        self._off, self._on = (Realigner(tables_of, model.rotations, [move], regime) for move in (off, on))
        self._rows: torch.Tensor | None = None
        self._found: tuple[torch.Tensor, ...] = ()
        self._tables: dict[Any, Tables] = {}  # of the rows that are known

    def __call__(
        self, above: int, layer_idx: int, rows: torch.Tensor, fresh: KV, kv: KV, args: AttentionArgs | None = None
    ) -> None:
        """Corrects a layer before the fresh rows of a pass take their places.

        Args:
            above: K/V of layers up to this one are fresh for every token.
            rows: (S',) of the pass, rising, in moved pieces and elsewhere.
            fresh: their K/V (1, Hkv, S', D).
            kv: reused K/V (1, Hkv, T, D), changed in place.
            args: with which the layer will attend, if that is known: keys are corrected as far as it bears them out.
        """
        if layer_idx <= above or layer_idx in self._done:  # a pass comes again to the layer where it was cut
            return
        self._done.add(layer_idx)
        piece, place, known, idx, _ = self._in_moved(rows)
        if not 0 < len(known) < len(piece):
            return
        added = []
        for slot, (new, states) in enumerate(zip(fresh, kv)):
            errors = new[0][:, known].float() - states[0][:, rows[known]].float()
            errors = self._turned(self._off, errors, layer_idx, slot, idx)
            queries = None
            if slot == 0 and args is not None and args.query.shape[2:] == new.shape[2:]:
                queries = self._queries(args, layer_idx, rows, new, states)
            found = self.correction(Errors(errors, slot, idx, piece, place, len(self._spans), self._longest, queries))
            expected = (errors.shape[0], len(piece), errors.shape[2])
            if not torch.is_tensor(found) or found.shape != expected:
                got = tuple(found.shape) if torch.is_tensor(found) else described(found)
                raise ValueError(
                    f"A correction must return one vector per head and token of moved pieces, {expected}, got {got}."
                )
            added.append(found)
            turned, done = self._turned(self._on, found.float(), layer_idx, slot), 0
            for start, stop in self._spans:
                states[0][:, start:stop] += turned[:, done : (done := done + stop - start)]
        self.observer.corrected(layer_idx, partial(_sizes, added, piece, len(self._spans)))

    def _in_moved(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Piece and place (N,) of each token; which rows of a pass are among the N, and which of them; the positions of
        the exact tokens that come first and of the rows. Found once a pass."""
        if rows is not self._rows:
            piece, place, nth = (t.to(rows.device) for t in (self._piece, self._place, self._nth))
            known = (nth[rows] >= 0).nonzero()[:, 0]
            positions = torch.cat([torch.arange(self._exact, device=rows.device), rows])
            self._rows, self._found = rows, (piece, place, known, nth[rows[known]], positions)
            self._tables.clear()
        return self._found

    def _queries(
        self, args: AttentionArgs, layer_idx: int, rows: torch.Tensor, new: torch.Tensor, states: torch.Tensor
    ) -> Queries:
        """Their attention is to exact keys: those from the prompt's start on (1, Hkv, T, D), and fresh ones."""
        _, _, known, idx, positions = self._in_moved(rows)
        keys = torch.cat([states[0][:, : self._exact], new[0]], 1)
        query, attention = asked(args, rows, keys, positions)
        turned = partial(self._turned, self._on, layer_idx=layer_idx, slot=0, idx=idx)
        return Queries(query, attention[..., self._exact + known], turned)

    def _turned(
        self, way: Realigner, states: torch.Tensor, layer_idx: int, slot: int, idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States (Hkv, n, D) in fp32 of all N tokens, or of some (n,), turned where the slot is rotated."""
        rotation, tables = self._rotations[layer_idx], way.tables(layer_idx, states.device)
        if rotation is None or tables is None or rotation.slot != slot:
            return states
        if idx is not None:
            key = way, rotation.source, rotation.layout, rotation.sign
            if key not in self._tables:
                self._tables[key] = tables[0][idx], tables[1][idx]
            tables = self._tables[key]
        return rotate(states[None], *tables, rotation.pairing)[0]


def _sizes(added: list[torch.Tensor], piece: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """(2, P) root mean squares of what was added (Hkv, N, D) to keys and values of tokens of pieces (N,)."""
    squares = torch.stack([one.float().square().mean((0, 2)) for one in added])
    sums = squares.new_zeros(2, num_pieces).index_add_(1, piece, squares)
    return (sums / torch.bincount(piece, minlength=num_pieces)).sqrt()


def _places(buffers: KV, span: Span) -> KV:
    """The rows of a span, (1, Hkv, n, D)."""
    keys, values = (buffer[:, :, slice(*span)] for buffer in buffers)
    return keys, values


def merged(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Token indices of both, rising."""
    return torch.cat([one, other]).sort().values


def tokens_of(spans: Iterable[Span]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The token indices of spans, one after the other.

    By NumPy: some of PyTorch's operations begin threads for a few numbers on the CPU, and wait for them.
    """
    return np.concatenate([np.arange(*span) for span in ((0, 0), *spans)])
