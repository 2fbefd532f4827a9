"""Photographs of 64 pixels, 20 classes of Tiny ImageNet: classification with all labels and with 10 a class.

    python benchmarks/cases/photos.py tiny-imagenet-20 --minutes 15

The folder has train/CLASS (500 photographs each) and val/CLASS (50) of African elephant, alp, barn, bison, brown bear,
coral reef, dragonfly, freight car, jellyfish, king penguin, ladybug, lemon, lighthouse, lion, monarch, mushroom, red
panda, school bus, sports car and suspension bridge. Pre-training sees the 10,000 training photographs without their
labels; 1,000 others are for the test.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main


def prepare(data: Path, work: Path) -> None:
    """Links to the training and the test photographs."""
    (work / "train").symlink_to(data / "train")
    (work / "test").symlink_to(data / "val")


LABELLED = {"data": ".", "test_data": "test", "pool": "mean"}
PROBES = {**LABELLED, "method": "knn,linear"}
FEW = {"labels_per_class": 10, "draws": 1}


def tuned(init: str) -> dict[str, object]:
    """Options of a fine-tuning with 10 labels a class, kept in a folder of its own."""
    own = {"init": init, "epochs": 30, "batch_size": 32}
    return {
        "data": ".",
        "test_data": "test",
        **FEW,
        "method": "finetune",
        "finetune": own,
        "out": f"{init}-" + "{seed}",
    }


CASE = Case(
    "photos",
    prepare,
    {"data": {"source": "train", "val": "none"}, "recipe": "photos-64-cpu"},
    {
        "probes": (PROBES, {"kNN, %": "knn20", "linear probe, %": "linear_mean"}),
        "few": (
            {**PROBES, **FEW},
            {"kNN, 10 labels a class, %": "knn20", "linear probe, 10 labels a class, %": "linear_mean"},
        ),
        "tuned": (tuned("pretrained"), {"fine-tuned, 10 labels a class, %": "finetune"}),
        "tuned, untrained": (tuned("random"), {"fine-tuned, 10 labels a class, %": "finetune_random"}),
    },
    chinese={
        ", 10 labels a class, ": "，每类 10 个标签，",
        "linear probe": "线性探针",
        "fine-tuned": "微调",
        ", %": "，%",
    },
)

if __name__ == "__main__":
    main(CASE, __doc__)
