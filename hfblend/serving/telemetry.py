"""What Prometheus and OpenTelemetry see of requests, each if it is installed."""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

logger = logging.getLogger(__name__)

Numbers = Callable[[], Mapping[str, float]]

_TRACER = "hfblend.serving"
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def _optional(module: str) -> Any:
    """The module, or None if its package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


class Telemetry:
    """Counts and spans of all requests of a gate. No metric names a namespace: scrapers learn of no tenant.

    Metrics are `hfblend_http_requests_total` by `route`, `status` and `outcome` (answered, refused, cancelled: the
    client left, timeout, error), `hfblend_http_requests_inside`, and histograms of `hfblend_http_first_byte_seconds`
    and `hfblend_http_seconds` by `route`.

    Args:
        inside: counts the requests that hold a place.
        extra: collectors of prometheus_client.
        numbers: of the engine, asked at each scrape: gauges `hfblend_engine_<name>`, counters if a name ends in
            `_total`.

    Attributes:
        registry: of prometheus_client, of this gate only; None if that is not installed.
    """

    def __init__(self, inside: Callable[[], int], extra: Iterable[Any] = (), numbers: Numbers | None = None) -> None:
        self._otel = _optional("opentelemetry.trace")
        self._prometheus = _optional("prometheus_client")
        self.registry: Any = None
        if (client := self._prometheus) is None:
            return
        self.registry = registry = client.CollectorRegistry()
        labels = ("route", "status", "outcome")
        self._requests = client.Counter("hfblend_http_requests", "Requests.", labels, registry=registry)
        times = {"labelnames": ("route",), "buckets": _BUCKETS_S, "registry": registry}
        self._first_byte = client.Histogram("hfblend_http_first_byte_seconds", "Until an answer began.", **times)
        self._seconds = client.Histogram("hfblend_http_seconds", "Until a request ended.", **times)
        gauge = client.Gauge("hfblend_http_requests_inside", "Requests that hold a place.", registry=registry)
        gauge.set_function(inside)
        for collector in (*extra, *([_EngineNumbers(numbers)] if numbers else [])):
            registry.register(collector)

    def text(self) -> tuple[bytes, str] | None:
        """All metrics and their content type, or None without prometheus_client."""
        if self._prometheus is None:
            return None
        return self._prometheus.generate_latest(self.registry), self._prometheus.CONTENT_TYPE_LATEST

    @contextlib.contextmanager
    def request(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[Watched]:
        """Follows a request to its end; its span, a child of the client's `traceparent`, is the current one inside.

        The app may add what it knows: `opentelemetry.trace.get_current_span().set_attribute("…input_tokens", 9)`.
        """
        with self._span(method, route, headers) as span:
            watched = Watched(self._otel, span)
            try:
                yield watched
            finally:
                watched.enter(None)
                self._finish(watched, route)

    @contextlib.contextmanager
    def _span(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[Any]:
        if self._otel is None:
            yield None
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        # A dict of all headers takes the square of their number, which a client chooses.
        parent = propagator.extract({name: headers[name] for name in propagator.fields if name in headers})
        name = f"{method} {route}"
        attributes = {"http.request.method": method, "http.route": route}
        options = {"context": parent, "kind": self._otel.SpanKind.SERVER, "attributes": attributes}
        with self._otel.get_tracer(_TRACER).start_as_current_span(name, **options) as span:
            yield span

    def _finish(self, watched: Watched, route: str) -> None:
        now = time.perf_counter()
        if self.registry is not None:
            self._requests.labels(route, str(watched.status or "none"), watched.outcome).inc()
            self._seconds.labels(route).observe(now - watched.began)
            if watched.first_byte is not None:
                self._first_byte.labels(route).observe(watched.first_byte - watched.began)
        if watched.span is not None:
            watched.span.set_attribute("http.response.status_code", watched.status)
            watched.span.set_attribute("hfblend.outcome", watched.outcome)
            if watched.outcome in ("error", "timeout"):
                watched.span.set_status(self._otel.StatusCode.ERROR)


class Watched:
    """A request on its way.

    Attributes:
        span: of the request, if OpenTelemetry is installed.
        status: that was sent; 0 if none was.
        outcome: answered, refused, cancelled (the client left), timeout or error.
        began, first_byte: times of `time.perf_counter`.
    """

    def __init__(self, otel: Any, span: Any) -> None:
        self.span, self.status, self.outcome = span, 0, "cancelled"
        self.began = time.perf_counter()
        self.first_byte: float | None = None
        self._otel, self._phase = otel, None

    def enter(self, phase: str | None) -> None:
        """Ends the span of the phase before, and begins that of this one: read, wait or stream."""
        if self._otel is None:
            return
        if self._phase is not None:
            self._phase.end()
        parent = self._otel.set_span_in_context(self.span)  # not a span of the app, whose task may call this
        self._phase = self._otel.get_tracer(_TRACER).start_span(phase, context=parent) if phase else None

    def byte_sent(self) -> None:
        """Notes the first one."""
        if self.first_byte is None:
            self.first_byte = time.perf_counter()
            self.enter("stream")


class _EngineNumbers:
    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def collect(self) -> Iterator[Any]:
        """The present numbers; an engine that fails to give them takes no other metric with it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        try:
            numbers = {name: float(value) for name, value in self._numbers().items()}
        except Exception:  # of any kind: the callable is not ours
            logger.warning("The engine gave no numbers for metrics.", exc_info=True)
            return
        for name, value in numbers.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            name = "hfblend_engine_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            yield kind(name, f"{name} of the engine.", value=value)
