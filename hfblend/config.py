"""The settings of blending, validated once, and how the environment sets them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from .arguments import described, field_meant, is_function, known_fields, number_in, one_of, require, whole

logger = logging.getLogger(__name__)

Deviation = Literal["value", "key", "key_value"]
ChunkPrefix = Literal["prompt", "filler", "bos", "none"]
Selection = Literal["suffix_attention", "kv_deviation", "chunk_start", "mixed", "random", "last"]
Correction = Literal["offset"]
OnMiss = Literal["isolated", "in_context"]
Find = Literal["stored", "learn"]

# Other names for the fields (the paper's, LMCache's, earlier ones), and arguments of `patch`.
_OF_PATCH = "It is an argument of hfblend.patch."
_ALIASES = {
    **dict.fromkeys(("recompute_ratio", "recomp_ratio", "recomp_ratios", "ratio", "ratios", "r"), "recompute_ratios"),
    **dict.fromkeys(("check_layer", "layers", "layer"), "check_layers"),
    **dict.fromkeys(("chunk_separator", "special_str", "sep", "delimiter"), "separator"),
    **dict.fromkeys(("min_tokens", "threshold", "min_chunk_tokens"), "min_reused_tokens"),
    **dict.fromkeys(("rule", "method", "strategy", "selector"), "selection"),
    **dict.fromkeys(("enable_blending", "enable", "use_blending"), "enabled"),
    **dict.fromkeys(("tenant", "user", "salt", "cache_salt"), "namespace"),
    **dict.fromkeys(("r_star", "min_ratio"), "least_ratio"),
    **dict.fromkeys(("store", "tokenizer", "trace", "verify", "model"), _OF_PATCH),
    "use_layerwise": "layerwise",
    "metric": "deviation",
    "filler": "filler_ids",
    "thresholds": "Tokens are chosen by recompute_ratios, not by a threshold.",
    "kv_dtype": "It is an argument of the store: hfblend.store.DiskStore(folder, kv_dtype=…).",
}


@known_fields(_ALIASES)
@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """The settings of blending. Immutable; checks every value.

    >>> BlendConfig(recompute_ratios=(0.05,)).recompute_ratios
    (0.05,)

    Args:
        enabled: `False` sends every call to stock `generate`.
        separator: text, or token ids, at which plain `input_ids` are split into prefix, chunks and suffix.
            `None` splits nothing: only prompts that bring their `chunk_spans` are blended.
        selection: the rule that scores reused tokens; the highest are recomputed. `"suffix_attention"`: the suffix's
            attention to them. `"kv_deviation"`: CacheBlend's. `"chunk_start"`, `"mixed"`, `"random"`, `"last"`, or your
            function: see `hfblend.blend.selection`.
        recompute_ratios: the share in [0, 1] of reused tokens that is recomputed, `ceil(ratio * reused tokens)` of
            them; 1.0 recomputes every token of the prompt. With several check layers one each, never rising. `"auto"`:
            as many as loading chunk KV hides, `least_ratio` or more, and a full prefill if that is quicker: see
            `hfblend.controller`.
        least_ratio: in [0, 1], the paper's r*, for `"auto"`.
        check_layers: 0-based layers at which `"kv_deviation"` ranks tokens, rising, one per ratio. Several mean the
            paper's gradual filtering. `()`, with `recompute_ratios=()`, selects nothing by any rule: plain full reuse.
        score_layers: 0-based layers whose attention `"suffix_attention"` averages; `None`: all from L/3 up.
        deviation: what `"kv_deviation"` ranks: squared L2 distance (fp32) of the fresh from the reused `"value"`, of
            the realigned `"key"`, or `"key_value"`, the sum of both, each divided by its mean.
        correction: of the reused rows that are not recomputed, by those that are. `"offset"`, `None`, or your function:
            see `hfblend.blend.correction`.
        min_reused_tokens: prompts with fewer chunk tokens go through stock `generate` (blending would not pay).
        force_chunk_start: this many first tokens of every chunk are selected first, inside the budget.
        chunk_prefix: the text that a chunk's KV is computed after (its rows are then dropped): the `"prompt"`'s prefix,
            that prefix and a `"filler"` text, `"bos"` alone, or `"none"`.
        filler_ids: ids of the filler; `patch(..., tokenizer=)` fills them in, elsewhere take
            `hfblend.filler_ids(tokenizer)`.
        on_miss: `"isolated"` prefills a missing chunk alone, stores it, and then treats it like a hit, so that an
            answer never depends on what the store held. `"in_context"` computes it inside the prompt.
        layerwise: assemble each layer's reused KV when the pass reaches it; `False` assembles all layers first.
        cuda_graphs: on a GPU, run passes and decoding as CUDA graphs, without Python, if the model allows it.
        namespace: keeps one tenant's entries apart from another's in a shared store.
        find: `"stored"` looks for the store's texts in plain `input_ids` that hold no separator; `"learn"` also stores
            passages that come again in another prompt.

    Raises:
        ValueError, TypeError: a value outside these bounds; the message says what was got and what is expected.

    Source: CacheBlend (arXiv 2405.16444) sections 4.3 (selection, gradual filtering) and 7 (15 %).
    """

    enabled: bool = True
    separator: str | tuple[int, ...] | None = " # # "
    selection: Selection | Callable[..., Any] = "suffix_attention"
    recompute_ratios: tuple[float, ...] | Literal["auto"] = (0.15,)
    least_ratio: float = 0.15
    check_layers: tuple[int, ...] = (1,)
    score_layers: tuple[int, ...] | None = None
    deviation: Deviation = "value"
    correction: Correction | Callable[..., Any] | None = "offset"
    min_reused_tokens: int = 256
    force_chunk_start: int = 0
    chunk_prefix: ChunkPrefix = "prompt"
    filler_ids: tuple[int, ...] = ()
    on_miss: OnMiss = "isolated"
    layerwise: bool = True
    cuda_graphs: bool = True
    namespace: str = ""
    find: Find | None = None

    def __post_init__(self) -> None:
        for name in ("enabled", "layerwise", "cuda_graphs"):
            require(name, getattr(self, name), bool, "True or False")
        require("namespace", self.namespace, str, "text")
        for name in ("min_reused_tokens", "force_chunk_start"):
            self._set(name, whole(name, getattr(self, name)))
        for name, kind in (("deviation", Deviation), ("chunk_prefix", ChunkPrefix), ("on_miss", OnMiss)):
            one_of(name, getattr(self, name), get_args(kind))
        if self.find is not None:
            one_of("find", self.find, get_args(Find), ", or None")
        self._set("filler_ids", _numbers("filler_ids", self.filler_ids, whole))
        self._set("least_ratio", number_in("least_ratio", self.least_ratio, 0, 1))
        self._check_separator()
        self._check_selection()
        self._check_layers_and_ratios()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def recomputes_all(self) -> bool:
        """Whether every token of the prompt is recomputed (ratio 1 at every check layer)."""
        return bool(self.recompute_ratios) and not self.is_auto and min(self.fixed_ratios) == 1.0

    def settled(self, ratio: float | None = None) -> BlendConfig:
        """With a number for `"auto"`: this one, or r*."""
        return replace(self, recompute_ratios=(self.least_ratio if ratio is None else ratio,)) if self.is_auto else self

    @property
    def is_auto(self) -> bool:
        """Whether the ratio is left to a controller."""
        return isinstance(self.recompute_ratios, str)

    @property
    def fixed_ratios(self) -> tuple[float, ...]:
        """The ratios as numbers; with `"auto"`, the least that it may be."""
        return self.recompute_ratios if isinstance(self.recompute_ratios, tuple) else (self.least_ratio,)

    def require_layers(self, num_layers: int) -> None:
        """Raises `ValueError` for a check layer that a model of `num_layers` does not have."""
        for name in ("check_layers", "score_layers"):
            layers = getattr(self, name)
            if layers and max(layers) >= num_layers:
                raise ValueError(
                    f"{name} {layers} reach beyond this model of {num_layers} layers (0 … {num_layers - 1}); "
                    "choose lower ones."
                )

    def _check_separator(self) -> None:
        if self.separator is None or (isinstance(self.separator, str) and self.separator.strip()):
            return
        if isinstance(self.separator, str):
            raise ValueError(
                f"separator must hold visible text, got {self.separator!r}: white space alone would match anywhere. "
                "Use a string such as ' # # ', token ids, or None."
            )
        self._set("separator", _numbers("separator", self.separator, whole, "text, a tuple of token ids or None"))
        if not self.separator:
            raise ValueError("separator must be text or one or more token ids, got ().")

    def _check_selection(self) -> None:
        if not is_function(self.selection):
            one_of(
                "selection", self.selection, get_args(Selection), ", or a function of hfblend.blend.selection.Evidence"
            )
        if isinstance(self.correction, bool | str) and self.correction in (False, "off", "none", ""):
            raise ValueError(
                f"correction is turned off by None, or by none in the environment, got {self.correction!r}."
            )
        if self.correction is not None and not is_function(self.correction):
            names = get_args(Correction)
            one_of("correction", self.correction, names, ", None, or a function of hfblend.blend.correction.Errors")
        if self.score_layers is not None:
            self._set("score_layers", _numbers("score_layers", self.score_layers, whole))
            if not self.score_layers:
                raise ValueError("score_layers must be None or one or more layers, got ().")

    def _check_layers_and_ratios(self) -> None:
        layers = _numbers("check_layers", self.check_layers, whole)
        self._set("check_layers", layers)
        if self.is_auto:
            one_of("recompute_ratios", self.recompute_ratios, ("auto",), " or numbers such as (0.15,)")
            if len(layers) != 1:
                raise ValueError(f'recompute_ratios="auto" needs one check layer, got {layers}.')
        else:
            ratio = partial(number_in, least=0, most=1)
            self._set("recompute_ratios", _numbers("recompute_ratios", self.recompute_ratios, ratio))
        ratios = self.fixed_ratios
        if len(layers) != len(ratios):
            raise ValueError(
                f"check_layers and recompute_ratios need one entry each per check layer, got {layers} and {ratios}."
            )
        if any(layer < 1 for layer in layers):
            raise ValueError(
                f"check_layers must be 1 or more, got {layers}: at layer 0 keys and values do not depend on context, "
                "so ranking there ranks noise. Use (1,)."
            )
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"check_layers must rise from one to the next, got {layers}.")
        if list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"recompute_ratios must not rise, got {ratios}: each check layer filters the one before.")
        if len(layers) > 1 and not (self.selection == "kv_deviation" or callable(self.selection)):
            raise ValueError(
                f"Several check layers, got {layers}, are CacheBlend's gradual filtering: with them write "
                f'selection="kv_deviation" (got {self.selection!r}).'
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> BlendConfig:
        """Reads `HFBLEND_<FIELD>` (say `HFBLEND_CHECK_LAYERS=1,8`), else LMCache's names; the rest is default.

        Several check layers with a single ratio use that ratio at each. Check layers without a selection are
        CacheBlend's: `"kv_deviation"`. `docs/configuration.md` has the table.

        Args:
            environ: variables to read; default `os.environ`.

        Raises:
            TypeError: a name or a value that is no text.
            ValueError: a variable that cannot be read, with its value; a name that looks misspelt.
        """
        environ = os.environ if environ is None else environ
        require("environ", environ, Mapping, "a mapping of texts")
        for name, text in environ.items():
            require("Each name in environ", name, str, "text")
            require(f"environ[{name!r}]", text, str, "text")
        read_from = {
            field.name: variable
            for field in fields(cls)
            for variable in _variables(field.name)[::-1]
            if variable in environ
        }
        values = {field: _read(name, environ[name], _READ.get(field, str)) for field, name in read_from.items()}
        ratios = values.get("recompute_ratios", (0.15,))
        if "check_layers" in values and ratios != "auto" and len(ratios) == 1:
            values["recompute_ratios"] = ratios * len(values["check_layers"])
        if values.get("check_layers") and "selection" not in values:
            values["selection"] = "kv_deviation"
        _refuse_unknown(environ)
        _log_unused(environ)
        try:
            return cls(**values)
        except ValueError as error:
            said = {field: f"{name}={described(environ[name])}" for field, name in read_from.items()}
            at_fault = [text for field, text in said.items() if field in str(error)] or said.values()
            raise ValueError(f"{error} Read from {', '.join(at_fault)}.") from error


def as_config(config: BlendConfig | None, name: str = "config") -> BlendConfig:
    """Returns the settings; default ones for `None`."""
    if isinstance(config, dict):
        raise TypeError(f"{name} must be a hfblend.BlendConfig, got {described(config)}: write BlendConfig(**…).")
    return BlendConfig() if config is None else require(name, config, BlendConfig, "a hfblend.BlendConfig")


def _numbers(
    name: str, values: Any, check: Callable[[str, Any], Any], expected: str = "a tuple of numbers"
) -> tuple[Any, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, int | float) and not isinstance(values, bool):
        raise TypeError(f"{name} must be {expected}, got {values}: write ({check(name, values)},).")
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be {expected}, got {described(values)}.")
    return tuple(check(f"Each of {name}", value) for value in values)


# --- the environment ----------------------------------------------------------------------------------------------

_LMCACHE = {
    "enabled": "LMCACHE_ENABLE_BLENDING",
    "separator": "LMCACHE_BLEND_SPECIAL_STR",
    "check_layers": "LMCACHE_BLEND_CHECK_LAYERS",
    "recompute_ratios": "LMCACHE_BLEND_RECOMPUTE_RATIOS",
    "min_reused_tokens": "LMCACHE_BLEND_MIN_TOKENS",
    "layerwise": "LMCACHE_USE_LAYERWISE",
}
_OTHER_VARIABLES = {"HFBLEND_CACHE", "HFBLEND_SHORT", "HFBLEND_CHROMIUM", "LMCACHE_BLEND_THRESHOLDS"}
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _flag(text: str) -> bool:
    if text.strip().lower() not in _WORDS:
        raise ValueError("expected true or false")
    return _WORDS[text.strip().lower()]


def _text_or_none(text: str) -> str | None:
    return None if text.strip().lower() == "none" or not text else text


def _ratios(text: str) -> Any:
    try:
        return "auto" if text.strip().lower() == "auto" else _list_of(text, float)
    except ValueError as error:
        raise ValueError("expected auto, or numbers in [0, 1] separated by commas, such as 0.15") from error


def _list_of(text: str, kind: Callable[[str], Any] = int) -> tuple[Any, ...]:
    return tuple(kind(part) for part in text.strip().strip("[]()").split(",") if part.strip())


_READ: dict[str, Callable[[str], Any]] = {  # the other fields are text
    **dict.fromkeys(("enabled", "layerwise", "cuda_graphs"), _flag),
    **dict.fromkeys(("check_layers", "score_layers", "filler_ids"), _list_of),
    **dict.fromkeys(("min_reused_tokens", "force_chunk_start"), int),
    "separator": _text_or_none,
    "correction": lambda text: _text_or_none(text.strip()),
    "find": lambda text: _text_or_none(text.strip()),
    "recompute_ratios": _ratios,
    "least_ratio": float,
}


def _variables(field: str) -> list[str]:
    """The variables that set a field, the one that counts first."""
    return [f"HFBLEND_{field.upper()}", *([_LMCACHE[field]] if field in _LMCACHE else [])]


def _read(name: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text)
    except (ValueError, RecursionError) as error:  # the second, of JSON that is nested without end
        raise ValueError(f"Environment variable {name}={described(text)} cannot be read: {error}.") from error


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    """Refuses a variable close to a field's, which would leave its default in force unnoticed; logs others, which
    another program may read."""
    names = [field.name for field in fields(BlendConfig)]
    known = _OTHER_VARIABLES.union(*map(_variables, names))
    for name in sorted(environ.keys() - known):
        if not name.startswith(("HFBLEND_", "LMCACHE_BLEND_")):
            continue
        if (field := field_meant(name, names, _ALIASES)) in names:
            raise ValueError(f"No setting is read from {name}. Did you mean HFBLEND_{field.upper()}?")
        logger.warning("The environment variable %s is no setting of BlendConfig; it is ignored.", name)


def _log_unused(environ: Mapping[str, str]) -> None:
    if "LMCACHE_BLEND_THRESHOLDS" in environ:
        logger.info("LMCACHE_BLEND_THRESHOLDS is accepted and not used: tokens are chosen by ratio.")
    if not (text := environ.get("LMCACHE_EXTRA_CONFIG", "").strip()):
        return
    extra = _read("LMCACHE_EXTRA_CONFIG", text, json.loads)
    if isinstance(extra, dict) and "enable_sparse" in extra:
        logger.info("enable_sparse in LMCACHE_EXTRA_CONFIG is accepted and not used: the mask is always exact.")
