"""What a data set of a million images costs before the first is read: seconds, and memory above that of torch.

    python benchmarks/million.py [--images 1000000] [--form csv|txt]

Writes a list of that many paths (no pixels, no files), then, in a fresh process that has imported torch and torchmae,
does what a run does before it reads: opens the list, holds out validation images, takes the fingerprint, draws the
order of the first epoch and the crops of the first batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("csv", "txt"), default="csv")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"images.{args.form}"
        write_list(path, args.images)
        command = [sys.executable, __file__, "--measure", str(path)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{args.images:,} images in a .{args.form} file")
    for name, seconds in result["seconds"].items():
        print(f"  {name:<22}{seconds:6.2f} s")
    print(f"  in all                {sum(result['seconds'].values()):6.2f} s")
    print(f"memory above torch: {result['peak_mb']:.0f} MB at the peak, {result['after_mb']:.0f} MB afterwards")


def write_list(path: Path, count: int) -> None:
    """Writes paths like ImageNet's: n01440764/n01440764_10026.JPEG, a thousand classes."""
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("path,label\n")
        for i in range(count):
            group = f"n{1440764 + i * 1000 // count:08d}"
            name = f"{group}/{group}_{i}.JPEG"
            file.write(f"{name},{group}\n" if path.suffix == ".csv" else f"{name}\n")


def measure(path: str) -> dict[str, object]:
    from torchmae.data.layouts import open_splits
    from torchmae.data.loader import Plan, Request, View, boxes_of, crop_numbers, hold_out
    from torchmae.data.sources import Subset

    before = resident()
    peak = [before]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name] = now - start
        start = now

    source = open_splits(path)["train"]
    lap("open the list")
    kept, held_out = hold_out(source, 2000)
    train, val = Subset(source, kept), Subset(source, held_out)
    lap("hold out")
    train.fingerprint()
    lap("fingerprint")
    plan = Plan(len(train), 256, 0)
    epoch, indices = plan.indices(0)
    lap("order of an epoch")
    view = View((224, 224), (0.2, 1.0), (0.75, 1.33), True)
    boxes_of(crop_numbers(Request(indices, 0, epoch), view), (256, 256), view)
    lap("crops of a batch")
    ended.set()
    watcher.join()
    assert len(train) + len(val) == len(source)
    return {
        "seconds": seconds,
        "peak_mb": (peak[0] - before) / 1e6,
        "after_mb": (resident() - before) / 1e6,
    }


def resident() -> int:
    """Bytes of this process that are in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
