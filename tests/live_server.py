"""A server of this process, on a free port of the loopback address."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn
from helpers import config, make_llama, make_word_tokenizer
from test_serving_engine import ROOMY, all_blocks_are_free, until

from hfblend.serving.engine import Engine
from hfblend.serving.gate import GateSettings
from hfblend.serving.server import guarded_app

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@contextmanager
def live(app: Any) -> Iterator[str]:
    """Serves an ASGI app by uvicorn in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="loop")
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextmanager
def served(
    store: Any = None, settings: GateSettings | None = None, *, model: Any = None, tokenizer: Any = None,
    with_page: bool = False, **options: Any,
) -> Iterator[SimpleNamespace]:  # fmt: skip
    """The whole server of a tiny model: its address and its engine, which is left without requests and blocks."""
    model = make_llama() if model is None else model
    if tokenizer is None:
        tokenizer = make_word_tokenizer()
        tokenizer.chat_template = TEMPLATE
    model.generation_config.max_new_tokens = 8
    engine = Engine(model, store, config(0.2), **{**ROOMY, **options})
    app = guarded_app(engine, tokenizer, "tiny", settings=settings, with_page=with_page)
    engine.start()
    with live(app) as url:
        yield SimpleNamespace(url=url, engine=engine)
        until(lambda: not engine.requests)
        assert all_blocks_are_free(engine)
        assert not engine.output_router.result_handlers
