"""Photographs of 64 pixels, 20 classes of Tiny ImageNet: classification with all labels and with 10 a class.

    python benchmarks/cases/photos.py tiny-imagenet-20

Pre-training sees the 10,000 training photographs without their labels; 1,000 others are for the test.
"""

from __future__ import annotations

from pathlib import Path

from case import Case, main


def prepare(data: Path, work: Path) -> None:
    """Links to the training and the test photographs."""
    (work / "train").symlink_to(data / "train")
    (work / "test").symlink_to(data / "val")


LABELLED = {"data": ".", "test_data": "test"}
FEW = {"labels_per_class": 10, "draws": 1}


def tuned(init: str, **options: object) -> dict[str, object]:
    """Options of a fine-tuning, kept in a folder of its own."""
    own = {"init": init, "epochs": 20 if options else 10}
    return {**LABELLED, **options, "method": "finetune", "finetune": own, "out": f"{init}-{len(options)}-" + "{seed}"}


CASE = Case(
    "photos",
    prepare,
    {
        "data": {"source": "train", "val": "none"},
        "recipe": "cifar10-cpu",
        "model": {"input_size": (64, 64), "patch_size": (8, 8)},
    },
    {
        "probes": (
            {**LABELLED, "method": "all"},
            {"kNN, %": "knn20", "linear probe, %": "linear_mean"},
        ),
        "few": (
            {**LABELLED, **FEW, "method": "all"},
            {"kNN, 10 labels a class, %": "knn20", "linear probe, 10 labels a class, %": "linear_mean"},
        ),
        "tuned": (tuned("pretrained"), {"fine-tuned, %": "finetune"}),
        "tuned, untrained": (tuned("random"), {"fine-tuned, %": "finetune_random"}),
        "few, tuned": (tuned("pretrained", **FEW), {"fine-tuned, 10 labels a class, %": "finetune"}),
        "few, tuned, untrained": (tuned("random", **FEW), {"fine-tuned, 10 labels a class, %": "finetune_random"}),
    },
)

if __name__ == "__main__":
    main(CASE, __doc__)
