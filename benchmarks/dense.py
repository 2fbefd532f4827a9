"""Detection and segmentation from a pre-trained backbone and from scratch: the figures of docs/dense.md.

    python benchmarks/dense.py --data ../shared/data/dsb2018-nuclei [--steps 150] [--minutes 3] [--seeds 2]

Splits the pictures, every fourth for testing, and follows the page for each seed; prints a table of means, spreads and
hardware. The defaults take about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "dense.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(r"^(from \w+(?: \w+)?) +(.+): ([\d.]+)$", re.MULTILINE)


def split(data: Path, folder: Path, most: int) -> None:
    """Links to the pictures and masks, as the page wants them."""
    for number, picture in enumerate(sorted((data / "images").glob("*.png"))[:most]):
        part = folder / "nuclei" / ("train" if number % 4 else "test")
        for place, file in (("images", picture), ("masks", data / "masks" / picture.name)):
            (part / place).mkdir(parents=True, exist_ok=True)
            (part / place / file.name).symlink_to(file.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with images/ and masks/ of numbered objects")
    parser.add_argument("--pictures", type=int, default=80, help="pictures in all")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--minutes", type=float, default=3.0, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as name:
        split(options.data, Path(name), options.pictures)
        for kind, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
            if kind == "python":
                (Path(name) / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
                continue
            code = code.replace("--max-minutes 5", f"--max-minutes {options.minutes:g}")
            for seed in range(options.seeds if code.startswith("python") else 1):
                words = code.replace("400 0", f"{options.steps} {seed}")
                print(f"$ {words}", end="", flush=True)
                done = subprocess.run(
                    ["bash", "-ec", words], cwd=name, env=env, stdout=subprocess.PIPE, text=True, check=True
                )
                for start, figure, value in FIGURE.findall(done.stdout):
                    found[figure, start].append(float(value))
    print(
        f"\n{options.pictures} pictures, {options.minutes:g} minutes of pre-training, {options.steps} steps,", end=" "
    )
    print(f"{os.cpu_count()} cores, torch {torch.__version__}\n\n| | start | mean | lowest to highest |")
    print("|---|---|---|---|")
    for (figure, start), values in found.items():
        print(f"| {figure} | {start} | {statistics.mean(values):.3f} | {min(values):.3f} to {max(values):.3f} |")


if __name__ == "__main__":
    main()
