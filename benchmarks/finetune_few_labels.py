"""Does pre-training help when labels are few? One recipe from pre-trained and from random weights, several draws.

    python benchmarks/finetune_few_labels.py --data PATH_OR_NAME --run RUN [--labels-per-class 100] [--seeds 3]
    python benchmarks/finetune_few_labels.py --data PATH --run RUN --minutes 9.9 --set epochs=14

With --minutes, RUN is pre-trained first by the recipe cifar10-cpu, and RUN-masked without its second stage, unless they
are there already; both are fine-tuned.
Every seed draws its own labelled images, order and augmentation, the same for both; it trains on them alone and
classifies the whole test split. "random, one rate" is the recipe from scratch without layer-wise decay, which was made
for pre-trained weights. The margin is that of pre-trained weights over the better of the two.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import torchmae
from torchmae.config.finetune import FinetuneConfig
from torchmae.training.saved_model import load_model

MASKED = "masked alone"
ROWS: dict[str, dict[str, Any]] = {
    "pretrained": {"init": "pretrained"},
    MASKED: {"init": "pretrained"},
    "random": {"init": "random"},
    "random, one rate": {"init": "random", "layer_decay": 1.0},
}


def pretrained(path: Path, data: str, minutes: float, **changed: Any) -> None:
    """Makes a run, or finishes it, and prints what it has learned."""
    if not path.exists():
        options = {"recipe": "cifar10-cpu", "max_minutes": minutes, "data.val_size": 5000}
        torchmae.pretrain(data, **options, **changed, out=str(path))
    elif not (path / "summary.json").exists():
        torchmae.pretrain(resume=path)
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    print(f"{path}: ", {name: summary[name] for name in ("images_seen", "explained_variance", "knn", "knn_untrained")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--labels-per-class", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="pre-train RUN and RUN-masked first, for so long each")
    parser.add_argument("--rows", nargs="+", choices=ROWS)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings such as epochs=50")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    given = {name: json.loads(value) for name, value in (item.split("=") for item in args.set)}
    masked = args.run.with_name(f"{args.run.name}-masked")
    if args.minutes is not None:
        pretrained(args.run, args.data, args.minutes)
        pretrained(masked, args.data, args.minutes, **{"refine.share": 0})
    _, description = load_model(args.run)
    size, channels = description.input_size, description.arguments["in_chans"]
    print(f"torch {torch.__version__}, {args.threads or 'all'} threads")
    print(f"{platform.platform()}")
    print(f"{FinetuneConfig(**given)}\n{FinetuneConfig(**given).for_input(size, channels)}\n")
    print(f"{'weights':18} {'seed':>4} {'top-1':>6} {'loss':>6} {'train s':>8}", flush=True)
    scores: dict[str, list[float]] = {}
    for row in args.rows or [row for row in ROWS if row != MASKED or args.minutes is not None]:
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as out:
                figures = torchmae.evaluate(
                    masked if row == MASKED else args.run,
                    args.data,
                    method="finetune",
                    test_data="test",
                    labels_per_class=args.labels_per_class,
                    draws=1,
                    finetune={**given, **ROWS[row]},
                    out=str(Path(out, "classifier")),
                    seed=seed,
                    threads=args.threads,
                )
            figures = {name.replace("_random", ""): value for name, value in figures.items()}
            scores.setdefault(row, []).append(figures["finetune"])
            print(
                f"{row:18} {seed:4} {figures['finetune']:6.2f} {figures['finetune_loss']:6.3f} "
                f"{figures['finetune_seconds']:8.1f}",
                flush=True,
            )
    print()
    for row, values in scores.items():
        deviation = stdev(values) if len(values) > 1 else float("nan")
        print(f"{row:18} top-1 {mean(values):.2f} ± {deviation:.2f} over {len(values)} seeds")
    others = [values for row, values in scores.items() if row.startswith("random")]
    if others and "pretrained" in scores:
        best = max(others, key=mean)
        margins = [a - b for a, b in zip(scores["pretrained"], best, strict=True)]
        print(f"margin {mean(margins):+.2f}, from {min(margins):+.2f} to {max(margins):+.2f}")


if __name__ == "__main__":
    main()
