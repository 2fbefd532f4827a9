"""Burned areas in Sentinel-2 tiles of five bands, fires of the test apart from those of the training.

    python benchmarks/cases/wildfire.py s2-wildfire

Pre-training sees all tiles of the training fires; the masks are those of tiles after a fire.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main, read_table, write_table


def prepare(data: Path, work: Path) -> None:
    """Lists: unlabelled.csv; burned.csv with masks and splits; tiles.csv with labels, fires and splits."""
    rows = read_table(data / "labels.csv")
    write_table(
        work / "unlabelled.csv", ("image",), [(data / row["image"],) for row in rows if row["split"] == "train"]
    )
    after = [(data / row["image"], data / row["mask"], row["split"]) for row in rows if row["phase"] == "post"]
    write_table(work / "burned.csv", ("image", "mask", "split"), after)
    kinds = [(data / row["image"], ("intact", "burned")[int(row["burned"])], row["fire"], row["split"]) for row in rows]
    write_table(work / "tiles.csv", ("image", "label", "fire", "split"), kinds)


CASE = Case(
    "wildfire",
    prepare,
    {"data": {"source": "unlabelled.csv", "val": "none"}, "recipe": "satellite"},
    {
        "burned": (
            {"data": "burned.csv", "method": "segmentation"},
            {"burned area, IoU, %": "segmentation_foreground", "mean IoU, %": "segmentation_miou"},
        ),
        "tiles": (
            {"data": {"source": "tiles.csv", "group": "fire"}, "method": "knn,linear", "pool": "mean"},
            {"burned tiles, kNN, %": "knn20", "burned tiles, linear probe, %": "linear_mean"},
        ),
    },
    chinese={
        "burned area, IoU": "过火区 IoU",
        "mean IoU": "平均 IoU",
        "burned tiles, kNN": "过火图块，kNN",
        "burned tiles, linear probe": "过火图块，线性探针",
        ", %": "，%",
    },
    picture="pictures/segmentation.png",
)

if __name__ == "__main__":
    main(CASE, __doc__)
