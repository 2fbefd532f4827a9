"""The labelled images of an evaluation: those that probes learn from and those that they classify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch

from torchmae.config import DataConfig
from torchmae.data.arrays import DoesNotFitError, Held, hold
from torchmae.data.formats import Context, Progress
from torchmae.data.labels import in_training_classes
from torchmae.data.layouts import open_splits
from torchmae.data.loader import Batch, ImageLoader, hold_out
from torchmae.data.opening import check_apart
from torchmae.data.reading import BadFiles, Probe, fit_channels, measure, probe, reader_processes
from torchmae.data.sources import Source, Subset, all_notes, data_line
from torchmae.data.transforms import Normalisation
from torchmae.data.worker import Indices, View
from torchmae.errors import ConfigError, DataError, one_of
from torchmae.evaluation.options import DataOptions, EvaluateOptions
from torchmae.evaluation.sharing import Share, share
from torchmae.random import Purpose, permutation
from torchmae.training.ranks import Ranks

HELD_OUT = "held-out"
_GIB = 2**30


class ImageSet:
    """Images of one split, without augmentation; read into memory, if they fit, when they are first asked for.

    Args:
        source: the images.
        data: how they are read.
        batch_size: images in a batch.
        input_size: pixels along each axis of the model's input.
        normalisation: what the model was trained with.
        device: where batches go.
        bad: takes the images that cannot be read.
        progress: told how far reading is.
    """

    def __init__(
        self,
        source: Source,
        *,
        data: DataOptions,
        batch_size: int,
        input_size: tuple[int, ...],
        normalisation: Normalisation,
        device: torch.device,
        bad: BadFiles,
        progress: Progress | None = None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.bad = bad
        self._data = data
        self._input_size = input_size
        self._normalisation = normalisation
        self._device = device
        self._progress = progress

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def loader(self) -> ImageLoader:
        """Batches of these images, without augmentation."""
        return self.augmented(DataConfig())  # of no effect on eval_batches

    def augmented(self, augmentation: DataConfig) -> ImageLoader:
        """A loader to train with, whose crops and flips are those of `augmentation`; nothing else of it counts."""
        return ImageLoader(
            self.source,
            hold_if_it_fits(self.source, self._data.memory_limit * _GIB, self.bad, self._progress),
            view=View(self._input_size, augmentation.crop_scale, augmentation.crop_ratio, augmentation.flip),
            normalisation=self._normalisation,
            device=self._device,
            num_workers=reader_processes(self._data.num_workers),
            bad=self.bad,
        )

    def only(self, indices: Indices) -> ImageSet:
        """Some of the images, in this order; the others are not read."""
        if np.array_equal(indices, np.arange(len(self))):
            return self
        return ImageSet(
            Subset(self.source, indices),
            data=self._data,
            batch_size=self.batch_size,
            input_size=self._input_size,
            normalisation=self._normalisation,
            device=self._device,
            bad=self.bad,
            progress=self._progress,
        )

    def share(self, ranks: Ranks) -> Share:
        """This rank's share of the images, in the batches of `batches`."""
        return share(np.arange(len(self)), self.batch_size, ranks)

    def batches(self, indices: Indices | None = None, batch_size: int | None = None) -> Iterator[Batch]:
        """All images in order, or those named."""
        chosen = np.arange(len(self)) if indices is None else indices
        return self.loader.eval_batches(chosen, self.batch_size if batch_size is None else batch_size)


@dataclass(frozen=True)
class EvaluationData:
    """An opened data set.

    Attributes:
        train: the images that probes learn from.
        test: the images that they classify.
        normalisation: of both.
        channels: of every image.
        classes: the name of each label.
        notes: what a reader of the figures should know, a sentence each.
        bad: the images that could not be read so far.
    """

    train: ImageSet
    test: ImageSet
    normalisation: Normalisation
    channels: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    bad: BadFiles

    def fingerprints(self) -> dict[str, str]:
        """Digests that change when the images do, and others that change when the labels do."""
        sources = {"train": self.train.source, "test": self.test.source}
        images = {split: source.fingerprint() for split, source in sources.items()}
        return images | {f"{split}_labels": source.label_fingerprint() for split, source in sources.items()}


def open_evaluation_data(
    options: EvaluateOptions,
    *,
    batch_size: int,
    input_size: tuple[int, ...],
    channels: int | None,
    normalisation: Normalisation | None,
    device: torch.device,
    labelled: bool = True,
    progress: Progress | None = None,
) -> EvaluationData:
    """Opens both sets of an evaluation.

    Args:
        options: `options.data.source` is not None.
        batch_size: images in a batch.
        input_size: pixels along each axis of the model's input; images of any other size are resampled to it.
        channels: that the model takes; None: what the data has.
        normalisation: None: measured on the training images.
        device: where batches go.
        labelled: take only images with a label, and insist on two classes.
        progress: told how far indexing, reading and measuring are.

    Raises:
        ConfigError: options that do not fit the data, or data that does not fit the model.
        DataError: data that is missing, empty, unreadable, or without the labels needed.
    """
    context = Context.of(options.data, spatial_dims=len(input_size), progress=progress)
    train, test, notes = choose_sources(options, context)
    if labelled:
        for what, source in (("training", train), ("test", test)):
            unlabelled = 0 if source.labels is None else int((source.labels < 0).sum())
            if unlabelled:
                notes += (f"{unlabelled:,} {what} images without a label are left out",)
        test, lost = in_training_classes(test, train, "test")
        notes += lost
        train, test = only_labelled(train, "training"), only_labelled(test, "test")
    train, test = first_of_fixed_order(train, options.train_images), first_of_fixed_order(test, options.test_images)
    classes = class_names(train)
    if labelled:
        check_classes(train, classes)
    seen = probe(train)
    test_seen = probe(test)
    notes += check_sizes(seen, train, input_size) or check_sizes(test_seen, test, input_size)
    channels = seen.channels if channels is None else channels
    train, test = with_channels(train, seen, channels), with_channels(test, test_seen, channels)
    bad = BadFiles(len(train) + len(test), options.data.max_bad)
    said = [*all_notes({"train": train, "test": test}), *seen.notes, *test_seen.notes]
    if normalisation is None:
        normalisation = measure(train, scale=options.data.scale, kinds=seen.kinds, progress=progress).normalisation
    else:
        normalisation, types = rescaled(normalisation, options.data, seen)
        said += types
    notes += tuple(filter(None, [data_line(said)]))
    image_set = partial(
        ImageSet,
        data=options.data,
        batch_size=batch_size,
        input_size=input_size,
        normalisation=normalisation,
        device=device,
        bad=bad,
        progress=progress,
    )
    return EvaluationData(
        train=image_set(train),
        test=image_set(test),
        normalisation=normalisation,
        channels=channels,
        classes=classes,
        notes=notes,
        bad=bad,
    )


def open_parts(
    data: DataOptions,
    split: str,
    *,
    batch_size: int,
    input_size: tuple[int, ...],
    channels: int,
    normalisation: Normalisation,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[list[ImageSet], tuple[str, ...]]:
    """All images of a data set, labelled or not, a set for each split.

    Args:
        data: `source` is not None.
        split: "train", "val", "test", or "all" that there are.
        batch_size: images in a batch.
        input_size: pixels along each axis of the model's input.
        channels: that the model takes.
        normalisation: what the model was trained with.
        device: where batches go.
        progress: told how far reading is.

    Returns:
        the sets, and notes as in `EvaluationData`.

    Raises:
        ConfigError: a split that the data does not have, or data that does not fit the model.
        DataError: data that is missing, empty or unreadable.
    """
    assert data.source is not None
    splits = open_splits(data.source, Context.of(data, spatial_dims=len(input_size), progress=progress))
    if split != "all":
        one_of("split", split, splits)
    sources = [splits[name] for name in ("train", "val", "test") if name in splits and split in (name, "all")]
    notes: tuple[str, ...] = ()
    probes = [probe(source) for source in sources]
    said = all_notes({str(i): source for i, source in enumerate(sources)})
    for source, seen in zip(sources, probes, strict=True):
        notes = notes or check_sizes(seen, source, input_size)
        normalisation, types = rescaled(normalisation, data, seen)
        said += [*seen.notes, *types]
    notes += tuple(filter(None, [data_line(said)]))
    parts = [
        ImageSet(
            with_channels(source, seen, channels),
            data=data,
            batch_size=batch_size,
            input_size=input_size,
            normalisation=normalisation,
            device=device,
            bad=BadFiles(len(source), data.max_bad),
            progress=progress,
        )
        for source, seen in zip(sources, probes, strict=True)
    ]
    return parts, notes


def choose_sources(options: EvaluateOptions, context: Context) -> tuple[Source, Source, tuple[str, ...]]:
    """Training and test images, as `EvaluateOptions.test_data` says, and what there is to say about them."""
    assert options.data.source is not None
    splits = open_splits(options.data.source, context)
    train = splits["train"]
    name = options.test_data or next((name for name in ("test", "val") if name in splits), HELD_OUT)
    if name == "train":
        raise ConfigError("test_data is 'train'", "probes must be tested on other images: test, val or held-out")
    if name == HELD_OUT:
        kept, held_out = hold_out(len(train), options.data.val_size)
        if not len(held_out):
            raise DataError(f"{options.data.source} has too few images to hold some out", "give --test-data too")
        return Subset(train, kept), Subset(train, held_out), ()
    if name in splits:
        return train, splits[name], ()
    try:
        others = open_splits(name, context)
    except DataError as error:
        known = ", ".join([*(split for split in splits if split != "train"), HELD_OUT, "or a path"])
        raise ConfigError(f"test_data {name!r} cannot be used: {error.problem}", f"choose from {known}") from error
    test = next(others[split] for split in ("test", "val", "train") if split in others)
    apart = check_apart(test, train, f"test_data {name!r}", f"{HELD_OUT} or another path")
    return train, test, apart


def rows_with_label(labels: Indices | None) -> Indices:
    """The images whose label is known: none where `labels` is None."""
    return np.flatnonzero(np.empty(0) if labels is None else labels >= 0)


def fixed_rows(length: int, count: int | None) -> Indices:
    """`count` of `length` images, sorted: the same ones each time, evenly mixed; all of them when there are no more."""
    if count is None or count >= length:
        return np.arange(length)
    return np.sort(permutation(0, 0, length, Purpose.SUBSET)[:count])


def only_labelled(source: Source, what: str) -> Source:
    """The images that have a label; DataError when none has."""
    known = rows_with_label(source.labels)
    if not len(known):
        why = "".join(f"; {note}" for note in source.remarks if "labels" in note and "not used" in note)
        raise DataError(
            f"the {what} images have no labels ({source.name(0)}{why})",
            "put each class into a folder of its own, or use --method reconstruction",
        )
    return source if len(known) == len(source) else Subset(source, known)


def first_of_fixed_order(source: Source, count: int | None) -> Source:
    """The images of `fixed_rows`."""
    rows = fixed_rows(len(source), count)
    return source if len(rows) == len(source) else Subset(source, rows)


def class_names(train: Source) -> tuple[str, ...]:
    """The name of each label of the training images; its number where it has none."""
    if train.classes is not None:
        return train.classes
    return tuple(str(i) for i in range(0 if train.labels is None else int(train.labels.max(initial=-1)) + 1))


def check_classes(train: Source, classes: tuple[str, ...]) -> None:
    """DataError unless the training images are of two classes or more."""
    assert train.labels is not None
    present = np.unique(train.labels)
    if len(present) < 2:
        raise DataError(
            f"all {len(train)} labelled training images are of one class, {classes[present[0]]!r}",
            "give images of two classes or more",
        )


def check_sizes(seen: Probe, source: Source, input_size: tuple[int, ...]) -> tuple[str, ...]:
    """A note where images have to be resampled; ConfigError where they have another number of axes."""
    for size in seen.sizes:
        if len(size) != len(input_size):
            raise ConfigError(
                f"{source.name(0)} has {len(size)} dimensions and the model takes {len(input_size)}",
                "give images of the kind that the model was trained on",
            )
    if seen.sizes == {input_size}:
        return ()
    found = "x".join(map(str, next(iter(seen.sizes)))) if len(seen.sizes) == 1 else "several sizes"
    return (f"images of {found} are cropped and resampled to the model's {'x'.join(map(str, input_size))}",)


def rescaled(normalisation: Normalisation, data: DataOptions, seen: Probe) -> tuple[Normalisation, list[str]]:
    """A model's normalisation with data.scale, and a note where the images are of a type that it was not trained on."""
    trained = normalisation.scale
    if data.scale:
        normalisation = replace(normalisation, scale={**(trained or {}), **data.scale})
    new = [] if not trained else [kind for kind in seen.kinds if kind not in {**trained, **(data.scale or {})}]
    if not new:
        return normalisation, []
    theirs = ", ".join(f"{kind} divided by {one:g}" for kind, one in (trained or {}).items())
    ours = ", ".join(f"{kind} divided by {normalisation.one(np.dtype(kind)):g}" for kind in new)
    return normalisation, [f"{ours} for a model trained on {theirs}; --data.scale sets another divisor"]


def with_channels(source: Source, seen: Probe, channels: int) -> Source:
    """The images with the model's number of channels; ConfigError where that cannot be."""
    try:
        return fit_channels(source, seen, channels)
    except ConfigError as error:
        raise ConfigError(error.problem, f"give images that have, or convert to, {channels} channels") from error


def hold_if_it_fits(source: Source, limit: float, bad: BadFiles, progress: Progress | None) -> Held | None:
    """The images in memory, if they take less than `limit` bytes and are of one size."""
    if len(probe(source).sizes) > 1:
        return None
    try:
        return hold(source, limit, bad, progress)
    except DoesNotFitError:
        return None
