"""How data is opened and read, and the settings of `torchmae data`. Light: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from torchmae.config.base import (
    POSITIONAL,
    Count,
    JsonOption,
    NotNegative,
    Place,
    Positive,
    ProgressOption,
    Range,
    Settings,
    Share,
)
from torchmae.errors import ConfigError, one_of


@dataclass(frozen=True)
class ReadOptions(Settings, group="data."):
    """How data is opened and read, the same in every command.

    Attributes:
        root: folder where data sets that go by name are kept and downloaded to.
        axes: axes of one sample in an array, one letter each: C for channels, any other (L, H, W, Z, Y, X, T) for
            space and time, such as HWC, CHW, LC, CL, ZYX or TYXC; null: by the shape, where only one reading fits.
        channels: channels to read, in this order: names that the file gives them, or numbers from 1; null: all.
        pages: pages of a TIFF: the "first", "all" (each page is a sample) or a "stack" (one sample with one axis more).
        truncated: a JPEG without its last rows: "skip" counts it as unreadable, "keep" fills the missing rows with
            grey.
        max_megapixels: limit of the pixels of a picture, in millions; a JPEG up to ten times as large is read at a
            fraction of its size.
        nodata: pixels without data, which enter no statistics and no loss: "auto" (the value that the file names, and
            what is not finite), a value such as -9999 (and what is not finite), "nan" (what is not finite alone), or
            "none" (an image with a value that is not finite is unreadable).
        member: picture to take from tar samples with several: what follows the sample's key and a dot ("jpg",
            "seg.png"), or "all" (each picture is a sample); null: no sample has several.
        scale: for each type of stored values, the value that becomes 1; null: 255 for uint8, 65535 for uint16, and
            1 for all other types.
    """

    root: Place = "data"
    axes: str | None = None
    channels: tuple[int | str, ...] | None = None
    pages: Literal["first", "all", "stack"] = "first"
    truncated: Literal["skip", "keep"] = "skip"
    max_megapixels: Positive = 100.0
    nodata: Literal["auto", "nan", "none"] | float | None = "auto"
    member: str | None = None
    scale: dict[str, Positive] | None = None

    def changed(self) -> dict[str, Any]:
        """The options of reading that differ from their defaults."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(ReadOptions)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def filled_from(self, other: ReadOptions) -> dict[str, Any]:
        """The options that are left at their defaults here, as `other` has them."""
        return {item.name: getattr(other, item.name) for item in fields(ReadOptions) if item.name not in self.changed()}

    def of_one_file(self) -> dict[str, Any]:
        """The options that decide how one file is read, where they are not the defaults."""
        names = ("axes", "channels", "pages", "truncated", "max_megapixels", "nodata")
        return {name: value for name, value in self.changed().items() if name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodata is None:  # as older runs say it
            object.__setattr__(self, "nodata", "auto")
        for kind in self.scale or {}:
            one_of(f"{self.group}scale", kind, ("uint8", "uint16", "float32"))
        if self.axes is not None:
            object.__setattr__(self, "axes", self.axes.upper().removeprefix("N"))
            letters = set(self.axes)
            if not self.axes.isalpha() or len(letters) < len(self.axes) or not 1 <= len(letters - {"C"}) <= 3:
                raise ConfigError(
                    f"{self.group}axes is {self.axes!r}",
                    "give a letter for each axis of a sample, such as HWC, CL or ZYX",
                )


@dataclass(frozen=True)
class DataOptions(ReadOptions):
    """How images are held out and loaded.

    Attributes:
        source: what `torchmae pretrain --data` takes: a folder, a file or a name; null: what the run was trained on.
        window: size in pixels of the windows that images are cut into at their own resolution, for each axis or one for
            all: random ones in training, an even grid in evaluation; "none": crops of whole images; "auto": windows of
            the model's input size where the values are no 8-bit picture's and most images are more than twice as large.
        val_size: number of training images that are held out where the data has no such split; at most a fifth of
            them, and the same ones in every command.
        memory_limit: GiB that decoded images may fill; a larger data set is read again in every pass.
        num_workers: reader processes when images are not in memory; null: one per core, at most 8.
        max_bad: largest share of unreadable images: each is skipped, counted and named; more of them end the command.
    """

    source: Place | None = None
    window: Literal["auto", "none"] | Count | tuple[Count, ...] = "auto"
    val_size: Count = 2000
    memory_limit: NotNegative = 4.0
    num_workers: Annotated[int, Range(0, 256)] | None = None
    max_bad: Share = 0.01


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ProgressOption, JsonOption, ReadOptions, group=""):
    """Reads every image of a data set and says what is there, and what is wrong.

    Attributes:
        data: anything that `torchmae pretrain --data` takes.
        sheet: where to save a contact sheet, a PNG picture of 64 images; null: nowhere.
        limit: how many images of each split to read, evenly spaced; null: all.
    """

    data: Annotated[Place, POSITIONAL]
    sheet: Annotated[Place, ".png"] | None = None
    limit: Count | None = None


@dataclass(frozen=True)
class PackOptions(ProgressOption, ReadOptions, group=""):
    """How images are packed.

    Attributes:
        format: "parquet" (the Hugging Face schema), "wds" (WebDataset tar shards) or "npy" (one array, for images
            of one size).
        max_size: longest side in pixels; larger images are reduced to it, others kept byte for byte; null: all
            are kept.
        quality: JPEG quality, 1 to 100, of images that were reduced and had been compressed with loss; others stay
            lossless.
        shard_mib: MiB after which the next file begins.
        max_bad: largest share of unreadable images: each is left out and named; more of them end the command.
    """

    format: Literal["parquet", "wds", "npy"] = "parquet"
    max_size: Annotated[int, Range(8)] | None = None
    quality: Annotated[int, Range(1, 100)] = 95
    shard_mib: Annotated[int, Range(1, 65536)] = 256
    max_bad: Share = 0.01


@dataclass(frozen=True)
class PackCommand(Settings):
    """Writes the images of a data set into few large files.

    Each image is read back before it counts. A command that was stopped goes on where it was when it is given again.

    Attributes:
        data: anything that `torchmae pretrain --data` takes.
        out: a new folder.
    """

    data: Annotated[Place, POSITIONAL]
    out: Annotated[Place, POSITIONAL]
