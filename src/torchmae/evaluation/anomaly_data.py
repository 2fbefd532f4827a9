"""The images of anomaly detection: normal ones, and test images marked as normal or anomalous."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.apart import check_apart
from torchmae.data.layouts import open_splits
from torchmae.data.sources import Source, Subset, relabelled
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.images import EvaluationData, ModelInput, image_sets

GOOD = "good"
"""The folder of normal test images, as in MVTec AD (Bergmann et al. 2019)."""


def open_anomaly_data(options: EvaluateOptions, model: ModelInput) -> EvaluationData:
    """Normal images as training images, and test images labelled 0 (normal) and 1 (anomalous).

    The options `normal` and `test` are what `torchmae pretrain --data` takes: of `normal` the training split, of
    `test` the test split, else val, else all. A class (sub-folder) of `test` is normal if its name is "good", a class
    of `normal`, or a folder with images of `normal`. With `normal_classes`, only these classes are normal, in both.

    Raises:
        ConfigError: images that do not fit the model, a class that does not exist, or the same images twice.
        DataError: data that is missing, without classes, or without normal or without anomalous images.
    """
    assert options.normal is not None and options.test is not None
    context = model.context(options.data)
    source, tests = open_splits(options.normal, context)["train"], open_splits(options.test, context)
    tested = next(tests[split] for split in ("test", "val", "train") if split in tests)
    fix = "other images to test"
    apart = check_apart(tested, source, f"test {options.test!r}", fix, progress=context.progress)
    if options.normal_classes is None:
        known, names = source, {GOOD} | folder_names(source)
    else:
        names = {name.strip() for name in options.normal_classes.split(",")}
        known = only_classes(source, sorted(names))
    sets, notes = image_sets([known, mark_anomalous(tested, names)], options.data, model)
    return EvaluationData(sets[0], sets[1], ("normal", "anomalous"), (*apart.notes, *notes), twins=apart.twins)


def only_classes(source: Source, names: Sequence[str]) -> Source:
    """The images of some classes; ConfigError for an unknown name."""
    known = class_list(source)
    for name in names:
        if name not in known:
            raise ConfigError(f"no class of the normal images is called {name!r}", f"choose from {', '.join(known)}")
    assert source.labels is not None and source.classes is not None
    wanted = [source.classes.index(name) for name in names]
    return Subset(source, np.flatnonzero(np.isin(source.labels, wanted)))


def folder_names(source: Source) -> set[str]:
    """The names of the classes; without classes, of the folders that hold the images."""
    return set(class_list(source)) or {Path(source.name(i)).parent.name for i in range(len(source))}


def class_list(source: Source) -> list[str]:
    """The names of the classes with images in this split."""
    if source.classes is None or source.labels is None:
        return []
    return [source.classes[label] for label in np.unique(source.labels) if label >= 0]


def mark_anomalous(source: Source, normal: set[str]) -> Source:
    """The images labelled 0 where the name of their class is in `normal`, else 1; DataError unless both occur."""
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
    return Subset(relabelled(source, marks, ("normal", "anomalous")), labelled)
