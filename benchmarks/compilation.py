"""What does torch.compile take and give? Seconds of the first step, images a second, memory.

    python benchmarks/compilation.py [--cases vit_tiny vit_base vit_large] [--rounds 3] [OPTIONS]

Each round starts a process for every way, one after the other. In the first, the compiler has no cache. Further options
go to the settings.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

CASES = {
    "vit_tiny": ["--model.preset=vit_tiny_32_p4", "--batch_size=256"],
    "vit_base": ["--model.preset=vit_base", "--batch_size=8"],
    "vit_large": ["--model.preset=vit_large", "--batch_size=8"],
}
COMPILED = ["--compile=true"]
HALF = [*COMPILED, "--activation_memory_budget=0.5"]
NONE = [*COMPILED, "--activation_memory_budget=0"]
# Whether in blocks, and what else.
WAYS = {
    "eager": (False, []),
    "eager, checkpoint_activations": (False, ["--checkpoint_activations=true"]),
    "whole": (False, COMPILED),
    "whole, budget 0.5": (False, HALF),
    "whole, budget 0": (False, NONE),
    "blocks": (True, COMPILED),
    "blocks, budget 0.5": (True, HALF),
    "blocks, budget 0": (True, NONE),
}


def measure(case: str, way: str, steps: int, rest: list[str]) -> None:
    """Prints seconds of the first step, images a second and peak memory, as JSON; for a process of its own."""
    from torchmae.machine import wait_briefly

    wait_briefly(os.environ)
    from torchmae import settings
    from torchmae.bench.contenders import OURS, build
    from torchmae.training import compilation
    from torchmae.training.parallel import blocks

    in_blocks, options = WAYS[way]
    compilation.parts = lambda model, _: blocks(model) if in_blocks else [model]
    contender = build(OURS, settings.parse([*CASES[case], *options, *rest]))
    first_step_s = contender.first_steps()["first_step_s"]
    rate = statistics.median(contender.turn(steps) for _ in range(3))
    print(json.dumps([first_step_s, rate, contender.peak_memory()]))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each of a process's three turns")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "WAY"), help="used by the script itself")
    args, rest = parser.parse_known_args()
    if args.one:
        measure(*args.one, args.steps, rest)
        return
    print(f"{'':44}{'first step, s':>15}{'images/s':>10}{'ratio':>8}{'peak, GB':>10}")
    for case in args.cases:
        found: dict[str, list[list[float]]] = {way: [] for way in args.ways}
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(args.rounds):
                for i, way in enumerate(args.ways):
                    words = [sys.executable, __file__, "--steps", str(args.steps), "--one", case, way, *rest]
                    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/{i}"}
                    run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                    found[way].append(json.loads(run.stdout.splitlines()[-1]))
        plain = statistics.median(rate for _, rate, _ in found[args.ways[0]])
        for way, results in found.items():
            rate, memory = (statistics.median(column) for column in list(zip(*results, strict=True))[1:])
            first = results[0][0]
            print(f"{case + ', ' + way:44}{first:15.1f}{rate:10.1f}{rate / plain:8.2f}{memory / 1e9:10.2f}", flush=True)


if __name__ == "__main__":
    main()
