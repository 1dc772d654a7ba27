"""Counters of stores for Prometheus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, get_type_hints

from ..util import require
from .base import Store
from .counts import StoreCounts
from .remote import RemoteStore
from .tiers import tiers_of


def export_to_prometheus(store: Store, name: str = "chunks", registry: Any = None) -> Any:
    """Shows a store's counters, and those of each tier of a `TieredStore`, whenever Prometheus asks.

    >>> export_to_prometheus(blender.store)  # doctest: +SKIP
    >>> prometheus_client.start_http_server(8000)  # doctest: +SKIP

    Counters are `hfblend_store_<counter>_total` (those of `StoreCounts`) with the labels `store` (`name`), `tier` (0 is
    asked first) and `kind` (the class); `hfblend_store_bytes` is what a tier holds now, unless a network would have to
    be asked.

    Args:
        registry: of prometheus_client; default, its own.

    Returns:
        The collector; `registry.unregister(collector)` takes it off.

    Raises:
        ImportError: prometheus_client is not installed.
        ValueError: no tier of the store has counters; or the registry has this collector's names already.
    """
    prometheus_client = require("prometheus_client", "prometheus-client", "metrics", "Metrics need")
    tiers = tiers_of(store)
    if not any(map(_counts, tiers)):
        raise ValueError(f"A store with `counts` is expected, or a TieredStore of such; got {type(store).__name__}.")
    collector = _Collector(tiers, name)
    (prometheus_client.REGISTRY if registry is None else registry).register(collector)
    return collector


class _Collector:
    def __init__(self, tiers: list[Any], name: str) -> None:
        self._tiers = [((name, str(i), type(tier).__name__), tier) for i, tier in enumerate(tiers)]

    def collect(self) -> Iterator[Any]:
        """The present counts, as Prometheus asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ("store", "tier", "kind")
        counted = [(values, tier.counts.to_dict()) for values, tier in self._tiers if _counts(tier)]
        hints = get_type_hints(StoreCounts, include_extras=True)
        for name in StoreCounts().to_dict():
            family = CounterMetricFamily(f"hfblend_store_{name}", f"{hints[name].__metadata__[0]}.", labels=labels)
            for values, counts in counted:
                family.add_metric(values, counts[name])
            yield family
        held = GaugeMetricFamily("hfblend_store_bytes", "Bytes of chunk KV held.", labels=labels)
        for values, tier in self._tiers:
            with contextlib.suppress(OSError, AttributeError):  # a folder that is gone takes no other metric with it
                if not isinstance(tier, RemoteStore):  # which would be listed each time
                    held.add_metric(values, tier.num_bytes)
        yield held


def _counts(tier: Any) -> bool:
    return isinstance(getattr(tier, "counts", None), StoreCounts)
