"""Replicas and workers on Ray, by the command: run by hand, with `-m slow`; the docs have the results."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from helpers import make_llama, make_word_tokenizer

import hfblend
from hfblend.prompts.prompt import Prompt
from hfblend.store import DiskStore

pytest.importorskip("ray.serve")
httpx, psutil = pytest.importorskip("httpx"), pytest.importorskip("psutil")

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
HFBLEND = [sys.executable, "-c", "from hfblend.cli import app; app()"]
SETTINGS = hfblend.BlendConfig(recompute_ratios=(0.15,), min_reused_tokens=0)
RAYS_ROUTER = (  # for comparison
    "from hfblend.serving import cluster; from ray.serve._private import request_router; "
    "cluster.ChunkRouter = request_router.PowerOfTwoChoicesRequestRouter; "
)
GROUPS, IN_GROUP, CLIENTS = 60, 4, 24
TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(folder)
    tokenizer = make_word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def text(generator, count):
    return " ".join(f"w{generator.randrange(6, 97)}" for _ in range(count))


def workload(seed):
    """Chats about the documents of a group, in any order, each with another question; groups are mixed."""
    generator = random.Random(seed)
    groups = [[text(generator, 40) for _ in range(3)] for _ in range(GROUPS)]
    chats = []
    for documents in groups * IN_GROUP:
        messages = [{"role": "system", "content": "w20 w21"}, {"role": "user", "content": text(generator, 8)}]
        chats.append({"messages": messages, "documents": generator.sample(documents, 3), "max_tokens": TOKENS})
    generator.shuffle(chats)
    return chats


def expected(folder, chats):
    """The answers of `model.generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = []
    with hfblend.patch(model, SETTINGS, store=hfblend.MemoryStore()):
        for chat in chats:
            prompt = Prompt.from_chat(tokenizer, chat["messages"], chat["documents"])
            output = model.generate(**prompt.inputs(), max_new_tokens=chat["max_tokens"], do_sample=False)
            answers.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return answers


class Server:
    """A running `hfblend serve --ray`."""

    def __init__(self, process, url, log):
        self.process, self.url, self.log = process, url, log
        self.num_streaming = 0  # answers whose first token has come

    def num_lost(self):
        """How often a replica was lost with a request."""
        return self.log.read_text().count("A replica was lost with a request")

    def replicas(self):
        """Processes of replicas, whatever they do now."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in children if "ray::ServeReplica:hfblend:Replica" in " ".join(_cmdline(one))]

    def ask(self, chat, **options):
        """The text of an answer, its usage, and the replica."""
        body, chat = {**chat, **options}, f"{self.url}/v1/chat/completions"
        if not body.get("stream"):
            answer = httpx.post(chat, json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            content = answer.json()["choices"][0]["message"]["content"]
            return content, answer.json()["usage"]["hfblend"], answer.headers["x-hfblend-replica"]
        pieces, usage = [], None
        with httpx.stream("POST", chat, json=body, timeout=120) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"])
                    self.num_streaming += len(pieces) == 1  # the head of the answer was before
                    pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
                    usage = event.get("usage") or usage
        assert usage is not None, "a stream without an end"
        return "".join(pieces), usage["hfblend"], answer.headers["x-hfblend-replica"]


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with served(folder, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@contextmanager
def served(folder, log, before=""):
    """Starts the command, and ends it by Ctrl-C: nothing is left of it."""
    words = ["serve", str(folder), "--ray", "--replicas", "2", "--port", "0", "--max-bytes", "3GB", "--device", "cpu"]
    with log.open("w") as out:
        command = [*HFBLEND[:2], before + HFBLEND[2], *words, "--min-reused-tokens", "0"]
        environment = {**os.environ, "RAY_DEDUP_LOGS": "0"}
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
    try:
        until(lambda: "Serving at" in log.read_text() or process.poll() is not None, 300)
        assert process.poll() is None, log.read_text()
        url = log.read_text().split("Serving at ")[1].split("/v1")[0]
        server = Server(process, url, log)
        yield server
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
        assert "Stopped." in log.read_text()
        until(lambda: not any(map(is_running, children)), 60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def is_running(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(is_so, seconds):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def shown(record_property, **figures):
    for name, figure in figures.items():
        record_property(name, figure)
    sys.stderr.write(f"{json.dumps(figures)}\n")


def answers_of(server, chats, record_property, name):
    """Answers, and what they say about places and load."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        started = time.monotonic()
        answers = list(clients.map(server.ask, chats))
        seconds = time.monotonic() - started
    hits, misses = (sum(usage[name] for _, usage, _ in answers) for name in ("hits", "misses"))
    assert hits + misses == 3 * len(chats)
    local = hits / (hits + misses - 3 * GROUPS)  # others come for the first time
    load = sorted(Counter(replica for _, _, replica in answers).values())
    shown(record_property, router=name, requests=len(chats), local=local, load=load, seconds=seconds)
    return answers, local, load


def test_chunks_are_local_and_load_is_even(folder, server, record_property):
    chats = workload(1)
    answers, local, load = answers_of(server, chats, record_property, "chunks")
    assert local >= 0.9
    assert len(load) == 2
    assert load[1] <= 2 * load[0]
    assert [said for said, _, _ in answers] == expected(folder, chats)


def test_rays_own_router_computes_more_chunks_twice(folder, tmp_path, record_property):
    with served(folder, tmp_path / "log", RAYS_ROUTER) as server:
        assert answers_of(server, workload(1), record_property, "Ray's own")[1] < 0.9


def test_a_killed_replica_costs_no_answer(folder, server, record_property):
    chats, answered = [{**chat, "max_tokens": 48} for chat in workload(2)], threading.Semaphore(0)
    wanted, lost = expected(folder, chats), server.num_lost()

    def ask(i):
        try:
            return server.ask(chats[i], stream=i % 4 > 0)
        finally:
            answered.release()

    with ThreadPoolExecutor(CLIENTS) as clients:
        waiting = [clients.submit(ask, i) for i in range(len(chats))]
        for _ in range(len(chats) // 4):
            answered.acquire()
        before = server.num_streaming
        until(lambda: server.num_streaming >= before + CLIENTS // 2, 60)
        server.replicas()[0].send_signal(signal.SIGKILL)
        answers = [one.result() for one in waiting]
    names = Counter(replica for _, _, replica in answers)
    shown(record_property, requests=len(chats), lost=server.num_lost() - lost, load=list(names.values()))
    assert [said for said, _, _ in answers] == wanted
    assert server.num_lost() > lost
    until(lambda: len(server.replicas()) == 2, 120)


def test_seeded_answers_go_on_and_unseeded_ones_say_that_they_cannot(server):
    chat = {**workload(3)[0], "max_tokens": 400, "stream": True}
    whole = server.ask(chat, temperature=1, seed=7)[0]
    assert whole != server.ask(chat, temperature=0)[0]
    before = server.num_streaming
    with ThreadPoolExecutor(8) as clients:
        seeded = [clients.submit(server.ask, chat, temperature=1, seed=7) for _ in range(4)]
        unseeded = [clients.submit(server.ask, chat, temperature=1) for _ in range(4)]
        until(lambda: server.num_streaming == before + 8, 60)
        for replica in server.replicas():
            replica.send_signal(signal.SIGKILL)
        assert [one.result()[0] for one in seeded] == [whole] * 4
        for one in unseeded:
            with pytest.raises(RuntimeError, match="replica_lost"):
                one.result()


def test_the_request_of_a_client_that_leaves_ends(server):
    chat = {**workload(4)[0], "max_tokens": 1500, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=chat, timeout=120) as answer:
        lines = answer.iter_lines()
        while '"content"' not in next(lines):
            pass
    left = time.monotonic()
    until(lambda: sum(one.cpu_percent(1) for one in server.replicas()) < 20, 60)
    ended = time.monotonic() - left
    server.ask({**chat, "stream": False})
    assert ended < time.monotonic() - left - ended  # than the whole answer


def precompute(folder, tmp_path, *options):
    words = ["precompute", "--model", str(folder), "--corpus", str(tmp_path / "corpus.jsonl"), "--json", "--ray"]
    store = ["--store", str(tmp_path / "chunks"), "--device", "cpu"]
    return subprocess.Popen(
        [*HFBLEND, *words, *store, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def files_in(chunks):
    """Files of chunks, each with what changes when it is written anew."""
    return {path: path.stat().st_ino for path in chunks.rglob("*.safetensors")}


def report_of(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(out[out.index("{") :])


def test_a_killed_worker_loses_nothing(folder, tmp_path, record_property):
    generator, count = random.Random(2), 600
    texts = [text(generator, 400) for _ in range(count)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*texts, texts[0]]))
    chunks = tmp_path / "chunks"
    process = precompute(folder, tmp_path, "--workers", "2")
    until(lambda: len(files_in(chunks)) > count // 10, 200)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in children if "MapBatches" in " ".join(_cmdline(one))]
    stored = len(files_in(chunks))
    workers[0].send_signal(signal.SIGKILL)
    report = report_of(process)
    written = files_in(chunks)
    assert (report["computed"], report["skipped"], report["failed"]) == (count, 1, 0)
    assert len(workers) == 2
    assert 0 < report["tokens"] < 400 * count  # none twice; those of the killed worker's batch are not told
    assert len(DiskStore(chunks)) == count
    checked = subprocess.run([*HFBLEND, "store", "verify", str(chunks)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    again = report_of(precompute(folder, tmp_path, "--workers", "2"))
    assert (again["computed"], again["skipped"]) == (0, count + 1)
    assert files_in(chunks) == written
    shown(record_property, workers=len(workers), stored_before=stored, seconds=report["seconds"])
