"""The training step beside other people's code: images a second, memory, share of the peak.

    python benchmarks/step.py [--quick] [--cases tiny base] [--against transformers lightly timm-blocks] [OPTIONS]

Contenders take turns, each in a process of its own with the threads and the allocator that its users have; a ratio is
one of medians. Figures are added to benchmarks/results/step.json
after each case, with date, hardware and versions. Further options go to the settings of all cases (`--threads 1`, say).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torchmae import settings
from torchmae.bench.contenders import OURS
from torchmae.bench.measure import measure_step
from torchmae.bench.results import Report
from torchmae.config.bench import STEP_PEERS, BenchStep
from torchmae.training.progress import Display

TINY = ["--model.preset=vit_tiny_32_p4", "--batch_size=256"]
BASE = ["--model.preset=vit_base", "--batch_size=8"]
FP32 = ["--precision=fp32"]
# Our options and the peers', which always train the paper's own form of MAE.
CASES = {
    "tiny": (TINY, TINY),
    "tiny-fp32": ([*TINY, *FP32], TINY),
    "base": (BASE, BASE),
    "base-fp32": ([*BASE, *FP32], BASE),
    "fast": (["--batch_size=256"], TINY),  # --fast-recipe
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--against", nargs="+", choices=STEP_PEERS, default=["transformers"])
    parser.add_argument("--fast-recipe", default="cifar10", help="the recipe of the case `fast`")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds of one step: to see it work")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    args, rest = parser.parse_known_args()
    options = BenchStep(rounds=3, steps=1) if args.quick else BenchStep(rounds=args.rounds)
    display = Display("auto")
    reports = {}
    for case in args.cases:
        ours, theirs = CASES[case]
        config = settings.parse([*ours, *rest], args.fast_recipe if case == "fast" else None)
        peer = settings.parse([*theirs, *rest])
        configs = {OURS: config, **dict.fromkeys(args.against, peer)}
        reports[case] = measure_step(configs, options, display.preparing)
        display.close()
        records = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**records, case: reports[case].record()}, indent=2) + "\n")
        print(f"\n{case}: {reports[case].text()}\n", flush=True)
    for case, report in reports.items():
        print(f"{case:10} {summary(report)}")


def summary(report: Report) -> str:
    """The ratios of a case in a line."""
    ours, *others = report.results
    parts = []
    for other in others:
        memories = ours.figures.get("peak_memory"), other.figures.get("peak_memory")
        memory = f", {memories[0] / memories[1]:.2f} of its memory" if memories[0] and memories[1] else ""
        parts.append(f"{report.ratios()[other.name]:.2f} x {other.name}{memory}")
    return f"{ours.name}: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
