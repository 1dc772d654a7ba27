"""Load on `hfblend serve`: many clients on this machine, a model on its CPU, blending on and off in turns.

    python benchmarks/load.py                                  # 50 clients, five minutes, the demo model; Linux
    python benchmarks/load.py --seconds 20 --clients 8 --json load.json

Each client asks one request after the other: most with documents drawn from the demo's passages in a new order, some
without, streamed and not, and some leave before the end. The server takes fewer requests at once than there are
clients, so that some get a 429. With blending off, the same requests say so: `"hfblend": {"enabled": false}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from hfblend.demo.passages import demo_data, passage_texts

CHAT = "/v1/chat/completions"
KINDS = {"streamed": 60, "whole": 15, "plain": 10, "leaves a stream": 10, "leaves": 5}  # and their weights
ON, OFF = "on", "off"


# --- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def server(model: str | None, max_requests: int) -> Iterator[tuple[str, int]]:
    """Starts the command on a free port; gives its address and its process id."""
    command = ["serve", *([model] if model else []), "--device", "cpu", "--port", "0", "--max-bytes", "3GB"]
    command += ["--max-requests", str(max_requests), "--min-reused-tokens", "0"]
    code = f"from hfblend.cli import app; app({command!r})"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "Serving at" in line), "")
            if not line:
                log.seek(0)
                raise RuntimeError(f"The server did not start:\n{log.read()}")
            yield re.findall(r"http://[\d.]+:\d+", line)[0], process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def process_numbers(pid: int) -> tuple[float, int]:
    """Resident megabytes and threads of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.MULTILINE)}
    return found["VmRSS"] / 1024, found["Threads"]


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Name → value of the server's metrics without labels."""
    lines = (await http.get("/metrics", timeout=60)).text.splitlines()
    return {name: float(value) for name, value in (one.split() for one in lines if one[0] != "#" and "{" not in one)}


# --- clients ----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What the clients saw, and samples of the server.

    Attributes:
        ttft_ms: of streamed answers with documents, by turn.
        outcomes: of all requests.
        errors: by kind; a 429 is none.
        samples: (seconds, resident megabytes, threads, requests inside).
    """

    ttft_ms: dict[str, list[float]] = field(default_factory=lambda: {ON: [], OFF: []})
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, float, int, float]] = field(default_factory=list)


class Clients:
    """Clients that share a connection pool and what they saw.

    Args:
        num_documents: of a request, drawn from the passages.
        max_tokens: of an answer.
    """

    def __init__(self, http: httpx.AsyncClient, seen: Seen, num_documents: int, max_tokens: int) -> None:
        self.http, self.seen = http, seen
        self.num_documents, self.max_tokens = num_documents, max_tokens
        self.data = demo_data()
        self.draw = random.Random(0)

    def body(self, kind: str, turn: str) -> dict[str, Any]:
        """A request's body."""
        question = self.draw.choice(self.data["questions"])["question"]
        messages = [{"role": "system", "content": self.data["system"]}, {"role": "user", "content": question}]
        body = {"messages": messages, "max_tokens": self.max_tokens, "temperature": 0, "stream": "stream" in kind}
        if kind == "plain":
            return {**body, "stream": True}
        order = self.draw.sample(range(len(self.data["passages"])), self.num_documents)
        if kind.startswith("leaves"):
            body["max_tokens"] = 200
        return {**body, "documents": passage_texts(self.data, order), "hfblend": {"enabled": turn == ON}}

    async def run(self, count: int, turn: str, seconds: float) -> None:
        """Has so many clients ask for so long; returns when all have their last answer."""
        end = time.perf_counter() + seconds
        await asyncio.gather(*(self._one(turn, end) for _ in range(count)))

    async def _one(self, turn: str, end: float) -> None:
        while time.perf_counter() < end:
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                outcome = await (self._stream if "stream" in kind or kind == "plain" else self._whole)(kind, turn)
            except httpx.HTTPError as error:
                outcome = "error"
                self.seen.errors[type(error).__name__] += 1
            self.seen.outcomes[outcome] += 1

    async def _whole(self, kind: str, turn: str) -> str:
        patience = 1.0 if kind == "leaves" else 600.0
        try:
            response = await self.http.post(CHAT, json=self.body(kind, turn), timeout=patience)
        except httpx.ReadTimeout:
            if kind != "leaves":
                raise
            return "left"
        return await self._refused(response) if response.status_code != 200 else "answered"

    async def _stream(self, kind: str, turn: str) -> str:
        began, ttft_ms, is_whole = time.perf_counter(), None, False
        async with self.http.stream("POST", CHAT, json=self.body(kind, turn), timeout=600) as response:
            if response.status_code != 200:
                await response.aread()
                return await self._refused(response)
            async for event in events_of(response):
                if '"content"' in event and ttft_ms is None:
                    ttft_ms = 1000 * (time.perf_counter() - began)
                    if kind == "leaves a stream":
                        break
                is_whole = event == "[DONE]"
        if ttft_ms is not None and kind != "plain":
            self.seen.ttft_ms[turn].append(ttft_ms)
        if kind == "leaves a stream":
            return "left"
        if not is_whole:
            self.seen.errors["stream without end"] += 1
        return "answered"

    async def _refused(self, response: httpx.Response) -> str:
        if response.status_code == 429:
            await asyncio.sleep(float(response.headers["retry-after"]) * self.draw.uniform(0.5, 1.5))
            return "429"
        self.seen.errors[f"{response.status_code}: {response.text[:100]}"] += 1
        return "error"


async def events_of(response: httpx.Response) -> AsyncIterator[str]:
    """The data of a stream's events."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


# --- the run ----------------------------------------------------------------------------------------------------------


async def sampled(http: httpx.AsyncClient, pid: int, seen: Seen) -> None:
    """Samples the server every half second, until it is cancelled."""
    began = time.perf_counter()
    while True:
        inside = (await metrics(http))["hfblend_http_requests_inside"]
        seen.samples.append((time.perf_counter() - began, *process_numbers(pid), inside))
        await asyncio.sleep(0.5)


async def loaded(url: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    """Puts the load on a server; returns the report."""
    seen, limits = Seen(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits) as http:
        clients = Clients(http, seen, options.documents, options.tokens)
        for turn in (ON, OFF):  # the model tests itself at its first blend
            await clients._whole("whole", turn)
        sampling = asyncio.create_task(sampled(http, pid, seen))
        num_turns = max(2, round(options.seconds / options.turn / 2) * 2)
        for i in range(num_turns):
            await clients.run(options.clients, (ON, OFF)[i % 2], options.seconds / num_turns)
        freed = await freed_after(http)
        await asyncio.sleep(min(15.0, options.seconds / 4))
        sampling.cancel()
        return report(seen, options, freed, await metrics(http))


async def freed_after(http: httpx.AsyncClient) -> float | None:
    """Seconds until no request and no block is held; None if that takes more than ten."""
    began = time.perf_counter()
    while time.perf_counter() - began < 10:
        now = await metrics(http)
        if not now["hfblend_engine_requests"] and not now["hfblend_engine_blocks_held"]:
            return round(time.perf_counter() - began, 3)
        await asyncio.sleep(0.05)
    return None


def report(seen: Seen, options: argparse.Namespace, freed: float | None, last: dict[str, float]) -> dict[str, Any]:
    """The figures of a run, and whether each is as it should be."""
    total = seen.samples[-1][0]
    minute = min(60, total / 2)  # until then pools of threads and memory grow
    early = [one for one in seen.samples if one[0] <= minute]
    threads = {"at first": early[0][2], "most in the first minute": max(one[2] for one in early)}
    figures: dict[str, Any] = {
        "clients": options.clients,
        "seconds": round(total),
        "cores": os.cpu_count(),
        "requests": dict(seen.outcomes),
        "errors": dict(seen.errors),
        "ttft_ms": {turn: summary(times) for turn, times in seen.ttft_ms.items()},
        "most_inside": max(inside for *_, inside in seen.samples),
        "max_requests": options.max_requests,
        "freed_after_s": freed,
        "threads": {**threads, "at the end": seen.samples[-1][2]},
        "rss_mb": {"after a minute": round(early[-1][1]), "at the end": round(seen.samples[-1][1])},
        "engine": {name: value for name, value in last.items() if re.match(r"hfblend_engine_\w+_total", name)},
    }
    return {**figures, "kept": kept(figures)}


def kept(figures: dict[str, Any]) -> dict[str, bool]:
    """Whether each figure is as it should be."""
    ttft, threads, rss = figures["ttft_ms"], figures["threads"], figures["rss_mb"]
    return {
        "no error": not figures["errors"],
        "queue within its bound": figures["most_inside"] <= figures["max_requests"],
        "all blocks free": figures["freed_after_s"] is not None,
        "no thread more": threads["at the end"] <= threads["most in the first minute"],
        "at most 5 % more memory": rss["at the end"] <= 1.05 * rss["after a minute"],
        "p50 lower": ttft[ON]["p50"] < ttft[OFF]["p50"],
        "p95 lower": ttft[ON]["p95"] < ttft[OFF]["p95"],
    }


def summary(times: Sequence[float]) -> dict[str, float]:
    """Count, median and 95th percentile."""
    if len(times) < 2:
        return {"n": len(times), "p50": float("nan"), "p95": float("nan")}
    return {"n": len(times), "p50": round(median(times)), "p95": round(quantiles(times, n=20)[-1])}


def show(figures: dict[str, Any]) -> None:
    """Prints the report as a table."""
    print("| figure | value |\n| --- | --- |")
    for name, value in figures.items():
        text = ", ".join(f"{one}: {what}" for one, what in value.items()) if isinstance(value, dict) else value
        print(f"| {name} | {text} |")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the load, prints and returns the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--turn", type=float, default=30, help="seconds of each turn, on or off")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--max-requests", type=int, default=40, help="of the server")
    parser.add_argument("--documents", type=int, default=4, help="of a request")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer")
    parser.add_argument("--model", help="default, the demo model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with server(options.model, options.max_requests) as (url, pid):
        figures = asyncio.run(loaded(url, pid, options))
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    sys.exit(0 if all(main()["kept"].values()) else 1)
