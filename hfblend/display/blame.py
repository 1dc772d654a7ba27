"""What changed an answer, as plain lists for every view, and for a terminal.

Shapes: P tokens of full prefill's answer, T tokens of the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ..measure.results import Blame, Stretch
from ..util import visible
from . import palette
from .view import COLUMNS, DEVIATIONS, Part, binned, clipped, parts_of

TITLE = "Why did the answer change?"
_CHUNK_ROWS = 40
_HEAD = 60  # characters of a chunk's text
_SHADES = " ▁▂▃▄▅▆█"  # by level


class Row(NamedTuple):
    """What was recomputed, and the outcome."""

    name: str
    tokens: str
    kl: float
    fall: str  # −82%
    restores: bool
    text: str = ""


@dataclass(frozen=True)
class BlameView:
    """The content of every view."""

    blame: Blame

    def answers(self) -> list[tuple[str, list[tuple[str, bool]]]]:
        """Each answer's name, and its words with whether that is the first different one."""
        place, answers = self.blame.first_different_word(), self.blame.words()
        return [
            (
                name,
                [(word, i == place) for i, word in enumerate(words)] + ([] if place != len(words) else [(" ∅", True)]),
            )
            for name, words in zip(("full prefill", "blended"), answers)
        ]

    def bars(self) -> list[tuple[str, float, float]]:
        """Of each token of full prefill's answer: its text, its KL, and that as a share of the largest."""
        tokenizer, ids = self.blame.trace.tokenizer, self.blame.full_answer_ids
        texts = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
        largest = max(self.blame.token_kl) or 1.0
        return [(text, kl, kl / largest) for text, kl in zip(texts, self.blame.token_kl)]

    def ratios(self) -> list[Row]:
        """The settings' ratio, then those that were tried."""
        own = Row(f"{self.blame.ratio:g}", "as it is", self.blame.kl, "", self.blame.restores)
        tried = [Row(f"{one.ratio:g}", "", one.kl, self._fall(one.kl), one.restores) for one in self.blame.ratios]
        return [own, *tried]

    def chunks(self) -> list[Row]:
        """Each chunk that was tried, the closest to full prefill first, and the fewest tokens that suffice."""
        texts = self.blame.trace.token_texts()
        fewest = self.blame.fewest
        rows = self.blame.chunks[:_CHUNK_ROWS]
        if fewest is None or fewest in self.blame.chunks:
            return [self._row(one, texts) for one in rows]
        own = next(i for i, one in enumerate(self.blame.chunks) if one.part == fewest.part)
        shown = [self._row(one, texts) for one in rows]
        place = f"… {fewest.start}" + (f" to {fewest.stop - 1}" if fewest.stop - fewest.start > 1 else "")
        return [*shown[: own + 1], self._row(fewest, texts)._replace(name=place), *shown[own + 1 :]]

    def _row(self, one: Stretch, texts: list[str] | None) -> Row:
        text = "" if texts is None else clipped(" ".join("".join(texts[one.start : one.stop]).split()), _HEAD)
        return Row(one.part, f"+{one.more:,}", one.kl, self._fall(one.kl), one.restores, text)

    def _fall(self, kl: float) -> str:
        return f"{kl / self.blame.kl - 1:+.0%}".replace("-", "−") if self.blame.kl else ""

    # --- the heat map ---------------------------------------------------------------------------------------------

    def levels(self) -> list[int]:
        """(T) by how much of the KL falls with each token: 1 … 7, 0 where nothing was tried."""
        kl = self.blame.kl or 1.0
        return [0 if fall is None else 1 + bisect_right(DEVIATIONS, fall / kl) for fall in self.blame.falls()]

    def strip(self, most: int = 4 * COLUMNS) -> list[int]:
        """The levels, binned: the highest counts."""
        return binned(self.levels(), most, max)

    def key(self) -> list[tuple[str, str]]:
        """The class and the meaning of each level."""
        return [("s1", f"< {DEVIATIONS[0]:.0%}"), *((f"s{i}", f"≥ {one:.0%}") for i, one in enumerate(DEVIATIONS, 2))]

    def parts(self) -> list[Part]:
        """Prefix, chunks, gaps and suffix."""
        return parts_of(self.blame.trace)

    def tokens(self) -> list[tuple[Part, list[tuple[str, str, str]]]]:
        """The text of the parts whose tokens were looked at: text, classes and figures of each token."""
        texts, falls, levels = self.blame.trace.token_texts(), self.blame.falls(), self.levels()
        looked_at = {one.part for one in self.blame.stretches}
        recomputed = self.blame.recomputed()
        if texts is None:
            return []

        def token(i: int) -> tuple[str, str, str]:
            fall = falls[i]
            said = "" if fall is None else f", KL {-fall:+.2g} with the tokens around it recomputed"
            classes = " ".join([*([f"s{levels[i]}"] if levels[i] > 1 else []), *(["r"] if i in recomputed else [])])
            return visible(texts[i]), classes, f"#{i}{' recomputed' if i in recomputed else ''}{said}"

        return [(part, [token(i) for i in range(part.start, part.stop)])
                for part in self.parts() if part.name in looked_at]  # fmt: skip


# --- for a terminal ---------------------------------------------------------------------------------------------------


def renderables(blame: Blame, width: int) -> Iterator[RenderableType]:
    """The parts of the view, from top to bottom."""
    view = BlameView(blame)
    yield Rule(TITLE, style="dim")
    for sentence in blame.sentences():
        yield Text(visible(sentence))
    yield Padding(_answers(view), (1, 0, 0, 0))
    yield Padding(_bars(view), (1, 0, 0, 0))
    for name, rows in (("recomputed too", view.chunks()), ("ratio", view.ratios() if blame.ratios else [])):
        if rows:
            yield Padding(_table(name, rows), (1, 0, 0, 0))
    if blame.chunks:
        across = max(20, min(width - 14, 120))
        strip = "".join(_SHADES[level] for level in view.strip(across))
        yield Text.assemble(("\nprompt       ", "dim"), (strip, palette.ORANGE))
        yield Text("             the higher, the more the KL falls when it is recomputed", style="dim")


def _answers(view: BlameView) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for name, _ in view.answers():
        table.add_column(name, ratio=1)
    cells = []
    for _, words in view.answers():
        marked = ((visible(word), "bold reverse" if differs else "") for word, differs in words)
        cells.append(Text.assemble(*marked))
    table.add_row(*cells)
    return table


def _bars(view: BlameView) -> Text:
    shown = Text("KL by token  ", style="dim")
    for text, kl, share in view.bars():
        shown.append(visible(text).strip() or "·", style="not dim")
        shown.append(f"{_SHADES[1 + round(6 * share)]}{kl:.2g} ", style=palette.ORANGE)
    return shown


def _table(name: str, rows: list[Row]) -> Table:
    is_chunks = any(row.text for row in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=is_chunks)
    cells = [(row.name, "✓ yes" if row.restores else "no", f"{row.kl:.2g}", row.fall, row.tokens) for row in rows]
    for i, column in enumerate((name, "answer back", "KL, nats", "change", "tokens")):
        width = max(len(text) for text in (column, *(row[i] for row in cells)))
        table.add_column(column, justify="right" if i else "left", no_wrap=True, width=width)
    if is_chunks:
        table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
    for row, (what, back, *figures) in zip(rows, cells):
        marked = Text(back, "bold " + palette.GREEN if row.restores else "dim")
        table.add_row(what, marked, *figures, *((Text(visible(row.text)),) if is_chunks else ()))
    return table
