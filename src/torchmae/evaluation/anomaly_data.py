"""The images of anomaly detection: which are normal, which are to be tested, and which of those are anomalous."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from torchmae.config.data import DataOptions
from torchmae.data.formats import Context, Progress
from torchmae.data.layouts import open_splits
from torchmae.data.opening import check_apart
from torchmae.data.reading import BadFiles, probe
from torchmae.data.sources import Source, Subset
from torchmae.data.transforms import Normalisation
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.images import ImageSet, check_sizes, with_channels

GOOD = "good"
"""The folder of normal images among others to test, as in MVTec AD (Bergmann et al. 2019)."""


def open_anomaly_data(
    normal: str,
    test: str,
    normal_classes: Sequence[str] | None = None,
    *,
    options: DataOptions,
    input_size: tuple[int, ...],
    channels: int,
    normalisation: Normalisation,
    device: torch.device,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The normal images, and those to test, labelled 0 for normal and 1 for anomalous.

    Args:
        normal: what `torchmae pretrain --data` takes; its training split.
        test: likewise; its test split, else val, else all of it. A class (sub-folder) is normal when it is named
            "good", or as a class of `normal`, or as a folder that images of `normal` lie in; any other is anomalous.
        normal_classes: take only these classes of `normal`; then these alone are the normal ones of `test`.
        options: how images are read.
        input_size: pixels along each axis of the model's input.
        channels: that the model takes.
        normalisation: that it was trained with.
        device: where batches go.
        batch_size: images in a batch.
        progress: told how far indexing and reading are.

    Raises:
        ConfigError: images that do not fit the model, a class that does not exist, or the same images twice.
        DataError: data that is missing, without classes, or without normal or without anomalous images.
    """
    context = Context.of(options, spatial_dims=len(input_size), progress=progress)
    sources, tests = open_splits(normal, context), open_splits(test, context)
    split = next(name for name in ("test", "val", "train") if name in tests)
    check_apart(tests[split], sources["train"], f"test {test!r} has no test split, and", "other images to test")
    known = sources["train"] if normal_classes is None else only_classes(sources["train"], normal_classes)
    names = {GOOD} | folder_names(known) if normal_classes is None else set(normal_classes)
    pair = []
    for source in (known, mark_anomalous(tests[split], names)):
        seen = probe(source)
        fitting = with_channels(source, seen, channels)
        check_sizes(seen, fitting, input_size)
        images = ImageSet(
            fitting,
            data=options,
            batch_size=batch_size,
            input_size=input_size,
            normalisation=normalisation,
            device=device,
            bad=BadFiles(len(fitting), options.max_bad),
            progress=progress,
        )
        pair.append(images)
    return pair[0], pair[1]


def only_classes(source: Source, names: Sequence[str]) -> Source:
    """The images of some classes; ConfigError for a name that is not one."""
    known = class_list(source)
    for name in names:
        if name not in known:
            raise ConfigError(f"no class of the normal images is called {name!r}", f"choose from {', '.join(known)}")
    assert source.labels is not None
    assert source.classes is not None
    wanted = [source.classes.index(name) for name in names]
    return Subset(source, np.flatnonzero(np.isin(source.labels, wanted)))


def folder_names(source: Source) -> set[str]:
    """The classes that the images are of; without any, the folders that they lie in."""
    return set(class_list(source)) or {Path(source.name(i)).parent.name for i in range(len(source))}


def class_list(source: Source) -> list[str]:
    """The names of the classes that have images here; those of another split do not count."""
    if source.classes is None or source.labels is None:
        return []
    return [source.classes[label] for label in np.unique(source.labels) if label >= 0]


def mark_anomalous(source: Source, normal: set[str]) -> Source:
    """The images labelled 0 where the name of their class is in `normal`, else 1.

    Raises:
        DataError: no classes, or none that is normal, or none that is not.
    """
    if source.classes is None or source.labels is None:
        raise DataError(
            f"the test images have no classes ({source.name(0)})",
            f"put normal ones in a folder named {GOOD}, and each kind of anomaly in one beside it",
        )
    is_normal = np.array([name in normal for name in source.classes])
    labelled = np.flatnonzero(source.labels >= 0)
    marks = np.where(is_normal[source.labels], 0, 1)
    if len(np.unique(marks[labelled])) < 2:
        found = "normal" if (marks[labelled] == 0).all() else "anomalous"
        raise DataError(
            f"the test images are all {found}: their classes are {', '.join(class_list(source))}",
            f"normal is what is named {', '.join(sorted(normal))}; give both kinds",
        )
    marked = Subset(source, np.arange(len(source)), marks, ("normal", "anomalous"))
    return Subset(marked, labelled)
