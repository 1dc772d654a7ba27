"""Hit rates, bytes, time to first token and cost of many machines that share chunks, by simulation.

    python benchmarks/simulate.py                                    # every scenario
    python benchmarks/simulate.py shared --replicas 16 --rate 40 --gpu-hour 3
    python benchmarks/simulate.py --check                            # predicted against a real run on this CPU, minutes

Requests arrive at random (Poisson). Each has some chunks of Zipf's documents, of which some are replaced by new ones as
time goes. A router gives it to a replica, which serves one after the other, first come, first served:

    service = look-up and selection, or loading if that takes longer + recomputation + prefill of chunks in no tier

Full prefill and prefix caching serve the same stream, prefix caching with the same tiers. Tiers hold what
`hfblend.store.TieredStore` would: a new chunk goes into all, one that was found into the faster ones, the least
recently used leave. Service times are measured ones (`docs/images/bench-h200.json`). Decoding is left out.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import tempfile
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

BENCH = Path(__file__).parent.parent / "docs" / "images" / "bench-h200.json"
GB = 1e9


# --- requests -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A stream of requests.

    Args:
        rate: requests a second.
        documents: that can be asked for, a chunk each; the n-th is drawn with a weight of n ** -alpha.
        chunks: of a request, all different.
        churn: documents that are replaced by new ones, a request.
        groups: of documents, by turns; all of a request's are of one. 1 for no groups.
    """

    requests: int = 5000
    rate: float = 4.0
    documents: int = 20_000
    alpha: float = 0.9
    chunks: int = 16
    chunk_tokens: int = 512
    other_tokens: int = 64
    churn: float = 0.0
    groups: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of a prompt."""
        return self.other_tokens + self.chunks * self.chunk_tokens


class Request(NamedTuple):
    at: float
    documents: tuple[int, ...]  # in the order of the prompt, which is that of a retriever: as drawn


def zipf(documents: int, alpha: float) -> np.ndarray[Any, Any]:
    """The share of each document."""
    weights = np.arange(1, documents + 1, dtype=float) ** -alpha
    return weights / weights.sum()


def requests_of(load: Workload) -> list[Request]:
    """The stream, the same for the same workload."""
    chance = np.random.default_rng(load.seed)
    times = np.cumsum(chance.exponential(1 / load.rate, load.requests))
    in_a_group = load.documents // load.groups
    if load.chunks > in_a_group:
        raise ValueError(f"{load.chunks} chunks cannot be all different in groups of {in_a_group} documents.")
    edges = np.cumsum(zipf(in_a_group, load.alpha))
    versions: Counter[int] = Counter()
    stream = []
    for at in times:
        for document in chance.integers(load.documents, size=chance.poisson(load.churn)):
            versions[int(document)] += 1
        group = int(chance.integers(load.groups))
        ranks = dict.fromkeys(_drawn(chance, edges, load.chunks))
        drawn = (rank * load.groups + group for rank in itertools.islice(ranks, load.chunks))
        stream.append(Request(float(at), tuple(one + load.documents * versions[one] for one in drawn)))
    return stream


def _drawn(chance: np.random.Generator, edges: np.ndarray[Any, Any], different: int) -> list[int]:
    """Ranks, drawn until so many are different."""
    drawn: list[int] = []
    while len(set(drawn)) < different:
        drawn += np.searchsorted(edges[:-1], chance.random(2 * different)).tolist()
    return drawn


def lru_hit_rate(shares: np.ndarray[Any, Any], held: int) -> float:
    """The hit rate of the `held` least recently used of independent draws, by Che's approximation."""
    if held >= len(shares):
        return 1.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-shares * high)).sum() < held:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < held else (low, middle)
    return float((shares * (1 - np.exp(-shares * high))).sum())


# --- tiers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tier:
    """A place for chunks.

    Args:
        bytes_per_s: to one replica, into its GPU.
        latency_s: of a request's look-up and first byte, once.
        shared: by all replicas; else each has its own.
        all_bytes_per_s: to all replicas together.
        freed: share of the budget that is freed beyond what is needed, when entries must go.
        gb_month: price of a GB for a month.
    """

    name: str
    num_bytes: float
    bytes_per_s: float = math.inf
    latency_s: float = 0.0
    shared: bool = False
    all_bytes_per_s: float = math.inf
    freed: float = 0.0
    gb_month: float = 0.0


class Held:
    """The entries of a tier, the least recently used first, and when its line is free."""

    def __init__(self, tier: Tier) -> None:
        self.tier, self.num_bytes, self.line_is_free_at = tier, 0.0, 0.0
        self.entries: OrderedDict[Hashable, float] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.entries

    def use(self, key: Hashable) -> None:
        if key in self.entries:
            self.entries.move_to_end(key)

    def put(self, key: Hashable, num_bytes: float) -> None:
        """Keeps an entry, if it fits at all."""
        if num_bytes > self.tier.num_bytes:
            return
        self.num_bytes -= self.entries.pop(key, 0)
        if self.num_bytes + num_bytes > self.tier.num_bytes:
            self._make_room(self.tier.num_bytes - num_bytes)
        self.entries[key] = num_bytes
        self.num_bytes += num_bytes

    def _make_room(self, most: float) -> None:
        """Drops entries until no more than `most` bytes stay, and as many more as the tier frees beyond."""
        least = max(0.0, most - self.tier.freed * self.tier.num_bytes)
        while self.entries and (self.num_bytes > most or self.num_bytes - next(iter(self.entries.values())) >= least):
            self.num_bytes -= self.entries.popitem(last=False)[1]

    def seconds(self, num_bytes: float, now: float) -> float:
        """How long a request that comes now waits for so many bytes."""
        alone = now + self.tier.latency_s + num_bytes / self.tier.bytes_per_s
        return max(max(now, self.line_is_free_at) + num_bytes / self.tier.all_bytes_per_s, alone) - now

    def occupy(self, num_bytes: float, now: float) -> None:
        """Uses the line from now on for so many bytes."""
        self.line_is_free_at = max(now, self.line_is_free_at) + num_bytes / self.tier.all_bytes_per_s


# --- how long things take -----------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Seconds by tokens, as measured; between two lengths, and beyond the last, a power of the length."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, tokens: float) -> float:
        if tokens <= 0:
            return 0.0
        x, y = np.log(self.tokens), np.log(self.seconds)
        if len(x) == 1:
            return self.seconds[0] * tokens / self.tokens[0]
        i = int(np.clip(np.searchsorted(x, math.log(tokens)) - 1, 0, len(x) - 2))
        return math.exp(y[i] + (math.log(tokens) - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i]))


@dataclass(frozen=True)
class Measured:
    """What one replica takes.

    Args:
        full: full prefill.
        blend: of a prompt whose chunks are all on the GPU, selection included.
        select: the part of it that needs no layer that is still to come, and so runs during loading.
        chunk_s: prefill of a chunk that no tier has.
        kv_bytes: of a token.
        layerwise: a rule that needs a layer only when the pass is there (`kv_deviation`): all of `blend` runs during
            loading.
    """

    full: Curve
    blend: Curve
    select: Curve
    chunk_s: float
    kv_bytes: int
    layerwise: bool = False

    def with_loading(self, tokens: int, load_s: float) -> float:
        """A blend that waits for chunks."""
        meanwhile = self.blend(tokens) if self.layerwise else self.select(tokens)
        return self.blend(tokens) - meanwhile + max(meanwhile, load_s)


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a bench's JSON."""
    return json.loads(path.read_text())["rows"]


def h200(ratio: float = 0.15, path: Path = BENCH) -> Measured:
    """An 8B Llama in bf16 on an H200, by the bench's JSON. A prompt without any stored chunk took 1.17 of a full
    prefill's time at 16,448 tokens (docs/performance.md): the rest after blending is the prefill of 32 chunks."""
    rows = rows_in(path)

    def curve(method: str, at: float, part: Callable[[Any], float]) -> Curve:
        found = [one for one in rows if (one["method"], one["ratio"], one["chunks_in"]) in
                 {(method, at, "gpu"), (method, at, None)}]  # fmt: skip
        return Curve(tuple(one["tokens"] for one in found), tuple(part(one) / 1e3 for one in found))

    full = curve("full_prefill", 1.0, lambda row: row["ttft_ms"])
    blend = curve("hfblend", ratio, lambda row: row["ttft_ms"])
    select = curve("hfblend", ratio, lambda row: row["phase_ms"]["select"])
    return Measured(full, blend, select, (1.17 * full(16_448) - blend(16_448)) / 32, 131_072)


# --- replicas and routers -----------------------------------------------------------------------------------------


class Replica:
    """A GPU that serves one request after the other, and its tiers, the fastest first."""

    def __init__(self, tiers: Sequence[Held], name: int = 0) -> None:
        self.tiers, self.name, self.waiting, self.is_busy = tiers, name, deque[Request](), False

    @property
    def load(self) -> int:
        """Requests that wait or are served."""
        return len(self.waiting) + self.is_busy

    def holds(self, documents: Iterable[Hashable]) -> int:
        """How many of these chunks it has itself."""
        own = [tier for tier in self.tiers if not tier.tier.shared]
        return sum(any(one in tier for tier in own) for one in documents)

    def place_of(self, key: Hashable) -> int | None:
        """The number of the first tier that has a chunk."""
        return next((i for i, tier in enumerate(self.tiers) if key in tier), None)

    def load_s(self, places: Sequence[int], num_bytes: float, now: float) -> float:
        """How long chunks from these tiers take, all tiers at once."""
        counts = Counter(places)
        return max((self.tiers[i].seconds(count * num_bytes, now) for i, count in counts.items()), default=0.0)

    def served(
        self, keys: Sequence[Hashable], places: Sequence[int | None], num_bytes: float, now: float
    ) -> Counter[str]:
        """Reads chunks from their tiers and keeps them in faster ones, new ones in all; returns their number by tier,
        those of no tier under ""."""
        for key, place in zip(keys, places):
            for tier in self.tiers if place is None else self.tiers[place : place + 1]:
                tier.use(key)
                tier.occupy(num_bytes, now)
        for key, place in zip(keys, places):
            for tier in self.tiers[:place]:
                tier.put(key, num_bytes)
        return Counter("" if place is None else self.tiers[place].tier.name for place in places)


Method = Callable[[Replica, Request, Workload, Measured, float], tuple[float, Counter[str]]]


def full_prefill(
    replica: Replica, request: Request, load: Workload, measured: Measured, now: float
) -> tuple[float, Counter[str]]:
    """Seconds of a request, and its chunks by tier."""
    return measured.full(load.tokens), Counter({"": load.chunks})


def prefix_caching(
    replica: Replica, request: Request, load: Workload, measured: Measured, now: float
) -> tuple[float, Counter[str]]:
    """Reuses the longest run of chunks from the beginning that was seen before, unless computing is faster."""
    num_bytes, key = measured.kv_bytes * load.chunk_tokens, 0
    keys = [key := hash((key, document)) for document in request.documents]
    places = [*itertools.takewhile(lambda place: place is not None, map(replica.place_of, keys))]
    full = measured.full(load.tokens)
    seconds = replica.load_s(places, num_bytes, now) + full - measured.full(len(places) * load.chunk_tokens)
    if seconds > full:
        return full, Counter({"": load.chunks})
    return seconds, replica.served(keys, places + [None] * (load.chunks - len(places)), num_bytes, now)


def blending(
    replica: Replica, request: Request, load: Workload, measured: Measured, now: float
) -> tuple[float, Counter[str]]:
    """Reuses every chunk that was seen before, unless loading takes longer than a full prefill, as the controller."""
    num_bytes, places = measured.kv_bytes * load.chunk_tokens, [*map(replica.place_of, request.documents)]
    found = [place for place in places if place is not None]
    seconds = measured.with_loading(load.tokens, replica.load_s(found, num_bytes, now))
    if seconds > measured.full(load.tokens):
        return measured.full(load.tokens), Counter({"": load.chunks})
    seconds += (load.chunks - len(found)) * measured.chunk_s
    return seconds, replica.served(request.documents, places, num_bytes, now)


METHODS: dict[str, Method] = {
    "full prefill": full_prefill, "prefix caching": prefix_caching, "blending": blending,
}  # fmt: skip


def round_robin(replicas: Sequence[Replica], request: Request, number: int) -> Replica:
    return replicas[number % len(replicas)]


def by_hash(replicas: Sequence[Replica], request: Request, number: int) -> Replica:
    """By the first chunk."""
    return replicas[zlib.crc32(str(request.documents[0]).encode()) % len(replicas)]


def most_held(replicas: Sequence[Replica], request: Request, number: int, busier: int = 2) -> Replica:
    """The one that holds most of its chunks, among those with no more than `busier` requests more than another; of
    equal ones, the least busy."""
    least = min(one.load for one in replicas)
    start = number % len(replicas)  # so that no replica is the first every time
    free = [one for one in (*replicas[start:], *replicas[:start]) if one.load <= least + busier]
    return max(free, key=lambda one: (one.holds(request.documents), -one.load))


ROUTERS = {"round robin": round_robin, "hash": by_hash, "most held": most_held}


# --- the run ------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A request: when it came, seconds to its first token and of its service, its replica, its chunks by tier."""

    at: float
    ttft_s: float
    service_s: float
    replica: int
    hits: Counter[str]


@dataclass
class Outcome:
    """A run: what came after its beginning, in which tiers fill."""

    records: list[Record]
    fleet: list[Replica]

    @cached_property
    def hits(self) -> Counter[str]:
        """Chunks by tier, those of no tier under ""."""
        names = dict.fromkeys(name for one in self.records for name in one.hits)
        return Counter({name: sum(one.hits[name] for one in self.records) for name in names})

    @property
    def hit_rate(self) -> float:
        return 1 - self.hits[""] / self.hits.total()

    @property
    def local_rate(self) -> float:
        """The share of chunks that the replica had itself."""
        shared = {tier.tier.name for tier in self.fleet[0].tiers if tier.tier.shared}
        return self.hit_rate - sum(self.hits[name] for name in shared) / self.hits.total()

    @property
    def gpu_s(self) -> float:
        """Of a request, on average."""
        return float(np.mean([one.service_s for one in self.records]))

    def ttft_ms(self, percentile: float) -> float:
        return 1e3 * float(np.percentile([one.ttft_s for one in self.records], percentile))

    @property
    def utilisation(self) -> float:
        """The share of time in which replicas serve."""
        seconds = self.records[-1].at - self.records[0].at
        return sum(one.service_s for one in self.records) / (seconds * len(self.fleet))

    @property
    def imbalance(self) -> float:
        """The most requests of a replica over the mean."""
        return max(Counter(one.replica for one in self.records).values()) * len(self.fleet) / len(self.records)

    def cost_of_1000(self, gpu_hour: float) -> float:
        """The price of 1,000 requests: GPU time in use, and the tiers' budgets for as long as the run."""
        budgets = {id(tier): tier.tier for replica in self.fleet for tier in replica.tiers}.values()
        a_month = sum(tier.num_bytes / GB * tier.gb_month for tier in budgets)
        months = (self.records[-1].at - self.records[0].at) / (30 * 24 * 3600)
        return 1000 * (self.gpu_s / 3600 * gpu_hour + a_month * months / len(self.records))


def run(
    stream: Sequence[Request], load: Workload, measured: Measured, tiers: Sequence[Tier],
    replicas: int = 1, method: str = "blending", router: str = "most held", filling: float = 0.5,
) -> Outcome:  # fmt: skip
    """Serves a stream. The first `filling` of it is not counted."""
    shared = {tier.name: Held(tier) for tier in tiers if tier.shared}
    fleet = [Replica([shared.get(tier.name) or Held(tier) for tier in tiers], name) for name in range(replicas)]
    number, records = itertools.count(), list[Record]()
    events: list[tuple[float, int, Any]] = [(one.at, next(number), one) for one in stream]  # sorted, and so a heap
    while events:
        now, order, what = heapq.heappop(events)
        if isinstance(what, Request):
            replica = ROUTERS[router](fleet, what, order)
            replica.waiting.append(what)
        else:
            replica, what.is_busy = what, False
        if replica.waiting and not replica.is_busy:
            request = replica.waiting.popleft()
            seconds, hits = METHODS[method](replica, request, load, measured, now)
            replica.is_busy = True
            heapq.heappush(events, (now + seconds, next(number), replica))
            records.append(Record(request.at, now + seconds - request.at, seconds, replica.name, hits))
    first = stream[int(filling * len(stream))].at
    return Outcome(sorted((one for one in records if one.at >= first), key=lambda one: one.at), fleet)


# --- scenarios ----------------------------------------------------------------------------------------------------

# Measured: RAM to GPU, 45 GB/s (bench-h200.json, `load_ms`), and a disk of 1.4 GB/s (docs/performance.md). Assumed:
# budgets; a disk of 7 GB/s; a network of 100 Gbit/s a machine, and twice that out of the Redis server.
GPU = Tier("GPU", 8 * GB)
RAM = Tier("RAM", 128 * GB, 45e9)
DISK = Tier("disk", 2000 * GB, 7e9, 0.001, freed=1 / 16)
SLOW_DISK = replace(DISK, bytes_per_s=1.4e9)
REDIS = Tier("Redis", 1000 * GB, 12.5e9, 0.002, shared=True, all_bytes_per_s=25e9)


@dataclass(frozen=True)
class Scenario:
    says: str
    load: Workload
    tiers: tuple[Tier, ...]
    replicas: int = 1
    routers: tuple[str, ...] = ("most held",)


# A replica without reuse is busy 4 fifths of the time: 3.2 requests a second of 253 ms.
ONE = Workload(rate=3.2)
EIGHT = Workload(requests=16_000, rate=8 * 3.2, groups=40)
ALL = ("round robin", "hash", "most held")
SCENARIOS = {
    "one": Scenario("One machine, 20,000 documents (1.3 TB).", ONE, (GPU, RAM, DISK)),
    "slow-disk": Scenario("The same, with a disk of 1.4 GB/s.", ONE, (GPU, RAM, SLOW_DISK)),
    "fleet": Scenario("Eight machines, 20,000 documents in 40 groups, nothing shared.", EIGHT, (GPU, RAM), 8, ALL),
    "shared": Scenario("The same, with Redis of 1 TB.", EIGHT, (GPU, RAM, REDIS), 8, ALL),
    "churn": Scenario(
        "The same, 4 documents replaced a request.", replace(EIGHT, churn=4.0), (GPU, RAM, REDIS), 8, ALL[2:]
    ),
}


def rows_of(scenario: Scenario, measured: Measured, gpu_hour: float) -> Iterator[list[str]]:
    """A line of the table for each method and router."""
    stream, load = requests_of(scenario.load), scenario.load
    chunk_mb = measured.kv_bytes * load.chunk_tokens / 1e6
    for method in METHODS:
        for router in scenario.routers if method != "full prefill" else ("round robin",):
            found = run(stream, load, measured, scenario.tiers, scenario.replicas, method, router)
            loaded = (
                f"{name} {n * chunk_mb / len(found.records):,.0f}" for name, n in found.hits.items() if name and n
            )
            yield [
                method, router, f"{found.hit_rate:.0%}", f"{found.local_rate:.0%}", ", ".join(loaded),
                *(f"{found.ttft_ms(percentile):,.0f}" for percentile in (50, 95, 99)), f"{1e3 * found.gpu_s:,.0f}",
                f"{found.utilisation:.0%}", f"{found.imbalance:.2f}", f"{found.cost_of_1000(gpu_hour):.3f}",
            ]  # fmt: skip


TITLES = ["method", "router", "hits", "local", "MB loaded a request", "TTFT p50, ms", "p95", "p99",
          "GPU ms a request", "busy", "most / mean", "1,000 requests"]  # fmt: skip


def table(rows: Iterable[Sequence[str]]) -> str:
    lines = [TITLES, ["---"] * len(TITLES), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- the check ----------------------------------------------------------------------------------------------------

CHECKED = Workload(requests=60, documents=24, chunks=4, chunk_tokens=128, seed=1)
_BUSY = 0.5  # share of the time, as it is predicted from the first unit costs
_EVERY = 6  # requests between two measurements of the unit costs


class Real:
    """SmolLM2 on this CPU, one request after the other, as a replica."""

    def __init__(self, load: Workload, budgets: Sequence[float]) -> None:
        import torch

        from hfblend.demo.model import load as load_model

        self.model, _ = load_model(None, device="cpu", dtype=torch.float32)
        config = self.model.config
        head_dim = config.hidden_size // config.num_attention_heads
        self.kv_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        self.load, self.budgets = load, [budget * self.kv_bytes * load.chunk_tokens for budget in budgets]

    def prompt_of(self, documents: Iterable[int]) -> Any:
        import hfblend

        def ids(name: int, count: int) -> list[int]:
            return np.random.default_rng(name).integers(100, 40_000, count).tolist()

        half = self.load.other_tokens // 2
        chunks = [ids(1 + document, self.load.chunk_tokens) for document in documents]
        return hfblend.Prompt.from_ids(ids(0, half), chunks, ids(10**9, half))

    def seconds(self, inputs: Any) -> float:
        began = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return time.perf_counter() - began

    def patched(self, store: Any) -> Any:
        import hfblend

        return hfblend.patch(
            self.model, hfblend.BlendConfig(recompute_ratios=(0.15,), min_reused_tokens=0), store=store
        )

    def unit_costs(self, number: int) -> dict[str, float]:
        """Seconds of one prompt of new documents: in full, with its chunks in no tier, on disk, and in memory."""
        from hfblend.store import DiskStore, MemoryStore, TieredStore

        first = 10**6 + number * self.load.chunks
        prompt = self.prompt_of(range(first, first + self.load.chunks))
        with tempfile.TemporaryDirectory() as folder:
            tiers = TieredStore([MemoryStore("1GB"), DiskStore(folder)])
            with self.patched(tiers):
                found = {"none": self.seconds(prompt.inputs())}
                tiers.flush()
                found["memory"] = self.seconds(prompt.inputs())
                tiers.stores[0].clear()
                found["disk"] = self.seconds(prompt.inputs())
        return found | {"full": self.seconds({"input_ids": prompt.input_ids})}

    def serve(self, stream: Sequence[Request]) -> tuple[list[Record], list[dict[str, float]]]:
        """Serves a stream in real time; returns what came of each request, and unit costs that were measured every few
        requests, while the clock stood."""
        from hfblend.store import DiskStore, MemoryStore, TieredStore

        records, costs, passed = [], [], 0.0
        with tempfile.TemporaryDirectory() as folder:
            tiers = TieredStore([MemoryStore(int(self.budgets[0])), DiskStore(folder, int(self.budgets[1]))])
            for start in range(0, len(stream), _EVERY):
                costs.append(self.unit_costs(start))
                with self.patched(tiers) as blender:
                    began = time.perf_counter() - passed
                    for request in stream[start : start + _EVERY]:
                        inputs = self.prompt_of(request.documents).inputs()
                        time.sleep(max(0.0, request.at - (time.perf_counter() - began)))
                        seconds, now = self.seconds(inputs), time.perf_counter() - began
                        hits = Counter({"": blender.trace.misses, "found": blender.trace.hits})
                        records.append(Record(request.at, now - request.at, seconds, 0, hits))
                    passed = time.perf_counter() - began
        return records, costs


def replica_of(costs: Sequence[dict[str, float]], real: Real) -> tuple[Measured, list[Tier]]:
    """What a replica takes, and its tiers, by seconds of whole prompts: their means, since means are predicted."""
    full, none, disk, memory = (mean(one[name] for one in costs) for name in ("full", "none", "disk", "memory"))
    load, (in_memory, on_disk) = real.load, real.budgets
    curves = (Curve((load.tokens,), (seconds,)) for seconds in (full, memory, 1e-9))  # all of loading is waited for
    bytes_per_s = load.chunks * load.chunk_tokens * real.kv_bytes / max(1e-6, disk - memory)
    tiers = [Tier("memory", in_memory), Tier("disk", on_disk, bytes_per_s, freed=1 / 16)]
    return Measured(*curves, (none - memory) / load.chunks, real.kv_bytes), tiers


def check(load: Workload = CHECKED, budgets: Sequence[float] = (5.5, 12.5)) -> dict[str, tuple[float, float]]:
    """Name -> predicted and real, of a stream through memory and a disk with room for so many chunks."""
    real = Real(load, budgets)
    real.unit_costs(10**6)  # the first calls
    measured, tiers = replica_of([real.unit_costs(10**6 + 1) for _ in range(3)], real)
    load = replace(load, rate=_BUSY / run(requests_of(load), load, measured, tiers, filling=0.0).gpu_s)
    records, costs = real.serve(stream := requests_of(load))
    measured, tiers = replica_of(costs, real)
    outcomes = run(stream, load, measured, tiers, filling=0.0), Outcome(records, [Replica([])])
    figures: dict[str, Callable[[Outcome], float]] = {
        "hit rate": lambda one: one.hit_rate,
        "service in s, mean": lambda one: one.gpu_s,
        "TTFT in s, mean": lambda one: mean(record.ttft_s for record in one.records),
        "TTFT in s, 95th percentile": lambda one: one.ttft_ms(95) / 1e3,
    }
    return {name: (figure(outcomes[0]), figure(outcomes[1])) for name, figure in figures.items()}


# --- the command --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help=", ".join(SCENARIOS))
    parser.add_argument("--check", action="store_true", help="compare a prediction with a real run on this CPU")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="price of a GPU for an hour")
    for name in (one.name for one in fields(Workload)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(getattr(Workload(), name)))
    asked = parser.parse_args()
    changed = {one.name: getattr(asked, one.name) for one in fields(Workload) if getattr(asked, one.name) is not None}
    if asked.check:
        for name, (predicted, real) in check(replace(CHECKED, **changed)).items():
            print(f"{name}: predicted {predicted:.3f}, real {real:.3f}, {predicted / real - 1:+.1%}")
        return
    for name in asked.scenarios or SCENARIOS:
        scenario = replace(SCENARIOS[name], load=replace(SCENARIOS[name].load, **changed))
        scenario = replace(scenario, replicas=asked.replicas or scenario.replicas)
        print(f"\n{name}: {scenario.says}\n\n{table(rows_of(scenario, h200(), asked.gpu_hour))}")


if __name__ == "__main__":
    main()
