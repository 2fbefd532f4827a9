"""The page: what stands where, and what happens when. Needs gradio: whoever imports this looks first if it is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from torchmae.app import markup
from torchmae.app.session import Picture, Session
from torchmae.app.strings import LANGUAGES, TEXT, preferred
from torchmae.data.formats import picture_suffixes
from torchmae.errors import TorchmaeError
from torchmae.nn.masking import STRATEGIES

MAX_SEED = 99
_PAINTER = """<div class="painter" hidden><img alt=""><canvas tabindex="0" role="application"></canvas></div>"""
_CHOOSE = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index) });
});"""
# Nobody calls the page's functions but the page, and it shows by itself that it is at work.
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_BUSY: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


@dataclass(frozen=True)
class View:
    """What one visitor looks at.

    Attributes:
        picture: None before one is chosen.
        hidden: patches of the first run's grid.
        tab: that is open: "fill", "see" or "near".
    """

    picture: Picture | None = None
    hidden: tuple[int, ...] = ()
    tab: str = "fill"


def stylesheet() -> str:
    """The page's CSS."""
    return _asset("page.css")


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: none is fetched."""
    return gr.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )


class Page:
    """The page of a session.

    Args:
        session: what it shows.
        run: the first run as one would type it, for commands that the page suggests.
        language: of `LANGUAGES`; None: the browser's.
    """

    def __init__(self, session: Session, run: str, language: str | None = None) -> None:
        self._session = session
        self._run = run
        self._language = language

    def build(self) -> gr.Blocks:
        """The page for gradio to serve."""
        # What visitors upload is deleted after an hour.
        with gr.Blocks(title="torchmae", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
            self._view = gr.State(View(), time_to_live=3600)
            self._lay_out()
            self._connect(blocks)
        return blocks

    def _lay_out(self) -> None:
        """Places the components; their words come with the language when the page is loaded."""
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
                self._file = gr.File(file_types=[*picture_suffixes(), ".npy"], height=180, elem_id="upload")
                self._examples = _html("examples", js_on_load=_CHOOSE)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab(id="fill", elem_id="tab-fill") as self._fill_tab:
                    self._lay_out_filling()
                with gr.Tab(id="see", elem_id="tab-see") as self._see_tab:
                    self._seen = _html("seen", min_height=80)
                with gr.Tab(id="near", elem_id="tab-near") as self._near_tab:
                    self._near = _html("near", min_height=80)

    def _lay_out_filling(self) -> None:
        strategy, ratio = self._session.strategies
        with gr.Row():
            self._strategy = gr.Radio(list(STRATEGIES), value=strategy, min_width=300, elem_id="strategy")
            self._ratio = gr.Slider(5, 95, value=round(100 * ratio), step=1, min_width=150, elem_id="ratio")
            self._seed = gr.Slider(0, MAX_SEED, value=0, step=1, min_width=150, elem_id="seed")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=230):
                self._painter = _html("painter", html_template=_PAINTER, js_on_load=_asset("painter.js"))
                self._hint = _html("hint")
                self._clear = gr.Button(size="sm", elem_id="clear")
            with gr.Column(scale=2, min_width=300):
                self._result = _html("result")

    def _connect(self, blocks: gr.Blocks) -> None:
        mask = [self._strategy, self._ratio, self._seed]
        shown = [self._view, self._painter, self._result, self._status]
        tabs = [self._seen, self._near]
        known = [self._view, self._lang]
        blocks.load(self._start, mask, [self._lang, *self._words(), *shown, *tabs], **_QUIET)
        self._lang.input(self._speak, known, [*self._words(), *shown[1:], *tabs], **_QUIET)
        chosen = (
            self._file.upload(self._open, [self._file, *known, *mask], [self._file, *shown], **_BUSY),
            self._examples.select(self._choose, [*known, *mask], shown, **_BUSY),
        )
        for event in chosen:
            event.then(self._look, known, tabs, **_BUSY)
        self._strategy.input(self._draw, [*known, *mask], shown, **_QUIET)
        for slider in (self._ratio, self._seed):
            slider.input(self._draw, [*known, *mask], shown, trigger_mode="always_last", **_QUIET)
        # Every stroke, in order: of quick ones, "always_last" would answer with an earlier one's patches.
        self._painter.input(self._paint, known, shown, trigger_mode="multiple", **_QUIET)
        self._clear.click(lambda view, lang: self._show(replace(view, hidden=()), lang), known, shown, **_QUIET)
        for name, tab in (("fill", self._fill_tab), ("see", self._see_tab), ("near", self._near_tab)):
            opened = tab.select(lambda view, name=name: replace(view, tab=name), self._view, self._view, **_QUIET)
            opened.then(self._look, known, tabs, **_BUSY)

    def _words(self) -> list[Any]:
        """The components that have words of their own, in the order of `_labels`."""
        tabs = [self._fill_tab, self._see_tab, self._near_tab]
        mask = [self._strategy, self._ratio, self._seed, self._clear]
        return [self._head, self._file, self._examples, self._hint, *tabs, *mask]

    def _labels(self, lang: str) -> list[Any]:
        text = TEXT[lang]
        return [
            self._heading(lang),
            gr.update(label=text["upload"]),
            markup.examples(self._session.examples, text["examples"]),
            f'<p class="help"><b>{text["paint"]}</b><br>{text["paint_help"]}</p>',
            *(gr.update(label=text[name]) for name in ("tab_fill", "tab_see", "tab_near")),
            gr.update(label=text["strategy"], choices=[(text.get(name, name), name) for name in STRATEGIES]),
            gr.update(label=text["ratio"]),
            gr.update(label=text["seed"]),
            gr.update(value=text["clear"]),
        ]

    def _heading(self, lang: str) -> str:
        sizes = self._session.models[0].description.arguments
        about = TEXT[lang]["about"].format(
            size=" x ".join(map(str, self._session.size)),
            channels=self._session.channels,
            patch=" x ".join(map(str, sizes["patch_size"])),
        )
        return markup.heading(self._session.names, about)

    def _start(self, strategy: str, ratio: float, seed: float, request: gr.Request) -> list[Any]:
        lang = self._language or preferred(request.headers.get("accept-language", ""))
        view = View()
        if self._session.examples:
            view = replace(view, picture=self._session.example(0), hidden=self._hole(strategy, ratio, seed))
        return [
            gr.update(value=lang),
            *self._labels(lang),
            *self._show(view, lang),
            "",
            "",
        ]

    def _speak(self, view: View, lang: str) -> list[Any]:
        """Everything again in another language."""
        return [*self._labels(lang), *self._show(view, lang)[1:], *self._look(view, lang)]

    def _open(self, file: str | None, view: View, lang: str, strategy: str, ratio: float, seed: float) -> list[Any]:
        """What was uploaded; the place for it is empty again afterwards, ready for the next."""
        if file is None:
            return [None, *self._failed(view, TEXT[lang]["start"])]
        try:
            picture = self._session.open(Path(file))
            hidden = self._hole(strategy, ratio, seed)
            return [None, *self._show(replace(view, picture=picture, hidden=hidden), lang)]
        except TorchmaeError as error:
            return [None, *self._failed(view, TEXT[lang]["cannot_read"].format(reason=error))]

    def _choose(
        self, view: View, lang: str, strategy: str, ratio: float, seed: float, event: gr.EventData
    ) -> list[Any]:
        try:
            picture = self._session.example(int(event.index))
            return self._show(replace(view, picture=picture, hidden=self._hole(strategy, ratio, seed)), lang)
        except (TorchmaeError, ValueError) as error:
            return self._failed(view, TEXT[lang]["failed"].format(reason=error))

    def _draw(self, view: View, lang: str, strategy: str, ratio: float, seed: float) -> list[Any]:
        """A new hole from the sliders."""
        try:
            return self._show(replace(view, hidden=self._hole(strategy, ratio, seed)), lang)
        except TorchmaeError as error:
            return self._failed(view, TEXT[lang]["failed"].format(reason=error))

    def _paint(self, view: View, lang: str, event: gr.EventData) -> list[Any]:
        """A hole from the brush; the painter shows it already."""
        hidden = tuple(int(patch) for patch in event.hidden)
        shown = self._show(replace(view, hidden=hidden), lang)
        shown[1] = gr.skip()
        return shown

    def _hole(self, strategy: str, ratio: float, seed: float) -> tuple[int, ...]:
        return self._session.draw_hole(strategy, ratio / 100, int(seed))

    def _show(self, view: View, lang: str) -> list[Any]:
        """Values for view, painter, result and status."""
        text, session = TEXT[lang], self._session
        if view.picture is None:
            return [view, None, "", markup.message(text["start"])]
        painter = markup.painter(session.original(view.picture), session.grid, view.hidden, text["paint"])
        rows, columns = session.grid
        if len(view.hidden) in (0, rows * columns):
            line = text["all_hidden" if view.hidden else "nothing_hidden"]
            return [view, painter, "", markup.message(line)]
        try:
            return [view, painter, markup.filled(session.fill(view.picture, view.hidden), lang), ""]
        except TorchmaeError as error:
            return [view, painter, "", markup.message(text["failed"].format(reason=error), "error")]

    def _failed(self, view: View, line: str) -> list[Any]:
        """Says what went wrong and leaves the rest as it was."""
        return [view, gr.skip(), gr.skip(), markup.message(line, "error")]

    def _look(self, view: View, lang: str) -> list[Any]:
        """Values for the two tabs that show whole pictures; only the open one is worked out."""
        session = self._session
        if view.tab == "near" and not session.has_bank:
            return ["", markup.no_neighbours(self._run, lang)]
        if view.picture is None or view.tab == "fill":
            return ["", ""]
        try:
            if view.tab == "see":
                return [markup.seen(session.look(view.picture), lang), ""]
            found = session.neighbours(view.picture)
            return ["", markup.neighbours(found, session.original(view.picture), lang)]
        except TorchmaeError as error:
            line = markup.message(TEXT[lang]["failed"].format(reason=error), "error")
            return [line, ""] if view.tab == "see" else ["", line]


def _html(name: str, **options: Any) -> gr.HTML:
    """A place for HTML of our own, found by its name."""
    return gr.HTML(elem_id=name, apply_default_css=False, **options)


def _asset(name: str) -> str:
    return (resources.files("torchmae.app") / name).read_text(encoding="utf-8")
