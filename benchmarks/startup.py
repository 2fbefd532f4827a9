"""How long it takes until something happens.

    python benchmarks/startup.py [--rounds 7]

Prints medians of: `torchmae --help`; `import torchmae` after `import torch`; and from the command `torchmae pretrain`
(digits) to its first training step, less `import torch`. The programs of a round run one after the other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    programs: dict[str, Callable[[], float]] = {
        "torchmae --help": lambda: seconds("-m", "torchmae", "--help"),
        "python": lambda: seconds("-c", "pass"),
        "import torch": lambda: seconds("-c", "import torch"),
        "import torchmae": import_torchmae,
        "first step": first_step,
    }
    rounds = [{name: program() for name, program in programs.items()} for _ in range(args.rounds)]
    medians = {name: median(figures[name] for figures in rounds) for name in programs}
    for name, value in medians.items():
        print(f"{name:26} {value:6.3f} s")
    without = medians["first step"] - (medians["import torch"] - medians["python"])
    print(f"{'first step, without torch':26} {without:6.3f} s")


def seconds(*words: str) -> float:
    """Wall-clock time of a Python program."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def import_torchmae() -> float:
    """Seconds that `import torchmae` takes where torch is there already."""
    code = "import torch, time; start = time.perf_counter(); import torchmae; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def first_step() -> float:
    """Seconds from the command to the first line of metrics of training."""
    with tempfile.TemporaryDirectory() as place:
        metrics = Path(place) / "run" / "metrics.jsonl"
        words = ["-m", "torchmae", "pretrain", "--out", str(metrics.parent), "--log_every", "1", "--progress", "none"]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not (metrics.exists() and '"kind": "train"' in metrics.read_text(encoding="utf-8")):
                taken = time.perf_counter() - start
                if process.poll() is not None or taken > LIMIT_S:
                    raise SystemExit(f"torchmae pretrain took no step in {taken:.0f} s")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
