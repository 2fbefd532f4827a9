"""Where a GPU's time goes in one training step: kernels by kind and by name, and how long it stands idle.

    python benchmarks/gpu_profile.py --out FILE.json [--case vit_large] [--steps 3] [--trace FILE.json.gz] [OPTIONS]

The compiled step of `gpu_steps.py`, under PyTorch's profiler. Idle is the time between the first and the last kernel in
which none runs. `--trace` keeps the timeline for https://ui.perfetto.dev. Further options go to the settings.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from gpu_steps import BATCHES, TRY
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from torchmae import presets, settings
from torchmae.bench.contenders import OURS, build
from torchmae.nn.flops import count_flops

# The first pattern that a kernel's name matches is its kind.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|cudnn.*mha",
    "matrix products": r"gemm|nvjet|cutlass|matmul|^aten::(mm|bmm|addmm)$|mkldnn",
    "optimiser": r"multi_tensor|adam|fused_adam|Optimizer",
    "copies between processor and GPU": r"Memcpy HtoD|Memcpy DtoH",
    "layer norms and sums, fused by the compiler": r"triton_(per|red)",
    "GELU, sums and casts, fused by the compiler": r"triton_poi",
    "copies, gathers and fills": r"Memcpy|Memset|copy|fill|cat|gather|index|scatter",
    "reductions": r"reduce|norm",
    "elementwise": r"elementwise|vectorized|aten::",
}


def kind_of(name: str) -> str:
    """The kind of work a kernel does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "the rest")


def spans(events: list[FunctionEvent], on_gpu: bool) -> list[tuple[float, float, str]]:
    """Start, end (microseconds) and name of every kernel; of every operator's own time on a processor."""
    if on_gpu:
        ranges = re.compile(r"^(Optimizer|ProfilerStep|## Call|Torch-Compiled)")  # they span the kernels under them
        kernels = (
            event
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA and not ranges.match(event.name)
        )
        return sorted((event.time_range.start, event.time_range.end, event.name) for event in kernels)
    starts = ((event.time_range.start, event.self_cpu_time_total, event.name) for event in events)
    return [(start, start + seconds, name) for start, seconds, name in starts]


def busy(kernels: list[tuple[float, float, str]]) -> float:
    """Microseconds in which at least one kernel runs."""
    total, until = 0.0, float("-inf")
    for start, end, _ in sorted(kernels):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main() -> None:
    """Prints the tables and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=BATCHES, default="vit_large")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--try", action="store_true", dest="tried", help="a tiny network, to try the script")
    args, rest = parser.parse_known_args()
    args.case = "vit_tiny_32_p4" if args.tried else args.case
    cuda = torch.cuda.is_available()
    words = [f"--model.preset={args.case}", f"--batch_size={BATCHES[args.case]}", f"--compile={str(cuda).lower()}"]
    contender = build(OURS, settings.parse([*words, *(TRY if args.tried else []), *rest]))
    contender.first_steps()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(args.steps):
            contender.run()
        if cuda:
            torch.cuda.synchronize()
    if args.trace:
        profiler.export_chrome_trace(str(args.trace))
    kernels = spans(list(profiler.events()), cuda)
    names: dict[str, float] = defaultdict(float)
    for start, end, name in kernels:
        names[name] += (end - start) / 1000 / args.steps
    kinds: dict[str, float] = defaultdict(float)
    for name, milliseconds in names.items():
        kinds[kind_of(name)] += milliseconds
    window = max(end for _, end, _ in kernels) - min(start for start, _, _ in kernels)
    idle = 1 - busy(kernels) / window
    flops = count_flops(presets.weightless(contender.arguments), 0.75).training * len(contender.images)
    found: dict[str, Any] = {
        "case": args.case,
        "batch_size": len(contender.images),
        "milliseconds_per_step": window / 1000 / args.steps,
        "idle_share": idle,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": dict(sorted(names.items(), key=lambda item: -item[1])[:60]),
        "launches_per_step": len(kernels) / args.steps,
        "tflops_while_in_products": flops / max(kinds["matrix products"], 1e-9) / 1e9,
    }
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    milliseconds, launches = found["milliseconds_per_step"], found["launches_per_step"]
    print(f"{args.case}, batch {found['batch_size']}: {milliseconds:.1f} ms a step, idle {idle:.1%}")
    print(f"{launches:.0f} kernels a step; products at {found['tflops_while_in_products']:.0f} TFLOP/s")
    for title in ("kinds", "kernels"):
        print(f"\n{'milliseconds of a step':>22}  {title}")
        for name, milliseconds in list(found[title].items())[:25]:
            print(f"{milliseconds:22.2f}  {name[:110]}")


if __name__ == "__main__":
    main()
