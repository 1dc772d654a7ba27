"""The file of measurements: a header line that says what they are of, then one JSON line per measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Key = tuple[int, str, float]
_OPTIONAL = {"answer", "f1", "f1_ids", "rouge_l", "string_match"}  # may be `None`


@dataclass(frozen=True)
class Record:
    """One question by one method at one ratio.

    Attributes:
        question: index in the data.
        tokens: of the prompt.
        kl: KL(full prefill || this) in nats, mean over the forced tokens.
        top1_agreement: share of forced tokens with full prefill's most likely token.
        ttft_ms: from the call to the first token on the host, chunk KV already stored.
        recomputed_pairs_share: computed (token, layer) pairs over those of a full prefill.
        answer, f1, f1_ids, rouge_l, string_match: `None` where not asked for, or not of this task.
    """

    question: int
    method: str
    ratio: float
    tokens: int
    kl: float
    top1_agreement: float
    ttft_ms: float
    recomputed_pairs_share: float
    answer: str | None = None
    f1: float | None = None
    f1_ids: float | None = None
    rouge_l: float | None = None
    string_match: float | None = None

    @property
    def key(self) -> Key:
        """Question, method and ratio; each is measured once."""
        return self.question, self.method, self.ratio


class RecordFile:
    """Records on disk, appended as they are measured; opening the file again finds them.

    Args:
        path: made with its header if it does not exist; `None` keeps the records in memory.
        header: plain values that say what is measured.

    Raises:
        ValueError: the file was begun with another header, or holds something else.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path, self.found = path, dict[Key, Record]()
        if path is None:
            return
        header = json.loads(json.dumps(dict(header)))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, cut_off = text.split("\n")  # the run was killed while it wrote the last one
        if lines:
            _require_same_header(path, lines[0], header)
            self.found = {record.key: record for record in (_record(path, line) for line in lines[1:])}
        elif not _line({"header": header}).startswith(cut_off):
            raise ValueError(f"{path} is not a file of records: its first line has no header.")
        if cut_off:  # of a file that is hfblend's
            path.write_text(text.removesuffix(cut_off), encoding="utf-8")
        if not lines:
            self._append({"header": header})

    def add(self, record: Record) -> None:
        """Keeps a record, on disk at once."""
        self.found[record.key] = record
        self._append(asdict(record))

    def _append(self, values: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(values))


def _require_same_header(path: Path, line: str, header: Mapping[str, Any]) -> None:
    try:
        there = dict(json.loads(line)["header"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of records: its first line has no header.") from error
    differing = sorted(name for name in {*there, *header} if there.get(name) != header.get(name))
    if differing:
        differences = "; ".join(f"{name}: {there.get(name)!r} there, {header.get(name)!r} now" for name in differing)
        raise ValueError(f"{path} holds records of another run ({differences}). Give --records another file.")


def _record(path: Path, line: str) -> Record:
    try:
        record = Record(**json.loads(line))
        for name, value in asdict(record).items():
            kind = str if name in ("method", "answer") else (int, float)
            is_large = isinstance(value, int) and abs(value) > 2**63
            if is_large or (not isinstance(value, kind) and not (value is None and name in _OPTIONAL)):
                raise TypeError(f"{name} is {value!r}")
        return record
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds a line that is no record: {line[:80]!r}.") from error


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
