"""The settings of `torchmae reconstruct`, `visualize`, `app` and `report`. Light: nothing here imports torch."""

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
    """The images that neighbours are found among, that a map is made of, and that are drawn when none are given.

    Attributes:
        source: what `torchmae pretrain --data` takes: a folder, a file or a name; null: what the run was trained on.
        root: where torchvision's sets are kept and downloaded to; null: where the run had them.
    """

    source: Place | None = None
    root: Place | None = None


@dataclass(frozen=True)
class VisualizeOptions(ModelOptions):
    """Draws what a trained model learned: patch features as colours, attention, neighbours, a map, mask ratios.

    Attributes:
        images: image files; without any, some of the held-out images.
        kind: pca (patch features as colours), attention (of the class token), neighbours (the training images with
            the nearest features), map (all held-out images on a plane), or ratios (reconstructions as more is masked).
        data: the data set.
        out: the picture to write, a PNG file.
        method: of the map: tsne, pca, or umap where umap-learn is installed.
        num_images: images of the data set used for neighbours and map, at most.
        seed: of masks, and of umap.
    """

    images: Annotated[tuple[Path, ...], POSITIONAL] = ()
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
                f"a map is of a whole data set, not of {self.images[0]}", "name the data set: --data PATH_OR_NAME"
            )
        if len(self.images) > 64:
            raise ConfigError(f"{len(self.images)} images are too many for one picture", "give 64 or fewer")


@dataclass(frozen=True, kw_only=True)
class AppOptions(TargetOption, DeviceOption):
    """Serves a page to try a model in the browser: paint a hole, see it filled in, compare two runs.

    The page is for this computer alone. Choose an image, paint a hole into it, see what the model makes of it, what it
    sees, and which images look similar to it.

    Attributes:
        runs: run folders, exported models, or weights of others.
        features: file written by `torchmae embed RUN`, in which neighbours are looked up.
        data: where example images come from.
        lang: en or zh; null: the browser's language.
        host: the address to listen on; 0.0.0.0 opens the page to the network, without a password.
        port: to listen on; null: 7860, or the first after it that is free.
        open: open the page in a browser.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    features: Path | None = None
    data: ExampleImages = field(default_factory=ExampleImages)
    lang: Literal["en", "zh"] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] | None = None
    open: bool = False


@dataclass(frozen=True)
class MaskOptions(Settings, group="mask."):
    """What is masked; null: as the model was trained.

    Attributes:
        strategy: name of a mask strategy, as in `torchmae pretrain`.
        ratio: share of the patches that is masked, in (0, 1).
    """

    strategy: Strategy | None = None
    ratio: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions(ModelOptions):
    """Masks part of some images and lets a trained model fill it in: masked | reconstructed | original.

    Attributes:
        images: image files.
        mask: what is masked.
        mask_file: an image whose white (bright) part is masked, in place of a drawn mask: in-painting.
        out: the picture to write, a PNG file.
        seed: of the drawn masks.
    """

    images: Annotated[tuple[Path, ...], POSITIONAL]
    mask: MaskOptions = field(default_factory=MaskOptions)
    mask_file: Path | None = None
    out: Annotated[Path, ".png"] = Path("reconstruction.png")
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Settings):
    """Writes one self-contained HTML page of a run, or of several runs side by side.

    Attributes:
        runs: run folders of `torchmae pretrain`.
        out: the page to write; null: RUN/report.html, or comparison.html for several runs.
    """

    runs: Annotated[tuple[Path, ...], POSITIONAL]
    out: Annotated[Path, ".html", ".htm"] | None = None
