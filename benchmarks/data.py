"""Loading images beside Pillow and torchvision's transforms, over the same files.

    python benchmarks/data.py --data FOLDER [--recipe images] [--quick] [OPTIONS]

Once in one process, once with a worker a core; torchmae also from memory, where the images are of one size. Figures
are added to benchmarks/results/data.json, with date, hardware and versions. Further options go to the settings.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from torchmae import settings
from torchmae.config import PretrainConfig
from torchmae.config.bench import BenchData
from torchmae.threads import wait_briefly

CASES = {
    "one process": (["--data.cache=none", "--data.num_workers=0"], "torchvision"),
    "all cores": (["--data.cache=none"], "torchvision"),
    "memory": ([], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="images")
    parser.add_argument("--quick", action="store_true", help="1 round of 2 batches: to see it work")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "data.json")
    args, rest = parser.parse_known_args()
    wait_briefly(os.environ)  # as the command line does, before torch is imported
    from torchmae.bench.data import measure_data
    from torchmae.training.progress import Display

    display = Display("auto")
    for case, (words, against) in CASES.items():
        config: PretrainConfig = settings.parse([f"--data={args.data}", *words, *rest], args.recipe)
        options = BenchData(rounds=1, batches=2, against=against) if args.quick else BenchData(against=against)
        report = measure_data(config, options, display.preparing)
        display.close()
        report.add_to_json(args.out, case)
        print(f"\n{case}: {report.text()}\n", flush=True)


if __name__ == "__main__":
    main()
