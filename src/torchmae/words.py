"""What samples and their points are called, by kind of data: sentences speak of images, and are turned here."""

from __future__ import annotations

import re

POINTS = {"signal": "sample", "image": "pixel", "volume": "voxel", "clip": "pixel"}
_WORD = re.compile(r"(?<![\w/.'-])(?:([Aa])n? )?([Ii]mage|[Pp]ixel)(s?)(?![\w/=:'-]|\.\w)")


def kind_of(axes: int, *, moving: bool = False) -> str:
    """The kind of samples with 1 to 3 spatial axes; `moving`: the first of three is time."""
    return {1: "signal", 3: "clip" if moving else "volume"}.get(axes, "image")


def in_words(text: str, kind: str) -> str:
    """A text about images and pixels as one about samples of another kind; what looks like a path or option stays."""

    def turned(match: re.Match[str]) -> str:
        article, word, plural = match.groups()
        new = {"image": kind, "pixel": POINTS[kind]}[word.lower()]
        return f"{f'{article} ' if article else ''}{new.capitalize() if word[0].isupper() else new}{plural}"

    return text if kind == "image" else _WORD.sub(turned, text)
