"""The server on several replicas, and precomputing on several workers. No other file knows Ray.

    client -> Ray's proxy -> gate, Relay -> ChunkRouter -> a replica: the app, as without Ray
    corpus -> keys, by one worker -> those missing in the store -> Ray Data -> workers -> the store

Ray's classes of routers are of its alpha API: they were written for, and tested with, Ray 2.60.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Protocol

import ray
import ray.data
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from ..generate.precompute import Precomputed
from ..store import Store, holds
from ..trace.progress import told
from .relay import Call, Relay, played
from .routing import Balance, remember

_APP = "hfblend"
_GRACE_S = 5
_STATS_S = 2.0  # how often replicas tell which chunks they hold: for other routers, and those that begin anew
_BUSY = 64  # requests at a replica; the engine batches them
_INSIDE = 1024  # in the ingress, those that wait for a replica included
_WINDOW = 128  # chunks in one call of a worker
_QUIET = {"log_level": "WARNING", "enable_access_log": False}


@contextmanager
def joined() -> Iterator[None]:
    """Joins the cluster of `$RAY_ADDRESS`, or starts one of this machine, which ends with the block.

    Ray's ports are open to the network, also those of this machine's cluster; they ask for Ray's token.
    """
    if ray.is_initialized():
        yield
        return
    # By default, Ray would join any cluster that runs here.
    local: dict[str, Any] = {"address": "local", "include_dashboard": False}
    ray.init(logging_level=logging.WARNING, **({} if os.environ.get("RAY_ADDRESS") else local))
    try:
        yield
    finally:
        ray.shutdown()


def share_of(most: int) -> dict[str, Any]:
    """The part of the cluster that each of so many workers gets: a GPU, or else some of the CPUs."""
    resources = ray.cluster_resources()
    if resources.get("GPU", 0) >= 1:
        return {"num_gpus": 1, "num_cpus": 1}
    cpus = resources["CPU"] / most
    return {"num_cpus": math.floor(cpus) if cpus >= 1 else math.floor(100 * cpus) / 100}


def bytes_of(most: int) -> int | None:
    """The memory for KV of each of so many replicas, half of what is free; `None` where they are on GPUs."""
    resources = ray.cluster_resources()
    return None if resources.get("GPU", 0) >= 1 else int(resources["memory"] / 2 / most)


# --- serving ----------------------------------------------------------------------------------------------------------


class ChunkRouter(RequestRouter):
    """Ranks the replicas for a `Call` by `Balance`."""

    def initialize_state(self) -> None:
        self.balance = Balance()
        self._pending: dict[str, PendingRequest] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        self._forget_cancelled()
        request = pending_request.metadata.internal_request_id
        self._pending[request] = pending_request
        replicas = {one.replica_id: one for one in candidate_replicas}
        told = {name: one.routing_stats.get("chunks", frozenset()) for name, one in replicas.items()}
        return [[replicas[name]] for name in self.balance.ranked(request, pending_request.args[0].chunks, told)]

    def _forget_cancelled(self) -> None:
        for request, pending in list(self._pending.items()):
            if pending.future.cancelled():  # before it was sent: Ray says no more of it
                self.on_request_completed(self.balance.running.get(request), request)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request = pending_request.metadata.internal_request_id
        self._pending.pop(request, None)
        if request in self.balance.running:  # else it has ended
            self.balance.sent(request, replica_id, pending_request.args[0].chunks)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._pending.pop(internal_request_id, None)
        self.balance.ended(internal_request_id, replica_id)


class Replica:
    """The app, in a process that builds it."""

    async def __init__(self, build: Callable[[], ASGIApp]) -> None:  # type: ignore[misc] # Ray Serve awaits it
        self.app, self.chunks = build(), dict[int, None]()
        self.name = serve.get_replica_context().replica_id.unique_id.encode()
        self.life = LifespanOn(Config(self.app, log_config=None))
        await self.life.startup()

    async def __del__(self) -> None:
        if hasattr(self, "life"):  # else it could not be built
            await self.life.shutdown()

    async def answer(self, call: Call) -> AsyncGenerator[Message]:
        """Yields the app's messages."""
        remember(self.chunks, call.chunks)
        async for message in played(self.app, call):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-hfblend-replica", self.name)]
            yield message

    def record_routing_stats(self) -> dict[str, Any]:
        """Tells all routers the chunks that came here."""
        return {"chunks": frozenset(self.chunks)}


def _ingress(gate: Callable[[ASGIApp], ASGIApp], separator: str | None) -> Any:
    """The deployment that clients talk to."""

    def app() -> ASGIApp:
        replicas = serve.get_deployment_handle("Replica", _APP).options(method_name="answer", stream=True)

        async def ask(call: Call) -> AsyncGenerator[Message]:
            answer = replicas.remote(call)
            try:
                async for message in answer:
                    yield message
            finally:
                answer.cancel()

        return gate(Starlette(routes=[Mount("/", Relay(ask, (RayActorError,), separator))]))

    return serve.deployment(serve.ingress(app)())


@contextmanager
def deployed(
    build: Callable[[], ASGIApp], *, replicas: int, max_replicas: int | None = None, host: str = "127.0.0.1",
    port: int = 8000, gate: Callable[[ASGIApp], ASGIApp] = lambda app: app, separator: str | None = None,
) -> Iterator[None]:  # fmt: skip
    """Serves replicas of an app in the cluster that was joined, until the end of the block.

    Args:
        build: makes the app, in the process of each replica; it is pickled.
        max_replicas: if there may be more than `replicas`, their number follows the load.
        gate: put around the app in the ingress; it is pickled.
        separator: of chunks in plain prompts, for routing.

    Raises:
        RuntimeError: a replica could not be built.
    """
    most = max(replicas, max_replicas or 0)
    scaling = {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": _BUSY // 4}
    number = {"num_replicas": replicas} if most == replicas else {"autoscaling_config": scaling}
    router = RequestRouterConfig(request_router_class=ChunkRouter, request_routing_stats_period_s=_STATS_S)
    common = {"graceful_shutdown_timeout_s": _GRACE_S, "graceful_shutdown_wait_loop_s": 0.5, "logging_config": _QUIET}
    app = serve.deployment(Replica).options(
        ray_actor_options=share_of(most), request_router_config=router, max_ongoing_requests=_BUSY,
        max_constructor_retry_count=1, **number, **common,
    )  # fmt: skip
    ingress = _ingress(gate, separator).options(
        name="Ingress", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_INSIDE, **common
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_QUIET)
    try:
        serve.run(ingress.bind(app.bind(build)), name=_APP)
        yield
    finally:
        serve.delete(_APP)


# --- precomputing -----------------------------------------------------------------------------------------------------


class Work(Protocol):
    """A loaded model with its prefix, config and store."""

    def keys(self, texts: Sequence[str]) -> list[str]:
        """Returns the keys of chunks."""

    def compute(self, texts: Sequence[str]) -> Precomputed:
        """Stores the prefix, and the chunks that are missing."""


class _Worker:
    """An actor with a model."""

    def __init__(self, load: Callable[[], Work]) -> None:
        self.work = load()

    def keys(self, texts: list[str]) -> list[str]:
        return self.work.keys(texts)

    def compute(self, texts: list[str]) -> Precomputed:
        return self.work.compute(texts)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        report = self.compute([str(text) for text in batch["text"]])
        return {"chunks": [report.chunks], "tokens": [report.tokens], "num_bytes": [report.num_bytes]}


def precompute(load: Callable[[], Work], store: Store, texts: Iterable[str], workers: int | None) -> Precomputed:
    """Stores the chunks of a corpus that are missing, each once, by workers in the cluster that was joined.

    A worker's batch goes to another one if it is killed, which skips the chunks that were stored. Of tokens and bytes
    the report lacks those.

    Args:
        load: makes the work, in the process of each worker; it is pickled.
        store: the one of the work.
        texts: read twice.
        workers: default, one on each GPU, or one.

    Raises:
        ValueError: a text that is no chunk.
    """
    workers = workers or int(ray.cluster_resources().get("GPU", 0)) or 1
    share, started = share_of(workers), time.perf_counter()
    keys = _prepared(load, texts, share)
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    missing = _missing(store, list(first))
    report = Precomputed(chunks=len(keys), skipped=len(keys) - len(missing))
    if missing:
        places = {first[key] for key in missing}
        _compute(load, [text for i, text in enumerate(texts) if i in places], workers, share, report)
        report.failed = len(_missing(store, missing))
        report.computed = len(missing) - report.failed
    report.seconds = time.perf_counter() - started
    return report


def _prepared(load: Callable[[], Work], texts: Iterable[str], share: dict[str, Any]) -> list[str]:
    """Returns the keys of chunks, once one worker has stored the prefix."""
    worker, keys, left = ray.remote(**share)(_Worker).remote(load), list[str](), iter(texts)
    try:
        with told("Looking for stored chunks"):
            ray.get(worker.compute.remote([]))
            while window := list(islice(left, _WINDOW)):
                keys += ray.get(worker.keys.remote(window))
    except RayTaskError as error:
        raise error.cause from None
    finally:
        ray.kill(worker)
    return keys


def _missing(store: Store, keys: list[str]) -> list[str]:
    with ThreadPoolExecutor(16) as pool:  # a remote store is asked over the network
        return [key for key, held in zip(keys, pool.map(partial(holds, store), keys)) if not held]


def _compute(
    load: Callable[[], Work], texts: list[str], workers: int, share: dict[str, Any], report: Precomputed
) -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = min(len(texts), max(4 * workers, math.ceil(len(texts) / _WINDOW)))
    rows = ray.data.from_items([{"text": text} for text in texts], override_num_blocks=blocks).map_batches(
        _Worker, fn_constructor_args=(load,), batch_size=None, compute=ray.data.ActorPoolStrategy(size=workers), **share
    )
    with told("Computing chunks", total=len(texts)) as line:
        for row in rows.iter_rows():
            report.tokens += int(row["tokens"])
            report.num_bytes += int(row["num_bytes"])
            line.advance(int(row["chunks"]))
