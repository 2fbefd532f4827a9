"""Ultrasound of the lung: healthy or not, from clips of other patients (POCUS data set, Born et al. 2021; CC BY-NC).

    python benchmarks/cases/video.py lung-ultrasound

Every third group of clips is for the test: a group is what comes from one patient or publication. Pre-training sees the
clips of the others without their labels.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main, read_table, write_table


def prepare(data: Path, work: Path) -> None:
    """Lists: unlabelled.csv, and clips.csv with classes, groups and splits."""
    rows = [row for row in read_table(data / "labels.csv") if (data / row["file"]).exists()]
    kinds = {row["group"]: row["label"] == "regular" for row in rows}
    groups = sorted(kinds, key=lambda group: (kinds[group], group))
    test = set(groups[::3])
    trained = [row for row in rows if row["group"] not in test]
    write_table(work / "unlabelled.csv", ("file",), [(data / row["file"],) for row in trained])
    splits = [(row, "test" if row["group"] in test else "train") for row in rows]
    clips = [
        (data / row["file"], "healthy" if kinds[row["group"]] else "ill", row["group"], split) for row, split in splits
    ]
    write_table(work / "clips.csv", ("file", "label", "group", "split"), clips)


CLIPS = {"source": "clips.csv", "group": "group"}
PROBES = {"kNN, mean of the classes, %": "knn10_macro", "linear probe, mean of the classes, %": "linear_mean_macro"}
CASE = Case(
    "video",
    prepare,
    {"data": {"source": "unlabelled.csv", "val": "none"}, "recipe": "video"},
    {
        "clips": ({"data": CLIPS, "method": "knn,linear", "pool": "mean"}, PROBES),
    },
    chinese={", mean of the classes, %": "，各类平均，%", "linear probe": "线性探针"},
)

if __name__ == "__main__":
    main(CASE, __doc__)
