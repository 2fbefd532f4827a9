"""The settings of `torchmae app`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from torchmae.config.base import POSITIONAL, Device, Range, Settings, Target
from torchmae.config.visualize import ExampleImages


@dataclass(frozen=True, kw_only=True)
class AppOptions(Settings):
    """Serves a page to try a model in the browser: paint a hole, see it filled in, compare two runs.

    The page is for this computer alone. Choose an image, paint a hole into it, see what the model makes of it, what it
    sees, and which images look similar to it.

    Attributes:
        runs: run folders, exported models, or weights of others.
        features: a data set embedded by `torchmae embed RUN`, among which neighbours are looked for.
        data: where example images come from.
        lang: en or zh; null: the browser's language.
        host: the address to listen on; 0.0.0.0 opens the page to the network, without a password.
        port: to listen on; null: 7860, or the first after it that is free.
        open: open the page in a browser.
        device: auto, cpu, cuda, cuda:1, mps.
        target: what weights of others were trained to predict, where they do not say: pixels or normalised (patches).
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    features: Path | None = None
    data: ExampleImages = field(default_factory=ExampleImages)
    lang: Literal["en", "zh"] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] | None = None
    open: bool = False
    device: Device = "auto"
    target: Target | None = None
