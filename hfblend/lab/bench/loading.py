"""The loads of a prompt's chunks from each place, with nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import cast

import torch

from ...blend.algorithm import Blend
from ...config import BlendConfig
from ...generate.blending import Blending
from ...prompts.prompt import Prompt
from ...store import DiskStore, Store
from ...store.keys import file_name_of
from ...support.registry import model_of
from ..clock import Say, take_turns
from ..report import Row
from .pair import Pair, Stores

_BUFFER_BYTES = 4 * 2**20  # of a plain read


def loading(pair: Pair, prompt: Prompt, stores: Stores, repeats: int, say: Say) -> Iterator[Row]:
    """A row per place but the GPU: bytes, and the medians of `Loading.measures` in ms.

    Files were read just before, so that the system has them in RAM.
    """
    for place, store in stores.items():
        if place != "gpu":
            say(place)
            loads = Loading(pair, prompt, place, store)
            turns = take_turns(loads.measures, repeats, pair.device)
            ms = {name: median(turn.ms for turn in own) for name, own in turns.items()}
            yield {"tokens": len(prompt), "place": place, "bytes": loads.num_bytes, **ms}


class Loading:
    """The loads of one prompt from one place, whose chunks are all stored there."""

    def __init__(self, pair: Pair, prompt: Prompt, place: str, store: Store) -> None:
        self._model, self._ids, self._spans = model_of(pair.model), prompt.input_ids.to(pair.device), prompt.chunk_spans
        self._store, self._config = store, BlendConfig(layerwise=place != "disk_whole")
        look_up = self._at("looked_up").look_up
        self._keys = [chunk.key for chunk in look_up.all_traces]
        self.num_bytes = look_up.num_bytes
        self.measures: dict[str, Callable[[], None]] = {"load_ms": self.load}
        if place.startswith("disk"):
            folder = cast(DiskStore, store).path
            self._files = [folder / file_name_of(key) for key in self._keys]
            self.measures |= {"read_ms": self.read, "plain_read_ms": self.read_plainly}

    @torch.no_grad()
    def load(self) -> None:
        """The look-up, and every layer at its new positions on the model's device."""
        reused = self._at("realigned").reused
        for i in range(self._model.num_layers):
            reused.layers([i])

    def read(self) -> None:
        """Every layer through the store: in RAM, checked."""
        entries = [entry for entry in map(self._store.open, self._keys) if entry is not None]
        for i in range(self._model.num_layers):
            for entry in entries:
                entry.prefetch(i)
            for entry in entries:
                entry.layer(i)

    def read_plainly(self) -> None:
        """The same files from start to end, one after the other in one thread, as `dd` does, unchecked."""
        buffer = bytearray(_BUFFER_BYTES)
        for file in self._files:
            with open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def _at(self, stop: str) -> Blend:
        state = Blending(self._model, self._ids, self._spans, self._store, self._config)
        return state.stopped_at(stop, self._model.last_logits)
