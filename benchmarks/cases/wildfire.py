"""Burned areas in Sentinel-2 tiles of five bands, fires of the test apart from those of the training.

    python benchmarks/cases/wildfire.py s2-wildfire

Pre-training sees all tiles of the training fires; the masks are those of tiles after a fire.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main, read_table, write_table


def prepare(data: Path, work: Path) -> None:
    """Lists: unlabelled.csv, and burned.csv with masks and splits."""
    rows = read_table(data / "labels.csv")
    write_table(
        work / "unlabelled.csv", ("image",), [(data / row["image"],) for row in rows if row["split"] == "train"]
    )
    after = [(data / row["image"], data / row["mask"], row["split"]) for row in rows if row["phase"] == "post"]
    write_table(work / "burned.csv", ("image", "mask", "split"), after)


CASE = Case(
    "wildfire",
    prepare,
    {
        "data": {"source": "unlabelled.csv", "val": "none", "window": (32, 32)},
        "recipe": "cifar10-cpu",
        "model": {"input_size": (32, 32), "patch_size": (4, 4)},
    },
    {
        "burned": (
            {"data": "burned.csv", "method": "segmentation"},
            {"burned area, IoU, %": "segmentation_foreground", "mean IoU, %": "segmentation_miou"},
        )
    },
    picture="pictures/segmentation.png",
)

if __name__ == "__main__":
    main(CASE, __doc__)
