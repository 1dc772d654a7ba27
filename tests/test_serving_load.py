"""A short run of `benchmarks/load.py`: the command in another process, with clients that come, wait and leave."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers import save_byte_model

from hfblend.demo.passages import demo_data

pytest.importorskip("hfblend.serving", reason="serving needs Transformers 5.23 or later", exc_type=ImportError)
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from live_server import TEMPLATE  # isort: skip

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")
def test_load_leaves_nothing(tmp_path):
    texts = [passage["text"] for passage in demo_data()["passages"]]
    folder, file = save_byte_model(tmp_path, texts, TEMPLATE), tmp_path / "load.json"
    main = runpy.run_path(str(ROOT / "benchmarks" / "load.py"))["main"]
    options = ["--seconds", "8", "--turn", "4", "--clients", "8", "--max-requests", "5"]
    figures = main([*options, "--model", str(folder), "--json", str(file)])
    assert figures["errors"] == {}
    assert figures["requests"].keys() >= {"answered", "left", "429"}
    assert figures["most_inside"] <= 5
    assert figures["freed_after_s"] is not None
    assert figures["ttft_ms"]["on"]["n"] > 0
    assert figures["ttft_ms"]["off"]["n"] > 0
    assert figures["engine"]["hfblend_engine_failed_total"] == figures["engine"]["hfblend_engine_rebuilt_total"] == 0
    assert json.loads(file.read_text()) == figures
