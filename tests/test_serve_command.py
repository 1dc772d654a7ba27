"""`hfblend serve` as a process, and its errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hfblend.cli import app, serve
from hfblend.demo import model as demo_model


def run(*arguments):
    outcome = CliRunner().invoke(app, ["serve", *arguments])
    return outcome.exit_code, " ".join(outcome.output.split())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, output = run()
    assert code == 1
    assert "pip install 'hfblend[serve]'" in output


def test_a_taken_port_is_named_before_a_model_is_loaded(monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.setattr(demo_model, "load", lambda *args, **kwargs: pytest.fail("loaded before the port was bound"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = run("--port", str(taken.getsockname()[1]))
    assert code == 1
    assert "Choose another with --port" in output


def test_unfit_settings_are_refused(monkeypatch):
    monkeypatch.setattr(demo_model, "load", lambda *args, **kwargs: pytest.fail("loaded before the settings"))
    assert run("--separator", " ")[0] == run("--ratio", "2")[0] == run("--selection", "nonsense")[0] == 2


@pytest.mark.parametrize("moment", ["start", "print", "run"])
def test_ctrl_c_at_any_moment_ends_the_engine(monkeypatch, moment):
    """Its thread is no daemon: the process would never end."""
    uvicorn = pytest.importorskip("uvicorn")
    done = []

    def interrupt(name):
        done.append(name)
        if name == moment:
            raise KeyboardInterrupt

    engine = SimpleNamespace(start=lambda: interrupt("start"), stop=lambda hard_stop: done.append("stop"))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: interrupt("run"))
    monkeypatch.setattr(serve.console, "print", lambda text, **_: "Serving" in text and interrupt("print"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serve._run(None, engine, listening, "/v1")
    assert done[-2:] == [moment, "stop"]


@pytest.mark.thorough
def test_it_serves_a_folder_until_ctrl_c(tmp_path):
    httpx = pytest.importorskip("httpx")
    from test_serving_app import make_llama, word_tokenizer  # skips, where Transformers is too old

    make_llama().save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    command = "import hfblend.cli; hfblend.cli.app()"
    options = ["serve", str(tmp_path / "tiny"), "--store", str(tmp_path / "chunks"), "--port", "0"]
    arguments = [sys.executable, "-c", command, *options, "--max-bytes", "1GB", "--min-reused-tokens", "0"]
    with (tmp_path / "log").open("w+") as log:
        environ = {**os.environ, "COLUMNS": "200"}
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        try:
            url = re.search(r"http://\S+", process.stdout.readline())[0]
            chat = {"messages": [{"role": "user", "content": "w7"}], "max_tokens": 5}
            documents = {"documents": ["w8 w9 w10", "w11 w12"]}
            answer = httpx.post(f"{url}/chat/completions", json={**chat, **documents}, timeout=60).json()
            assert answer["model"] == "tiny"
            assert answer["usage"]["hfblend"]["misses"] == 2
            endless = {**chat, "max_tokens": 4000, "stream": True}
            with httpx.stream("POST", f"{url}/chat/completions", json=endless, timeout=60) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGINT)
                last = [line for line in lines if line][-1]
            assert "error" in last or "finish_reason" in last
            assert process.wait(60) == 0
            log.seek(0)
            assert "Traceback" not in log.read()
            assert len(list((tmp_path / "chunks").glob("*.safetensors"))) >= 2
        finally:
            process.kill()
            process.wait(10)
