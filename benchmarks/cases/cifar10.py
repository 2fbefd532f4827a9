"""CIFAR-10: what ten minutes on two cores of a processor teach.

    python benchmarks/cases/cifar10.py FOLDER --minutes 9.9

FOLDER has a train and a test split with labels. Pre-training sees 45,000 training images without their labels; 10,000
of them vote and teach the probe, with labels, and 5,000 test images are classified.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main


def prepare(data: Path, work: Path) -> None:
    """A link to the data set, in any form that torchmae reads."""
    (work / "images").symlink_to(data)  # "cifar10" would be torchvision's set


PROTOCOL = {"method": "knn,linear", "test_data": "test", "train_images": 10_000, "test_images": 5_000}
CASE = Case(
    "cifar10",
    prepare,
    {"data": {"source": "images", "val_size": 5_000}, "recipe": "cifar10-cpu"},
    {
        "test": (
            PROTOCOL,
            {
                "kNN, k = 20, %": "knn20",
                "linear probe, C = 0.1, %": "linear_c0.1",
                "linear probe on class token and mean, %": "linear_both",
            },
        ),
    },
    chinese={
        "linear probe on class token and mean": "线性探针（类别 token 与均值）",
        "linear probe": "线性探针",
        ", k = 20, ": "，k = 20，",
        ", C = 0.1, ": "，C = 0.1，",
        ", %": "，%",
    },
)

if __name__ == "__main__":
    main(CASE, __doc__)
