"""The images of anomaly detection: normal ones, and test images marked as normal or anomalous, perhaps with masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchmae.config.evaluate import EvaluateOptions
from torchmae.data.apart import Apart, check_apart
from torchmae.data.groups import shared_groups
from torchmae.data.items import Context, tracked
from torchmae.data.layouts import open_splits
from torchmae.data.opening import HELD_OUT, covering_windows, held_out_images, window_size
from torchmae.data.reading import probe
from torchmae.data.sources import Source, Subset, digest, relabelled
from torchmae.errors import ConfigError, DataError
from torchmae.evaluation.images import EvaluationData, ImageSet, ModelInput, fixed_part, fixed_rows, image_sets
from torchmae.evaluation.segmentation_data import Seen, look_at, read_mask

GOOD = "good"
"""The folder of normal test images, as in MVTec AD (Bergmann et al. 2019)."""
_SOFT = 127  # of masks with larger values: above it lies the inside of an object with soft edges


@dataclass(frozen=True)
class AnomalyData(EvaluationData):
    """Normal images as training images, and test images labelled 0 (normal) and 1 (anomalous).

    Attributes:
        kinds: the class of each test image, such as "good" or "crack"; empty: unknown.
        masks: the file of the mask of a test image, by row.
        unscored: rows of test images whose pixels enter no figure, because their masks are missing or unreadable.
        threshold: what is above it in a mask is a defect.
        window: size of the windows that cover each image at its own resolution; None, or 0 along an axis: the largest
            of the input's proportions.
        content: a digest of the masks; empty without masks.
    """

    kinds: tuple[str, ...] = ()
    masks: Mapping[int, Path] = field(default_factory=dict)
    unscored: frozenset[int] = frozenset()
    threshold: int = 0
    window: tuple[int, ...] | None = None
    content: str = ""

    @cached_property
    def normal_windows(self) -> ImageSet:
        """The windows that cover the normal images."""
        return self._in_windows(self.train)

    @cached_property
    def test_windows(self) -> ImageSet:
        """The windows that cover the test images."""
        return self._in_windows(self.test)

    def _in_windows(self, images: ImageSet) -> ImageSet:
        grid = covering_windows(images.source, images.model.input_size, self.window, images.model.progress)
        data = replace(images.data, window=self.window or "none")
        return replace(images, source=grid, data=data, images=grid.indices)

    def fingerprints(self) -> dict[str, str]:
        """As of `EvaluationData`, with the masks."""
        return super().fingerprints() | {"masks": self.content}

    def defect(self, row: int, size: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """(H, W) which pixels of a test image are a defect; DataError where its mask cannot be read."""
        if row not in self.masks:
            return np.zeros(size, dtype=np.bool_)
        return read_mask(self.masks[row], self.test.model.context(self.test.data))[0] > self.threshold


def open_anomaly_data(options: EvaluateOptions, model: ModelInput) -> AnomalyData:
    """Opens the normal images and the test images, and looks at all masks.

    The options `normal` and `test` (or `data`, which is both) are what `torchmae pretrain --data` takes: of `normal`
    the training split, of `test` the test split, else val, else all. `data` without a test split is divided: some of
    its normal images, and all others, are tested. A class (sub-folder) of `test` is normal if its name is "good", a
    class of `normal`, or a folder with images of `normal`. With `normal_classes`, only these classes are normal.

    Raises:
        ConfigError: images that do not fit the model, a class that does not exist, or the same images twice.
        DataError: data that is missing, without classes, or without normal or without anomalous images; a mask of
            another size than its picture, or of no picture; pictures without masks among those of a kind with masks.
    """
    context = model.context(options.data)
    if options.normal is None or options.test is None:
        splits = tests = model.splits(options.data)
        what, fix = "the test split", "other data"
    else:
        splits, tests = open_splits(options.normal, context), open_splits(options.test, context)
        what, fix = f"test {options.test!r} has no test split, and", "other images to test"
    source = splits["train"]
    names = set() if options.normal_classes is None else {name.strip() for name in options.normal_classes.split(",")}
    known = only_classes(source, sorted(names)) if names else source
    if splits is tests and splits.keys() == {"train"}:
        known, tested, names, apart = divided(source, names, options.data.val_size, context)
    else:
        tested = next(tests[split] for split in ("test", "val", "train") if split in tests)
        apart = check_apart(tested, source, what, fix, progress=context.progress)
        names = names or {GOOD} | folder_names(source)
    marked, kinds = mark_anomalous(tested, names)
    rows = fixed_rows(len(marked), options.test_images)
    pair = fixed_part(known, options.train_images), Subset(marked, rows)
    whole = replace(options.data, window="none", clip=None)  # windows are cut later
    sets, said = image_sets(pair, whole, model)
    notes = (*apart.notes, *(note for note in said if note.startswith("data:")))
    data = options.data if options.data.window != "auto" else replace(options.data, window=model.window)
    window = window_size(data, probe(sets[0].source), model.input_size)
    shown = tuple(kinds[row] for row in rows)
    opened = AnomalyData(sets[0], sets[1], ("normal", "anomalous"), notes, shown, window=window, twins=apart.twins)
    return opened if len(model.input_size) != 2 else with_masks(opened, tests, context)


def divided(source: Source, names: set[str], val_size: int, context: Context) -> tuple[Source, Source, set[str], Apart]:
    """Normal images to learn from, held-out ones together with all others to test, the names of normal, and what the
    normal images of both have in common."""
    names = names or {GOOD} & set(class_list(source))
    if not names or not class_list(source):
        listed = ", ".join(class_list(source)) or "it has none"
        raise DataError(
            f"the data has no test split, and which of its classes are normal is not known ({listed})",
            "give --normal-classes NAME, or --normal DIR --test DIR",
        )
    normal = only_classes(source, sorted(names))
    kept, held_out, apart = held_out_images({"train": normal}, HELD_OUT, val_size, context, "normal_classes")
    assert isinstance(normal, Subset) and isinstance(held_out, Subset) and source.labels is not None
    others = np.setdiff1d(np.flatnonzero(source.labels >= 0), normal.indices)
    tested = Subset(source, np.sort(np.concatenate([normal.indices[held_out.indices], others])))
    note = f"{len(held_out):,} of {len(normal):,} normal images are held out to test"
    return kept, tested, names, apart._replace(notes=(note, *apart.notes, *shared_groups(kept, tested)))


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


def mark_anomalous(source: Source, normal: set[str]) -> tuple[Source, list[str]]:
    """The images labelled 0 where the name of their class is in `normal`, else 1; and the class of each.

    Raises:
        DataError: not both occur.
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
    kinds = [source.classes[label] for label in source.labels[labelled]]
    return Subset(relabelled(source, marks, ("normal", "anomalous")), labelled), kinds


def with_masks(data: AnomalyData, tests: Mapping[str, Source], context: Context) -> AnomalyData:
    """The data with the masks of its test images, checked; a note on kinds of defects without masks."""
    source, labels = data.test.source, data.test.source.labels
    assert labels is not None
    if source.masks is None:
        return replace(data, notes=(*data.notes, "there are no masks: figures of images alone"))
    everything = (item.name(i) for item in tests.values() for i in range(len(item)))
    if alone := source.masks.alone(everything):
        raise DataError(
            f"{len(alone):,} masks are of no picture, such as {alone[0]}",
            "name test/KIND/x.png and ground_truth/KIND/x_mask.png alike, or remove the mask",
        )
    files = [source.masks.of(source.name(row)) for row in range(len(source))]
    masks = {row: file for row, file in enumerate(files) if file is not None and file.is_file()}
    without: dict[str, list[int]] = {}
    for row in np.flatnonzero(labels == 1).tolist():
        if row not in masks:
            without.setdefault(data.kinds[row], []).append(row)
    for kind, rows in without.items():
        if of_kind := sum(data.kinds[row] == kind for row in masks):
            raise DataError(
                f"{len(rows):,} pictures of {kind} have no mask, such as {source.name(rows[0])}, and {of_kind:,} have",
                "add their masks, or remove all masks of this kind",
            )
    notes = [f"no masks of {', '.join(without)}: they enter figures of images alone"] if without else []
    found = look_at(Subset(source, np.array([*masks])), [*masks.values()], context)
    unread, seen = [], []
    for row, item in zip(masks, tracked(found, context.progress, "masks", len(masks)), strict=True):
        if isinstance(item[1], Seen):
            seen.append(item[1])
        else:
            unread.append(row)
            data.test.bad.add(item[0], item[1])
    top = max((int(item.values.max()) for item in seen), default=0)
    if not top:
        raise DataError(f"all {len(seen):,} masks are empty", "defects are what is above 0 in a mask")
    return replace(
        data,
        notes=(*data.notes, *notes),
        masks=masks,
        unscored=frozenset([*unread, *(row for rows in without.values() for row in rows)]),
        threshold=_SOFT if top > _SOFT else 0,
        content=digest(item.content for item in seen),
    )
