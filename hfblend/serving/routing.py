"""Which replica a prompt goes to: the one that holds most of its chunks, unless it is busier than another.

chunks_in   hashes of a body's chunks, without a tokenizer
Balance     what each replica holds and how much it has to do, as one router knows it
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Set
from typing import Any

from xxhash import xxh3_64_intdigest

# Chunks remembered of each replica. Of an 8B model, so many of 512 tokens are 250 GB of KV.
_REMEMBERED = 4096
_FEW = 8  # requests that are never too many: decoded together, they take hardly longer than one


def chunks_in(body: bytes, namespace: str = "", separator: str | None = None) -> frozenset[int]:
    """Returns a hash of each chunk of a request; none for a body that cannot be read.

    Chunks are the documents, the parts with `cache_control`, or the pieces of a text between separators. Their KV also
    depends on the text before the first one, hence on the system messages, which enter the hashes.
    """
    try:
        asked = json.loads(body)
        messages = [one for one in asked.get("messages") or () if isinstance(one, dict)]
        parts = [part for one in messages if isinstance(one.get("content"), list) for part in one["content"]]
        chunks = [*(asked.get("documents") or ()), *(part["text"] for part in parts if part.get("cache_control"))]
        if not chunks and separator:
            texts = [asked.get("prompt"), *(one.get("content") for one in messages)]
            first, *chunks = "".join(text for text in texts if isinstance(text, str)).split(separator)[:-1] or [""]
            messages = [{"role": "system", "content": first}]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return frozenset()
    before = json.dumps([namespace, *_system_texts(messages)])
    return frozenset(xxh3_64_intdigest((before + json.dumps(chunk, sort_keys=True)).encode()) for chunk in chunks)


def _system_texts(messages: list[dict[str, Any]]) -> Iterator[Any]:
    for message in messages:
        if message.get("role") in ("system", "developer"):
            content = message.get("content")
            parts = content if isinstance(content, list) else [content]
            yield from (part for part in parts if not (isinstance(part, dict) and part.get("cache_control")))


class Balance:
    """The replicas as one router knows them: their chunks, and the requests that it has sent and that have not ended.

    A replica is busy if one more request would give it more than twice as many as another one has, and more than
    `_FEW`. Replicas may have any names.
    """

    def __init__(self) -> None:
        self.running: dict[str, Hashable] = {}  # request -> replica
        self._held: dict[Hashable, dict[int, None]] = {}  # the latest chunks last

    def ranked(self, request: str, chunks: Set[int], told: Mapping[Hashable, Set[int]]) -> list[Any]:
        """Ranks the replicas, the best one first, which counts as chosen until `sent` says otherwise.

        Args:
            told: all replicas that there are -> chunks that they say they hold.
        """
        self._held = {replica: self._held.get(replica, {}) for replica in told}
        load = Counter(replica for other, replica in self.running.items() if other != request)
        most = max(_FEW, 2 * min(load[replica] for replica in told))

        def rank(replica: Hashable) -> tuple[int, ...]:
            held = self._held[replica].keys() | told[replica]
            return load[replica] >= most, -len(chunks & held), load[replica], len(held)

        best = sorted(told, key=rank)
        self.sent(request, best[0], chunks)
        return best

    def sent(self, request: str, replica: Hashable, chunks: Set[int]) -> None:
        """A request is at a replica, which will hold its chunks."""
        self.running[request] = replica
        remember(self._held.setdefault(replica, {}), chunks)

    def ended(self, request: str, replica: Hashable) -> None:
        """A request has ended at a replica; it may run again at another one."""
        if self.running.get(request) == replica:
            del self.running[request]


def remember(held: dict[int, None], chunks: Set[int]) -> None:
    """Adds chunks as the latest ones; forgets the oldest beyond a bound."""
    for chunk in chunks:
        held.pop(chunk, None)
        held[chunk] = None
    while len(held) > _REMEMBERED:
        del held[next(iter(held))]
