"""The layout of the page and its event handlers. Importing this file needs gradio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import gradio as gr

from torchmae.app import markup
from torchmae.app.session import Picture, Session
from torchmae.app.strings import LANGUAGES, preferred, text_for
from torchmae.data.formats import picture_suffixes
from torchmae.errors import TorchmaeError
from torchmae.nn.masking import STRATEGIES

Updates: TypeAlias = dict[Any, Any]
"""New values by component; an output that is not named stays as it is."""

MAX_SEED = 99
_PAINTER = """<div class="painter" hidden><img alt=""><canvas tabindex="0" role="application"></canvas></div>"""
_CHOOSE = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});"""
# The handlers are no public API; progress is not shown, or shown by the page's own style.
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


@dataclass(frozen=True)
class View:
    """The state of one visitor."""

    picture: Picture | None = None  # None: not chosen yet
    masked: tuple[int, ...] = ()  # indices of patches in the first run's grid
    tab: str = "fill"  # the open tab: "fill", "see" or "near"


class Page:
    """The page of a session, in a language of `LANGUAGES`; None: the browser's language."""

    def __init__(self, session: Session, language: str | None = None) -> None:
        self._session = session
        self._language = language

    def build(self) -> gr.Blocks:
        """The page as gradio's blocks."""
        # What visitors upload is deleted after an hour.
        with gr.Blocks(title="torchmae", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
            self._view = gr.State(View(), time_to_live=3600)
            self._lay_out()
            self._connect(blocks)
        return blocks

    def _text(self, lang: str) -> dict[str, str]:
        return text_for(lang, self._session.kind)

    def _lay_out(self) -> None:
        """Places the components. Their texts are set when the page is loaded, in the visitor's language."""
        with gr.Row(equal_height=False):
            self._head = _html("head", scale=1, min_width=200)
            self._lang = gr.Radio(
                [(name, key) for key, name in LANGUAGES.items()],
                value=self._language or "en",
                show_label=False,
                container=False,
                scale=0,
                min_width=190,
                elem_id="language",
            )
        self._status = _html("status")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260):
                self._file = gr.File(
                    file_types=[*picture_suffixes(len(self._session.first.model.patch_size)), ".npy"],
                    height=180,
                    elem_id="upload",
                )
                self._examples = _html("examples", js_on_load=_CHOOSE)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab(id="fill", elem_id="tab-fill") as self._fill_tab:
                    self._lay_out_filling()
                with gr.Tab(id="see", elem_id="tab-see") as self._see_tab:
                    self._seen = _html("seen", min_height=80)
                with gr.Tab(id="near", elem_id="tab-near") as self._near_tab:
                    self._near = _html("near", min_height=80)

    def _lay_out_filling(self) -> None:
        mask = self._session.first.description.mask
        strategy, ratio = mask["strategy"], round(100 * mask["ratio"])
        with gr.Row():
            self._strategy = gr.Radio(list(STRATEGIES), value=strategy, min_width=300, elem_id="strategy")
            self._ratio = gr.Slider(5, 95, value=ratio, step=1, min_width=150, elem_id="ratio")
            self._seed = gr.Slider(0, MAX_SEED, value=0, step=1, min_width=150, elem_id="seed")
        painter = Path(__file__).with_name("painter.js").read_text(encoding="utf-8")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=230):
                self._painter = _html("painter", html_template=_PAINTER, js_on_load=painter)
                self._hint = _html("hint")
                self._clear = gr.Button(size="sm", elem_id="clear")
            with gr.Column(scale=2, min_width=300):
                self._result = _html("result")

    def _connect(self, blocks: gr.Blocks) -> None:
        known = [self._view, self._lang]
        mask = [*known, self._strategy, self._ratio, self._seed]
        words = list(self._words("en"))
        shown = [self._view, self._painter, self._result, self._status]
        tabs = [self._seen, self._near]
        blocks.load(self._start, mask, [self._lang, *words, *shown, *tabs], **_QUIET)
        self._lang.input(self._speak, mask, [*words, *shown, *tabs], **_QUIET)
        chosen = (
            self._file.upload(self._open, [*mask, self._file], [self._file, *shown], **_BUSY),
            self._examples.select(self._choose, mask, shown, **_BUSY),
        )
        for event in chosen:
            event.then(self._look, known, tabs, **_BUSY)
        self._strategy.input(self._draw, mask, shown, **_QUIET)
        for slider in (self._ratio, self._seed):
            slider.input(self._draw, mask, shown, trigger_mode="always_last", **_QUIET)
        # "multiple" handles every stroke in order; after quick strokes, "always_last" would show an earlier mask.
        self._painter.input(self._paint, known, shown, trigger_mode="multiple", **_QUIET)
        self._clear.click(lambda view, lang: self._show(replace(view, masked=()), lang), known, shown, **_QUIET)
        for name, tab in (("fill", self._fill_tab), ("see", self._see_tab), ("near", self._near_tab)):
            opened = tab.select(lambda view, name=name: replace(view, tab=name), self._view, self._view, **_QUIET)
            opened.then(self._look, known, tabs, **_BUSY)

    def _words(self, lang: str) -> Updates:
        """The texts of all components."""
        text, sizes = self._text(lang), self._session.first.description.arguments
        about = text["about"].format(
            size=" x ".join(map(str, sizes["input_size"])),
            channels=sizes["in_chans"],
            patch=" x ".join(map(str, sizes["patch_size"])),
        )
        strategies = [(text.get(name, name), name) for name in STRATEGIES]
        return {
            self._head: markup.heading(self._session.names, about),
            self._file: gr.update(label=text["upload"]),
            self._examples: markup.examples(self._session.examples, text["examples"]),
            self._hint: f'<p class="help"><b>{text["paint"]}</b><br>{text["paint_help"]}</p>',
            self._fill_tab: gr.update(label=text["tab_fill"]),
            self._see_tab: gr.update(label=text["tab_see"]),
            self._near_tab: gr.update(label=text["tab_near"]),
            self._strategy: gr.update(label=text["strategy"], choices=strategies),
            self._ratio: gr.update(label=text["ratio"]),
            self._seed: gr.update(label=text["seed"]),
            self._clear: gr.update(value=text["clear"]),
        }

    def _start(self, view: View, _: str, strategy: str, ratio: float, seed: float, request: gr.Request) -> Updates:
        """The whole page for a new visitor, with the first example."""
        lang = self._language or preferred(request.headers.get("accept-language", ""))
        return {self._lang: gr.update(value=lang), **self._speak(view, lang, strategy, ratio, seed)}

    def _speak(self, view: View, lang: str, strategy: str, ratio: float, seed: float) -> Updates:
        """The whole page in a language; with the first example if the server has no picture for this visitor."""
        if view.picture is None and self._session.examples:
            shown = self._draw(view, lang, strategy, ratio, seed, lambda: self._session.example(0))
        else:
            shown = self._show(view, lang)
        return {**self._words(lang), **shown, **self._look(shown[self._view], lang)}

    def _open(self, view: View, lang: str, strategy: str, ratio: float, seed: float, file: str | None) -> Updates:
        """Opens an uploaded picture and empties the upload field."""
        if file is None:
            return {self._file: None, **self._failed(view, self._text(lang)["start"])}
        path = Path(file)
        shown = self._draw(view, lang, strategy, ratio, seed, lambda: self._session.open(path), "cannot_read")
        return {self._file: None, **shown}

    def _choose(self, view: View, lang: str, strategy: str, ratio: float, seed: float, event: gr.EventData) -> Updates:
        """One of the examples."""
        return self._draw(view, lang, strategy, ratio, seed, lambda: self._session.example(int(event.index)))

    def _draw(
        self,
        view: View,
        lang: str,
        strategy: str,
        ratio: float,
        seed: float,
        opened: Callable[[], Picture] | None = None,
        failure: str = "failed",
    ) -> Updates:
        """Draws a mask, for the picture that `opened` gives, else for the present one."""
        try:
            picture = view.picture if opened is None else opened()
            masked = self._session.draw_mask(strategy, ratio / 100, int(seed))
            return self._show(replace(view, picture=picture, masked=masked), lang)
        except (TorchmaeError, ValueError) as error:
            return self._failed(view, self._text(lang)[failure].format(reason=error))

    def _paint(self, view: View, lang: str, event: gr.EventData) -> Updates:
        """Takes the mask from the painter, which already shows it."""
        shown = self._show(replace(view, masked=tuple(int(patch) for patch in event.hidden)), lang)
        return {**shown, self._painter: gr.skip()}

    def _show(self, view: View, lang: str) -> Updates:
        """The picture, its mask and the reconstructions."""
        text, session = self._text(lang), self._session
        shown: Updates = {self._view: view, self._painter: None, self._result: "", self._status: ""}
        if view.picture is None:
            return {**shown, self._status: markup.message(text["start"])}
        shown[self._painter] = markup.painter(session.original(view.picture), session.grid, view.masked, text["paint"])
        rows, columns = session.grid
        if len(view.masked) in (0, rows * columns):
            line = text["all_masked" if view.masked else "none_masked"]
            return {**shown, self._status: markup.message(line)}
        try:
            return {**shown, self._result: markup.filled(session.fill(view.picture, view.masked), self._text(lang))}
        except TorchmaeError as error:
            return {**shown, self._status: markup.message(text["failed"].format(reason=error), "error")}

    def _failed(self, view: View, line: str) -> Updates:
        """An error message; the rest of the page stays as it was."""
        return {self._view: view, self._status: markup.message(line, "error")}

    def _look(self, view: View, lang: str) -> Updates:
        """The tabs "see" and "near"; only the open one is computed."""
        session, tab, picture = self._session, view.tab, view.picture
        shown = ""
        try:
            if tab == "see" and picture is not None:
                shown = markup.seen(session.look(picture), self._text(lang))
            elif tab == "near" and session.bank is None:
                shown = markup.no_neighbours(session.names[0], self._text(lang))
            elif tab == "near" and picture is not None:
                shown = markup.neighbours(session.neighbours(picture), session.original(picture), self._text(lang))
        except TorchmaeError as error:
            shown = markup.message(self._text(lang)["failed"].format(reason=error), "error")
        return {self._seen: shown if tab == "see" else "", self._near: shown if tab == "near" else ""}


def _html(name: str, **options: Any) -> gr.HTML:
    return gr.HTML(elem_id=name, apply_default_css=False, **options)
