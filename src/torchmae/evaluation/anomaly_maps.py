"""Anomaly maps of whole pictures: how well they agree with masks, as files, and as a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from torchmae.data.items import Progress
from torchmae.errors import DataError
from torchmae.evaluation.anomaly_data import AnomalyData
from torchmae.evaluation.inpainting import LINEAR
from torchmae.files import replace_file
from torchmae.report.feature_pictures import anomaly_picture
from torchmae.report.panels import Look
from torchmae.report.pictures import save_png

if TYPE_CHECKING:
    from torchmae.evaluation.anomaly import Detection

FloatArray = npt.NDArray[np.float32]

BINS = 2**14
"""Largest number of different scores of pixels."""
FPR_LIMIT = 0.3
"""AUPRO is the area up to this false positive rate (Bergmann et al. 2021, section 5.1)."""
PICTURED = 8


def map_of(detection: Detection, name: str, place: int) -> Tensor:
    """The anomaly map of the image at `place` in `Detection.rows`, in its own size: patches upsampled linearly.

    Where windows overlap, it is their mean.
    """
    row = int(detection.rows[place])
    total = torch.zeros(detection.grid.size(row))
    times = torch.zeros_like(total)
    images = detection.grid.indices[detection.windows.numpy()]
    for window in np.flatnonzero(images == row).tolist():
        region = detection.grid.region(int(detection.windows[window]))
        lengths = [length for _, length in region]
        patches = detection.maps[name][window][None, None]
        part = tuple(slice(start, start + length) for start, length in region)
        total[part] += F.interpolate(patches, size=lengths, mode=LINEAR[len(lengths)], align_corners=False)[0, 0]
        times[part] += 1
    return total / times


def pixel_figures(data: AnomalyData, detection: Detection, progress: Progress) -> dict[str, float]:
    """How well each map finds the pixels of the masks, over all test images whose pixels count.

    Returns:
        anomaly_NAME_pixel, the area under the ROC curve of all pixels, and anomaly_NAME_aupro, the mean over the
        connected regions of the masks of the share that is found, as an area over false positive rates up to
        `FPR_LIMIT`, divided by it (Bergmann et al. 2021). Scores are rounded to `BINS` quantiles.

    Raises:
        DataError: no pixel of the images that could be read is a defect, or every one is.
    """
    from scipy import ndimage

    edges = {name: torch.from_numpy(_quantiles(values.numpy())) for name, values in detection.maps.items()}
    counts = {name: np.zeros((3, BINS + 1)) for name in detection.maps}  # normal pixels, defects, regions
    for place, row in enumerate(detection.rows.tolist()):
        progress("comparing maps with masks", place + 1, len(detection.rows))
        if row in data.unscored:
            continue
        defect = data.defect(row, detection.grid.size(row))
        regions, _ = ndimage.label(defect, np.ones((3, 3)))
        weights = 1 / np.bincount(regions[defect], minlength=1).clip(min=1)
        for name, kept in counts.items():
            scores = torch.bucketize(map_of(detection, name, place), edges[name]).numpy()
            kept[0] += np.bincount(scores[~defect], minlength=BINS + 1)
            kept[1] += np.bincount(scores[defect], minlength=BINS + 1)
            kept[2] += np.bincount(scores[defect], weights[regions[defect]], minlength=BINS + 1)
    figures = {}
    for name, (normal, defects, of_regions) in counts.items():
        if not normal.any() or not defects.any():
            found = "none" if normal.any() else "each"
            raise DataError(f"of the pixels of the test images, {found} is a defect", "give other masks")
        figures[f"anomaly_{name}_pixel"] = area(normal, defects)
        figures[f"anomaly_{name}_aupro"] = area(normal, of_regions, FPR_LIMIT)
    return figures


def _quantiles(values: FloatArray) -> FloatArray:
    """At most `BINS` rising scores that divide the patches evenly."""
    return np.unique(np.quantile(values, np.linspace(0, 1, BINS)).astype(np.float32))


def area(normal: npt.NDArray[np.float64], defects: npt.NDArray[np.float64], limit: float = 1.0) -> float:
    """Area under the ROC curve up to the false positive rate `limit`, divided by it.

    `normal` and `defects` are the weight of each score, by rising scores.
    """
    from sklearn.metrics import roc_auc_score

    truth, scores = np.repeat([0, 1], len(normal)), np.tile(np.arange(len(normal)), 2)
    weights = np.concatenate([normal, defects])
    found = float(roc_auc_score(truth, scores, sample_weight=weights, max_fpr=limit if limit < 1 else None))
    if limit == 1:
        return found
    least = limit / 2  # scikit-learn maps [least, 1] to [0.5, 1] (McClish 1989)
    return least + (2 * found - 1) * (1 - least)


# Files.


def write_files(
    out: Path, data: AnomalyData, detection: Detection, look: Look, *, every_map: bool = False
) -> list[str]:
    """Writes anomaly_scores.csv, and pictures/anomaly.png with maps of the most unusual test images.

    With `every_map`, also anomaly_maps/ROW_STEM_NAME.png of every test image, 8-bit. Returns the names.

    Raises:
        CheckpointError: they cannot be written.
    """
    write_scores(out / "anomaly_scores.csv", data, detection)
    limits = {name: np.percentile(values.numpy(), [1, 99.9]) for name, values in detection.maps.items()}

    def shown(name: str, place: int) -> FloatArray:
        """A flat map in [0, 1]: 0 is the 1st percentile of the patches of all test images, 1 the 99.9th."""
        low, high = limits[name]
        scaled = ((map_of(detection, name, place).numpy() - low) / max(high - low, 1e-12)).clip(0, 1)
        return Look(look.kind).flat(scaled[None, None])[0, 0]

    places = detection.scores["patch_knn"].argsort(descending=True, stable=True)[:PICTURED].tolist()
    pictures, masks, words, normalisation = [], [], [], data.test.normalisation
    for place in places:
        row = int(detection.rows[place])
        values, known = data.test.source.read_valid(row)
        valid = None if known is None else torch.from_numpy(known)[None, None]
        images = normalisation.apply(torch.from_numpy(values).movedim(-1, 0)[None], valid=valid)
        pictures.append(look.flat(normalisation.shown(images, valid))[0])
        masks.append(data.defect(row, detection.grid.size(row)) if data.masks else None)
        words.append(data.kinds[row] if data.kinds else ("normal", "anomalous")[int(detection.anomalous[place])])
    maps = {name: [shown(name, place) for place in places] for name in detection.maps}
    save_png(anomaly_picture(pictures, masks, maps, words, look.kind), out / "pictures" / "anomaly.png")
    if every_map:
        for place, row in enumerate(detection.rows.tolist()):
            for name in detection.maps:
                stem = f"{row:05d}_{Path(data.test.source.name(row)).stem}_{name}"
                pixels = np.round(255 * np.atleast_2d(shown(name, place)).clip(0, 1)).astype(np.uint8)
                save_png(Image.fromarray(pixels), out / "anomaly_maps" / f"{stem}.png")
    return ["pictures/anomaly.png", *(["anomaly_maps/"] if every_map else []), "anomaly_scores.csv"]


def write_scores(path: Path, data: AnomalyData, detection: Detection) -> None:
    """Writes a table of all test images: path, anomalous (0 or 1), and each score."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "anomalous", *detection.scores])
    columns = torch.stack(list(detection.scores.values()), dim=1).tolist()
    for row, values, anomalous in zip(detection.rows.tolist(), columns, detection.anomalous.tolist(), strict=True):
        table.writerow([data.test.source.name(row), int(anomalous), *(f"{value:.6g}" for value in values)])
    replace_file(path, text.getvalue().encode("utf-8"))
