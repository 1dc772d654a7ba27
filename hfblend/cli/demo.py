"""`hfblend demo` and `hfblend playground`: the effect of blending on the demo's passages and on yours."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from ..util import require_folders_of
from .common import load, shown_on, wake, write_json
from .options import Device, Json, Model


def demo(model: Model = None, json_file: Json = None, device: Device = None) -> None:
    """Answer a question about twelve passages by full prefill, full reuse and blending, and compare them.

    Example: hfblend demo --json demo.json
    """
    require_folders_of(json_file)

    wake()
    from ..demo.demo import run_demo

    write_json(json_file, run_demo(*load(model, device), shown_on(json_file)))


def playground(
    model: Model = None,
    device: Device = None,
    port: Annotated[int, Option(help="Port of 127.0.0.1 that serves the page.", min=1, max=65535)] = 8017,
) -> None:
    """Serve a page on this machine: reorder chunks, move the ratio, see tokens, answers and times.

    Example: hfblend playground --model path/or/hub-id --port 9000
    """
    wake()
    from ..demo import model as demo_model
    from ..demo.playground.page import serve

    serve(lambda: demo_model.load(model, device), model or demo_model.HUB_NAME, port)
