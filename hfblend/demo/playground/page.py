"""The playground's page (NiceGUI, whose scripts, fonts and styles are all served from this machine)."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from ...display.view import RULE_WORDS
from ...util import require
from . import MAX_CHARACTERS, MAX_CHUNKS, Outcome, Playground, Setup, answers_html, chunk_line, store_line
from .presets import Preset, presets

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
FIELD = f"autogrow outlined dense maxlength={MAX_CHARACTERS + 1}"  # one too many is refused, in words

CSS = """
:root { --ink: #1b2430; --dim: #5c6876; --line: #d6dce3; --paper: #f6f7f9; --card: #fff; --hot: #e07b00;
        --mark: #0b4f8a; --calm: #2a7d6f; --bad: #a3222b; }
body.body--dark { --ink: #e6eaef; --dim: #9aa6b4; --line: #38424e; --paper: #12171d; --card: #1b222b; --hot: #f09a2b;
        --mark: #7cc0ff; --calm: #66c7b4; --bad: #ff8d92; }
body, body.body--dark { background: var(--paper); color: var(--ink); }
.nicegui-content { padding: 0; align-items: stretch; }
.page { max-width: 1280px; width: 100%; margin: 0 auto; padding: 20px; display: grid; gap: 20px;
        grid-template-columns: minmax(300px, 400px) minmax(0, 1fr); }
.page > header { grid-column: 1 / -1; }
.page h1 { font-size: 1.5rem; line-height: 1.3; font-weight: 600; margin: 0; }
.page h2 { font-size: 1.05rem; line-height: 1.4; font-weight: 600; margin: 0; }
.page h3 { font-size: .85rem; line-height: 1.4; font-weight: 600; margin: 0; }
.dim, .page .note { color: var(--dim); font-size: .85rem; line-height: 1.45; }
.stack { display: flex; flex-direction: column; gap: 14px; min-width: 0; flex-wrap: nowrap; }
.panel, .answer { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.panel { display: flex; flex-direction: column; gap: 10px; }
.row { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; }
.grow { flex: 1 1 0; min-width: 0; }
.chunks { display: flex; flex-direction: column; gap: 8px; align-items: stretch; flex-wrap: nowrap;
          counter-reset: chunk -1; }
.chunk { border: 1px solid var(--line); border-radius: 8px; padding: 4px 8px 8px; counter-increment: chunk;
         background: var(--card); }
.chunk .name::before { content: "Chunk " counter(chunk); font-weight: 600; font-size: .85rem; }
.chunk textarea { max-height: 7.5rem; overflow-y: auto !important; font-size: .85rem; line-height: 1.4 !important; }
.handle { cursor: grab; color: var(--dim); }
.error { color: var(--bad); border: 1px solid var(--bad); border-radius: 8px; padding: 8px 12px; }
.answers { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); }
.answer { display: flex; flex-direction: column; }
.answer h3 { color: var(--dim); text-transform: uppercase; letter-spacing: .05em; font-size: .75rem; }
.answer .text { font-size: 1.05rem; line-height: 1.4; margin: 6px 0 12px; flex: 1; overflow-wrap: anywhere; }
.answer p { margin: 0; }
.answer .bar { height: 6px; border-radius: 3px; background: var(--line); margin-bottom: 6px; overflow: hidden; }
.answer .bar i { display: block; height: 100%; background: var(--dim); }
.answer.blended .bar i { background: var(--hot); }
.answer.blended { border-color: var(--hot); }
.page .hfb { max-width: none; border-radius: 10px; border-color: var(--line); background: var(--card); }
body.body--dark .page .hfb { --soft: #26303b; }
.stale { opacity: .45; }
@media (max-width: 800px) { .page { grid-template-columns: minmax(0, 1fr); padding: 12px; } }
"""


def serve(load: Callable[[], tuple[Any, Any]], model_name: str, port: int) -> None:
    """Shows the playground at `http://127.0.0.1:<port>` until it is stopped.

    Args:
        load: makes the model and its tokenizer, once it is known that the page can be served.

    Raises:
        ImportError: NiceGUI is not installed.
        OSError: the port is taken.
        UnsupportedModel: the model's cached KV cannot be moved.
    """
    nicegui = require("nicegui", "nicegui", "playground", "The playground needs")
    trusted_host = require("starlette.middleware.trustedhost", "nicegui", "playground", "The playground needs")
    _require_free(port)
    playground = Playground(*load())
    # A name of some other site that was pointed at this machine gets no page.
    nicegui.app.add_middleware(trusted_host.TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    try:
        nicegui.ui.run(
            lambda: Page(nicegui, playground, model_name).build(),
            host=HOST, port=port, title="hfblend playground", dark=None, show=False, reload=False, tailwind=False,
        )  # fmt: skip
    finally:
        playground.close()


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise OSError(
                f"Port {port} of {HOST} cannot be used ({error.strerror}). Choose another with --port."
            ) from error


class Page:
    """One browser tab.

    Args:
        nicegui: the package, which is imported only where the playground is started.
        playground: shared by all tabs.
    """

    def __init__(self, nicegui: Any, playground: Playground, model_name: str) -> None:
        self.ui, self.io_bound = nicegui.ui, nicegui.run.io_bound
        self.playground, self.model_name = playground, model_name
        self.presets = {preset.name: preset for preset in presets()}
        self.texts: dict[Any, Any] = {}  # card -> its text field
        self.lines: dict[Any, Any] = {}  # card -> what the last run said of it
        self.is_running = self.is_wanted = False
        self.num_runs = 0

    # --- the page, from top to bottom -----------------------------------------------------------------------------

    def build(self) -> None:
        """Makes the elements, fills in the first preset and runs it."""
        ui = self.ui
        ui.add_css(CSS)
        with ui.element("main").classes("page"):
            with ui.element("header"):
                ui.html("hfblend playground", tag="h1")
                ui.label(
                    f"{self.model_name}: reorder the chunks, change ratio and rule, and see which tokens are "
                    "recomputed and what that does to the answer."
                ).classes("dim")
            with ui.element("div").classes("stack"):
                self._build_settings()
                self._build_chunks()
            with ui.element("div").classes("stack"):
                self._build_results()
        self._fill(next(iter(self.presets.values())))
        ui.timer(0.1, self.run, once=True)

    def _build_settings(self) -> None:
        ui = self.ui
        with ui.element("section").classes("panel"):
            self.question = ui.textarea("Question", on_change=self._edited).props(FIELD)
            with ui.element("div").classes("row"):
                ui.label("Ratio recomputed")
                self.ratio_label = ui.label().classes("grow")
            self.ratio = ui.slider(min=0, max=1, step=0.01, value=0.15).props('aria-label="Ratio"')
            self.ratio_label.bind_text_from(self.ratio, "value", lambda value: f"{value:.2f}")
            self.ratio.on("change", self._ratio_released)  # released, not every step of the way
            self.rule = ui.select(list(RULE_WORDS), value="suffix_attention", label="Rule").props("outlined dense")
            ui.label().classes("dim").bind_text_from(self.rule, "value", lambda rule: f"Recompute {RULE_WORDS[rule]}.")
            self.rule.on_value_change(self._changed)
            with ui.element("div").classes("row"):
                ui.button("Run", on_click=self.run).props("unelevated no-caps")
                self.runs_at_once = ui.switch("Run after every change", value=True)

    def _build_chunks(self) -> None:
        ui = self.ui
        with ui.element("section").classes("panel"):
            with ui.element("div").classes("row"):
                ui.html("Chunks", tag="h2").classes("grow")
                ui.button("Add", on_click=self._add_empty).props('flat dense no-caps icon=add aria-label="Add a chunk"')
            self.preset = ui.select(list(self.presets), label="Start from", value=next(iter(self.presets)))
            self.preset.props("outlined dense").on_value_change(self._preset_chosen)
            self.cards = ui.column().classes("chunks")
            self.cards.make_sortable(handle=".handle", on_end=self._changed)

    def _build_results(self) -> None:
        ui = self.ui
        self.status = ui.label().classes("dim").props("role=status")
        self.error = ui.label().classes("error").props("role=alert")
        self.error.visible = False
        with ui.element("div").classes("stack") as self.results:
            self.answers = ui.html()
            with ui.element("div"):
                self.notes = ui.label().classes("dim").style("white-space: pre-line")
            self.tokens = ui.html()
        self.results.visible = False

    def _add(self, text: str) -> Any:
        """A card with this text; its field."""
        ui = self.ui
        with self.cards, ui.element("article").classes("chunk") as card:
            with ui.element("div").classes("row").style("gap: 0"):
                ui.icon("drag_indicator", size="sm").classes("handle").props('title="Drag to reorder"')
                ui.element("span").classes("name grow")
                self._icon("arrow_upward", "Move up", lambda: self._move(card, -1))
                self._icon("arrow_downward", "Move down", lambda: self._move(card, 1))
                self._icon("close", "Remove", lambda: self._remove(card))
            field = ui.textarea(value=text, on_change=self._edited).props(FIELD)
            self.texts[card] = field.props('aria-label="Text of the chunk"')
            self.lines[card] = ui.label().classes("dim")
        return field

    def _icon(self, icon: str, name: str, on_click: Any) -> None:
        self.ui.button(on_click=on_click).props(f'flat dense round size=sm icon={icon} aria-label="{name}"')

    # --- changes --------------------------------------------------------------------------------------------------

    @property
    def order(self) -> list[Any]:
        """The cards from top to bottom; buttons and dragging move them."""
        return self.cards.default_slot.children

    @property
    def setup(self) -> Setup:
        """What the page says now."""
        chunks = tuple(self.texts[card].value or "" for card in self.order)
        return Setup(chunks, self.question.value or "", float(self.ratio.value), self.rule.value)

    def _fill(self, preset: Preset) -> None:
        self.cards.clear()
        self.texts.clear()
        self.lines.clear()
        for text in preset.chunks:
            self._add(text)
        self.question.value = preset.question

    async def _preset_chosen(self) -> None:
        self._fill(self.presets[self.preset.value])
        await self._changed()

    def _add_empty(self) -> None:
        if len(self.order) < MAX_CHUNKS:
            self._add("").run_method("focus")
            self._edited()

    async def _move(self, card: Any, by: int) -> None:
        to = self.order.index(card) + by
        if 0 <= to < len(self.order):
            card.move(target_index=to)
            await self._changed()

    async def _remove(self, card: Any) -> None:
        del self.texts[card], self.lines[card]
        card.delete()
        await self._changed()

    async def _ratio_released(self, event: Any) -> None:
        self.ratio.value = event.args
        await self._changed()

    async def _changed(self) -> None:
        if self.runs_at_once.value:
            await self.run()
        else:
            self._edited()

    def _edited(self) -> None:
        """What is shown belongs to other text now."""
        self.results.classes("stale")
        if not self.is_running:
            self.status.text = "Changed since the last run. Press Run."

    # --- running --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs what the page says; changes made meanwhile run once more at the end."""
        self.is_wanted = True
        if self.is_running:
            return
        self.is_running = True
        try:
            while self.is_wanted:
                self.is_wanted = False
                await self._run_once()
        finally:
            self.is_running = False

    async def _run_once(self) -> None:
        self.results.classes("stale")
        waits = self.playground.is_busy
        self.status.text = "Waiting for the run of another page …" if waits else "Running …"
        try:
            setup = self.setup
            outcome = await self.io_bound(self.playground.run, setup)
        except Exception as error:  # whatever it was, the page goes on and says it in words
            if not isinstance(error, ValueError):
                logger.warning("A run of the playground failed.", exc_info=error)
            self._show_error(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
            return
        if outcome is not None:  # None: the server is being stopped
            self._show(outcome, is_current=setup == self._setup_or_none())

    def _setup_or_none(self) -> Setup | None:
        try:
            return self.setup
        except ValueError:
            return None

    def _show_error(self, message: str) -> None:
        self.error.text, self.error.visible, self.status.text = message, True, "Not run."

    def _show(self, outcome: Outcome, is_current: bool) -> None:
        self.error.visible, self.results.visible = False, True
        self.num_runs += 1
        self.answers.content, self.tokens.content = answers_html(outcome), outcome.tokens_html
        lines = [store_line(outcome), "Each time was taken once, on the wall clock; a busy machine shifts it."]
        if outcome.repeated:
            lines.append("Full prefill and full reuse were not run again: their prompt has not changed.")
        self.notes.text = "\n".join(lines)
        trace = outcome.trace
        self.status.text = (
            "Changed since the last run. Press Run."
            if not is_current and not self.is_wanted
            else (
                f"Run {self.num_runs}: {len(outcome.prompt)} tokens in {len(outcome.found)} chunks; "
                f"{trace.selected_tokens} of "
                f"{0 if trace.candidate_idx is None else len(trace.candidate_idx)} reused tokens recomputed."
            )
        )
        if is_current:
            self.results.classes(remove="stale")
            for card, chunk, found in zip(self.order, trace.chunks, outcome.found):
                self.lines[card].text = chunk_line(chunk, found)
