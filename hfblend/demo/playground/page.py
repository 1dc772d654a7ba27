"""The playground's page (NiceGUI; this machine serves its scripts, fonts and styles)."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

from ...display.html import rendered
from ...display.view import RULE_WORDS
from ...util import require
from . import MAX_CHARACTERS, MAX_CHUNKS, Outcome, Playground, Setup, presets

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
FIELD = f"autogrow outlined dense maxlength={MAX_CHARACTERS + 1}"  # one character too many gets an error message
CANCELLED = "Cancelled. Press Run."
CHANGED = "Changed since the last run. Press Run."


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
    # Another site's name that was pointed at this machine gets no page.
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


class Cancelled(Exception):
    """The user ended a run."""


class Page:
    """One browser tab.

    Args:
        nicegui: the package, which is imported only when the playground is started.
        playground: shared by all tabs.
    """

    def __init__(self, nicegui: Any, playground: Playground, model_name: str) -> None:
        self.ui, self.io_bound = nicegui.ui, nicegui.run.io_bound
        self.playground, self.model_name, self.presets = playground, model_name, presets()
        self.is_running = self.is_wanted = self.is_cancelled = False
        self.num_runs = 0
        self.said = self.doing = ""  # by the search for what changed the answer, by a run

    # --- the page, from top to bottom ---------------------------------------------------------------------------------

    def build(self) -> None:
        """Makes the elements, fills in the first preset and runs it."""
        ui = self.ui
        ui.add_css(rendered("demo/playground/templates/page.css.jinja"))
        about = (
            f"{self.model_name}: reorder the chunks, change ratio and rule, and see which tokens are recomputed and "
            "what that does to the answer."
        )
        with ui.element("main").classes("page"):
            with ui.element("header"):
                ui.html("hfblend playground", tag="h1")
                ui.label(about).classes("dim")
            with ui.element("div").classes("stack"):  # page.css: narrow pages have the answers above these
                with ui.element("section").classes("panel question"):
                    self.question = ui.textarea("Question", on_change=self._edited).props(FIELD)
                self._build_settings()
                self._build_chunks()
            with ui.element("div").classes("stack"):
                self._build_results()
        self._fill(next(iter(self.presets.values())))
        ui.timer(0.1, self.run, once=True)

    def _build_settings(self) -> None:
        ui = self.ui
        with ui.element("section").classes("panel settings"):
            with ui.element("div").classes("row"):
                ui.label("Ratio recomputed")
                ratio_label = ui.label().classes("grow")
            self.ratio = ui.slider(min=0, max=1, step=0.01, value=0.15).props('aria-label="Ratio"')
            ratio_label.bind_text_from(self.ratio, "value", lambda value: f"{value:.2f}")
            self.ratio.on("change", self._ratio_released)  # released, not every step of the way
            self.rule = ui.select(list(RULE_WORDS), value="suffix_attention", label="Rule").props("outlined dense")
            ui.label().classes("dim").bind_text_from(self.rule, "value", lambda rule: f"Recompute {RULE_WORDS[rule]}.")
            self.rule.on_value_change(self._changed)
            self.is_corrected = ui.switch("Correct the rows that stay reused", value=Setup.correction is not None)
            self.is_corrected.on_value_change(self._changed)
            with ui.element("div").classes("row"):
                ui.button("Run", on_click=self.run).props("unelevated no-caps")
                self.runs_at_once = ui.switch("Run after every change", value=True)

    def _build_chunks(self) -> None:
        ui = self.ui
        with ui.element("section").classes("panel settings"):
            with ui.element("div").classes("row"):
                ui.html("Chunks", tag="h2").classes("grow")
                ui.button("Add", on_click=self._add_empty).props('flat dense no-caps icon=add aria-label="Add a chunk"')
            preset = ui.select(list(self.presets), label="Start from", value=next(iter(self.presets)))
            preset.props("outlined dense").on_value_change(self._preset_chosen)
            self.cards = ui.column().classes("chunks")
            self.cards.make_sortable(handle=".handle", on_end=self._changed)

    def _build_results(self) -> None:
        ui = self.ui
        with ui.element("div").classes("row status"):
            self.status = ui.label().classes("dim grow").props("role=status")
            cancel = ui.button("Cancel", on_click=self.cancel).props("outline dense no-caps")
            cancel.bind_visibility_from(self, "is_running")
        doing = ui.label().classes("dim")
        doing.bind_text_from(self, "doing")
        doing.bind_visibility_from(self, "doing", bool)
        self.error = ui.label().classes("error").props("role=alert")
        with ui.element("div").classes("stack results") as self.results:
            self.answers = ui.html()
            with ui.element("div"):
                self.notes = ui.label().classes("dim").style("white-space: pre-line")
            with ui.element("div").classes("row"):
                why = ui.button("Why did the answer change?", on_click=self.ask_why).props("outline no-caps")
                why.bind_enabled_from(self, "is_running", lambda is_running: not is_running)
                self.searching = ui.label().classes("dim grow").props("aria-live=polite")
                self.searching.bind_text_from(self, "said")
            self.blame = ui.html()
            self.tokens = ui.html().classes("tokens")
        self.error.visible = self.results.visible = False

    def _add(self, text: str) -> Any:
        """Adds a card with this text; returns its field."""
        ui = self.ui
        with self.cards, ui.element("article").classes("chunk") as card:
            with ui.element("div").classes("row").style("gap: 0"):
                ui.icon("drag_indicator", size="sm").classes("handle").props('title="Drag to reorder"')
                ui.element("span").classes("name grow")
                for icon, name, act in (
                    ("arrow_upward", "Move up", lambda: self._move(card, -1)),
                    ("arrow_downward", "Move down", lambda: self._move(card, 1)),
                    ("close", "Remove", lambda: self._remove(card)),
                ):
                    ui.button(on_click=act).props(f'flat dense round size=sm icon={icon} aria-label="{name}"')
            field = ui.textarea(value=text, on_change=self._edited).props(f'{FIELD} aria-label="Text of the chunk"')
            card.field, card.line = field, ui.label().classes("dim")  # its text, the last run's line about its chunk
        return field

    # --- changes ------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> list[Any]:
        """The cards from top to bottom; buttons and dragging move them."""
        return self.cards.default_slot.children

    @property
    def content(self) -> tuple[Any, ...]:
        """The fields of a `Setup`, unchecked."""
        chunks = tuple(card.field.value or "" for card in self.order)
        correction = "offset" if self.is_corrected.value else None
        return chunks, self.question.value or "", float(self.ratio.value), self.rule.value, correction

    def _fill(self, preset: Setup) -> None:
        self.cards.clear()
        for text in preset.chunks:
            self._add(text)
        self.question.value = preset.question

    async def _preset_chosen(self, event: Any) -> None:
        self._fill(self.presets[event.value])
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
        """Marks the results as those of other text."""
        self.results.classes("stale")
        if not self.is_running:
            self.status.text = CHANGED

    # --- running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the page's content; changes made meanwhile cause one more run at the end."""
        self.is_wanted = True
        if self.is_running:
            return
        self.is_running = True
        try:
            while self.is_wanted:
                self.is_wanted = self.is_cancelled = False
                await self._run_once()
        finally:
            self.is_running = False
            self.doing = ""

    def cancel(self) -> None:
        """Ends the run, or the search, at the next chunk or token; what it has stored stays."""
        self.is_cancelled, self.is_wanted = True, False
        self.status.text = "Cancelling …"

    async def _run_once(self) -> None:
        self.results.classes("stale")
        self.status.text = "Running …"
        try:
            content = self.content
            outcome = await self.io_bound(self.playground.run, Setup(*content), self._do)
        except Cancelled:
            self.status.text = CANCELLED
        except Exception as error:  # the page goes on after any error, and shows it
            self._show_error(error)
            self.status.text = "Not run."
        else:
            if outcome is not None:  # None: the server is being stopped
                self._show(outcome, is_current=content == self.content)

    async def ask_why(self) -> None:
        """Searches for what changed the answer; changes made meanwhile run at the end."""
        if self.is_running:
            return
        self.is_running, self.is_cancelled, self.said = True, False, "Searching …"
        try:
            found = await self.io_bound(self.playground.blame, Setup(*self.content), self._say)
        except Cancelled:
            self.status.text, self.said = CANCELLED, ""
        except Exception as error:  # as above
            self._show_error(error)
            self.said = "Not searched."
        else:
            if found is not None:  # None: the server is being stopped
                self.blame.content, self.said, self.error.visible = found, "", False
        finally:
            self.is_running = False
        if self.is_wanted:
            await self.run()

    def _say(self, text: str) -> None:
        self._go_on()
        self.said = text

    def _do(self, text: str) -> None:
        self._go_on()
        self.doing = text

    def _go_on(self) -> None:
        if self.is_cancelled:
            raise Cancelled

    def _show_error(self, error: Exception) -> None:
        is_expected = isinstance(error, ValueError)
        if not is_expected:
            logger.warning("A run of the playground failed.", exc_info=error)
        self.error.text = str(error) if is_expected else f"{type(error).__name__}: {error}"
        self.error.visible = True

    def _show(self, outcome: Outcome, is_current: bool) -> None:
        self.error.visible, self.results.visible = False, True
        self.num_runs += 1
        self.answers.content, self.tokens.content = outcome.answers_html, outcome.tokens_html
        self.blame.content, self.said = "", ""
        lines = [outcome.store_line, "Each time was taken once, on the wall clock; a busy machine shifts it."]
        if outcome.repeated:
            lines.append("Full prefill and full reuse were not run again: their prompt has not changed.")
        self.notes.text = "\n".join(lines)
        is_last = is_current or self.is_wanted
        self.status.text = f"Run {self.num_runs}: {outcome.run_line}" if is_last else CHANGED
        if is_current:
            self.results.classes(remove="stale")
            for card, line in zip(self.order, outcome.chunk_lines):
                card.line.text = line
