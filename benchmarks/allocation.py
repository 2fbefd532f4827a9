"""What does it cost that the allocator gives freed memory back after each step? Images a second and page faults.

    python benchmarks/allocation.py [--rounds 3] [--steps 8]

Each round starts a process for every network, with glibc's usual behaviour and with `keep_freed_memory`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CASES = {
    "cifar10 recipe, bf16": ("cifar10", []),
    "ViT-Tiny/4, batch 256, bf16": (None, ["--model.preset=vit_tiny_32_p4", "--batch_size=256"]),
    "ViT-Tiny/4, batch 256, fp32": (None, ["--model.preset=vit_tiny_32_p4", "--batch_size=256", "--precision=fp32"]),
    "ViT-B/16, batch 8, bf16": (None, ["--model.preset=vit_base", "--batch_size=8"]),
    "ViT-B/16, batch 8, fp32": (None, ["--model.preset=vit_base", "--batch_size=8", "--precision=fp32"]),
}


def measure(case: str, keep: bool, steps: int) -> None:
    """Prints images a second (median step) and page faults of a step, as JSON; for a process of its own."""
    import os

    from torchmae.machine import wait_briefly

    wait_briefly(os.environ)
    from torchmae import settings
    from torchmae.bench.contenders import OURS, build
    from torchmae.training import runtime

    if not keep:
        runtime.keep_freed_memory = lambda: False
    recipe, options = CASES[case]
    contender = build(OURS, settings.parse(options, recipe))
    for _ in range(3):
        contender.run()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        contender.run()
        seconds.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(json.dumps([len(contender.images) / statistics.median(seconds), faults / steps]))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "KEEP"), help="used by the script itself")
    args = parser.parse_args()
    if args.one:
        measure(args.one[0], args.one[1] == "True", args.steps)
        return
    print(f"{'':30}{'usual':>10}{'kept':>10}{'ratio':>8}{'page faults a step':>28}")
    for case in CASES:
        found: dict[bool, list[list[float]]] = {False: [], True: []}
        for _ in range(args.rounds):
            for keep in found:
                words = [sys.executable, __file__, "--steps", str(args.steps), "--one", case, str(keep)]
                printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
                found[keep].append(json.loads(printed.splitlines()[-1]))
        usual, kept = ([statistics.median(column) for column in zip(*found[keep], strict=True)] for keep in found)
        faults = f"{usual[1]:,.0f} -> {kept[1]:,.0f}"
        print(f"{case:30}{usual[0]:10.1f}{kept[0]:10.1f}{kept[0] / usual[0]:8.2f}{faults:>28}", flush=True)


if __name__ == "__main__":
    main()
