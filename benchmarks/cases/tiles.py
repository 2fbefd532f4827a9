"""Surfaces of magnetic tiles: defects that are found from pictures without any.

    python benchmarks/cases/tiles.py magnetic-tile

Pre-training and the comparison see pictures without defects alone; a fifth of the tiles of these, and all pictures with
defects, are for the test. Several pictures show one tile: they stay together.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main

from torchmae.config.data import DataOptions
from torchmae.data.items import Context
from torchmae.data.layouts import open_splits
from torchmae.data.loader import hold_out

TILE = r"num_(\d+)"


def prepare(data: Path, work: Path) -> None:
    """Links to the data, and in unlabelled.txt the pictures without defects that the comparison learns from."""
    (work / "data").mkdir()  # apart from the runs, whose pictures are no data
    for name in ("images", "masks"):
        (work / "data" / name).symlink_to(data / name)
    context = Context.of(DataOptions(source=str(data / "images" / "free"), group=TILE))
    source = open_splits(str(data / "images" / "free"), context)["train"]
    kept, _ = hold_out(source, DataOptions().val_size)
    names = [str(data / "images" / "free" / Path(source.name(int(i))).name) for i in kept]
    (work / "unlabelled.txt").write_text("\n".join(names) + "\n")


CASE = Case(
    "tiles",
    prepare,
    {
        "data": {"source": "unlabelled.txt", "val": "none", "window": (128, 128)},
        "recipe": "microscopy",
        "model": {"input_size": (128, 128), "patch_size": (16, 16)},
    },
    {
        "defects": (
            {
                "data": {"source": "data", "group": TILE},
                "method": "anomaly",
                "normal_classes": "free",
            },
            {
                "image AUROC, mean over patches, %": "anomaly_patch_knn",
                "image AUROC, worst patch, %": "anomaly_patch_knn_max",
                "pixel AUROC, %": "anomaly_patch_knn_pixel",
                "AUPRO, %": "anomaly_patch_knn_aupro",
            },
        )
    },
    chinese={
        "image AUROC, mean over patches": "图像 AUROC，图像块平均",
        "image AUROC, worst patch": "图像 AUROC，最异常的图像块",
        "pixel AUROC": "像素 AUROC",
        ", %": "，%",
    },
    picture="pictures/anomaly.png",
)

if __name__ == "__main__":
    main(CASE, __doc__)
