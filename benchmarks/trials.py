"""What teaches more in the same time? A recipe with one change at a time, several seeds each.

    python benchmarks/trials.py cifar10 FOLDER [--trials base hog3 ...] [--minutes 2] [--seeds 3]
    python benchmarks/trials.py photos tiny-imagenet-20/train

Each trial is `torchmae pretrain` with the recipe of the data set and the options of its row, on all training images but
some, and then kNN and the linear probe on those; no test image is read. Seeds come one after the other, so that all
trials have as many wherever it stops. What is there already is not run again. Without --trials all are run, which takes
hours. benchmarks/results/trials has every figure, with the hardware and versions of the last call. The table is
printed, and written into docs/results.md where that has a place for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torchmae

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "cases"))
from case import between, cell, environment  # noqa: E402

RESULTS = HERE / "results" / "trials"
PAGE = HERE.parent / "docs" / "results.md"


class Set(NamedTuple):
    """A data set: the recipe that is changed, the images set aside, and those that vote and that probes learn from."""

    recipe: str
    held_out: int
    train_images: int


SETS = {
    "cifar10": Set("cifar10", 5000, 10_000),
    "cifar10-cpu": Set("cifar10-cpu", 5000, 10_000),
    "photos": Set("photos-64-cpu", 1000, 9_000),
    "digits": Set("digits", 300, 100),  # to try the program
}
TRIALS: dict[str, dict[str, Any]] = {
    "base": {},
    "hog0": {"model.hog_weight": None},
    "hog1": {"model.hog_weight": 1},
    "hog3": {"model.hog_weight": 3},
    "mask60": {"mask.ratio": 0.6},
    "mask85": {"mask.ratio": 0.85},
    "ratio85": {"mask.final_ratio": 0.85, "compile": False},
    "cells2": {"mask.strategy": "cells2"},
    "crop2": {"data.crop_scale": (0.2, 1.0)},
    "bs32": {"batch_size": 32},
    "bs64": {"batch_size": 64},
    "bs256": {"batch_size": 256},
    "d128l4": {"model.embed_dim": 128, "model.num_heads": 4, "model.depth": 4},
    "l4": {"model.embed_dim": 192, "model.num_heads": 3, "model.depth": 4},
    "d256": {"model.embed_dim": 256, "model.num_heads": 4},
    "d256r2": {"model.embed_dim": 256, "model.num_heads": 4, "model.mlp_ratio": 2},
    "d256l4": {"model.embed_dim": 256, "model.num_heads": 4, "model.depth": 4},
    "dec2": {"model.decoder_depth": 2},
    "fw2": {"model.decoder_depth": 2, "model.feature_weights": True},
    "pred50": {"model.predict_ratio": 0.5},
    "self": {"model.decoder": "self"},
    "adamw": {"optim.name": "adamw", "optim.base_lr": 3e-3},
    "blr3": {"optim.base_lr": 3e-3},
    "mlr1e-2": {"optim.muon_lr": 1e-2},
    "rawpix": {"model.norm_pix": False},
    "small24": {"start_size": 24, "start_share": 0.5},
    "repeats2": {"data.repeats": 2, "refine.share": 0},
    "refine0": {"refine.share": 0},
    "refine20": {"refine.share": 0.2},
    "refine33": {"refine.share": 1 / 3},
    "refine40": {"refine.share": 0.4},
    "refine50": {"refine.share": 0.5},
    "refine95": {"refine.share": 0.95},
    "refine99": {"refine.share": 0.99},  # next to no masked pre-training before
    "contrast": {"refine.share": 0.99, "refine.masked_share": 0.001},  # and one image a step beside: views alone
    # Of a recipe that refines:
    "views2": {"refine.views": 2, "refine.mask_ratio": 0.5},
    "views8": {"refine.views": 8, "refine.mask_ratio": 0.875},
    "lr1": {"refine.lr_ratio": 1},
    "lr4": {"refine.lr_ratio": 4},
    "warm": {"refine.temperature": 0.2},
    "crops": {"refine.crop_scale": (0.2, 1.0)},
    "plain": {"refine.colour": 0, "refine.grey": 0},
    "vivid": {"refine.colour": 2},
    "few": {"refine.masked_share": 0.1},
    # The paper's network and optimiser at this size: what `benchmarks/step.py` sets the recipe beside.
    "paper": {
        "model.depth": 12,
        "model.decoder": "self",
        "model.decoder_embed_dim": 192,
        "model.decoder_depth": 4,
        "model.decoder_num_heads": 3,
        "optim.name": "adamw",
        "optim.base_lr": 1e-3,
        "batch_size": 256,
    },
}
COLUMNS = {"explained_variance": "explained variance, %", "knn20": "kNN, %", "linear_c0.1": "linear, %"}


def figures_of(run: Path, data: str, about: Set) -> dict[str, float]:
    """What a run has learned, and from how many images; accuracies in percent."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found = {name: float(summary[name]) for name in ("images_seen", "seconds", "explained_variance")}
    images = {"source": data, "val_size": about.held_out}
    for method in ("knn", "linear"):
        given = torchmae.evaluate(
            str(run), images, method=method, train_images=about.train_images, test_data="held-out"
        )
        found |= {name: value for name, value in given.items() if name in COLUMNS}
    return found


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """Mean and deviation over the seeds of each trial, with what it changes, as Markdown."""
    rows = [
        f"| trial | changed | images seen | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name, seeds in found.items():
        images = mean(seed["images_seen"] for seed in seeds)
        cells = [cell([seed.get(column) for seed in seeds]) for column in COLUMNS]
        rows.append(f"| `{name}` | {changes(name)} | {images:,.0f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def changes(name: str) -> str:
    """The options of a trial as they are typed."""
    options = TRIALS.get(name, {}).items()
    typed = (f"`--{option} {json.dumps(value, separators=(',', ':'))}`" for option, value in options)
    return " ".join(typed).replace('"', "") or "nothing"


def main() -> None:
    """Runs the trials and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("data", help="the data set, as for torchmae pretrain --data")
    parser.add_argument("--trials", nargs="*", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--minutes", type=float, default=2, help="of each training")
    parser.add_argument("--epochs", type=int, help="instead of minutes: as many images for all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("trials"), help="folder for the runs")
    args = parser.parse_args()
    about = SETS[args.set]
    length = {"epochs": args.epochs} if args.epochs else {"max_minutes": args.minutes}
    given: dict[str, Any] = {"recipe": about.recipe, "data.val": "held-out", "data.val_size": about.held_out}
    given["eval.count"] = 1
    together = f"{args.set}-{args.epochs}-epochs" if args.epochs else f"{args.set}-{args.minutes:g}-minutes"
    written: dict[str, Any] = {**length, "recipe": about.recipe, "environment": environment(), "trials": {}}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{together}.json"
    if path.exists():  # other trials stay
        written["trials"] = json.loads(path.read_text(encoding="utf-8"))["trials"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.trials}
    for seed in range(args.seeds):
        for name in args.trials:
            run = args.work / together / f"{name}-{seed}"
            kept = run / "trial.json"
            if not kept.exists():
                if run.exists():
                    torchmae.pretrain(resume=run)
                else:
                    options = {**given, **length, **TRIALS[name]}
                    torchmae.pretrain(args.data, **options, seed=seed, out=str(run))
                kept.write_text(json.dumps(figures_of(run, args.data, about)))
            found[name].append(json.loads(kept.read_text()))
            written["trials"][name] = found[name]
            path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between(page, f"trials {together}", table(written["trials"])), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
