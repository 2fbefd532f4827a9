"""Nuclei of cells: the foreground of microscope pictures, with 40 and with all masks (BBBC038, CC0).

    python benchmarks/cases/nuclei.py dsb2018-nuclei

Every fourth picture is for the test. Pre-training sees those of the others, without their masks.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main, read_table, write_table

FEW = 40


def prepare(data: Path, work: Path) -> None:
    """Lists: unlabelled.csv; few.csv and all.csv with masks and splits."""
    rows = sorted(read_table(data / "labels.csv"), key=lambda row: (row["type"], row["image"]))
    train, test = [row for i, row in enumerate(rows) if i % 4], rows[::4]
    few = [train[i * len(train) // FEW] for i in range(FEW)]
    write_table(work / "unlabelled.csv", ("image",), [(data / row["image"],) for row in train])
    for name, kept in (("few", few), ("all", train)):
        splits = [*((row, "train") for row in kept), *((row, "test") for row in test)]
        named = [(data / row["image"], data / row["mask"], split) for row, split in splits]
        write_table(work / f"{name}.csv", ("image", "mask", "split"), named)


def masks(name: str) -> dict[str, object]:
    return {"data": f"{name}.csv", "method": "segmentation", "segmentation": {"instances": True}}


def shown(count: int) -> dict[str, str]:
    figures = {"nuclei, IoU": "segmentation_foreground", "mean IoU": "segmentation_miou"}
    return {f"{label}, {count} masks, %": figure for label, figure in figures.items()}


CASE = Case(
    "nuclei",
    prepare,
    {"data": {"source": "unlabelled.csv", "val": "none"}, "recipe": "microscopy"},
    {
        "40 masks": (masks("few"), shown(FEW)),
        "all masks": (masks("all"), shown(213)),
    },
    chinese={"nuclei, IoU, ": "细胞核 IoU，", "mean IoU, ": "平均 IoU，", " masks, %": " 张掩码，%"},
    picture="pictures/segmentation.png",
)

if __name__ == "__main__":
    main(CASE, __doc__)
