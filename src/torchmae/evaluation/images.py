"""The images of an evaluation: training images for the probes, and test images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchmae import settings
from torchmae.config import DataConfig
from torchmae.config.data import DataOptions
from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.apart import Twins
from torchmae.data.items import Context, Progress
from torchmae.data.layouts import open_splits
from torchmae.data.loader import Batch, ImageLoader, Indices, View, mixed_subset
from torchmae.data.opening import (
    HELD_OUT,
    fit_to_model,
    grid_of_windows,
    held_out_images,
    hold_if_it_fits,
    sides_of,
    window_size,
)
from torchmae.data.reading import BadFiles, Probe, measure, probe, reader_processes
from torchmae.data.sources import Source, Subset, all_notes, data_line, in_training_classes
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, DataError, one_of
from torchmae.evaluation.sharing import Share, share
from torchmae.machine import bytes_to_keep
from torchmae.paths import user_path
from torchmae.training.ranks import Ranks
from torchmae.training.saved_model import read_description

EVAL_BATCH = 250
"""The default batch size of an evaluation."""


@dataclass(frozen=True)
class ModelInput:
    """What a model takes, and where its batches go.

    Attributes:
        input_size: pixels along each axis; other images are resampled.
        channels: None: those of the data.
        normalisation: of the model's training; None: measured on the data.
        device: of batches.
        batch_size: images in a batch.
        progress: called while images are indexed, read and measured.
        own: the caller's own sources by split, for data "own".
        window: what data.window "auto" means: the size of the windows of the model's training, or "none".
    """

    input_size: tuple[int, ...]
    channels: int | None
    normalisation: Normalisation | None
    device: torch.device
    batch_size: int = EVAL_BATCH
    progress: Progress | None = None
    own: Mapping[str, Source] | None = None
    window: tuple[int, ...] | Literal["auto", "none"] = "auto"

    def context(self, data: DataOptions) -> Context:
        """How to open data for this input."""
        return Context.of(data, spatial_dims=len(self.input_size), progress=self.progress)

    def splits(self, data: DataOptions) -> dict[str, Source]:
        """The splits of the data, whose `source` is not None."""
        assert data.source is not None
        return open_splits(data.source, self.context(data)) if self.own is None else dict(self.own)


@dataclass(frozen=True)
class ImageSet:
    """Images of one split for a model, without augmentation; read into memory at first use if they fit.

    `normalisation` is that of the model's training, or measured; `bad` collects the images that cannot be read.
    `images` is set where samples are windows: (N,) the image of each, rising.
    """

    source: Source
    data: DataOptions
    model: ModelInput
    normalisation: Normalisation
    bad: BadFiles
    images: Indices | None = None

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def loader(self) -> ImageLoader:
        """Batches of these images, without augmentation."""
        return self.augmented(DataConfig())  # of no effect on eval_batches

    def augmented(self, augmentation: DataConfig) -> ImageLoader:
        """A loader for training, with the crops and flips of `augmentation` and nothing else of it."""
        limit, window, probed = bytes_to_keep(self.data.memory_limit), self.data.window, probe(self.source)
        return ImageLoader(
            self.source,
            hold_if_it_fits(self.source, probed, limit, self.bad, self.model.progress),
            view=View(
                self.model.input_size,
                *augmentation.augmentation(len(self.model.input_size), probed.example.form),
                window if isinstance(window, tuple) and 0 in window else None,  # of clips, the frames are cropped
            ),
            normalisation=self.normalisation,
            device=self.model.device,
            num_workers=reader_processes(self.data.num_workers),
            bad=self.bad,
        )

    @property
    def reading(self) -> dict[str, Any]:
        """How the images are read and normalised, as JSON gives it back."""
        found = {"window": self.data.window, **self.data.of_one_file(), "normalisation": asdict(self.normalisation)}
        return dict(json.loads(json.dumps(found)))

    @property
    def groups(self) -> Tensor | None:
        """(N,) int64: samples of one number belong together, by `data.group` or as windows of one image; None: none."""
        named = self.images if self.source.groups is None else self.source.groups
        return None if named is None else torch.from_numpy(np.unique(named, return_inverse=True)[1])

    @property
    def num_images(self) -> int:
        """Number of images, of which windows are parts."""
        return len(self) if self.images is None else int(self.images[-1]) + 1

    def samples_of(self, start: int, stop: int) -> Indices:
        """The samples of images `start` to `stop` - 1."""
        first, end = (start, stop) if self.images is None else np.searchsorted(self.images, [start, stop]).tolist()
        return np.arange(first, end)

    def only(self, indices: Indices) -> ImageSet:
        """Some of the images, in this order."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        images = None if self.images is None else self.images[indices]
        return replace(self, source=Subset(self.source, indices), images=images)

    def shared(self, ranks: Ranks, what: str) -> tuple[Share, Iterator[Batch]]:
        """This rank's share of the images, and its batches; `what` names the work for `progress`."""
        size = self.model.batch_size
        mine = share(np.arange(len(self)), size, ranks)

        def batches() -> Iterator[Batch]:
            for number, batch in enumerate(self.only(mine.rows).batches(), 1):
                yield replace(batch, indices=mine.rows[batch.indices])
                if self.model.progress is not None:
                    self.model.progress(what, min(number * size, len(mine.rows)), len(mine.rows))

        return mine, batches()

    def batches(self, indices: Indices | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """`read_batches` of all images in order, or of `indices`."""
        chosen = np.arange(len(self)) if indices is None else indices
        return read_batches(self.loader, chosen, self.model.batch_size if batch_size is None else batch_size)


@dataclass(frozen=True)
class EvaluationData:
    """The images of an evaluation; `classes` names the labels, `notes` are sentences for readers of the figures.

    `twins` are of training images among the test images.
    """

    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    twins: Twins = field(default=Twins(), kw_only=True)

    @property
    def normalisation(self) -> Normalisation:
        """Of both sets."""
        return self.train.normalisation

    def fingerprints(self) -> dict[str, str]:
        """Digests of the images and of the labels of both sets."""
        sources = {"train": self.train.source, "test": self.test.source}
        images = {split: source.fingerprint() for split, source in sources.items()}
        return images | {f"{split}_labels": source.label_fingerprint() for split, source in sources.items()}


def read_batches(loader: ImageLoader, indices: Indices, batch_size: int = EVAL_BATCH) -> Iterator[Batch]:
    """`ImageLoader.eval_batches` without images that cannot be read or hold no data."""
    return without_stand_ins(loader, loader.eval_batches(indices, batch_size))


def without_stand_ins(loader: ImageLoader, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches without the neighbours that replace unreadable images, and without images that hold no data."""
    for batch in batches:
        unread = {name for name, _ in loader.bad.items}
        read = np.ones(len(batch.indices), dtype=bool)
        if unread:
            read &= [loader.source.name(int(row)) not in unread for row in batch.indices]
        if batch.valid is not None:
            read &= batch.valid.flatten(1).any(1).cpu().numpy()
        yield batch if read.all() else batch.only(np.flatnonzero(read))


def open_evaluation_data(options: EvaluateOptions, model: ModelInput, *, labelled: bool = True) -> EvaluationData:
    """Opens both sets of an evaluation; `labelled`: only images with a label, of at least two classes.

    Raises:
        ConfigError: options that do not fit the data, or data that does not fit the model.
        DataError: data that is missing, empty, unreadable, or lacks labels.
    """
    context = model.context(options.data)
    splits = model.splits(options.data)
    name = options.test_data or next((name for name in ("test", "val") if name in splits), HELD_OUT)
    order = ("test", "val", "train")
    train, test, apart = held_out_images(splits, name, options.data.val_size, context, "test_data", order)
    notes = apart.notes
    if labelled and train.tags is not None:
        train, test, lost = tagged(train, test)
        notes += lost
    elif labelled:
        for what, source in (("training", train), ("test", test)):
            unlabelled = 0 if source.labels is None else int((source.labels < 0).sum())
            if unlabelled:
                notes += (f"{unlabelled:,} {what} images without a label are left out",)
        test, lost = in_training_classes(test, train, "test")
        notes += lost
        train, test = only_labelled(train, "training"), only_labelled(test, "test")
    train, test = fixed_part(train, options.train_images), fixed_part(test, options.test_images)
    classes = class_names(train)
    if labelled and train.tags is None:
        check_classes(train, classes)
    sets, said = image_sets([train, test], options.data, model)
    return EvaluationData(sets[0], sets[1], classes, (*notes, *said), twins=apart.twins)


def run_data(run: str) -> DataConfig:
    """The data of a run's training, with what its `window` "auto" came to mean.

    Of an exported model only how its images are read, and of others the defaults; `source` is then "".
    """
    folder = user_path(run)
    known = settings.read_config(folder / "config.yaml").data if (folder / "config.yaml").is_file() else None
    if (known is not None and known.window != "auto") or not (folder / "model.json").is_file():
        return known or DataConfig(source="")
    description = read_description(folder / "model.json")
    data = known or DataConfig(source="", **(description.reading or {}))
    return replace(data, window=description.window or "none")


def own_data(run: str, data: DataOptions) -> DataOptions:
    """The options, with the run's data and its way of reading where they say nothing; ConfigError without any data."""
    own = run_data(run)
    if data.source is not None:
        return read_alike(data, own)
    if not own.source:
        raise ConfigError(f"data is not given and {run} does not say which", "add --data PATH_OR_NAME")
    return replace(data, **data.filled_from(own), source=own.source, val_size=own.val_size)


def read_alike(data: DataOptions, own: DataConfig) -> DataOptions:
    """Options for data other than the model's own. Where they say nothing, it is read as the model's own data was."""
    return replace(data, **{**data.filled_from(own), "root": data.root, "group": data.group})


def image_sets(
    sources: Sequence[Source], data: DataOptions, model: ModelInput
) -> tuple[list[ImageSet], tuple[str, ...]]:
    """A set for each source (training images first), and notes: on sizes, and the line that begins with "data:".

    Raises:
        ConfigError: images that do not fit the model.
        DataError: none of the images can be read.
    """
    fitted = fit_to_model(sources, model.input_size, model.channels)
    said = all_notes(fitted.sources)
    normalisation = model.normalisation
    if normalisation is None:
        kinds = fitted.probes[0].kinds
        measured = measure(fitted.sources[0], scale=data.scale, kinds=kinds, progress=model.progress)
        normalisation = measured.normalisation
    for seen in fitted.probes:
        normalisation, types = rescaled(normalisation, data, seen)
        said += [*seen.notes, *types]
    bad = BadFiles(sum(map(len, sources)), data.max_bad)
    if data.window == "auto":
        data = replace(data, window=model.window)
    window = window_size(data, fitted.probes[0], model.input_size)
    if window is None:
        sets = [ImageSet(source, data, model, normalisation, bad) for source in fitted.sources]
        resampled = next(filter(None, (_resampled(seen, model.input_size) for seen in fitted.probes)), "")
    else:
        data = replace(data, window=window)
        grids = [grid_of_windows(source, window, model.progress) for source in fitted.sources]
        sets = [ImageSet(grid, data, model, normalisation, bad, grid.indices) for grid in grids]
        count = f"{sum(map(len, grids)):,} in all"
        resampled = f"each image is covered by windows of {sides_of(window)} at their own resolution, {count}"
    return sets, tuple(filter(None, [resampled, data_line(said)]))


def open_parts(data: DataOptions, split: str, model: ModelInput) -> tuple[list[ImageSet], tuple[str, ...]]:
    """All images of a split ("train", "val" or "test") or of all splits ("all"), as of `image_sets`, labelled or not.

    Raises:
        ConfigError: a split that the data does not have, or data that does not fit the model.
        DataError: data that is missing, empty or unreadable.
    """
    splits = model.splits(data)
    if split != "all":
        one_of("split", split, splits)
    chosen = [splits[name] for name in ("train", "val", "test") if name in splits and split in (name, "all")]
    return image_sets(chosen, data, model)


def rows_with_label(labels: Indices | None) -> Indices:
    """The images with a known label."""
    return np.flatnonzero(np.empty(0) if labels is None else labels >= 0)


def fixed_rows(length: int, count: int | None) -> Indices:
    """`count` of `length` images, or all if there are fewer: a fixed, mixed choice, sorted."""
    if count is None or count >= length:
        return np.arange(length)
    return np.sort(mixed_subset(length, count))


def only_labelled(source: Source, what: str) -> Source:
    """The images with a label; DataError if there are none."""
    known = rows_with_label(source.labels)
    if not len(known):
        why = "".join(f"; {note}" for note in source.remarks if "labels" in note and "not used" in note)
        raise DataError(
            f"the {what} images have no labels ({source.name(0)}{why})",
            "put each class into a folder of its own, or use --method reconstruction",
        )
    return source if len(known) == len(source) else Subset(source, known)


def tagged(train: Source, test: Source) -> tuple[Source, Source, tuple[str, ...]]:
    """Training and test images of known tags, and notes; DataError where test images have other classes, or none."""
    assert train.tags is not None
    if test.tags is None or test.tags.shape[1] != train.tags.shape[1] or test.classes != train.classes:
        raise DataError(
            "the training images have several classes each, and the test images have not the same ones",
            "give labels of one list or table",
        )
    known = [Subset(item, np.flatnonzero((item.tags >= 0).all(1))) for item in (train, test) if item.tags is not None]
    lost = len(train) + len(test) - sum(map(len, known))
    if not all(map(len, known)):
        raise DataError("no training or no test image has a label", "give both")
    return known[0], known[1], (f"{lost:,} images without a label are left out",) if lost else ()


def fixed_part(source: Source, count: int | None) -> Source:
    """The images of `fixed_rows`."""
    rows = fixed_rows(len(source), count)
    return source if len(rows) == len(source) else Subset(source, rows)


def class_names(train: Source) -> tuple[str, ...]:
    """The name of each label of the training images, or its number."""
    if train.classes is not None:
        return train.classes
    if train.tags is not None:
        return tuple(map(str, range(train.tags.shape[1])))
    return tuple(str(i) for i in range(0 if train.labels is None else int(train.labels.max(initial=-1)) + 1))


def check_classes(train: Source, classes: tuple[str, ...]) -> None:
    """DataError if the training images are all of one class."""
    assert train.labels is not None
    present = np.unique(train.labels)
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} labelled training images are of one class, {classes[present[0]]!r}",
            "give images of two classes or more",
        )


def _resampled(seen: Probe, input_size: tuple[int, ...]) -> str:
    """A note if images are resampled, else ""."""
    if set(seen.sizes) == {input_size}:
        return ""
    found = "x".join(map(str, next(iter(seen.sizes)))) if len(seen.sizes) == 1 else "several sizes"
    return f"images of {found} are cropped and resampled to the model's {'x'.join(map(str, input_size))}"


def rescaled(normalisation: Normalisation, data: DataOptions, seen: Probe) -> tuple[Normalisation, list[str]]:
    """A model's normalisation with data.scale, and a note if the images have a type new to the model."""
    trained = normalisation.scale
    if data.scale:
        normalisation = replace(normalisation, scale={**(trained or {}), **data.scale})
    new = [] if not trained else [kind for kind in seen.kinds if kind not in {**trained, **(data.scale or {})}]
    if not new:
        return normalisation, []
    theirs = ", ".join(f"{kind} divided by {one:g}" for kind, one in (trained or {}).items())
    ours = ", ".join(f"{kind} divided by {normalisation.one(np.dtype(kind)):g}" for kind in new)
    return normalisation, [f"{ours} for a model trained on {theirs}; --data.scale sets another divisor"]
