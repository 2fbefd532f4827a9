"""The settings of `torchmae reconstruct`, `visualize`, `app` and `report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from torchmae.config.base import (
    POSITIONAL,
    DeviceOption,
    Fraction,
    ModelOptions,
    Place,
    Range,
    Settings,
    TargetOption,
)
from torchmae.config.pretrain import Strategy
from torchmae.errors import ConfigError


@dataclass(frozen=True)
class ExampleImages(Settings, group="data."):
    """The data set of neighbours, maps, and examples if no images are given.

    Attributes:
        source: a folder, file or name, as for `torchmae pretrain --data`; null: the run's training data.
        root: folder of the data sets that are downloaded by name; null: the run's.
    """

    source: Place | None = None
    root: Place | None = None


@dataclass(frozen=True)
class VisualizeOptions(ModelOptions):
    """Draws what a trained model learned: patch features as colours, attention, neighbours, a map, mask ratios.

    Attributes:
        images: files or folders of images; without any, some of the held-out images.
        show: list of the channels drawn, by name or by number from 1, such as '[nir, red, green]': one as grey, three
            as red, green and blue (of signals, any number); empty: bands named red, green and blue, else the first.
        kind: pca (patch features as colours), attention (of the class token), neighbours (the training images with
            the nearest features), map (all held-out images on a plane), or ratios (reconstructions at growing mask
            ratios).
        data: the data set of neighbours, maps and examples.
        out: PNG file to write.
        method: method of the map: tsne, pca, or umap (needs umap-learn).
        num_images: largest number of images of the data set for neighbours and map.
        seed: seed of masks, and of umap.
    """

    images: Annotated[tuple[Path, ...], POSITIONAL] = ()
    show: tuple[int | str, ...] = ()
    kind: Literal["pca", "attention", "neighbours", "map", "ratios"] = "pca"
    data: ExampleImages = field(default_factory=ExampleImages)
    out: Annotated[Path, ".png"] = Path("picture.png")
    method: Literal["tsne", "pca", "umap"] = "tsne"
    num_images: Annotated[int, Range(3, 1_000_000)] = 2000
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "map" and self.images:
            raise ConfigError(
                f"a map shows a data set, and {self.images[0]} is an image", "name the data set: --data PATH_OR_NAME"
            )
        if len(self.images) > 64:
            raise ConfigError(f"{len(self.images)} images are too many for one picture", "give 64 or fewer")


@dataclass(frozen=True, kw_only=True)
class AppOptions(TargetOption, DeviceOption):
    """Serves a page to try a model in the browser: paint a hole, see it filled in, compare two runs.

    The page also shows an image's features and its nearest neighbours. By default only this computer can open it.

    Attributes:
        runs: run folders, exported models, or weights of others.
        features: file written by `torchmae embed RUN`, for nearest neighbours.
        show: the channels drawn, as in `torchmae visualize`.
        data: the data set of example images.
        lang: en or zh; null: the browser's language.
        host: address to listen on; 0.0.0.0 opens the page to the network, without a password.
        port: port to listen on; null: 7860, or the next free one.
        open: open the page in a browser.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    features: Path | None = None
    show: tuple[int | str, ...] = ()
    data: ExampleImages = field(default_factory=ExampleImages)
    lang: Literal["en", "zh"] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] | None = None
    open: bool = False


@dataclass(frozen=True)
class MaskOptions(Settings, group="mask."):
    """Which patches are masked; null: as in training.

    Attributes:
        strategy: name of a mask strategy, as in `torchmae pretrain`.
        ratio: masked share of the patches, in (0, 1).
    """

    strategy: Strategy | None = None
    ratio: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ModelOptions):
    """Masks part of some images and lets a trained model fill it in: masked | reconstructed | original.

    Attributes:
        images: whatever `torchmae pretrain --data` takes: files, folders, lists, arrays; of several images in one, 8.
        show: the channels drawn, as in `torchmae visualize`.
        mask: which patches are masked.
        mask_file: in-painting: an image whose bright part is masked, in place of a random mask.
        out: PNG file to write.
        seed: seed of the masks.
    """

    images: Annotated[tuple[Path, ...], POSITIONAL]
    show: tuple[int | str, ...] = ()
    mask: MaskOptions = field(default_factory=MaskOptions)
    mask_file: Path | None = None
    out: Annotated[Path, ".png"] = Path("reconstruction.png")
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Settings):
    """Writes one self-contained HTML page about a run, or about several runs side by side.

    Attributes:
        runs: run folders of `torchmae pretrain`.
        out: HTML file to write; null: RUN/report.html, or comparison.html for several runs.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    out: Annotated[Path, ".html", ".htm"] | None = None
