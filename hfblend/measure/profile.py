"""The costs of a machine that the controller decides by, measured once: prefills, blends, loading from each tier.

Shapes: T all tokens, L layers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import BlendConfig, as_config
from ..controller import BlendCost, BlendShape, Cost, Load, LoadCost, Profile, Work
from ..generate.blending import blend
from ..kv.chunk import ChunkKV, ChunkLost, Reader
from ..kv.streams import clocked
from ..prompts.prompt import Prompt
from ..store import MemoryStore, Store, file_stores_of, tiers_of
from ..store.files import FileStore
from ..support.registry import TestedModel, model_of
from ..trace.progress import told
from ..util import cache_folder
from .divergence import describe_machine

logger = logging.getLogger(__name__)

_SHORTEST, _LONGEST, _GROWTH = 64, 16384, 4  # tokens of the prompts that are prefilled, each so many times the last
_LONG_ENOUGH_S = 0.5  # no prompt longer than one that takes so long
_CHUNKS, _SUFFIX = 8, 32
_RATIOS = (0.05, 0.3)
_TURNS = 3  # the quickest counts
_NAMESPACE = "hfblend profile"  # of entries that no prompt asks for


def profile_of(
    model: nn.Module,
    store: Store,
    config: BlendConfig | None = None,
    *,
    refresh: bool = False,
    file: Path | None = None,
) -> Profile:
    """Returns the profile of a model and its store on this machine, from its file, or measured now and kept there.

    Measuring takes some seconds, puts a few chunks into the store apart from its own, and removes them again.

    >>> profile = profile_of(model, DiskStore("~/.cache/hfblend/chunks"))  # doctest: +SKIP

    Args:
        model: a causal LM in eval mode; patched or not.
        config: its rule is profiled; default `BlendConfig()`.
        refresh: measure again.
        file: default, `$HFBLEND_CACHE/profiles/…` (`~/.cache/hfblend`), a file per machine, model, dtype, rule and
            store.

    Raises:
        UnsupportedModel: the model cannot be blended.
    """
    config, hf_model = as_config(config), model_of(model)
    made_of = _made_of(hf_model, store, config)
    if file is None:
        file = cache_folder() / "profiles" / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    found = None if refresh else Profile.load(file)
    if found is not None and found.made_of == made_of:
        return found
    logger.info("Measuring prefills, blends and the store once, for the controller; kept in %s.", file)
    with told("Measuring this machine, once"):
        profile = measure(model, store, config)
    try:
        profile.save(file)
    except OSError as error:
        logger.warning("The profile could not be kept in %s: %s", file, error)
    return profile


def _made_of(hf_model: TestedModel, store: Store, config: BlendConfig) -> str:
    """Everything that a profile holds for, as text: machine, model, rule and stores."""
    threads = "" if hf_model.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    name = getattr(hf_model.config, "_name_or_path", "") or type(hf_model.model).__name__
    shape = f"{hf_model.num_layers} layers, {sum(p.numel() for p in hf_model.model.parameters()):,} weights"
    rule = f"{config.selection}, check layers {config.check_layers}, score layers {config.score_layers}"
    places = [
        f"{getattr(one, 'url', '') or getattr(one, 'path', '')} {getattr(one, 'kv_dtype', None) or ''}".strip()
        for one in tiers_of(store)
    ]
    parts = [describe_machine(hf_model.device), threads, name, str(hf_model.dtype), shape, rule, *places]
    return ", ".join(filter(None, parts))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, store: Store, config: BlendConfig) -> Profile:
    """Measures now."""
    hf_model = model_of(model)
    prefill_s = dict(_prefills(hf_model))
    layers, check_layer = hf_model.num_layers, check_layer_of(config)
    prefill = Cost.fit([Work.of_prefill(n, layers) for n in prefill_s], list(prefill_s.values()))
    works, lengths, seconds, chunks, memory = [], [], [], [], MemoryStore(2**60)
    for tokens in [n for n in prefill_s if n >= 4 * _CHUNKS][-2:]:
        prompt = _prompt(hf_model, tokens)
        shape = BlendShape(tokens, (tokens - _SUFFIX) // _CHUNKS, _SUFFIX)
        for ratio in _RATIOS:
            at_ratio = replace(
                config, recompute_ratios=(ratio,), check_layers=config.check_layers[:1], namespace=_NAMESPACE,
                min_reused_tokens=0, chunk_prefix="none",
            )  # fmt: skip
            run = partial(blend, model, prompt, store=memory, config=at_ratio)
            seconds.append(_quickest(run, hf_model.device))
            works.append(Work.of_blend(shape, ratio, layers, check_layer))
            lengths.append(tokens)
        keys = [chunk.key for chunk in run().trace.chunks]
        chunks.append({key: entry for key in keys if (entry := memory.open(key)) is not None})
    blended = BlendCost.fit(prefill, works, lengths, seconds)
    tiers = dict(_tiers(store, chunks, hf_model.device))
    return Profile(_made_of(hf_model, store, config), layers, check_layer, prefill, blended, tiers)


def check_layer_of(config: BlendConfig) -> int | None:
    """Returns the layer at which a rule selects while later layers still load; `None` if it waits for late layers."""
    if config.selection in ("suffix_attention", "mixed") or callable(config.selection):
        return None
    return config.check_layers[0] if config.selection == "kv_deviation" and config.check_layers else 0


def _prefills(hf_model: TestedModel) -> Iterator[tuple[int, float]]:
    """Tokens and seconds of full prefills, longer and longer."""
    most = min(_LONGEST, getattr(hf_model.config, "max_position_embeddings", None) or _LONGEST)
    tokens = _SHORTEST
    while tokens <= most:
        ids = _ids(hf_model, tokens)
        prefill = partial(torch.no_grad()(hf_model.last_logits), input_ids=ids, use_cache=True)
        seconds = _quickest(prefill, hf_model.device)
        yield tokens, seconds
        if seconds > _LONG_ENOUGH_S:
            return
        tokens *= _GROWTH


def _tiers(
    store: Store, groups: Sequence[Mapping[str, ChunkKV]], device: torch.device
) -> Iterator[tuple[str, LoadCost]]:
    """Tier -> the cost of loading from it, measured with every group: short chunks and longer ones."""
    if device.type == "cuda":
        in_ram = [[chunk_kv.to("cpu") for chunk_kv in group.values()] for group in groups]
        yield "ram", LoadCost.fit(*zip(*((_total(g), _quickest(partial(_load, g, device), device)) for g in in_ram)))
    for one in file_stores_of(store):
        found: dict[str, list[tuple[Load, float]]] = {}
        try:
            with one.apart() as apart:
                for group in groups:
                    for tier, load in _loads_from(apart, group, device).items():
                        found.setdefault(tier, []).append(load)
        except (OSError, ChunkLost) as error:  # a folder that may only be read, say
            logger.warning("%s could not be measured: %s", type(one).__name__, error)
        yield from ((tier, LoadCost.fit(*zip(*loads))) for tier, loads in found.items())


def _loads_from(store: FileStore, chunks: Mapping[str, ChunkKV], device: torch.device) -> dict[str, tuple[Load, float]]:
    """Tier -> load and seconds: from the disk, if the system lets go of its copies, then from those copies in RAM."""
    found: dict[str, tuple[Load, float]] = {}

    def load() -> tuple[str, Load]:
        entries = [entry for key in chunks if (entry := store.open(key)) is not None]
        if len(entries) < len(chunks):
            raise ChunkLost(next(iter(chunks)), "the store does not have all that was just put into it")
        tier = entries[0].tier_beside(device)
        _load(entries, device)
        return tier, _total(entries)

    try:
        for key, chunk_kv in chunks.items():
            store.put(key, chunk_kv)
        for key in chunks:
            store.drop_from_ram(key)
        for _ in range(1 + _TURNS):
            seconds, (tier, total) = clocked(load, device)
            found[tier] = total, min(seconds, found[tier][1] if tier in found else seconds)
        return found
    finally:
        for key in chunks:
            store.remove(key)


def _total(entries: Sequence[Reader]) -> Load:
    return Load(len(entries), sum(entry.num_bytes for entry in entries))


def _load(entries: Sequence[Reader], device: torch.device) -> None:
    """Every layer of some entries at once, to the device."""
    for i in range(entries[0].num_layers):
        for entry in entries:
            entry.prefetch(i)
        for entry in entries:
            for states in entry.layer(i) if (rows := entry.rows(i)) is None else (rows,):
                states.to(device, non_blocking=True)


def _prompt(hf_model: TestedModel, tokens: int) -> Prompt:
    """Chunks of one length and a suffix, of random ids."""
    ids = _ids(hf_model, tokens)[0].tolist()
    size = (tokens - _SUFFIX) // _CHUNKS
    chunks = [ids[i * size : (i + 1) * size] for i in range(_CHUNKS)]
    return Prompt.from_ids([], chunks, ids[_CHUNKS * size :])


def _ids(hf_model: TestedModel, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    vocabulary = hf_model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=generator).to(hf_model.device)


def _quickest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest turn, after one that warms up."""
    return min([clocked(call, device)[0] for _ in range(1 + _TURNS)][1:])
