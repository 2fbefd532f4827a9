"""What helps on CIFAR-10 in a short run on a processor? One option at a time, for the same number of images.

    python benchmarks/cifar10_trials.py --data FOLDER [--trials base hog3 ...] [--epochs 2] [--seed 0]

Each trial is `torchmae pretrain --recipe cifar10` with the options of its row, on all training images but 5,000, then
`torchmae evaluate --method knn` and `--method linear` on those 5,000, with 10,000 training images to vote and to fit.
No test image is read. docs/results.md has the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TRIALS: dict[str, str] = {
    "base": "",
    "hog1": "--model.hog_weight 1",
    "hog3": "--model.hog_weight 3",
    "mask60": "--mask.ratio 0.6",
    "mask85": "--mask.ratio 0.85",
    "crop2": "--data.crop_scale [0.2,1.0]",
    "bs64": "--batch_size 64",
    "bs256": "--batch_size 256",
    "d256": "--model.embed_dim 256 --model.num_heads 4",
    "d256r2": "--model.embed_dim 256 --model.num_heads 4 --model.mlp_ratio 2",
    "d256l4": "--model.embed_dim 256 --model.num_heads 4 --model.depth 4",
    "dec2": "--model.decoder_depth 2",
    "fw2": "--model.decoder_depth 2 --model.feature_weights true",
    "pred50": "--model.predict_ratio 0.5",
    "self": "--model.decoder self",
    "adamw": "--optim.name adamw --optim.base_lr 3e-3",
    "blr3": "--optim.base_lr 3e-3",
    "mlr1e-2": "--optim.muon_lr 1e-2",
    "rawpix": "--model.target.norm_pix false",
    "ratio85": "--mask.final_ratio 0.85",
    "small24": "--start_size 24 --start_share 0.5",
    "repeats2": "--data.repeats 2",
    # The paper's network and optimiser at this size: what `benchmarks/step.py` sets the recipe beside.
    "paper": "--model.depth 12 --model.decoder self --model.decoder_embed_dim 192 --model.decoder_depth 4 "
    "--model.decoder_num_heads 3 --optim.name adamw --optim.base_lr 1e-3 --batch_size 256",
}


def command(*words: str) -> str:
    """Runs `torchmae` and gives what it printed."""
    done = subprocess.run([sys.executable, "-m", "torchmae", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"torchmae {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def probe(run: Path, data: str) -> dict[str, float]:
    """kNN and linear accuracy on the images that pre-training set aside, in percent."""
    figures: dict[str, float] = {}
    for method in ("knn", "linear"):
        words = ("--method", method, "--data", data, "--train-images", "10000", "--test-data", "held-out", "--json")
        printed = command("evaluate", str(run), *words).splitlines()[-1]
        figures |= next(iter(json.loads(printed)["figures"].values()))
    return figures


def main() -> None:
    """Prints one line per trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", nargs="*", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="instead of epochs: the same time for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs; those that are there are only evaluated")
    args = parser.parse_args()
    length = ["--max-minutes", str(args.minutes)] if args.minutes else ["--epochs", str(args.epochs)]
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.trials:
            run = (args.keep or Path(temporary)) / name
            if not run.exists():
                command(
                    *("pretrain", "--recipe", "cifar10", "--data", args.data, "--data.val_size", "5000", *length),
                    *("--eval.count", "1", "--seed", str(args.seed), "--out", str(run), *TRIALS[name].split()),
                )
            done = json.loads((run / "summary.json").read_text())
            print(name, TRIALS[name] or "-", json.dumps({"summary": done, "probes": probe(run, args.data)}), flush=True)


if __name__ == "__main__":
    main()
