"""Parts of every HTML page: templates, and pictures inside the page."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from torchmae.words import in_words

# Photographs as PNG would make a page of tens of megabytes; drawn pictures stay far below this limit.
_MAX_PNG_BYTES = 300_000


class Embedded(NamedTuple):
    """A picture inside the page: a data URI, width and height in pixels."""

    uri: str
    width: int
    height: int


class Titled(NamedTuple):
    """A picture with title and description; `of` names its run on a page of several runs."""

    embedded: Embedded
    title: str
    description: str
    of: str = ""


def render_page(template: str, kind: str = "image", **values: Any) -> str:
    """HTML from a template of this package, in the words of a kind of samples; all `values` are escaped."""
    return in_words(_templates().get_template(template).render(**values), kind)


@cache  # a template takes tenths of a second to compile
def _templates() -> Environment:
    loader = PackageLoader("torchmae.report", "")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, loader=loader)


def open_picture(path: Path) -> Image.Image | None:
    """A picture with its text fields; None if the file cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError):  # Pillow's errors for a truncated file and for one that is no picture
        return None


def embed(picture: Image.Image) -> Embedded:
    """A picture for a page: PNG, or WebP if the PNG is large."""
    kind, buffer = "png", io.BytesIO()
    picture.save(buffer, format="PNG")
    if buffer.tell() > _MAX_PNG_BYTES:
        kind, buffer = "webp", io.BytesIO()
        picture.save(buffer, format="WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(f"data:image/{kind};base64,{data}", picture.width, picture.height)


def load_titled(path: Path, of: str = "") -> Titled | None:
    """A picture with its title, by default the file's name; None if it cannot be read."""
    picture = open_picture(path)
    if picture is None:
        return None
    title = str(picture.info.get("Title") or path.stem.replace("-", " ").replace("_", " "))
    return Titled(embed(picture), title, str(picture.info.get("Description") or ""), of)
