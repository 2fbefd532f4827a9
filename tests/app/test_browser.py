"""The page in a real browser, headless Chromium."""

from __future__ import annotations

import re
import shutil
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from app_runs import write_images, write_run
from PIL import Image

from torchmae.app.session import Session
from torchmae.app.strings import TEXT
from torchmae.config import DataConfig
from torchmae.data.opening import open_data
from torchmae.evaluation.embedding import Features
from torchmae.training.pretrained import load

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio", "ignore::DeprecationWarning:starlette"),
]

PATIENCE = 20_000  # milliseconds, of a machine with other things to do


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def runs(images: Path) -> tuple[Path, Path]:
    folder = images.parent / "runs"
    return write_run(folder / "a"), write_run(folder / "b", patch_size=(2, 2), seed=1)


def serve(session: Session, uploads: Path) -> Iterator[str]:
    """The page's address, while it is served."""
    pytest.importorskip("gradio")
    from torchmae.app.server import build_server, listen

    ready, addresses = threading.Event(), []

    def tell(address: str) -> None:
        addresses.append(address)
        ready.set()

    uploads.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        listening = listen("127.0.0.1", 0)
        server = build_server(session, listening, uploads, tell)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert ready.wait(60)
        yield addresses[0]
        server.should_exit = True
        thread.join(30)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(images: Path, runs: tuple[Path, Path]) -> Iterator[str]:
    """One run with examples and neighbours."""
    model = load(runs[0])
    paths = sorted(images.rglob("*.png"))
    features = model.encode(model.preprocess(*paths)).numpy()
    bank = Features(features, np.arange(12) // 6, np.array([str(path) for path in paths]), {"pool": "mean"})
    config = DataConfig(source=str(images), num_workers=0, val_size=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    data = open_data(config, input_size=(16, 24), channels=3, device=torch.device("cpu"))
    session = Session([("runs/a", model)], torch.device("cpu"), data, bank)
    yield from serve(session, images.parent / "uploads")


@pytest.fixture(scope="module")
def comparing(images: Path, runs: tuple[Path, Path]) -> Iterator[str]:
    """Two runs, without examples and without features."""
    named = zip(("runs/my run", "b"), map(load, runs), strict=True)
    session = Session(list(named), torch.device("cpu"))
    yield from serve(session, images.parent / "uploads2")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@dataclass
class Visit:
    """A page that keeps what the browser complained of and asked for."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def pictures(self, place: str) -> list[str]:
        return [str(item.get_attribute("src")) for item in self.page.locator(f"#{place} .panels img").all()]

    def wait_for_other(self, place: str, before: list[str]) -> list[str]:
        """Pictures that are not those that were there."""
        script = "([place, src]) => { const img = document.querySelector(`#${place} .panels img`);"
        self.page.wait_for_function(f"{script} return img && img.src !== src; }}", arg=[place, before[0]])
        return self.pictures(place)

    def hidden(self, count: int) -> None:
        sync_api.expect(self.page.locator("#painter canvas")).to_have_attribute("data-hidden", str(count))

    def upload(self, name: str, content: bytes) -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": content}
        self.page.locator("#upload input[type=file]").set_input_files([file])  # type: ignore[list-item]


@pytest.fixture
def visits(browser: Browser) -> Iterator[Any]:
    contexts = []

    def visit(address: str, locale: str = "en-GB", **options: Any) -> Visit:
        context = browser.new_context(locale=locale, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        sync_api.expect.set_options(timeout=PATIENCE)
        made = Visit(page)
        page.on("request", lambda request: made.requests.append(request.url))
        page.on("pageerror", lambda error: made.complaints.append(str(error)))
        page.on("console", lambda line: made.complaints.extend(complaints(line)))
        page.goto(address)
        return made

    yield visit
    for context in contexts:
        context.close()


def complaints(line: Any) -> list[str]:
    """What a line of the console complains of; gradio's frontend says one thing whenever a stream has ended."""
    return [line.text] if line.type in ("error", "warning") and line.text != "Method not implemented." else []


def png() -> bytes:
    pixels = np.random.default_rng(99).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def test_sliding_painting_uploading_and_looking(visits: Any, address: str) -> None:
    """A whole visit: nothing is asked of anyone else, and the browser has nothing to complain of."""
    visit = visits(address)
    page = visit.page
    first = page.locator("#result .panels img").first
    first.wait_for()
    visit.hidden(18)
    shown = visit.pictures("result")
    assert len(shown) == 3
    rows = page.locator("#result table tr")
    assert re.match(r"runs/a\s*75 %\s*0\.\d{4}\s*-?\d+\.\d dB", rows.nth(1).inner_text())
    assert rows.nth(2).inner_text().startswith("interpolation, no learning")

    page.locator("#ratio input[type=range]").fill("50")
    visit.hidden(12)
    shown = visit.wait_for_other("result", shown)
    page.locator("#seed input[type=range]").fill("7")
    shown = visit.wait_for_other("result", shown)
    page.get_by_label("as a block").check()
    shown = visit.wait_for_other("result", shown)

    page.locator("#clear").click()
    visit.hidden(0)
    sync_api.expect(page.locator("#status")).to_have_text(TEXT["en"]["none_masked"])
    assert visit.pictures("result") == []
    box = page.locator("#painter canvas").bounding_box()
    wide, high = box["width"] / 6, box["height"] / 4
    page.mouse.move(box["x"] + 0.5 * wide, box["y"] + 0.5 * high)
    page.mouse.down()
    page.mouse.move(box["x"] + 3.5 * wide, box["y"] + 0.5 * high)  # one quick stroke over four patches
    page.mouse.up()
    visit.hidden(4)
    page.locator("#result .panels img").first.wait_for()
    assert "17 %" in rows.nth(1).inner_text()
    page.locator("#painter canvas").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    visit.hidden(5)
    sync_api.expect(rows.nth(1)).to_contain_text("21 %")

    shown = visit.pictures("result")
    page.locator("#examples button").nth(1).click()
    shown = visit.wait_for_other("result", shown)
    visit.upload("mine.png", png())
    visit.wait_for_other("result", shown)
    assert page.locator("#status").inner_text() == ""

    page.get_by_role("tab", name="What it sees").click()
    page.locator("#seen .panels img").first.wait_for()
    assert len(visit.pictures("seen")) == 5  # image, colours, mean attention, two heads
    page.get_by_role("tab", name="Neighbours").click()
    page.locator("#near .panels img").first.wait_for()
    captions = page.locator("#near figcaption").all_inner_texts()
    assert len(captions) == 9 and re.fullmatch(r"-?\d\.\d\d (apple|pear)", captions[1])

    assert visit.complaints == [], visit.complaints
    asked = {urlsplit(url).netloc for url in visit.requests if not url.startswith(("data:", "blob:"))}
    assert asked == {urlsplit(address).netloc}


def test_painting_everything_says_so(visits: Any, address: str) -> None:
    visit = visits(address)
    canvas = visit.page.locator("#painter canvas")
    visit.page.locator("#result .panels img").first.wait_for()
    visit.page.locator("#clear").click()
    visit.hidden(0)
    canvas.focus()
    box = canvas.bounding_box()
    for row in range(4):
        y = box["y"] + (row + 0.5) * box["height"] / 4
        visit.page.mouse.move(box["x"] + 2, y)
        visit.page.mouse.down()
        visit.page.mouse.move(box["x"] + box["width"] - 2, y)
        visit.page.mouse.up()
        visit.hidden(6 * (row + 1))
    sync_api.expect(visit.page.locator("#status")).to_have_text(TEXT["en"]["all_masked"])


def test_files_that_cannot_be_used_are_one_line_and_the_page_goes_on(visits: Any, address: str, tmp_path: Path) -> None:
    from torchmae.app.server import MAX_UPLOAD

    visit = visits(address)
    status = visit.page.locator("#status .error")
    visit.page.locator("#result .panels img").first.wait_for()
    shown = visit.pictures("result")
    visit.upload("cut.png", png()[:60])
    sync_api.expect(status).to_contain_text("This file cannot be used: ")
    visit.upload("words.png", b"no picture at all")
    sync_api.expect(status).to_have_text("This file cannot be used: not an image, or cut short before its first pixel")
    assert visit.pictures("result") == shown
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    visit.page.locator("#upload input[type=file]").set_input_files(tmp_path / "large.png")
    sync_api.expect(visit.page.get_by_text("maximum").first).to_be_visible()
    visit.upload("mine.png", png())
    visit.wait_for_other("result", shown)
    sync_api.expect(status).to_have_count(0)


def test_two_runs_side_by_side_without_examples_or_features(visits: Any, comparing: str) -> None:
    visit = visits(comparing)
    sync_api.expect(visit.page.locator("#status")).to_have_text(TEXT["en"]["start"])
    visit.upload("mine.png", png())
    visit.page.locator("#result .panels img").first.wait_for()
    assert visit.page.locator("#result h3").all_inner_texts() == ["runs/my run", "b"]
    assert len(visit.pictures("result")) == 5
    assert visit.page.locator("#result table tr").count() == 4
    visit.page.get_by_role("tab", name="Neighbours").click()
    commands = visit.page.locator("#near pre")
    sync_api.expect(commands).to_contain_text("torchmae embed 'runs/my run' --data PATH --out features.npz")
    assert visit.complaints == [], visit.complaints


def test_the_browsers_language_and_the_switch(visits: Any, address: str) -> None:
    visit = visits(address, "zh-CN", viewport={"width": 390, "height": 844}, color_scheme="dark")
    tabs = visit.page.get_by_role("tab")
    sync_api.expect(tabs.first).to_have_text(TEXT["zh"]["tab_fill"])
    visit.page.locator("#result .panels img").first.wait_for()
    assert visit.page.locator("#result figcaption").first.inner_text() == TEXT["zh"]["reconstructed"]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    visit.page.locator("#language").get_by_label("English").check()
    sync_api.expect(tabs.first).to_have_text("Fill in")
    sync_api.expect(visit.page.locator("#result figcaption").first).to_have_text("Reconstructed")


def test_what_the_server_does_not_give(address: str) -> None:
    def status(path: str, host: str | None = None) -> int:
        request = urllib.request.Request(address + path, headers={} if host is None else {"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("") == 200
    assert status("", host="rebound.example") == 400
    assert status("gradio_api/file=/etc/passwd") == 403
    assert status(f"gradio_api/file={Path(__file__)}") == 403


def test_the_port_is_the_first_free_one() -> None:
    from torchmae.app.server import FIRST_PORT, listen
    from torchmae.errors import ConfigError

    with listen("127.0.0.1", None) as one, listen("127.0.0.1", None) as two:
        first, second = one.getsockname()[1], two.getsockname()[1]
        assert FIRST_PORT <= first < second
        with pytest.raises(ConfigError, match=f"port {first} of 127.0.0.1 is in use; choose another --port"):
            listen("127.0.0.1", first)
    with pytest.raises(ConfigError, match="host 'no.such.host.invalid' is not known"):
        listen("no.such.host.invalid", 1)
    with pytest.raises(ConfigError, match="cannot be used"):
        listen("192.0.2.1", 0)  # an address of documents, nobody's
