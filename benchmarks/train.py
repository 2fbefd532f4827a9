"""The training loop beside the bare step: what loading, logging and Python cost.

    python benchmarks/train.py --data PATH [--recipe cifar10] [--quick] [OPTIONS]

Figures go to benchmarks/results/train.json, with date, hardware and versions. Further options go to the settings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from torchmae import settings
from torchmae.config.bench import BenchTrain
from torchmae.threads import wait_briefly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps: to see it work")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train.json")
    args, rest = parser.parse_known_args()
    wait_briefly(os.environ)  # as the command line does, before torch is imported
    from torchmae.bench.train import measure_train
    from torchmae.training.progress import Display

    options = BenchTrain(rounds=2, steps=3) if args.quick else BenchTrain()
    config = settings.parse([f"--data={args.data}", *rest], args.recipe)
    display = Display("auto")
    report = measure_train(config, options, display.preparing)
    display.close()
    report.add_to_json(args.out, args.recipe)
    print(report.text())


if __name__ == "__main__":
    main()
