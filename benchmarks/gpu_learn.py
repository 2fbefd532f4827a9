"""CIFAR-10 accuracy in a few GPU minutes: pre-training, then fine-tuning with all labels, by the command line.

    python benchmarks/gpu_learn.py --data CIFAR10 --out FILE.json [--pretrain 4] [--finetune 2] [--keep FOLDER]
        [--scratch] [--try] [OPTIONS of torchmae pretrain]

ViT-Tiny/4 (5.4 M parameters) learns from the training images for `--pretrain` minutes, then a classifier is fine-tuned
for `--finetune` minutes, which are turned into epochs by the speed of one. Start-up, compilation and evaluation come on
top and are given too. `--scratch` fine-tunes a network without pre-training beside it, for as many epochs. The test
images are classified once, at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

from gpu_run import NETWORK, TRY, Stages, lines, pack, torchmae

PRETRAIN = [
    *NETWORK,
    *("--model.decoder", "cross", "--model.hog_weight", "3", "--optim.name", "muon", "--optim.base_lr", "3e-4"),
    *("--batch_size", "1024", "--compile", "true", "--data.crop_scale", "[0.4,1.0]", "--eval.count", "4"),
    *("--eval.knn_count", "4", "--eval.linear_train", "0", "--progress", "none", "--trackers", "none"),
]
FINETUNE = ["--finetune.batch_size", "512", "--finetune.base_lr", "1e-3", "--finetune.ema", "0.999"]


def epochs_for(minutes: float, run: Path, data: str, folder: Path, words: list[str]) -> int:
    """How many epochs of fine-tuning take so many minutes, by the speed of the second of two."""
    out = folder / "speed"
    torchmae("evaluate", run, "--method", "finetune", "--data", data, "--out", out, *words, "--finetune.epochs", 2)
    first, second = (line["seconds"] for line in lines(out, "epoch"))
    return max(2, int(minutes * 60 / (second - first)))


def main() -> None:
    """Runs both stages and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as torchmae reads it; empty: noise")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrain", type=float, default=4, help="minutes")
    parser.add_argument("--finetune", type=float, default=2, help="minutes")
    parser.add_argument("--keep", type=Path, help="a folder for the arrays and both runs")
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--try", action="store_true", dest="tried", help="tiny networks for a few seconds")
    args, rest = parser.parse_known_args()
    pretraining, tuning = [*PRETRAIN, *rest], [*FINETUNE, "--progress", "none"]
    if args.tried:
        args.pretrain, args.finetune = 0.02, 0.02
        pretraining += [*TRY, "--batch_size", "32"]
    else:
        tuning += ["--finetune.compile", "true"]
    note = Stages(args.out, pretraining=pretraining, tuning=tuning)
    with tempfile.TemporaryDirectory() as place:
        folder = args.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        data, run = pack(args.data, folder), folder / "run"
        note("pack")
        torchmae("pretrain", "--data", data, "--out", run, "--max-minutes", args.pretrain, *pretraining)
        trained = lines(run, "train")
        note(
            "pre-training",
            pretrain_seconds=trained[-1]["seconds"],
            pretrain_epochs=trained[-1]["epoch"],
            pretrain_images_per_s=median(line["images_per_s"] for line in trained),
            data_wait=median(line["data_wait"] for line in trained),
            knn=[line["knn"] for line in lines(run, "val") if "knn" in line],
            environment=json.loads((run / "environment.json").read_text()),
        )
        epochs = epochs_for(args.finetune, run, data, folder, tuning)
        note("measuring the speed of fine-tuning")
        for init in ("pretrained", *(["random"] if args.scratch else [])):
            out = folder / init
            words = [*tuning, "--finetune.init", init, "--finetune.epochs", epochs, "--out", out, "--json"]
            printed = torchmae("evaluate", run, "--method", "finetune", "--data", data, "--test-data", "test", *words)
            figures = json.loads(printed.splitlines()[-1])["figures"]["model"]
            note(
                f"fine-tuning, {init}",
                **{f"{init}_epochs": epochs, f"{init}_accuracy": figures["finetune"], init: figures},
            )


if __name__ == "__main__":
    main()
