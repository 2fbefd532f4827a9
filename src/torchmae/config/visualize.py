"""The settings of `torchmae visualize`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from torchmae.config.base import POSITIONAL, ModelOptions, Place, Range, Settings
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
