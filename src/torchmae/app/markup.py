"""What the session computed as HTML: figures with pictures inside, tables, one-line messages."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from torchmae.app.session import Errors, Filled, Neighbour, Seen
from torchmae.app.strings import TEXT
from torchmae.report.panels import heat, map_panel, sample_panels

FloatArray = npt.NDArray[np.float32]

MIN_SIDE = 192
_THUMBNAIL = 64
# How much of an error's colour lies over the image, so that one still sees what it is the error of.
_OPACITY = 0.75


def message(text: str, kind: str = "note") -> str:
    """One line; `kind` is "note" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="message {kind}" role="{role}">{escape(text)}</p>' if text else ""


def heading(names: Sequence[str], about: str) -> str:
    """The head of the page: which runs, and a line about them."""
    runs = " | ".join(names)
    return f'<h1>torchmae <span>{escape(runs)}</span></h1><p class="help">{escape(about)}</p>'


def painter(original: FloatArray, grid: tuple[int, int], hidden: Sequence[int], label: str) -> dict[str, Any]:
    """What painter.js draws: the picture as a data URI, rows and columns of patches, those hidden, and its name."""
    rows, columns = grid
    picture = data_uri(_panel(original))
    return {"image": picture, "rows": rows, "columns": columns, "hidden": list(hidden), "label": label}


def examples(images: Sequence[FloatArray], title: str) -> str:
    """Images to choose from, as buttons; nothing without images."""
    buttons = (
        f'<button type="button" data-index="{index}" aria-label="{index + 1}">'
        f'<img alt="" src="{data_uri(sample_panels([image], _THUMBNAIL)[0])}"></button>'
        for index, image in enumerate(images)
    )
    return f'<h3>{escape(title)}</h3><div class="examples">{"".join(buttons)}</div>' if images else ""


def filled(results: Sequence[Filled], language: str) -> str:
    """Reconstructions with their errors, and the figures beside those of interpolation."""
    text = TEXT[language]
    peak = max(float(np.nanmax(result.error)) for result in results)
    rows = []
    for number, result in enumerate(results):
        panels = [
            (text["reconstructed"], _panel(result.reconstructed)),
            (text["error"].format(peak=f"{peak:.2f}"), _error_panel(result, peak)),
        ]
        if number == 0:
            panels.insert(1, (text["original"], _panel(result.original)))
        rows.append(_figures(result.name if len(results) > 1 else "", panels))
    normalised = any(result.norm_pix for result in results)
    note = text["note_normalised" if normalised else "note_pixels"]
    return f'{"".join(rows)}{_table(results, text)}<p class="help">{escape(note)} {escape(text["units"])}</p>'


def seen(results: Sequence[Seen], language: str) -> str:
    """Pictures beside the colours of their features and the class token's attention."""
    text = TEXT[language]
    rows = []
    for result in results:
        original = _panel(result.original)
        panels = [(text["original"], original), (text["colours"], map_panel(result.colours, original.size))]
        if result.attention is not None:
            heads = list(result.attention)
            names = [text["head"].format(number=i + 1) for i in range(len(heads))]
            if len(heads) > 1:
                heads, names = [result.attention.mean(0), *heads], [text["mean_head"], *names]
            scaled = [values / max(float(values.max()), 1e-12) for values in heads]
            panels += [
                (name, map_panel(heat(values), original.size)) for name, values in zip(names, scaled, strict=True)
            ]
        rows.append(_figures(result.name if len(results) > 1 else "", panels))
        if result.attention is None:
            rows.append(message(text["no_class_token"].format(name=result.name)))
    return f'{"".join(rows)}<p class="help">{escape(text["see_help"])}</p>'


def neighbours(found: Sequence[Neighbour], original: FloatArray, language: str) -> str:
    """The picture, and the images whose features are nearest."""
    text = TEXT[language]
    figures = [_figure(_img(_panel(original), text["original"]), text["original"])]
    for neighbour in found:
        caption = f"{neighbour.cosine:.2f} {neighbour.label}".rstrip()
        shown = _missing(text, neighbour) if neighbour.image is None else _img(_panel(neighbour.image), caption)
        figures.append(_figure(shown, caption, neighbour.name))
    return f'<div class="panels">{"".join(figures)}</div><p class="help">{escape(text["near_help"])}</p>'


def no_neighbours(run: str, language: str) -> str:
    """How to embed a data set for the page."""
    run = shlex.quote(run)
    commands = f"torchmae embed {run} --data PATH --out features.npz\ntorchmae app {run} --features features.npz"
    return f"{message(TEXT[language]['near_none'])}<pre>{escape(commands)}</pre>"


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG inside an address: nothing is left on the disk, and no other request is made for it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _panel(image: FloatArray) -> Image.Image:
    return sample_panels([image], MIN_SIDE)[0]


def _error_panel(result: Filled, peak: float) -> Image.Image:
    """The error of each hidden patch as a colour over the greyed image; `peak` is the brightest."""
    original = _panel(result.original)
    scaled = np.nan_to_num(result.error / max(peak, 1e-12)).astype(np.float32)
    colours = map_panel(heat(scaled), original.size)
    grey = original.convert("L").convert("RGB")
    share = (~np.isnan(result.error) * _OPACITY * 255).astype(np.uint8)
    return Image.composite(colours, grey, Image.fromarray(share).resize(original.size, Image.Resampling.NEAREST))


def _figures(heading: str, panels: Iterable[tuple[str, Image.Image]]) -> str:
    body = "".join(_figure(_img(panel, caption), caption) for caption, panel in panels)
    title = f"<h3>{escape(heading)}</h3>" if heading else ""
    return f'{title}<div class="panels">{body}</div>'


def _figure(content: str, caption: str, title: str = "") -> str:
    """HTML with a caption below; `title` is shown when one points at it."""
    named = f' title="{escape(title)}"' if title else ""
    return f"<figure{named}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _img(panel: Image.Image, alt: str) -> str:
    return f'<img src="{data_uri(panel)}" alt="{escape(alt)}">'


def _missing(text: dict[str, str], neighbour: Neighbour) -> str:
    return f'<div class="missing">{escape(text["not_shown"])}<br>{escape(neighbour.name[-40:])}</div>'


def _table(results: Sequence[Filled], text: dict[str, str]) -> str:
    rows = [_row(result.name, result.hidden, result.model) for result in results]
    rows.append(_row(text["interpolation"], results[0].hidden, results[0].interpolation))
    head = f"<tr><th></th><th>{escape(text['hidden'])}</th><th>MSE</th><th>PSNR</th></tr>"
    return f'<table class="errors"><caption>{escape(text["errors"])}</caption>{head}{"".join(rows)}</table>'


def _row(name: str, hidden: float, errors: Errors) -> str:
    return (
        f"<tr><th>{escape(name)}</th><td>{100 * hidden:.0f} %</td><td>{errors.mse:.4f}</td>"
        f"<td>{errors.psnr:.1f} dB</td></tr>"
    )
