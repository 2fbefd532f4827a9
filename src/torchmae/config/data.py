"""The settings of opening and reading data, and of `torchmae data`."""

from __future__ import annotations

import re
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
        root: folder of the data sets that are downloaded by name.
        axes: axes of one sample in an array, one letter each: C for channels, any other (L, H, W, Z, Y, X, T) for
            space and time, such as HWC, CHW, LC, CL, ZYX or TYXC; null: from the shape, if it is unambiguous.
        channels: channels to read, in this order: names that the file gives them, or numbers from 1; null: all.
        pages: pages of a TIFF: the "first", "all" (each page is a sample) or a "stack" (one sample with one more axis).
        truncated: a JPEG without its last rows: "skip" it as unreadable, or "keep" it with the missing rows grey.
        max_megapixels: largest size of a picture in million pixels; a JPEG of up to ten times this size is decoded at
            reduced size.
        nodata: pixels without data, which enter no statistics and no loss: "auto" (the value that the file names, and
            what is not finite), a value such as -9999 (and what is not finite), "nan" (what is not finite alone), or
            "none" (an image with a value that is not finite is unreadable).
        member: picture to take if a tar sample has several: its name after the sample's key and a dot ("jpg",
            "seg.png"), or "all" (each picture is a sample); null: no sample has several.
        group: what belongs together (a patient, a scene, a record, a clip): the name of a column of a list or of an
            array beside the images, or a regular expression on the path with the group in parentheses, such as
            '(case_\\d+)'. Held-out images are of groups of their own; null: each image stands alone.
        spacing: what one pixel stands for: "native" (what the file says, each its own), "median" (of the training
            images), or the value to resample to: millimetres (or the file's own unit) for each axis or one for all,
            hertz for sound, frames a second for video, of which the nearest frames are taken.
        clip: length of the clips that videos and long records are cut into along time, and its stride: [16, 4] is 16
            frames, every fourth; frames are cropped as pictures are, unless `window` says more; null: see `window`.
        spectrogram: number of mel bands of the log-mel spectrograms (bands, frames) that sound becomes, with windows of
            25 ms every 10 ms; null: sound stays a waveform.
        scale: for each stored type, the value that becomes 1; null: 255 for uint8, 65535 for uint16, 1 for others.
    """

    root: Place = "data"
    axes: str | None = None
    channels: tuple[int | str, ...] | None = None
    pages: Literal["first", "all", "stack"] = "first"
    truncated: Literal["skip", "keep"] = "skip"
    max_megapixels: Positive = 100.0
    nodata: Literal["auto", "nan", "none"] | float | None = "auto"
    member: str | None = None
    group: str | None = None
    spacing: Literal["native", "median"] | Positive | tuple[Positive, ...] = "native"
    clip: Count | tuple[Count, Count] | None = None
    spectrogram: Annotated[int, Range(8, 512)] | None = None
    scale: dict[str, Positive] | None = None

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(ReadOptions)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def filled_from(self, other: ReadOptions) -> dict[str, Any]:
        """The values of `other` for all options that have their defaults here."""
        return {item.name: getattr(other, item.name) for item in fields(ReadOptions) if item.name not in self.changed()}

    def of_one_file(self) -> dict[str, Any]:
        """The options that change how one file is read, if they differ from their defaults."""
        names = {item.name for item in fields(ReadOptions)} - {"root", "member", "group", "scale"}
        return {name: value for name, value in self.changed().items() if name in names}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodata is None:  # as older runs say it
            object.__setattr__(self, "nodata", "auto")
        for kind in self.scale or {}:
            one_of(f"{self.prefix}scale", kind, ("uint8", "uint16", "float32"))
        if self.group is not None and "(" in self.group:
            try:
                re.compile(self.group)
            except re.error as error:
                problem = f"{self.prefix}group is {self.group!r}: {error}"
                raise ConfigError(problem, "give a regular expression") from None
        if self.axes is not None:
            object.__setattr__(self, "axes", self.axes.upper().removeprefix("N"))
            letters = set(self.axes)
            if not self.axes.isalpha() or len(letters) < len(self.axes) or not 1 <= len(letters - {"C"}) <= 3:
                raise ConfigError(
                    f"{self.prefix}axes is {self.axes!r}",
                    "give a letter for each axis of a sample, such as HWC, CL or ZYX",
                )


@dataclass(frozen=True)
class DataOptions(ReadOptions):
    """How images are held out and loaded.

    Attributes:
        source: a folder, file or name, as for `torchmae pretrain --data`; null: the run's training data.
        window: size in pixels of the windows that images are cut into at their own resolution, for each axis or one for
            all (0: the whole axis): random ones in training, an even grid in evaluation; "none": crops of whole images;
            "auto": windows of the model's input size unless most images are at most twice as large, or are 8-bit
            pictures (64 or more of them, or of less than 1000 pixels a side).
        val_size: number of training images to hold out if the data has no val split; at most a fifth of them. Every
            command holds out the same images.
        memory_limit: GiB for decoded images, at most half of the memory that this process may use; a larger data set is
            read again in every epoch.
        num_workers: reader processes if images are not in memory; null: one per core, at most 8.
        max_bad: largest allowed share of unreadable images, which are skipped, counted and named.
    """

    source: Place | None = None
    window: Literal["auto", "none"] | Count | tuple[Annotated[int, Range(0)], ...] = "auto"
    val_size: Count = 2000
    memory_limit: NotNegative = 4.0
    num_workers: Annotated[int, Range(0, 256)] | None = None
    max_bad: Share = 0.01


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ProgressOption, JsonOption, ReadOptions, group=""):
    """Reads every image of a data set and reports sizes, types, classes and problems.

    Attributes:
        data: a folder, file or name, as for `torchmae pretrain --data`.
        sheet: PNG file for a contact sheet of 64 images; null: none.
        limit: number of images to read from each split, evenly spaced; null: all.
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
        max_size: limit of the longer side in pixels; larger images are reduced, others are kept byte for byte; null:
            no limit.
        quality: JPEG quality, 1 to 100, of reduced images that had lossy compression; others stay lossless.
        shard_mib: size of a file in MiB.
        max_bad: largest allowed share of unreadable images, which are left out and named.
    """

    format: Literal["parquet", "wds", "npy"] = "parquet"
    max_size: Annotated[int, Range(8)] | None = None
    quality: Annotated[int, Range(1, 100)] = 95
    shard_mib: Annotated[int, Range(1, 65536)] = 256
    max_bad: Share = 0.01


@dataclass(frozen=True)
class PackCommand(Settings):
    """Writes the images of a data set into a few large files.

    Each image is read back and compared. If the command is stopped, run it again to continue.

    Attributes:
        data: a folder, file or name, as for `torchmae pretrain --data`.
        out: a new folder.
    """

    data: Annotated[Place, POSITIONAL]
    out: Annotated[Place, POSITIONAL]
