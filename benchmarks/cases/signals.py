"""Heart beats of ventricular origin in windows of five seconds of ECG, by record (MIT-BIH, ODC-BY).

    python benchmarks/cases/signals.py ecg-mitbih

Three records of twelve are for the test. Pre-training sees the windows of the others without their labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from case import Case, main

TEST = (119, 123, 200)
RATE = 360


def prepare(data: Path, work: Path) -> None:
    """WAV files of 16 bits, data/SPLIT/CLASS/RECORD-NUMBER.wav."""
    stored = np.load(data / "windows.npz")
    for number, (values, beat, record) in enumerate(zip(stored["X"], stored["y"], stored["record"], strict=True)):
        place = work / "data" / ("test" if record in TEST else "train") / ("ventricular" if beat else "others")
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{record}-{number:04}.wav", values[0], RATE, subtype="PCM_16")


BEATS = {"source": "data", "group": r"/(\d+)-"}
PROBES = {"kNN, mean of the classes, %": "knn20_macro", "linear probe, mean of the classes, %": "linear_mean_macro"}
CASE = Case(
    "signals",
    prepare,
    {"data": {**BEATS, "val": "none"}, "recipe": "signals"},
    {
        "beats": ({"data": BEATS, "method": "knn,linear", "pool": "mean"}, PROBES),
    },
    chinese={", mean of the classes, %": "，各类平均，%", "linear probe": "线性探针"},
)

if __name__ == "__main__":
    main(CASE, __doc__)
