"""`hfblend serve`: an OpenAI-style server that reuses chunks."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..config import BlendConfig
from ..trace.progress import told
from ..util import require
from .common import console, corrected, given, load, store_at
from .options import Correction, Device, DType, KeptIn, Ratio, Rule

if TYPE_CHECKING:
    from ..serving.engine import Engine
    from ..serving.gate import GateSettings
    from ..store import Store

_GRACE_S = 5  # after Ctrl-C, for answers to end

ApiKeys = Annotated[
    Path | None, Option(help="File with a key=namespace a line; each namespace has its own chunks.", exists=True,
                        dir_okay=False, show_default="$HFBLEND_API_KEYS, else open to all")
]  # fmt: skip
MetricsKey = Annotated[
    str | None, Option(help="Key that opens /metrics, and nothing else.", envvar="HFBLEND_METRICS_KEY",
                       show_default="open without API keys, else shut")
]  # fmt: skip


def serve(
    model: Annotated[
        str | None, Argument(help="Hub id or folder of a causal LM.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    store: KeptIn = None,
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[
        str | None, Option(help="Clients call the model by it.", show_default="the model's name")
    ] = None,
    max_bytes: Annotated[
        str | None,
        Option(help="For KV blocks and chunks in memory, a half each.", show_default="80 %, with 4GiB for chunks"),
    ] = None,
    separator: Annotated[
        str | None, Option(help="Text between chunks in prompts without documents.", show_default="none")
    ] = None,
    ratio: Ratio = 0.15,
    selection: Rule = None,
    correction: Correction = None,
    min_reused_tokens: Annotated[int, Option(help="Prompts with fewer chunk tokens are not blended.", min=0)] = 256,
    device: Device = None,
    dtype: DType = None,
    api_keys: ApiKeys = None,
    metrics_key: MetricsKey = None,
    max_requests: Annotated[int, Option(help="At once, waiting ones included; more get a 429.", min=1)] = 64,
    max_requests_per_namespace: Annotated[int | None, Option(help="At once of one.", show_default="all", min=1)] = None,
    timeout: Annotated[float, Option(help="Longest time of a request, in seconds.", min=0.001)] = 600.0,
    demo: Annotated[bool, Option(help="Show a page at / that asks with and without reuse.")] = False,
    ray: Annotated[bool, Option("--ray", help="Run replicas on Ray, of this machine or of $RAY_ADDRESS.")] = False,
    replicas: Annotated[int, Option(help="With --ray; each has a GPU, or a share of the CPUs.", min=1)] = 2,
    max_replicas: Annotated[
        int | None, Option(help="With --ray, so many under load.", min=1, show_default="--replicas")
    ] = None,
) -> None:
    """Serve a model with OpenAI's API; KV of documents in chats is stored, and later chats reuse it.

    Example: hfblend serve --store chunks

    Example: hfblend serve path/or/hub-id --store s3://bucket/chunks --max-bytes 60GB --port 9000

    Example: hfblend serve --store chunks --ray --replicas 2
    """
    for package in ("fastapi", "uvicorn", "openai"):
        require(package, package, "serve", "The server needs")
    chosen = {**given(selection=selection), **corrected(correction), "separator": separator}
    config = BlendConfig(recompute_ratios=(ratio,), min_reused_tokens=min_reused_tokens, **chosen)
    limits = {"max_requests": max_requests, "max_requests_per_namespace": max_requests_per_namespace}
    gate_settings = _gate_settings(api_keys, metrics_key=metrics_key, timeout_s=timeout, **limits)
    if ray and demo:
        raise ValueError("The demo page is for one process: leave out --demo, or --ray.")
    build = partial(_engine, model, device, dtype, store, config, served_model_name)
    with _listening(host, port) as listening:
        if not ray:
            engine, tokenizer, name = build(max_bytes)

            from ..serving.server import guarded_app

            app = guarded_app(engine, tokenizer, name, separator, gate_settings, with_page=demo)
            return _run(app, engine, listening, "/" if demo else "/v1")
        host, port = listening.getsockname()[:2]
    from ..serving.gate import Gate

    place = {"host": host, "port": port, "separator": separator, "gate": partial(Gate, settings=gate_settings)}
    _run_on_ray(partial(_app, build, separator), max_bytes, replicas, max(replicas, max_replicas or 0), place)


def _engine(
    model: str | None, device: str | None, dtype: str | None, store: str | None, config: BlendConfig,
    served_model_name: str | None, max_bytes: str | int | None,
) -> tuple[Engine, Any, str]:  # fmt: skip
    """An engine, its tokenizer, and the name that clients use."""
    loaded, tokenizer, name = load(model, device, dtype)

    from ..serving.engine import Engine

    engine = Engine(loaded, _tiered(store, max_bytes), config, max_bytes=max_bytes)
    return engine, tokenizer, served_model_name or (Path(name).name if Path(name).is_dir() else name)


def _app(build: Callable[..., tuple[Engine, Any, str]], separator: str | None, max_bytes: str | int | None) -> Any:
    """The app of a replica; the gate is in front of all of them."""
    from ..serving.app import build_app

    engine, tokenizer, name = build(max_bytes)
    engine.start()
    return build_app(engine, tokenizer, name, separator)


def _gate_settings(keys_file: Path | None, **settings: Any) -> GateSettings:
    from ..serving.checks import read_api_keys
    from ..serving.gate import GateSettings

    return GateSettings(read_api_keys(keys_file), **settings)


def _tiered(where: str | None, max_bytes: str | int | None) -> Store:
    """A store in memory, half of `max_bytes` large, in front of one in a folder or at a URL."""
    from ..store import MemoryStore, TieredStore
    from ..store.sizes import num_bytes_of

    memory = MemoryStore() if max_bytes is None else MemoryStore(num_bytes_of(max_bytes) // 2)
    return memory if where is None else TieredStore([memory, store_at(where)])


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, before any model is loaded; raises `OSError` for a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"Port {port} of {host} cannot be used ({error.strerror}). Choose another with --port."
        ) from error


def _run(app: Any, engine: Engine, listening: socket.socket, path: str) -> None:
    """Starts the engine, and serves until Ctrl-C or SIGTERM; then answers have some seconds to end, before it does."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            end = asyncio.get_running_loop().call_later(_GRACE_S, partial(engine.stop, hard_stop=True))
            await super().shutdown(sockets)
            end.cancel()

    host, port = listening.getsockname()[:2]
    try:
        engine.start()
        console.print(f"Serving at http://{host}:{port}{path} until Ctrl-C.", highlight=False, soft_wrap=True)
        # h11 bounds a request's headers; httptools, which uvicorn prefers where it is installed, does not.
        Server(uvicorn.Config(app, http="h11", log_level="warning")).run([listening])
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        engine.stop(hard_stop=True)  # after a Ctrl-C before the app, or a second one, the app has not


def _run_on_ray(
    build: Callable[..., Any], max_bytes: str | None, replicas: int, max_replicas: int, place: dict[str, Any]
) -> None:
    """Serves replicas until Ctrl-C or SIGTERM."""
    require("ray.serve", "ray[serve,data]", "ray", "Replicas need")
    from ..serving import cluster

    try:
        with told("Starting Ray") as line, cluster.joined():
            for one in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
                signal.signal(one, signal.default_int_handler)
            line.say("Starting replicas")
            of_each = partial(build, max_bytes or cluster.bytes_of(max_replicas))
            with cluster.deployed(of_each, replicas=replicas, max_replicas=max_replicas, **place):
                where = f"http://{place['host']}:{place['port']}/v1"
                console.print(f"Serving at {where} until Ctrl-C.", highlight=False, soft_wrap=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        console.print("Stopped.")
