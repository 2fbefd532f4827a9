"""The HTML of the page: figures with embedded pictures, tables, messages."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from torchmae.app.session import Filled, FloatArray, Neighbour, Seen
from torchmae.report.feature_pictures import by_largest
from torchmae.report.page import embed
from torchmae.report.panels import heat, map_panel, sample_panels

_MIN_SIDE = 192
_THUMBNAIL = 64
_OPACITY = 0.75  # of the colours of errors, so that the image below stays visible
_MIN_MSE = 1e-10  # limits the PSNR to 100 dB


def message(text: str, kind: str = "note") -> str:
    """A message; `kind` is "note" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="message {kind}" role="{role}">{escape(text)}</p>' if text else ""


def heading(names: Sequence[str], about: str) -> str:
    """The head of the page: the names of the runs, and a line about them."""
    runs = " | ".join(names)
    return f'<h1>torchmae <span>{escape(runs)}</span></h1><p class="help">{escape(about)}</p>'


def painter(original: FloatArray, grid: tuple[int, int], masked: Sequence[int], label: str) -> dict[str, Any]:
    """The properties of painter.js: picture, rows and columns of patches, masked patches, accessible name."""
    rows, columns = grid
    picture = embed(_panel(original)).uri
    return {"image": picture, "rows": rows, "columns": columns, "hidden": list(masked), "label": label}


def examples(images: Sequence[FloatArray], title: str) -> str:
    """Images as buttons; "" without images."""
    buttons = (
        f'<button type="button" data-index="{index}" aria-label="{index + 1}">'
        f'<img alt="" src="{embed(_panel(image, _THUMBNAIL)).uri}"></button>'
        for index, image in enumerate(images)
    )
    return f'<h3>{escape(title)}</h3><div class="examples">{"".join(buttons)}</div>' if images else ""


def filled(results: Sequence[Filled], text: Mapping[str, str]) -> str:
    """Reconstructions with their errors, and a table of the errors beside those of interpolation."""
    peak = max(float(np.nanmax(result.error)) for result in results)
    rows = []
    for result in results:
        original = _panel(result.original)
        panels = [
            (text["reconstructed"], _panel(result.reconstructed)),
            (text["original"], original),
            (text["error"].format(peak=f"{peak:.2f}"), _error_panel(original, result.error, peak)),
        ]
        rows.append(_figures(results, result, panels if result is results[0] else panels[::2]))
    note = text["note_normalised" if any(result.norm_pix for result in results) else "note_pixels"]
    return f'{"".join(rows)}{_table(results, text)}<p class="help">{escape(note)} {escape(text["units"])}</p>'


def seen(results: Sequence[Seen], text: Mapping[str, str]) -> str:
    """Pictures, their features as colours, and the attention of the class token."""
    rows = []
    for result in results:
        original = _panel(result.original)
        panels = [(text["original"], original), (text["colours"], map_panel(result.colours, original.size))]
        heads = [] if result.attention is None else list(result.attention)
        maps = {text["head"].format(number=i + 1): values for i, values in enumerate(heads)}
        if len(heads) > 1:
            maps = {text["mean_head"]: np.mean(heads, axis=0), **maps}
        for name, values in maps.items():
            panels.append((name, map_panel(heat(by_largest(values)), original.size)))
        rows.append(_figures(results, result, panels))
        if not heads:
            rows.append(message(text["no_class_token"].format(name=result.name)))
    return f'{"".join(rows)}<p class="help">{escape(text["see_help"])}</p>'


def neighbours(found: Sequence[Neighbour], original: FloatArray, text: Mapping[str, str]) -> str:
    """The picture, and the images with the nearest features."""
    figures = [_figure(_panel(original), text["original"])]
    for neighbour in found:
        caption = f"{neighbour.cosine:.2f} {neighbour.label}".rstrip()
        missing = f'<div class="missing">{escape(text["not_shown"])}<br>{escape(neighbour.name[-40:])}</div>'
        shown = missing if neighbour.image is None else _panel(neighbour.image)
        figures.append(_figure(shown, caption, neighbour.name))
    return f'<div class="panels">{"".join(figures)}</div><p class="help">{escape(text["near_help"])}</p>'


def no_neighbours(run: str, text: Mapping[str, str]) -> str:
    """The commands that embed a data set for the page."""
    run = shlex.quote(run)
    commands = f"torchmae embed {run} --data PATH --out features.npz\ntorchmae app {run} --features features.npz"
    return f"{message(text['near_none'])}<pre>{escape(commands)}</pre>"


def _panel(image: FloatArray, min_side: int = _MIN_SIDE) -> Image.Image:
    return sample_panels([image], min_side)[0]


def _error_panel(original: Image.Image, error: FloatArray, peak: float) -> Image.Image:
    """The error of each masked patch as a colour over the grey image; `peak` is the error of the brightest colour."""
    scaled = np.nan_to_num(error / max(peak, 1e-12)).astype(np.float32)
    colours = map_panel(heat(scaled), original.size)
    grey = original.convert("L").convert("RGB")
    share = (~np.isnan(error) * _OPACITY * 255).astype(np.uint8)
    return Image.composite(colours, grey, Image.fromarray(share).resize(original.size, Image.Resampling.NEAREST))


def _figures(results: Sequence[Filled | Seen], result: Filled | Seen, panels: Iterable[tuple[str, Image.Image]]) -> str:
    """The pictures of one result in a row, with its name as a title if there are several results."""
    title = f"<h3>{escape(result.name)}</h3>" if len(results) > 1 else ""
    return f'{title}<div class="panels">{"".join(_figure(panel, caption) for caption, panel in panels)}</div>'


def _figure(content: Image.Image | str, caption: str, tooltip: str = "") -> str:
    """A picture or HTML, with a caption below."""
    if isinstance(content, Image.Image):
        content = f'<img src="{embed(content).uri}" alt="{escape(caption)}">'
    title = f' title="{escape(tooltip)}"' if tooltip else ""
    return f"<figure{title}>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(results: Sequence[Filled], text: Mapping[str, str]) -> str:
    first = results[0]
    figures = [(result.name, result.masked, result.mse) for result in results]
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{100 * masked:.0f} %</td><td>{mse:.4f}</td>"
        f"<td>{-10 * math.log10(max(mse, _MIN_MSE)):.1f} dB</td></tr>"
        for name, masked, mse in [*figures, (text["interpolation"], first.masked, first.mse_interpolation)]
    )
    head = f"<tr><th></th><th>{escape(text['masked'])}</th><th>MSE</th><th>PSNR</th></tr>"
    return f'<table class="errors"><caption>{escape(text["errors"])}</caption>{head}{rows}</table>'
