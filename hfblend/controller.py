r"""The paper's loading controller: how much to recompute while chunk KV loads, and whether blending pays at all.

A forward over some rows costs, with rows and seen keys summed over the layers,

    T = fixed + per_row · rows + per_key · keys

and loading n chunks of b bytes together from a tier costs n · per_entry + b / rate. With a rule that selects early
(CacheBlend's), layers load while others compute, and time to first token is the larger of both. A rule that looks at
late layers first (the suffix's attention) has to wait for all of them, and it is the sum:

    TTFT(r) = max(T_compute(r), T_load)        or        T_compute(r) + T_load

`Controller.decide` takes the largest ratio that loading hides, but never less than r*; and a full prefill where that is
quicker. All numbers come from a `Profile`, measured once (`hfblend.measure.profile`).

Source: CacheBlend (arXiv 2405.16444) section 5.1, whose T_recompute is r · T_prefill.

Shapes: T all tokens, L layers.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .arguments import from_json
from .blend.reuse import Reuse
from .blend.selection import budget
from .store.folders import LocalFolder
from .trace.facts import Decision

PROFILE_FORMAT = "hfblend-profile-1"
TIERS = ("remote", "disk", "page_cache", "ram", "memory")  # the cheapest first; "memory" is the model's own device


@dataclass(frozen=True)
class Work:
    """The work of forwards: rows, and the keys that they see, summed over layers.

    >>> Work.of_prefill(4, 2)
    Work(rows=8, keys=20.0)
    """

    rows: float
    keys: float

    @classmethod
    def of_prefill(cls, tokens: int, layers: int, exact: int = 0) -> Work:
        """Returns the work of prefilling all tokens but the first `exact` ones, whose KV exists."""
        return cls(layers * (tokens - exact), layers * _seen(exact, tokens))

    @classmethod
    def of_blend(cls, prompt: BlendShape, ratio: float, layers: int, check_layer: int | None) -> Work:
        """Returns the work of a blend: the suffix, and the selected tokens, which stand anywhere after the exact ones;
        and that of selecting: all tokens up to the check layer, or (`None`) the suffix through all layers."""
        start = prompt.tokens - prompt.suffix
        selected = budget(ratio, start - prompt.exact)
        suffix_keys = _seen(start, prompt.tokens)
        rows, keys = selected + prompt.suffix, selected * (prompt.exact + start + 1) / 2 + suffix_keys
        if check_layer is None:
            return cls(layers * (rows + prompt.suffix), layers * (keys + suffix_keys))
        above = layers - check_layer
        return cls(check_layer * prompt.tokens + above * rows, check_layer * _seen(0, prompt.tokens) + above * keys)


@dataclass(frozen=True)
class BlendShape:
    """The sizes of a prompt, in tokens.

    Args:
        tokens: T.
        exact: at its beginning, whose KV is reused unchanged.
        suffix: after the last chunk, always computed.
    """

    tokens: int
    exact: int
    suffix: int


def _seen(start: int, stop: int) -> float:
    """Returns the keys that the rows at positions start … stop − 1 see, summed."""
    return (stop * (stop + 1) - start * (start + 1)) / 2


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward: `fixed + per_row · rows + per_key · keys`.

    >>> Cost.fit([Work(0, 0), Work(10, 0), Work(10, 100)], [1.0, 3.0, 4.0]).seconds(Work(20, 0))
    5.0
    """

    fixed: float
    per_row: float
    per_key: float

    @classmethod
    def fit(cls, works: Sequence[Work], seconds: Sequence[float]) -> Cost:
        """Returns the cost with the smallest relative errors (least squares, nothing below 0)."""
        return cls(*_fit([[1.0, work.rows, work.keys] for work in works], seconds))

    def seconds(self, work: Work) -> float:
        """Returns the time of this work."""
        return round(self.fixed + self.per_row * work.rows + self.per_key * work.keys, 9)


@dataclass(frozen=True)
class BlendCost:
    """Seconds of a blend whose chunk KV lies on the model's device.

        fixed + slower · (the cost of as many rows and keys in a full prefill) + per_token · T

    Attributes:
        slower: few rows are computed less efficiently than many.
        per_token: look-up, keys that move, ranking.
    """

    fixed: float
    slower: float
    per_token: float

    @classmethod
    def fit(cls, prefill: Cost, works: Sequence[Work], tokens: Sequence[int], seconds: Sequence[float]) -> BlendCost:
        """Fits as `Cost.fit`, from blends of prompts with so many tokens."""
        rows = [[1.0, prefill.seconds(work) - prefill.fixed, float(n)] for work, n in zip(works, tokens)]
        return cls(*_fit(rows, seconds))

    def seconds(self, prefill: Cost, work: Work, tokens: int) -> float:
        """Returns the time of a blend."""
        return self.fixed + self.slower * (prefill.seconds(work) - prefill.fixed) + self.per_token * tokens


def _fit(rows: list[list[float]], seconds: Sequence[float]) -> list[float]:
    """Returns non-negative least squares on relative errors; columns with a negative coefficient are left out."""
    a = torch.tensor(rows, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = a.abs().amax(0).clamp_min(1e-300)
    found, columns = torch.zeros(a.shape[1], dtype=torch.float64), list(range(a.shape[1]))
    while columns:
        part = (a / scale)[:, columns]
        x = torch.linalg.lstsq(part, torch.ones(len(rows), 1, dtype=torch.float64), driver="gelsd").solution[:, 0]
        if (x >= 0).all():
            found[columns] = x
            break
        del columns[int(x.argmin())]
    return (found / scale).tolist()


@dataclass(frozen=True)
class LoadCost:
    """Seconds to load from one tier: `per_entry · entries + bytes / bytes_per_s`.

    >>> LoadCost(0.001, 1e9).seconds(Load(2, 10**9))
    1.002
    """

    per_entry: float
    bytes_per_s: float

    @classmethod
    def fit(cls, loads: Sequence[Load], seconds: Sequence[float]) -> LoadCost:
        """Fits as `Cost.fit`."""
        per_entry, per_byte = _fit([[float(load.entries), float(load.num_bytes)] for load in loads], seconds)
        return cls(per_entry, 1 / max(per_byte, 1e-15))

    def seconds(self, load: Load) -> float:
        """Returns the time of this load."""
        return self.per_entry * load.entries + load.num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Load:
    """Entries to load from one tier, and their total of bytes."""

    entries: int
    num_bytes: int


def loads_of(reuse: Reuse, device: torch.device) -> dict[str, Load]:
    """Returns tier -> the load of a prompt from it; `"memory"` is that of the device itself."""
    sizes: dict[str, list[int]] = {}
    for piece in reuse.pieces:
        sizes.setdefault(piece.entry.tier_beside(device), []).append(piece.entry.num_bytes)
    return {tier: Load(len(found), sum(found)) for tier, found in sizes.items()}


@dataclass(frozen=True)
class Profile:
    """The costs of a model and of the tiers of its chunk KV on one machine.

    Attributes:
        made_of: machine, model, dtype and rule, as text.
        layers: L.
        check_layer: of a rule that selects early; `None`: the rule waits for late layers.
        prefill, blend: seconds of computing.
        tiers: tier -> cost of loading (reading, checking, moving to the device); `"memory"` needs none.
    """

    made_of: str
    layers: int
    check_layer: int | None
    prefill: Cost
    blend: BlendCost
    tiers: dict[str, LoadCost] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Writes a JSON file; replaces an existing one atomically."""
        text = json.dumps({"format": PROFILE_FORMAT, **asdict(self)}, indent=1) + "\n"
        LocalFolder(file.parent).write(file.name, text.encode())

    @classmethod
    def load(cls, file: Path) -> Profile | None:
        """Reads a file of `save`; `None` if it is missing, has another version or holds invalid numbers."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if found.pop("format") != PROFILE_FORMAT:
                return None
            profile: Profile = from_json(cls, found, "profile")
            return profile if profile._is_sound() else None
        except Exception:  # a damaged file may raise any
            return None

    def _is_sound(self) -> bool:
        numbers = [
            number for cost in (self.prefill, self.blend, *self.tiers.values()) for number in vars(cost).values()
        ]
        rates = [cost.bytes_per_s for cost in self.tiers.values()]
        return min(numbers) >= 0 and 0 not in rates and (self.check_layer or 0) < self.layers <= 2**16


class Controller:
    """Decides the ratio of each prompt.

    Args:
        profile: of this model, rule and machine.
        least_ratio: r*, below which quality suffers.
    """

    def __init__(self, profile: Profile, least_ratio: float = 0.15) -> None:
        self.profile, self.least_ratio = profile, least_ratio

    def decide(self, prompt: BlendShape, loads: Mapping[str, Load]) -> Decision:
        """Returns the ratio for a prompt whose chunk KV lies in these tiers.

        Args:
            loads: tier -> load; one from `"memory"` costs nothing.
        """
        full, ratio = self.full_s(prompt), self.least_ratio
        compute = self.compute_s(prompt, ratio)
        unknown = [tier for tier in loads if tier != "memory" and tier not in self.profile.tiers]
        if unknown:
            missing = f"the profile has no rate for {', '.join(unknown)}; blender.profile(refresh=True)"
            return Decision(ratio, f"r* = {ratio:.0%}: {missing}", 1e3 * full, 1e3 * compute, None, None)
        load = self.load_s(loads)
        if self.hides_loading and compute < load:
            ratio = self._hidden_ratio(prompt, load)
            compute = self.compute_s(prompt, ratio)
        ttft = self.ttft_s(compute, load)
        settled: float | None = ratio
        if full <= ttft:
            slow = max(loads, key=lambda tier: self.load_s({tier: loads[tier]}), default="memory")
            loading, blending = f"loading from {slow} takes {_ms(load)}", f"blending computes for {_ms(compute)}"
            reason = f"a full prefill takes {_ms(full)}, {loading if load > compute else blending}"
            settled, ttft = None, full
        elif ratio > self.least_ratio:
            reason = f"loading takes {_ms(load)}, which hides recomputing {ratio:.0%}"
        else:
            reason = f"r* = {ratio:.0%}: computing takes {_ms(compute)}, loading {_ms(load)}"
        return Decision(settled, reason, 1e3 * full, 1e3 * compute, 1e3 * load, 1e3 * ttft)

    def cheapest_tier(self, prompt: BlendShape, load: Load, ratio: float | None = None) -> str:
        """Returns the cheapest tier from which loading does not delay the first token; `"memory"` if there is none.

        Args:
            ratio: default r*.
        """
        compute = self.compute_s(prompt, self.least_ratio if ratio is None else ratio)
        known = [tier for tier in TIERS if tier in self.profile.tiers] if self.hides_loading else []
        return next((tier for tier in known if self.load_s({tier: load}) <= compute), "memory")

    # --- forecasts, in seconds ------------------------------------------------------------------------------------

    @property
    def hides_loading(self) -> bool:
        """Whether the rule lets layers load while others compute."""
        return self.profile.check_layer is not None

    def full_s(self, prompt: BlendShape) -> float:
        """Returns the time of prefilling all that is not exact."""
        return self.profile.prefill.seconds(Work.of_prefill(prompt.tokens, self.profile.layers, prompt.exact))

    def compute_s(self, prompt: BlendShape, ratio: float) -> float:
        """Returns the time of a blend whose chunk KV lies on the device."""
        work = Work.of_blend(prompt, ratio, self.profile.layers, self.profile.check_layer)
        return self.profile.blend.seconds(self.profile.prefill, work, prompt.tokens)

    def load_s(self, loads: Mapping[str, Load]) -> float:
        """Returns the time of loading alone, from one tier after the other."""
        return sum(self.profile.tiers[tier].seconds(load) for tier, load in loads.items() if tier != "memory")

    def ttft_s(self, compute_s: float, load_s: float) -> float:
        """Returns the time to first token."""
        return max(compute_s, load_s) if self.hides_loading else compute_s + load_s

    def _hidden_ratio(self, prompt: BlendShape, load_s: float) -> float:
        """Returns the largest ratio, to a percent, that computes no longer than loading takes."""
        percents = range(int(100 * self.least_ratio), 101)
        hidden = bisect_right(percents, load_s, key=lambda percent: self.compute_s(prompt, percent / 100))
        return max(self.least_ratio, percents[max(0, hidden - 1)] / 100)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms"
