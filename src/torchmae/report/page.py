"""What every page of a report shares: templates, and pictures that stand inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from PIL import Image

# Photographs as PNG would make a page of tens of megabytes; drawn pixels stay far below this as they are.
_MAX_PNG_BYTES = 300_000


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page.

    Attributes:
        uri: the picture itself, as a data URI.
        width: its own width in pixels.
        height: its own height in pixels.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Titled:
    """A picture that says itself what it shows.

    Attributes:
        embedded: the picture.
        title: what it shows, in a few words.
        description: how to read it; may be empty.
        of: whose it is, where a page shows several; may be empty.
    """

    embedded: Embedded
    title: str
    description: str
    of: str = ""


def render_page(template: str, **values: Any) -> str:
    """A page as HTML; all `values` but markup are escaped.

    Args:
        template: a file of this package.
        **values: what the template asks for.
    """
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FunctionLoader(_template),
    )
    return environment.get_template(template).render(**values)


def open_picture(path: Path) -> Image.Image | None:
    """A picture with its text fields; None where the file cannot be read as one."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError):  # Pillow's errors for a file cut short and for one that is no picture
        return None


def embed(picture: Image.Image) -> Embedded:
    """A picture as it can stand in a page: PNG, or WebP where that would be large."""
    kind, buffer = "png", io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    if buffer.tell() > _MAX_PNG_BYTES:
        kind, buffer = "webp", io.BytesIO()
        picture.save(buffer, format="WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Embedded(f"data:image/{kind};base64,{data}", picture.width, picture.height)


def load_titled(path: Path, of: str = "") -> Titled | None:
    """A picture of `feature_pictures` or `scatter`, or any other PNG; None where it cannot be read.

    Args:
        path: the file; its name is the title of a picture that has none.
        of: whose it is.
    """
    picture = open_picture(path)
    if picture is None:
        return None
    title = str(picture.info.get("Title") or path.stem.replace("-", " ").replace("_", " "))
    return Titled(embed(picture), title, str(picture.info.get("Description") or ""), of)


def _template(name: str) -> str:
    return resources.files("torchmae.report").joinpath(name).read_text(encoding="utf-8")
