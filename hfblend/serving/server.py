"""The whole server: the gate around the app, numbers for /metrics, and the page of `--demo`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..demo.passages import demo_data, passage_texts
from ..display.html import rendered
from ..store.prometheus import export_to_prometheus
from .app import build_app
from .engine import Engine
from .gate import Gate, GateSettings

logger = logging.getLogger(__name__)

# The page talks to this server only, and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def guarded_app(
    engine: Engine, tokenizer: Any, name: str, separator: str | None = None, settings: GateSettings | None = None,
    *, with_page: bool = False,
) -> ASGIApp:  # fmt: skip
    """Returns the app of a started engine, inside a gate; it stops the engine at its end.

    Args:
        tokenizer, name, separator: as of `build_app`.
        settings: of the gate.
        with_page: whether / shows a page for questions about the demo's passages.

    Raises:
        ValueError: a page for a server with keys, or as `build_app`.
    """
    settings = settings or GateSettings()
    if with_page and settings.keys:
        raise ValueError("The demo page asks without a key: leave the keys out, or the page.")
    gate = Gate(build_app(engine, tokenizer, name, separator), settings, numbers=engine.numbers)
    if gate.telemetry.registry is not None:
        try:
            export_to_prometheus(engine.store, registry=gate.telemetry.registry)
        except ValueError as error:  # a store of the caller's without counters
            logger.info("/metrics shows no store: %s", error)
    return WithPage(gate, name) if with_page else gate


class WithPage:
    """Shows the demo page at /; the rest is the app's."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        data = demo_data()
        self.app, self.values = app, {
            "model": name,
            "system": data["system"],
            "passages": passage_texts(data, range(len(data["passages"]))),
            "questions": [one["question"] for one in data["questions"]],
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            page = rendered("serving/templates/demo.html.jinja", values=self.values)
            await HTMLResponse(page, headers={"content-security-policy": _POLICY})(scope, receive, send)
        else:
            await self.app(scope, receive, send)
